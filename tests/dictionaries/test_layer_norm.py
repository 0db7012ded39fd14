"""Per-token layer-norm input against its rule, written out token by token in float64."""

import copy
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import save
from dictlearn.lm import LM, capture, load_lm, resolve
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.tiny_lms import tiny_lm_folder


def made(sparsifier: Sparsifier, d: int = 6, site: str = "x") -> Linear:
    dictionary = Linear(d, d, 16, sparsifier, [site], [site], input_norm="layer_norm")
    for parameter in dictionary.parameters():
        parameter.data.normal_()
    dictionary.project_()
    return dictionary


def by_hand(dictionary: Linear, token: Tensor) -> tuple[list[float], list[float]]:
    """Latents and reconstruction of one token by SAELens' rule; scales 1, everything kept (ReLU)."""
    values = token.double().tolist()
    mean, std = statistics.fmean(values), statistics.stdev(values)
    z = [(value - mean) / (std + 1e-5) for value in values]
    W_enc, W_dec = dictionary.W_enc.double().tolist(), dictionary.W_dec.double().tolist()
    b_enc, b_dec = dictionary.b_enc.double().tolist(), dictionary.b_dec.double().tolist()
    latents = [max(0.0, sum(z[j] * W_enc[j][i] for j in range(len(z))) + b_enc[i]) for i in range(len(b_enc))]
    coded = [sum(latents[i] * W_dec[i][j] for i in range(len(latents))) + b_dec[j] for j in range(len(z))]
    return latents, [value * std + mean for value in coded]


@pytest.mark.parametrize("scale", [0.01, 1.0, 500.0])
def test_the_rule(scale: float) -> None:
    dictionary = made(ReLU(0.1))
    x = scale * (torch.randn(9, 6) + 2)
    out = dictionary(x)
    for t, token in enumerate(x):
        latents, recon = by_hand(dictionary, token)
        assert out.latents[t].tolist() == pytest.approx(latents, rel=1e-4, abs=1e-5)
        assert out.recon[t].tolist() == pytest.approx(recon, rel=1e-4, abs=1e-4 * scale)


def test_tokens_are_normalised_each_by_itself() -> None:
    dictionary = made(TopK(4))
    x = torch.randn(5, 6)
    moved = x * torch.tensor([1.0, 10.0, 0.1, 300.0, 2.0]).unsqueeze(-1) + torch.arange(5.0).unsqueeze(-1)
    torch.testing.assert_close(dictionary.encode(moved), dictionary.encode(x), rtol=1e-3, atol=1e-3)


def test_nothing_is_kept_between_encode_and_decode() -> None:
    dictionary = made(TopK(4))
    x, other = torch.randn(4, 6), 50 * torch.randn(7, 6)
    latents = dictionary.encode(x)
    expected = dictionary(x).recon
    dictionary.encode(other)
    for _ in range(2):
        torch.testing.assert_close(dictionary.decode(latents, x), expected)
    assert dictionary.decode(dictionary.encode(other), other).shape == other.shape


@pytest.mark.parametrize("sparsifier", [TopK(4), ReLU(0.1)])
def test_tokens_without_variance_are_finite_and_so_are_their_gradients(sparsifier: Sparsifier) -> None:
    dictionary = made(sparsifier)
    x = torch.stack([torch.full((6,), 3.0), torch.zeros(6), torch.randn(6)]).requires_grad_()
    step = dictionary.step(x, x, torch.ones(1), torch.arange(4))
    aux = AuxK()(step)
    assert (aux is None) == isinstance(sparsifier, ReLU)
    parts = [dictionary.losses(step)["recon"], dictionary(x).recon.square().sum(), aux]
    torch.stack([part for part in parts if part is not None]).sum().backward()
    assert dictionary(x).recon.isfinite().all()
    for tensor in (x, *dictionary.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    torch.testing.assert_close(dictionary(x).recon[0], torch.full((6,), 3.0), atol=1e-3, rtol=0)


def test_the_target_is_z_and_the_losses_are_of_z() -> None:
    dictionary = made(TopK(4))
    plain = Linear(6, 6, 16, TopK(4))
    plain.load_state_dict(dictionary.state_dict())
    x = 40 * torch.randn(30, 6) + 7
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True).sqrt() + 1e-5)
    step, expected = dictionary.step(x, x, torch.ones(1)), plain.step(z, z, torch.ones(1))
    torch.testing.assert_close(step.target, z)
    torch.testing.assert_close(step.x, z)
    torch.testing.assert_close(dictionary.losses(step), plain.losses(expected))


def test_folding_norms_and_scales_keeps_the_function() -> None:
    dictionary = made(ReLU(0.1))
    dictionary.read_scale.fill_(0.7)
    dictionary.write_scale.fill_(1.9)
    folded = dictionary.for_inference()
    assert folded.input_norm == "layer_norm"
    torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(16))
    x = 30 * torch.randn(20, 6)
    torch.testing.assert_close(folded(x).recon, dictionary(x).recon, rtol=1e-5, atol=1e-3)


def test_low_precision_activations_are_normalised_in_the_dictionarys() -> None:
    dictionary = made(TopK(4))
    x = torch.randn(5, 6).bfloat16()
    assert torch.equal(dictionary(x).recon, dictionary(x.float()).recon)


def test_what_it_does_not_fit_is_refused() -> None:
    with pytest.raises(DictlearnError, match=r"one of none, layer_norm, .*got 'batch_norm'"):
        Linear(6, 6, 16, TopK(4), input_norm="batch_norm")
    reason = "what was taken off the token that was read; this {} reads {} and writes {}"
    with pytest.raises(DictlearnError, match=reason.format("Linear", "a", "b")):
        Linear(6, 6, 16, TopK(4), ["a"], ["b"], input_norm="layer_norm")
    with pytest.raises(DictlearnError, match=reason.format("Crosscoder", "a, b", "a, b")):
        Crosscoder(6, 6, 16, TopK(4), ["a", "b"], ["a", "b"], input_norm="layer_norm")
    with pytest.raises(DictlearnError, match="at least 2 wide, got 1"):
        Linear(1, 1, 16, TopK(4), input_norm="layer_norm")


# -- in a language model -----------------------------------------------------------------------------------------

SITE, IDS = "resid_post.1", torch.arange(10).reshape(2, 5) + 3


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), "gpt2")))


def gradients(lm: LM, sae: Linear, policy: str) -> tuple[Tensor, Tensor]:
    """d metric / d embeddings and d metric / d latents with `sae` attached."""
    embeddings = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with dictlearn.attach(lm, sae, policy=policy) as run:
        run(inputs_embeds=embeddings).logits[:, -1, 7].sum().backward()
    at_latents = run.latents[SITE].grad
    assert at_latents is not None
    return embeddings.grad if embeddings.grad is not None else torch.zeros_like(embeddings), at_latents


def clean(lm: LM) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without a dictionary: embeddings, activation at the site, and the metric's gradient to each of them."""
    embeddings = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with capture(lm.model, [resolve(lm.model, SITE)]) as acts:
        metric = lm.model(inputs_embeds=embeddings).logits[:, -1, 7].sum()
    to_embeddings, to_act = torch.autograd.grad(metric, [embeddings, acts[SITE]], retain_graph=True)
    return embeddings, acts[SITE], to_embeddings, to_act


@pytest.mark.parametrize("policy", ["transparent", "frozen_error", "stop"])
def test_attached_gradients(lm: LM, policy: str) -> None:
    """Latents get the gradient of their own write, std included; the site passes what the policy says."""
    sae = made(ReLU(0.1), lm.d_model, SITE).requires_grad_(False)
    embeddings, act, to_embeddings, to_act = clean(lm)
    std = act.var(-1, keepdim=True).sqrt()
    mean = act.mean(-1, keepdim=True)
    at_embeddings, at_latents = gradients(lm, sae, policy)
    torch.testing.assert_close(at_latents, (to_act * std) @ sae.W_dec.T, rtol=1e-4, atol=1e-6)
    latents = (((act - mean) / (std + 1e-5)) @ sae.W_enc + sae.b_enc).relu()
    recon = (latents @ sae.W_dec + sae.b_dec) * std + mean
    through_recon = torch.autograd.grad((recon * to_act).sum(), embeddings)[0]
    expected = {"transparent": to_embeddings, "frozen_error": through_recon, "stop": torch.zeros_like(embeddings)}
    torch.testing.assert_close(at_embeddings, expected[policy], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["transparent", "frozen_error", "stop"])
def test_attached_logits_are_bit_identical(lm: LM, policy: str) -> None:
    sae = made(TopK(4), lm.d_model, SITE)
    with dictlearn.attach(lm, sae, policy=policy) as run:
        assert torch.equal(run(IDS).logits, lm.model(IDS).logits)
    torch.testing.assert_close(run.recon[SITE] + run.errors[SITE], clean(lm)[1])


def test_a_copy_and_a_file_are_the_same_function(tmp_path: Path) -> None:
    inference = made(TopK(4)).for_inference()
    save(inference, tmp_path)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Linear)
    x = 9 * torch.randn(11, 6) + 4
    for again in (loaded, copy.deepcopy(inference)):
        assert torch.equal(again(x).recon, inference(x).recon)
        assert again.input_norm == "layer_norm"
