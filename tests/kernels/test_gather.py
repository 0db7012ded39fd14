"""Products with the rows that each token uses, against dense ones in float64."""

import pytest
import torch

from dictlearn.kernels import row_products, scatter_outer


@pytest.mark.parametrize(
    ("n_tokens", "k", "n_latents", "d"), [(13, 5, 17, 3), (1, 1, 1, 1), (40, 17, 17, 64), (0, 2, 9, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_dense(n_tokens: int, k: int, n_latents: int, d: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    x, rows = torch.randn(2 * d, n_tokens, generator=make).T[:, ::2], torch.randn(n_latents, d, generator=make)
    x, rows = x.to(dtype), rows.to(dtype)  # x is not contiguous
    order = [torch.randperm(n_latents, generator=make)[:k] for _ in range(n_tokens)]
    indices = torch.stack(order) if order else torch.zeros(0, k, dtype=torch.int64)
    values = torch.randn(n_tokens, k, generator=make).to(dtype)
    torch.testing.assert_close(row_products(x, rows, indices), (x @ rows.T).gather(1, indices))
    dense = torch.zeros(n_tokens, n_latents, dtype=dtype).scatter(1, indices, values)
    torch.testing.assert_close(scatter_outer(values, indices, x, n_latents), dense.T @ x)


def test_a_row_that_every_token_uses() -> None:
    x, values = torch.randn(500, 8, dtype=torch.float64), torch.randn(500, 1, dtype=torch.float64)
    found = scatter_outer(values, torch.full((500, 1), 3), x, 6)
    torch.testing.assert_close(found[3], (values * x).sum(0))
    assert found.abs().sum(1).nonzero().flatten().tolist() == [3]
