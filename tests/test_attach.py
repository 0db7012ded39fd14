"""A model with dictionaries in it: exact outputs, and gradients by policy."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import LM, capture, load_lm, resolve
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.tiny_lms import tiny_lm_folder

POLICIES = ("transparent", "frozen_error", "stop")
IDS = torch.arange(10).reshape(2, 5) + 3


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), request.param)))


def dictionary(lm: LM, read: str = "resid_post.1", write: str = "resid_post.1", skip: bool = False) -> Linear:
    torch.manual_seed(5)
    made = Linear(lm.d_model, lm.d_model, 24, ReLU(0.1), [read], [write], skip=skip)
    for parameter in made.parameters():
        parameter.data.normal_()
    return made.for_inference()  # type: ignore[return-value]


def logits(lm: LM) -> Tensor:
    return lm.model(IDS).logits


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_are_bit_identical(lm: LM, policy: str) -> None:
    several = [
        dictionary(lm),
        dictionary(lm, "mlp_in.2", "mlp_out.2", skip=True),
        dictionary(lm, "attn_out.0", "attn_out.0"),
    ]
    with dictlearn.attach(lm, several, policy=policy) as run:
        assert torch.equal(run(IDS).logits, logits(lm))
    assert sorted(run.latents) == ["attn_out.0", "mlp_out.2", "resid_post.1"]


def test_latents_reconstructions_and_errors_are_those_of_the_activations(lm: LM) -> None:
    transcoder = dictionary(lm, "mlp_in.2", "mlp_out.2", skip=True)
    with capture(lm.model, [resolve(lm.model, s) for s in ("mlp_in.2", "mlp_out.2")]) as acts:
        logits(lm)
    with dictlearn.attach(lm, transcoder) as run:
        run(IDS)
    x, y = acts["mlp_in.2"], acts["mlp_out.2"]
    torch.testing.assert_close(run.latents["mlp_out.2"], transcoder.encode(x), check_layout=True)
    torch.testing.assert_close(run.recon["mlp_out.2"], transcoder(x).recon)
    torch.testing.assert_close(run.recon["mlp_out.2"] + run.errors["mlp_out.2"], y)


def gradients(lm: LM, policy: str, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """d metric / d embeddings and d metric / d latents, with an SAE at resid_post.1."""
    embeddings = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with dictlearn.attach(lm, dictionary(lm), policy=policy, positions=positions) as run:
        run(inputs_embeds=embeddings).logits[:, -1, 7].sum().backward()
    latents = run.latents["resid_post.1"]
    assert latents.grad is not None
    return embeddings.grad if embeddings.grad is not None else torch.zeros_like(embeddings), latents.grad


def clean_gradients(lm: LM) -> tuple[Tensor, Tensor]:
    """The same without any dictionary: with respect to the embeddings and to the activation at the site."""
    embeddings = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with capture(lm.model, [resolve(lm.model, "resid_post.1")]) as acts:
        metric = lm.model(inputs_embeds=embeddings).logits[:, -1, 7].sum()
        grads = torch.autograd.grad(metric, [embeddings, acts["resid_post.1"]])
    return grads[0], grads[1]


def test_transparent_has_the_models_gradient(lm: LM) -> None:
    clean_embeddings, at_site = clean_gradients(lm)
    at_embeddings, at_latents = gradients(lm, "transparent")
    torch.testing.assert_close(at_embeddings, clean_embeddings)
    torch.testing.assert_close(at_latents, at_site @ dictionary(lm).W_dec.T)


def test_stop_passes_nothing(lm: LM) -> None:
    _, at_site = clean_gradients(lm)
    at_embeddings, at_latents = gradients(lm, "stop")
    assert not at_embeddings.any()
    torch.testing.assert_close(at_latents, at_site @ dictionary(lm).W_dec.T)


def test_frozen_error_passes_through_the_latents_alone(lm: LM) -> None:
    _, at_site = clean_gradients(lm)
    sae = dictionary(lm)
    embeddings = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with capture(lm.model, [resolve(lm.model, "resid_post.1")]) as acts:
        lm.model(inputs_embeds=embeddings)
        through_latents = sae(acts["resid_post.1"]).recon
        expected = torch.autograd.grad((through_latents * at_site).sum(), embeddings)[0]
    at_embeddings, at_latents = gradients(lm, "frozen_error")
    torch.testing.assert_close(at_embeddings, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_latents, at_site @ sae.W_dec.T)


def test_positions_limit_where_gradients_are_changed(lm: LM) -> None:
    nowhere = torch.zeros(2, 5, dtype=torch.bool)
    clean_embeddings, _ = clean_gradients(lm)
    at_embeddings, at_latents = gradients(lm, "stop", nowhere)
    torch.testing.assert_close(at_embeddings, clean_embeddings)
    assert not at_latents.any()
    last = nowhere.clone()
    last[:, -1] = True
    _, at_latents = gradients(lm, "stop", last)
    assert at_latents[:, -1].any()
    assert not at_latents[:, :-1].any()


def test_hooks_are_gone_afterwards(lm: LM) -> None:
    with dictlearn.attach(lm, dictionary(lm)) as run:
        pass
    logits(lm)
    assert not run.latents


def test_what_cannot_be_attached_is_refused(lm: LM) -> None:
    sae = dictionary(lm)
    with pytest.raises(DictlearnError, match="policy must be one of transparent, frozen_error, stop, got 'none'"):
        dictlearn.attach(lm, sae, policy="none").__enter__()
    with pytest.raises(DictlearnError, match="Each write site takes one dictionary"):
        dictlearn.attach(lm, {"a": sae, "b": sae}).__enter__()
    with (
        pytest.raises(DictlearnError, match=r"mlp_out.0 before the model reaches its read resid_post.1"),
        dictlearn.attach(lm, dictionary(lm, "resid_post.1", "mlp_out.0")) as run,
    ):
        run(IDS)


def test_no_gradient_is_kept_where_none_is_wanted(lm: LM) -> None:
    with torch.no_grad(), dictlearn.attach(lm.model, dictionary(lm)) as run:
        run(IDS)
    assert not run.latents["resid_post.1"].requires_grad


def test_files_saved_are_the_ones_attached(lm: LM, tmp_path: Path) -> None:
    from dictlearn.hub import save

    sae = dictionary(lm)
    save(sae, tmp_path)
    with dictlearn.attach(lm, dictlearn.load(tmp_path)) as run:
        run(IDS)
    assert run.latents["resid_post.1"].shape == (2, 5, 24)
