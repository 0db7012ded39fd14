"""dictlearn: one dictionary on planted batches under Lightning; beside it a bare loop with the same work."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from ours import N_STEPS, BareLoop, Gated, make_member, make_module, make_trainer
from worker import planted

from dictlearn.data import Batch, SiteStatistics


def fit(spec: dict[str, Any], gate: Any) -> None:
    batches = planted(spec)
    zeros = torch.zeros(spec["batch_size"], dtype=torch.long, device=spec["device"])
    source = cycle([Batch({"x": x}, zeros, zeros, zeros) for x in batches])
    statistics = {"x": statistics_of(batches[0].cpu())}
    bare = BareLoop(make_module([make_member("x", statistics, spec)], spec), spec)
    bare_source = cycle([Batch({"x": x}, zeros, zeros, zeros) for x in batches])

    def bare_turn(n_steps: int) -> dict[str, float]:
        started = gate.now()
        for _ in range(n_steps):
            bare.step(next(bare_source))
        return {"bare_seconds": gate.now() - started}

    gate.after_turn = bare_turn
    module = make_module([make_member("x", statistics, spec)], spec)
    options = run_callbacks(Path(spec["folder"])) if spec["callbacks"] else {"enable_checkpointing": False}
    gate.loaded()
    make_trainer(spec, **options).fit(module, Gated(source, gate))


def statistics_of(x: torch.Tensor) -> SiteStatistics:
    """Of one batch; there is no layer norm here."""
    norms, mean = x.norm(dim=-1), x.double().mean(0)
    variance = (x - mean).square().sum(-1).mean().item()
    return SiteStatistics(norms.mean().item(), mean, variance, len(x), norms.median().item(), 0, mean, variance)


def run_callbacks(folder: Path) -> dict[str, Any]:
    """What train.py gives Lightning beside: its display, its checkpoints, its answer to signals."""
    from rich.console import Console

    from dictlearn.training import callbacks
    from dictlearn.training.interrupt import StopOnSignal

    console = Console(quiet=True)
    found = [
        callbacks.ProgressDisplay(console),
        callbacks.RandomState(),
        callbacks.Environment(),
        StopOnSignal(folder, console),
        callbacks.LastCheckpoint(folder),
        callbacks.periodic_checkpoint(folder, N_STEPS),
    ]
    return {"callbacks": found, "plugins": [callbacks.WholeFiles()]}
