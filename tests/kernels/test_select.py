"""The largest entries of each row, against a full sort."""

import pytest
import torch
from torch import Tensor

from dictlearn.kernels import top_columns


def values_of_sorted(values: Tensor, m: int) -> Tensor:
    return values.sort(dim=-1, descending=True).values[:, :m]


@pytest.mark.parametrize("n", [0, 1, 37])
@pytest.mark.parametrize(
    ("width", "m"),
    [(1, 1), (7, 7), (100, 3), (4096, 1), (4096, 40), (4097, 40), (16384, 40), (24576, 300), (3 * 64, 5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_a_sort(n: int, width: int, m: int, dtype: torch.dtype) -> None:
    values = torch.randn(n, width, generator=torch.Generator().manual_seed(n + width)).to(dtype)
    found = top_columns(values, m)[1]
    assert found.shape == (n, m)
    assert all(len(set(row)) == m for row in found.tolist())
    assert torch.equal(values_of_sorted(values.gather(1, found), m), values_of_sorted(values, m))


def test_equal_values() -> None:
    """Many entries share the value at the border: any of them is right, each at most once."""
    values = torch.randint(0, 3, (50, 8192), generator=torch.Generator().manual_seed(0)).float()
    found = top_columns(values, 33)[1]
    assert all(len(set(row)) == 33 for row in found.tolist())
    assert (values.gather(1, found) == 2).all()


def test_all_of_the_largest_in_one_group() -> None:
    values = torch.zeros(2, 8192)
    together = torch.arange(0, 8192, 8192 // 64)  # columns that are one group of 64
    values[:, together] = 1 + torch.arange(64.0)
    assert top_columns(values, 20)[1][1].tolist() == together[-20:].tolist()
