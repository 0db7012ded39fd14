"""Prompts taken apart and greedy paths: sums that are exact, and paths against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from dictlearn.circuits.decomposition import (
    Decomposition,
    Source,
    behind,
    contributions,
    decompose,
    latent_reader,
    logit_reader,
    table,
)
from dictlearn.circuits.freeze import recorded
from dictlearn.circuits.paths import Branch, Paths, greedy_paths
from dictlearn.circuits.weights import linear_maps, virtual_weights
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.circuits.setup import FAMILIES, tiny_model
from tests.circuits.test_weights import FAMILIES as ALL_FAMILIES
from tests.circuits.test_weights import IDS, N_LATENTS, D, transcoder

GetModel = Callable[[str], PreTrainedModel]


def dictionaries(layers: tuple[int, ...] = (0, 1, 2), **arguments) -> dict[str, Dictionary]:
    return {f"t{layer}": transcoder(layer, layer, **arguments) for layer in layers}


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Decomposition]:
    made: dict[str, Decomposition] = {}

    def get(family: str) -> Decomposition:
        if family not in made:
            model = tiny_model(tmp_path_factory.mktemp(family), family)
            made[family] = decompose(linear_maps(model), dictionaries(skip=True), IDS)
        return made[family]

    return get


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,)])
def test_contributions_sum_up_to_what_the_model_computes(
    tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    """The target's own pre-activation on what the model's MLP reads, and the model's logits."""
    model, own = tiny_model(tmp_path, family), dictionaries(layers, skip=True)
    prompt = decompose(linear_maps(model), own, IDS)
    site = resolve(model, "mlp_in.2")
    with torch.no_grad(), recorded(model), capture(model, [site]) as acts:
        logits = model(IDS).logits[0]
    pre_acts = own["t2"](acts[site.name][0]).pre_acts
    assert pre_acts is not None
    for latent, at in product((0, 5), (0, 3, 5)):
        found = sum(contributions(prompt, latent_reader(prompt, 2, latent, at)).values())
        assert found == pytest.approx(float(pre_acts[at, latent]), abs=1e-10)
    weights = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = sum(contributions(prompt, logit_reader(prompt, weights, 4)).values())
    cap = getattr(model.config, "final_logit_softcapping", None)
    raw = logits[4] if cap is None else cap * torch.atanh(logits[4] / cap)
    assert found == pytest.approx(float(weights @ raw), abs=1e-8 if cap else 1e-10)


@pytest.mark.parametrize("read", ["resid_mid", "mlp_in"])
@pytest.mark.parametrize(("family", "norm"), [("gpt2", "lm_layer_norm"), ("llama", "rms_norm"), ("gemma2", "none")])
def test_transcoders_with_norms_of_their_own(tmp_path: Path, family: str, norm: str, read: str) -> None:
    """Of the stream itself, or beside the model's."""
    model = tiny_model(tmp_path, family)
    own = dictionaries(read=read, input_norm=norm, skip=True)
    prompt = decompose(linear_maps(model), own, IDS)
    with torch.no_grad(), recorded(model), capture(model, [resolve(model, f"{read}.1")]) as acts:
        model(IDS)
    pre_acts = own["t1"](acts[f"{read}.1"][0]).pre_acts
    assert pre_acts is not None
    found = sum(contributions(prompt, latent_reader(prompt, 1, 3, 4)).values())
    assert found == pytest.approx(float(pre_acts[4, 3]), abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_contribution_is_an_activation_times_a_virtual_weight(
    taken: Callable[[str], Decomposition], family: str
) -> None:
    prompt = taken(family)
    maps, (source, target) = prompt.maps, (prompt.transcoders[layer] for layer in (0, 2))
    fixed = virtual_weights(maps, source.dictionary, target.dictionary)
    rows = table(prompt, latent_reader(prompt, 2, 7, 4))
    rows = rows[(rows.kind == "latent") & (rows.layer == 0)].set_index("index")
    active = source.latents[4].nonzero()[:, 0].tolist()
    assert len(active) > 1
    assert sorted(rows.index) == active
    inverse = prompt.inverse(target.reading.norm)[4]
    for i in active:
        assert rows.activation[i] == float(source.latents[4, i])
        assert rows.weight[i] == pytest.approx(float(fixed[i, 7] * inverse), rel=1e-9)
        assert rows.contribution[i] == pytest.approx(rows.activation[i] * rows.weight[i], rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_source_reads_has_the_source_as_its_value(
    taken: Callable[[str], Decomposition], family: str
) -> None:
    prompt = taken(family)
    reader = logit_reader(prompt, torch.eye(97)[5].double() - torch.eye(97)[6].double())
    n = 0
    for source, value in contributions(prompt, reader).items():
        found = behind(prompt, reader, source)
        if found is not None:
            assert sum(contributions(prompt, found).values()) == pytest.approx(value, abs=1e-10), source
            n += 1
    assert n > 3 * 2 * 6  # heads from every token, and latents


def brute_force(prompt: Decomposition, branch: Branch, depth: int) -> list[tuple[tuple[Source, ...], float]]:
    """All paths of at most `depth` steps."""
    found = []
    if depth and branch.reader is not None:
        for source, value in contributions(prompt, branch.reader).items():
            if source.kind in ("latent", "head", "embedding", "mlp"):
                one = Branch((*branch.sources, source), value, behind(prompt, branch.reader, source))
                found += [(one.sources, value), *brute_force(prompt, one, depth - 1)]
    return found


def total(branch: Branch, paths: Paths) -> float:
    return sum(b.attribution for b in paths.branches if b.parent is branch) + sum(branch.rest.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_paths(taken: Callable[[str], Decomposition], family: str) -> None:
    prompt = taken(family)
    root = latent_reader(prompt, 1, 2, 3)
    paths = greedy_paths(prompt, root, n_paths=6, depth=3)
    assert paths.value == pytest.approx(float(prompt.transcoders[1].pre_acts[3, 2]), abs=1e-10)
    for branch in paths.branches:
        assert branch.expanded or not branch.rest
        if branch.expanded:
            assert total(branch, paths) == pytest.approx(branch.attribution, abs=1e-10)
    every = dict(brute_force(prompt, Branch((), paths.value, root), 3))
    beam: list[tuple[Source, ...]] = [()]
    for length in (1, 2, 3):  # of the continuations of the beam, the 6 largest
        candidates = [path for path in every if len(path) == length and path[:-1] in beam]
        beam = sorted(candidates, key=lambda path: -abs(every[path]))[:6]
        kept = [branch for branch in paths.branches if len(branch.sources) == length]
        assert [branch.sources for branch in kept] == beam
        for branch in kept:
            assert branch.attribution == pytest.approx(every[branch.sources], abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_graph_conserves_attribution(taken: Callable[[str], Decomposition], family: str) -> None:
    prompt = taken(family)
    root = logit_reader(prompt, torch.eye(97)[5].double() - torch.eye(97)[6].double())
    paths = greedy_paths(prompt, root, n_paths=25, depth=4, n_special=1)
    nodes, edges = paths.graph()
    assert nodes.node.is_unique
    assert len(nodes) < len(paths.branches)  # some paths meet
    sums = edges.groupby("parent").attribution.sum()
    values = nodes.set_index("node").attribution
    assert {"root"} < set(sums.index) <= set(values.index)
    for node, found in sums.items():
        assert found == pytest.approx(values[node], abs=1e-10), node
    into = edges[edges.child.isin(values.index)].groupby("child").attribution.sum()
    pd.testing.assert_series_equal(
        into.sort_index(), values.drop("root").sort_index(), check_names=False, rtol=1e-10
    )
    assert {"bias", "error", "skip", "special", "pruned"} <= set(edges.child)
    assert not ((nodes.kind == "head") & (nodes.source == 0)).any()
    rows = paths.table()
    assert len(rows) == len(paths.branches) - 1
    assert rows.path[0] == f"{paths.branches[1].name} -> root"
    assert math.isclose(rows.share[0], rows.attribution[0] / paths.value)


def test_prompts_and_readers_that_are_refused(taken: Callable[[str], Decomposition], model: GetModel) -> None:
    maps, prompt = linear_maps(model("gpt2")), taken("gpt2")
    with pytest.raises(DictlearnError, match="t0 and other write mlp_out"):
        decompose(maps, {"t0": transcoder(0, 0), "other": transcoder(0, 1)}, IDS)
    crossing = Linear(D, D, N_LATENTS, ReLU(l1=0.0), ["mlp_in.0"], ["mlp_out.1"]).double()
    with pytest.raises(DictlearnError, match=r"reads mlp_in.0 and writes mlp_out.1"):
        decompose(maps, {"crossing": crossing}, IDS)
    gated = Gated(D, D, N_LATENTS, ReLU(l1=0.0), ["mlp_in.0"], ["mlp_out.0"]).double()
    torch.nn.init.normal_(gated.W_enc)
    torch.nn.init.constant_(gated.b_mag, 1.0)
    with pytest.raises(DictlearnError, match="Take its for_inference"):
        decompose(maps, {"gated": gated}, IDS)
    with pytest.raises(DictlearnError, match=r"Layer 7 has no transcoder here; those that have one: 0, 1, 2"):
        latent_reader(prompt, 7, 0, 0)
    with pytest.raises(DictlearnError, match="latents 0 to 19, got 20"):
        latent_reader(prompt, 0, 20, 0)
    with pytest.raises(DictlearnError, match="within the 6 tokens of the prompt, got 6"):
        logit_reader(prompt, torch.ones(97).double(), 6)
