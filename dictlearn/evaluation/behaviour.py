"""The block `behaviour`: what the LM predicts with a dictionary's reconstruction in place of the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import (
    EvaluationContext,
    RowBatch,
    Sections,
    chunk_tokens,
    reconstruct,
    site_means,
)
from dictlearn.lm.taps import capture, edit
from dictlearn.metrics.behaviour import CrossEntropy, KLDivergence
from dictlearn.types import DictlearnError

NEAR_ZERO = 1e-5  # nats: an ablation that changes less than this is no yardstick


class RunKey(NamedTuple):
    """One way to replace activations; dictionaries with the same write sites share their ablations."""

    kind: Literal["rec", "zero", "mean"]
    what: str | tuple[str, ...]  # the dictionary's name, or the write sites


class Behaviour:
    """Cross-entropy and KL(clean || patched) of the next token, in nats, over all counted predictions.

    The activations of the write sites are replaced at the counted positions (mask True) and nowhere else, in
    three ways: by the reconstruction, by zero, by their mean over the counted held-out tokens. The dictionary
    reads the activations of the clean forward; nothing upstream of a single write site changes, so there they are
    those of the patched forward too. A prediction counts where the token it predicts does: position t if
    mask[t + 1]. Recovered = (ablated - rec) / (ablated - clean), of the means over all predictions, never clipped.

    Args:
        n_tokens: evaluate on the first rows that hold so many tokens.
    """

    def __init__(self, n_tokens: int = 65_536) -> None:
        if n_tokens < 1:
            raise DictlearnError(f"behaviour needs n_tokens of at least 1, got {n_tokens}.")
        self.n_tokens = n_tokens

    @torch.inference_mode()
    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        n_rows = context.rows_of(self.n_tokens)
        if not context.mask[:n_rows, 1:].any():
            raise DictlearnError(f"No token is predicted in the first {n_rows} rows: all are masked.")
        means = site_means(context, [site for d in context.dictionaries.values() for site in d.writes])
        clean_ce = CrossEntropy().to(context.lm.device)
        scores: dict[RunKey, Score] = {}
        for batch in context.batches("behaviour", n_rows):
            clean, reads = _clean_run(context, batch)
            predictions = _Predictions.of(batch, vocab=clean.shape[-1])
            for logits, next_tokens in predictions.select(clean):
                clean_ce.update(logits, next_tokens)
            for key, values in _replacements(context.dictionaries, reads, means):
                score = scores.setdefault(key, Score.on(context.lm.device))
                _add_patched_run(score, context, batch, values, clean, predictions)
        counts = {
            "n_tokens": int(clean_ce.n_predictions),
            "n_replaced": int(context.mask[:n_rows].sum()),
        }
        ce_clean = float(clean_ce.compute())
        sections: dict[str, Sections] = {}
        for name, d in context.dictionaries.items():
            keys = [RunKey("rec", name), RunKey("zero", d.writes), RunKey("mean", d.writes)]
            values, warnings = summary(ce_clean, {key.kind: scores[key] for key in keys})
            sections[name] = {"behaviour": values | counts, "warnings": warnings}
        return sections


class Score(NamedTuple):
    """What is accumulated over the runs of one replacement."""

    ce: CrossEntropy
    kl: KLDivergence

    @staticmethod
    def on(device: torch.device) -> Score:
        return Score(CrossEntropy().to(device), KLDivergence().to(device))


class _Predictions(NamedTuple):
    """The counted predictions of a batch, in chunks: row, position, token at position + 1, each `[n]`."""

    chunks: list[tuple[Tensor, Tensor, Tensor]]

    @staticmethod
    def of(batch: RowBatch, vocab: int) -> _Predictions:
        rows, positions = batch.mask[:, 1:].nonzero(as_tuple=True)  # [n_predictions] each
        parts = (index.split(chunk_tokens(vocab)) for index in (rows, positions, batch.tokens[rows, positions + 1]))
        return _Predictions(list(zip(*parts, strict=True)))

    def select(self, logits: Float[Tensor, "rows ctx vocab"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Per chunk: logits `[n, vocab]` and the tokens they predict `[n]`."""
        for rows, positions, next_tokens in self.chunks:
            yield logits[rows, positions], next_tokens


def _clean_run(context: EvaluationContext, batch: RowBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[rows, ctx, vocab]`, and the activations of all read sites at counted positions `[n_counted, d]`."""
    reads = dict.fromkeys(site for d in context.dictionaries.values() for site in d.reads)
    with capture(context.lm.model, [context.sites[name] for name in reads]) as acts:
        logits = context.lm.model(input_ids=batch.tokens, use_cache=False).logits
    return logits, {name: acts[name][batch.mask] for name in reads}


def _replacements(
    dictionaries: Mapping[str, Dictionary], reads: Mapping[str, Tensor], means: Mapping[str, Tensor]
) -> Iterator[tuple[RunKey, dict[str, Tensor]]]:
    """Every distinct run with its values by write site, `[n_counted, d]` or `[d]`."""
    for name, d in dictionaries.items():
        recon = torch.cat([part for _, part in reconstruct(d, d.select_reads(reads))])
        yield RunKey("rec", name), d.split_writes(recon)
    for writes in dict.fromkeys(d.writes for d in dictionaries.values()):
        yield RunKey("zero", writes), {site: torch.zeros_like(means[site]) for site in writes}
        yield RunKey("mean", writes), {site: means[site] for site in writes}


def _add_patched_run(
    score: Score,
    context: EvaluationContext,
    batch: RowBatch,
    values: Mapping[str, Tensor],
    clean: Float[Tensor, "rows ctx vocab"],
    predictions: _Predictions,
) -> None:
    """Run the LM with `values` at the counted positions of their sites and add what it predicts to `score`."""
    edits = {context.sites[name]: _replace(batch.mask, value) for name, value in values.items()}
    with edit(context.lm.model, edits):
        patched = context.lm.model(input_ids=batch.tokens, use_cache=False).logits
    pairs = zip(predictions.select(clean), predictions.select(patched), strict=True)
    for (clean_logits, _), (logits, next_tokens) in pairs:
        score.ce.update(logits, next_tokens)
        score.kl.update(clean_logits, logits)


def _replace(mask: Bool[Tensor, "rows ctx"], value: Float[Tensor, "*n_counted d"]) -> Callable[[Tensor], Tensor]:
    def replaced(acts: Float[Tensor, "rows ctx d"]) -> Float[Tensor, "rows ctx d"]:
        acts = acts.clone()
        acts[mask] = value.to(acts.dtype)
        return acts

    return replaced


def summary(ce_clean: float, scores: Mapping[str, Score]) -> tuple[dict[str, float | None], list[str]]:
    """The numbers of one dictionary from its runs `rec`, `zero` and `mean`, and warnings about them."""
    ce = {kind: float(score.ce.compute()) for kind, score in scores.items()}
    kl = {kind: float(score.kl.compute()) for kind, score in scores.items()}
    values: dict[str, float | None] = {"ce_clean": ce_clean}
    values |= {f"ce_{kind}": value for kind, value in ce.items()}
    values["delta_ce"] = ce["rec"] - ce_clean
    values |= {f"kl_{kind}": value for kind, value in kl.items()}
    warnings: list[str] = []
    for ablation in ("zero", "mean"):
        for metric, clean, runs in (("ce", ce_clean, ce), ("kl", 0.0, kl)):
            cost, name = runs[ablation] - clean, f"{metric}_recovered_{ablation}"
            if abs(cost) < NEAR_ZERO:
                values[name] = None
                warnings.append(
                    f"behaviour.{name} is null: {ablation} ablation changes {metric} by {cost:.1e} nats"
                )
                continue
            values[name] = (runs[ablation] - runs["rec"]) / cost
            if cost < 0:
                warnings.append(f"behaviour.{name}: {ablation} ablation lowers the loss, so it is no yardstick")
    return values, warnings
