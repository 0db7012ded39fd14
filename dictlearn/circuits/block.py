"""The block `circuits`: faithfulness of the circuits that dictionaries cut, beside neurons, PCA and random ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dictlearn.checks import check_choice, check_count, check_flag
from dictlearn.circuits.ablation import ABLATIONS, Ablation
from dictlearn.circuits.baselines import EXACT, neurons, pca, random
from dictlearn.circuits.cuts import POSITIONS, cuts_of, record, sets_of
from dictlearn.circuits.faithfulness import ERRORS, Curve, curve, error_share
from dictlearn.circuits.methods.base import Method
from dictlearn.circuits.nodes import ORDERS
from dictlearn.circuits.pairs import PairBatch
from dictlearn.circuits.scores import method_of, with_settings
from dictlearn.circuits.tasks.base import Task
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.context import EvaluationContext, Sections, progress
from dictlearn.lm import LM
from dictlearn.types import DictlearnError

TASKS = "dictlearn.circuits.tasks"
SAMPLE_TOKENS = 4096  # held-out activations that PCA and the means of random dictionaries are estimated on
SEED = 0  # of the pairs
COVERED = 0.9  # f of all candidates, below which the pairs to find circuits on are too few
KINDS = ("neurons", "pca", "random")  # of baselines


class Circuits:
    """Finds circuits on some prompt pairs of each task and measures their faithfulness on others.

    Dictionaries that write different sites are one cut of the model and are measured together; where two write the
    same site, each is measured by itself.

    Args:
        tasks: names of files in circuits/tasks, or {name: settings}, as in [ioi, {agreement: {structure: rc}}].
        n_pairs: pairs to find a circuit on, and as many others to judge it by; fewer where a task has too few.
        method: how nodes are scored, see circuits/methods: a name, or {name: settings}.
        positions: a node for "each" position of the prompt, or one for "all".
        ablation, order: see `Ablation` and `Ranking`.
        baselines: also measure neurons, PCA and random dictionaries of equal L0 at the same sites.
        n_rows: prompts in one forward.
    """

    def __init__(
        self,
        tasks: Sequence[str | Mapping[str, Any]] = (),
        n_pairs: int = 64,
        method: str | Mapping[str, Any] = "relp",
        positions: str = "each",
        ablation: str = "patch",
        order: str = "absolute",
        baselines: bool = True,
        n_rows: int = 32,
    ) -> None:
        if isinstance(tasks, str) or not isinstance(tasks, Sequence):
            raise DictlearnError(f"circuits must be a list of tasks, such as [ioi,greater_than], got {tasks!r}.")
        named = [_named(TASKS, task) for task in tasks]
        self.tasks: dict[str, Task] = dict(named)
        if twice := sorted({name for name, _ in named if sum(name == other for other, _ in named) > 1}):
            raise DictlearnError(f"circuits must name each task once, got {', '.join(twice)} again.")
        self.method: Method = method_of(method)
        self.method_name = method if isinstance(method, str) else next(iter(method))
        check_count("n_pairs", n_pairs, 2)
        check_count("n_rows", n_rows)
        check_choice("positions", positions, POSITIONS)
        check_choice("ablation", ablation, ABLATIONS)
        check_choice("order", order, ORDERS)
        check_flag("baselines", baselines)
        if order == "signed" and not self.method.signed:
            raise DictlearnError(
                "order=signed takes nodes that lower the metric most first, but scores of "
                f"{self.method_name} are never negative: order=absolute."
            )
        self.n_pairs, self.n_rows, self.baselines = n_pairs, n_rows, baselines
        self.positions, self.ablation, self.order = positions, ablation, order
        self._drawn: dict[Any, tuple[PairBatch, PairBatch]] = {}

    def run(self, context: EvaluationContext) -> dict[str, Sections]:
        if not self.tasks:
            return {}
        if context.planted is not None:
            why = "circuits are left out: planted activations come without a language model"
            return {name: {"warnings": [why]} for name in context.dictionaries}
        sections: dict[str, Sections] = {}
        baselines, known, sets = _Baselines(context), {}, sets_of(context.lm.model, context.dictionaries)
        n_cuts = len(sets) * len(self.tasks) * (1 + self.baselines * len(KINDS))
        with progress("circuits", n_cuts, "cut") as bar:
            for together in sets:
                cuts_of(context.lm.model, together)
                others = baselines.of(together) if self.baselines else {}
                sections |= dict.fromkeys(together, self._of_set(context.lm, together, others, known, bar))
        return sections

    def _of_set(
        self,
        lm: LM,
        dictionaries: Mapping[str, Dictionary],
        others: Mapping[str, Mapping[str, Dictionary]],
        known: dict[Any, dict[str, Any]],
        bar: tqdm[Any],
    ) -> Sections:
        """`known` are numbers of baselines, which several sets may have in common."""
        found: dict[str, Any] = {}
        warnings: list[str] = []
        for name, task in self.tasks.items():
            bar.set_postfix_str(f"{name}, dictionaries")
            try:
                find, test = self.pairs(task, lm, dictionaries)
                own, missing = self._of_cut(lm, dictionaries, find, test)
                of_task = self._of_model(lm, find, test) | {"dictionaries": own}
                warnings += [f"circuits.{name}, {why}" for why in missing]
                if self.ablation == "patch" and (share := _of_candidates(own)) < COVERED:
                    warnings.append(
                        f"circuits.{name}: all nodes that have a score carry {share:.2f} of the behaviour. Latents "
                        f"of words that none of the {len(find)} pairs to find circuits on has are no candidates: "
                        "take more pairs"
                    )
                bar.update()
                for kind, other in others.items():
                    bar.set_postfix_str(f"{name}, {kind}")
                    key = id(find), *map(id, other.values())
                    if key not in known:
                        known[key], _ = self._of_cut(lm, other, find, test, exact=kind in EXACT)
                    of_task[kind] = known[key]
                    bar.update()
                found[name] = of_task
            except DictlearnError as error:
                warnings.append(f"circuits.{name} is left out: {error}")
                continue
            if found[name]["accuracy"] < 0.5:
                warnings.append(
                    f"circuits.{name}: the model prefers the right answer on {found[name]['accuracy']:.0%} of the "
                    "prompts alone: it does not do this task"
                )
        section = {
            "dictionaries": list(dictionaries),
            "method": self.method_name,
            "positions": self.positions,
            "ablation": self.ablation,
            "order": self.order,
            "n_pairs": self.n_pairs,
            "tasks": found,
        }
        return {"circuits": section, "warnings": warnings}

    def pairs(self, task: Task, lm: LM, dictionaries: Mapping[str, Dictionary]) -> tuple[PairBatch, PairBatch]:
        """Prompt pairs to find a circuit on and others to judge it by, drawn once; they begin with a special token
        where dictionaries were trained so.
        """
        bos = any(d.metadata.get("prepend_bos") for d in dictionaries.values())
        key = task, lm.tokenizer, lm.device, bos
        if key not in self._drawn:
            find, test = task.halves(lm.tokenizer, self.n_pairs, SEED, bos)
            self._drawn[key] = find.to(lm.device), test.to(lm.device)
        return self._drawn[key]

    def _of_model(self, lm: LM, find: PairBatch, test: PairBatch) -> dict[str, Any]:
        """How well the plain model does the task."""
        chunks = list(test.split(self.n_rows))
        clean = torch.cat([chunk.value(record(lm.model, (), chunk.clean)[0]) for chunk in chunks])
        patch = torch.cat([chunk.value(record(lm.model, (), chunk.patch)[0]) for chunk in chunks])
        return {
            "n_pairs_find": len(find),
            "n_pairs_test": len(test),
            "metric": test.metric,
            "metric_clean": float(clean.mean()),
            "metric_patch": float(patch.mean()),
            "accuracy": float((clean > 0).double().mean()),
        }

    def _of_cut(
        self, lm: LM, own: Mapping[str, Dictionary], find: PairBatch, test: PairBatch, exact: bool = False
    ) -> tuple[dict[str, Any], list[str]]:
        """The numbers of dictionaries, by treatment of errors, and what is missing; `exact`: they have no errors,
        as neurons and PCA, and one curve, which is called "scored" like that of the dictionaries beside them.

        Raises DictlearnError where there is none at all.
        """
        cuts = cuts_of(lm.model, own)
        scores = self.method.scores(lm.model, cuts, find, self.positions, self.n_rows)
        ablation = Ablation(lm.model, cuts, test, self.ablation, self.n_rows)
        found: dict[str, Any] = {} if exact else {"error_share": error_share(scores)}
        failed: dict[str, list[str]] = {}
        modes = {"scored": "kept"} if exact else {mode: mode for mode in ERRORS}
        for mode, errors in modes.items():
            try:
                found[mode] = numbers(curve(lm.model, cuts, ablation, scores, errors, self.order))
            except DictlearnError as error:
                failed.setdefault(str(error), []).append(mode)
        if sum(map(len, failed.values())) == len(modes):
            raise DictlearnError(" ".join(failed))
        return found, [f"errors {' and '.join(own)}, is left out: {why}" for why, own in failed.items()]


def _of_candidates(own: Mapping[str, Any]) -> float:
    return own["scored"]["faithfulness_of_candidates"] if "scored" in own else math.inf


def numbers(found: Curve) -> dict[str, Any]:
    """The numbers of a report, and all of the curve."""
    table = found.table()
    return found.summary() | {"curve": {str(name): table[name].tolist() for name in table}}


def _named(package: str, entry: Any) -> tuple[str, Any]:
    """An object of the package by what a user wrote: its name; with settings, under a name that says them."""
    if not isinstance(entry, str | Mapping) or (not isinstance(entry, str) and len(entry) != 1):
        raise DictlearnError(f"A task is a name, or one name with its settings, got {entry!r}.")
    name, settings = (entry, None) if isinstance(entry, str) else next(iter(entry.items()))
    made = with_settings(package, name, settings)
    return "_".join([name, *map(str, (settings or {}).values())]), made


class _Seen(NamedTuple):
    """Held-out activations at the write sites of a dictionary, and its L0 at each of them."""

    acts: dict[str, Float[Tensor, "n d"]]
    l0: float


class _Baselines:
    """Other dictionaries at the write sites of dictionaries; those that would be equal are made once."""

    def __init__(self, context: EvaluationContext) -> None:
        self._context = context
        self._made: dict[tuple[Any, ...], Dictionary] = {}

    def of(self, dictionaries: Mapping[str, Dictionary]) -> dict[str, dict[str, Dictionary]]:
        """By kind and site."""
        found: dict[str, dict[str, Dictionary]] = {kind: {} for kind in KINDS}
        seen_by = _seen(self._context, dictionaries)
        for name, d in dictionaries.items():
            seen = seen_by[name]
            n_latents, k = d.n_latents // len(d.writes), max(1, round(seen.l0))
            for site, acts in seen.acts.items():
                at = site, self._context.mask_key(name), acts.dtype
                found["neurons"][site] = self._once(at, neurons, acts)
                found["pca"][site] = self._once(at, pca, acts)
                found["random"][site] = self._once(at, random, acts, n_latents, k)
        return found

    def _once(
        self, at: tuple[str, *tuple[Any, ...]], make: Callable[..., Dictionary], acts: Tensor, *sizes: int
    ) -> Dictionary:
        key = make, at, sizes
        if key not in self._made:
            self._made[key] = make(at[0], acts, *sizes)
        return self._made[key]


@torch.no_grad()
def _seen(context: EvaluationContext, dictionaries: Mapping[str, Dictionary]) -> dict[str, _Seen]:
    """In one pass of the first rows, by dictionary."""
    parts: dict[str, dict[str, list[Tensor]]] = {n: {s: [] for s in d.writes} for n, d in dictionaries.items()}
    n_active, n_tokens = dict.fromkeys(dictionaries, 0), dict.fromkeys(dictionaries, 0)
    sites = {site for d in dictionaries.values() for site in (*d.reads, *d.writes)}
    for batch in context.batches("circuits", context.rows_of(SAMPLE_TOKENS)):
        acts = context.activations(batch, sites)
        for name, d in dictionaries.items():
            own = {site: acts[site][batch.masks[context.mask_key(name)]] for site in (*d.reads, *d.writes)}
            for site, kept in parts[name].items():
                kept.append(own[site].to(d.b_dec.dtype))
            latents = d.encode_sparse(d.select_reads(own))
            n_active[name] += int((latents.values != 0).sum())
            n_tokens[name] += latents.n_tokens
    if not all(n_tokens.values()):
        raise DictlearnError("No held-out token of the first rows is counted: baselines have no activations.")
    return {
        name: _Seen(
            {site: torch.cat(own) for site, own in parts[name].items()},
            n_active[name] / n_tokens[name] / len(d.writes),
        )
        for name, d in dictionaries.items()
    }
