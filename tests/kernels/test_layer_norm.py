"""Per-token layer normalisation against the rule written out number by number."""

import statistics

import pytest
import torch

from dictlearn.kernels import layer_norm


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_the_rule(shape: tuple[int, ...], scale: float) -> None:
    x = scale * (torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3)
    z, mean, std = layer_norm(x)
    assert z.shape == x.shape
    assert mean.shape == std.shape == (*shape[:-1], 1)
    rows = zip(x.reshape(-1, 7), z.reshape(-1, 7), mean.flatten(), std.flatten(), strict=True)
    for row, found, m, s in rows:
        values = row.tolist()
        centre, spread = statistics.fmean(values), statistics.stdev(values)  # stdev divides by d - 1
        assert m.item() == pytest.approx(centre, rel=1e-12)
        assert s.item() == pytest.approx(spread, rel=1e-12)
        assert found.tolist() == pytest.approx([(v - centre) / (spread + 1e-5) for v in values], rel=1e-9)
    torch.testing.assert_close(z * (std + 1e-5) + mean, x, rtol=1e-12, atol=1e-12)


def test_a_constant_token_is_zero_and_not_nan() -> None:
    z, mean, std = layer_norm(torch.full((2, 4), 3.0))
    assert torch.equal(z, torch.zeros(2, 4))
    assert torch.equal(mean, torch.full((2, 1), 3.0))
    assert torch.equal(std, torch.zeros(2, 1))


def test_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(layer_norm(x)), x)


def test_one_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two dimensions"):
        layer_norm(torch.ones(3, 1))
