"""The same runs on a GPU."""

from pathlib import Path

import pytest
import torch

from dictlearn.kernels import decode, encode_batch_top_k, encode_top_k, normalise_rows_, project_rows_
from tests.runs import run_train, weight_hashes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_kernels_equal_those_of_the_cpu() -> None:
    inputs = [torch.randn(64, 32), torch.randn(128, 32).T, torch.randn(128), torch.randn(128, 32)]
    results = []
    for device in ("cpu", "cuda"):
        x, W_enc, b_enc, W_dec = (t.to(device).requires_grad_() for t in inputs)
        loss = decode(encode_top_k(x, W_enc, b_enc, 8), W_dec).square().sum()
        results.append([loss, *torch.autograd.grad(loss, [x, W_enc, b_enc, W_dec])])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_a_gpu_learns_as_on_the_cpu(tmp_path: Path, precision: str) -> None:
    cpu = run_train(tmp_path / "cpu", "n_tokens=50_000")
    gpu = run_train(tmp_path / "gpu", "n_tokens=50_000", "trainer=gpu", f"trainer.precision={precision}")
    for name, report in cpu.reports.items():
        fvu = gpu.reports[name]["reconstruction"]["fvu"]
        assert fvu == pytest.approx(report["reconstruction"]["fvu"], rel=0.05)


def test_deterministic_runs_are_bit_identical(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        run_train(tmp_path / folder, "trainer=gpu", "trainer.deterministic=true")
    assert weight_hashes(tmp_path / "one") == weight_hashes(tmp_path / "two")


@pytest.mark.parametrize("encode", [encode_top_k, encode_batch_top_k])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_does_not_wait_for_the_device(encode, autocast: bool) -> None:
    """No synchronisation in the kernels, forward and backward."""
    x = torch.randn(64, 32, device="cuda")
    W_enc = torch.randn(1024, 32, device="cuda").T.requires_grad_()
    b_enc = torch.zeros(1024, device="cuda", requires_grad=True)
    W_dec = torch.randn(1024, 32, device="cuda", requires_grad=True)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            decode(encode(x, W_enc, b_enc, 8), W_dec).square().sum().backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            project_rows_(W_dec.grad, W_dec)
            normalise_rows_(W_dec)

    step()  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert W_enc.grad is not None
