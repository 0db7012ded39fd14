"""Nearest directions and duplicates against planted ones and a slow search."""

import pytest
import torch

from dictlearn.metrics import geometry
from dictlearn.metrics.geometry import nearest, row_cosines


@pytest.mark.parametrize("chunk", [2**26, 48])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_planted_duplicates_are_found(monkeypatch: pytest.MonkeyPatch, chunk: int, scale: float) -> None:
    monkeypatch.setattr(geometry, "CHUNK_ELEMENTS", chunk)
    rows = torch.linalg.qr(torch.randn(16, 16)).Q
    rows[11] = 3.0 * rows[4]  # of another norm
    rows[7] = -rows[2]  # opposite directions are two
    rows[9] = 0.95 * rows[0] + (1 - 0.95**2) ** 0.5 * rows[1]
    rows[13] = 0.0
    rows[14] = 0.0
    found = nearest(scale * rows)
    assert found.n_duplicates == 4
    assert (found.cosine > 0.9).nonzero().flatten().tolist() == [0, 4, 9, 11]
    assert found.latent[[0, 4, 9, 11]].tolist() == [9, 11, 0, 4]
    assert found.cosine[[0, 4]].tolist() == pytest.approx([0.95, 1.0], abs=1e-6)
    assert found.latent[[13, 14]].tolist() == [-1, -1]
    assert found.cosine[[13, 14]].isnan().all()


@pytest.mark.parametrize("chunk", [2**26, 7])
def test_against_a_slow_search(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(geometry, "CHUNK_ELEMENTS", chunk)
    rows = torch.randn(30, 3)
    rows[5] = 0
    found = nearest(rows)
    for i in range(30):
        others = {j: torch.cosine_similarity(rows[i], rows[j], dim=0).item() for j in range(30) if j not in (i, 5)}
        if i == 5:
            continue
        best = max(others, key=others.__getitem__)
        assert found.latent[i] == best
        assert found.cosine[i].item() == pytest.approx(others[best], abs=1e-6)


def test_a_zero_row_is_nobodys_neighbour() -> None:
    """Not even where every other direction points away."""
    found = nearest(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]))
    assert found.latent.tolist() == [1, 0, -1]
    assert found.cosine[:2].tolist() == [-1.0, -1.0]


def test_one_latent_has_no_neighbour() -> None:
    found = nearest(torch.ones(1, 4))
    assert found.latent.tolist() == [-1]
    assert found.cosine.isnan().all()
    assert found.n_duplicates == 0


def test_row_cosines() -> None:
    a, b = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 5.0], [-1.0, -1.0], [1.0, 0.0]])
    got = row_cosines(a, b)
    assert got[:2].tolist() == pytest.approx([0.0, -1.0])
    assert got[2].isnan()
