"""A peer trains on activations in files: `python benchmarks/quality_worker.py PEER < jobs.json`.

Reads a list of jobs and trains the dictionary of each with peers/quality_PEER.py, as the peer's users do. What
comes of it is saved in the job's "out", as plain tensors that mean the same for every peer: pre-activations are
x @ W_enc + b_enc; the latents are those of them that are above `threshold` [n_latents], or the ReLU of the `k`
largest; the reconstruction is latents @ W_dec + b_dec. `recon` is what the peer itself makes of the first held-out
activations. Needs the peer's own packages alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

N_CHECK = 512  # held-out activations that the peer reconstructs by itself


class Trained(NamedTuple):
    """The plain tensors, and the peer's own reconstruction of raw activations [n, d]."""

    weights: dict[str, Tensor]
    reconstruct: Callable[[Tensor], Tensor]


class Batches:
    """Batches [batch_size, d] float32 in their order, as often as one likes."""

    def __init__(self, file: str, batch_size: int) -> None:
        self.acts = np.load(file, mmap_mode="r")  # [n_tokens, d]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.acts) // self.batch_size

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.batch_size
        return torch.from_numpy(np.array(self.acts[first : first + self.batch_size]))

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            yield self[index]


def plain(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, **rule: Any) -> dict[str, Tensor]:
    """The tensors that are saved: W_enc [d, n_latents], W_dec [n_latents, d], and `threshold` or `k`."""
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return {name: torch.as_tensor(value).detach().clone() for name, value in {**tensors, **rule}.items()}


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    jobs: list[dict[str, Any]] = json.load(sys.stdin)
    torch.set_num_threads(1)
    train = importlib.import_module(f"quality_{sys.argv[1]}").train
    for job in jobs:
        torch.manual_seed(job["seed"])
        started = time.perf_counter()
        trained: Trained = train(job, Batches(job["acts"], job["batch_size"]))
        seconds = time.perf_counter() - started
        x = torch.from_numpy(np.array(np.load(job["heldout"], mmap_mode="r")[:N_CHECK]))
        with torch.no_grad():
            recon = trained.reconstruct(x)
        partial = Path(job["out"]).with_suffix(".part")
        torch.save({**trained.weights, "recon": recon, "seconds": torch.tensor(seconds)}, partial)
        partial.rename(job["out"])


if __name__ == "__main__":
    main()
