"""What a plan counts, against sizes worked out by hand."""

from __future__ import annotations

from pathlib import Path

from dictlearn.training.plan import plan
from tests.runs import composed

RUN = ("experiment=single", "site=resid_post.2", "n_tokens=50_000", "batch_size=500", "run_dir=unused")


def test_a_store_has_memory_and_disk_of_its_own(tmp_path: Path) -> None:
    """100 steps of 500 activations of width 128 in bfloat16, each with 16 bytes of token, row and position."""
    streamed = plan(composed("train", [*RUN]))
    stored = plan(composed("train", [*RUN, f"data.store={tmp_path / 'store'}"]))
    assert (streamed.store_disk, streamed.store_memory) == (0, 0)
    assert stored.store_disk == 100 * 500 * (128 * 2 + 16)
    assert stored.store_memory == 2 * stored.store_disk  # smaller than two parts of 256 MB
    assert 0 < stored.pool_memory < streamed.pool_memory  # bfloat16 in place of float32
    assert stored.n_steps == streamed.n_steps == 100
