"""Dictionaries of several sites in a model: exact outputs, and gradients against the model's own."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import LM, capture, edit, load_lm, resolve
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.tiny_lms import tiny_lm_folder

POLICIES = ("transparent", "frozen_error", "stop")
IDS = torch.arange(10).reshape(2, 5) + 3
N_LAYERS, N_PER_LAYER = 3, 6


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), "gpt2")))


def with_weights(made: Dictionary) -> Dictionary:
    torch.manual_seed(5)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    return made.for_inference()


def cross_layer(lm: LM, skip: bool = False) -> CrossLayer:
    reads, writes = ([f"{kind}.{layer}" for layer in range(N_LAYERS)] for kind in ("mlp_in", "mlp_out"))
    made = CrossLayer(lm.d_model, lm.d_model, N_LAYERS * N_PER_LAYER, ReLU(0.1), reads, writes, skip=skip)
    return with_weights(made)  # type: ignore[return-value]


def crosscoder(lm: LM, reads: Sequence[str], writes: Sequence[str]) -> Crosscoder:
    return with_weights(Crosscoder(lm.d_model, lm.d_model, 24, ReLU(0.1), reads, writes))  # type: ignore[return-value]


def over_the_stream(lm: LM) -> Crosscoder:
    sites = [f"resid_post.{layer}" for layer in range(N_LAYERS)]
    return crosscoder(lm, sites, sites)


MADE: dict[str, Callable[[LM], Dictionary]] = {"cross_layer": cross_layer, "crosscoder": over_the_stream}


def embeddings_of(lm: LM) -> Tensor:
    return lm.model.get_input_embeddings()(IDS).detach().requires_grad_()


def metric(output: Tensor) -> Tensor:
    return output[:, -1, 7].sum()


@pytest.mark.parametrize(
    ("kind", "policy"), [(k, p) for k in MADE for p in POLICIES if (k, p) != ("crosscoder", POLICIES[1])]
)
def test_logits_are_bit_identical_and_errors_complete_the_reconstruction(lm: LM, kind: str, policy: str) -> None:
    dictionary = MADE[kind](lm)
    sae = with_weights(Linear(lm.d_model, lm.d_model, 24, ReLU(0.1), ["attn_out.1"], ["attn_out.1"]))
    sites = [resolve(lm.model, site) for site in dict.fromkeys((*dictionary.reads, *dictionary.writes))]
    with capture(lm.model, sites) as acts:
        expected = lm.model(IDS).logits
    with dictlearn.attach(lm, {"d": dictionary, "sae": sae}, policy=policy) as run:
        assert torch.equal(run(IDS).logits, expected)
    x = dictionary.select_reads(acts)
    torch.testing.assert_close(run.latents["d"], dictionary.encode(x))
    torch.testing.assert_close(run.recon["d"], dictionary(x).recon)
    torch.testing.assert_close(run.recon["d"] + run.errors["d"], dictionary.select_writes(acts))


@pytest.mark.parametrize("kind", MADE)
def test_transparent_has_the_models_gradient(lm: LM, kind: str) -> None:
    dictionary = MADE[kind](lm)
    embeddings = embeddings_of(lm)
    with capture(lm.model, [resolve(lm.model, site) for site in dictionary.writes]) as acts:
        total = metric(lm.model(inputs_embeds=embeddings).logits)
    clean, *at_sites = torch.autograd.grad(total, [embeddings, *(acts[site] for site in dictionary.writes)])
    with dictlearn.attach(lm, dictionary) as run:
        metric(run(inputs_embeds=embeddings).logits).backward()
    torch.testing.assert_close(embeddings.grad, clean)
    by_hand = sum(at_site @ dictionary.W_dec[:, place].T for place, at_site in enumerate(at_sites))
    (name,) = run.latents
    assert name == {"cross_layer": "mlp_out.0-2", "crosscoder": "resid_post.0-2"}[kind]  # as a run names it
    grad = run.latents[name].grad
    torch.testing.assert_close(grad, by_hand)


def test_stop_passes_nothing(lm: LM) -> None:
    """At each write, the model's gradient with all later writes cut off."""
    dictionary = cross_layer(lm)
    by_hand = torch.zeros(2, 5, N_LAYERS * N_PER_LAYER)
    for place, site in enumerate(dictionary.writes):
        leaf: list[Tensor] = []
        cut = {resolve(lm.model, later): Tensor.detach for later in dictionary.writes[place + 1 :]}

        def as_leaf(act: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(act.detach().requires_grad_())
            return leaf[0]

        with edit(lm.model, {resolve(lm.model, site): as_leaf} | cut):
            (at_site,) = torch.autograd.grad(metric(lm.model(IDS).logits), leaf)
        by_hand += at_site @ dictionary.W_dec[:, place].T
    with dictlearn.attach(lm, dictionary, policy="stop") as run:
        metric(run(IDS).logits).backward()
    torch.testing.assert_close(run.latents["mlp_out.0-2"].grad, by_hand)


@pytest.mark.parametrize("skip", [False, True])
def test_frozen_error_passes_through_the_latents_alone(lm: LM, skip: bool) -> None:
    """Against a forward with every MLP replaced, layer by layer, by what the transcoder makes of the reads."""
    dictionary, embeddings = cross_layer(lm, skip), embeddings_of(lm)
    codes: list[Tensor] = []

    def read(act: Tensor) -> Tensor:
        i = len(codes)
        own = slice(i * N_PER_LAYER, (i + 1) * N_PER_LAYER)
        codes.append((act @ dictionary.W_enc[:, own] + dictionary.b_enc[own]).relu())
        codes[i].retain_grad()
        reads.append(act)
        return act

    def written(act: Tensor) -> Tensor:
        i = len(codes) - 1
        recon = dictionary.b_dec[i] + sum(
            code @ dictionary.W_dec[j * N_PER_LAYER : (j + 1) * N_PER_LAYER, i] for j, code in enumerate(codes)
        )
        if dictionary.W_skip is not None:
            recon = recon + reads[i] @ dictionary.W_skip[i].T
        return recon + (act - recon).detach()

    reads: list[Tensor] = []
    edits = {resolve(lm.model, site): read for site in dictionary.reads}
    with edit(lm.model, edits | {resolve(lm.model, site): written for site in dictionary.writes}):
        metric(lm.model(inputs_embeds=embeddings).logits).backward()
    expected, embeddings.grad = embeddings.grad, None
    with dictlearn.attach(lm, dictionary, policy="frozen_error") as run:
        metric(run(inputs_embeds=embeddings).logits).backward()
    torch.testing.assert_close(embeddings.grad, expected, rtol=1e-4, atol=1e-5)
    by_layer = [code.grad for code in codes]
    assert all(grad is not None and grad.any() for grad in by_layer[:-1])
    torch.testing.assert_close(
        run.latents["mlp_out.0-2"].grad, torch.cat([g for g in by_layer if g is not None], -1), rtol=1e-4, atol=1e-5
    )


def test_frozen_error_of_a_crosscoder_needs_its_reads_before_its_writes(lm: LM) -> None:
    with (
        pytest.raises(DictlearnError, match=r"writes resid_post.0 before the model reaches its read resid_post.1"),
        dictlearn.attach(lm, over_the_stream(lm), policy="frozen_error") as run,
    ):
        run(IDS)
    later = crosscoder(lm, ["resid_post.0", "mlp_in.1"], ["resid_post.1", "resid_post.2"])
    embeddings = embeddings_of(lm)
    with dictlearn.attach(lm, later, policy="frozen_error") as run:
        metric(run(inputs_embeds=embeddings).logits).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.any()


def test_positions_limit_where_gradients_are_changed(lm: LM) -> None:
    last = torch.zeros(2, 5, dtype=torch.bool)
    last[:, -1] = True
    with dictlearn.attach(lm, cross_layer(lm), positions=last) as run:
        metric(run(IDS).logits).backward()
    grad = run.latents["mlp_out.0-2"].grad
    assert grad is not None
    assert grad[:, -1].any()
    assert not grad[:, :-1].any()


def test_a_forward_of_its_own_for_every_text(lm: LM) -> None:
    dictionary = cross_layer(lm)
    with torch.no_grad(), dictlearn.attach(lm, dictionary) as run:
        run(IDS)
        first = run.latents["mlp_out.0-2"]
        run(IDS.flip(1))
        assert run.latents["mlp_out.0-2"].shape == first.shape
        assert not torch.equal(run.latents["mlp_out.0-2"], first)
        assert not first.requires_grad
        with pytest.raises(DictlearnError, match=r"mlp_out.0-2 has several sites: call run\(...\)"):
            lm.model(IDS)
        with pytest.raises(DictlearnError, match="no past_key_values"):
            run(IDS, past_key_values=object())
    lm.model(IDS)
