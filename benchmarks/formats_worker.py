"""A peer writes or reads dictionaries with its own code: `python benchmarks/formats_worker.py PEER ACTION FOLDER`.

`write` makes each kind of peers/formats_PEER.py in random weights: the peer's files in FOLDER/KIND, and in
FOLDER/KIND.npz inputs `x`, and `latents` and `recon` as the peer computes them. `read` loads FOLDER/KIND wherever
there is a FOLDER/KIND.npz, and writes what the peer makes of its `x` into FOLDER/KIND.read.npz. What was done is in
FOLDER/write.json or read.json: by kind null, or why not. Needs the peer's own packages alone.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

N_TOKENS, N_LAYERS, D, D_OUT, N_LATENTS, K = 200, 2, 16, 12, 64, 8


class Formats(Protocol):
    """What peers/formats_PEER.py has. Shapes are ours: a transcoder of several layers has [n, n_layers, d]."""

    KINDS: dict[str, Callable[[], Any]]  # "kind, variant ..." -> a dictionary in random weights
    SHAPE: tuple[int, ...]  # of the activations of one token

    def save(self, made: Any, folder: Path) -> Any:
        """Write it; give back the dictionary that counts as the one written."""

    def load(self, folder: Path) -> Any: ...

    def compute(self, made: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and reconstruction of raw activations."""
        ...


@torch.no_grad()
def randomise(made: nn.Module) -> None:
    """Normal weights, thresholds from 0."""
    for name, parameter in made.named_parameters():
        parameter.normal_()
        if name.endswith("threshold"):
            parameter.abs_()


def write(formats: Formats, kind: str, folder: Path) -> None:
    made = formats.save(formats.KINDS[kind](), folder / kind)
    x = torch.randn(N_TOKENS, *formats.SHAPE)
    latents, recon = formats.compute(made, x)
    np.savez(folder / f"{kind}.npz", x=x.numpy(), latents=latents.numpy(), recon=recon.numpy())


def read(formats: Formats, kind: str, folder: Path) -> None:
    with np.load(folder / f"{kind}.npz") as ours:
        x = torch.from_numpy(ours["x"])
    latents, recon = formats.compute(formats.load(folder / kind), x)
    np.savez(folder / f"{kind}.read.npz", latents=latents.numpy(), recon=recon.numpy())


def main(argv: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    peer, action, folder = argv[0], argv[1], Path(argv[2])
    formats = cast(Formats, importlib.import_module(f"formats_{peer}"))
    kinds = list(formats.KINDS) if action == "write" else sorted(path.stem for path in folder.glob("*.npz"))
    done: dict[str, str | None] = {}
    for kind in kinds:
        torch.manual_seed(len(done))
        try:
            with torch.no_grad():
                (write if action == "write" else read)(formats, kind, folder)
            done[kind] = None
        except Exception as error:  # noqa: BLE001 - what a peer raises is its own
            done[kind] = f"{type(error).__name__}: {error}"
    (folder / f"{action}.json").write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
