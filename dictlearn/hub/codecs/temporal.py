"""Temporal autoencoders (Lubana et al. 2025): `conf.yaml` beside `latest_ckpt.safetensors`. Not supported.

Each token's latents are what attention over the earlier tokens of the sequence does not predict, and its
reconstruction holds that prediction: dictionaries here are functions of one token.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import read_yaml
from dictlearn.types import FormatError

CONFIG, WEIGHTS = "conf.yaml", "latest_ckpt.safetensors"


class Temporal:
    """Known, so that the reason is said."""

    layout: ClassVar[str] = f"{CONFIG} with `llm` and `sae`, beside {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS, CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        return {"llm", "sae"} <= set(read_yaml(files.path(posixpath.join(place, CONFIG))))

    def read(self, files: Files, place: str) -> NoReturn:
        raise FormatError(
            f"{files.place(place) if place else files.where}: a temporal autoencoder is not supported because its "
            "latents depend on earlier tokens of the sequence, and dictionaries here are functions of one token."
        )
