"""One tiny random LM per family for all tests here; tests leave them as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.lm import load_lm
from tests.tiny_lms import tiny_lm_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny LM, by family; 4 layers."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_lm_folder(tmp_path_factory.mktemp(family), family, n_layers=4)
        return made[family]

    return get


@pytest.fixture(scope="session")
def model(folder: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The loaded tiny LM, by family."""
    loaded: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in loaded:
            loaded[family] = load_lm(str(folder(family))).model
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def input_ids() -> Tensor:
    return torch.randint(2, 97, (3, 7), generator=torch.Generator().manual_seed(3))
