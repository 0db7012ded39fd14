"""Activation stores of 1,000 activations at two sites of a tiny LM, 3 batches a shard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dictlearn.data import ActivationData, Batch
from dictlearn.data.manifest import MANIFEST
from tests.data.helpers import same

BATCH, N_TOKENS = 50, 1000
SITES = ("resid_post.1", "mlp_out.0")
Make = Callable[..., ActivationData]


def batches(made: ActivationData, n: int | None = None) -> list[Batch]:
    """All batches, or the first `n` and then the process ends."""
    made.statistics(300)
    found = [
        batch for _, batch in zip(range(n or len(made.train_dataloader())), made.train_dataloader(), strict=False)
    ]
    made.close()
    return found


def manifest(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "store" / MANIFEST).read_text())


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
