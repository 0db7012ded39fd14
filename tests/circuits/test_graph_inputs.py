"""What a graph is of: models in bfloat16, targets of one's own, and graphs that are too large."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dictlearn import Scale, intervene
from dictlearn.circuits.graphs import build, local
from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.influence import graph_scores
from dictlearn.circuits.graphs.inputs import check_choices
from dictlearn.circuits.graphs.local import LocalModel
from dictlearn.circuits.surgery import NARROW, bytes_in_float32, in_float32
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import LM, load_lm
from dictlearn.types import DictlearnError
from tests.circuits.graphs_setup import N_LAYERS, cross_layer, some_ids, transcoders
from tests.tiny_lms import tiny_lm_folder


def narrow(folder: Path, family: str, maker: Any = transcoders) -> tuple[LM, dict[str, Dictionary]]:
    """A model in bfloat16 with dictionaries in float32."""
    lm = load_lm(str(tiny_lm_folder(folder, family, n_layers=N_LAYERS)), dtype="bfloat16")
    return lm, {name: d.float() for name, d in maker(lm.model).items()}


@pytest.fixture
def gpt2(tmp_path: Path) -> LM:
    found = load_lm(str(tiny_lm_folder(tmp_path, "gpt2", n_layers=N_LAYERS)))
    found.model.double()
    return found


# -- models in bfloat16 --


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_a_bfloat16_model_adds_up_as_in_float32(tmp_path: Path, family: str, maker: Any) -> None:
    lm, dictionaries = narrow(tmp_path, family, maker)
    graph = attribution_graph(lm, dictionaries, some_ids())
    assert graph.info["row_error"] < 1e-5
    off = (graph.edges.sum(-1) - graph.totals).abs().max() / graph.totals.abs().max()
    assert off < 1e-5
    found = graph.validate(30)
    assert (found["largest_difference"].to_numpy() < 1e-4 * float(graph.totals.abs().max())).all()
    wide = lm._replace(model=copy.deepcopy(lm.model).float())
    same = attribution_graph(wide, dictionaries, some_ids())
    assert torch.equal(graph.edges, same.edges)
    assert torch.equal(graph.totals, same.totals)


def test_the_model_itself_stays_as_it_is(tmp_path: Path) -> None:
    lm, dictionaries = narrow(tmp_path, "gpt2")
    before = {name: (own, own.clone()) for name, own in lm.model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        logits = lm.model(some_ids()).logits
    attribution_graph(lm, dictionaries, some_ids()).validate(2)
    after = lm.model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (own, values) in before.items():
        assert after[name] is own
        assert torch.equal(own, values)
    with torch.no_grad():
        assert torch.equal(lm.model(some_ids()).logits, logits)


def test_weights_are_back_after_an_error_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    model = narrow(tmp_path, "gpt2")[0].model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head is not None
    with pytest.raises(KeyError), in_float32(model):  # noqa: PT012
        assert head.weight.dtype == torch.float32
        assert head.weight is embedding.weight
        assert isinstance(head.weight, nn.Parameter)
        raise KeyError
    assert head.weight.dtype == torch.bfloat16
    assert head.weight is embedding.weight


def test_narrow_buffers_are_wide_inside_alone() -> None:
    module = nn.BatchNorm1d(3).bfloat16()
    before = dict(module.named_buffers())
    with in_float32(module):
        inside = dict(module.named_buffers())
        assert not any(isinstance(own, nn.Parameter) for own in inside.values())
    dtypes = {name: own.dtype for name, own in inside.items()}
    wide = torch.float32
    assert dtypes == {"running_mean": wide, "running_var": wide, "num_batches_tracked": torch.int64}
    after = dict(module.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is own for name, own in before.items())
    assert after["running_mean"].dtype == torch.bfloat16


def test_a_graph_lets_go_of_weights_and_decoder_rows(gpt2: LM) -> None:
    graph = attribution_graph(gpt2, transcoders(gpt2.model), some_ids(4), max_latents=5)
    assert graph.local is not None
    own = graph.local[0]
    assert "_graphs" not in vars(own)
    assert any(own._blocks)
    assert all(block.rows is None for blocks in own._blocks for block in blocks)
    assert (graph.validate(5)["largest_difference"].to_numpy() < 1e-9).all()  # which makes rows again


def test_under_autocast_a_graph_is_the_same(gpt2: LM) -> None:
    model = gpt2.model.float()
    dictionaries = {name: d.float() for name, d in transcoders(model).items()}
    plain = attribution_graph(gpt2, dictionaries, some_ids(4))
    with torch.autocast("cpu", torch.bfloat16):
        graph = attribution_graph(gpt2, dictionaries, some_ids(4))
        checked = graph.validate(10)
    assert torch.equal(graph.edges, plain.edges)
    assert checked.equals(plain.validate(10))


def saved_weights(of: Tensor, widths: set[int]) -> list[Tensor]:
    """Matrices of these sizes that a graph of gradients holds."""
    found, seen, left = [], set(), [of.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found += [one for one in own if isinstance(one, Tensor) and one.numel() in widths and one.ndim == 2]
    return found


def test_prefixes_of_the_prompt_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    lm, dictionaries = narrow(tmp_path, "gpt2")
    local_model = LocalModel(lm.model, dictionaries, some_ids(8))
    sizes = {w.numel() for name, w in lm.model.named_parameters() if "attn" in name and w.ndim == 2}
    by_prefix = [
        {weight.untyped_storage().data_ptr() for weight in saved_weights(graph.reads[-1], sizes)}
        for graph in local_model._graphs
    ]
    assert len(by_prefix) == 4
    assert len(by_prefix[0]) >= 2 * N_LAYERS  # of values and outputs
    assert all(own == by_prefix[0] for own in by_prefix)
    assert not any(weight.dtype in NARROW for weight in saved_weights(local_model._graphs[0].reads[-1], sizes))


def test_what_a_copy_in_float32_takes(tmp_path: Path) -> None:
    model = narrow(tmp_path, "gpt2")[0].model  # with tied embeddings
    expected = 4 * sum(own.numel() for own in model.parameters())
    assert bytes_in_float32(model) == expected
    with in_float32(model):
        assert bytes_in_float32(model) == 0


def test_narrow_dictionaries_are_refused(tmp_path: Path) -> None:
    lm, dictionaries = narrow(tmp_path, "gpt2")
    dictionaries["mlp.1"].bfloat16()
    with pytest.raises(DictlearnError, match=r"float32 or float64, mlp\.1 is in torch\.bfloat16: take its float"):
        attribution_graph(lm, dictionaries, some_ids())


# -- targets of one's own --


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_rows_of_chosen_targets_add_up(tmp_path: Path, family: str, maker: Any) -> None:
    lm = load_lm(str(tiny_lm_folder(tmp_path, family, n_layers=N_LAYERS)))
    lm.model.double()
    dictionaries, ids = maker(lm.model), some_ids()
    graph = attribution_graph(lm, dictionaries, ids, ["w5", 7, ("w5", 9), [7, "w6"]])
    torch.testing.assert_close(graph.edges.sum(-1), graph.totals, atol=1e-9, rtol=1e-9)
    assert [own.text for own in graph.logits] == ["w5", "w7", "w5 - w9", "w7 - w6"]
    assert graph.weights.tolist() == [0.25] * 4
    with torch.no_grad():
        logits = lm.model(ids).logits[0, -1]
    p = logits.softmax(-1).tolist()
    expected = [[p[5]], [p[7]], [p[5], p[9]], [p[7], p[6]]]
    assert [own.probabilities for own in graph.logits] == [*map(pytest.approx, expected)]
    if family != "gemma2":  # whose logits have a softcap
        above = logits - logits.mean()
        expected = torch.stack([above[5], above[7], logits[5] - logits[9], logits[7] - logits[6]])
        torch.testing.assert_close(graph.totals[-4:], expected, atol=1e-5, rtol=1e-5)
    apart = attribution_graph(lm, dictionaries, ids, [5, 9, 7, 6])
    rows = apart.edges[apart.n_latents :]
    torch.testing.assert_close(graph.edges[-2:], rows[[0, 2]] - rows[[1, 3]], atol=1e-10, rtol=1e-8)
    assert (graph.validate(30)["largest_difference"].to_numpy() < 1e-9).all()


def test_an_intervention_moves_a_difference_by_its_edges(gpt2: LM) -> None:
    """In the model itself, with all but direct effects held."""
    dictionaries, ids = transcoders(gpt2.model), some_ids()
    graph = attribution_graph(gpt2, dictionaries, ids, [(5, 9), 7])
    nodes, largest = graph.nodes.to_dict("records"), 0.0
    for source in range(0, graph.n_latents, 5):
        node = nodes[source]
        twice = {node["dictionary"]: Scale(node["index"], 2.0, positions=[node["position"]])}
        with intervene(gpt2, dictionaries, twice, error="frozen", freeze="direct") as run:
            change = (run(ids).logits - run.clean.logits)[0, -1]
        expected = torch.stack([change[5] - change[9], change[7] - change.mean()])
        torch.testing.assert_close(graph.edges[-2:, source], expected, atol=1e-9, rtol=1e-7)
        largest = max(largest, float(expected.abs().max()))
    assert largest > 1e-2


def test_the_likeliest_tokens_by_name_are_the_same_graph(gpt2: LM) -> None:
    dictionaries = transcoders(gpt2.model)
    plain = attribution_graph(gpt2, dictionaries, some_ids(), max_logits=3)
    named = attribution_graph(gpt2, dictionaries, some_ids(), [own.text for own in plain.logits])
    assert torch.equal(named.edges, plain.edges)
    assert named.nodes.equals(plain.nodes)
    assert [own.token for own in named.logits] == [own.token for own in plain.logits]
    assert [own.probability for own in named.logits] == pytest.approx([own.probability for own in plain.logits])
    assert plain.weights.tolist() == [own.probability for own in plain.logits]
    assert graph_scores(named) != graph_scores(plain)  # because each counts the same


def test_targets_decide_which_latents_are_nodes(gpt2: LM) -> None:
    """With one node, that of the largest direct effect on the target."""
    dictionaries, tokens = transcoders(gpt2.model), [*range(2, 97)]
    whole = attribution_graph(gpt2, dictionaries, some_ids(), [*tokens, (5, 9)])
    best = whole.edges[whole.n_latents :, : whole.n_latents].abs().argmax(-1).tolist()
    first = {node: place for place, node in enumerate(best[:-1])}  # a token for each latent that is one's best
    assert len(first) > 1
    for place in (*list(first.values())[:3], -1):
        target = (5, 9) if place == -1 else tokens[place]
        one = attribution_graph(gpt2, dictionaries, some_ids(), [target], max_latents=1)
        assert one.nodes.iloc[0].equals(whole.nodes.iloc[best[place]])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["w5 w6"], "A target is one token, 'w5 w6' is 2: 'w5', 'w6'"),
        ([""], "A target is one token, '' is 0: nothing"),
        (["never"], "The tokenizer does not know the target 'never'"),
        ([97], "A target as token id must be from 0 to 96, got 97"),
        ([-1], "A target as token id must be from 0 to 96, got -1"),
        ([("w5", 5)], "The difference of 'w5' with itself is zero"),
        ([5, "w5"], "Each target is named once, 'w5' is there twice"),
    ],
)
def test_targets_that_cannot_be_had(gpt2: LM, targets: Any, message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        attribution_graph(gpt2, transcoders(gpt2.model), some_ids(), targets)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("w5", "targets must be a list of tokens, or null, got 'w5'"),
        ([], r"targets must be a list of tokens, or null, got \[\]"),
        (5, "targets must be a list of tokens, or null, got 5"),
        ([5.0], "A target is a token, as text or id, or a pair of them .*, got 5.0"),
        ([5, True], "A target is a token, .* got True"),
        ([("w5", "w6", "w7")], "A target is a token, .* or a pair"),
        ([("w5", None)], "A target is a token, .* or a pair"),
    ],
)
def test_what_targets_are(targets: Any, message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        check_choices(targets)


# -- memory --


@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_blocks_of_decoder_rows_change_nothing(gpt2: LM, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionaries = maker(gpt2.model)
    plain = attribution_graph(gpt2, dictionaries, some_ids())
    for block, kept in ((1, 0), (16 * 30, 0), (16 * 30, 16 * 40), (2**25, 0)):
        monkeypatch.setattr(local, "BLOCK_ELEMENTS", block)
        monkeypatch.setattr(local, "KEPT_ELEMENTS", kept)
        graph = attribution_graph(gpt2, dictionaries, some_ids())
        torch.testing.assert_close(graph.edges, plain.edges, atol=1e-12, rtol=1e-12)
        blocks = LocalModel(gpt2.model, dictionaries, some_ids())._blocks
        made = [one.rows for own in blocks for one in own]
        assert any(rows is None for rows in made)
        assert sum(rows.numel() for rows in made if rows is not None) <= kept
        if block == 1:
            assert len(made) == N_LAYERS * 7  # a position each
        assert (graph.validate(20)["largest_difference"].to_numpy() < 1e-9).all()


def test_a_graph_that_is_too_large_is_refused_before_edges(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionaries = transcoders(gpt2.model)
    graph = attribution_graph(gpt2, dictionaries, some_ids(), max_latents=10, batch_size=4)
    n_active, n_sources = graph.info["n_active"], graph.info["n_active"] + (N_LAYERS + 1) * 7
    assert n_active > 50
    n_elements = (graph.n_logits + 10) * n_sources + graph.edges.numel() + 2 * 4 * n_sources
    monkeypatch.setattr(build, "memory_of", lambda _: 8 * n_elements)
    attribution_graph(gpt2, dictionaries, some_ids(), max_latents=10, batch_size=4)
    monkeypatch.setattr(LocalModel, "edges", None)
    message = rf"with 11 of {n_active} active latents .* with batch_size=4, max_latents=10 would fit"
    with pytest.raises(DictlearnError, match=message):
        attribution_graph(gpt2, dictionaries, some_ids(), max_latents=11, batch_size=4)


def test_the_float32_copy_of_a_narrow_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, dictionaries = narrow(tmp_path, "gpt2")
    copied = 4 * sum(own.numel() for own in lm.model.parameters())
    graph = attribution_graph(lm, dictionaries, some_ids(), max_latents=10, batch_size=4)
    n_sources = graph.info["n_active"] + (N_LAYERS + 1) * 7
    needed = 4 * ((graph.n_logits + 10 + 2 * 4) * n_sources + graph.edges.numel()) + copied
    monkeypatch.setattr(build, "memory_of", lambda _: needed)
    attribution_graph(lm, dictionaries, some_ids(), max_latents=10, batch_size=4)
    with pytest.raises(DictlearnError, match="max_latents=10 would fit"):
        attribution_graph(lm, dictionaries, some_ids(), max_latents=11, batch_size=4)
    monkeypatch.setattr(build, "memory_of", lambda _: copied)
    with pytest.raises(DictlearnError, match=r"GB on cpu: none would fit\."):
        attribution_graph(lm, dictionaries, some_ids(), max_latents=10, batch_size=4)


def test_the_memory_of_this_machine_is_known() -> None:
    assert build.memory_of(torch.device("cpu")) > 2**28
