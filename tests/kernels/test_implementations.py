"""Every implementation of every operation against the dense reference in float64.

Triton's kernels are compiled where there is a GPU, and run by its interpreter elsewhere.
"""

import pytest
import torch
from torch import Tensor

from dictlearn.kernels import (
    backend,
    decode,
    encode_abs_top_k,
    encode_batch_top_k,
    encode_group_max,
    encode_top_k,
    native,
    normalise_rows_,
    project_rows_,
    reference,
    row_products,
    scatter_outer,
    top_entries,
)
from dictlearn.types import SparseLatents

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True, params=["torch", "native", "triton"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one that operations choose during a test."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        monkeypatch.setattr(backend, "use_triton", lambda *tensors: all(t.dtype in backend.TYPES for t in tensors))
    else:
        monkeypatch.setattr(backend, "use_triton", lambda *_: False)
    if request.param != "native":
        monkeypatch.setattr(backend, "use_native", lambda *_, **__: False)
    elif ON_GPU or not native.available():
        pytest.skip("needs tensors on the CPU and a C++ compiler")
    return request.param


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=atol)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ragged(counts: list[int], n_latents: int) -> SparseLatents:
    """Tokens with so many latents each."""
    make = torch.Generator().manual_seed(1)
    indices = [torch.randperm(n_latents, generator=make)[:count] for count in counts]
    flat = torch.cat([*indices, torch.zeros(0, dtype=torch.int64)])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return SparseLatents(draw(len(flat), seed=2), flat.to(DEVICE), offsets.to(DEVICE), n_latents)


def double(latents: SparseLatents) -> SparseLatents:
    return latents._replace(values=latents.values.double())


@pytest.mark.parametrize("counts", [[3, 0, 17, 1], [0], [], [16, 32, 5] * 7, [1] * 40, [33]], ids=str)
@pytest.mark.parametrize(("n_latents", "d"), [(33, 5), (64, 300), (40, 1100)])
class TestProductsWithFewRows:
    def test_decode(self, counts: list[int], n_latents: int, d: int) -> None:
        latents, rows = ragged(counts, n_latents), draw(n_latents, 2 * d)[:, ::2]  # rows are not contiguous
        assert_close(decode(latents, rows), reference.decode(double(latents), rows.double()))

    def test_row_products(self, counts: list[int], n_latents: int, d: int) -> None:
        _, indices, offsets, _ = ragged(counts, n_latents)
        x, rows = draw(d, len(counts)).T, draw(n_latents, d)
        expected = reference.row_products(x.double(), rows.double(), indices, offsets)
        assert_close(row_products(x, rows, indices, offsets), expected, atol=1e-4)

    def test_scatter_outer(self, counts: list[int], n_latents: int, d: int) -> None:
        values, indices, offsets, _ = ragged(counts, n_latents)
        x = draw(d, len(counts)).T
        found = scatter_outer(values, indices, offsets, x, n_latents)
        expected = reference.scatter_outer(values.double(), indices, offsets, x.double(), n_latents)
        assert found.is_contiguous()
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_sixteen_bits_are_decoded_with_weights_of_thirty_two(dtype: torch.dtype) -> None:
    latents, rows = ragged([3, 0, 17, 1], 33), draw(33, 5).requires_grad_()
    values = latents.values.to(dtype).requires_grad_()
    found = decode(latents._replace(values=values), rows)
    assert_close(found, reference.decode(double(latents._replace(values=values)), rows.double()))
    by_value, by_row = torch.autograd.grad(found.square().sum(), [values, rows])
    assert (by_value.dtype, by_row.dtype) == (dtype, torch.float32)


def test_gradients_of_latents_that_every_token_has() -> None:
    """Hundreds of entries of one latent are summed in pieces; its neighbours have one, or none."""
    n_tokens, n_latents, d = 450, 9, 20
    indices = torch.tensor([[2, 5], [2, 6], [6, 2]]).repeat(150, 1).flatten().to(DEVICE)
    offsets = torch.arange(0, 2 * n_tokens + 1, 2, device=DEVICE)
    values, x = draw(2 * n_tokens, seed=3), draw(n_tokens, d)
    found = scatter_outer(values, indices, offsets, x, n_latents)
    expected = reference.scatter_outer(values.double(), indices, offsets, x.double(), n_latents)
    assert_close(found, expected, atol=1e-4)
    assert found.abs().sum(1).nonzero().flatten().tolist() == [2, 5, 6]


def test_the_same_latent_twice_in_a_token() -> None:
    latents = SparseLatents(
        *(t.to(DEVICE) for t in (torch.tensor([1.0, 2.0]), torch.tensor([4, 4]))),
        offsets=torch.tensor([0, 2]).to(DEVICE),
        n_latents=6,
    )
    rows, grad = draw(6, 3), draw(1, 3)
    assert_close(decode(latents, rows)[0], 3 * rows[4])
    assert_close(scatter_outer(latents.values, latents.indices, latents.offsets, grad, 6)[4], 3 * grad[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5000, 1), (5000, 777), (9001, 9001), (4096, 4095), (70_000, 1234)])
def test_top_entries(n: int, m: int, dtype: torch.dtype) -> None:
    for values in (draw(n), (4 * draw(n)).round(), -draw(n).abs() - 1):  # with many that are equal, all negative
        values = values.to(dtype)
        found = top_entries(values, m)
        assert torch.equal(found, reference.top_entries(values, m))


def problem(n_tokens: int, d_in: int, n_latents: int, seed: int = 0) -> list[Tensor]:
    latent_major = draw(n_latents, d_in, seed=seed + 1).T / d_in**0.5  # the layout parameters have
    return [draw(n_tokens, d_in, seed=seed), latent_major, draw(n_latents, seed=seed + 2) / 10]


def kept(latents: SparseLatents) -> Tensor:
    """Which latents of each token are stored, [n_tokens, n_latents]."""
    return latents._replace(values=torch.ones_like(latents.values)).to_dense() > 0


ENCODE = [
    (encode_top_k, reference.encode_top_k),
    (encode_batch_top_k, reference.encode_batch_top_k),
    (encode_abs_top_k, reference.encode_abs_top_k),
    (encode_group_max, reference.encode_group_max),
]
WITHOUT_KERNELS = (encode_abs_top_k, encode_group_max)  # in Triton, but those for what is selected
SIZES = [(33, 7, 29, 1), (33, 7, 29, 4), (5, 3, 29, 29), (30, 65, 330, 4), (12, 16, 1024, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize(("encode", "expected"), ENCODE)
@pytest.mark.parametrize(("n_tokens", "d_in", "n_latents", "k"), SIZES)
@pytest.mark.parametrize("product", [torch.float32, torch.float16, torch.bfloat16])
def test_encode_is_the_dense_rule(encode, expected, n_tokens, d_in, n_latents, k, product, implementation) -> None:
    """Values and all gradients; a product in 16 bits proposes, float32 decides."""
    if implementation == "triton" and not ON_GPU and encode in WITHOUT_KERNELS and n_latents > 29:
        pytest.skip("slow in the interpreter, and without a kernel of its own")
    if encode is encode_group_max:
        n_latents += -n_latents % k  # groups of equal size
    inputs = [t.requires_grad_() for t in problem(n_tokens, d_in, n_latents)]
    with torch.autocast(DEVICE, dtype=product, enabled=product != torch.float32):
        latents = encode(*inputs, k)
    truth = [t.detach().double().requires_grad_() for t in inputs]
    dense = expected(*truth, k)
    assert latents.values.dtype == torch.float32
    assert len(latents.values) == n_tokens * k
    assert_close(latents.to_dense(), dense)
    weights = draw(n_tokens, n_latents)
    found = torch.autograd.grad((latents.to_dense() * weights).sum(), inputs)
    for got, wanted in zip(found, torch.autograd.grad((dense * weights.double()).sum(), truth), strict=True):
        assert_close(got, wanted, atol=1e-4)
        assert got.stride() == wanted.stride()


@pytest.mark.parametrize(("encode", "_"), ENCODE)
@pytest.mark.parametrize("autocast", [False, True])
def test_encode_of_no_tokens(encode, _, autocast) -> None:
    inputs = [t.requires_grad_() for t in problem(0, 8, 600)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        latents = encode(*inputs, 3)
    assert (latents.n_tokens, len(latents.values)) == (0, 0)
    assert all((grad == 0).all() for grad in torch.autograd.grad(latents.values.sum(), inputs))


@pytest.mark.parametrize("encode", [encode_top_k, encode_abs_top_k, encode_batch_top_k])
@pytest.mark.parametrize("autocast", [False, True])
def test_of_equal_pre_activations_the_first_are_kept(encode, autocast, implementation) -> None:
    """In plain torch, of rows, only where they are not more than the further candidates."""
    by_torch = implementation == "torch" or (implementation == "triton" and not autocast)
    of_rows = encode is not encode_batch_top_k
    n_equal = 26 if by_torch and of_rows else 200
    W_enc, b_enc = torch.zeros(600, 3, device=DEVICE).T, torch.ones(600, device=DEVICE)
    b_enc[1::3][:n_equal] = 3.0
    if encode is encode_abs_top_k:
        b_enc[4::6] *= -1  # signs do not matter
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        latents = encode(draw(9, 3), W_enc, b_enc, 18)
    found = kept(latents).nonzero()
    if of_rows:
        assert torch.equal(found[:, 1].view(9, 18), torch.arange(1, 54, 3, device=DEVICE).expand(9, -1))
    else:  # the first token has more of them than all tokens want
        assert torch.equal(found[:, 1], torch.arange(1, 3 * 162, 3, device=DEVICE))


@pytest.mark.parametrize("autocast", [False, True])
def test_of_equal_pre_activations_the_first_of_each_group_is_kept(autocast) -> None:
    W_enc, b_enc = torch.zeros(600, 3, device=DEVICE).T, torch.ones(600, device=DEVICE)
    b_enc.view(6, 100)[:, 7:] = 3.0
    b_enc.view(6, 100)[2] = -1.0  # relu makes a stored zero of it
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        latents = encode_group_max(draw(9, 3), W_enc, b_enc, 6)
    first = torch.tensor([7, 107, 200, 307, 407, 507], device=DEVICE)
    assert torch.equal(latents.indices.view(9, 6), first.expand(9, -1))
    assert latents.values.view(9, 6)[0].tolist() == [3.0, 3.0, 0.0, 3.0, 3.0, 3.0]


def test_the_largest_by_size_keep_their_signs() -> None:
    W_enc, b_enc = torch.zeros(5, 3, device=DEVICE).T, torch.tensor([2.0, -5.0, 1.0, -3.0, 4.0], device=DEVICE)
    latents = encode_abs_top_k(draw(2, 3), W_enc, b_enc, 3)
    assert latents.indices.tolist() == [1, 3, 4] * 2
    assert latents.values.tolist() == [-5.0, -3.0, 4.0] * 2


def test_a_latent_that_fires_on_every_token() -> None:
    x, W_enc, b_enc = problem(100, 8, 300)
    b_enc[11] = 100.0
    inputs = [t.requires_grad_() for t in (x, W_enc, b_enc)]
    with torch.autocast(DEVICE, dtype=torch.float16):
        latents = encode_top_k(inputs[0], inputs[1], inputs[2], 2)
    assert kept(latents)[:, 11].all()
    grads = torch.autograd.grad(latents.values.sum(), inputs)
    truth = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(reference.encode_top_k(truth[0], truth[1], truth[2], 2).sum(), truth)
    for got, wanted in zip(grads, expected, strict=True):
        assert_close(got, wanted, atol=1e-4)


@pytest.mark.parametrize(("encode", "_"), ENCODE)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_latent_that_is_not_a_number_is_seen(encode, _, autocast: bool, sign: int) -> None:
    """It is kept, so that the loss is not finite either; the other tokens' latents are as many as ever."""
    x, W_enc, b_enc = problem(20, 8, 600)
    b_enc[17] = sign * torch.nan
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        latents = encode(x, W_enc, b_enc, 4)
    assert len(latents.values) == 80
    assert latents.values[latents.indices == 17].isnan().all()
    assert (latents.indices == 17).sum() == 20


@pytest.mark.parametrize(("encode", "_"), ENCODE)
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_in_any_layout(encode, _, autocast: bool) -> None:
    x, W_enc, b_enc = problem(20, 8, 600)
    strided = [x.repeat(1, 2)[:, ::1][:, :8], W_enc.contiguous(), b_enc.repeat_interleave(2)[::2]]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        expected, found = encode(x, W_enc, b_enc, 4), encode(*strided, 4)  # type: ignore[call-arg]
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.values, expected.values)


@pytest.mark.parametrize(("encode", "_"), ENCODE)
def test_second_derivatives_are_refused(encode, _) -> None:
    inputs = [t.requires_grad_() for t in problem(5, 4, 30)]
    rows = draw(30, 3).requires_grad_()
    loss = decode(encode(*inputs, 2), rows).square().sum()
    grad = torch.autograd.grad(loss, inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("encode", [encode_top_k, encode_batch_top_k, encode_abs_top_k])
@pytest.mark.parametrize("k", [0, 31])
def test_a_k_that_cannot_be_is_an_error(encode, k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be from 1 to n_latents = 30, got {k}"):
        encode(*problem(5, 4, 30), k)


@pytest.mark.parametrize("k", [0, -2, 4, 31, 60])
def test_groups_are_of_equal_size(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must divide n_latents = 30, got {k}"):
        encode_group_max(*problem(5, 4, 30), k)  # type: ignore[call-arg]


@pytest.mark.parametrize("d", [1, 7, 300])
def test_rows_that_stay_unit(d: int) -> None:
    rows, grad = draw(40, d), draw(40, d, seed=5)
    normalise_rows_(rows)
    truth = draw(40, d).double()
    reference.normalise_rows_(truth)
    assert_close(rows, truth)
    expected = grad.double()
    expected_squares = reference.project_rows_(expected, truth)
    squares = project_rows_(grad, rows)
    assert_close(grad, expected)
    assert_close(squares, expected_squares)
    assert_close((grad * rows).sum(-1), torch.zeros(40, device=DEVICE))
