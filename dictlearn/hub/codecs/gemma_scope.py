"""Gemma Scope 1: `params.npz`, JumpReLU, no configuration (Lieberum et al. 2024, arXiv 2408.05147).

pre = x @ W_enc + b_enc; latents are relu(pre) where pre > threshold; recon = latents @ W_dec + b_dec. The layer is
in the path and the site in the name of the repository; without these the site is "x". Those of the embedding are of
raw embeddings, before Gemma scales them. Transcoders read the residual stream before the MLP, through its norm
without the gain, and write what the MLP adds, after its second norm.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, read_npz

WEIGHTS = "params.npz"
SITES = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)(?![\w-])")
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
        tensors = {key[:1].upper() + key[1:] if key[:2] == "w_" else key: t for key, t in read_npz(path).items()}
        d, n = encoder_sizes(path, tensors, "W_enc")
        shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
        check_tensors(path, tensors, shapes)
        read, write, metadata = _origin(f"{files.source.get('repo', files.where)}/{place}")
        input_norm = "none" if read == write else "rms_norm"
        return linear(path, Weights(**tensors), None, read, write, input_norm=input_norm, metadata=metadata)


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
        site = "embed" if re.search(r"/embedding(?:/|$)", where) else "x"
    else:
        site = f"{SITES[name]}.{layer[1]}"
    return site, site, metadata
