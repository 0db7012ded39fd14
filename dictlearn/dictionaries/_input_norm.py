"""Which dictionaries can normalise each token of their input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dictlearn.types import DictlearnError

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

INPUT_NORMS = ("none", "layer_norm")


def check_input_norm(dictionary: Dictionary) -> None:
    """Raise DictlearnError where `dictionary.input_norm` is none that this dictionary can have."""
    if dictionary.input_norm not in INPUT_NORMS:
        raise DictlearnError(f"input_norm must be one of {', '.join(INPUT_NORMS)}, got {dictionary.input_norm!r}.")
    if dictionary.input_norm == "none":
        return
    if dictionary.site_axis or not dictionary.is_autoencoder:
        raise DictlearnError(
            "input_norm=layer_norm needs an autoencoder of one site, because the reconstruction is put back with "
            f"the mean and standard deviation of the token that was read; this {type(dictionary).__name__} reads "
            f"{', '.join(dictionary.reads)} and writes {', '.join(dictionary.writes)}: use input_norm=none."
        )
    if dictionary.d_in < 2:
        raise DictlearnError(f"input_norm=layer_norm needs activations at least 2 wide, got {dictionary.d_in}.")
