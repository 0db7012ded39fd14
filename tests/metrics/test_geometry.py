"""Duplicate directions against planted ones."""

import pytest
import torch

from dictlearn.metrics import geometry
from dictlearn.metrics.geometry import duplicates


@pytest.mark.parametrize("chunk", [1024, 3])
def test_planted_duplicates_are_found(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(geometry, "CHUNK_ROWS", chunk)
    rows = torch.linalg.qr(torch.randn(16, 16)).Q
    rows[11] = 3.0 * rows[4]  # of another norm
    rows[7] = -rows[2]  # opposite directions are two
    rows[9] = 0.95 * rows[0] + (1 - 0.95**2) ** 0.5 * rows[1]
    rows[13] = 0.0
    rows[14] = 0.0
    assert duplicates(rows).nonzero().flatten().tolist() == [0, 4, 9, 11]
    assert duplicates(100 * rows).nonzero().flatten().tolist() == [0, 4, 9, 11]


def test_one_latent_has_no_duplicate() -> None:
    assert duplicates(torch.ones(1, 4)).tolist() == [False]
