"""Continuing from a saved dictionary: for every kind, the same function in any units."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.registry import kinds, lookup
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError

DICTIONARIES = [*kinds("dictlearn.dictionaries"), "skip_autoencoder", "transcoder", "skip_transcoder"]
SPARSIFIERS = kinds("dictlearn.sparsifiers")
CASES = [(kind, mode) for kind in DICTIONARIES for mode in ("none", "mean_norm")]
LAYER_NORMED = ("linear", "skip_autoencoder", "gated", "matryoshka", "bilinear")
CASES += [(kind, "layer_norm") for kind in LAYER_NORMED]
SCALES = [1.0, 100.0]  # of the activations


def fresh(kind: str, sparsifier: str, mode: str) -> Dictionary:
    """An empty dictionary of a registered kind, or a variant of the linear one."""
    if kind == "gated" and sparsifier != "relu":
        pytest.skip("gates have the penalty of relu")
    built = lookup("dictlearn.sparsifiers", sparsifier).tiny()
    if kind in kinds("dictlearn.dictionaries"):
        tiny = lookup("dictlearn.dictionaries", kind).tiny()
        changed = {"sparsifier": built, "decoder_norm": None, "input_norm": norm_of(mode)}
        return type(tiny)(**tiny.config() | changed)
    transcoder = kind.endswith("transcoder")
    sites = (["a"], ["b"]) if transcoder else (["a"], ["a"])
    d_out = 5 if transcoder else 6
    return Linear(6, d_out, 16, built, *sites, skip=kind.startswith("skip"), input_norm=norm_of(mode))


def norm_of(mode: str) -> str:
    return "layer_norm" if mode == "layer_norm" else "none"


def set_scales(dictionary: Dictionary, mode: str, scale: float) -> None:
    if mode == "mean_norm":
        dictionary.read_scale.copy_(torch.linspace(0.5, 0.9, len(dictionary.reads)) / scale)
        dictionary.write_scale.copy_(torch.linspace(1.3, 2.0, len(dictionary.writes)) / scale)


def trained(kind: str, sparsifier: str, mode: str, scale: float) -> Dictionary:
    """As training leaves it: any weights on the constraint set."""
    made = fresh(kind, sparsifier, mode)
    for parameter in made.parameters():
        parameter.data.normal_()
    made.project_()
    set_scales(made, mode, scale)
    return made


def inputs(dictionary: Dictionary, scale: float) -> Tensor:
    return scale * torch.randn(60, *([len(dictionary.reads)] if dictionary.site_axis else []), dictionary.d_in)


def check_same(found: Dictionary, expected: Dictionary, scale: float) -> None:
    x = inputs(expected, scale)
    size = float(expected(x).recon.abs().max())
    torch.testing.assert_close(found.encode(x), expected.encode(x), rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(found(x).recon, expected(x).recon, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_for_inference_gives_back_what_it_started_from(kind: str, sparsifier: str, mode: str, scale: float) -> None:
    other = trained(kind, sparsifier, mode, scale).for_inference()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    started = fresh(kind, sparsifier, mode)
    set_scales(started, mode, scale)
    started.start_from_(other)
    check_same(started.for_inference(), other, scale)
    x = inputs(other, scale)
    torch.testing.assert_close(started(x).recon, other(x).recon, rtol=1e-4, atol=1e-5 * scale)
    held = [parameter.detach().clone() for parameter in started.parameters()]
    started.project_()  # it starts on the constraint set
    torch.testing.assert_close(list(started.parameters()), held)
    assert all(parameter.requires_grad for parameter in started.parameters())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_the_scales_of_the_new_run_may_be_others(kind: str, sparsifier: str, factor: float) -> None:
    other = trained(kind, sparsifier, "mean_norm", 1.0).for_inference()
    started = fresh(kind, sparsifier, "mean_norm")
    set_scales(started, "mean_norm", factor)
    started.start_from_(other)
    inference = started.for_inference()
    x = inputs(other, 1.0)
    torch.testing.assert_close(inference(x).recon, other(x).recon, rtol=1e-4, atol=1e-4)
    assert torch.equal(inference.encode(x) != 0, other.encode(x) != 0)
    if len(other.writes) == 1 or started.sparsifier.for_inference().per_latent:
        check_same(inference, other, 1.0)


def test_normalised_units_are_those_of_the_scales() -> None:
    """The pre-activations of a started dictionary are the old ones in the new unit, by hand."""
    old = trained("linear", "top_k", "mean_norm", 1.0)
    old.read_scale.fill_(0.25)
    old.write_scale.fill_(0.25)
    started = fresh("linear", "top_k", "mean_norm")
    started.read_scale.fill_(0.5)
    started.write_scale.fill_(0.5)
    started.start_from_(old.for_inference())
    torch.testing.assert_close(started.W_enc, old.W_enc)
    torch.testing.assert_close(started.W_dec, old.W_dec)
    torch.testing.assert_close(started.b_enc, 2 * old.b_enc)
    torch.testing.assert_close(started.b_dec, 2 * old.b_dec)


def test_a_dictionary_in_training_is_a_start_too() -> None:
    old = trained("crosscoder", "top_k", "mean_norm", 3.0)
    started = fresh("crosscoder", "top_k", "mean_norm")
    set_scales(started, "mean_norm", 3.0)
    started.start_from_(old)
    torch.testing.assert_close(list(started.parameters()), list(old.parameters()))


def test_unequal_rows_become_unit_with_their_norms_in_the_encoder() -> None:
    other = Linear(6, 6, 16, TopK(16), decoder_norm="free")  # keeps all, so that no selection can change
    for parameter in other.parameters():
        parameter.data.normal_()
    started = Linear(6, 6, 16, TopK(16))
    assert started.decoder_norm == "unit"
    started.start_from_(other)
    torch.testing.assert_close(started.W_dec.norm(dim=-1), torch.ones(16))
    x = torch.randn(40, 6)
    torch.testing.assert_close(started(x).recon, other(x).recon)
    torch.testing.assert_close(started.encode(x), other.encode(x) * other.W_dec.norm(dim=-1))


def test_sites_in_another_proportion_keep_the_function() -> None:
    other = Crosscoder.tiny().for_inference()
    started = Crosscoder(6, 6, 16, TopK(16), ["a", "b"], ["a", "b"])
    other.sparsifier = TopK(16)
    started.read_scale.copy_(torch.tensor([0.1, 20.0]))
    started.write_scale.copy_(torch.tensor([0.1, 20.0]))
    started.start_from_(other)
    torch.testing.assert_close(started.flat_W_dec.norm(dim=-1), torch.ones(16))
    x = torch.randn(40, 2, 6)
    torch.testing.assert_close(started(x).recon, other(x).recon, rtol=1e-4, atol=1e-4)


def test_the_sparsifier_stays_its_own() -> None:
    other = trained("linear", "top_k", "none", 1.0).for_inference()
    for sparsifier in (TopK(2), ReLU(0.5)):
        started = Linear(6, 6, 16, sparsifier)
        started.start_from_(other)
        x = torch.randn(9, 6)
        expected = type(sparsifier)(**sparsifier.config())(x @ other.W_enc + other.b_enc)
        torch.testing.assert_close(started.encode(x), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Linear(8, 8, 16, TopK(4)), "d_in is 8 there and 6 here, d_out is 8 there and 6 here"),
        (lambda: Linear(6, 6, 32, TopK(4)), "n_latents is 32 there and 16 here"),
        (lambda: Linear(6, 6, 16, TopK(4), ["a"], ["a"]), r"reads is \['a'\] there and \['x'\] here"),
        (lambda: Linear(6, 6, 16, TopK(4), ["x"], ["b"]), r"writes is \['b'\] there and \['x'\] here"),
        (lambda: Linear(6, 6, 16, TopK(4), skip=True), "skip is True there and False here"),
        (
            lambda: Linear(6, 6, 16, TopK(4), input_norm="layer_norm"),
            "input_norm is layer_norm there and none here",
        ),
        (lambda: Crosscoder(6, 6, 16, TopK(4)), "kind is crosscoder there and linear here"),
    ],
)
def test_what_does_not_fit_is_named(other: Callable[[], Dictionary], message: str) -> None:
    started = Linear.tiny()
    before = started.W_enc.clone()
    with pytest.raises(DictlearnError, match=message):
        started.start_from_(other())
    assert torch.equal(started.W_enc, before)


def test_rows_of_zeros_cannot_become_unit() -> None:
    other = Linear(6, 6, 16, TopK(4), decoder_norm="free")
    other.W_dec.data[2:].normal_()
    with pytest.raises(DictlearnError, match="2 of 16 are: use decoder_norm=free"):
        Linear.tiny().start_from_(other)
    started = Linear(6, 6, 16, TopK(4), decoder_norm="free")
    started.start_from_(other)
    assert torch.equal(started.W_dec, other.W_dec)


def test_shapes_alone_can_be_checked() -> None:
    """On the meta device, before a run: all that is refused later is refused there."""
    with torch.device("meta"):
        started, small = Linear(6, 6, 16, TopK(4)), Linear(6, 6, 8, TopK(4))
    started.start_from_(Linear.tiny())
    with pytest.raises(DictlearnError, match="n_latents is 16 there and 8 here"):
        small.start_from_(Linear.tiny())
