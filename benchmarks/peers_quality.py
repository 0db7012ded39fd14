"""Our dictionaries beside those of SAELens, dictionary_learning and sparsify: `python benchmarks/peers_quality.py`.

All train on the same activations (a residual stream of the embedded LM, in files) in the same order and batches,
with the same width and their own recipes (see peers/quality_*.py), at several sparsities and seeds. What comes of
it are plain tensors, which one evaluator judges on held-out activations. Prints FVU at equal L0 and writes
benchmarks/results/peers_quality.csv and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from contenders import ENVIRONMENT, OURS
from environments import PACKAGES, Unavailable, python_of
from equal_l0 import Rows, at_equal_l0, holds, ratio, with_error, write_json
from hardware import hardware
from runs import TINY, activation_data
from table import table as plain_table
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.dictionaries.matryoshka import PREFIXES
from dictlearn.metrics.sparsity import L0, FiringCounts
from dictlearn.metrics.variance import Variance
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.top_k import TopK

FOLDER = Path(__file__).parent
SITE, WIDTH = "resid_post.2", 128
OWN = "dictlearn"
K = (12, 22)
SPARSITIES: dict[
    str, dict[str, Sequence[float]]
] = {  # architecture -> contender -> k, or coefficient of its penalty
    "top_k": {OWN: K, "saelens": K, "dictionary_learning": K, "sparsify": K},
    "batch_top_k": {OWN: K, "saelens": K, "dictionary_learning": K},
    "matryoshka": {OWN: K, "saelens": K, "dictionary_learning": K},
    "relu": {OWN: (0.05, 0.1, 0.2), "saelens": (2.0, 4.0, 8.0, 16.0), "dictionary_learning": (0.08, 0.16, 0.32)},
    "gated": {OWN: (0.1, 0.15, 0.25), "saelens": (2.0, 4.0, 8.0), "dictionary_learning": (0.16, 0.32, 0.64)},
    "jump_relu": {OWN: K, "saelens": (1.0, 2.0, 4.0, 8.0), "dictionary_learning": (10, 16, 24)},
}
OVERRIDES = {  # of ours; the last one takes the sparsity
    "top_k": ["sparsifier=top_k", "sparsifier.k="],
    "batch_top_k": ["sparsifier=batch_top_k", "sparsifier.k="],
    "matryoshka": ["dictionary=matryoshka", "sparsifier=batch_top_k", "sparsifier.k="],
    "relu": ["sparsifier=relu", "sparsifier.l1="],
    "gated": ["dictionary=gated", "sparsifier.l1="],
    "jump_relu": ["sparsifier=jump_relu", "sparsifier.target_l0="],
}
LR_FACTOR = 3.0  # ours by default
MOST_DIFFERENCE = 1e-3  # between a peer's reconstruction and ours of its tensors, as a share of its norm


class Data(NamedTuple):
    """Activations of one seed: a file [n_tokens, d] to train on, and overrides that make ours read the same."""

    acts: Path
    overrides: tuple[str, ...]


def write_data(arguments: argparse.Namespace, work: Path) -> tuple[list[Data], Path]:
    """For each seed what its dictionaries train on, in its own order; and the held-out activations of all."""
    heldout = work / "heldout.npy"
    found = []
    for seed in range(arguments.seeds):
        overrides = (
            *arguments.shared,
            f"seed={seed}",
            f"data.store={work / f'store-{seed}'}",
        )
        data = activation_data(overrides, [SITE])
        acts = work / f"acts-{seed}.npy"
        found.append(Data(acts, overrides))
        if not acts.exists():
            batches = [batch.acts[SITE].float() for batch in data.train_dataloader()]
            np.save(acts, torch.cat(batches).numpy())
        if not heldout.exists():
            rows = data.heldout(arguments.heldout)
            parts = [
                data.read(tokens)[SITE][mask].float()
                for tokens, mask in zip(rows.tokens.split(32), rows.mask.split(32), strict=True)
            ]
            np.save(heldout, torch.cat(parts).numpy())
        data.close()
    return found, heldout


def jobs(
    arguments: argparse.Namespace, contender: str, architecture: str, data: Sequence[Data], heldout: Path
) -> Iterator[dict[str, Any]]:
    """What one contender trains of an architecture."""
    for seed, own in enumerate(data):
        for value in SPARSITIES[architecture][contender][:: arguments.every]:
            for factor in arguments.lr_factors:
                *settings, sparsity = OVERRIDES[architecture]
                name = f"{contender}-{architecture}-{value:g}-lr{factor:g}-{seed}"
                yield {
                    "contender": contender,
                    "architecture": architecture,
                    "value": value,
                    "lr_factor": factor,
                    "seed": seed,
                    "batch_size": arguments.batch_size,
                    "d": WIDTH,
                    "n_latents": arguments.expansion * WIDTH,
                    "prefixes": [round(share * arguments.expansion * WIDTH) for share in PREFIXES],
                    "acts": str(own.acts),
                    "heldout": str(heldout),
                    "out": str(heldout.parent / f"{name}.pt"),
                    "overrides": [
                        "experiment=single",
                        f"site={SITE}",
                        *own.overrides,
                        *settings,
                        f"{sparsity}{value}",
                        f"optimizer.lr_factor={LR_FACTOR * factor}",
                    ],
                }


def train(program: str, own: Sequence[Mapping[str, Any]]) -> str | None:
    """Train the jobs of one contender that have not ended yet; why it could not, if so."""
    left = [job for job in own if not Path(job["out"]).exists()]
    if not left:
        return None
    try:
        python = python_of(program)
    except Unavailable as error:
        return str(error)
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **(OURS if program == OWN else {})}
    result = subprocess.run(
        [python, str(FOLDER / "quality_worker.py"), program],
        input=json.dumps(left),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return (result.stderr.strip().splitlines() or ["it ended"])[-1] if result.returncode else None


def as_dictionary(tensors: Mapping[str, Tensor]) -> Linear:
    """The dictionary of a contender's plain tensors (quality_worker.py)."""
    d, n_latents = tensors["W_enc"].shape
    sparsifier = TopK(int(tensors["k"])) if "k" in tensors else JumpReLU()
    dictionary = Linear(d, d, n_latents, sparsifier, decoder_norm="free").requires_grad_(False)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        dictionary.get_parameter(name).copy_(tensors[name])
    if isinstance(sparsifier, JumpReLU):
        sparsifier.thresholds.copy_(tensors["threshold"])
    return dictionary


@torch.inference_mode()
def judged(tensors: Mapping[str, Tensor], heldout: Tensor) -> dict[str, float]:
    """L0, FVU about the mean of `heldout` [n, d], share of latents that never fire on it.

    Raises ValueError where the tensors do not reconstruct what the contender itself does.
    """
    dictionary, recon = as_dictionary(tensors), tensors["recon"]
    difference = (dictionary(heldout[: len(recon)]).recon - recon).norm() / recon.norm()
    if not difference < MOST_DIFFERENCE:
        raise ValueError(f"its tensors reconstruct something else than it does: {float(difference):.2e} away")
    l0, fired, variance = (
        L0(dictionary.n_latents),
        FiringCounts(dictionary.n_latents),
        Variance(1, dictionary.d_out),
    )
    for x in heldout.split(8192):
        latents = dictionary.encode_sparse(x)
        l0.update(latents)
        fired.update(latents)
        variance.update(x.unsqueeze(1), dictionary.decode(latents).unsqueeze(1))
    return {
        "l0": float(l0.compute()["mean"]),
        "fvu": float(variance.compute()["fvu"]),
        "frac_dead": float((fired.n_fired == 0).double().mean()),
        "seconds": float(tensors["seconds"]),
    }


def measured(done: Sequence[Mapping[str, Any]], heldout: Path) -> list[dict[str, Any]]:
    """A row for each dictionary."""
    acts = torch.from_numpy(np.load(heldout))
    keys = ("architecture", "contender", "lr_factor", "value", "seed")
    rows = []
    for job in done:
        if Path(job["out"]).exists():
            rows.append({key: job[key] for key in keys} | judged(torch.load(job["out"]), acts))
    return rows


def compare(rows: Rows, l0: float) -> list[dict[str, Any]]:
    """By architecture: what contenders reach at `l0` with the best of their rates, and ours over the best peer."""
    found = []
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        own = [
            {**row, "name": f"{row['contender']} x{row['lr_factor']:g}"}
            for row in rows
            if row["architecture"] == architecture
        ]
        best: dict[str, dict[str, Any]] = {}
        for reached in sorted(at_equal_l0(own, [l0], ["fvu", "frac_dead"], "name"), key=lambda row: row["fvu"]):
            best.setdefault(reached["name"].split()[0], reached)
        result: dict[str, Any] = {"architecture": architecture, "l0": l0, "best": best}
        peers = [reached["name"] for name, reached in best.items() if name != OWN]
        if OWN in best and peers:
            result["over_best_peer"] = ratio(own, best[OWN]["name"], peers[0], l0, "name")
        found.append(result)
    return found


def show(compared: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> None:
    contenders = [OWN, *PACKAGES]
    lines = []
    for result in compared:
        cells = [
            with_error(best["fvu"], best["fvu_stderr"]) if (best := result["best"].get(name)) else "-"
            for name in contenders
        ]
        over = result.get("over_best_peer")
        verdict = ["-", "-"]
        if over is not None:
            verdict = [with_error(over["ratio"], over["stderr"]), "yes" if holds(over) else "NO"]
        lines.append([str(result["architecture"]), f"{result['l0']:g}", *cells, *verdict])
    columns = ["architecture", "L0", *contenders, "ours / best peer", "at most 1"]
    print(plain_table("FVU at equal L0, means over seeds", columns, lines))
    for name, why in absent.items():
        print(f"{name}: {why}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=500_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--expansion", type=int, default=8, help="latents per dimension")
    parser.add_argument("--heldout", type=int, default=100_000, help="held-out activations that all are judged on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--l0", type=float, default=16.0, help="where contenders are compared")
    parser.add_argument(
        "--lr-factors", default=[1.0], type=_numbers, help="of every recipe's rate; the best counts"
    )
    parser.add_argument("--architectures", default=",".join(SPARSITIES))
    parser.add_argument("--peers", default=",".join(PACKAGES), help="empty: none")
    parser.add_argument("--every", type=int, default=1, help="take every n-th sparsity")
    parser.add_argument("--jobs", type=int, default=2, help="contenders at a time, on one thread each")
    parser.add_argument("--work", type=Path, help="a folder to keep all in, and to go on from")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, few tokens")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.n_tokens, arguments.batch_size, arguments.expansion = 8_192, 128, 1
        arguments.seeds, arguments.heldout = 1, 2_000
    sizes = ("n_tokens", "batch_size", "expansion")
    arguments.shared = [*(TINY if arguments.quick else ()), *(f"{key}={getattr(arguments, key)}" for key in sizes)]
    work = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    try:
        measure(arguments, work)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)


def measure(arguments: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    data, heldout = write_data(arguments, work)
    contenders = [OWN, *filter(None, arguments.peers.split(","))]
    groups = {
        (contender, architecture): list(jobs(arguments, contender, architecture, data, heldout))
        for architecture in arguments.architectures.split(",")
        for contender in contenders
        if contender in SPARSITIES[architecture]
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(lambda item: train(item[0][0], item[1]), groups.items()))
    absent = {", ".join(key): why for key, why in zip(groups, outcomes, strict=True) if why}
    rows = measured([job for own in groups.values() for job in own], heldout)
    compared = compare(rows, arguments.l0)
    show(compared, absent)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(arguments.out / "peers_quality.csv", index=False)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("work", "out")}
    report = {
        "hardware": hardware(),
        "peers": PACKAGES,
        "arguments": settings,
        "at_equal_l0": compared,
        "unavailable": absent,
    }
    write_json(report, arguments.out / "peers_quality.json")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
