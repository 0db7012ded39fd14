"""What the tests of activation stores share."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dictlearn.data import ActivationData, LocalText, module, normalize, stored
from dictlearn.lm import LM, load_lm, resolve
from tests.data.helpers import random_documents
from tests.data.stores import BATCH, N_TOKENS, SITES, Make
from tests.tiny_lms import tiny_lm_folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), vocab=410)), dtype="float32")


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that the LM was run on, one number per forward."""
    rows: list[int] = []
    run = module.activations

    def counted(model: Any, sites: Any, tokens: torch.Tensor) -> Any:
        rows.append(len(tokens))
        return run(model, sites, tokens)

    monkeypatch.setattr(module, "activations", counted)
    return rows


@pytest.fixture
def data(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(stored, "SHARD_BYTES", 150 * (2 * 16 * 2 + 16))  # of two sites of width 16 in bfloat16
    monkeypatch.setattr(normalize, "N_MEDIAN", 500)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(130)) + "\n")

    def make(
        n_tokens: int = N_TOKENS,
        seed: int = 0,
        sites: tuple[str, ...] = SITES,
        batch_size: int = BATCH,
        stream: str = "shuffled",
        of: LM = lm,
        **changes: Any,
    ) -> ActivationData:
        sizes = {"ctx": 16, "lm_batch_rows": 4, "block_rows": 8, "n_slices": 3, "path": str(path)}
        text = LocalText(**{**sizes, "store": str(tmp_path / "store"), "max_norm_ratio": 1.05, **changes})
        text.cache_dir = str(tmp_path / "cache")
        found = [resolve(of.model, site) for site in sites]
        return ActivationData(text, of, found, batch_size, n_tokens, seed, stream)

    return make
