"""The block `graph`: the attribution graph of a prompt as JSON and as a page, and its scores in the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dictlearn.checks import check_count
from dictlearn.choices import is_number
from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.export import METADATA, listed_graphs, shown_nodes, summary, write_json
from dictlearn.circuits.graphs.graph import Graph
from dictlearn.circuits.graphs.influence import prune
from dictlearn.circuits.graphs.inputs import Choice, check_choices, chosen, n_logits_of, prompt_ids
from dictlearn.circuits.graphs.layers import layers_of
from dictlearn.circuits.graphs.page import write_page
from dictlearn.circuits.graphs.top_tokens import top_tokens
from dictlearn.circuits.parts import parts_of
from dictlearn.data.planted import PlantedModel
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import EvaluationContext, Sections
from dictlearn.types import DictlearnError

MOST_ROW_ERROR = 1e-3  # of the largest target
STEM_LENGTH, N_LABEL = 40, 3  # letters of a prompt in a file's name; promoted tokens in a latent's label


class PromptGraph:
    """All dictionaries together, on one prompt.

    Writes `<slug>.html`, `<slug>.json` and `graph-metadata.json` to `folder`; the slug is the beginning of the
    prompt, and six digits of the hash of it and of `targets`.

    Args:
        prompt: null: no graph.
        targets: see `attribution_graph`; null: the likeliest next tokens.
        max_latents, max_logits, logit_share, batch_size: see `attribution_graph`.
        node_share, edge_share: of influence, which pruning keeps; see `prune`.
    """

    def __init__(
        self,
        prompt: str | None,
        folder: str,
        targets: Sequence[Choice] | None = None,
        max_latents: int = 7500,
        max_logits: int = 10,
        logit_share: float = 0.95,
        node_share: float = 0.8,
        edge_share: float = 0.98,
        batch_size: int = 128,
    ) -> None:
        if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
            raise DictlearnError(f"graph must be the text of a prompt, or null, got {prompt!r}.")
        if targets is not None:
            check_choices(targets)
        for name, count in (("max_latents", max_latents), ("max_logits", max_logits), ("batch_size", batch_size)):
            check_count(name, count)
        for name, share in (("logit_share", logit_share), ("node_share", node_share), ("edge_share", edge_share)):
            if not is_number(share) or not 0 < share <= 1:
                raise DictlearnError(f"{name} must be above 0 and at most 1, got {share!r}.")
        self.prompt, self.folder = prompt, Path(folder)
        self.targets = (
            None if targets is None else [one if isinstance(one, str | int) else (*one,) for one in targets]
        )
        self.max_latents, self.max_logits, self.batch_size = max_latents, max_logits, batch_size
        self.logit_share, self.node_share, self.edge_share = logit_share, node_share, edge_share

    def problems(
        self,
        model: PreTrainedModel,
        lm_name: str,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        dictionaries: Mapping[str, Dictionary],
    ) -> list[str]:
        """Why there can be no graph, known without weights."""
        if self.prompt is None:
            return []
        if isinstance(model, PlantedModel):
            return ["planted activations come without a language model: leave graph out"]
        try:
            parts_of(model)
            layers_of(model, cuts_of(model, dictionaries))
            prompt_ids(model, tokenizer(), lm_name, dictionaries, self.prompt)
            if self.targets is not None:
                chosen(tokenizer(), n_logits_of(model), self.targets)
            listed_graphs(self.folder / METADATA)
        except DictlearnError as error:
            return [str(error)]
        return []

    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        if self.prompt is None:
            return {}
        lm, dictionaries = context.lm, context.dictionaries
        if found := self.problems(lm.model, lm.name, lambda: lm.tokenizer, dictionaries):
            raise DictlearnError(found[0])
        graph = attribution_graph(
            lm,
            dictionaries,
            self.prompt,
            self.targets,
            self.max_latents,
            self.max_logits,
            self.logit_share,
            self.batch_size,
        )
        kept = prune(graph, self.node_share, self.edge_share)
        latents = [node for node in shown_nodes(graph, kept) if node < graph.n_latents]
        tokens = top_tokens(lm, dictionaries, graph, latents)
        labels = {node: " ".join(token.strip() for token in own.promoted[:N_LABEL]) for node, own in tokens.items()}
        slug = slug_of(self.prompt, self.targets)
        files = {
            "page": write_page(graph, kept, self.folder / f"{slug}.html", tokens),
            "json": write_json(graph, kept, self.folder, slug, labels, self.node_share),
        }
        section = {
            "prompt": self.prompt,
            "dictionaries": list(graph.info["dictionaries"]),
            **summary(graph, kept),
            "node_share": self.node_share,
            "edge_share": self.edge_share,
            **{name: str(file) for name, file in files.items()},
        }
        return {name: {"graph": section, "warnings": _warnings(graph)} for name in dictionaries}


def _warnings(graph: Graph) -> list[str]:
    found = []
    if unknown := graph.info["unknown"]:
        found.append(
            f"{len(unknown)} tokens of the prompt are words that {graph.info['lm']} does not know, at positions "
            f"{', '.join(map(str, unknown))}: the graph is of unknown tokens there"
        )
    found += [f"target {doubt}" for doubt in graph.info["doubtful_targets"]]
    if (error := graph.info["row_error"]) > MOST_ROW_ERROR:
        found.append(f"edges add up to their targets within {error:.1%} alone, because of rounding")
    if graph.info["n_active"] > graph.n_latents:
        found.append(
            f"{graph.n_latents} of {graph.info['n_active']} active latents are nodes, and the graph's scores are "
            "theirs: see max_latents"
        )
    return found


def slug_of(prompt: str, targets: Sequence[Choice] | None = None) -> str:
    """A file name for a prompt and its targets, of its own."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:STEM_LENGTH].strip("-")
    text = prompt if targets is None else json.dumps([prompt, targets])
    digits = sha256(text.encode()).hexdigest()[:6]
    return f"{words}-{digits}" if words else digits
