"""mats_sae_training (SAELens before 0.2, 2023 to 2024): one pickle of configuration and weights. Not supported.

The configuration is a Python object, of a class that the file names, and so is what else is beside it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import ClassVar, NoReturn

from dictlearn.hub.codecs import transcoder_circuits
from dictlearn.hub.files import Files
from dictlearn.types import FormatError

PICKLES = (".pkl", ".pkl.gz")
STORED = (*PICKLES, ".pt", ".pth", ".npz", ".safetensors")  # what weights are in
OF_OTHERS = re.compile(r"ae(_\d+)?\.pt")  # dictionary_learning


class MatsSaeTraining:
    """Known, so that the reason is said."""

    layout: ClassVar[str] = "NAME.pkl.gz, NAME.pkl, or NAME.pt with `cfg` and `state_dict`"

    def find(self, names: Sequence[str]) -> list[str]:
        """Where nothing else holds weights: such files may be anything beside those of other formats."""
        stored = [name for name in names if name.endswith(STORED)]
        alone = len(stored) == 1 and _is_candidate(stored[0])
        return stored if alone or all(name.endswith(PICKLES) for name in stored) else []

    def named(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if _is_candidate(name)]

    def matches(self, files: Files, place: str) -> bool:
        if place.endswith(PICKLES):
            return True
        own = transcoder_circuits.NAME.fullmatch(posixpath.basename(place)) is None
        return own and {"cfg", "state_dict"} <= set(transcoder_circuits.read_pickle(files.path(place)))

    def read(self, files: Files, place: str) -> NoReturn:
        raise FormatError(
            f"{files.place(place)}: a pickle of SAELens before 0.2 is not supported because what it holds are "
            "Python objects, and to load these is to run the code that they name: let SAELens save it as cfg.json "
            "and sae_weights.safetensors."
        )


def _is_candidate(name: str) -> bool:
    return name.endswith((*PICKLES, ".pt")) and OF_OTHERS.fullmatch(posixpath.basename(name)) is None
