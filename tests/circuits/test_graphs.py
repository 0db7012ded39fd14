"""Attribution graphs: rows that add up, influence, scores and pruning."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dictlearn import Scale, intervene
from dictlearn.circuits.graphs import build
from dictlearn.circuits.graphs import influence as influence_module
from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.graph import KINDS, Graph, Logit
from dictlearn.circuits.graphs.influence import (
    _largest,
    graph_scores,
    influence,
    node_influence,
    prune,
    shares,
    source_of,
)
from dictlearn.circuits.graphs.inputs import likeliest
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import LM, capture, load_lm, resolve
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.circuits.graphs_setup import (
    CTX,
    N_LAYERS,
    apart,
    cross_layer,
    perfect_transcoders,
    some_ids,
    transcoders,
)
from tests.circuits.setup import filled, some_dictionaries
from tests.tiny_lms import tiny_lm_folder


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> LM:
    found = load_lm(str(tiny_lm_folder(tmp_path, request.param, n_layers=N_LAYERS)))
    found.model.double()
    return found


@pytest.fixture
def gpt2(tmp_path: Path) -> LM:
    found = load_lm(str(tiny_lm_folder(tmp_path, "gpt2", n_layers=N_LAYERS)))
    found.model.double()
    return found


@pytest.mark.parametrize("max_latents", [9, 10_000])
@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_every_row_adds_up(lm: LM, maker, max_latents: int) -> None:
    dictionaries = maker(lm.model)
    whole = attribution_graph(lm, dictionaries, some_ids(), batch_size=5)
    graph = attribution_graph(lm, dictionaries, some_ids(), max_latents=max_latents, batch_size=2)
    torch.testing.assert_close(graph.edges.sum(-1), graph.totals, atol=1e-9, rtol=1e-9)
    assert graph.n_latents == min(max_latents, whole.n_latents)
    kinds = graph.nodes["kind"].tolist()
    assert sorted(set(kinds), key=KINDS.index) == list(KINDS)
    assert [kinds.count(kind) for kind in KINDS[1:]] == [N_LAYERS * CTX, CTX, 1, 1, graph.n_logits]
    others = graph.edges[:, graph.places("other")]
    assert bool(others.any()) == (max_latents < whole.n_latents)
    torch.testing.assert_close(*(own.edges[own.n_latents :, own.places("error")] for own in (graph, whole)))


def test_a_budget_takes_the_most_influential_first(gpt2: LM) -> None:
    """With one row at a time, the first latent is the largest direct effect on the logits."""
    dictionaries = transcoders(gpt2.model)
    whole = attribution_graph(gpt2, dictionaries, some_ids())
    one = attribution_graph(gpt2, dictionaries, some_ids(), max_latents=1)
    direct = whole.weights.double() @ shares(whole.edges[whole.n_latents :, : whole.places("bias").start])
    best = whole.nodes.iloc[int(direct[: whole.n_latents].argmax())]
    assert one.nodes.iloc[0].tolist() == best.tolist()


def test_a_budget_is_spent_by_influence_on_the_rows_so_far(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three latents at a time, against a dense solve on the rows that are known, with logits of unequal weight."""
    probabilities = torch.tensor([0.95, 0.03, 0.02])
    monkeypatch.setattr(build, "likeliest", lambda *_: (torch.tensor([5, 60, 33]), probabilities))
    monkeypatch.setattr(build, "RERANK", 1)
    dictionaries = transcoders(gpt2.model)
    whole = attribution_graph(gpt2, dictionaries, some_ids())
    n, n_sources = whole.n_latents, whole.places("bias").start
    edges, known = shares(whole.edges[:, :n_sources]), list[int]()
    for _ in range(6):
        square = torch.zeros(n_sources, n_sources, dtype=torch.float64)
        square[known] = edges[known]
        direct = probabilities.double() @ edges[n:]
        found = torch.linalg.solve((torch.eye(n_sources).double() - square).T, direct)[:n]
        found[known] = -1
        known += found.topk(3).indices.tolist()
    graph = attribution_graph(gpt2, dictionaries, some_ids(), max_latents=18, batch_size=3)
    columns = ["layer", "position", "index"]
    expected = whole.nodes.iloc[sorted(known)][columns].to_numpy()
    assert graph.nodes.iloc[: graph.n_latents][columns].to_numpy().tolist() == expected.tolist()


def test_edges_lead_to_later_layers(gpt2: LM) -> None:
    graph = attribution_graph(gpt2, transcoders(gpt2.model), some_ids())
    layers, positions = (torch.tensor(graph.nodes[key].to_numpy()) for key in ("layer", "position"))
    target, source = graph.edges[:, : graph.places("bias").start].nonzero(as_tuple=True)
    rows = torch.cat([torch.arange(graph.n_latents), torch.arange(*_ends(graph, "logit"))])
    assert (layers[source] < layers[rows[target]]).all()
    assert (positions[source] <= positions[rows[target]]).all()


def _ends(graph: Graph, kind: str) -> tuple[int, int]:
    found = graph.places(kind)
    return found.start, found.stop


def test_influence_is_the_dense_solve(lm: LM) -> None:
    graph = attribution_graph(lm, transcoders(lm.model), some_ids())
    edges = graph.edges[:, : graph.places("bias").start]
    n, n_logits = edges.shape[1] + graph.n_logits, graph.n_logits
    square = torch.zeros(n, n, dtype=torch.float64)
    rows = [*range(graph.n_latents), *range(n - n_logits, n)]
    square[rows, :-n_logits] = edges.abs() / edges.abs().sum(-1, keepdim=True)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[-n_logits:] = graph.weights.double()
    eye = torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.solve((eye - square).T, weights) - weights
    torch.testing.assert_close(node_influence(graph), expected[:-n_logits], atol=1e-12, rtol=1e-10)


def _hand_graph() -> Graph:
    """Two latents, one error, two embeddings, one logit: b reads a and the error, a reads both embeddings."""
    kinds = ["latent", "latent", "error", "embedding", "embedding", "bias", "other", "logit"]
    edges = [
        [0.0, 0.0, 0.0, 3.0, -1.0, 5.0, 0.0],  # a
        [2.0, 0.0, -2.0, 0.0, 0.0, 1.0, 0.0],  # b
        [1.0, 3.0, 0.0, 0.0, 0.0, 7.0, 9.0],  # logit
    ]
    return Graph(
        "x y",
        torch.tensor([5, 6]),
        ["x", " y"],
        pd.DataFrame({"kind": kinds, "dictionary": "", "layer": 0, "position": 0, "index": 0}),
        torch.tensor(edges).double(),
        torch.ones(2).double(),
        torch.tensor(edges).double().sum(-1),
        [Logit(" z", 7, None, 1.0)],
        torch.tensor([1.0]).double(),
        {"n_layers": 2},
    )


def test_scores_by_hand() -> None:
    graph = _hand_graph()
    # logit: a 1/4, b 3/4; b: a 1/2, error 1/2; so a 1/4 + 3/8, error 3/8, embeddings 5/8 * (3/4, 1/4)
    expected = torch.tensor([5 / 8, 3 / 4, 3 / 8, 15 / 32, 5 / 32]).double()
    torch.testing.assert_close(node_influence(graph), expected)
    scores = graph_scores(graph)
    assert scores.replacement == pytest.approx(5 / 8)
    total = 5 / 8 + 3 / 4 + 3 / 8 + 5 / 8 + 1
    assert scores.completeness == pytest.approx((total - 3 / 4 * 1 / 2) / total)


def test_pruning_by_hand() -> None:
    graph = _hand_graph()
    everything = prune(graph, 1.0, 1.0)
    assert everything.nodes.all()
    assert torch.equal(everything.edges, graph.edges[:, :5] != 0)
    # b .75, a .625 and embedding .469 are 0.777 of 2.375; the error comes next
    some = prune(graph, 0.75, 1.0)
    assert some.nodes.tolist() == [True, True, False, True, True]
    # without the error b is all a's: logit-b and b-a have 3/4 each, a's embeddings 3/4 and 1/4 of 1, logit-a 1/4
    fewer = prune(graph, 0.75, 0.7)
    assert fewer.edges.nonzero().tolist() == [[0, 3], [1, 0], [2, 1]]
    # only b is left of the latents, whose edge to the logit is all there is: nothing comes into b
    only_b = prune(graph, 0.3, 1.0)
    assert only_b.nodes.tolist() == [False, False, False, True, True]
    assert not only_b.edges.any()
    with pytest.raises(DictlearnError, match=r"node_share must be between 0 and 1, got 1\.5"):
        prune(graph, 1.5)


@pytest.mark.parametrize(
    ("maker", "max_latents"), [(transcoders, 10_000), (transcoders, 20), (cross_layer, 10_000)]
)
def test_a_source_twice_moves_every_target_by_its_edge(lm: LM, maker, max_latents: int) -> None:
    graph = attribution_graph(lm, maker(lm.model), some_ids(), max_latents=max_latents)
    found = graph.validate(30)
    assert len(found) == 30
    assert (found["largest_difference"].to_numpy() < 1e-9).all()
    assert np.median(found["largest_edge"].to_numpy()) > 1e-2


@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_an_intervention_moves_later_latents_by_their_edges(lm: LM, maker) -> None:
    """The model itself with twice of a latent, all but direct effects held, and what dictionaries then read."""
    dictionaries, ids = maker(lm.model), some_ids()
    graph = attribution_graph(lm, dictionaries, ids)
    sites = [resolve(lm.model, site) for d in dictionaries.values() for site in d.reads]
    latents = graph.nodes.iloc[: graph.n_latents].to_dict("records")
    linear = [row for row, node in enumerate(latents) if dictionaries[node["dictionary"]].input_norm == "none"]
    for source, node in list(enumerate(latents))[::9]:
        twice = Scale(node["index"], 2.0, positions=[node["position"]])
        changed = intervene(lm, dictionaries, {node["dictionary"]: twice}, error="frozen", freeze="direct")
        with changed as run, capture(lm.model, sites) as acts:
            run(ids)
        pre_acts = {name: d.pre_activations(d.select_reads(acts))[0] for name, d in dictionaries.items()}
        found = [
            pre_acts[latents[row]["dictionary"]][latents[row]["position"], latents[row]["index"]] for row in linear
        ]
        change = torch.stack(found) - graph.totals[linear]
        torch.testing.assert_close(change, graph.edges[linear, source], atol=1e-6, rtol=1e-5)


def test_validation_finds_a_wrong_edge(lm: LM) -> None:
    graph = attribution_graph(lm, transcoders(lm.model), some_ids(4), max_latents=3)
    n_sources = graph.edges.shape[1] - 2
    graph.edges[:, 1] += 1
    found = graph.validate(10_000)
    assert found.index.tolist() == list(range(n_sources))
    assert set(found["kind"].tolist()) == {"latent", "error", "embedding"}
    wrong = found["largest_difference"].to_numpy() > 1e-9
    assert wrong.nonzero()[0].tolist() == [1]
    assert graph.validate(4, seed=3).equals(graph.validate(4, seed=3))
    with pytest.raises(DictlearnError, match="n must be"):
        graph.validate(0)
    with pytest.raises(DictlearnError, match="the model is needed"):
        _hand_graph().validate(3)


def test_influence_refuses_cycles() -> None:
    cycle = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(DictlearnError, match="without cycles"):
        influence(cycle, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 1, -1]))


def test_likeliest_tokens() -> None:
    logits = torch.tensor([0.1, 0.5, 0.2, 0.15, 0.05]).log()

    def found(max_logits: int, share: float) -> list[int]:
        return likeliest(logits, max_logits, share)[0].tolist()

    assert found(10, 0.69) == [1, 2]
    assert found(10, 0.71) == [1, 2, 3]
    assert found(2, 0.95) == [1, 2]
    assert found(10, 0.01) == [1]
    assert likeliest(logits, 3, 1.0)[1].tolist() == pytest.approx([0.5, 0.2, 0.15])


def test_a_perfect_transcoder_leaves_no_errors(tmp_path: Path) -> None:
    """The MLP of a model with ReLUs is a transcoder: errors are zero, both scores 1."""
    lm, dictionaries = perfect_transcoders(tmp_path)
    graph = attribution_graph(lm, dictionaries, some_ids())
    assert graph.edges[:, graph.places("error")].abs().max() < 1e-10
    assert graph_scores(graph) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9))


def test_a_cross_layer_one_without_later_decoders_is_one_for_each_layer(lm: LM) -> None:
    joined = cross_layer(lm.model)["clt"]
    for rows in joined.decoders:
        rows.data[:, 1:] = 0
    one, several = (attribution_graph(lm, own, some_ids()) for own in ({"clt": joined}, apart(joined)))
    torch.testing.assert_close(one.edges, several.edges, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(one.values, several.values)


def test_what_does_not_fit_is_refused(gpt2: LM) -> None:
    good, ids = transcoders(gpt2.model), some_ids()
    with pytest.raises(DictlearnError, match=r"Attribution graphs are of transcoders .* stream is a Linear"):
        attribution_graph(gpt2, some_dictionaries(gpt2.model), ids)
    with pytest.raises(DictlearnError, match="logit_share must be above 0"):
        attribution_graph(gpt2, good, ids, logit_share=0)
    with pytest.raises(DictlearnError, match="max_latents"):
        attribution_graph(gpt2, good, ids, max_latents=0)
    with pytest.raises(DictlearnError, match="one prompt"):
        attribution_graph(gpt2, good, ids.expand(2, -1))
    with pytest.raises(DictlearnError, match="got an empty one"):
        attribution_graph(gpt2, good, "")


def test_dictionaries_that_do_not_fit(gpt2: LM) -> None:
    ids, d = some_ids(), 16

    def graph(dictionary: Dictionary) -> Graph:
        return attribution_graph(gpt2, {"odd": dictionary}, ids)

    for read, write in (("mlp_out.0", "mlp_out.1"), ("resid_post.1", "mlp_out.1"), ("mlp_in.2", "mlp_out.0")):
        odd = filled(Linear(d, d, 8, TopK(k=2), [read], [write]))
        with pytest.raises(DictlearnError, match=f"odd reads {read} and writes {write}"):
            graph(odd)
    swapped = CrossLayer(d, d, 8, TopK(k=2), ["mlp_in.2", "mlp_in.0"], ["mlp_out.2", "mlp_out.0"])
    found = graph(filled(swapped))
    assert set(found.nodes["layer"][found.places("latent")].tolist()) == {0, 2}
    assert found.info["row_error"] < 1e-9
    mixed = CrossLayer(d, d, 8, TopK(k=2), ["mlp_in.2", "mlp_in.0"], ["mlp_out.0", "mlp_out.2"])
    with pytest.raises(DictlearnError, match=r"odd reads mlp_in.2 and writes mlp_out.0"):
        graph(filled(mixed))
    gated = Gated(d, d, 8, ReLU(l1=0.0), ["mlp_in.1"], ["mlp_out.1"]).double()
    for weight in gated.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    with pytest.raises(DictlearnError, match="take its for_inference"):
        graph(gated)


def test_ways_to_call(gpt2: LM) -> None:
    dictionaries, ids = transcoders(gpt2.model), some_ids()
    plain = attribution_graph(gpt2, dictionaries, ids)
    with torch.inference_mode():
        again = attribution_graph(gpt2, list(dictionaries.values()), ids)
    torch.testing.assert_close(again.edges, plain.edges)
    assert set(again.nodes["dictionary"]) == {"", "mlp_out.0", "mlp_out.1", "mlp_out.2"}
    copied = copy.deepcopy(plain)
    assert copied.local is None
    assert graph_scores(copied) == graph_scores(plain)
    for empty in (ids[:, :0], ids[:0]):
        with pytest.raises(DictlearnError, match="A graph needs a prompt, got an empty one"):
            attribution_graph(gpt2, dictionaries, empty)
    for wrong in (ids[0], ids.double(), ids > 9, ids.to(torch.complex64), ids + 97, ids - 97):
        with pytest.raises(DictlearnError, match=r"whole numbers \[1, ctx\] from 0 to 96"):
            attribution_graph(gpt2, dictionaries, wrong)


def test_how_far_rows_are_off_is_said(gpt2: LM) -> None:
    dictionaries, ids = transcoders(gpt2.model), some_ids()
    assert attribution_graph(gpt2, dictionaries, ids).info["row_error"] < 1e-12
    gpt2.model.float()
    single = {name: d.float() for name, d in dictionaries.items()}
    graph = attribution_graph(gpt2, single, ids)
    off = (graph.edges.double().sum(-1) - graph.totals.double()).abs().max() / graph.totals.abs().max()
    assert 1e-9 < float(off) < 1e-5
    assert graph.info["row_error"] == pytest.approx(float(off), rel=1e-3)


def test_an_unknown_token_that_begins_sequences_is_special(gpt2: LM) -> None:
    """As in the tokenizers of GPT-2 and Pythia."""
    gpt2.tokenizer.unk_token = gpt2.tokenizer.bos_token
    bos = gpt2.tokenizer.bos_token_id
    graph = attribution_graph(gpt2, transcoders(gpt2.model), torch.tensor([[bos, 5, 6]]))
    assert graph.info["n_special"] == 1


def test_text_gets_the_special_token_of_the_dictionaries(gpt2: LM) -> None:
    dictionaries = transcoders(gpt2.model)
    plain = attribution_graph(gpt2, dictionaries, "w5 w6 w7")
    assert plain.ids.tolist() == [5, 6, 7]
    for d in dictionaries.values():
        d.metadata["prepend_bos"] = True
    graph = attribution_graph(gpt2, dictionaries, "w5 w6 w7")
    bos = gpt2.tokenizer.bos_token_id
    assert graph.ids.tolist() == [bos, 5, 6, 7]
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    assert set(latents["position"].tolist()) == {1, 2, 3}  # none at the special token
    errors = graph.edges[:, graph.places("error")].unflatten(1, (N_LAYERS, 4))
    assert not errors[:, :, 0].any()
    torch.testing.assert_close(graph.edges.sum(-1), graph.totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_set_of_a_share(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a sort of everything with running sums; values in pieces, with ties and zeros."""
    monkeypatch.setattr(influence_module, "PIECE", 7)
    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 8, 50, 300):
        for share in (0.0, 1e-6, 0.3, 0.8, 0.98, 1.0):
            smooth = torch.rand(n, generator=draw, dtype=dtype)
            tied = torch.randint(0, 4, (n,), generator=draw).to(dtype)
            for values in (smooth, tied, smooth * (tied > 1), smooth**40):
                ordered = values.sort(descending=True).values
                reached = ordered.double().cumsum(0) / ordered.double().sum()
                last = int(torch.searchsorted(reached, share * (1 - 1e-12)).clamp_max(n - 1))
                assert torch.equal(_largest(values, share), values >= ordered[last])
    assert _largest(torch.zeros(3, dtype=dtype), 0.5).all()


def test_pruning_leaves_the_graph_as_it_is(gpt2: LM) -> None:
    graph = attribution_graph(gpt2, transcoders(gpt2.model), some_ids(4))
    before = graph.edges.clone()
    prune(graph, 0.7, 0.9)
    assert torch.equal(graph.edges, before)


def test_source_of_rows() -> None:
    assert source_of(_hand_graph()).tolist() == [0, 1, -1]
