"""What only Triton's implementation has."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("generation", [80, 90])
def test_every_kernel_compiles(generation: int, tmp_path: Path) -> None:
    """For Ampere and Hopper, without a GPU: the interpreter accepts what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.kernels.compile_triton", str(generation)]
    run = subprocess.run(
        program,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 16
    product = next(kernel for kernel in found if kernel["name"] == "_product")
    assert product["tensor_cores"]
    assert product["shared"] == 3 * propose.STAGE_BYTES  # so its loads run ahead of its products
