"""Goodfire: one torch file, ReLU autoencoders of the residual stream of Llama (goodfire.ai, 2025).

latents = relu(x @ encoder_linear.weight.T + bias); recon = latents @ decoder_linear.weight.T + bias. The layer and
the language model are in the file's name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import ClassVar

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, read_torch
from dictlearn.sparsifiers.relu import ReLU

NAME = re.compile(r"(Llama-[\w.-]*Instruct)-SAE-l(\d+)\.pth?")
ENCODER = "encoder_linear.weight"


class Goodfire:
    """Residual autoencoders of Llama 3."""

    layout: ClassVar[str] = f"NAME-SAE-lLAYER.pth with {ENCODER}"

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if NAME.fullmatch(posixpath.basename(name))]

    def matches(self, files: Files, place: str) -> bool:
        return ENCODER in read_torch(files.path(place))

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(place)
        w = read_torch(path)
        n, d = encoder_sizes(path, w, ENCODER)
        shapes = {ENCODER: (n, d), "encoder_linear.bias": (n,)}
        check_tensors(path, w, shapes | {"decoder_linear.weight": (d, n), "decoder_linear.bias": (d,)})
        found = NAME.fullmatch(posixpath.basename(place))
        site, lm = ("x", None) if found is None else (f"resid_post.{found[2]}", f"meta-llama/{found[1]}")
        weights = Weights(
            w[ENCODER].T, w["encoder_linear.bias"], w["decoder_linear.weight"].T, w["decoder_linear.bias"]
        )
        return linear(path, weights, ReLU(l1=0.0), site, site, metadata={"lm_name": lm})
