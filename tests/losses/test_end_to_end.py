"""End-to-end loss against forwards patched by hooks of the test's own, and against finite differences."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import Matryoshka
from dictlearn.lm import CleanRun, activations, reached, resolve
from dictlearn.losses import end_to_end
from dictlearn.losses.end_to_end import EndToEnd, mean_kl
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, Scalar, Step
from tests.sparsifiers.unchecked import unchecked
from tests.tiny_lms import CONFIGS

D, ROWS, CTX, N_LAYERS = 16, 3, 9, 3
MODULES = {  # of layer 1: the layer, what reads mlp_in, what puts out mlp_out
    "gpt2": ("transformer.h.1", "transformer.h.1.mlp", "transformer.h.1.mlp"),
    "llama": ("model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp"),
    "gemma2": ("model.layers.1", "model.layers.1.mlp", "model.layers.1.post_feedforward_layernorm"),
    "opt": ("model.decoder.layers.1", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
}
SITES = {"resid_post.1": ("resid_post.1", "resid_post.1"), "mlp.1": ("mlp_in.1", "mlp_out.1")}


@pytest.fixture(scope="module")
def model() -> Callable[[str], PreTrainedModel]:
    """A random frozen LM whose predictions depend on every layer."""
    made: dict[str, PreTrainedModel] = {}

    def get(family: str) -> PreTrainedModel:
        if family not in made:
            torch.manual_seed(1)
            lm = AutoModelForCausalLM.from_config(CONFIGS[family](53, N_LAYERS, D), dtype=torch.float32)
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            made[family] = lm.eval().requires_grad_(False)
        return made[family]

    return get


TOKENS = torch.randint(2, 53, (ROWS, CTX), generator=torch.Generator().manual_seed(3))
MASK = torch.ones(ROWS, CTX, dtype=torch.bool)
MASK[:, 0] = MASK[1, 4:6] = False  # BOS, and special tokens in the middle of a row


def clean_run(lm: PreTrainedModel, names: set[str], tokens: Tensor = TOKENS, mask: Tensor = MASK) -> CleanRun:
    counted = mask.flatten().nonzero().squeeze(-1)
    acts = activations(lm, [resolve(lm, name) for name in sorted(names)], tokens)
    return CleanRun(lm, tokens, counted, {name: act.flatten(0, 1)[counted].clone() for name, act in acts.items()})


def dictionary_of(name: str, sparsifier: Any = None, scale: float = 0.7, **options: Any) -> Linear:
    """Random weights, scales and biases."""
    reads, writes = SITES[name]
    made = Linear(D, D, 40, sparsifier or ReLU(0.1), reads=[reads], writes=[writes], **options)
    made.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, D), torch.zeros(1, D))
    torch.manual_seed(5)
    with torch.no_grad():
        made.read_scale.fill_(scale)
        made.write_scale.fill_(1.3)
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def step_of(dictionary: Linear, clean: CleanRun) -> Step:
    x, target = dictionary.select_reads(clean.acts), dictionary.select_writes(clean.acts)
    return replace(dictionary.step(x, target, torch.ones(1, dtype=x.dtype)), clean=clean)


def bound(lm: PreTrainedModel, dictionary: Dictionary, variance: float = 2.0, **settings: Any) -> EndToEnd:
    """Later sites have the variances `variance`, `variance` + 1 ... in their order."""
    term, writes = EndToEnd(**settings), [resolve(lm, name) for name in dictionary.writes]
    later = reached(lm, writes, term.sites(lm))
    term.bind(writes, {site: variance + i for i, site in enumerate(later)})
    return term


@contextmanager
def hooked(
    lm: nn.Module, path: str, recon: Tensor | None = None, mask: Tensor = MASK
) -> Iterator[dict[str, Tensor]]:
    """The input and the output of a module; `recon` takes the output's place where the mask says so."""
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, given: tuple[Tensor, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if recon is not None:
            flat = first.reshape(-1, first.shape[-1]).clone()
            flat[mask.flatten()] = recon.to(flat.dtype)
            first = flat.view(first.shape)
        if given:
            seen["in"] = given[0].reshape(ROWS, CTX, -1)
        seen["out"] = first.reshape(ROWS, CTX, -1)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = lm.get_submodule(path).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def log_softmax(lm: PreTrainedModel) -> Tensor:
    return lm(TOKENS).logits[MASK].double().log_softmax(-1)


def by_hand(lm: PreTrainedModel, dictionary: Linear, family: str, name: str) -> tuple[float, list[float]]:
    """KL(clean || patched), and the squared error of resid_post after each layer."""
    layer, reader, writer = MODULES[family]
    read, written = (layer, layer) if name == "resid_post.1" else (reader, writer)
    layers = [re.sub(r"\.1$", f".{i}", layer) for i in range(N_LAYERS)]
    with hooked(lm, read) as seen:
        clean = log_softmax(lm)
    x = seen["out" if name == "resid_post.1" else "in"][MASK]
    recon = dictionary(x).recon
    errors, patched = [], clean
    for path in layers:
        with hooked(lm, path) as before:
            log_softmax(lm)
        with hooked(lm, written, recon), hooked(lm, path) as after:
            patched = log_softmax(lm)
        errors.append(float((after["out"] - before["out"])[MASK].double().square().sum(-1).mean()))
    return float((clean.exp() * (clean - patched)).sum(-1).mean()), errors


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_it_is_the_divergence_and_the_later_errors_of_a_patched_forward(
    model: Callable[[str], PreTrainedModel], family: str, name: str
) -> None:
    lm, dictionary = model(family), dictionary_of(name)
    kl, errors = by_hand(lm, dictionary, family, name)
    assert kl > 0.05
    step = step_of(dictionary, clean_run(lm, {*SITES[name], *(f"resid_post.{i}" for i in range(N_LAYERS))}))
    assert float(bound(lm, dictionary, kl=0.4)(step)) == pytest.approx(0.4 * kl, rel=1e-4)
    later = errors[2:] if name == "resid_post.1" else errors[1:]
    expected = 0.4 * kl + 1.5 * sum(error / (2 + i) for i, error in enumerate(later)) / len(later)
    term = bound(lm, dictionary, kl=0.4, downstream=1.5)
    assert [site.name for site in term.later] == [f"resid_post.{i}" for i in range(3 - len(later), 3)]
    assert float(term(step)) == pytest.approx(expected, rel=1e-4)
    given = bound(lm, dictionary, kl=0.4, downstream=1.5, sites=["resid_post.2"])
    assert float(given(step)) == pytest.approx(0.4 * kl + 1.5 * errors[2] / 2, rel=1e-4)


@pytest.mark.parametrize("kind", [Crosscoder, CrossLayer])
@torch.no_grad()
def test_all_write_sites_are_replaced_at_once(
    model: Callable[[str], PreTrainedModel], kind: type[Crosscoder] | type[CrossLayer]
) -> None:
    """By what the dictionary makes of the clean reads."""
    lm = model("gpt2")
    reads, writes = [["mlp_in.0", "mlp_in.1"], ["mlp_out.0", "mlp_out.1"]]
    dictionary = kind(D, D, 40, ReLU(0.1), reads=reads, writes=writes)
    for parameter in dictionary.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    mlps = [f"transformer.h.{i}.mlp" for i in (0, 1)]
    with hooked(lm, mlps[0]) as first, hooked(lm, mlps[1]) as second:
        clean = log_softmax(lm)
    recon = dictionary(torch.stack([first["in"][MASK], second["in"][MASK]], dim=-2)).recon
    with hooked(lm, mlps[0], recon[:, 0]), hooked(lm, mlps[1], recon[:, 1]):
        patched = log_softmax(lm)
    kl = float((clean.exp() * (clean - patched)).sum(-1).mean())
    run = clean_run(lm, {*reads, *writes})
    x, target = dictionary.select_reads(run.acts), dictionary.select_writes(run.acts)
    step = replace(dictionary.step(x, target, torch.ones(2)), clean=run)
    assert float(bound(lm, dictionary)(step)) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_exact_reconstruction_has_no_divergence_and_no_error(
    model: Callable[[str], PreTrainedModel], family: str
) -> None:
    lm, names = model(family), {"resid_post.1", "resid_post.2"}
    identity = Linear(D, D, 2 * D, ReLU(0.0), reads=["resid_post.1"], writes=["resid_post.1"])
    eye = torch.eye(D)
    with torch.no_grad():
        identity.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        identity.W_dec.copy_(torch.cat([eye, -eye]))
    loss = bound(lm, identity, downstream=1.0)(step_of(identity, clean_run(lm, names)))
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in identity.parameters())


@pytest.mark.parametrize(("family", "by", "rel"), [("gpt2", 1e-6, 1e-5), ("gemma2", 1e-4, 1e-2)])
@pytest.mark.parametrize("name", SITES)
def test_the_gradient_is_that_of_finite_differences(
    model: Callable[[str], PreTrainedModel], family: str, by: float, rel: float, name: str
) -> None:
    """In float64; the norms of Gemma round to float32."""
    lm = copy.deepcopy(model(family)).double()
    dictionary = dictionary_of(name, skip=name == "mlp.1").double()
    clean = clean_run(lm, {*SITES[name], "resid_post.2"})
    term = bound(lm, dictionary, downstream=0.3, sites=["resid_post.2"])

    def loss() -> Scalar:
        return term(step_of(dictionary, clean))

    gradients = torch.autograd.grad(loss(), list(dictionary.parameters()))
    for (parameter_name, parameter), gradient in zip(dictionary.named_parameters(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(sign * by * direction)
                values.append(float(loss()))
                parameter.sub_(sign * by * direction)
        found = float((gradient * direction).sum())
        assert abs(found) > 1e-3, parameter_name
        assert found == pytest.approx((values[0] - values[1]) / (2 * by), rel=rel), parameter_name


@pytest.mark.parametrize("name", SITES)
def test_it_reaches_the_whole_dictionary_and_nothing_of_the_lm(
    model: Callable[[str], PreTrainedModel], name: str
) -> None:
    lm, dictionary = model("llama"), dictionary_of(name, TopK(5), skip=name == "mlp.1")
    term = bound(lm, dictionary)
    term(step_of(dictionary, clean_run(lm, set(SITES[name])))).backward()
    assert all(p.grad is not None and p.grad.any() for p in dictionary.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in lm.parameters())
    with pytest.raises(AssertionError, match="the LM is frozen"):
        clean_run(copy.deepcopy(lm).requires_grad_(), {"resid_post.1"})


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_positions_keep_their_activations(model: Callable[[str], PreTrainedModel], family: str) -> None:
    lm = model(family)
    clean, written = clean_run(lm, {"mlp_out.1"}), MODULES[family][2]
    value = torch.randn(int(MASK.sum()), D)
    with hooked(lm, written) as before:
        lm(TOKENS)
    with hooked(lm, MODULES[family][0]) as layer:
        lm(TOKENS)
    site = resolve(lm, "mlp_out.1")
    patched = clean.patched({site: value}, [site, resolve(lm, "resid_post.1")]).acts
    assert torch.equal(patched["mlp_out.1"], value)
    added = layer["out"][MASK] - before["out"][MASK] + value  # the stream at the counted positions
    torch.testing.assert_close(patched["resid_post.1"], added, rtol=1e-4, atol=1e-5)
    with hooked(lm, MODULES[family][0]) as after:
        clean.patched({site: value})
    assert torch.equal(after["out"][~MASK], layer["out"][~MASK])  # nothing moves between positions in an MLP


def test_what_is_not_counted_has_no_part_in_the_mean(model: Callable[[str], PreTrainedModel]) -> None:
    """A further row without counted tokens changes nothing."""
    lm, dictionary = model("gpt2"), dictionary_of("resid_post.1")
    term = bound(lm, dictionary)
    tokens, mask = torch.cat([TOKENS, TOKENS[:1].flip(1)]), torch.cat([MASK, torch.zeros(1, CTX, dtype=torch.bool)])
    one, two = clean_run(lm, {"resid_post.1"}), clean_run(lm, {"resid_post.1"}, tokens, mask)
    torch.testing.assert_close(term(step_of(dictionary, one)), term(step_of(dictionary, two)), rtol=1e-5, atol=1e-7)


def test_dictionaries_of_one_batch_share_the_clean_logits(model: Callable[[str], PreTrainedModel]) -> None:
    lm = model("gpt2")
    clean = clean_run(lm, {"resid_post.1", "mlp_in.1", "mlp_out.1"})
    seen: list[int] = []
    handle = lm.register_forward_hook(lambda *_: seen.append(1))
    for name in SITES:
        dictionary = dictionary_of(name)
        bound(lm, dictionary)(step_of(dictionary, clean)).backward()
    handle.remove()
    assert len(seen) == 3  # one clean, one patched for each
    assert not clean.logits.requires_grad


@pytest.mark.parametrize("n_tokens", [1, 5, 24])
def test_the_divergence_in_parts_is_the_whole(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, patched = torch.randn(24, 11), torch.randn(24, 11, requires_grad=True)
    p, q = clean.softmax(-1), patched.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    monkeypatch.setattr(end_to_end, "MOST_LOGITS", 11 * n_tokens + 3)
    found = mean_kl(clean, patched)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, patched)
    torch.testing.assert_close(gradient, (q - p).detach() / 24)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_lm_stays_as_it_is(model: Callable[[str], PreTrainedModel], autocast: bool) -> None:
    """Its logits are compared in float32, and autocast does not reach it."""
    lm, dictionary = copy.deepcopy(model("gpt2")).bfloat16(), dictionary_of("resid_post.1")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step = step_of(dictionary, clean_run(lm, {"resid_post.1"}))
        loss = bound(lm, dictionary)(step)
    assert step.clean is not None
    assert step.clean.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    clean = lm(TOKENS).logits[MASK].float().log_softmax(-1)
    with hooked(lm, MODULES["gpt2"][0], dictionary.denormalise(step.recon)):
        patched = lm(TOKENS).logits[MASK].float().log_softmax(-1)
    expected = (clean.exp() * (clean - patched)).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dictionary.parameters())


def test_autocast_does_not_round_a_float32_lm(model: Callable[[str], PreTrainedModel]) -> None:
    lm = model("gpt2")
    clean = clean_run(lm, {"resid_post.1"})
    with torch.autocast("cpu", torch.bfloat16):
        patched = clean.patched({resolve(lm, "resid_post.1"): clean.acts["resid_post.1"]}).logits
    assert torch.equal(patched, lm(TOKENS).logits[MASK])


def test_layer_normed_reconstructions_are_put_back_with_their_own_mean_and_spread(
    model: Callable[[str], PreTrainedModel],
) -> None:
    lm = model("gpt2")
    dictionary = dictionary_of("resid_post.1", input_norm="layer_norm", scale=1.0)
    dictionary.write_scale.fill_(1.0)
    with torch.no_grad():
        kl, _ = by_hand(lm, dictionary, "gpt2", "resid_post.1")
    step = step_of(dictionary, clean_run(lm, {"resid_post.1"}))
    assert float(bound(lm, dictionary)(step).detach()) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(
    ("site", "sites", "message"),
    [
        ("resid_post.1", ["resid_post.2", "mlp_in.1"], "writes, resid_post.1; mlp_in.1 does not depend on it"),
        ("resid_post.1", ["resid_post.1"], "resid_post.1 does not depend"),
        ("mlp_out.1", ["mlp_in.1", "resid_post.1"], "mlp_in.1 does not depend"),
        ("resid_post.2", None, "No resid_post comes after resid_post.2: use end_to_end.downstream=0."),
    ],
)
def test_sites_that_do_not_come_later_are_refused(
    model: Callable[[str], PreTrainedModel], site: str, sites: list[str] | None, message: str
) -> None:
    dictionary = Linear(D, D, 40, TopK(4), reads=[site], writes=[site])
    with pytest.raises(DictlearnError, match=message):
        bound(model("gpt2"), dictionary, downstream=1.0, sites=sites)


def test_what_is_reached() -> None:
    lm = AutoModelForCausalLM.from_config(CONFIGS["gpt2"](53, N_LAYERS, D)).eval().requires_grad_(False)
    names = ["embed", "resid_pre.1", "attn_in.1", "attn_out.1", "resid_mid.1", "mlp_hidden.1", "resid_post.2"]
    sites = [resolve(lm, name) for name in names]
    for first, name in enumerate(names):
        later = [site.name for site in reached(lm, [resolve(lm, name)], sites)]
        assert later == names[first + 1 :], name


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"kl": 0.0}, "end_to_end.kl must be a positive number, got 0.0."),
        ({"downstream": -1.0}, "end_to_end.downstream must be a finite number, at least 0, got -1.0."),
        ({"recon": "1"}, "end_to_end.recon must be a finite number, at least 0, got '1'."),
        ({"downstream": 1.0, "sites": "x"}, "end_to_end.sites must be null or a list of site names, got 'x'."),
        ({"downstream": 1.0, "sites": []}, "end_to_end.sites must be null or a list of site names, got []."),
        ({"sites": ["x"]}, "end_to_end.sites has no effect without end_to_end.downstream above 0."),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        unchecked(EndToEnd, **settings)


def test_a_nested_dictionary_keeps_its_reconstruction_loss() -> None:
    with pytest.raises(DictlearnError, match="recon must be above 0 for a Matryoshka, whose"):
        EndToEnd().check(Matryoshka.tiny())
    EndToEnd(recon=0.1).check(Matryoshka.tiny())
    EndToEnd().check(Linear.tiny())


def test_without_whole_rows_it_says_so(model: Callable[[str], PreTrainedModel]) -> None:
    lm, dictionary = model("gpt2"), dictionary_of("resid_post.1")
    step = replace(step_of(dictionary, clean_run(lm, {"resid_post.1"})), clean=None)
    with pytest.raises(DictlearnError, match="it needs stream=sequences"):
        bound(lm, dictionary)(step)
