"""Tiny models for all tests here; tests leave them as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from tests.circuits.setup import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    """A tiny LM in float64, by family."""
    made: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in made:
            made[family] = tiny_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get
