"""qresearch: one torch file, ReLU autoencoders of the residual stream of DeepSeek-R1-Distill-Llama-8B.

latents = relu(x @ encoder.weight.T + encoder.bias); recon = latents @ decoder.weight.T + decoder.bias, in bfloat16.
The layer and the language model are in the file's name.
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

NAME = re.compile(r"(DeepSeek-[\w.-]+)-SAE-l(\d+)\.pt")
CTX = 1024


class Qresearch:
    """Residual autoencoders of DeepSeek-R1's distillates."""

    layout: ClassVar[str] = "DeepSeek-...-SAE-lLAYER.pt with encoder.weight"

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if NAME.fullmatch(posixpath.basename(name))]

    def matches(self, files: Files, place: str) -> bool:
        return "encoder.weight" in read_torch(files.path(place))

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(place)
        w = read_torch(path)
        n, d = encoder_sizes(path, w, "encoder.weight")
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
        check_tensors(path, w, shapes)
        found = NAME.fullmatch(posixpath.basename(place))
        site, lm = ("x", None) if found is None else (f"resid_post.{found[2]}", f"deepseek-ai/{found[1]}")
        weights = Weights(w["encoder.weight"].T, w["encoder.bias"], w["decoder.weight"].T, w["decoder.bias"])
        return linear(path, weights, ReLU(l1=0.0), site, site, metadata={"lm_name": lm, "ctx": CTX})
