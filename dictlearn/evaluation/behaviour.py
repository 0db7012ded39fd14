"""The block `behaviour`: what the LM predicts with a dictionary's reconstruction in place of the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dictlearn.choices import is_count
from dictlearn.evaluation.context import (
    EvaluationContext,
    MaskKey,
    RowBatch,
    Sections,
    chunk_tokens,
    reconstruct,
    target_means,
)
from dictlearn.evaluation.sections import per_position
from dictlearn.lm.taps import capture, edit
from dictlearn.metrics.behaviour import cross_entropy, kl_divergence, log_probs, top1_agrees
from dictlearn.metrics.ratio import Places, TokenRatio, clustered_stderr
from dictlearn.types import DictlearnError

NEAR_ZERO = 1e-5  # nats: an ablation that changes less than this is no yardstick
NOISE = 2.0  # nor one whose change of the loss is less than so many of its standard errors
Scores = dict[str, TokenRatio]  # `ce`, `kl` and, of reconstructions, `top1`: means over predictions


Kind = Literal["rec", "zero", "mean"]
ABLATIONS: tuple[Kind, ...] = ("zero", "mean")
KINDS: tuple[Kind, ...] = ("rec", *ABLATIONS)


class RunKey(NamedTuple):
    """One way to replace activations; dictionaries that write the same sites and count the same tokens share their
    ablations.
    """

    kind: Kind
    what: str | tuple[str, ...]  # the dictionary's name, or the write sites
    mask_key: MaskKey


class Behaviour:
    """Cross-entropy and KL(clean || patched) of the next token, in nats, over all counted predictions.

    The activations of the write sites are replaced at the counted positions and nowhere else, in three ways: by the
    reconstruction, by zero, by their mean over the counted held-out tokens. The dictionary reads the activations of
    the clean forward; nothing upstream of a single write site changes, so there they are those of the patched
    forward too. A prediction counts where the token it predicts does: position t if t + 1 is counted.
    Recovered = (ablated - rec) / (ablated - clean), of the means over all predictions, never clipped.
    Standard errors are clustered by row, those of differences and recovered shares are paired (see `TokenRatio`).

    Args:
        n_tokens: evaluate on the first rows that hold so many tokens, masked ones included.
    """

    def __init__(self, n_tokens: int = 65_536) -> None:
        if not is_count(n_tokens, 1):
            raise DictlearnError(f"n_tokens must be a whole number of at least 1, got {n_tokens!r}.")
        self.n_tokens = n_tokens

    @torch.inference_mode()
    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        if context.planted is not None:
            why = "behaviour is left out: planted activations come without a language model"
            return {name: {"warnings": [why]} for name in context.dictionaries}
        n_rows = context.rows_of(self.n_tokens)
        for key, mask in context.masks.items():
            if not mask[:n_rows, 1:].any():
                at = f" after the norm filter at {', '.join(key)}" if key else ""
                raise DictlearnError(f"No token is predicted in the first {n_rows} rows: all are masked{at}.")
        means = target_means(context)
        shape = (n_rows, context.tokens.shape[1] - 1)
        clean = {key: _scores(("ce",), shape, context) for key in context.masks}
        patched: dict[RunKey, Scores] = {}
        for batch in context.batches("behaviour", n_rows):
            logits, reads = _clean_run(context, batch)
            chunks = list(_chunks(batch, logits))
            del logits
            for chunk in chunks:
                ce = cross_entropy(chunk.log_p, chunk.next_tokens)
                for key, scores in clean.items():
                    chunk.add(scores, key, {"ce": ce})
            for run_key, values in _replacements(context, batch, reads, means):
                metrics = ("ce", "kl", "top1") if run_key.kind == "rec" else ("ce", "kl")
                scores = patched.setdefault(run_key, _scores(metrics, shape, context))
                logits = _patched_logits(context, batch, values, batch.masks[run_key.mask_key])
                for chunk in chunks:
                    chunk.add(scores, run_key.mask_key, chunk.compare(logits, metrics))
        sections: dict[str, Sections] = {}
        for name, d in context.dictionaries.items():
            key = context.mask_key(name)
            runs: dict[Kind, Scores] = {kind: patched[_run_key(kind, name, d.writes, key)] for kind in KINDS}
            values, warnings = summary(clean[key]["ce"], runs)
            counts = {"n_replaced": int(context.masks[key][:n_rows].sum()), "n_rows": n_rows}
            sections[name] = {"behaviour": values | counts, "warnings": warnings}
        return sections


def _run_key(kind: Kind, name: str, writes: tuple[str, ...], mask_key: MaskKey) -> RunKey:
    return RunKey(kind, name if kind == "rec" else writes, mask_key)


def _scores(metrics: tuple[str, ...], shape: tuple[int, int], context: EvaluationContext) -> Scores:
    return {metric: TokenRatio(*shape).to(context.lm.device) for metric in metrics}


class _Chunk(NamedTuple):
    """Some predictions of a batch: that of token `[row, position + 1]` from `[row, position]`.

    `counted`: which of them count, by mask key; `log_p`: what the clean LM predicts.
    """

    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    next_tokens: Int[Tensor, " n"]
    places: Places
    counted: dict[MaskKey, Bool[Tensor, " n"]]
    log_p: Float[Tensor, "n vocab"]

    def compare(self, patched: Float[Tensor, "rows ctx vocab"], metrics: tuple[str, ...]) -> dict[str, Tensor]:
        """Every metric of the patched LM's predictions, `[n]` each."""
        log_q = log_probs(patched[self.rows, self.positions])
        values = {"ce": cross_entropy(log_q, self.next_tokens), "kl": kl_divergence(self.log_p, log_q)}
        return values | ({"top1": top1_agrees(self.log_p, log_q)} if "top1" in metrics else {})

    def add(self, scores: Scores, key: MaskKey, values: Mapping[str, Tensor]) -> None:
        """Add the predictions that count for `key` to `scores`."""
        places = self.places.select(self.counted[key])
        for metric, value in values.items():
            scores[metric].update(places, value[self.counted[key]].double().unsqueeze(-1))


def _chunks(batch: RowBatch, logits: Float[Tensor, "rows ctx vocab"]) -> Iterator[_Chunk]:
    """The predictions of a batch that may count, in chunks that bound `[n, vocab]`."""
    rows, positions = batch.mask[:, 1:].nonzero(as_tuple=True)  # [n_predictions] each
    size = chunk_tokens(logits.shape[-1])
    for row, position in zip(rows.split(size), positions.split(size), strict=True):
        yield _Chunk(
            row,
            position,
            next_tokens=batch.tokens[row, position + 1],
            places=Places(row + batch.first_row, position),
            counted={key: mask[row, position + 1] for key, mask in batch.masks.items()},
            log_p=log_probs(logits[row, position]),
        )


def _clean_run(context: EvaluationContext, batch: RowBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[rows, ctx, vocab]`, and the activations of all read sites `[rows, ctx, d]`."""
    reads = dict.fromkeys(site for d in context.dictionaries.values() for site in d.reads)
    with capture(context.lm.model, [context.sites[name] for name in reads]) as acts:
        logits = context.lm.model(input_ids=batch.tokens, use_cache=False).logits
    return logits, acts


def _replacements(
    context: EvaluationContext,
    batch: RowBatch,
    reads: Mapping[str, Tensor],
    means: Mapping[tuple[str, MaskKey], Tensor],
) -> Iterator[tuple[RunKey, dict[str, Tensor]]]:
    """Every distinct run with its values by write site, `[n_counted, d]` or `[d]`."""
    ablated: set[tuple[tuple[str, ...], MaskKey]] = set()
    for name, d in context.dictionaries.items():
        key = context.mask_key(name)
        own = {site: reads[site][batch.masks[key]] for site in d.reads}  # [n_counted, d]
        recon = torch.cat([part for _, part in reconstruct(d, d.select_reads(own))])
        yield _run_key("rec", name, d.writes, key), d.split_writes(recon)
        if (d.writes, key) not in ablated:
            ablated.add((d.writes, key))
            mean = {site: means[site, key] for site in d.writes}
            zero = {site: torch.zeros_like(value) for site, value in mean.items()}
            yield _run_key("zero", name, d.writes, key), zero
            yield _run_key("mean", name, d.writes, key), mean


def _patched_logits(
    context: EvaluationContext, batch: RowBatch, values: Mapping[str, Tensor], mask: Bool[Tensor, "rows ctx"]
) -> Float[Tensor, "rows ctx vocab"]:
    """What the LM predicts with `values` at the positions of `mask` of their sites."""
    edits = {context.sites[name]: _replace(mask, value) for name, value in values.items()}
    with edit(context.lm.model, edits):
        return context.lm.model(input_ids=batch.tokens, use_cache=False).logits


def _replace(mask: Bool[Tensor, "rows ctx"], value: Float[Tensor, "*n_counted d"]) -> Callable[[Tensor], Tensor]:
    def replaced(acts: Float[Tensor, "rows ctx d"]) -> Float[Tensor, "rows ctx d"]:
        acts = acts.clone()
        acts[mask] = value.to(acts.dtype)
        return acts

    return replaced


class _Estimate(NamedTuple):
    """A number and by how much each row moves it, in first order."""

    value: float
    influence: Float[Tensor, " n_rows"]

    @staticmethod
    def of(ratio: TokenRatio) -> _Estimate:
        return _Estimate(float(ratio.ratio), ratio.influence.squeeze(-1))

    def minus(self, other: _Estimate) -> _Estimate:
        return _Estimate(self.value - other.value, self.influence - other.influence)

    def over(self, other: _Estimate) -> _Estimate:
        value = self.value / other.value
        return _Estimate(value, (self.influence - value * other.influence) / other.value)


def summary(clean: TokenRatio, runs: Mapping[Kind, Scores]) -> tuple[dict[str, Any], list[str]]:
    """The numbers of one dictionary from the clean cross-entropy and its three runs, and warnings about them."""
    ce = {kind: _Estimate.of(scores["ce"]) for kind, scores in runs.items()}
    kl = {kind: _Estimate.of(scores["kl"]) for kind, scores in runs.items()}
    ce_clean = _Estimate.of(clean)
    kl_clean = _Estimate(0.0, torch.zeros_like(ce_clean.influence))
    found: dict[str, _Estimate | None] = {"ce_clean": ce_clean}
    found |= {f"ce_{kind}": estimate for kind, estimate in ce.items()}
    found["delta_ce"] = ce["rec"].minus(ce_clean)
    found |= {f"kl_{kind}": estimate for kind, estimate in kl.items()}
    found["top1_agree"] = _Estimate.of(runs["rec"]["top1"])
    warnings: list[str] = []
    for ablation in ABLATIONS:
        for metric, unpatched, of_kind in (("ce", ce_clean, ce), ("kl", kl_clean, kl)):
            cost, name = of_kind[ablation].minus(unpatched), f"{metric}_recovered_{ablation}"
            found[name] = None
            noise = float(clustered_stderr(cost.influence, clean.n_rows_seen)) if metric == "ce" else 0.0
            if abs(cost.value) < max(NEAR_ZERO, NOISE * noise):
                known = f", and the standard error of that is {noise:.1e}" if noise else ""
                changes = f"{ablation} ablation changes {metric} by {cost.value:.1e} nats"
                warnings.append(f"behaviour.{name} is null: {changes}{known}")
                continue
            found[name] = of_kind[ablation].minus(of_kind["rec"]).over(cost)
            if cost.value < 0:
                warnings.append(f"behaviour.{name}: {ablation} ablation lowers the loss, so it is no yardstick")
    n_per_position = clean.position_bottom[:, 0].long()  # [ctx - 1]
    courses = {"clean": clean} | {kind: scores["ce"] for kind, scores in runs.items()}
    values: dict[str, Any] = {name: None if e is None else e.value for name, e in found.items()}
    values["stderr"] = {
        name: None if e is None else float(clustered_stderr(e.influence, clean.n_rows_seen))
        for name, e in found.items()
    }
    values["ce_per_position"] = {
        name: per_position(ratio.by_position[:, 0], n_per_position) for name, ratio in courses.items()
    }
    values["n_tokens_per_position"] = n_per_position.tolist()
    values["n_tokens"] = int(n_per_position.sum())
    return values, warnings
