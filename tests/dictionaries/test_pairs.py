"""What holds for every dictionary with every sparsifier: gradients, export, files, resume, scales, batch sizes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.data import Batch
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import save
from dictlearn.losses.aux_k import AuxK
from dictlearn.registry import kind_of
from dictlearn.training.learner import Learner, prepare
from dictlearn.types import DictlearnError, SparseLatents, Step
from tests.dictionaries.pairs import DICTIONARIES, PAIRS, SPARSIFIERS, data, empty, statistics, trained

DEAD = torch.tensor([1, 4, 9, 15])
pairs = pytest.mark.parametrize(("kind", "sparsifier"), PAIRS)


def losses(made: Dictionary, step: Step) -> dict[str, Tensor]:
    """The dictionary's own, and the penalty."""
    penalty = made.penalty(step)
    return made.losses(step) | ({} if penalty is None else {"penalty": penalty})


def gradients(made: Dictionary, loss: Tensor) -> dict[str, Tensor | None]:
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


def reached(made: Dictionary, loss: Tensor) -> set[str]:
    return {name for name, grad in gradients(made, loss).items() if grad is not None and grad.any()}


def variance(made: Dictionary) -> Tensor:
    return torch.linspace(3.0, 5.0, len(made.writes))


def test_gates_have_the_penalty_of_relu() -> None:
    for sparsifier in SPARSIFIERS:
        if sparsifier != "relu":
            with pytest.raises(DictlearnError, match="has sparsifier relu"):
                empty("gated", sparsifier)
    assert len(PAIRS) == (len(DICTIONARIES) - 1) * len(SPARSIFIERS) + 1


@pairs
def test_losses_reach_every_parameter(kind: str, sparsifier: str) -> None:
    """The reconstruction all of them, but the gates of a gated dictionary, which have a loss of their own."""
    made = trained(kind, sparsifier)
    step = made.step(*data(made, 200), variance(made), DEAD)
    found = {name: reached(made, loss) for name, loss in losses(made, step).items()}
    everything = {name for name, _ in made.named_parameters()}
    encoder = {name for name in everything if name.startswith(("W_enc", "b_enc", "W_gate", "b_gate"))}
    decoder = {name for name in everything if name.startswith("W_dec")}
    if kind == "gated":
        assert found["recon"] == everything - {"b_enc"}
        assert found["gate"] == {"W_enc", "b_enc"}
        assert found["penalty"] == encoder
        return
    assert found["recon"] == everything
    if (penalty := found.get("penalty")) is not None:
        thresholds = {name for name in everything if name.startswith("sparsifier.")}
        assert penalty == encoder | decoder | thresholds
    else:
        assert sparsifier not in ("relu", "jump_relu")


@pairs
def test_what_is_frozen_stays_and_the_others_do_not_notice(kind: str, sparsifier: str) -> None:
    made = trained(kind, sparsifier)
    x, target = data(made, 100)

    def total() -> dict[str, Tensor | None]:
        step = copy.deepcopy(made).step(x, target, variance(made), DEAD)  # a threshold moves with each step
        again = step.dictionary
        return gradients(again, torch.stack([*losses(again, step).values()]).sum())

    expected = total()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(False)
        found = total()
        assert name not in found
        torch.testing.assert_close(found, {key: grad for key, grad in expected.items() if key != name})
        parameter.requires_grad_(True)


@pairs
def test_inference_is_the_same_function(kind: str, sparsifier: str) -> None:
    made = trained(kind, sparsifier)
    folded = made.for_inference()
    assert kind_of(folded) == (made.inference_kind or kind)
    x, _ = data(made, 500)
    torch.testing.assert_close(folded(x).recon, made(x).recon, rtol=1e-5, atol=2e-5)
    latents, expected = folded.encode(x), made.encode(x)
    assert torch.equal(latents != 0, expected != 0)
    assert torch.equal(latents.sign(), expected.sign())
    ratio = torch.where(expected != 0, latents / expected, torch.nan)
    spread = ratio.nan_to_num(0).amax(0) - ratio.nan_to_num(torch.inf).amin(0)
    assert spread.nan_to_num(0, neginf=0).max() < 1e-3 * ratio.nan_to_num(0).max()  # one factor for each latent
    assert all(not p.requires_grad for p in folded.parameters())
    assert made.sparsifier.training  # it is left as it was
    assert all(p.requires_grad for p in made.parameters())
    again = folded.for_inference()
    torch.testing.assert_close(again(x).recon, folded(x).recon, rtol=1e-5, atol=2e-5)


@pairs
def test_files_hold_the_same_function(kind: str, sparsifier: str, tmp_path: Path) -> None:
    made = trained(kind, sparsifier)
    with pytest.raises(DictlearnError, match="call for_inference"):
        save(made, tmp_path)
    folded = made.for_inference()
    save(folded, tmp_path)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert (kind_of(loaded), loaded.sparsifier.kind) == (kind_of(folded), folded.sparsifier.kind)
    assert loaded.config() == folded.config()
    x, _ = data(made)
    assert torch.equal(loaded.encode(x), folded.encode(x))
    assert torch.equal(loaded(x).recon, folded(x).recon)
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "cfg.json").read_text() == (tmp_path / "cfg.json").read_text()


@pytest.mark.parametrize("sparsifier", ["batch_top_k"])
def test_a_dictionary_in_training_is_not_written_even_where_scales_are_one(sparsifier: str, tmp_path: Path) -> None:
    """Its threshold would be lost."""
    with pytest.raises(DictlearnError, match="call for_inference"):
        save(empty("linear", sparsifier), tmp_path)


@pairs
def test_shapes_alone_can_be_checked_against_a_start(kind: str, sparsifier: str) -> None:
    start = trained(kind, sparsifier).for_inference()
    with torch.device("meta"):
        made = empty(kind, sparsifier)
    made.start_from_(start)
    assert all(parameter.is_meta for parameter in made.parameters())


# -- steps --


def batch(made: Dictionary, x: Tensor, target: Tensor) -> Batch:
    acts = {}
    for sites, own in ((made.reads, x), (made.writes, target)):
        acts |= dict(zip(sites, own.unbind(-2) if made.site_axis else [own], strict=True))
    index = torch.arange(len(x))
    return Batch(acts, index, index, index)


@pairs
def test_a_step_under_autocast(kind: str, sparsifier: str) -> None:
    """Products in bfloat16; losses, gradients and what is remembered in float32."""
    made = trained(kind, sparsifier)
    x, target = data(made, 300)
    plain, mixed = copy.deepcopy(made), copy.deepcopy(made)
    expected = losses(plain, plain.step(x, target, variance(made), DEAD))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = mixed.step(x, target, variance(made), DEAD)
        found = losses(mixed, step)
        aux = AuxK()(step)
    assert (aux is None) == (sparsifier == "relu")
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=0)
    grads = gradients(mixed, torch.stack([*found.values(), *([] if aux is None else [aux])]).sum())
    assert {grad.dtype for grad in grads.values() if grad is not None} == {torch.float32}
    for name, buffer in mixed.named_buffers():
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-2, atol=0)


# The power of the activations' scale in which a parameter is, where not 0.
UNITS = {"b_enc": 1, "b_dec": 1, "b_mag": 1, "threshold": 1, "W_gate": -1}
N_STEPS = 8


class Run:
    """A learner and its optimizer, whose steps are in the units of each parameter."""

    def __init__(self, kind: str, sparsifier: str, scale: float = 1.0) -> None:
        torch.manual_seed(5)
        dictionary = empty(kind, sparsifier)
        sample = data(dictionary, 400, scale)
        generator = torch.Generator().manual_seed(0)
        spread = prepare(dictionary, statistics(dictionary, *sample), "none", generator)
        self.learner = Learner("x", dictionary, {"aux_k": AuxK()}, spread, 1_000, 1.0)
        self.learner.statistics.is_dead[::3] = True
        groups = [
            {"params": [p], "lr": 0.01 * scale ** UNITS.get(name.rpartition(".")[2], 0)}
            for name, p in dictionary.named_parameters()
        ]
        self.optimizer, self.scale = torch.optim.Adam(groups, eps=1e-30), scale

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of the steps."""
        found, dictionary = [], self.learner.dictionary
        for step in range(first, last):
            torch.manual_seed(100 + step)
            self.learner.at(step, N_STEPS)
            loss = self.learner.loss(batch(dictionary, *data(dictionary, 60, self.scale)))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            dictionary.project_()
            if step == 5:  # until then a third of the latents counts as dead, and is revived
                self.learner.statistics.flush()
            found.append(float(loss.detach()))
        return found

    def state(self) -> dict[str, dict]:
        return copy.deepcopy({"learner": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()})


@pairs
def test_a_resumed_run_is_exact(kind: str, sparsifier: str) -> None:
    whole, first, second = (Run(kind, sparsifier) for _ in range(3))
    losses = whole.steps(0, 8)
    assert len(set(losses)) == 8
    assert first.steps(0, 3) == losses[:3]
    state = first.state()
    second.learner.load_state_dict(state["learner"])
    second.optimizer.load_state_dict(state["optimizer"])
    assert second.steps(3, 8) == losses[3:]
    expected, found = whole.state()["learner"], second.state()["learner"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    copied = copy.deepcopy(first.learner)
    data_ = batch(copied.dictionary, *data(copied.dictionary))
    assert copied.loss(data_) == first.learner.loss(data_)


@pairs
def test_training_does_not_depend_on_the_scale_of_activations(kind: str, sparsifier: str) -> None:
    """Without normalisation, with steps in the units of each parameter: losses, L0, thresholds."""
    one, other = Run(kind, sparsifier), Run(kind, sparsifier, scale=128.0)
    torch.testing.assert_close(other.steps(0, 8), one.steps(0, 8), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    d, scaled = one.learner.dictionary, other.learner.dictionary
    x, _ = data(d, 300)
    torch.testing.assert_close(scaled.for_inference()(128 * x).recon / 128, d(x).recon, rtol=1e-3, atol=1e-4)
    l0 = [float((made.encode(s * x) != 0).sum(-1).double().mean()) for made, s in ((d, 1), (scaled, 128))]
    assert l0[1] == pytest.approx(l0[0], rel=1e-3)
    for name, value in d.state_dict().items():
        if name.startswith("sparsifier.") and name.endswith("threshold"):
            torch.testing.assert_close(scaled.state_dict()[name] / 128, value, rtol=1e-3, atol=1e-6)


@pairs
def test_losses_are_means_over_tokens(kind: str, sparsifier: str) -> None:
    """A coefficient means the same at every batch size: halves have the loss of the whole as their mean."""
    made = trained(kind, sparsifier)
    if not made.per_token:
        pytest.skip("a token's latents depend on the batch")
    x, target = data(made, 128)

    def of(part: slice) -> dict[str, Tensor]:
        return losses(made, made.step(x[part], target[part], variance(made), DEAD))

    whole, halves = of(slice(None)), (of(slice(0, 64)), of(slice(64, None)))
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value)


@pairs
def test_statistics_count_active_latents(kind: str, sparsifier: str) -> None:
    """Negative ones too, where latents are signed."""
    made = trained(kind, sparsifier)
    learner = Learner("x", made, {}, variance(made), 1_000, None)
    x, target = data(made)
    latents = copy.deepcopy(made).step(x, target, variance(made)).latents
    dense = latents.to_dense() if isinstance(latents, SparseLatents) else latents
    learner.loss(batch(made, x, target))
    assert learner.statistics.fired.tolist() == (dense != 0).sum(0).tolist()
    assert made.sparsifier.signed == bool((dense < 0).any())
    assert float(learner.statistics.flush().l0) == pytest.approx(float((dense != 0).sum(-1).double().mean()))


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("started", ["top_k", "relu", "jump_relu"])
def test_thresholds_of_a_start_are_taken_and_without_them_ones_own_stay(started: str, sparsifier: str) -> None:
    other = trained("linear", started).for_inference()
    made = empty("linear", sparsifier)
    made.read_scale.fill_(0.01)
    made.write_scale.fill_(0.02)
    made.set_unit_(torch.tensor([3.0]))
    own = {name: p.detach().clone() for name, p in made.named_parameters() if name.startswith("sparsifier.")}
    made.start_from_(other)
    for name, before in own.items():
        value = made.get_parameter(name)
        if started == "jump_relu":
            raw = made.for_inference().get_parameter(name)
            torch.testing.assert_close(raw, other.get_parameter(name))
        else:
            assert torch.equal(value, before)
