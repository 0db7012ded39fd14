"""A step in chunks against the step on the whole batch, by autograd on the sum of its terms."""

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dictlearn.data import Batch
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.gradients import with_gradients
from dictlearn.training.learner import Learner
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.training.optimizers import Adam
from dictlearn.training.schedules import WarmupDecay
from dictlearn.types import Step
from tests.test_config import problems
from tests.training.planted import D, PlantedStream

N_LATENTS, N_TOKENS = 64, 50
SITES = ("x", "y")


class Spare(Linear):
    """With a parameter that nothing uses, and products with the weights themselves, which autocast caches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Parameter(torch.zeros(3))

    @property
    def flat_W_enc(self) -> Tensor:
        return self.W_enc

    @property
    def flat_W_dec(self) -> Tensor:
        return self.W_dec


def sae(sparsifier: Sparsifier, kind: type[Dictionary] = Linear, **arguments: Any) -> Dictionary:
    made = kind(D, D, N_LATENTS, sparsifier, **{"reads": ("x",), "writes": ("x",), **arguments})
    for parameter in made.parameters():  # no special start: transcoders begin with W_dec = 0
        nn.init.normal_(parameter, std=0.3)
    return made


CASES: dict[str, tuple[Callable[[], Dictionary], AuxK | None]] = {
    "top_k": (lambda: sae(TopK(4)), None),
    "top_k, dead": (lambda: sae(TopK(4)), AuxK()),
    "top_k, many dead": (lambda: sae(TopK(4)), AuxK(0.5, k=1)),  # a sparse product among the dead
    "relu": (lambda: sae(ReLU(0.3)), None),
    "relu, dead": (lambda: sae(ReLU(0.3)), AuxK(0.5)),
    "transcoder": (lambda: sae(TopK(4), writes=("y",), skip=True), AuxK(0.5)),
    "layer_norm": (lambda: sae(TopK(4), input_norm="layer_norm"), AuxK(0.5)),
    "several sites": (lambda: sae(TopK(4), Crosscoder, reads=SITES, writes=SITES, skip=True), AuxK(0.5)),
    "signed": (lambda: sae(AbsTopK(4)), AuxK(0.5)),
    "group_max": (lambda: sae(GroupMax(4)), AuxK(0.5)),
    "jump_relu": (lambda: sae(JumpReLU(0.3, threshold=0.2, pre_act_coefficient=0.2)), AuxK(0.5)),
    "gated": (lambda: sae(ReLU(0.3), Gated), AuxK(0.5)),
    "matryoshka": (lambda: sae(TopK(4), Matryoshka), AuxK(0.5)),
    "bilinear": (lambda: sae(TopK(4), Bilinear), AuxK(0.5)),
    "a spare parameter": (lambda: sae(JumpReLU(0.3, threshold=0.2), Spare), AuxK(0.5)),
}


def learner(case: str, micro_batch_size: int | None) -> Learner:
    torch.manual_seed(1)
    make, term = CASES[case]
    dictionary = make()
    variance = torch.linspace(3.0, 5.0, len(dictionary.writes))
    terms = {} if term is None else {"aux_k": term}
    made = Learner("x", dictionary, terms, variance, 1_000, 1.0, micro_batch_size)
    if term is not None:
        made.statistics.is_dead[::3] = True  # 22
    return made


def batch(scale: float = 1.0) -> Batch:
    """The tokens differ along the batch, so that the residual's mean is not that of a chunk."""
    planted = PlantedStream(1, batch_size=N_TOKENS).batch(0)
    drift = torch.linspace(-1.0, 2.0, N_TOKENS).unsqueeze(-1)
    return planted._replace(acts={site: scale * (acts + drift) for site, acts in planted.acts.items()})


def whole(made: Learner, data: Batch) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients without chunks: plain autograd through the terms, each on the whole batch."""
    d = made.dictionary
    step = d.step(d.select_reads(data.acts), d.select_writes(data.acts), made.variance, made.statistics.dead)
    parts = [*d.losses(step).values(), d.penalty(step), *(term(step) for term in made.terms.values())]
    loss = sum((part for part in parts if part is not None), torch.zeros(()))
    return loss, list(torch.autograd.grad(loss, list(d.parameters()), allow_unused=True))


def error(got: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest relative error of a gradient; those that are missing must be so in both."""
    assert [g is None for g in got] == [e is None for e in expected]
    pairs = [(g, e) for g, e in zip(got, expected, strict=True) if g is not None and e is not None]
    return max(float((g - e).norm() / e.norm()) for g, e in pairs)


def gradients(made: Learner) -> list[Tensor | None]:
    return [parameter.grad for parameter in made.dictionary.parameters()]


@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("micro_batch_size", [None, 10, 16, 49, 50, 1])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_batch(case: str, micro_batch_size: int | None, scale: float) -> None:
    made, data = learner(case, micro_batch_size), batch(scale)
    expected_loss, expected = whole(made, data)
    loss = made.loss(data)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    assert error(gradients(made), expected) < 1e-6
    for parameter in made.dictionary.parameters():
        if parameter.grad is not None:
            assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("micro_batch_size", [None, 16])
@pytest.mark.parametrize("case", CASES)
def test_under_autocast_gradients_are_close(case: str, micro_batch_size: int | None) -> None:
    made, data = learner(case, micro_batch_size), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected_loss, expected = whole(made, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made.loss(data)
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=0.01, atol=0.0)
    assert error(gradients(made), expected) < 0.02


def test_a_step_counts_once_and_its_tokens_each() -> None:
    for case in ("top_k", "relu, dead", "jump_relu"):
        one, two = (learner(case, size) for size in (None, 16))
        for _ in range(3):
            one.loss(batch())
            two.loss(batch())
        assert one.statistics.n_finite == two.statistics.n_finite == 3
        for plain, chunked in zip(one.statistics.flush(), two.statistics.flush(), strict=True):
            torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0.0)
        assert torch.equal(one.statistics.tokens_since_fired, two.statistics.tokens_since_fired)


def test_one_chunk_that_is_not_finite_ends_the_finite_steps() -> None:
    made, data = learner("relu", 16), batch()
    made.loss(data)
    data.acts["x"][20] = math.inf
    made.loss(data)
    made.loss(batch())
    assert made.statistics.n_finite == 1


def test_gradients_are_scaled_with_the_loss_and_added_to_what_is_there() -> None:
    made, data = learner("top_k, dead", 16), batch()
    _, expected = whole(made, data)
    for factor, total in ((3.0, 3.0), (1.0, 4.0)):
        (factor * made.loss(data)).backward()
        assert error(gradients(made), [None if g is None else total * g for g in expected]) < 1e-6


def test_gradients_become_those_of_the_parameters_without_a_copy() -> None:
    weight = nn.Parameter(torch.zeros(5, 3).T)
    made = []

    def accumulate() -> Tensor:
        (weight * torch.ones(3, 5)).sum().backward()
        assert weight.grad is not None
        made.append(weight.grad.data_ptr())
        return torch.tensor(2.0)

    loss = with_gradients([weight], accumulate)
    assert weight.grad is None
    loss.backward()
    assert weight.grad is not None
    assert [weight.grad.data_ptr()] == made


class Memory(TorchDispatchMode):
    """Elements that the results of operations hold, without views: `sizes` of each, the `peak` of all at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage() in self._seen:
                continue
            storage = tensor.untyped_storage()
            n = storage.nbytes() // tensor.element_size()
            self._seen.add(storage)
            weakref.finalize(storage, self._free, n)
            self.now += n
            self.sizes.append(n)
            self.peak = max(self.peak, self.now)
        return result

    def _free(self, n: int) -> None:
        self.now -= n


@pytest.mark.parametrize("n_dead", [0, 20])
def test_memory_is_that_of_a_chunk(n_dead: int) -> None:
    d, n_latents, n_tokens = 4, 128, 400

    def step(micro_batch_size: int | None) -> Memory:
        dictionary = Linear(d, d, n_latents, JumpReLU(0.1) if n_dead else ReLU(0.1))
        dictionary.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, d), torch.zeros(1, d))
        made = Learner("x", dictionary, {"aux_k": AuxK()}, torch.ones(1), 10, None, micro_batch_size)
        made.statistics.is_dead[:n_dead] = True
        index = torch.arange(n_tokens)
        data = Batch({"x": torch.randn(n_tokens, d)}, index, index, index)
        with Memory() as memory:
            made.loss(data).backward()
        return memory

    plain, chunked = step(None), step(50)
    assert max(plain.sizes) >= n_tokens * n_latents
    assert max(chunked.sizes) <= 50 * n_latents
    assert chunked.peak < plain.peak / 4
    gradients = 2 * d * n_latents + n_latents + d
    # Pre-activations, latents, their gradients, and of JumpReLU which are near their thresholds: not twice.
    assert chunked.peak - gradients < (8 if n_dead else 6) * 50 * n_latents


@pytest.mark.parametrize("micro_batch_size", [None, 16])
def test_reviving_dead_latents_makes_no_second_gradient_of_whole_weights(micro_batch_size: int | None) -> None:
    def n_whole(term: AuxK) -> int:
        made = Learner("x", sae(TopK(4)), {"aux_k": term}, torch.ones(1), 10, None, micro_batch_size)
        made.statistics.is_dead[:5] = True
        with Memory() as memory:
            made.loss(batch()).backward()
        return sum(size >= D * N_LATENTS for size in memory.sizes)

    assert n_whole(AuxK()) == n_whole(Silent())


class Silent(AuxK):
    """Of no effect, in the same steps."""

    def __call__(self, step: Step) -> None:
        pass


def relu_member(micro_batch_size: int | None) -> Member:
    dictionary = Linear(D, D, N_LATENTS, ReLU(0.05), reads=("x",), writes=("x",))
    dictionary.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, D), torch.zeros(1, D))
    made = Learner("x", dictionary, {"aux_k": AuxK(0.5)}, torch.ones(1), 1_000, 1.0, micro_batch_size)
    dictionary.b_enc.data[:12] = -100.0  # dead after the first windows
    return Member(made, Adam(1e-3, 1.0, (0.9, 0.999), 1e-8, 1.0), WarmupDecay(10, 0.2))


def test_a_run_has_the_same_metrics() -> None:
    runs = []
    for micro_batch_size in (None, 48):
        stream, rows = PlantedStream(40), []

        class Rows(L.Callback):
            def __init__(self, rows: list[dict[str, float]]) -> None:
                self.rows = rows

            def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                self.rows.append({k: v for k, v in pl_module.latest.items() if k != "tokens_per_second"})

        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=40,
            max_epochs=-1,
            logger=False,
            callbacks=[Rows(rows)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        made = relu_member(micro_batch_size)
        trainer.fit(DictionaryTraining([made], 40, stream.batch_size), stream)
        assert all(parameter.grad is None for parameter in made.learner.parameters())
        runs.append(rows)
    assert runs[0][-1]["x/frac_dead"] >= 12 / N_LATENTS
    for plain, chunked in zip(*runs, strict=True):
        assert chunked == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "micro_batch_size must be null or a whole number above 0, got 0"),
        ("1.5", "micro_batch_size must be null or a whole number above 0, got 1.5"),
        ("256.0", "micro_batch_size must be null or a whole number above 0, got 256.0: write 256"),
        ("many", "micro_batch_size must be null or a whole number above 0, got 'many'"),
        ("2048", "micro_batch_size must be at most batch_size = 1024, got 2048"),
    ],
)
def test_sizes_that_are_none_are_refused(value: str, message: str) -> None:
    assert message in problems(f"micro_batch_size={value}")


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("batch_top_k", ["sparsifier=batch_top_k"]),
        ("relu", ["sparsifier=relu", "sparsifier.p=0.5"]),
    ],
)
def test_what_looks_at_the_whole_batch_cannot_be_cut(kind: str, overrides: list[str]) -> None:
    """Said before the LM is loaded."""
    rule = (
        f"micro_batch_size=100 needs a sparsifier that looks at one token at a time; {kind}, as resid_post.1 has it"
    )
    assert rule in problems(*overrides, "micro_batch_size=100", "experiment=single", "site=resid_post.1")
