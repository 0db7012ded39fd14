"""The parts of a training step, each against its rule."""

import pytest
import torch
from torch import Tensor, nn

from dictlearn.data import SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.optimizers import Adam, build_optimizer
from dictlearn.types import DictlearnError, Step
from tests.training.planted import D, PlantedStream, member


def test_scales_make_the_mean_norm_the_root_of_the_width_and_losses_are_fvus() -> None:
    stream = PlantedStream(1, batch_size=4096)
    learner = member("t", writes="y").learner
    dictionary = learner.dictionary
    acts = stream.batch(20_000).acts
    for site, scaled in (("x", dictionary.normalise(acts["x"])), ("y", dictionary.normalise_target(acts["y"]))):
        assert scaled.norm(dim=-1).mean() == pytest.approx(D**0.5, rel=0.02), site
    target = dictionary.normalise_target(acts["y"])
    spread = (target - target.mean(0)).square().sum(-1).mean()
    assert float(learner.variance) == pytest.approx(float(spread), rel=0.03)


def test_without_normalisation_scales_are_one() -> None:
    dictionary = Linear(D, D, 64, TopK(4))
    variance = prepare(dictionary, PlantedStream(1).statistics(), "none", torch.Generator())
    acts = torch.cat([PlantedStream(1).batch(20_000 + i).acts["x"] for i in range(20)])
    assert dictionary.read_scale == dictionary.write_scale == 1
    assert float(variance) == pytest.approx(float((acts - acts.mean(0)).square().sum(-1).mean()), rel=1e-4)


def test_unknown_or_contradicting_normalisation_is_refused() -> None:
    statistics, generator = PlantedStream(1).statistics(), torch.Generator()
    with pytest.raises(DictlearnError, match="normalise must be one of mean_norm, none, layer_norm, got 'max'"):
        prepare(Linear.tiny(), statistics, "max", generator)
    for normalise, input_norm in (("layer_norm", "none"), ("mean_norm", "layer_norm"), ("none", "layer_norm")):
        dictionary = Linear(D, D, 64, TopK(4), input_norm=input_norm)
        with pytest.raises(DictlearnError, match=f"normalise={normalise} and a dictionary with.*={input_norm}"):
            prepare(dictionary, statistics, normalise, generator)


def layer_normed(scale: float) -> tuple[Tensor, dict[str, SiteStatistics]]:
    """Planted activations, each token at a scale of its own, and their statistics written out in float64."""
    make = torch.Generator().manual_seed(3)
    x = PlantedStream(1, batch_size=4096).batch(20_000).acts["x"]
    x = scale * x * torch.empty(len(x), 1).uniform_(0.1, 10.0, generator=make)
    z = x.double() - x.double().mean(-1, keepdim=True)
    z = z / (z.square().sum(-1, keepdim=True).div(D - 1).sqrt() + 1e-5)
    spread = float((z - z.mean(0)).square().sum(-1).mean())
    raw = PlantedStream(1).statistics()["x"]
    return x, {"x": raw._replace(layer_norm_mean=z.mean(0), layer_norm_variance=spread)}


@pytest.mark.parametrize("scale", [0.1, 50.0])
def test_layer_norm_starts_from_the_statistics_of_normed_activations(scale: float) -> None:
    x, statistics = layer_normed(scale)
    dictionary = Linear(D, D, 64, TopK(4), input_norm="layer_norm")
    variance = prepare(dictionary, statistics, "layer_norm", torch.Generator().manual_seed(0))
    assert dictionary.read_scale == dictionary.write_scale == 1
    z = dictionary.normalise(x)
    torch.testing.assert_close(z.mean(0), dictionary.b_dec.detach(), atol=1e-5, rtol=1e-4)
    at_mean = z.mean(0) @ dictionary.W_enc + dictionary.b_enc
    torch.testing.assert_close(at_mean, torch.zeros(64), atol=1e-5, rtol=0)
    with torch.no_grad():
        dictionary.W_dec.zero_()  # the mean predictor of z: its FVU is one
    step = dictionary.step(x, x, variance)
    assert float(dictionary.losses(step)["recon"]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("normalise", ["mean_norm", "none", "layer_norm"])
def test_a_start_takes_the_place_of_random_weights(normalise: str) -> None:
    x, statistics = layer_normed(1.0)
    input_norm = "layer_norm" if normalise == "layer_norm" else "none"
    start = Linear(D, D, 64, TopK(4), input_norm=input_norm)
    for parameter in start.parameters():
        parameter.data.normal_()
    start.project_()
    start = start.for_inference()
    dictionary = Linear(D, D, 64, TopK(4), input_norm=input_norm)
    variance = prepare(dictionary, statistics, normalise, torch.Generator(), start)
    fresh = Linear(D, D, 64, TopK(4), input_norm=input_norm)
    assert variance == prepare(fresh, statistics, normalise, torch.Generator())
    assert dictionary.read_scale == fresh.read_scale
    torch.testing.assert_close(dictionary(x).recon, start(x).recon, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.for_inference().encode(x), start.encode(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(DictlearnError, match="n_latents is 64 there and 32 here"):
        prepare(Linear(D, D, 32, TopK(4), input_norm=input_norm), statistics, normalise, torch.Generator(), start)


@pytest.mark.parametrize("own", [True, False])
def test_a_bandwidth_means_the_same_with_the_weights_of_a_start(own: bool) -> None:
    """A multiple of what a random encoder row as long as those of the start gives."""
    statistics = PlantedStream(1).statistics()
    old = Linear(D, D, 64, JumpReLU(threshold=0.3) if own else TopK(4), ["x"], ["x"])
    prepare(old, statistics, "mean_norm", torch.Generator().manual_seed(0))
    if isinstance(old.sparsifier, JumpReLU):
        old.sparsifier.thresholds.data.uniform_(0.1, 0.2)
    found = Linear(D, D, 64, JumpReLU(threshold=0.1), ["x"], ["x"])
    prepare(found, statistics, "mean_norm", torch.Generator(), old.for_inference())
    assert isinstance(found.sparsifier, JumpReLU)
    x = PlantedStream(1).sample()
    length = found.W_enc.norm(dim=0).mean()
    rows = torch.nn.functional.normalize(torch.randn(D, 4_000), dim=0) * length
    spread = ((x - x.mean(0)) * found.read_scale @ rows).square().mean().sqrt()
    torch.testing.assert_close(found.sparsifier.unit, spread, rtol=0.03, atol=0)
    if own:  # the thresholds are those of the start
        torch.testing.assert_close(found(x).recon, old(x).recon, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(found.sparsifier.thresholds, (0.1 * found.sparsifier.unit).expand(64))


def test_biases_start_at_the_means_of_the_sites() -> None:
    dictionary = member("t", writes="y").learner.dictionary
    statistics = PlantedStream(1).statistics()
    b_dec = dictionary.denormalise(dictionary.b_dec)
    torch.testing.assert_close(b_dec, statistics["y"].mean.float(), rtol=1e-4, atol=1e-5)
    at_mean = dictionary.pre_activations(statistics["x"].mean.float().unsqueeze(0))
    assert at_mean is not None
    torch.testing.assert_close(at_mean, torch.zeros(1, 64), atol=1e-4, rtol=0)


def test_the_loss_is_everything_it_should_be() -> None:
    """Reconstruction, the sparsifier's penalty and every term of the objective."""
    dictionary = Linear(D, D, 64, ReLU(0.3), ["x"], ["x"])
    variance = prepare(dictionary, PlantedStream(1).statistics(), "mean_norm", torch.Generator().manual_seed(0))

    def term(step: Step) -> torch.Tensor:
        return step.recon.mean() ** 2 + 5.0

    def silent(step: Step) -> None:
        return None

    learner = Learner("x", dictionary, {"a": term, "b": silent}, variance, 1_000, None)
    batch = PlantedStream(1).batch(0)
    x = dictionary.normalise(batch.acts["x"])
    latents = (x @ dictionary.W_enc + dictionary.b_enc).relu()
    recon = latents @ dictionary.W_dec + dictionary.b_dec
    l1 = 0.3 * (latents * dictionary.W_dec.norm(dim=-1)).sum(-1).mean() / variance.sqrt()
    expected = (x - recon).square().sum(-1).mean() / variance + l1 + recon.mean() ** 2 + 5.0
    torch.testing.assert_close(learner.loss(batch), expected.squeeze())


def test_gradients_are_projected_before_they_are_clipped() -> None:
    learner = member(clip_norm=1.0).learner
    dictionary = learner.dictionary
    torch.manual_seed(0)
    for parameter in dictionary.parameters():
        parameter.grad = torch.randn_like(parameter)
    grad, unit = dictionary.W_dec.grad.clone(), dictionary.W_dec.detach()  # type: ignore[union-attr]
    projected = grad - (grad * unit).sum(-1, keepdim=True) * unit
    others = [p.grad for name, p in dictionary.named_parameters() if name != "W_dec"]
    norm = torch.stack([g.square().sum() for g in [projected, *others] if g is not None]).sum().sqrt()
    assert norm > 1
    learner.clip_gradients_()
    torch.testing.assert_close(dictionary.W_dec.grad, projected / norm, rtol=1e-4, atol=1e-6)
    total = nn.utils.get_total_norm([p.grad for p in dictionary.parameters() if p.grad is not None])
    assert float(total) == pytest.approx(1.0, rel=1e-4)


def test_small_gradients_are_not_clipped() -> None:
    learner = member(clip_norm=1.0).learner
    for parameter in learner.dictionary.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    learner.clip_gradients_()
    assert torch.equal(learner.dictionary.b_enc.grad, torch.full((64,), 1e-4))  # type: ignore[arg-type]


@pytest.mark.parametrize(("n_latents", "lr"), [(2**14, 2e-4), (2**16, 1e-4), (2**12, 4e-4)])
def test_the_learning_rate_law(n_latents: int, lr: float) -> None:
    dictionary = Linear(2, 2, n_latents, TopK(1))
    assert Adam(None, 1.0, (0.9, 0.999), 1e-8, None).peak_lr(dictionary) == pytest.approx(lr)
    assert Adam(None, 3.0, (0.9, 0.999), 1e-8, None).peak_lr(dictionary) == pytest.approx(3 * lr)
    assert Adam(0.7, 3.0, (0.9, 0.999), 1e-8, None).peak_lr(dictionary) == 0.7


def test_every_dictionary_has_its_own_optimizer_settings() -> None:
    one, two = Linear.tiny(), Linear.tiny()
    settings = [(one, Adam(1e-3, 1.0, (0.9, 0.999), 1e-8, None)), (two, Adam(1e-4, 1.0, (0.0, 0.99), 1e-6, None))]
    groups = build_optimizer(settings).param_groups
    assert [(g["lr"], g["betas"], g["eps"]) for g in groups] == [
        (1e-3, (0.9, 0.999), 1e-8),
        (1e-4, (0.0, 0.99), 1e-6),
    ]
    assert [set(map(id, g["params"])) for g in groups] == [set(map(id, d.parameters())) for d in (one, two)]


def test_activations_that_do_not_vary_are_refused() -> None:
    statistics = {
        site: s._replace(variance=1e-14 * s.mean_norm**2) for site, s in PlantedStream(1).statistics().items()
    }
    with pytest.raises(DictlearnError, match="are the same at every token of the statistics prefix"):
        prepare(Linear.tiny(), statistics, "mean_norm", torch.Generator())


@pytest.mark.parametrize("frozen", ["W_dec", "W_enc", "b_dec"])
@pytest.mark.parametrize("micro_batch_size", [None, 50])
def test_a_frozen_weight_stays_without_a_gradient(frozen: str, micro_batch_size: int | None) -> None:
    """Also while latents are dead and AuxK revives them, and in chunks."""
    learner = member().learner
    learner.micro_batch_size = micro_batch_size
    learner.statistics.is_dead[:9] = True
    learner.dictionary.get_parameter(frozen).requires_grad_(False)
    learner.loss(PlantedStream(1).batch(0)).backward()
    missing = [name for name, p in learner.dictionary.named_parameters() if p.grad is None]
    assert missing == [frozen]


def relu_run(terms: dict[str, AuxK]) -> tuple[Learner, list[float]]:
    """60 steps with a steep penalty, under which latents die; and their losses."""
    stream, dictionary = PlantedStream(60), Linear(D, D, 64, ReLU(1.0), ["x"], ["x"])
    variance = prepare(dictionary, stream.statistics(), "mean_norm", torch.Generator().manual_seed(0))
    learner = Learner("x", dictionary, terms, variance, 512, 1.0, micro_batch_size=64)
    optimizer, losses = torch.optim.Adam(dictionary.parameters(), lr=0.01), []
    for batch in stream:
        loss = learner.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.statistics.flush()
        losses.append(float(loss.detach()))
    return learner, losses


def test_aux_k_changes_nothing_under_relu() -> None:
    plain, losses = relu_run({})
    with_term, found = relu_run({"aux_k": AuxK()})
    assert 3 < int(plain.statistics.is_dead.sum()) < 64
    assert found == losses
    for name, value in with_term.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert not with_term.revives_dead


@pytest.mark.parametrize("micro_batch_size", [None, 50])
def test_a_term_that_revives_latents_without_positive_pre_activations_has_their_weights(
    micro_batch_size: int | None,
) -> None:
    """What AuxK leaves out, another term may do: such as by the pre-activations themselves."""

    class Raised:
        def revives(self, dictionary: Dictionary) -> bool:
            return dictionary.sparsifier.kind == "relu"

        def __call__(self, step: Step) -> Tensor | None:
            if step.dead is None or step.dead_rows is None:
                return None
            return -step.dictionary.row_pre_acts(step.x, step.dead_rows, step.dead).sum(-1).mean()

    dead = torch.tensor([3, 9])
    for sparsifier in (ReLU(0.0), TopK(4)):
        dictionary = Linear(D, D, 64, sparsifier, ["x"], ["x"])
        learner = Learner("x", dictionary, {"raised": Raised()}, torch.ones(1), 512, None, micro_batch_size)
        learner.statistics.is_dead[dead] = True
        learner.loss(PlantedStream(1).batch(0)).backward()
        expected = torch.zeros(64)
        expected[dead] = -1.0 if isinstance(sparsifier, ReLU) else 0.0
        torch.testing.assert_close(dictionary.b_enc.grad, expected)
