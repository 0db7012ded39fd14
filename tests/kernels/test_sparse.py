"""Compact operations against dense ones in float64, gradients included."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dictlearn.dictionaries.linear import Linear
from dictlearn.kernels import backend, decode, encode_abs_top_k, encode_group_max, encode_top_k
from dictlearn.kernels import encode as encode_module
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import SparseLatents


def problem(n_tokens: int = 33, d_in: int = 7, n_latents: int = 29, d_out: int = 5) -> list[Tensor]:
    make = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    latent_major = draw(n_latents, d_in).T  # the layout parameters have
    return [
        t.requires_grad_() for t in (draw(n_tokens, d_in), latent_major, draw(n_latents), draw(n_latents, d_out))
    ]


def dense_top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """Row by row, by sorting."""
    pre = x @ W_enc + b_enc
    rows = []
    for row in pre:
        kept = sorted(range(len(row)), key=lambda i, row=row: -row[i].item())[:k]
        mask = torch.zeros_like(row)
        mask[kept] = 1.0
        rows.append((row * mask).clamp(min=0))
    return torch.stack(rows)


@pytest.mark.parametrize("k", [1, 4, 29])
def test_encode_top_k_is_the_dense_rule(k: int) -> None:
    x, W_enc, b_enc, _ = problem()
    sparse = encode_top_k(x, W_enc, b_enc, k)
    assert sparse.n_tokens == len(x)
    assert torch.equal(sparse.offsets.diff(), torch.full((len(x),), k))
    torch.testing.assert_close(sparse.to_dense(), dense_top_k(x, W_enc, b_enc, k))


@pytest.mark.parametrize("k", [1, 4, 29])
def test_gradients_equal_those_of_the_dense_rule(k: int) -> None:
    inputs = problem()
    x, W_enc, b_enc, W_dec = inputs
    weights = torch.randn(len(x), W_dec.shape[1], dtype=torch.float64)
    sparse = (decode(encode_top_k(x, W_enc, b_enc, k), W_dec) * weights).sum()
    dense = (dense_top_k(x, W_enc, b_enc, k) @ W_dec * weights).sum()
    for got, expected in zip(torch.autograd.grad(sparse, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_weight_gradients_have_the_layout_of_the_weights() -> None:
    x, W_enc, b_enc, W_dec = problem()
    loss = decode(encode_top_k(x, W_enc, b_enc, 3), W_dec).square().sum()
    grad = torch.autograd.grad(loss, W_enc)[0]
    assert grad.stride() == W_enc.stride()


def test_a_latent_that_fires_on_every_token() -> None:
    x, W_enc, _, W_dec = problem()
    b_enc = torch.zeros(29, dtype=torch.float64)
    b_enc[11] = 100.0
    b_enc.requires_grad_()
    sparse = encode_top_k(x, W_enc, b_enc, 2)
    assert (sparse.to_dense()[:, 11] > 0).all()
    got = torch.autograd.grad(decode(sparse, W_dec).sum(), b_enc)[0]
    expected = torch.autograd.grad((dense_top_k(x, W_enc, b_enc, 2) @ W_dec).sum(), b_enc)[0]
    torch.testing.assert_close(got, expected)


def test_empty_batch() -> None:
    _, W_enc, b_enc, W_dec = problem()
    out = decode(encode_top_k(torch.zeros(0, 7, dtype=torch.float64), W_enc, b_enc, 3), W_dec)
    assert out.shape == (0, 5)


def random_weights() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2_500, 64), torch.randn(1024, 64).T / 8, torch.randn(1024)


@cache
def trained_weights() -> tuple[Tensor, Tensor, Tensor]:
    """Of an autoencoder that has learned sparse data, with one dimension that is far larger than the others."""
    d, n_latents = 64, 512
    features = torch.nn.functional.normalize(torch.randn(200, d), dim=-1)

    def draw(n: int) -> Tensor:
        x = (torch.rand(n, 200) < 0.06) * (0.5 + torch.rand(n, 200)) @ features + 0.05 * torch.randn(n, d)
        x[:, 3] = 30 + 5 * x[:, 3]
        return x

    sae = Linear(d, d, n_latents, TopK(k=16))
    mean = draw(5_000).mean(0, keepdim=True)
    sae.initialise_(torch.Generator().manual_seed(0), mean, mean)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    losses = []
    for _ in range(300):
        x = draw(256)
        loss = sae.losses(sae.step(x, x, torch.ones(1)))["recon"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.project_()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]  # it has learned
    return draw(2_500), sae.W_enc.detach(), sae.b_enc.detach()


def largest_of_groups(pre_acts: Tensor, k: int) -> Tensor:
    per_group = pre_acts.shape[-1] // k
    return pre_acts.unflatten(-1, (k, -1)).argmax(-1) + per_group * torch.arange(k)


BFLOAT16_ALONE = {
    encode_top_k: lambda pre_acts, k: pre_acts.topk(k).indices.sort(-1).values,
    encode_abs_top_k: lambda pre_acts, k: pre_acts.abs().topk(k).indices.sort(-1).values,
    encode_group_max: largest_of_groups,
}


@pytest.mark.parametrize("encode", BFLOAT16_ALONE)
@pytest.mark.parametrize("weights", [random_weights, trained_weights])
@pytest.mark.parametrize("native", [True, False])
def test_autocast_proposes_and_float32_decides(
    encode, weights, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(backend, "use_native", lambda *_, **__: False)
    x, W_enc, b_enc = weights()
    n_tokens, k = len(x), 16
    exact = encode(x, W_enc, b_enc, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = encode(x, W_enc, b_enc, k)
        plain = BFLOAT16_ALONE[encode](x @ W_enc + b_enc, k)
    sets = exact.indices.view(n_tokens, k)
    assert fast.values.dtype == torch.float32
    same = (fast.indices.view(n_tokens, k) == sets).all(-1)
    assert same.float().mean() >= 0.999
    assert (plain == sets).all(-1).float().mean() < 0.95  # so the second look is what decides
    torch.testing.assert_close(fast.to_dense()[same], exact.to_dense()[same])


@pytest.mark.parametrize("autocast", [False, True])
def test_of_equal_pre_activations_the_lower_index_is_kept(autocast: bool) -> None:
    W_enc = torch.zeros(40, 3).T
    b_enc = torch.tensor([1.0, 3.0] * 20)  # twenty latents share the largest value
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        sparse = encode_top_k(torch.randn(9, 3), W_enc, b_enc, 18)
    assert (sparse.indices.view(9, 18) == torch.arange(1, 36, 2)).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_are_independent_of_the_tile_that_they_are_in(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc = torch.randn(70, 24), torch.randn(256, 24).T, torch.randn(256)
    found = []
    for rows in (1, 7, 70, 1000):
        monkeypatch.setattr(encode_module, "TILE_BYTES", {"cpu": rows * 256 * (2 if autocast else 4)})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found.append(encode_top_k(x, W_enc, b_enc, 9))
    for other in found[1:]:
        assert torch.equal(other.indices, found[0].indices)
        torch.testing.assert_close(other.values, found[0].values)


class Allocations(TorchDispatchMode):
    """Storages of at least `n_bytes` that operations have made."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = n_bytes
        self.found: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.n_bytes:
                self.found.setdefault(value.untyped_storage().data_ptr(), (str(func), tuple(value.shape)))
                self.kept.append(value)  # or its address is used again
        return out


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_makes_one_tensor_of_batch_times_latents(autocast: bool) -> None:
    """The pre-activations; everything else is compact, forward and backward, with AuxK on a few dead latents."""
    n_tokens, d, n_latents = 256, 8, 512
    sae = Linear(d, d, n_latents, TopK(k=4))
    sae.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, d), torch.zeros(1, d))
    x = torch.randn(n_tokens, d)
    wide = n_tokens * n_latents * (2 if autocast else 4)
    with Allocations(wide) as allocations, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        step = sae.step(x, x, torch.ones(1), torch.arange(20))
        aux = AuxK(k=4)(step)
        assert aux is not None
        (sae.losses(step)["recon"] + aux).backward()
    assert len(allocations.found) == 1, allocations.found


def test_sparse_latents_round_trip() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, -3.0, 0.0]])
    sparse = SparseLatents.from_dense(dense)
    assert sparse.offsets.tolist() == [0, 1, 1, 3]
    assert torch.equal(sparse.to_dense(), dense)


def test_decode_of_tokens_without_latents_is_zero() -> None:
    sparse = SparseLatents.from_dense(torch.tensor([[0.0, 0.0], [0.0, 3.0]]))
    W_dec = torch.tensor([[1.0], [2.0]])
    assert decode(sparse, W_dec).tolist() == [[0.0], [6.0]]
