"""The cross-layer transcoder against loops over layers and targets, dense, in float64."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dictlearn.data import Batch
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.aux_k import AuxK
from dictlearn.losses.multi_top_k import MultiTopK
from dictlearn.sparsifiers._per_layer import apart, side_by_side
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner
from dictlearn.types import DictlearnError, SparseLatents

N_LAYERS, N, D_IN, D_OUT, N_TOKENS = 3, 10, 6, 5, 40
READS, WRITES = ("in.0", "in.1", "in.2"), ("out.0", "out.1", "out.2")
VARIANCE = torch.tensor([3.0, 5.0, 2.0], dtype=torch.float64)
DEAD = torch.tensor([1, 4, 5, 12, 21, 22, 25, 29])


def kept_of_each_token(pre: Tensor, k: int) -> Tensor:
    """Dense, by a sort: the k largest of each row."""
    least = pre.sort(dim=-1, descending=True).values[:, k - 1 : k]
    return pre >= least


SLOW: dict[str, tuple[Callable[[], Sparsifier], Callable[[Tensor], Tensor]]] = {
    "top_k": (lambda: TopK(3), lambda pre: torch.where(kept_of_each_token(pre, 3), pre, 0.0).clamp(min=0)),
    "abs_top_k": (lambda: AbsTopK(3), lambda pre: torch.where(kept_of_each_token(pre.abs(), 3), pre, 0.0)),
    "group_max": (
        lambda: GroupMax(5),
        lambda pre: torch.cat([g * (g == g.amax(-1, True)) for g in pre.split(2, -1)], -1).clamp(min=0),
    ),
    "batch_top_k": (
        lambda: BatchTopK(3),
        lambda pre: torch.where(pre >= pre.flatten().sort().values[-3 * len(pre)], pre, 0.0).clamp(min=0),
    ),
    "relu": (lambda: ReLU(0.2), lambda pre: pre.clamp(min=0)),
}


def made(sparsifier: Sparsifier, skip: bool = False, **arguments: object) -> CrossLayer:
    torch.manual_seed(2)
    dictionary = CrossLayer(D_IN, D_OUT, N_LAYERS * N, sparsifier, READS, WRITES, skip=skip, **arguments).double()  # type: ignore[arg-type]
    for name, parameter in dictionary.named_parameters():
        if not name.startswith("sparsifier."):
            torch.nn.init.normal_(parameter)
    dictionary.read_scale.copy_(torch.tensor([0.5, 2.0, 1.5]))
    dictionary.write_scale.copy_(torch.tensor([3.0, 0.25, 0.7]))
    dictionary.project_()
    return dictionary


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(N_TOKENS, N_LAYERS, D_IN, dtype=torch.float64)
    return x, torch.randn(N_TOKENS, N_LAYERS, D_OUT, dtype=torch.float64)


def slow_pre_acts(dictionary: CrossLayer, x: Tensor) -> list[Tensor]:
    """By layer, from raw activations."""
    return [
        x[:, i] * dictionary.read_scale[i] @ dictionary.W_enc[:, i * N : (i + 1) * N]
        + dictionary.b_enc[i * N : (i + 1) * N]
        for i in range(N_LAYERS)
    ]


def slow_recon(dictionary: CrossLayer, codes: list[Tensor], x: Tensor) -> Tensor:
    """Normalised, [n_tokens, n_layers, d_out]."""
    recons = []
    for target in range(N_LAYERS):
        recon = dictionary.b_dec[target].expand(len(x), -1)
        for source in range(target + 1):
            rows = dictionary.get_parameter(f"W_dec_{source}")
            for i in range(N):
                recon = recon + codes[source][:, i, None] * rows[i, target - source]
        if dictionary.W_skip is not None:
            recon = recon + x[:, target] * dictionary.read_scale[target] @ dictionary.W_skip[target].T
        recons.append(recon)
    return torch.stack(recons, 1)


def slow_norms(dictionary: CrossLayer) -> Tensor:
    rows = [dictionary.get_parameter(f"W_dec_{i}") for i in range(N_LAYERS)]
    return torch.stack([row.square().sum().sqrt() for layer in rows for row in layer])


def slow_recon_loss(dictionary: CrossLayer, recon: Tensor, y: Tensor) -> Tensor:
    error = y * dictionary.write_scale[:, None] - recon
    return (
        sum((error[:, i].square().sum() / N_TOKENS / VARIANCE[i] for i in range(N_LAYERS)), torch.zeros(()))
        / N_LAYERS
    )


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", SLOW)
def test_a_step_is_the_loop_over_layers(kind: str, skip: bool) -> None:
    make, select = SLOW[kind]
    dictionary, (x, y) = made(make(), skip), inputs()
    codes = [select(pre) for pre in slow_pre_acts(dictionary, x)]
    step = dictionary.step(x, y, VARIANCE)
    latents = step.latents.to_dense() if isinstance(step.latents, SparseLatents) else step.latents
    torch.testing.assert_close(latents, torch.cat(codes, 1))
    recon = slow_recon(dictionary, codes, x)
    torch.testing.assert_close(step.per_site(step.recon), recon)
    torch.testing.assert_close(dictionary.losses(step)["recon"], slow_recon_loss(dictionary, recon, y))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", SLOW)
def test_gradients_are_those_of_the_dense_loop(kind: str, skip: bool) -> None:
    make, select = SLOW[kind]
    dictionary, (x, y) = made(make(), skip), inputs()
    parameters = list(dictionary.parameters())
    codes = [select(pre) for pre in slow_pre_acts(dictionary, x)]
    loss = slow_recon_loss(dictionary, slow_recon(dictionary, codes, x), y)
    if kind == "relu":
        spread = VARIANCE.mean().sqrt()
        loss = loss + 0.2 * (torch.cat(codes, 1) * slow_norms(dictionary)).sum() / N_TOKENS / spread / N_LAYERS
    expected = torch.autograd.grad(loss, parameters)
    step = dictionary.step(x, y, VARIANCE)
    penalty = dictionary.penalty(step)
    assert (penalty is None) == (kind != "relu")
    total = dictionary.losses(step)["recon"] + (0.0 if penalty is None else penalty)
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(torch.autograd.grad(total, parameters), expected)


def test_jump_relu_has_a_threshold_and_a_penalty_in_every_layer() -> None:
    """tanh(4 f ||W_dec|| / s) summed over latents, and the dead ones' distance to their thresholds: of all layers
    together, over the number of layers.
    """
    sparsifier = JumpReLU(0.3, threshold=0.2, bandwidth=0.5, pre_act_coefficient=0.1, ramp=None)
    dictionary, (x, y) = made(sparsifier), inputs()
    dictionary.set_unit_(torch.tensor([1.0, 2.0, 3.0]))
    thresholds = torch.cat([layer.thresholds for layer in dictionary.sparsifier.layers])  # type: ignore[attr-defined]
    torch.testing.assert_close(thresholds, torch.tensor([0.2, 0.4, 0.6]).repeat_interleave(N).double())
    pre = torch.cat(slow_pre_acts(dictionary, x), 1)
    latents = torch.where(pre > thresholds, pre, 0.0)
    torch.testing.assert_close(dictionary.encode(x), latents)
    weights = slow_norms(dictionary) / (VARIANCE.sum() / (N_LAYERS * D_OUT)).sqrt()
    dead = torch.zeros(N_LAYERS * N, dtype=torch.bool)
    dead[DEAD] = True
    below = ((thresholds - pre).clamp(min=0) * weights)[:, dead]
    expected = (0.3 * (4 * latents * weights).tanh().sum() + 0.1 * below.sum()) / N_TOKENS / N_LAYERS
    step = dictionary.step(x, y, VARIANCE, DEAD)
    torch.testing.assert_close(step.pre_acts, pre)
    penalty = dictionary.penalty(step)
    assert penalty is not None
    torch.testing.assert_close(penalty, expected)
    none_dead = dictionary.penalty(dictionary.step(x, y, VARIANCE))
    assert none_dead is not None
    torch.testing.assert_close(penalty - none_dead, 0.1 * below.sum() / N_TOKENS / N_LAYERS)


@pytest.mark.parametrize("target_l0", [None, 2.0])
def test_l0_and_target_l0_are_those_of_a_layer(target_l0: float | None) -> None:
    """0.3 times the mean over layers of L0, and of (L0 / 2 - 1)^2."""
    sparsifier = JumpReLU(0.3, "target_l0" if target_l0 else "l0", target_l0, threshold=0.4, ramp=None)
    dictionary, (x, y) = made(sparsifier), inputs()
    l0s = [float((pre > 0.4).sum()) / N_TOKENS for pre in slow_pre_acts(dictionary, x)]
    assert max(l0s) - min(l0s) > 0.5
    by_layer = [(l0 / target_l0 - 1) ** 2 if target_l0 else l0 for l0 in l0s]
    penalty = dictionary.penalty(dictionary.step(x, y, VARIANCE))
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.3 * sum(by_layer) / N_LAYERS)


def test_a_target_l0_is_reached_where_every_layer_has_it() -> None:
    """4 of 10 in each of three layers, not 4 in all of them."""
    dictionary = made(JumpReLU(1.0, "target_l0", target_l0=4.0, threshold=1.0, ramp=None))
    with torch.no_grad():
        dictionary.W_enc.zero_()
        dictionary.b_enc.copy_((torch.arange(N_LAYERS * N) % N < 4) * 2.0)
    penalty = dictionary.penalty(dictionary.step(*inputs(), VARIANCE))
    assert penalty is not None
    assert float(penalty.detach()) == 0.0


@pytest.mark.parametrize("kind", ["top_k", "group_max"])
def test_aux_k_chooses_among_the_dead_latents_of_all_layers(kind: str) -> None:
    dictionary, (x, y) = made(SLOW[kind][0]()), inputs()
    parameters = [p for name, p in dictionary.named_parameters() if name != "b_dec"]
    step = dictionary.step(x, y, VARIANCE, DEAD)
    residual = (step.target - step.recon).detach()
    pre = torch.cat(slow_pre_acts(dictionary, x), 1)
    dead = torch.full_like(pre, -torch.inf)
    dead[:, DEAD] = pre[:, DEAD]
    code = torch.where(kept_of_each_token(dead, 4), pre, 0.0).clamp(min=0)
    written = slow_recon(dictionary, list(code.split(N, 1)), x) - dictionary.b_dec
    error = (residual - written.flatten(1)).square().sum()
    expected = 0.5 * error / (residual - residual.mean(0)).square().sum()
    got = AuxK(0.5, k=4)(step)
    assert got is not None
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("kind", ["top_k", "abs_top_k"])
def test_multi_top_k_is_wider_in_every_layer(kind: str) -> None:
    dictionary, (x, y) = made(SLOW[kind][0](), skip=True), inputs()
    codes = []
    for pre in slow_pre_acts(dictionary, x):
        kept = torch.where(kept_of_each_token(pre if kind == "top_k" else pre.abs(), 6), pre, 0.0)
        codes.append(kept.clamp(min=0) if kind == "top_k" else kept)
    expected = 0.25 * slow_recon_loss(dictionary, slow_recon(dictionary, codes, x), y)
    term = MultiTopK(0.25, factor=2)
    term.check(dictionary)
    got, parameters = term(dictionary.step(x, y, VARIANCE)), list(dictionary.parameters())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters))
    with pytest.raises(DictlearnError, match="at most n_latents = 10, got 12"):
        MultiTopK(factor=4).check(dictionary)


@pytest.mark.parametrize("micro_batch_size", [None, 7])
@pytest.mark.parametrize("kind", ["top_k", "relu"])
def test_a_learner_takes_the_same_gradients_in_chunks_and_through_copies_of_dead_rows(
    kind: str, micro_batch_size: int | None
) -> None:
    dictionary, (x, y) = made(SLOW[kind][0](), skip=True), inputs()
    step = dictionary.step(x, y, VARIANCE, DEAD)
    parts = [dictionary.losses(step)["recon"], dictionary.penalty(step), AuxK(0.5)(step)]
    loss = torch.stack([part for part in parts if part is not None]).sum()
    expected = torch.autograd.grad(loss, list(dictionary.parameters()))
    learner = Learner("x", dictionary, {"aux_k": AuxK(0.5)}, VARIANCE, 1_000, None, micro_batch_size)
    learner.statistics.is_dead[DEAD] = True
    index = torch.arange(N_TOKENS)
    acts = dict(zip((*READS, *WRITES), (*x.unbind(1), *y.unbind(1)), strict=True))
    learner.loss(Batch(acts, index, index, index)).backward()
    found = [parameter.grad for parameter in dictionary.parameters()]
    torch.testing.assert_close(found, list(expected))
    assert all(
        g.stride() == p.stride() for g, p in zip(found, dictionary.parameters(), strict=True) if g is not None
    )


def test_every_layer_has_one_decode_and_one_encoder_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of all targets meet at the compact latents."""
    calls: list[str] = []
    for name, file in (("encoder", "encode"), ("decoder", "decode")):
        module = importlib.import_module(f"dictlearn.kernels.{file}")  # whose name in the package is a function
        real = module.scatter_outer
        monkeypatch.setattr(
            module, "scatter_outer", lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    dictionary, (x, y) = made(TopK(3)), inputs()
    dictionary.losses(dictionary.step(x, y, VARIANCE))["recon"].backward()
    assert sorted(calls) == ["decoder"] * N_LAYERS + ["encoder"] * N_LAYERS


def test_one_layer_is_a_transcoder() -> None:
    cross = CrossLayer(D_IN, D_OUT, N, TopK(3), ["a"], ["b"], skip=True)
    plain = Linear(D_IN, D_OUT, N, TopK(3), ["a"], ["b"], skip=True)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        values = torch.nn.init.normal_(plain.get_parameter(name))
        own = cross.get_parameter("W_dec_0" if name == "W_dec" else name)
        own.data.copy_(values.reshape(own.shape))
    for dictionary in (cross, plain):
        dictionary.read_scale.fill_(0.5)
        dictionary.write_scale.fill_(4.0)
    x, y = torch.randn(N_TOKENS, D_IN), torch.randn(N_TOKENS, D_OUT)
    steps = [cross.step(x[:, None], y[:, None], torch.ones(1)), plain.step(x, y, torch.ones(1))]
    losses = [dictionary.losses(step)["recon"] for dictionary, step in zip((cross, plain), steps, strict=True)]
    torch.testing.assert_close(*losses)
    grads = []
    for dictionary, loss in zip((cross, plain), losses, strict=True):
        assert dictionary.W_skip is not None
        grads.append(torch.autograd.grad(loss, [dictionary.W_enc, dictionary.decoders[0], dictionary.W_skip]))
    torch.testing.assert_close([g.flatten() for g in grads[0]], [g.flatten() for g in grads[1]])
    torch.testing.assert_close(cross.for_inference()(x[:, None]).latents, plain.for_inference()(x).latents)


def test_a_site_is_written_by_its_own_layer_and_earlier_ones() -> None:
    dictionary, (x, _) = made(ReLU(0.1)), inputs()
    x.requires_grad_()
    for target, recon in enumerate(dictionary(x).recon.unbind(1)):
        (grad,) = torch.autograd.grad(recon.sum(), x, retain_graph=True)
        assert [bool(grad[:, i].any()) for i in range(N_LAYERS)] == [i <= target for i in range(N_LAYERS)]


def test_it_starts_as_the_mean_predictor_with_every_layer_centred() -> None:
    dictionary = made(TopK(3), skip=True).float()
    reads, writes = torch.randn(N_LAYERS, D_IN), torch.randn(N_LAYERS, D_OUT)
    for rows in (*dictionary.decoders, dictionary.W_skip):
        assert rows is not None
        rows.data.zero_()
    basis = torch.linalg.qr(torch.randn(D_IN, 2, dtype=torch.float64)).Q
    dictionary.initialise_(torch.Generator().manual_seed(0), reads, writes, {"in.1": basis})
    torch.testing.assert_close(dictionary(torch.randn(4, N_LAYERS, D_IN)).recon, writes.expand(4, -1, -1))
    torch.testing.assert_close(dictionary.pre_activations(reads), torch.zeros(N_LAYERS * N), atol=1e-5, rtol=0)
    torch.testing.assert_close(dictionary.W_enc.norm(dim=0), torch.ones(N_LAYERS * N))
    outside = dictionary.W_enc.double() - basis @ basis.T @ dictionary.W_enc.double()
    inside = (outside.norm(dim=0) < 1e-6).unflatten(0, (N_LAYERS, N))
    assert inside.all(-1).tolist() == [False, True, False]
    assert not inside[[0, 2]].any()


def test_decoder_norms_are_over_all_targets() -> None:
    dictionary = made(TopK(3))
    torch.testing.assert_close(dictionary.decoder_norms(), slow_norms(dictionary))
    assembled = dictionary.W_dec
    assert assembled.shape == (N_LAYERS * N, N_LAYERS, D_OUT)
    for source in range(N_LAYERS):
        own = assembled[source * N : (source + 1) * N]
        assert not own[:, :source].any()
        assert torch.equal(own[:, source:], dictionary.get_parameter(f"W_dec_{source}"))


def test_unit_rows_are_unit_over_all_targets_and_clipping_counts_each_gradient_once() -> None:
    dictionary, (x, y) = made(TopK(3), decoder_norm="unit"), inputs()
    torch.testing.assert_close(slow_norms(dictionary), torch.ones(N_LAYERS * N).double())
    learner = Learner("x", dictionary, {}, VARIANCE, 1_000, clip_norm=1e-3)
    dictionary.losses(dictionary.step(x, y, VARIANCE))["recon"].backward()
    expected = [None if p.grad is None else p.grad.clone() for p in dictionary.parameters()]
    for p, grad in zip(dictionary.parameters(), expected, strict=True):
        if any(p is rows for rows in dictionary.decoders):
            assert grad is not None
            grad -= (grad * p).sum((-2, -1), keepdim=True) * p.detach()
    norm = torch.stack([g.square().sum() for g in expected if g is not None]).sum().sqrt()
    learner.clip_gradients_()
    for p, grad in zip(dictionary.parameters(), expected, strict=True):
        assert grad is not None
        torch.testing.assert_close(p.grad, grad * 1e-3 / norm, rtol=1e-4, atol=1e-12)


def test_rows_of_latents_in_any_order() -> None:
    dictionary, (x, _) = made(TopK(3)), inputs()
    some = torch.tensor([25, 3, 17, 0, 29, 11, 4])
    rows = dictionary.latent_rows(some)
    flat = dictionary.normalise(x)
    pre = torch.cat(slow_pre_acts(dictionary, x), 1)
    torch.testing.assert_close(dictionary.row_pre_acts(flat, rows, some), pre[:, some])
    code = torch.randn(N_TOKENS, len(some), dtype=torch.float64)
    torch.testing.assert_close(dictionary.decode_rows(code, rows, some), code @ dictionary.flat_W_dec[some])


def ragged(dense: Tensor) -> SparseLatents:
    return SparseLatents.from_dense(dense)


def test_codes_side_by_side_and_apart() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(7, 4) * (torch.rand(7, 4) < share) for share in (0.5, 0.0, 0.9)]
    joined = side_by_side([ragged(part) for part in parts])
    assert isinstance(joined, SparseLatents)
    assert torch.equal(joined.to_dense(), torch.cat(parts, 1))
    for token in range(7):
        own = joined.indices[joined.offsets[token] : joined.offsets[token + 1]]
        assert torch.equal(own, own.sort().values)
    for part, back in zip(parts, apart(joined, 3), strict=True):
        assert isinstance(back, SparseLatents)
        assert torch.equal(back.to_dense(), part)
        assert torch.equal(back.offsets, ragged(part).offsets)
    dense = apart(torch.cat(parts, 1), 3)
    assert all(torch.equal(a, b) for a, b in zip(dense, parts, strict=True))  # type: ignore[arg-type]


def test_codes_side_by_side_have_a_gradient() -> None:
    parts = [torch.rand(5, 4).requires_grad_() for _ in range(2)]
    joined = side_by_side([ragged(part) for part in parts])
    assert isinstance(joined, SparseLatents)
    weights = torch.rand(5, 8)
    found = torch.autograd.grad((joined.to_dense() * weights).sum(), parts)
    torch.testing.assert_close(torch.cat(found, 1), weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reads": ["a"], "writes": ["b", "c"]},
            "reads one site of every layer and writes another one, got reads a",
        ),
        ({"reads": ["a", "b"], "writes": ["a", "b"]}, "reads one site of every layer and writes another one"),
        ({"reads": [], "writes": []}, "reads one site of every layer"),
        ({"n_latents": 31}, "n_latents must be a multiple of the 3 layers, got 31"),
        ({"sparsifier": TopK(11)}, "at most n_latents = 10, got 11"),
        ({"input_norm": "layer_norm"}, "input_norm=layer_norm needs an autoencoder of one site"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    given = {"n_latents": 30, "sparsifier": TopK(3), "reads": READS, "writes": WRITES} | arguments
    with pytest.raises(DictlearnError, match=message):
        CrossLayer(D_IN, D_OUT, **given)  # type: ignore[arg-type]
