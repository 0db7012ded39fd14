"""Circuits of the embedded LM: `python benchmarks/circuits.py RUN [--help]`.

RUN is a training run with a dictionary at every layer of the stream, of attention and MLP outputs, such as
    python train.py experiment=single 'sites=[resid_post.0,...,attn_out.0,...,mlp_out.3]' run_dir=RUN
Measured: how well estimates of node scores agree with exact patching, how many nodes circuits need beside neurons,
PCA and random dictionaries, how well heads are told, and what scores cost. Prints tables and writes
benchmarks/results/circuits.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hardware import hardware
from scipy.stats import rankdata
from table import table

from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.baselines import EXACT, neurons, pca, random
from dictlearn.circuits.block import numbers
from dictlearn.circuits.cuts import Cut, cuts_of, record
from dictlearn.circuits.discrete import DiscreteCodes, discrete_scores, null_scores
from dictlearn.circuits.faithfulness import ERRORS, curve, error_share
from dictlearn.circuits.heads import (
    exact_head_effects,
    head_outputs,
    head_ranking,
    head_scores,
    mean_difference,
    reference_heads,
)
from dictlearn.circuits.methods.exact import Exact
from dictlearn.circuits.methods.gradient import Gradient
from dictlearn.circuits.methods.integrated_gradients import IntegratedGradients
from dictlearn.circuits.methods.relp import RelP
from dictlearn.circuits.nodes import NodeValues
from dictlearn.circuits.pairs import PairBatch
from dictlearn.circuits.tasks.agreement import Agreement
from dictlearn.circuits.tasks.base import Task
from dictlearn.circuits.tasks.docstring import Docstring
from dictlearn.circuits.tasks.greater_than import GreaterThan
from dictlearn.circuits.tasks.ioi import IOI
from dictlearn.dictionaries import Dictionary
from dictlearn.embedded import LM_FOLDER, document
from dictlearn.hub import load
from dictlearn.lm import LM, load_lm

ROOT = Path(__file__).parent.parent
TASKS: dict[str, Task] = {
    "ioi": IOI(),
    "greater_than": GreaterThan(),
    "agreement": Agreement(structure="nounpp"),
    "docstring": Docstring(),
}
HEAD_TASKS = TASKS | {"ioi": IOI("abc")}
# Discrete codes compare prompts that show the behaviour with prompts that cannot; those of agreement in the other
# number show it as well.
DISCRETE = ("ioi", "greater_than", "docstring")
METHODS = {"gradient": Gradient(), "relp": RelP(), "integrated_gradients": IntegratedGradients()}
KINDS = ("resid_post", "attn_out", "mlp_out")
# Pairs that nodes are patched on, so that 500 nodes of each kind of site differ.
N_EXACT = {"ioi": 16, "greater_than": 32, "agreement": 16, "docstring": 16}
N_TEXT = 64  # rows that PCA and random dictionaries are made from


def agreement_with_exact(
    lm: LM, dictionaries: Mapping[str, Dictionary], pairs: PairBatch, n: int
) -> dict[str, Any]:
    """Pearson and Spearman correlations with exact patching over `n` nodes of each kind of site: half of them with
    the largest gradient scores, the others drawn from all that differ.
    """
    cuts = cuts_of(lm.model, dictionaries)
    estimates = {name: method.scores(lm.model, cuts, pairs, "each") for name, method in METHODS.items()}
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = [cut for cut in cuts if cut.name.startswith(kind)]
        chosen = _chosen(own, estimates["gradient"], n)
        exact = Exact(chosen).scores(lm.model, own, pairs, "each")
        truth = _picked(own, exact, chosen)
        of_kind: dict[str, Any] = {"n_nodes": len(truth)}
        for name, scores in estimates.items():
            estimate = _picked(own, scores, chosen)
            of_kind[name] = {
                "pearson": float(np.corrcoef(estimate, truth)[0, 1]),
                "spearman": float(np.corrcoef(rankdata(estimate), rankdata(truth))[0, 1]),
            }
        found[kind] = of_kind
    return found


def _chosen(cuts: list[Cut], scores: Mapping[str, NodeValues], n: int) -> dict[str, NodeValues]:
    flat = torch.cat([part.flatten() for cut in cuts for part in scores[cut.name]])
    best = flat.abs().topk(min(n // 2, len(flat))).indices
    rest = (flat != 0).index_fill(0, best, False)
    (others,) = rest.nonzero(as_tuple=True)
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[: n - len(best)]]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.cat([best, drawn])] = True
    chosen = {}
    for cut in cuts:
        parts = []
        for part in scores[cut.name]:
            parts.append(mask[: part.numel()].view_as(part))
            mask = mask[part.numel() :]
        chosen[cut.name] = NodeValues(*parts)
    return chosen


def _picked(cuts: list[Cut], scores: Mapping[str, NodeValues], chosen: Mapping[str, NodeValues]) -> Any:
    parts = [part[mask] for cut in cuts for part, mask in zip(scores[cut.name], chosen[cut.name], strict=True)]
    return torch.cat(parts).double().numpy()


def baselines(lm: LM, dictionaries: Mapping[str, Dictionary]) -> dict[str, dict[str, Dictionary]]:
    """At the same sites, from held-out text."""
    texts = [document(7, i).text for i in range(N_TEXT)]
    rows = [lm.tokenizer(text)["input_ids"][:64] for text in texts]
    ids = torch.tensor([row for row in rows if len(row) == 64])
    made: dict[str, dict[str, Dictionary]] = {"neurons": {}, "pca": {}, "random": {}}
    with torch.no_grad():
        _, acts = record(lm.model, cuts_of(lm.model, dictionaries), ids)
        for name, d in dictionaries.items():
            (site,) = d.writes
            own = acts[site].flatten(0, 1)
            l0 = float((d.encode(own) != 0).sum(-1).double().mean())
            made["neurons"][name] = neurons(site, own)
            made["pca"][name] = pca(site, own)
            made["random"][name] = random(site, own, d.n_latents, l0)
    return made


def faithfulness(lm: LM, by_kind: Mapping[str, Mapping[str, Dictionary]], task: Task, n: int) -> dict[str, Any]:
    """Curves of dictionaries and baselines, nodes ranked by RelP."""
    find, test = task.halves(lm.tokenizer, n, 0, bos=True)
    found: dict[str, Any] = {}
    for kind, own in by_kind.items():
        cuts = cuts_of(lm.model, own)
        start = time.perf_counter()
        scores = RelP().scores(lm.model, cuts, find, "each")
        seconds = {"seconds_scores": time.perf_counter() - start}
        start = time.perf_counter()
        ablation = Ablation(lm.model, cuts, test)
        exact = kind in EXACT
        modes = {"scored": "kept"} if exact else {mode: mode for mode in ERRORS}
        of_modes = {mode: curve(lm.model, cuts, ablation, scores, errors) for mode, errors in modes.items()}
        seconds["seconds_curves"] = time.perf_counter() - start
        share = {"error_share": 0.0 if exact else error_share(scores)}
        found[kind] = {**share, **seconds, **{mode: numbers(one) for mode, one in of_modes.items()}}
    return found


def single_pairs(lm: LM, by_kind: Mapping[str, Mapping[str, Dictionary]], task: Task, n: int) -> dict[str, Any]:
    """Sizes of circuits that are found and judged on one pair, the median over `n`: what one prompt needs, where
    the circuit of a task has the nodes of all its words.
    """
    pairs = task.pairs(lm.tokenizer, n, 0, bos=True)
    found: dict[str, Any] = {}
    for kind, own in by_kind.items():
        cuts = cuts_of(lm.model, own)
        errors = "kept" if kind in EXACT else "scored"
        lines = [
            curve(lm.model, cuts, Ablation(lm.model, cuts, one), RelP().scores(lm.model, cuts, one, "each"), errors)
            for one in pairs.split(1)
        ]
        of_kind: dict[str, Any] = {"n_pairs": n}
        for level in (0.5, 0.8):
            sizes = [line.n_at(level) for line in lines]
            reached = sorted(math.inf if size is None else size for size in sizes)
            middle = median(reached)
            of_kind[f"n_at_{level}"] = middle if math.isfinite(middle) else None
        found[kind] = of_kind
    return found


def heads(lm: LM, name: str, n: int) -> dict[str, Any]:
    """ROC AUC of estimates against heads whose exact effect is at least a tenth of the largest."""
    pairs = HEAD_TASKS[name].pairs(lm.tokenizer, n, 0, bos=True)
    positive, negative = head_outputs(lm.model, pairs.clean), head_outputs(lm.model, pairs.patch)
    reference = reference_heads(exact_head_effects(lm.model, pairs))
    settings = DiscreteCodes()
    estimates = {name: head_scores(lm.model, pairs, method) for name, method in METHODS.items()}
    estimates["mean_difference"] = mean_difference(positive, negative)
    if name in DISCRETE:
        estimates["discrete"] = discrete_scores(positive, negative, settings)
    found: dict[str, Any] = {"n_reference": int(reference.sum()), "n_heads": reference.numel()}
    found |= {kind: head_ranking(scores, reference) for kind, scores in estimates.items()}
    if name in DISCRETE:
        null = null_scores(positive, negative, settings, n_draws=50)
        found["discrete, labels permuted"] = {
            "roc_auc": sum(head_ranking(scores, reference)["roc_auc"] for scores in null) / len(null)
        }
    return found


def cost(lm: LM, dictionaries: Mapping[str, Dictionary], n: int, rounds: int) -> dict[str, float]:
    """Seconds of gradient and RelP scores of all sites, beside two forwards, one backward and the encodes."""
    pairs = IOI().pairs(lm.tokenizer, n, 0, bos=True)
    cuts = cuts_of(lm.model, dictionaries)

    def floor() -> None:
        model = lm.model
        embedding = model.get_input_embeddings()(pairs.clean).detach().requires_grad_()
        pairs.value(model(inputs_embeds=embedding).logits[:, -1]).sum().backward()
        acts = [record(model, cuts, pairs.patch)[1]]
        with torch.no_grad():
            for cut in cuts:
                for _ in range(2):
                    cut.dictionary.encode_sparse(cut.dictionary.select_reads(acts[0]).flatten(0, 1))

    runs: dict[str, Callable[[], Any]] = {"floor": floor}
    runs |= {name: (lambda m=m: m.scores(lm.model, cuts, pairs, "each")) for name, m in METHODS.items()}
    early = pairs.patch.clone()  # differs from the first word on, so that no position is left out
    early[:, pairs.n_special] = pairs.clean[:, pairs.n_special].roll(1) + 1
    whole = replace(pairs, patch=early)
    for name in ("gradient", "relp"):
        runs[f"{name}, all positions"] = lambda m=METHODS[name]: m.scores(lm.model, cuts, whole, "each")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    seconds = {name: median(own[1:]) for name, own in times.items()}
    return {
        **seconds,
        **{f"{name} / floor": value / seconds["floor"] for name, value in seconds.items() if name != "floor"},
    }


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def show(results: Mapping[str, Any]) -> None:
    rows = [
        [task, kind, str(own["n_nodes"]), *(f"{own[name]['pearson']:.3f}" for name in METHODS)]
        for task, kinds in results["agreement"].items()
        for kind, own in kinds.items()
    ]
    print(table("Pearson correlation with exact patching", ["task", "sites", "nodes", *METHODS], rows))
    rows = [
        [
            task,
            cut,
            mode,
            *(
                _number(own[mode][key])
                for key in ("n_at_0.5", "n_at_0.8", "faithfulness_of_candidates", "cpr", "cmd")
            ),
            f"{own['error_share']:.2f}",
        ]
        for task, cuts in results["faithfulness"].items()
        for cut, own in cuts.items()
        for mode in ERRORS
        if mode in own
    ]
    print(
        table(
            "Faithfulness",
            ["task", "cut", "errors", "N at .5", "N at .8", "f of candidates", "CPR", "CMD", "error share"],
            rows,
        )
    )
    rows = [
        [task, cut, *(_number(own[f"n_at_{level}"]) for level in (0.5, 0.8))]
        for task, cuts in results["single_pairs"].items()
        for cut, own in cuts.items()
    ]
    print(table("Circuits of single pairs, errors scored (median)", ["task", "cut", "N at .5", "N at .8"], rows))
    estimates = [*METHODS, "mean_difference", "discrete", "discrete, labels permuted"]
    rows = [
        [
            task,
            str(own["n_reference"]),
            *(f"{own[name]['roc_auc']:.2f}" if name in own else "no negatives" for name in estimates),
        ]
        for task, own in results["heads"].items()
    ]
    print(table("ROC AUC of heads (IOI: patch prompts of three names)", ["task", "heads", *estimates], rows))
    print(table("Cost of scores", ["", "value"], [[key, f"{value:.3f}"] for key, value in results["cost"].items()]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the training run")
    parser.add_argument("--pairs", type=int, default=64, help="prompt pairs of each task")
    parser.add_argument(
        "--single-pairs", type=int, default=8, help="pairs that circuits of their own are found for"
    )
    parser.add_argument("--nodes", type=int, default=600, help="nodes of each kind of site to patch one by one")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    loaded = load(arguments.run)
    dictionaries = {loaded.writes[0]: loaded} if isinstance(loaded, Dictionary) else dict(loaded)
    lm = load_lm(str(LM_FOLDER))
    by_kind = {"dictionaries": dictionaries, **baselines(lm, dictionaries)}
    results: dict[str, Any] = {"hardware": hardware(), "pairs": arguments.pairs, "dictionaries": list(dictionaries)}
    results |= {"agreement": {}, "faithfulness": {}, "single_pairs": {}, "heads": {}}
    results["cost"] = cost(lm, dictionaries, arguments.pairs, arguments.rounds)
    for name in arguments.tasks.split(","):
        pairs = TASKS[name].pairs(lm.tokenizer, N_EXACT[name], 0, bos=True)
        results["agreement"][name] = agreement_with_exact(lm, dictionaries, pairs, arguments.nodes)
        results["faithfulness"][name] = faithfulness(lm, by_kind, TASKS[name], arguments.pairs)
        results["single_pairs"][name] = single_pairs(lm, by_kind, TASKS[name], arguments.single_pairs)
        results["heads"][name] = heads(lm, name, arguments.pairs)
        print(f"{name} done", flush=True)
    show(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "circuits.json").write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
