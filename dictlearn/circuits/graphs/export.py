"""Attribution graphs in the JSON layout that the viewer of circuit-tracer reads.

Its nodes are latents, errors, embeddings and logits; biases and the sum of other latents have no place there.
Latents are counted within their layer. What the layout has no place for, `dictlearn` in the metadata, the viewer
leaves alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dictlearn.circuits.graphs.graph import Graph
from dictlearn.circuits.graphs.influence import Kept, graph_scores, node_influence, source_of
from dictlearn.evaluation.report import write_whole
from dictlearn.types import DictlearnError, FormatError

METADATA = "graph-metadata.json"  # all graphs of a folder
SCHEMA_VERSION = 1
FEATURE_TYPES = {
    "latent": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "embedding": "embedding",
    "logit": "logit",
}
MARKS = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})  # for what cannot be seen


def write_json(
    graph: Graph,
    kept: Kept,
    folder: Path,
    slug: str,
    labels: Mapping[int, str] | None = None,
    node_share: float | None = None,
) -> Path:
    """Write what pruning kept as `folder/slug.json`, and list it, with the graph's scores, in
    `folder/graph-metadata.json`, beside the graphs that are there; one of the same slug is replaced.

    Args:
        labels: what the viewer shows of latents, by node.
        node_share: that of pruning, for the record.

    Raises DictlearnError for a slug that is no file name, and FormatError for a list of graphs that is none.
    """
    if not slug or Path(slug).name != slug:
        raise DictlearnError(f"slug must be the name of a file without .json, got {slug!r}.")
    metadata = _metadata(graph, kept, slug, node_share)
    listed = listed_graphs(folder / METADATA)
    others = [own for own in listed["graphs"] if not isinstance(own, Mapping) or own.get("slug") != slug]
    model = {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": _nodes(graph, shown_nodes(graph, kept), labels or {}),
        "links": _links(graph, kept),
    }
    file = write_whole(folder / f"{slug}.json", lambda path: _dump(model, path))
    write_whole(folder / METADATA, lambda path: _dump({**listed, "graphs": [*others, metadata]}, path))
    return file


def summary(graph: Graph, kept: Kept) -> dict[str, Any]:
    """A graph in numbers: its scores, which are those of the whole of it, and how much of it pruning kept."""
    scores, errors = graph_scores(graph), graph.places("error")
    return {
        "targets": [own.text for own in graph.logits],
        "target_probabilities": [own.probabilities for own in graph.logits],  # of a difference both
        "next_token": graph.info["next_token"],
        "probability": graph.info["probability"],
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "n_active": graph.info["n_active"],
        "n_latents": graph.n_latents,
        "row_error": graph.info["row_error"],
        "n_kept_latents": int(kept.nodes[: graph.n_latents].sum()),
        "n_kept_errors": int(kept.nodes[errors].sum()),
        "n_kept_edges": int(kept.edges.sum()),
    }


def shown_nodes(graph: Graph, kept: Kept) -> list[int]:
    """Latents, errors and embeddings that pruning kept, then logits."""
    (sources,) = kept.nodes.nonzero(as_tuple=True)
    logits = graph.places("logit")
    return [*sources.tolist(), *range(logits.start, logits.stop)]


def records(graph: Graph, nodes: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of `graph.nodes` in plain types, and of a latent, error, embedding or logit `in_layer`, its `index`,
    of a cross-layer transcoder's latents that among those of the same layer, and `id`, the viewer's name for it,
    unique in the graph.
    """
    found, n_per_layer = [], graph.info["n_per_layer"]
    for row in graph.nodes.iloc[list(nodes)].to_dict(orient="records"):
        layer = {"embedding": "E", "logit": str(graph.n_layers + 1)}.get(row["kind"], row["layer"])
        n = n_per_layer.get(row["dictionary"])
        in_layer = row["index"] if n is None else row["index"] % n
        names = {"in_layer": in_layer, "id": f"{layer}_{in_layer}_{row['position']}"}
        found.append({str(key): value for key, value in row.items()} | names)
    return found


def cumulative_influence(graph: Graph) -> Float[Tensor, " n_sources"]:
    """The share of all influence that a source and those with more of it have together."""
    found = node_influence(graph)
    order = found.argsort(descending=True, stable=True)
    shares = found[order].double().cumsum(0) / found.double().sum()
    return found.new_zeros(len(found)).index_copy(0, order, shares.to(found))


def edge_list(graph: Graph, kept: Kept) -> list[tuple[int, int, float]]:
    """Source, target and weight of the edges that pruning kept."""
    rows, sources = kept.edges.nonzero(as_tuple=True)
    targets, logits = source_of(graph), graph.places("logit")
    targets[graph.n_latents :] = targets.new_tensor(range(logits.start, logits.stop))
    weights = graph.edges[rows, sources]
    return list(zip(sources.tolist(), targets[rows].tolist(), weights.tolist(), strict=True))


def cantor(x: int, y: int) -> int:
    """One number for a pair of numbers from 0."""
    return (x + y) * (x + y + 1) // 2 + y


def _metadata(graph: Graph, kept: Kept, slug: str, node_share: float | None) -> dict[str, Any]:
    names = list(graph.info["dictionaries"])
    return {
        "slug": slug,
        "scan": f"custom-{'-'.join(names)}",
        "transcoder_list": names,
        "prompt_tokens": [token.translate(MARKS) for token in graph.tokens],
        "prompt": graph.prompt,
        "node_threshold": node_share,
        "schema_version": SCHEMA_VERSION,
        "dictlearn": summary(graph, kept) | {"n_per_layer": dict(graph.info["n_per_layer"])},
    }


def _nodes(graph: Graph, nodes: Sequence[int], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    influence = cumulative_influence(graph).tolist()
    rows = zip(nodes, records(graph, nodes), strict=True)
    return [_node(graph, node, row, influence, labels) for node, row in rows]


def _node(
    graph: Graph, node: int, row: Mapping[str, Any], influence: Sequence[float], labels: Mapping[int, str]
) -> dict[str, Any]:
    kind, layer, position, index = (row[key] for key in ("kind", "layer", "position", "in_layer"))
    found = {
        "node_id": row["id"],
        "feature": {"latent": cantor(max(layer, 0), max(index, 0)), "embedding": position}.get(kind, index),
        "layer": {"embedding": "E", "logit": str(graph.n_layers + 1)}.get(kind, str(layer)),
        "ctx_idx": position,
        "feature_type": FEATURE_TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": {
            "latent": f"{layer}_{index}-0",
            "error": f"{layer}_-1-{position}",
            "embedding": f"E_{index}-{position}",
            "logit": f"L_{index}-{position}",
        }[kind],
        "clerp": labels.get(node, ""),
        "influence": influence[node] if kind != "logit" else None,
        "activation": float(graph.values[node]) if kind == "latent" else None,
    }
    if kind == "logit":
        number = node - graph.places("logit").start
        own, weight = graph.logits[number], float(graph.weights[number])
        is_token = own.minus is None and own.probability is not None
        p = own.probability if is_token else weight  # the viewer reads one of every logit
        found |= {"token_prob": p, "is_target_logit": number == 0}
        found["clerp"] = f'Output "{own.text.translate(MARKS)}" (p={p:.3f})'
    return found


def _links(graph: Graph, kept: Kept) -> list[dict[str, Any]]:
    shown = shown_nodes(graph, kept)
    names = {node: row["id"] for node, row in zip(shown, records(graph, shown), strict=True)}
    return [
        {"source": names[source], "target": names[target], "weight": weight}
        for source, target, weight in edge_list(graph, kept)
    ]


def listed_graphs(file: Path) -> dict[str, Any]:
    """What a list of graphs says. Raises FormatError for another file."""
    if not file.exists():
        return {"graphs": []}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} must be a list of graphs in JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("graphs"), list):
        raise FormatError(f'{file} must be {{"graphs": [...]}}, got {str(found)[:60]}')
    return found


def _dump(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False), encoding="utf-8")
