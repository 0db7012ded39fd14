"""Graphs as JSON for circuit-tracer's viewer, and the top tokens of latents."""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from dictlearn import Set, attach, intervene
from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.export import cantor, shown_nodes, write_json
from dictlearn.circuits.graphs.graph import Graph
from dictlearn.circuits.graphs.influence import Kept, graph_scores, node_influence, prune
from dictlearn.circuits.graphs.top_tokens import top_tokens
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.lm import LM, load_lm
from dictlearn.types import DictlearnError, FormatError
from tests.circuits.graphs_setup import N_LAYERS, cross_layer, some_ids, transcoders
from tests.tiny_lms import tiny_lm_folder

NODE = {  # what the viewer reads of a node
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
    "influence": (float, type(None)),
    "activation": (float, type(None)),
}
METADATA = {
    "slug": str,
    "scan": str,
    "transcoder_list": list,
    "prompt_tokens": list,
    "prompt": str,
    "node_threshold": float,
    "schema_version": int,
    "dictlearn": dict,
}


def load(folder: Path, family: str = "gpt2") -> LM:
    found = load_lm(str(tiny_lm_folder(folder, family, n_layers=N_LAYERS)))
    found.model.double()
    return found


def has_types(values: dict[str, Any], types: dict[str, Any]) -> bool:
    return list(values) == list(types) and all(isinstance(values[key], types[key]) for key in types)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Graph, Kept]:
    lm = load(tmp_path / "lm")
    graph = attribution_graph(lm, transcoders(lm.model), some_ids())
    return graph, prune(graph, 0.7, 0.9)


def test_the_layout(made: tuple[Graph, Kept], tmp_path: Path) -> None:
    graph, kept = made
    assert not kept.nodes.all()
    labels = {shown_nodes(graph, kept)[0]: "a label"}
    file = write_json(graph, kept, tmp_path / "out", "a-b", labels, node_share=0.7)
    assert file == tmp_path / "out" / "a-b.json"
    model = json.loads(file.read_text(encoding="utf-8"))
    assert list(model) == ["metadata", "qParams", "nodes", "links"]
    assert has_types(model["metadata"], METADATA)
    assert model["metadata"]["prompt_tokens"] == graph.tokens
    assert list(model["qParams"]) == ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"]
    assert all(has_types(node, NODE) for node in model["nodes"])
    assert json.loads((tmp_path / "out" / "graph-metadata.json").read_text()) == {"graphs": [model["metadata"]]}

    names = [node["node_id"] for node in model["nodes"]]
    assert len(set(names)) == len(names) == int(kept.nodes.sum()) + graph.n_logits
    assert len({node["jsNodeId"] for node in model["nodes"] if node["feature"] < 0}) == sum(
        node["feature_type"] == "mlp reconstruction error" for node in model["nodes"]
    )
    assert {end for link in model["links"] for end in (link["source"], link["target"])} <= set(names)
    assert len(model["links"]) == int(kept.edges.sum())
    assert model["nodes"][0]["clerp"] == "a label"


def test_nodes_and_links_are_those_of_the_graph(made: tuple[Graph, Kept], tmp_path: Path) -> None:
    graph, kept = made
    model = json.loads(write_json(graph, kept, tmp_path, "g").read_text(encoding="utf-8"))
    table = graph.nodes.reset_index(names="node").set_index(["kind", "layer", "position", "index"]).node
    types = {"cross layer transcoder": "latent", "mlp reconstruction error": "error"}
    place: dict[str, int] = {}
    for node in model["nodes"]:
        kind = str(types.get(node["feature_type"], node["feature_type"]))
        written, index, position = node["node_id"].rsplit("_", 2)
        layer = {"embedding": "-1", "logit": str(N_LAYERS)}.get(kind) or written
        place[node["node_id"]] = own = int(table[kind, int(layer), int(position), int(index)])
        assert node["ctx_idx"] == int(position)
        if kind == "latent":
            assert node["activation"] == pytest.approx(float(graph.values[own]))
            assert uncantor(node["feature"]) == (int(layer), int(index))
            assert node["layer"] == written
        if kind == "logit":
            number = own - graph.places("logit").start
            assert node["token_prob"] == pytest.approx(float(graph.weights[number]))
            assert node["is_target_logit"] == (number == 0)
            assert node["clerp"] == f'Output "{graph.logits[number].text}" (p={node["token_prob"]:.3f})'
            assert (node["layer"], node["influence"]) == (str(N_LAYERS + 1), None)
        else:
            influence = node_influence(graph)
            more = influence[influence >= influence[own]].sum() / influence.sum()
            assert node["influence"] == pytest.approx(float(more))
    for link in model["links"]:
        target = place[link["target"]]
        row = target if target < graph.n_latents else target - len(graph.nodes)
        assert link["weight"] == pytest.approx(float(graph.edges[row, place[link["source"]]]))


def uncantor(z: int) -> tuple[int, int]:
    """The pair that a number stands for: z = (x + y)(x + y + 1) / 2 + y."""
    along = (isqrt(8 * z + 1) - 1) // 2
    y = z - along * (along + 1) // 2
    return along - y, y


def test_cantor() -> None:
    pairs = [(x, y) for x in range(30) for y in range(30)]
    assert [uncantor(cantor(*pair)) for pair in pairs] == pairs
    assert [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 0)] == [0, 1, 2, 3]


def test_graphs_of_one_folder_are_listed_together(made: tuple[Graph, Kept], tmp_path: Path) -> None:
    for slug, share in (("a", 0.1), ("b", 0.2), ("a", 0.3)):
        write_json(*made, tmp_path, slug, node_share=share)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    scores = [(own["dictlearn"]["replacement"], own["dictlearn"]["completeness"]) for own in listed]
    assert scores == [pytest.approx(tuple(graph_scores(made[0])))] * 2
    assert [(own["slug"], own["node_threshold"]) for own in listed] == [("b", 0.2), ("a", 0.3)]
    for text in ("[]", "{", '{"graphs": 3}'):
        (tmp_path / "graph-metadata.json").write_text(text)
        with pytest.raises(FormatError, match=r"graph-metadata\.json must be"):
            write_json(*made, tmp_path, "c")
        assert not (tmp_path / "c.json").exists()
    for slug in ("", "a/b", "../a"):
        with pytest.raises(DictlearnError, match="slug must be the name of a file"):
            write_json(*made, tmp_path, slug)


def test_latents_of_a_cross_layer_transcoder_are_counted_within_their_layer(tmp_path: Path) -> None:
    """As in circuit-tracer; and from a node of the file to the latent that interventions set."""
    lm = load(tmp_path / "lm")
    clt = cross_layer(lm.model)["clt"]
    assert isinstance(clt, CrossLayer)
    ids = some_ids()
    graph = attribution_graph(lm, {"clt": clt}, ids)
    model = json.loads(write_json(graph, prune(graph, 1.0, 1.0), tmp_path, "g").read_text(encoding="utf-8"))
    n = model["metadata"]["dictlearn"]["n_per_layer"]["clt"]
    assert n == clt.n_per_layer
    shown = [node for node in model["nodes"] if node["feature_type"] == "cross layer transcoder"]
    with attach(lm, {"clt": clt}) as run:
        run(ids)
    for node in shown:
        layer, index, position = map(int, node["node_id"].split("_"))
        assert index < n
        assert uncantor(node["feature"]) == (layer, index)
        assert node["jsNodeId"] == f"{layer}_{index}-0"
        number = layer * n + index  # as docs/graphs.md says
        value = run.latents["clt"][0, position, number]
        assert node["activation"] == pytest.approx(value.item(), abs=1e-5)
    assert {node["layer"] for node in shown} == {"0", "1", "2"}
    assert len({node["node_id"] for node in model["nodes"]}) == len(model["nodes"])

    layer, index, position = map(int, shown[-1]["node_id"].split("_"))
    with intervene(lm, {"clt": clt}, {"clt": Set(layer * n + index, 0.0, positions=[position])}) as changed:
        changed(ids)
    before, after = run.latents["clt"], changed.latents["clt"]
    (moved,) = ((before - after)[:, :, layer * n : (layer + 1) * n].abs() > 1e-9).nonzero().tolist()
    assert moved == [0, position, index]


def test_a_difference_of_logits_has_a_place_in_the_layout(tmp_path: Path) -> None:
    lm = load(tmp_path / "lm")
    graph = attribution_graph(lm, transcoders(lm.model), some_ids(), ["w5", ("w5", "w6"), ("w7", "w5")])
    model = json.loads(write_json(graph, prune(graph), tmp_path, "g").read_text(encoding="utf-8"))
    assert all(has_types(node, NODE) for node in model["nodes"])
    logits = [node for node in model["nodes"] if node["feature_type"] == "logit"]
    assert [node["feature"] for node in logits] == [5, 98, 99]  # beyond the 97 tokens, as in circuit-tracer
    assert len({node["node_id"] for node in model["nodes"]}) == len(model["nodes"])
    probability = graph.logits[0].probability
    assert probability is not None
    assert [node["token_prob"] for node in logits] == pytest.approx([probability, 1 / 3, 1 / 3])
    assert logits[1]["clerp"] == 'Output "w5 - w6" (p=0.333)'  # the viewer reads what follows "(p="
    own = model["metadata"]["dictlearn"]
    assert own["targets"] == ["w5", "w5 - w6", "w7 - w5"]
    assert own["target_probabilities"] == [logit.probabilities for logit in graph.logits]
    assert [len(probabilities) for probabilities in own["target_probabilities"]] == [1, 2, 2]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("maker", [transcoders, cross_layer])
def test_top_tokens(tmp_path: Path, family: str, maker: Any) -> None:
    """Against the decoder rows, the final norm's parameters and the unembedding of the model."""
    lm = load(tmp_path, family)
    norm = {"gpt2": "transformer.ln_f", "gemma2": "model.norm"}[family]
    gain = lm.model.get_submodule(norm).get_parameter("weight")
    torch.nn.init.normal_(gain)
    dictionaries = maker(lm.model)
    graph = attribution_graph(lm, dictionaries, some_ids())
    found = top_tokens(lm, dictionaries, graph, range(1, graph.n_latents, 2), n=3)
    assert list(found) == [*range(1, graph.n_latents, 2)]
    names, indices = (graph.nodes[key].tolist() for key in ("dictionary", "index"))
    head = lm.model.get_submodule("lm_head").get_parameter("weight")
    for node, tokens in found.items():
        name, index = names[node], indices[node]
        d = dictionaries[name]
        row = d.W_dec[index] / (d.write_scale.unsqueeze(-1) if isinstance(d, CrossLayer) else d.write_scale)
        row = row.sum(0) if isinstance(d, CrossLayer) else row
        read = (row - row.mean()) * gain if family == "gpt2" else row * (1 + gain)
        order = (head @ read).argsort(descending=True).tolist()
        texts = [lm.tokenizer.decode([token]) for token in order if token not in lm.tokenizer.all_special_ids]
        assert tokens.promoted == texts[:3]
        assert tokens.suppressed == texts[:-4:-1]


def test_top_tokens_of_nothing(tmp_path: Path) -> None:
    lm = load(tmp_path)
    graph = attribution_graph(lm, transcoders(lm.model), some_ids())
    assert top_tokens(lm, transcoders(lm.model), graph, []) == {}
    with pytest.raises(DictlearnError, match="n must be a whole number"):
        top_tokens(lm, transcoders(lm.model), graph, [0], n=0)
