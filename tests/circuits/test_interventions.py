"""Interventions on latents, against models with plain hooks of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dictlearn
from dictlearn import Ablate, Scale, Set, Steer, attach, intervene
from dictlearn.circuits.intervention_run import ERRORS, FREEZES
from dictlearn.circuits.interventions import check_amount
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import capture, resolve
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.circuits.by_hand import constant_denominators, eager, fixed_patterns, hooks, seen
from tests.circuits.setup import FAMILIES, cross_layer, filled, some_dictionaries, tiny_model

Model = Callable[[str], PreTrainedModel]
CTX = 7
IDS = torch.randint(2, 97, (2, CTX), generator=torch.Generator().manual_seed(0))
ROUNDING = 2e-6  # norms and softmax of transformers are float32 inside, whatever they are given
SETTINGS = [(error, freeze) for error in ERRORS for freeze in FREEZES]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def both(model: PreTrainedModel) -> dict[str, Dictionary]:
    """Autoencoders of the stream and of z, and a cross-layer transcoder."""
    found = some_dictionaries(model)
    return {"stream": found["stream"], "z": found["z"]} | cross_layer(model)


def logits(model: PreTrainedModel, fns: dict | None = None, ids: Tensor = IDS) -> Tensor:
    with hooks(model, fns or {}):
        return model(ids).logits


def close(found: Tensor, expected: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -- nothing changes where nothing is done --


def test_one_latent_by_any_whole_number() -> None:
    several: Any
    for one in (161, np.int64(161), np.uint8(161), np.array(161), torch.tensor(161)):
        assert Ablate(one).indices == [161]
    for several in ([161, 3], np.array([161, 3]), torch.tensor([161, 3]), [np.int64(161), torch.tensor(3)]):
        assert Ablate(several).indices == [161, 3]
    assert Ablate(np.array([161])).indices == [161]
    wrong: Any
    for wrong in (np.int64(-1), np.array([True, False]), torch.tensor(True)):
        with pytest.raises(DictlearnError, match="latents must be whole numbers, counted from 0"):
            Ablate(wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("error", "freeze"), SETTINGS)
def test_without_a_change_logits_are_bit_identical(model: Model, family: str, error: str, freeze: str) -> None:
    lm = model(family)
    dictionaries = both(lm)
    with attach(lm, dictionaries) as plain:
        plain(IDS)
    own = plain.latents["z"]
    if freeze != "none":
        with intervene(lm, dictionaries, {}, error, freeze) as plain:
            plain(IDS)
        torch.testing.assert_close(plain.latents["z"], own, atol=1e-5, rtol=0)
        own = plain.latents["z"]
    idle = {
        "stream": [Steer([3, 5], 0.0), Scale(range(24), 1.0)],
        "z": Set([0, 7, 9], own[..., [0, 7, 9]]),
        "clt": [Scale([0, 12, 29], 1), Ablate([1], positions=[])],
    }
    with intervene(lm, dictionaries, idle, error, freeze) as run:
        found = run(IDS).logits
    expected = logits(lm)
    if freeze == "none":
        assert torch.equal(found, expected)
    else:  # as exactly, where the model is computed in this way; its own float32 softmax and norms are gone
        assert torch.equal(found, run.clean.logits)
        close(found, expected, 1e-5)
    assert (run.clean is None) == (error == "recomputed" and freeze == "none")
    assert run.latents.keys() == dictionaries.keys()
    assert torch.equal(run.latents["z"], own)
    assert torch.equal(lm(IDS).logits, expected)  # all hooks are gone


# -- each kind, by its formula --


@pytest.mark.parametrize(
    ("one", "rule"),
    [
        (Set([2, 4], 1.5), lambda a: torch.full_like(a, 1.5)),
        (Set([2, 4], torch.tensor([1.0, -2.0])), lambda a: torch.tensor([1.0, -2.0]).to(a).expand_as(a)),
        (Scale([2, 4], -3), lambda a: -3 * a),
        (Ablate([2, 4]), lambda a: 0 * a),
        (Steer([2, 4], 0.7), lambda a: a + 0.7),
        (Steer(torch.tensor([2, 4]), 0.7, positions=[1, 6]), lambda a: a + 0.7 * at(1, 6)),
        (Steer([2, 4], 0.7, positions=torch.tensor([1, 6])), lambda a: a + 0.7 * at(1, 6)),
        (Steer([2, 4], 0.7, positions=slice(2, 5)), lambda a: a + 0.7 * at(2, 3, 4)),
        (Ablate([2, 4], positions=torch.arange(CTX).expand(2, CTX) == torch.tensor([[1], [2]])), None),
    ],
    ids=["set", "set each", "scale", "ablate", "steer", "indices", "tensor", "slice", "mask"],
)
def test_each_kind_by_its_formula(model: Model, one, rule) -> None:
    lm = model("llama")
    sae = filled(Linear(16, 16, 24, ReLU(0.0), ["resid_post.1"], ["resid_post.1"]))

    def by_hand(act: Tensor) -> Tensor:
        latents = sae.encode(act)
        new = latents.clone()
        if rule is not None:
            new[..., [2, 4]] = rule(latents[..., [2, 4]])
        else:
            new[0, 1, [2, 4]] = new[1, 2, [2, 4]] = 0
        changed.append(new)
        return act + (new - latents) @ sae.W_dec

    changed: list[Tensor] = []
    expected = logits(lm, {"resid_post.1": by_hand})
    assert (expected - logits(lm)).abs().max() > 1e-2
    for dictionaries, given in ((sae, one), (sae, [one]), ({"sae": sae}, {"sae": one})):
        with intervene(lm, dictionaries, given) as run:
            close(run(IDS).logits, expected)
            (latents,) = run.latents.values()
            close(latents, changed[0])


def at(*positions: int) -> Tensor:
    found = torch.zeros(CTX, 1, dtype=torch.float64)
    found[list(positions)] = 1
    return found


def test_interventions_on_a_dictionary_act_in_turn(model: Model) -> None:
    lm = model("gpt2")
    sae = some_dictionaries(lm)["stream"]
    with intervene(lm, sae, [Set([1, 2], 2.0), Scale(2, 3.0), Steer([2, 0], 1.0, positions=[4])]) as run:
        run(IDS)
    (found,) = run.latents.values()
    assert (found[:, :, 1] == 2).all()
    assert (found[:, :, 2] == torch.tensor([6.0, 6, 6, 6, 7, 6, 6])).all()
    close(found[:, 4, 0], sae.encode(seen(lm, IDS, ["resid_post.0"])["resid_post.0"])[:, 4, 0] + 1)


# -- both errors, at all kinds of sites --


def recomputed_by_hand(lm: PreTrainedModel, dictionaries: dict[str, Dictionary]) -> dict:
    """Written out: each activation, and the changes of its latents times their decoder rows."""
    stream, z, transcoder = (dictionaries[name] for name in ("stream", "z", "transcoder"))

    def at_stream(act: Tensor) -> Tensor:
        return act + 2 * stream.W_dec[3] - stream.encode(act)[..., [5]] * stream.W_dec[5]

    def at_z(act: Tensor) -> Tensor:  # its latents are of normalised tokens, and written back times the deviation
        return act + act.std(-1, keepdim=True) * (z.encode(act)[..., [8]] * z.W_dec[8])

    def at_mlp(act: Tensor) -> Tensor:
        return act + (1.5 - transcoder.encode(read[0])[..., [6]]) * transcoder.W_dec[6]

    read: list[Tensor] = []
    fns = {"resid_post.0": at_stream, "mlp_in.1": lambda act: read.__setitem__(slice(None), [act])}
    return fns | {"mlp_out.1": at_mlp, "attn_z.2": at_z}


ON_SEVERAL = {"stream": [Steer(3, 2.0), Ablate(5)], "z": Scale(8, 2.0), "transcoder": Set([6], 1.5)}


def several(lm: PreTrainedModel) -> dict[str, Dictionary]:
    return {name: d for name, d in some_dictionaries(lm).items() if name in ON_SEVERAL}


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_the_running_model(model: Model, family: str) -> None:
    lm = model(family)
    expected = logits(lm, recomputed_by_hand(lm, several(lm)))
    with intervene(lm, several(lm), ON_SEVERAL) as run:
        close(run(IDS).logits, expected, ROUNDING)
        assert torch.equal(run(IDS).logits, lm(IDS).logits)  # the model itself can be called


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_the_clean_run(model: Model, family: str) -> None:
    """Against hooks that put in reconstruction and clean error, also for a dictionary without interventions."""
    lm = model(family)
    dictionaries = several(lm) | {"attention": some_dictionaries(lm)["attention"]}
    clean = seen(lm, IDS, ["resid_post.0", "mlp_in.1", "mlp_out.1", "attn_z.2", "attn_out.1"])
    rules = {3: lambda a: a + 2.0, 5: lambda a: 0 * a}, {6: lambda a: 0 * a + 1.5}, {8: lambda a: 2 * a}, {}

    def put_in(d: Dictionary, site: str, rules: dict, read: str | None = None):
        x = clean[read or site]
        error = clean[site] - d.decode(d.encode(x), x)

        def fn(act: Tensor) -> Tensor:
            x = act if read is None else reads[-1]
            latents = d.encode(x)
            for latent, rule in rules.items():
                latents[..., latent] = rule(latents[..., latent])
            return d.decode(latents, x) + error

        return fn

    reads: list[Tensor] = []
    fns = {
        "resid_post.0": put_in(dictionaries["stream"], "resid_post.0", rules[0]),
        "attn_out.1": put_in(dictionaries["attention"], "attn_out.1", rules[3]),
        "mlp_in.1": reads.append,
        "mlp_out.1": put_in(dictionaries["transcoder"], "mlp_out.1", rules[1], "mlp_in.1"),
        "attn_z.2": put_in(dictionaries["z"], "attn_z.2", rules[2]),
    }
    expected, bare = logits(lm, fns), logits(lm)
    with intervene(lm, dictionaries, ON_SEVERAL, error="frozen") as run:
        close(run(IDS).logits, expected, ROUNDING)
        assert torch.equal(run.clean.logits, bare)
    assert (expected - logits(lm, recomputed_by_hand(lm, dictionaries))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", ERRORS)
def test_a_cross_layer_latent_writes_at_all_its_sites(model: Model, family: str, error: str) -> None:
    """Two latents of layer 0 and one of layer 2, by hand, layer by layer."""
    lm = model(family)
    (clt,) = cross_layer(lm).values()
    sites = [f"{kind}.{layer}" for kind in ("mlp_in", "mlp_out") for layer in range(3)]
    clean = seen(lm, IDS, sites)
    clean_x = torch.stack([clean[site] for site in sites[:3]], dim=-2)
    clean_latents = clt.encode(clean_x)
    reads: list[Tensor] = []

    def written(act: Tensor) -> Tensor:
        layer = len(reads) - 1
        x = torch.stack(
            reads + [clean_x[..., i, :] for i in range(layer + 1, 3)], dim=-2
        )  # later ones do not count
        latents = clt.encode(x)
        new = latents.clone()
        new[..., [2, 4]] *= 3
        new[:, 5, 25] += 2.0
        before = latents if error == "recomputed" else clean_latents
        change = torch.einsum("rcn,nd->rcd", (new - before)[..., : 10 * (layer + 1)], rows(layer))
        return (act if error == "recomputed" else clean[f"mlp_out.{layer}"]) + change

    def rows(layer: int) -> Tensor:
        return clt.W_dec[: 10 * (layer + 1), layer]

    fns = {f"mlp_in.{layer}": reads.append for layer in range(3)}
    expected = logits(lm, fns | {f"mlp_out.{layer}": written for layer in range(3)})
    with intervene(lm, clt, [Scale([4, 2], 3.0), Steer(25, 2.0, positions=[5])], error=error) as run:
        close(run(IDS).logits, expected, ROUNDING)
        close(run(IDS[:1]).logits, expected[:1], ROUNDING)
        (latents,) = run.latents.values()
    stacked = torch.stack(reads, dim=-2)[:1]
    expected_latents = clt.encode(stacked)
    expected_latents[..., [2, 4]] *= 3
    expected_latents[:, 5, 25] += 2.0
    close(latents, expected_latents)


@pytest.mark.parametrize("error", ERRORS)
def test_a_dictionary_with_scales(model: Model, error: str) -> None:
    """As in training: what is written is in raw units."""
    lm = model("gpt2")
    stream, (clt,) = some_dictionaries(lm)["stream"], cross_layer(lm).values()
    for d, factor in ((stream, 1.0), (clt, torch.tensor([1.0, 2.0, 4.0]))):
        d.read_scale.mul_(0.5 * factor)
        d.write_scale.mul_(0.25 * factor)

    def steered(act: Tensor) -> Tensor:
        return act + 2 * stream.W_dec[3] / 0.25

    expected = logits(lm, {"resid_post.0": steered})
    with intervene(lm, stream, Steer(3, 2.0), error) as run:
        close(run(IDS).logits, expected)
    layers = {f"mlp_out.{i}": lambda act, i=i: act + 2 * clt.W_dec[3, i] / (0.25 * 2**i) for i in range(3)}
    expected = logits(lm, layers)
    with intervene(lm, clt, Steer(3, 2.0)) as run:
        close(run(IDS).logits, expected)


# -- what is held --


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", ERRORS)
def test_frozen_attention_mixes_values_by_the_clean_patterns(model: Model, family: str, error: str) -> None:
    lm = model(family)
    stream = some_dictionaries(lm)["stream"]

    def steered(act: Tensor) -> Tensor:
        return act + 2 * stream.W_dec[3]

    free = logits(lm, {"resid_post.0": steered})
    expected = logits(lm, fixed_patterns(lm, IDS) | {"resid_post.0": steered})
    assert (expected - free).abs().max() > 1e-2
    with intervene(lm, stream, Steer(3, 2.0), error, "attention") as run:
        close(run(IDS).logits, expected, 2e-5)
    with intervene(lm, stream, Steer(3, 2.0), error) as run:
        close(run(IDS).logits, free, ROUNDING)


def uncapped(lm: PreTrainedModel, found: Tensor) -> Tensor:
    cap = getattr(lm.config, "final_logit_softcapping", None)
    return found if cap is None else cap * torch.atanh(found / cap)


def direct_effect(
    lm: PreTrainedModel,
    site: str,
    change: Tensor,
    skip: Callable[[Tensor], Tensor] | None = None,
    read_at: str = "mlp_in.1",
) -> Tensor:
    """Of adding `change` [rows, ctx, d] at a site: the derivative along it of all logits, with patterns,
    denominators and MLPs constant; of MLP 1 a skip path responds to what is read at `read_at`.
    """
    read: list[Tensor] = []
    fns = fixed_patterns(lm, IDS)
    for layer in range(3):
        fns[f"mlp.{layer}"] = Tensor.detach
    if skip is not None:

        def with_skip(act: Tensor, skip: Callable[[Tensor], Tensor] = skip) -> Tensor:
            linear = skip(read[-1])
            return act.detach() + linear - linear.detach()

        fns[read_at] = read.append
        fns["mlp.1"] = Tensor.detach
        fns["mlp_out.1"] = with_skip

    before = fns.get(site)

    def logits_at(strength: Tensor) -> Tensor:
        def add(act: Tensor) -> Tensor:
            held = None if before is None else before(act)
            return (act if held is None else held) + strength * change

        with hooks(lm, fns | {site: add}):
            return uncapped(lm, lm(IDS).logits)

    with torch.enable_grad(), eager(lm), constant_denominators(lm):
        return torch.func.jacfwd(logits_at)(torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["stream", "attention", "transcoder", "z"])
def test_direct_effects_are_gradients_with_all_else_constant(model: Model, family: str, name: str) -> None:
    """Doubling a latent moves every logit by its value times the gradient along its decoder row, exactly."""
    lm = model(family)
    d = some_dictionaries(lm)[name]
    read, write = d.reads[0], d.writes[0]
    x = seen(lm, IDS, [read])[read]
    latents = d.encode(x)
    latent = int(latents.sum((0, 1)).argmax())
    change = latents[..., [latent]] * d.W_dec[latent] * (x.std(-1, keepdim=True) if name == "z" else 1)
    expected = direct_effect(lm, write, change)
    assert expected.abs().max() > 1e-2
    for error in ERRORS:
        with intervene(lm, d, Scale(latent, 2), error, "direct") as run:
            doubled = uncapped(lm, run(IDS).logits) - uncapped(lm, run.clean.logits)
        close(doubled, expected, 1e-4)
        with intervene(lm, d, Scale(latent, 4), error, "direct") as run:
            close(uncapped(lm, run(IDS).logits) - uncapped(lm, run.clean.logits), 3 * doubled)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_clean_errors_direct_effects_go_through_skip_paths(model: Model, family: str) -> None:
    lm = model(family)
    found = some_dictionaries(lm)
    dictionaries = {name: found[name] for name in ("stream", "transcoder")}
    change = 2 * found["stream"].W_dec[3].expand(2, CTX, -1)
    W_skip = found["transcoder"].W_skip
    assert W_skip is not None
    expected = {"frozen": lambda x: x @ W_skip.T, "recomputed": None}
    for error, skip in expected.items():
        with intervene(lm, dictionaries, {"stream": Steer(3, 2.0)}, error, "direct") as run:
            effect = uncapped(lm, run(IDS).logits) - uncapped(lm, run.clean.logits)
        close(effect, direct_effect(lm, "resid_post.0", change, skip), 1e-4)


def test_an_input_norm_keeps_its_denominator_in_direct_effects(model: Model) -> None:
    """Through the skip path of a transcoder of normalised tokens: the mean that is taken off follows the token."""
    lm = model("gpt2")
    made = Linear(16, 16, 24, TopK(4), ["resid_mid.1"], ["mlp_out.1"], skip=True, input_norm="lm_layer_norm")
    transcoder, stream = filled(made), some_dictionaries(lm)["stream"]
    W_skip = transcoder.W_skip
    assert W_skip is not None

    def skip(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() @ W_skip.T

    change = 2 * stream.W_dec[3].expand(2, CTX, -1)
    with intervene(lm, {"a": stream, "b": transcoder}, {"a": Steer(3, 2.0)}, "frozen", "direct") as run:
        effect = run(IDS).logits - run.clean.logits
    close(effect, direct_effect(lm, "resid_post.0", change, skip, "resid_mid.1"))
    assert (effect - direct_effect(lm, "resid_post.0", change)).abs().max() > 1e-2


def skip_effect(lm: PreTrainedModel, *dictionaries: Dictionary) -> Tensor:
    """Direct effect of steering the stream, where skip paths respond."""
    named = {"stream": some_dictionaries(lm)["stream"]} | {f"d{n}": one for n, one in enumerate(dictionaries)}
    with intervene(lm, named, {"stream": Steer(3, 2.0)}, "frozen", "direct") as run:
        return run(IDS).logits - run.clean.logits


def test_skip_paths_of_layers_are_those_of_transcoders(model: Model) -> None:
    lm, layers = model("gpt2"), range(3)
    reads, writes = ([f"{kind}.{layer}" for layer in layers] for kind in ("mlp_in", "mlp_out"))
    clt = filled(CrossLayer(16, 16, 30, TopK(4), reads, writes, skip=True))
    clt.read_scale.copy_(torch.tensor([1.5, 0.8, 1.2]))
    clt.write_scale.copy_(torch.tensor([0.7, 1.4, 0.9]))
    assert clt.W_skip is not None
    single = [filled(Linear(16, 16, 24, TopK(4), [reads[i]], [writes[i]], skip=True), i) for i in layers]
    for i, one in enumerate(single):
        assert one.W_skip is not None
        one.W_skip.data.copy_(clt.W_skip[i] * clt.read_scale[i] / clt.write_scale[i])
    effect = skip_effect(lm, clt)
    close(effect, skip_effect(lm, *single))
    assert (effect - skip_effect(lm, *single[:1])).abs().max() > 1e-2


def test_skip_paths_of_several_reads_add_up(model: Model) -> None:
    lm, reads, plain = model("llama"), ["mlp_in.1", "resid_mid.1"], skip_effect(model("llama"))
    both = filled(Crosscoder(16, 16, 24, TopK(4), reads, ["mlp_out.1"], skip=True))
    both.read_scale.copy_(torch.tensor([1.5, 0.8]))
    both.write_scale.fill_(0.7)
    assert both.W_skip is not None
    parts = []
    for i, read in enumerate(reads):
        one = filled(Linear(16, 16, 24, TopK(4), [read], ["mlp_out.1"], skip=True))
        assert one.W_skip is not None
        one.W_skip.data.copy_(both.W_skip[0, :, i] * both.read_scale[i] / 0.7)
        parts.append(skip_effect(lm, one) - plain)
        assert parts[i].abs().max() > 1e-2
    close(skip_effect(lm, both) - plain, parts[0] + parts[1])


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "centre"])
def test_the_skip_path_of_an_autoencoder_whose_norm_is_undone(model: Model, norm: str) -> None:
    """It writes times what was taken off the clean token, which it is divided by as well."""
    lm, site = model("gpt2"), "resid_post.1"
    auto, stream = (
        filled(Linear(16, 16, 24, TopK(4), [site], [site], skip=True, input_norm=norm)),
        some_dictionaries(lm),
    )
    sites = [resolve(lm, site)]
    both, at = {"stream": stream["stream"], "auto": auto}, {"stream": Steer(3, 2.0)}
    with (
        capture(lm, sites) as before,
        intervene(lm, both, at, "frozen", "direct") as run,
        capture(lm, sites) as after,
    ):
        run(IDS)
    clean = seen(lm, IDS, [site])[site]
    change = before[site] - clean
    change = change if norm == "constant_norm_rescale" else change - change.mean(-1, keepdim=True)
    factor = {  # over the divisor: std over std + 1e-5
        "layer_norm": clean.std(-1, keepdim=True) / (clean.std(-1, keepdim=True) + 1e-5)
    }.get(norm, torch.ones(()))
    assert auto.W_skip is not None
    assert change.abs().max() > 1e-2
    close(after[site] - clean, change @ auto.W_skip.T * factor, 1e-4)


@pytest.mark.parametrize("error", ERRORS)
def test_direct_effects_of_several_dictionaries_add_up(model: Model, error: str) -> None:
    """Also of latents in a row: each starts from its clean value."""
    lm = model("gemma2")
    dictionaries = both(lm) if error == "recomputed" else cross_layer(lm)
    wanted = {"stream": Scale(range(24), 2.0), "z": Steer(2, 1.0), "clt": Scale(range(30), 2.0, positions=[2, 5])}
    wanted = {name: one for name, one in wanted.items() if name in dictionaries}
    parts = [{name: one} for name, one in wanted.items()]
    parts = parts if error == "recomputed" else [{"clt": Scale(range(i, i + 10), 2.0)} for i in (0, 10, 20)]
    whole = wanted if error == "recomputed" else {"clt": Scale(range(30), 2.0)}

    def effect(interventions: dict) -> Tensor:
        with intervene(lm, dictionaries, interventions, error, "direct") as run:
            return uncapped(lm, run(IDS).logits) - uncapped(lm, run.clean.logits)

    close(effect(whole), torch.stack([effect(part) for part in parts]).sum(0))


def test_mlps_are_held_below_their_own_sites(model: Model) -> None:
    """Interventions inside an MLP's write, before its post norm, and on its hidden layer count as well."""
    lm = model("gemma2")
    raw = filled(Linear(16, 16, 24, ReLU(0.0), ["model.layers.1.mlp"], ["model.layers.1.mlp"]))
    hidden = filled(Linear(48, 48, 24, ReLU(0.0), ["mlp_hidden.1"], ["mlp_hidden.1"]))
    for d in (raw, hidden):
        effects = []
        for strength in (1.0, 2.0):
            with intervene(lm, d, Steer(3, strength), freeze="direct") as run:
                effects.append(uncapped(lm, run(IDS).logits) - uncapped(lm, run.clean.logits))
        assert effects[0].abs().max() > 1e-2
        close(effects[1], 2 * effects[0])


# -- generation --


def generated(lm: PreTrainedModel, ids: Tensor, n: int, **options: Any) -> Any:
    """By transformers, without chance."""
    settings = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lm.generate(ids, **settings, **options)  # type: ignore[operator]


def greedy(lm: PreTrainedModel, ids: Tensor, n: int, fns: Callable[[int], dict]) -> Tensor:
    """Token by token from the whole text, with hooks by the number of tokens."""
    for _ in range(n):
        ids = torch.cat([ids, logits(lm, fns(ids.shape[1]), ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [None, slice(5, None), [1, 6]], ids=["all", "slice", "prompt"])
def test_generation_with_and_without_cache(model: Model, family: str, positions) -> None:
    lm = model(family)
    found = some_dictionaries(lm)
    dictionaries = {name: found[name] for name in ("stream", "transcoder")}
    row, other = found["stream"].W_dec[3], found["transcoder"]

    def fns(n: int) -> dict:
        where = torch.zeros(n, 1, dtype=torch.float64)
        where[slice(None) if positions is None else positions] = 1

        def at_mlp(act: Tensor) -> Tensor:
            return act + where * other.encode(read[-1])[..., [6]] * other.W_dec[6]

        read: list[Tensor] = []
        return {
            "resid_post.0": lambda act: act + 6 * where * row,
            "mlp_in.1": read.append,
            "mlp_out.1": at_mlp,
        }

    expected = greedy(lm, IDS, 8, fns)
    given = {"stream": Steer(3, 6.0, positions=positions), "transcoder": Scale(6, 2.0, positions=positions)}
    with intervene(lm, dictionaries, given):
        for use_cache in (True, False):
            assert torch.equal(generated(lm, IDS, 8, use_cache=use_cache), expected)
    bare = generated(lm, IDS, 8)
    assert not torch.equal(bare, expected)
    assert torch.equal(bare, greedy(lm, IDS, 8, lambda _: {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_from_padded_rows(tmp_path: Path, family: str) -> None:
    """Rows of different lengths, padded on the left, give the tokens that each gives by itself; by a mask."""
    lm = tiny_model(tmp_path, family).float()  # in float64 Gemma 2 has no number at all after padding on the left
    stream = some_dictionaries(lm)["stream"].float()
    lengths = [4, CTX]
    expected = []
    for row, length in zip(IDS, lengths, strict=True):
        with intervene(lm, stream, Steer(3, 6.0, positions=[length - 1])):
            expected.append(generated(lm, row[None, -length:], 6)[0, length:])
    mask = torch.arange(CTX) >= CTX - torch.tensor(lengths)[:, None]
    ids = IDS.where(mask, 0)
    last = torch.arange(CTX).expand(2, CTX) == CTX - 1
    for use_cache in (True, False):
        with intervene(lm, stream, Steer(3, 6.0, positions=last)):
            found = generated(lm, ids, 6, attention_mask=mask.long(), use_cache=use_cache)
        assert torch.equal(found[:, CTX:], torch.stack(expected))


def test_a_mask_with_several_sequences_for_each_row(model: Model) -> None:
    """Beams, and samples, of a row have the mask of that row, as each row has by itself."""
    lm = model("llama")
    stream = some_dictionaries(lm)["stream"]
    mask = torch.zeros(2, CTX, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    for use_cache in (True, False):
        with intervene(lm, stream, Steer(3, 6.0, positions=mask)):
            together = generated(lm, IDS, 5, use_cache=use_cache, **beams)
        for row in range(2):
            with intervene(lm, stream, Steer(3, 6.0, positions=[2, 5][row : row + 1])):
                own = generated(lm, IDS[[row]], 5, use_cache=use_cache, **beams)
            close(together.sequences_scores[2 * row : 2 * row + 2], own.sequences_scores, 1e-5)
            assert torch.equal(together.sequences[2 * row : 2 * row + 2], own.sequences)
        bare = generated(lm, IDS, 5, use_cache=use_cache, **beams)
        assert (bare.sequences_scores - together.sequences_scores).abs().min() > 1e-4


def test_generation_needs_no_clean_run(model: Model) -> None:
    lm = model("gpt2")
    stream = some_dictionaries(lm)["stream"]
    for error, freeze in SETTINGS[1:]:
        with intervene(lm, stream, Steer(3, 1.0), error, freeze) as run:
            message = rf"error={error} and freeze={freeze} need the clean run of the same input: call run\(...\)"
            with pytest.raises(DictlearnError, match=message):
                generated(lm, IDS, 2)
            with pytest.raises(DictlearnError, match="runs twice: no past_key_values"):
                run(IDS, past_key_values=object())
            assert run(IDS).past_key_values is None  # nor is there one to go on from


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "mistral", "gemma3", "olmo2", "opt", "phi"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Parallel residuals, norms of queries and keys, sliding windows, norms after each block, flattened MLPs."""
    lm = tiny_model(tmp_path, family)
    made = Linear(16, 16, 24, TopK(5), ["mlp_in.1"], ["attn_out.2"], skip=True)
    dictionaries = {"stream": some_stream(), "late": filled(made)}

    def given(strength: float) -> dict:
        return {"stream": Steer(3, strength), "late": Scale(range(24), 1 + strength)}

    expected, effects = logits(lm), []
    for strength in (0.0, 1.0, 2.0):
        with intervene(lm, dictionaries, given(strength), freeze="direct") as run:
            effects.append(run(IDS).logits - run.clean.logits)
        close(run.clean.logits, expected, 1e-5)
    assert not effects[0].any()
    assert effects[1].abs().max() > 1e-2
    close(effects[2], 2 * effects[1])
    with intervene(lm, dictionaries, given(0.0)) as run:
        assert torch.equal(run(IDS).logits, expected)
    with intervene(lm, dictionaries, given(3.0)):
        steered = [generated(lm, IDS, 6, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*steered)
    assert not torch.equal(steered[0], generated(lm, IDS, 6))


def some_stream() -> Dictionary:
    return filled(Linear(16, 16, 24, TopK(5), ["resid_post.0"], ["resid_post.0"]))


# -- rows, types, gradients, other blocks --


@pytest.mark.parametrize(("error", "freeze"), SETTINGS)
def test_rows_are_apart_and_padding_does_not_matter(model: Model, error: str, freeze: str) -> None:
    lm = model("llama")
    dictionaries = both(lm)
    mask = torch.zeros(2, CTX, dtype=torch.bool)
    mask[0, 4] = mask[1, 5] = True
    given = {"stream": Steer(3, 2.0, positions=mask), "clt": Scale(range(30), 2.0, positions=mask)}
    with intervene(lm, dictionaries, given, error, freeze) as run:
        together = run(IDS).logits
    for row in range(2):
        own = {name: type(one)(one.indices, 2.0, positions=mask[[row]]) for name, one in given.items()}
        with intervene(lm, dictionaries, own, error, freeze) as run:
            close(run(IDS[[row]]).logits[0], together[row], 1e-6)
    for side in ("left", "right"):
        pad = torch.zeros(2, 3, dtype=torch.int64)
        parts, masks = [pad, IDS], [pad.bool(), mask]
        ids, where = (torch.cat(p if side == "left" else p[::-1], dim=1) for p in (parts, masks))
        attended = torch.cat([pad, torch.ones_like(IDS)] if side == "left" else [torch.ones_like(IDS), pad], dim=1)
        padded = {name: type(one)(one.indices, 2.0, positions=where) for name, one in given.items()}
        with intervene(lm, dictionaries, padded, error, freeze) as run:
            found = run(ids, attention_mask=attended, position_ids=attended.cumsum(1).sub(1).clamp_min(0)).logits
        close(found[:, 3:] if side == "left" else found[:, :CTX], together, 1e-5)


@pytest.mark.parametrize(("error", "freeze"), SETTINGS)
def test_a_bfloat16_model_with_float32_dictionaries(tmp_path: Path, error: str, freeze: str) -> None:
    lm = tiny_model(tmp_path, "gemma2").bfloat16()
    dictionaries = {name: d.float() for name, d in both(lm).items()}
    with intervene(lm, dictionaries, {"stream": Steer(3, 2.0), "z": Ablate(range(24))}, error, freeze) as run:
        assert run(IDS).logits.dtype == torch.bfloat16
    expected = logits(lm)
    with intervene(lm, dictionaries, {"stream": Steer(3, 0.0)}, error) as run:
        assert torch.equal(run(IDS).logits, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("error", "freeze"), SETTINGS)
def test_on_a_gpu_as_on_the_cpu(tmp_path: Path, error: str, freeze: str) -> None:
    lm, found = tiny_model(tmp_path, "llama"), []
    dictionaries = both(lm)
    mask = torch.arange(CTX).expand(2, CTX) > 3
    given = {"stream": [Steer(3, 2.0, positions=mask), Set([4, 5], torch.ones(2))], "clt": Scale(range(30), 2.0)}
    for device in ("cpu", "cuda"):
        lm.to(device)  # type: ignore[arg-type]
        with intervene(lm, {name: d.to(device) for name, d in dictionaries.items()}, given, error, freeze) as run:
            found.append(run(IDS.to(device)).logits.cpu())
    close(found[1], found[0], 1e-5)


def test_a_strength_can_be_learnt(model: Model) -> None:
    """Its gradient is that of the logits along the decoder row."""
    lm = model("gpt2")
    stream = some_dictionaries(lm)["stream"]
    strength = torch.zeros(2, requires_grad=True, dtype=torch.float64)
    with torch.enable_grad(), intervene(lm, stream, Steer([3, 8], strength)) as run:
        (found,) = torch.autograd.grad(run(IDS).logits[:, -1, 7].sum(), strength)
    step = 1e-5
    for place, latent in enumerate((3, 8)):
        moved = [
            logits(lm, {"resid_post.0": lambda act, sign=sign: act + sign * step * stream.W_dec[latent]})  # noqa: B023
            for sign in (1, -1)
        ]
        close((moved[0] - moved[1])[:, -1, 7].sum() / (2 * step), found[place], 1e-7)


def test_what_the_model_has_afterwards_can_be_captured(model: Model) -> None:
    lm = model("gpt2")
    found = some_dictionaries(lm)
    site = resolve(lm, "resid_post.1")
    expected = []
    hand = {"resid_post.0": lambda act: act + 2 * found["stream"].W_dec[3], "resid_post.1": expected.append}
    logits(lm, hand)
    with (
        intervene(lm, found["stream"], Steer(3, 2.0)) as run,
        capture(lm, [site]) as acts,
        attach(lm, found["transcoder"]) as attached,
    ):
        run(IDS)
    close(acts["resid_post.1"], expected[0])
    with intervene(lm, {"a": found["stream"], "b": found["transcoder"]}, {"a": Steer(3, 2.0)}) as run:
        run(IDS)
    close(run.latents["b"], attached.latents["mlp_out.1"])


def test_one_site_under_two_names(model: Model) -> None:
    """Readable and by module path: what a transcoder reads there is what the autoencoder has written."""
    lm = model("gpt2")
    stream = some_dictionaries(lm)["stream"]
    reader = filled(Linear(16, 16, 24, ReLU(0.0), ["transformer.h.0"], ["mlp_out.1"]))
    with intervene(lm, {"a": stream, "b": reader}, {"a": Steer(3, 2.0)}) as run:
        run(IDS)
    close(run.latents["b"], reader.encode(seen(lm, IDS, ["resid_post.0"])["resid_post.0"] + 2 * stream.W_dec[3]))


def test_hooks_are_gone_after_an_error(model: Model) -> None:
    lm = model("gpt2")
    expected = logits(lm)
    with pytest.raises(DictlearnError), intervene(lm, cross_layer(lm), Steer(3, 1.0), freeze="direct") as run:  # noqa: PT012
        run(IDS)
        lm(IDS)
    assert torch.equal(lm(IDS).logits, expected)


# -- what is refused --


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: Steer(24, 1.0), "stream has the latents 0 to 23, got 24"),
        (lambda: {"streem": Steer(2, 1.0)}, "No dictionary is called streem; there are stream"),
        (lambda: Steer([1, 1], 1.0), r"named once in an intervention, got \[1, 1\]"),
        (lambda: Steer([-1], 1.0), r"latents must be whole numbers, counted from 0, got \[-1\]"),
        (lambda: Steer(torch.tensor([0.5]), 1.0), "latents must be whole numbers, counted from 0, got tensor"),
        (
            lambda: Steer(torch.tensor([True, False]), 1.0),
            r"latents must be whole numbers, .* got truth values: the numbers of a mask are mask.nonzero\(\)",
        ),
        (lambda: Set([True, False], 1.0), "latents must be whole numbers, .* got truth values"),
        (lambda: Ablate(True), "latents must be whole numbers, .* got truth values"),
        (lambda: Ablate(1, positions=[True, False]), "positions must be whole numbers, .* got truth values"),
        (lambda: Set(1, True), "value must be a number or a tensor of numbers, got True"),
        (lambda: Steer(1, torch.tensor(True)), "strength must be a number or a tensor of numbers, got torch.bool"),
        (lambda: Steer(1, float("nan")), "strength must be finite, got nan"),
        (lambda: Set([1, 2], torch.tensor([1, torch.inf])), "value must be finite"),
        (lambda: Set([1, 2], torch.ones(3)), r"\[rows, ctx, latents\] = \[2, 7, 2\], got \[3\]"),
        (lambda: Ablate(1, positions=[-1]), r"positions must be whole numbers, counted from 0, got \[-1\]"),
        (
            lambda: Ablate(1, positions=slice(-2, None)),
            r"positions must be whole numbers, counted from 0, got \[-2\]",
        ),
        (
            lambda: Ablate(1, positions=slice(None, None, -1)),
            r"positions must go forward, by a step of at least 1, got slice\(None, None, -1\)",
        ),
        (lambda: Ablate(1, positions=slice(0, 4, 0)), "positions must go forward, by a step of at least 1"),
        (lambda: Ablate(1, positions=torch.ones(7, dtype=torch.bool)), r"mask must be \[rows, ctx\], got \[7\]"),
        (lambda: Ablate(1, positions=[2, 7]), "positions reach to 7, and the last one of the prompt is 6"),
        (lambda: Ablate(1, positions=torch.ones(2, 9, dtype=torch.bool)), "positions reach to 8, and the last one"),
        (
            lambda: Ablate(1, positions=torch.ones(3, 7, dtype=torch.bool)),
            "mask of 3 rows, and the model runs on 2",
        ),
    ],
)
def test_interventions_that_cannot_be_had(model: Model, given, message: str) -> None:
    lm = model("gpt2")
    dictionaries = {"stream": some_dictionaries(lm)["stream"]}
    with pytest.raises(DictlearnError, match=message), intervene(lm, dictionaries, given()) as run:
        run(IDS)


@pytest.mark.parametrize("amount", ["2", None, [1.0, 2.0], 1j, torch.tensor([1j])])
def test_amounts_are_numbers(amount: Any) -> None:
    with pytest.raises(DictlearnError, match="strength must be a number or a tensor of numbers, got "):
        check_amount("strength", amount)


def test_settings_that_cannot_be_had(model: Model) -> None:
    lm = model("gpt2")
    found = some_dictionaries(lm)
    for arguments, message in (
        ({"error": "kept"}, "error must be one of recomputed, frozen, got 'kept'"),
        ({"freeze": "all"}, "freeze must be one of none, attention, direct, got 'all'"),
    ):
        with pytest.raises(DictlearnError, match=message):
            intervene(lm, found["stream"], Ablate(1), **arguments).__enter__()
    with pytest.raises(DictlearnError, match="Of several dictionaries interventions are given by name"):
        intervene(lm, found, Ablate(1)).__enter__()
    sites = ["resid_post.0", "resid_post.1"]
    with pytest.raises(DictlearnError, match="writes 2 sites"):
        intervene(lm, filled(Crosscoder(16, 16, 8, ReLU(0.0), sites, sites)), Ablate(1)).__enter__()
    late = filled(Linear(16, 16, 8, ReLU(0.0), ["resid_post.1"], ["mlp_out.0"]))
    for error, freeze in SETTINGS:
        with (
            pytest.raises(DictlearnError, match=r"mlp_out.0 before the model reaches its read resid_post.1"),
            intervene(lm, late, Ablate(1), error, freeze) as run,
        ):
            run(IDS)


def test_the_doors() -> None:
    assert {"intervene", "Set", "Scale", "Ablate", "Steer"} <= set(dir(dictlearn))
