"""An attribution graph as one HTML file that needs no server and no network; its parts are in viewer/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from dictlearn.circuits.graphs.export import edge_list, records, shown_nodes
from dictlearn.circuits.graphs.graph import Graph
from dictlearn.circuits.graphs.influence import Kept, edges_between, graph_scores, node_influence
from dictlearn.circuits.graphs.top_tokens import TopTokens
from dictlearn.evaluation.report import write_whole

DIGITS = 6  # of numbers in the page


def write_page(graph: Graph, kept: Kept, file: Path, top_tokens: Mapping[int, TopTokens] | None = None) -> Path:
    """Write what pruning kept as a page of its own.

    Args:
        top_tokens: of latents, by node.
    """
    environment = Environment(loader=PackageLoader("dictlearn.circuits.graphs", "viewer"), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    page = environment.get_template("page.html").render(data=page_data(graph, kept, top_tokens or {}))
    return write_whole(file, lambda path: path.write_text(page, encoding="utf-8"))


def page_data(graph: Graph, kept: Kept, top_tokens: Mapping[int, TopTokens]) -> dict[str, Any]:
    """What the page shows, in JSON's types. Edges are [place of the source in `nodes`, of the target, weight]."""
    shown = shown_nodes(graph, kept)
    place = {node: number for number, node in enumerate(shown)}
    scores = graph_scores(graph)
    edges = [[place[source], place[target], _short(w)] for source, target, w in edge_list(graph, kept)]
    kinds = graph.nodes["kind"].tolist()
    return {
        "prompt": graph.prompt,
        "lm": graph.info.get("lm", ""),
        "dictionaries": list(graph.info.get("dictionaries", [])),
        "n_per_layer": dict(graph.info["n_per_layer"]),
        "n_layers": graph.n_layers,
        "tokens": list(graph.tokens),
        "scores": {name: _short(value) for name, value in scores._asdict().items()},
        "counts": {
            "nodes": len(shown),
            "all_nodes": sum(kind not in ("bias", "other") for kind in kinds),
            "latents": sum(node < graph.n_latents for node in shown),
            "all_latents": int(graph.info.get("n_active", graph.n_latents)),
            "edges": len(edges),
            "all_edges": int((edges_between(graph) != 0).sum()),
        },
        "nodes": _nodes(graph, kept, shown, top_tokens),
        "edges": edges,
    }


def _nodes(
    graph: Graph, kept: Kept, shown: Sequence[int], top_tokens: Mapping[int, TopTokens]
) -> list[dict[str, Any]]:
    influence = node_influence(graph)
    share = (influence / influence.sum()).tolist()
    logits, rows = graph.places("logit"), _rows(graph, kept)
    found = []
    for node, own in zip(shown, records(graph, shown), strict=True):
        if own["kind"] == "logit":
            number = node - logits.start
            logit, weight = graph.logits[number], _short(float(graph.weights[number]))
            probabilities = [_short(p) for p in logit.probabilities]
            is_difference = logit.minus is not None
            own |= {"text": logit.text, "is_difference": is_difference, "probabilities": probabilities}
            own["weight"] = weight
            own["row"] = rows[graph.n_latents + number]
        else:
            own["influence"] = _short(share[node])
        if own["kind"] == "latent":
            own |= {"activation": _short(float(graph.values[node])), "row": rows[node]}
            tops = top_tokens.get(node, TopTokens([], []))
            own |= {"promoted": tops.promoted, "suppressed": tops.suppressed}
        found.append(own)
    return found


def _rows(graph: Graph, kept: Kept) -> list[dict[str, Any]]:
    """Of each target, what its edges that are not shown add up to: those pruned, biases, latents that are no nodes;
    with the kept edges they are `total`. `size`: the sum of absolute edges, but for biases and other latents.
    """
    between = edges_between(graph)
    pruned = between.masked_fill(kept.edges, 0)
    columns = {
        "total": graph.totals,
        "pruned": pruned.sum(-1),
        "bias": graph.edges[:, graph.places("bias")].sum(-1),
        "other": graph.edges[:, graph.places("other")].sum(-1),
        "size": between.abs().sum(-1),
    }
    numbers = {name: [_short(value) for value in column.tolist()] for name, column in columns.items()}
    numbers["n_pruned"] = (pruned != 0).sum(-1).tolist()
    return [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
