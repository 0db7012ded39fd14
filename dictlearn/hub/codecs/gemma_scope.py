"""Gemma Scope 1: `params.npz`, JumpReLU, no configuration (Lieberum et al. 2024, arXiv 2408.05147).

pre = x @ W_enc + b_enc; latents are relu(pre) where pre > threshold; recon = latents @ W_dec + b_dec. The layer is
in the path and the site in the name of the repository; without these the site is "x". Those of the embedding are of
raw embeddings; Gemma multiplies these by sqrt(d), in or after the embedding module by the version of transformers.
Here they are folded to be of the product, what layer 0 reads. Transcoders read the residual stream before the MLP,
through its norm without the gain, and write what the MLP adds, after its second norm.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import Weights, check_finite, linear
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, read_npz

WEIGHTS = "params.npz"
ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
SPELT = {"w_enc": "W_enc", "w_dec": "W_dec"}  # in other files
SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)(?![\w-])")
EMBEDDING = "resid_pre.0"
CTX = 1024


class GemmaScope:
    """Gemma Scope 1: residual, MLP and attention autoencoders, and transcoders."""

    layout: ClassVar[str] = f"{WEIGHTS} with W_enc, b_enc, W_dec, b_dec and threshold"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS)

    def matches(self, files: Files, place: str) -> bool:
        return True  # no other format has a file of this name

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(posixpath.join(place, WEIGHTS))
        tensors = {SPELT.get(key, key): tensor for key, tensor in read_npz(path, (*ARRAYS, *SPELT)).items()}
        d, n = encoder_sizes(path, tensors, "W_enc")
        shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
        check_tensors(path, tensors, shapes)
        read, write, metadata = _origin(files.origin(place))
        input_norm = "none" if read == write else "rms_norm"
        made = linear(path, Weights(**tensors), None, read, write, input_norm=input_norm, metadata=metadata)
        if read == EMBEDDING:
            _fold(made, math.sqrt(d))
            check_finite(path, made)
        return made


@torch.no_grad()
def _fold(made: Linear, scale: float) -> None:
    """By what activations are multiplied, in place."""
    made.W_enc.div_(scale)
    made.W_dec.mul_(scale)
    made.b_dec.mul_(scale)


def _origin(where: str) -> tuple[str, str, dict[str, Any]]:
    """Read site, write site and the language model, from the name of the repository and the path."""
    found = REPOSITORY.search(where)
    metadata: dict[str, Any] = {"prepend_bos": True, "ctx": CTX}
    if found is None:
        return "x", "x", metadata
    size, kind, name = found.groups()
    metadata["lm_name"] = f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")
    layer = re.search(r"/layer_(\d+)(?:/|$)", where)
    if name == "transcoders":
        return (f"resid_mid.{layer[1]}", f"mlp_out.{layer[1]}", metadata) if layer else ("x", "y", metadata)
    if layer is None:
        site = EMBEDDING if re.search(r"/embedding(?:/|$)", where) else "x"
    else:
        site = f"{SITES[name]}.{layer[1]}"
    return site, site, metadata
