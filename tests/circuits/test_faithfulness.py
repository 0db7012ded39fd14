"""Circuits in a model: all and nothing, ablations by hand, curves and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.ablation import ABLATIONS, Ablation
from dictlearn.circuits.baselines import neurons
from dictlearn.circuits.cuts import check_cuts, cuts_of, record
from dictlearn.circuits.faithfulness import Curve, curve, error_share, sizes_for
from dictlearn.circuits.metrics import METRICS
from dictlearn.circuits.nodes import NodeValues, Ranking, complement, everything
from dictlearn.circuits.run import run_circuit
from dictlearn.circuits.scores import node_scores
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import resolve
from dictlearn.lm.taps import capture, edit
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.circuits.setup import (
    FAMILIES,
    filled,
    rows_of,
    scaled_cross_layer,
    scaled_dictionaries,
    skipping,
    some_pairs,
    tiny_model,
)

GetModel = Callable[[str], PreTrainedModel]


def of_kind(model: PreTrainedModel, kind: str) -> dict[str, Dictionary]:
    return scaled_cross_layer(model) if kind == "clt" else scaled_dictionaries(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["several", "clt"])
def test_with_all_nodes_the_logits_are_identical(model: GetModel, family: str, kind: str) -> None:
    own, batch = model(family), some_pairs()
    dictionaries = of_kind(own, kind)
    cuts = cuts_of(own, dictionaries)
    all_nodes = everything(node_scores(own, dictionaries, batch))
    plain = batch.value(record(own, (), batch.clean)[0])
    for ablation in ABLATIONS:
        for chunk, ablated in Ablation(own, cuts, batch, ablation).chunks():
            assert torch.equal(run_circuit(own, cuts, chunk, all_nodes, ablated), plain)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("kind", ["several", "clt"])
def test_all_and_nothing(model: GetModel, ablation: str, kind: str) -> None:
    """f(all) = 1 and f(none) = 0; for the complement the other way round. All candidates are all nodes that differ
    between clean and patch, so with the patch prompts' values they are as good as all nodes, and else not.
    """
    own, batch = model("gpt2"), some_pairs()
    dictionaries = of_kind(own, kind)
    if kind == "several":
        dictionaries["transcoder"].W_skip = None  # which no circuit is without
    cuts = cuts_of(own, dictionaries)
    scores = node_scores(own, dictionaries, batch)
    n = len(Ranking(scores))
    found = curve(own, cuts, Ablation(own, cuts, batch, ablation, n_rows=3), scores, sizes=(0, n // 2, n))
    assert torch.equal(found.everything, found.whole)
    assert found.faithfulness[0] == pytest.approx(0.0, abs=1e-9)
    assert found.complement_faithfulness[0] == pytest.approx(1.0, abs=1e-9)
    assert not 0.999 < found.faithfulness[1] < 1.001
    at_the_end = [float(found.faithfulness[2]), float(found.complement_faithfulness[2])]
    if ablation == "patch":
        assert at_the_end == pytest.approx([1.0, 0.0], abs=1e-9)
    else:
        assert abs(at_the_end[0] - 1) > 1e-3
    summary = found.summary()
    assert summary["faithfulness_of_all"] == pytest.approx(1.0)
    assert summary["faithfulness_of_candidates"] == pytest.approx(at_the_end[0])


def test_the_last_circuit_has_one_node_more_than_the_one_before(model: GetModel) -> None:
    """A curve has no step at its end: what was no candidate comes back at no size, and n_at is of such circuits."""
    own, batch = model("gpt2"), some_pairs()
    d = {"d": scaled_dictionaries(own)["stream"]}
    cuts = cuts_of(own, d)
    scores = node_scores(own, d, batch)
    ranking = Ranking(scores)
    n = len(ranking)
    sizes = [sum(int(part.sum()) for part in ranking.first(k)["d"]) for k in (n - 1, n)]
    assert sizes == [n - 1, n]
    assert n < sum(part.numel() for part in scores["d"])
    found = curve(own, cuts, Ablation(own, cuts, batch, "zero"), scores)
    assert found.sizes[-1] == n
    (kept,) = (
        run_circuit(own, cuts, chunk, ranking.first(n), ablated)
        for chunk, ablated in Ablation(own, cuts, batch, "zero").chunks()
    )
    assert torch.equal(found.kept[-1], kept)
    with pytest.raises(DictlearnError, match=f"A circuit has 0 to {n} nodes, .* got {n + 1}"):
        ranking.first(n + 1)


def test_patching_everything_at_a_cut_is_the_patch_prompt(model: GetModel) -> None:
    own, batch = model("llama"), some_pairs()
    dictionaries = {"stream": scaled_dictionaries(own)["stream"]}
    cuts = cuts_of(own, dictionaries)
    scores = node_scores(own, dictionaries, batch)
    found = curve(own, cuts, Ablation(own, cuts, batch, "patch"), scores, sizes=(0,))
    torch.testing.assert_close(found.none, batch.value(record(own, (), batch.patch)[0]))
    torch.testing.assert_close(found.whole, batch.value(record(own, (), batch.clean)[0]))


def stream(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad(), capture(model, [resolve(model, "resid_post.0")]) as acts:
        model(ids)
    return acts["resid_post.0"]


def by_hand(model: PreTrainedModel, batch, d: Dictionary, keep: NodeValues, values: Tensor, rest: Tensor) -> Tensor:
    """Latents and rest of the stream's autoencoder in a loop over positions; the metric."""
    x = stream(model, batch.clean)
    new = torch.empty_like(x)
    for position in range(batch.ctx):
        at = x[:, position]
        code = d.encode(at)
        own_rest = at - code @ rows_of(d)
        kept = keep.latents[position]
        new_code = code * kept + values[:, position] * ~kept
        new[:, position] = new_code @ rows_of(d) + (own_rest if keep.errors[0, position] else rest[:, position])
    with torch.no_grad(), edit(model, {resolve(model, "resid_post.0"): lambda _: new}):
        return batch.value(model(batch.clean).logits[:, -1])


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_by_hand(model: GetModel, ablation: str) -> None:
    own, batch = model("gpt2"), some_pairs(n=3)
    d = scaled_dictionaries(own)["stream"]
    cuts = cuts_of(own, {"d": d})
    patch = stream(own, batch.patch)
    values, rest = d.encode(patch), patch - d.encode(patch) @ rows_of(d)
    if ablation == "resample":
        order = Ablation(own, cuts, batch, ablation)._other
        assert sorted(order.tolist()) == [0, 1, 2]
        assert all(order[i] != i for i in range(3))
        values, rest = values[order], rest[order]
    if ablation == "mean_positional":
        values, rest = (part.mean(0, keepdim=True).expand_as(part) for part in (values, rest))
    if ablation == "mean":
        values, rest = (part.mean((0, 1), keepdim=True).expand_as(part) for part in (values, rest))
    if ablation == "zero":
        values, rest = torch.zeros_like(values), (d.b_dec / d.write_scale).expand_as(rest)
    keep = NodeValues(torch.rand(6, 24) < 0.5, torch.tensor([[True, False, True, False, True, False]]))
    expected = by_hand(own, batch, d, keep, values, rest)
    found = [
        run_circuit(own, cuts, chunk, {"d": keep}, ablated)
        for chunk, ablated in Ablation(own, cuts, batch, ablation, n_rows=2).chunks()
    ]
    torch.testing.assert_close(torch.cat(found), expected)


def test_nodes_are_computed_on_what_is_left(model: GetModel) -> None:
    """A later dictionary reads the stream after the ablations before it; errors as well."""
    own, batch = model("gpt2"), some_pairs()
    chosen = {name: d for name, d in scaled_dictionaries(own).items() if name in ("stream", "transcoder")}
    cuts = cuts_of(own, chosen)
    circuit = everything(node_scores(own, chosen, batch))
    circuit["stream"] = NodeValues(*(torch.zeros_like(part) for part in circuit["stream"]))  # all ablated
    ((chunk, ablated),) = Ablation(own, cuts, batch, "patch").chunks()
    found = run_circuit(own, cuts, chunk, circuit, ablated)
    torch.testing.assert_close(found, batch.value(record(own, (), batch.patch)[0]))


def test_latents_of_a_cross_layer_transcoder_are_computed_on_what_is_left(model: GetModel) -> None:
    """Layer by layer, by hand: first the reads of a layer, then its latents, then its write."""
    own, batch = model("gpt2"), some_pairs()
    d = scaled_cross_layer(own)["clt"]
    cuts = cuts_of(own, {"clt": d})
    keep = NodeValues(torch.rand(6, 30) < 0.5, torch.rand(3, 6) < 0.5)
    ((_, ablated),) = Ablation(own, cuts, batch, "mean_positional").chunks()
    own_ablated = ablated["clt"]
    assert own_ablated.rest is not None
    found = run_circuit(own, cuts, batch, {"clt": keep}, ablated)
    fixed: dict[str, Tensor] = {}
    for layer in range(3):  # each pass fixes one more write
        sites = [resolve(own, site) for site in (*d.reads, *d.writes)]
        edits = {resolve(own, site): (lambda _, new=new: new) for site, new in fixed.items()}
        with torch.no_grad(), edit(own, edits), capture(own, sites) as acts:
            own(batch.clean)
        code = d.encode(torch.stack([acts[site] for site in d.reads], -2))
        new_code = torch.where(keep.latents, code, own_ablated.values)
        written = [
            torch.einsum("npl,lwd->npwd", c[..., : 10 * layer + 10], rows_of(d)[: 10 * layer + 10])
            for c in (code, new_code)
        ]
        rest = acts[d.writes[layer]] - written[0][..., layer, :]
        new_rest = torch.where(keep.errors[layer].unsqueeze(-1), rest, own_ablated.rest[..., layer, :])
        fixed[d.writes[layer]] = written[1][..., layer, :] + new_rest
    edits = {resolve(own, site): (lambda _, new=new: new) for site, new in fixed.items()}
    with torch.no_grad(), edit(own, edits):
        expected = batch.value(own(batch.clean).logits[:, -1])
    torch.testing.assert_close(found, expected)


def test_a_read_after_the_write_is_refused(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    late = filled(Linear(16, 16, 24, TopK(k=4), ["resid_post.2"], ["mlp_out.0"]))
    cuts = cuts_of(own, {"late": late})
    scores = node_scores(own, {"late": late}, batch)
    with pytest.raises(
        DictlearnError, match=r"late writes mlp_out\.0 before the model reaches its read resid_post\.2"
    ):
        curve(own, cuts, Ablation(own, cuts, batch), scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_names_of_one_activation_are_one_site(model: GetModel, family: str) -> None:
    own = model(family)
    names = ("resid_post.0", "resid_pre.1", "resid_pre.2")
    dictionaries = {name: filled(Linear(16, 16, 24, TopK(k=4), [name], [name])) for name in names}
    rule = r"resid_post\.0 and resid_pre\.1 write resid_pre\.1, the same activation as resid_post\.0"
    with pytest.raises(DictlearnError, match=rule):
        cuts_of(own, dictionaries)
    assert len(cuts_of(own, {name: dictionaries[name] for name in names[1:]})) == 2


@pytest.mark.parametrize("first", [True, False])
def test_reads_are_of_what_is_left_by_whatever_name(model: GetModel, first: bool) -> None:
    """A transcoder that names its read by the module's path sees the ablations of it too."""
    own, batch = model("gpt2"), some_pairs()
    a = filled(Linear(16, 16, 24, TopK(k=4), ["mlp_out.0"], ["mlp_out.0"]))
    found = []
    for read in ("mlp_out.0", resolve(own, "mlp_out.0").module):
        t = filled(Linear(16, 16, 24, TopK(k=4), [read], ["mlp_out.1"]), 2)
        both = {"a": a, "t": t} if first else {"t": t, "a": a}
        cuts, scores = cuts_of(own, both), node_scores(own, both, batch)
        circuit = everything(scores, latents=False, errors=False) | {"t": everything(scores)["t"]}
        circuit["t"] = circuit["t"]._replace(errors=~circuit["t"].errors)
        ((chunk, ablated),) = Ablation(own, cuts, batch).chunks()
        found.append(run_circuit(own, cuts, chunk, circuit, ablated))
    torch.testing.assert_close(found[0], found[1])


class _Own(nn.Module):
    """An MLP that is a transcoder."""

    def __init__(self, d: Dictionary) -> None:
        super().__init__()
        self.d = d

    def forward(self, x: Tensor) -> Tensor:
        return self.d(x).recon


def test_what_is_no_cut_no_level_no_sizes(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    (cut,) = cuts_of(own, d)
    assert cut.name == d.writes[0]
    scores = node_scores(own, d, batch)
    with pytest.raises(DictlearnError, match=r"Cuts are what cuts_of\(model, dictionaries\) returns, got Linear"):
        check_cuts([d])
    ablation = Ablation(own, [cut], batch)
    with pytest.raises(DictlearnError, match=r"sizes must be ascending, got \[5, 0\]"):
        curve(own, [cut], ablation, scores, sizes=(5, 0))
    found = curve(own, [cut], ablation, scores, sizes=(0, 5))
    for level in (0, 80):
        with pytest.raises(DictlearnError, match="level must be a share: above 0 and at most 1, got"):
            found.n_at(level)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_transcoder_that_is_the_mlp_has_no_error(tmp_path: Path, ablation: str) -> None:
    """Its skip path is none: latents alone are the whole model."""
    own, batch = tiny_model(tmp_path, "gpt2"), some_pairs()
    d = scaled_dictionaries(own)["transcoder"]
    own.get_submodule("transformer.h.1").mlp = _Own(d)
    cuts = cuts_of(own, {"d": d})
    scores = node_scores(own, {"d": d}, batch)
    assert error_share(scores) < 1e-12
    found = curve(own, cuts, Ablation(own, cuts, batch, ablation), scores, "removed", sizes=(0, 5))
    assert found.summary()["faithfulness_of_all"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("kind", ["transcoder", "norm", "clt"])
def test_latents_skip_path_and_bias_are_the_reconstruction(model: GetModel, kind: str) -> None:
    own = model("gpt2")
    d = skipping(own)[kind]
    (cut,) = cuts_of(own, d)
    with torch.no_grad(), capture(own, [resolve(own, site) for site in d.reads]) as acts:
        own(some_pairs().clean)
    x = d.select_reads(acts)
    recon = d.decode(d.encode(x), x)
    parts = cut.written(cut.dense_values(x)), cut.bias(x), cut.skipped(x)
    torch.testing.assert_close(sum(parts), recon if d.site_axis else recon.unsqueeze(-2))
    assert all(part.abs().max() > 0.1 for part in parts)


@pytest.mark.parametrize("kind", ["transcoder", "norm", "clt"])
@pytest.mark.parametrize("ablation", [kind for kind in ABLATIONS if kind != "zero"])
def test_the_yardstick_is_that_of_neurons(model: GetModel, ablation: str, kind: str) -> None:
    """m(0) has the write sites as the ablation has them, skip paths and all, whatever dictionary cuts them."""
    own, batch = model("gpt2"), some_pairs(n_special=1)
    d = skipping(own)[kind]
    units = {site: neurons(site, torch.zeros(2, d.d_out, dtype=torch.float64)) for site in d.writes}
    ends = []
    for given in ({"d": d}, units):
        cuts = cuts_of(own, given)
        found = curve(own, cuts, Ablation(own, cuts, batch, ablation), node_scores(own, given, batch), sizes=(0, 5))
        ends.append((found.whole, found.none))
        assert found.summary()["faithfulness_of_none"] == float(found.faithfulness[0])
        assert (abs(float(found.faithfulness[0])) < 1e-9) == (given is units)  # the skip path carries something
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("ablation", ["patch", "zero"])
def test_a_skip_path_is_computed_on_what_is_left(model: GetModel, ablation: str) -> None:
    """By hand, with the stream before it ablated: x there is not that of either prompt."""
    own, batch = model("gpt2"), some_pairs()
    chosen = {name: d for name, d in scaled_dictionaries(own).items() if name in ("stream", "transcoder")}
    d, cuts = chosen["transcoder"], cuts_of(own, chosen)
    W_skip = d.W_skip
    assert W_skip is not None
    keep = NodeValues(torch.rand(6, 24) < 0.5, torch.tensor([[True, False, True, False, True, False]]))
    circuit = everything(node_scores(own, chosen, batch)) | {"transcoder": keep}
    circuit["stream"] = NodeValues(torch.rand(6, 24) < 0.5, circuit["stream"].errors)
    ((chunk, ablated),) = Ablation(own, cuts, batch, ablation).chunks()
    sites = [resolve(own, site) for site in ("mlp_in.1", "mlp_out.1")]
    with torch.no_grad(), capture(own, sites) as patch:
        own(batch.patch)
    stream_alone = circuit | {"transcoder": everything(circuit)["transcoder"]}
    with capture(own, sites) as running:  # the transcoder's own site is not ablated
        run_circuit(own, cuts, chunk, stream_alone, ablated)

    def parts(acts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, skip path and the rest."""
        x, y = acts["mlp_in.1"], acts["mlp_out.1"]
        code, skip = d.encode(x), x @ W_skip.T * d.read_scale / d.write_scale
        return code, skip, y - code @ rows_of(d) - skip

    code, skip, rest = parts(running)
    other, _, other_rest = parts(patch)
    if ablation == "zero":
        other, other_rest = torch.zeros_like(other), (d.b_dec / d.write_scale).expand_as(rest)
    new = torch.where(keep.latents, code, other) @ rows_of(d) + skip
    new = new + torch.where(keep.errors[0].unsqueeze(-1), rest, other_rest)
    unablated = {"transcoder": everything(circuit)["transcoder"], "stream": circuit["stream"]}
    with torch.no_grad(), edit(own, {sites[1]: lambda _: new}):
        expected = run_circuit(own, cuts[:1], chunk, unablated, ablated)
    torch.testing.assert_close(run_circuit(own, cuts, chunk, circuit, ablated), expected)


def test_zero_ablation_keeps_what_an_input_norm_took_off(model: GetModel) -> None:
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["z"]
    cuts = cuts_of(own, {"z": d})
    nothing = everything(node_scores(own, {"z": d}, batch), latents=False, errors=False)
    ((_, ablated),) = Ablation(own, cuts, batch, "zero").chunks()

    def bias_alone(act: Tensor) -> Tensor:
        return d.decode(torch.zeros(*act.shape[:-1], d.n_latents, dtype=act.dtype), act)

    with torch.no_grad(), edit(own, {resolve(own, "attn_z.2"): bias_alone}):
        expected = batch.value(own(batch.clean).logits[:, -1])
    torch.testing.assert_close(run_circuit(own, cuts, batch, nothing, ablated), expected)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_special_tokens_are_never_ablated(model: GetModel, ablation: str) -> None:
    own, batch = model("gpt2"), replace(some_pairs(), n_special=1)
    d = scaled_dictionaries(own)["stream"]
    cuts = cuts_of(own, {"d": d})
    ((chunk, ablated),) = Ablation(own, cuts, batch, ablation).chunks()
    nothing = everything(node_scores(own, {"d": d}, batch), latents=False, errors=False)
    seen: list[Tensor] = []
    with edit(own, {resolve(own, "resid_pre.1"): lambda act: seen.append(act) or act}):
        run_circuit(own, cuts, chunk, nothing, ablated)
    clean = stream(own, batch.clean)
    assert torch.equal(seen[0][:, 0], clean[:, 0])
    assert not torch.allclose(seen[0][:, 1], clean[:, 1])
    if ablation == "mean":
        patch = stream(own, batch.patch)[:, 1:]
        torch.testing.assert_close(ablated["d"].values[0, 0], d.encode(patch).mean((0, 1)))


def test_nodes_of_all_positions(model: GetModel) -> None:
    """A node that stands for all positions is kept at all of them."""
    own, batch = model("gpt2"), some_pairs()
    d = scaled_dictionaries(own)["stream"]
    cuts = cuts_of(own, {"d": d})
    ((chunk, ablated),) = Ablation(own, cuts, batch, "patch").chunks()
    latents, errors = torch.rand(1, 24) < 0.5, torch.ones(1, 1, dtype=torch.bool)
    one = run_circuit(own, cuts, chunk, {"d": NodeValues(latents, errors)}, ablated)
    each = run_circuit(own, cuts, chunk, {"d": NodeValues(latents.repeat(6, 1), errors.repeat(1, 6))}, ablated)
    assert torch.equal(one, each)


@pytest.mark.parametrize("errors", ["kept", "removed"])
def test_errors_that_are_not_scored(model: GetModel, errors: str) -> None:
    """Kept: all latents and errors are the model; removed: the reconstructions alone."""
    own, batch = model("gpt2"), some_pairs()
    chosen = {"d": scaled_dictionaries(own)["stream"]}
    cuts = cuts_of(own, chosen)
    scores = node_scores(own, chosen, batch)
    ablation = Ablation(own, cuts, batch, "zero")
    n = len(Ranking(scores, errors=False))
    assert n < len(Ranking(scores))
    found = curve(own, cuts, ablation, scores, errors=errors, sizes=(0, n))
    if errors == "kept":
        assert torch.equal(found.everything, found.whole)
        assert not torch.allclose(found.kept[0], found.none)
    else:
        assert torch.equal(found.kept[0], found.none)
        with torch.no_grad(), edit(own, {resolve(own, "resid_post.0"): lambda x: chosen["d"](x).recon}):
            recon = batch.value(own(batch.clean).logits[:, -1])
        torch.testing.assert_close(found.everything, recon)
        assert found.summary()["faithfulness_of_all"] != pytest.approx(1.0, abs=1e-3)


def nodes(latents: list[list[float]], errors: list[list[float]]) -> NodeValues:
    return NodeValues(torch.tensor(latents), torch.tensor(errors))


SCORES = {"a": nodes([[0.0, -3.0], [1.0, 0.0]], [[0.5, -0.1]]), "b": nodes([[-2.0, 0.0], [0.0, 0.2]], [[4.0, 0.0]])}


def test_ranking() -> None:
    ranking = Ranking(SCORES)
    assert len(ranking) == 7
    two = ranking.first(2)  # the error 4.0 of b and the latent -3.0 of a
    assert two["a"].latents.tolist() == [[False, True], [False, False]]
    assert two["b"].errors.tolist() == [[True, False]]
    assert sum(int(part.sum()) for own in two.values() for part in own) == 2
    signed = Ranking(SCORES, "signed").first(3)  # -3, -2, -0.1
    assert signed["a"].errors.tolist() == [[False, True]]
    assert signed["b"].latents.tolist() == [[True, False], [False, False]]
    latents = Ranking(SCORES, errors=False)
    assert len(latents) == 4
    assert not any(bool(own.errors.any()) for own in latents.first(4).values())
    for name, own in ranking.first(7).items():  # all that have a score, and no others
        assert all(torch.equal(kept, score != 0) for kept, score in zip(own, SCORES[name], strict=True))
    outside = complement(two)
    assert outside["b"].errors.tolist() == [[False, True]]
    assert error_share(SCORES) == pytest.approx(4.6 / 10.8)


def test_ties_are_taken_in_order() -> None:
    ranking = Ranking({"a": nodes([[1.0, -1.0, 1.0]], [[1.0]])})
    taken = [ranking.first(n)["a"] for n in (1, 2)]
    assert [own.latents.tolist() for own in taken] == [[[True, False, False]], [[True, True, False]]]


def test_scores_that_rank_nothing() -> None:
    with pytest.raises(DictlearnError, match="No node has a score"):
        Ranking({"a": nodes([[0.0]], [[0.0]])})
    with pytest.raises(DictlearnError, match=r"must be finite numbers\. Those of a are not"):
        Ranking({"a": nodes([[math.nan]], [[0.0]])})
    with pytest.raises(DictlearnError, match="order must be one of absolute, signed, got 'best'"):
        Ranking(SCORES, "best")


def line(f: list[float], sizes: tuple[int, ...], n: int = 10) -> Curve:
    """Faithfulness `f` at `sizes`, with m(M) = 3 and m(0) = 1 on the mean of five pairs."""
    noise = torch.tensor([-0.2, -0.1, 0.0, 0.1, 0.2], dtype=torch.float64)
    kept = torch.stack([1 + 2 * share + noise for share in f])
    return Curve(sizes, n, kept, 4 - kept, 3 + noise, 1 - noise, 3 + noise)


def test_what_is_read_off_a_curve() -> None:
    found = line([0.0, 0.5, 1.0, 1.2], (0, 1, 4, 10))
    assert found.faithfulness.tolist() == pytest.approx([0, 0.5, 1, 1.2])
    assert found.complement_faithfulness.tolist() == pytest.approx([1, 0.5, 0, -0.2])
    assert found.n_at(0.5) == 1
    assert found.n_at(0.75) == pytest.approx(2)  # half way from 1 to 4 in the logarithm
    assert line([0.0, 0.4], (0, 10)).n_at(0.5) is None
    assert (found.at(4), found.at(5)) == (pytest.approx(1), None)
    cpr, cmd = found.areas()
    assert cpr == pytest.approx(0.1 * 0.25 + 0.3 * 0.75 + 0.6 * 1.1)
    assert cmd == pytest.approx(0.1 * 0.75 + 0.3 * 0.25 + 0.6 * 0.1)
    table = found.table()
    assert table["fraction"].tolist() == [0, 0.1, 0.4, 1]
    low, middle, high = (table[name].tolist() for name in ("low", "faithfulness", "high"))
    assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))


def test_the_interval_is_that_of_the_ratio_of_means() -> None:
    """Pairs that differ alone by a common factor give the same share in every draw."""
    factor = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    exact = Curve(
        (1, 2), 2, torch.stack([0.3 * factor, factor]), torch.stack([factor, factor]), factor, 0 * factor, factor
    )
    low, high = exact.interval()
    assert low.tolist() == pytest.approx([0.3, 1.0])
    assert high.tolist() == pytest.approx([0.3, 1.0])
    wide = line([0.0, 0.5], (0, 1))
    low, high = wide.interval()
    assert 0.4 < low[1] < 0.48
    assert 0.52 < high[1] < 0.6
    assert torch.equal(wide.interval(seed=1), wide.interval(seed=1))


def test_means_are_wide() -> None:
    """Of a curve in bfloat16, whose own means would keep three digits."""
    f, sizes = [0.0, 0.503, 0.997, 1.2], (0, 1, 4, 10)
    wide = line(f, sizes)
    parts = (wide.kept, wide.left_out, wide.whole, wide.none, wide.everything)
    rounded = [part.bfloat16() for part in parts]
    narrow, again = (Curve(sizes, 10, *own) for own in (rounded, [part.double() for part in rounded]))
    assert narrow.faithfulness.tolist() == again.faithfulness.tolist()
    assert torch.equal(narrow.interval(), again.interval())
    assert narrow.summary() == again.summary()


def test_the_metric_of_logits_in_bfloat16_is_that_of_the_same_logits_in_float32() -> None:
    logits = (30 * torch.randn(4, 97, generator=torch.Generator().manual_seed(0))).bfloat16()
    for metric in METRICS:
        batch = replace(some_pairs(), metric=metric)
        found = batch.value(logits)
        assert found.dtype == torch.float32
        assert torch.equal(found, batch.value(logits.float()))
        assert batch.value(logits.double()).dtype == torch.float64


def test_an_ablation_that_does_nothing_is_no_yardstick() -> None:
    same = torch.tensor([1.0, 2.0])
    with pytest.raises(DictlearnError, match="faithfulness has no yardstick"):
        Curve((0,), 1, same[None], same[None], same, same, same)


def test_sizes() -> None:
    found = sizes_for(10_000)
    assert found[:3] == (0, 1, 2)
    assert {10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000} <= set(found)
    assert list(found) == sorted(set(found))
    assert sizes_for(1) == (0, 1)


@pytest.mark.parametrize("n_rows", [1, 4])
def test_curves_do_not_depend_on_the_batch(model: GetModel, n_rows: int) -> None:
    own, batch = model("gpt2"), some_pairs()
    chosen = scaled_dictionaries(own)
    cuts = cuts_of(own, chosen)
    scores = node_scores(own, chosen, batch)
    whole = curve(own, cuts, Ablation(own, cuts, batch, "mean"), scores, sizes=(0, 20))
    parts = curve(own, cuts, Ablation(own, cuts, batch, "mean", n_rows=n_rows), scores, sizes=(0, 20))
    torch.testing.assert_close(whole.kept, parts.kept)
    torch.testing.assert_close(whole.left_out, parts.left_out)


def test_no_score_at_all_is_said() -> None:
    with pytest.raises(DictlearnError, match="No node has a score"):
        error_share({"d": NodeValues(torch.zeros(2, 3), torch.zeros(1, 2))})
