"""Qwen Scope: `layerL.sae.pt`, TopK autoencoders of the residual stream of Qwen 3.

latents are the ReLU of the k largest x @ W_enc.T + b_enc; recon = latents @ W_dec.T + b_dec: both matrices are
stored as [out, in]. k and the language model are in the repository's name alone.
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
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

NAME = re.compile(r"layer(\d+)\.sae\.pt")
REPOSITORY = re.compile(r"SAE-Res-(Qwen[\w.-]+?)-W\d+K-L0_(\d+)")


class QwenScope:
    """Residual autoencoders of Qwen 3."""

    layout: ClassVar[str] = "layerLAYER.sae.pt with W_enc, in a folder named SAE-Res-LM-W..K-L0_K"

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if NAME.fullmatch(posixpath.basename(name))]

    def matches(self, files: Files, place: str) -> bool:
        return "W_enc" in read_torch(files.path(place))

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(place)
        w = read_torch(path)
        n, d = encoder_sizes(path, w, "W_enc")
        check_tensors(path, w, {"W_enc": (n, d), "b_enc": (n,), "W_dec": (d, n), "b_dec": (d,)})
        where = files.origin(place)
        found = REPOSITORY.search(where)
        if found is None:
            raise FormatError(
                f"{path}: k is in the name of the repository alone: the file must be below a folder of the "
                f"repository's name, SAE-Res-LM-W..K-L0_K; got {where}."
            )
        sparsifier = TopK(int(found[2]))
        try:
            sparsifier.bind(n)
        except DictlearnError as error:
            raise FormatError(f"{path}: {error}") from None
        layer = NAME.fullmatch(posixpath.basename(place))
        site = f"resid_post.{layer[1]}" if layer else "x"
        weights = Weights(w["W_enc"].T, w["b_enc"], w["W_dec"].T, w["b_dec"])
        return linear(path, weights, sparsifier, site, site, metadata={"lm_name": f"Qwen/{found[1]}"})
