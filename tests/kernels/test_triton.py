"""What only Triton's implementation has."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dictlearn.kernels.triton import propose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_the_proposing_product(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens, of latents and of the width, none full; the last group is not full either."""
    n_tokens, n_latents = (140, 300) if tile > 1 else (3, 300)
    monkeypatch.setattr(propose, "TILE_BYTES", tile)
    make = torch.Generator().manual_seed(0)
    shapes = (n_tokens, 70), (n_latents, 70), (n_latents,)
    x, rows, b = (torch.randn(*shape, generator=make).to(DEVICE) for shape in shapes)
    values, indices = propose.propose(x.to(dtype), rows.to(dtype), b, 12)
    pre_acts = x.to(dtype).double() @ rows.to(dtype).double().T + b.double()
    torch.testing.assert_close(values.double(), pre_acts.gather(1, indices), rtol=1e-2, atol=5e-2)  # rounded
    least = pre_acts.topk(12).values[:, -1]
    assert (values.double().amin(1) >= least - 0.2).all()
    assert (indices.diff(dim=1) > 0).all()
