"""What holds for every dictionary in the folder, single- and several-sited."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.registry import kind_of, kinds, lookup
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.sparsifiers.unchecked import unchecked


def transcoder(skip: bool, input_norm: str = "none") -> Linear:
    made = Linear(6, 5, 16, TopK(4), reads=["a"], writes=["b"], skip=skip, input_norm=input_norm)
    made.initialise_(torch.Generator().manual_seed(0), torch.randn(1, 6), torch.randn(1, 5))
    for parameter in (made.W_dec, made.W_skip):
        if parameter is not None:
            parameter.data.normal_()
    return made


def relu_autoencoder() -> Linear:
    made = Linear(6, 6, 16, ReLU(0.1))
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 6))
    made.W_dec.data.mul_(torch.linspace(0.2, 3.0, 16).unsqueeze(-1))  # free norms
    return made


def layer_norm_autoencoder(skip: bool = False, input_norm: str = "layer_norm") -> Linear:
    made = Linear(6, 6, 16, TopK(4), skip=skip, input_norm=input_norm)
    made.initialise_(torch.Generator().manual_seed(0), torch.randn(1, 6), torch.randn(1, 6))
    if made.W_skip is not None:
        made.W_skip.data.normal_()
    return made


EXTRA = {
    "transcoder": lambda: transcoder(skip=False),
    "skip_transcoder": lambda: transcoder(skip=True),
    "relu": relu_autoencoder,
    "layer_norm": layer_norm_autoencoder,
    "skip_layer_norm": lambda: layer_norm_autoencoder(skip=True),
    "constant_norm_rescale": lambda: layer_norm_autoencoder(input_norm="constant_norm_rescale"),
    "centre": lambda: layer_norm_autoencoder(input_norm="centre"),
    "rms_norm": lambda: transcoder(skip=True, input_norm="rms_norm"),
    "lm_layer_norm": lambda: transcoder(skip=False, input_norm="lm_layer_norm"),
}


@pytest.fixture(params=[*kinds("dictlearn.dictionaries"), *EXTRA])
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    make = EXTRA.get(request.param) or lookup("dictlearn.dictionaries", request.param).tiny
    made = make()
    made.read_scale.copy_(torch.linspace(0.5, 0.9, len(made.reads)))
    made.write_scale.copy_(torch.linspace(1.3, 2.0, len(made.writes)))
    return made


def inputs(dictionary: Dictionary, n_tokens: int = 40) -> tuple[Tensor, Tensor]:
    reads = (len(dictionary.reads), dictionary.d_in) if dictionary.site_axis else (dictionary.d_in,)
    writes = (len(dictionary.writes), dictionary.d_out) if dictionary.site_axis else (dictionary.d_out,)
    return torch.randn(n_tokens, *reads), torch.randn(n_tokens, *writes)


def variance(dictionary: Dictionary) -> Tensor:
    return torch.linspace(1.0, 2.0, len(dictionary.writes))


def test_the_registry_has_a_dictionary_of_several_sites() -> None:
    tiny = [lookup("dictlearn.dictionaries", kind).tiny() for kind in kinds("dictlearn.dictionaries")]
    assert any(len(t.reads) == 2 and len(t.writes) == 2 for t in tiny)


def test_forward_is_encode_then_decode(dictionary: Dictionary) -> None:
    x, _ = inputs(dictionary)
    out = dictionary(x)
    torch.testing.assert_close(out.latents, dictionary.encode(x))
    torch.testing.assert_close(out.recon, dictionary.decode(dictionary.encode(x), x))


def test_sparse_encoding_is_the_dense_one(dictionary: Dictionary) -> None:
    x, _ = inputs(dictionary)
    sparse = dictionary.encode_sparse(x)
    torch.testing.assert_close(sparse.to_dense(), dictionary.encode(x))
    torch.testing.assert_close(dictionary.decode(sparse, x), dictionary(x).recon)


def test_step_is_forward_in_normalised_units(dictionary: Dictionary) -> None:
    x, target = inputs(dictionary)
    if not dictionary.per_token:
        pytest.skip("in training a token's latents depend on the batch")
    step = dictionary.step(x, target, variance(dictionary))
    torch.testing.assert_close(dictionary.denormalise(step.recon, x), dictionary(x).recon)
    if dictionary.input_norm == "layer_norm":  # divides by std + 1e-5, is undone by std alone, as in SAELens
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        target = mean + (target - mean) * std / (std + 1e-5)
    torch.testing.assert_close(dictionary.denormalise(step.target, x), target)


def test_leading_axes(dictionary: Dictionary) -> None:
    x, _ = inputs(dictionary, n_tokens=6)
    batched = x.unflatten(0, (2, 3))
    torch.testing.assert_close(dictionary(batched).recon.flatten(0, 1), dictionary(x).recon)
    compact = dictionary.encode_sparse(batched)
    torch.testing.assert_close(dictionary.decode(compact, batched), dictionary(x).recon)


def test_scaling_the_activations_scales_the_reconstruction(dictionary: Dictionary) -> None:
    x, _ = inputs(dictionary)
    scaled = copy.deepcopy(dictionary)
    if dictionary.input_norm in ("none", "centre"):  # other norms find the scale by themselves
        scaled.read_scale /= 100
    if dictionary.input_norm not in ("layer_norm", "constant_norm_rescale"):  # these put it back
        scaled.write_scale /= 100
    torch.testing.assert_close(scaled(100 * x).recon, 100 * dictionary(x).recon, rtol=1e-4, atol=1e-3)


def test_for_inference_keeps_reconstructions_and_selections(dictionary: Dictionary) -> None:
    x, _ = inputs(dictionary)
    folded = dictionary.for_inference()
    assert (folded.read_scale == 1).all()
    assert (folded.write_scale == 1).all()
    assert not any(p.requires_grad for p in folded.parameters())
    torch.testing.assert_close(folded(x).recon, dictionary(x).recon, rtol=1e-5, atol=1e-5)
    assert torch.equal(folded.encode(x) != 0, dictionary.encode(x) != 0)
    assert kind_of(folded) == (dictionary.inference_kind or kind_of(dictionary))


def test_for_inference_puts_latents_into_raw_units() -> None:
    tiny = Linear.tiny()
    tiny.read_scale.fill_(0.25)
    tiny.write_scale.fill_(0.25)
    folded = tiny.for_inference()
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(16))
    x = torch.randn(30, 6)
    torch.testing.assert_close(folded.encode(x), 4 * tiny.encode(x))


def test_for_inference_folds_free_norms_where_the_penalty_is_weighted() -> None:
    made = relu_autoencoder()
    torch.testing.assert_close(made.for_inference().W_dec.norm(dim=-1), torch.ones(16))
    free = transcoder(skip=False)
    norms = free.for_inference().W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, free.W_dec.norm(dim=-1))  # TopK compares latents as they are


def test_every_loss_reaches_every_weight(dictionary: Dictionary) -> None:
    x, target = inputs(dictionary, 200)
    step = dictionary.step(x, target, variance(dictionary))
    penalty = dictionary.penalty(step)
    torch.stack([*dictionary.losses(step).values(), *([] if penalty is None else [penalty])]).sum().backward()
    for name, parameter in dictionary.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), f"no loss reaches {name}"


def test_projection_holds_the_constraint_and_gradients_respect_it() -> None:
    tiny = Linear.tiny()
    assert tiny.decoder_norm == "unit"
    x, target = inputs(tiny)
    tiny.losses(tiny.step(x, target, variance(tiny)))["recon"].backward()
    tiny.project_gradient_()
    assert tiny.W_dec.grad is not None
    torch.testing.assert_close((tiny.W_dec.grad * tiny.W_dec).sum(-1), torch.zeros(16), atol=1e-6, rtol=0)
    with torch.no_grad():
        tiny.W_dec.sub_(0.5 * tiny.W_dec.grad)
    tiny.project_()
    torch.testing.assert_close(tiny.W_dec.norm(dim=-1), torch.ones(16))


@pytest.mark.parametrize("kind", kinds("dictlearn.dictionaries"))
def test_the_start_meets_the_constraint(kind: str) -> None:
    tiny = lookup("dictlearn.dictionaries", kind).tiny()
    before = tiny.W_dec.detach().clone()
    tiny.project_()
    if tiny.decoder_norm == "free":
        assert torch.equal(tiny.W_dec, before)
        return
    torch.testing.assert_close(tiny.W_dec, before)
    with torch.no_grad():
        tiny.W_dec.mul_(3.0)
    tiny.project_()
    torch.testing.assert_close(tiny.W_dec, before)  # sites keep their shares of a latent
    tiny.W_dec.grad = tiny.W_dec.detach().clone()
    tiny.project_gradient_()
    torch.testing.assert_close(tiny.W_dec.grad, torch.zeros_like(before), atol=1e-6, rtol=0)


def test_free_decoders_are_left_alone() -> None:
    free = transcoder(skip=False)
    assert free.decoder_norm == "free"
    before = free.W_dec.detach().clone()
    free.W_dec.grad = torch.ones_like(before)
    free.project_()
    free.project_gradient_()
    assert torch.equal(free.W_dec, before)
    assert torch.equal(free.W_dec.grad, torch.ones_like(before))


def test_autoencoders_start_tied_and_centred() -> None:
    mean = torch.randn(1, 6)
    made = Linear(6, 6, 16, TopK(4))
    made.read_scale.fill_(2.0)
    made.write_scale.fill_(2.0)
    made.initialise_(torch.Generator().manual_seed(0), mean, mean)
    torch.testing.assert_close(made.W_enc, made.W_dec.T)
    torch.testing.assert_close(made.W_dec.norm(dim=-1), torch.ones(16))
    torch.testing.assert_close(made.pre_activations(mean), torch.zeros(1, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(made(mean).recon, mean)


def test_transcoders_start_as_the_mean_predictor() -> None:
    read, write = torch.randn(1, 6), torch.randn(1, 5)
    made = Linear(6, 5, 16, TopK(4), reads=["a"], writes=["b"], skip=True)
    made.initialise_(torch.Generator().manual_seed(0), read, write)
    torch.testing.assert_close(made(torch.randn(9, 6)).recon, write.expand(9, 5))
    torch.testing.assert_close(made.pre_activations(read), torch.zeros(1, 16), atol=1e-5, rtol=0)


def test_transcoders_with_unit_rows_start_with_them() -> None:
    made = Linear(6, 5, 16, TopK(4), reads=["a"], writes=["b"], decoder_norm="unit")
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, 6), torch.zeros(1, 5))
    torch.testing.assert_close(made.W_dec.norm(dim=-1), torch.ones(16))
    made.project_()
    assert made.W_dec.isfinite().all()


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> Tensor:
        made = Linear(6, 6, 16, TopK(4))
        made.initialise_(torch.Generator().manual_seed(seed), torch.zeros(1, 6), torch.zeros(1, 6))
        return made.W_enc

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_sites_are_selected_and_split() -> None:
    acts = {"a": torch.randn(3, 6), "b": torch.randn(3, 6)}
    tiny = Crosscoder.tiny()
    assert torch.equal(tiny.select_reads(acts), torch.stack([acts["a"], acts["b"]], dim=1))
    split = tiny.split_writes(tiny.select_writes(acts))
    assert all(torch.equal(split[site], acts[site]) for site in acts)


def test_crosscoder_of_two_equal_sites_sums_their_encoders() -> None:
    tiny = Crosscoder.tiny()
    x = torch.randn(5, 2, 6)
    by_hand = sum(x[:, i] @ tiny.W_enc[i] for i in range(2)) + tiny.b_enc
    torch.testing.assert_close(tiny.pre_activations(x), by_hand)
    latents = tiny.encode(x)
    for i in range(2):
        torch.testing.assert_close(tiny.decode(latents)[:, i], latents @ tiny.W_dec[:, i] + tiny.b_dec[i])


@pytest.mark.parametrize(
    ("make", "part"),
    [(lambda: transcoder(skip=True), "a skip path"), (layer_norm_autoencoder, "input_norm=layer_norm")],
)
def test_decode_needs_the_input_where_the_dictionary_does(make: Callable[[], Linear], part: str) -> None:
    with pytest.raises(DictlearnError, match=rf"has {part}: decode\(latents, x\)"):
        make().decode(torch.zeros(2, 16))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DictlearnError, match="one read and one write"):
        Linear(6, 6, 16, TopK(4), reads=["a", "b"])
    with pytest.raises(DictlearnError, match="unit, free or null"):
        Linear(6, 6, 16, TopK(4), decoder_norm="both")
    with pytest.raises(DictlearnError, match="at most n_latents = 16"):
        Linear(6, 6, 16, TopK(17))


@pytest.mark.parametrize("skip", ["maybe", None, 1])
def test_a_skip_path_is_there_or_not(skip: Any) -> None:
    with pytest.raises(DictlearnError, match=f"skip must be true or false, got {skip!r}"):
        unchecked(Linear, d_in=6, d_out=6, n_latents=16, sparsifier=TopK(4), skip=skip)
