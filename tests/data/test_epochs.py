"""A text that ends is announced where the user looks."""

import subprocess
import sys
from pathlib import Path

from tests.data.helpers import random_documents

SMALL = (
    "n_tokens=30_000 data.block_rows=16 batch_size=256 expansion=2 sparsifier.k=4 statistics_n_tokens=2_048 "
    "evaluation.n_tokens=1_000"
)
ROOT = Path(__file__).parents[2]


def test_a_text_that_ends_is_announced_in_the_terminal(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(150)))
    overrides = [*SMALL.split(), "experiment=single", "site=resid_post.1", "~evaluation.blocks.behaviour"]
    process = subprocess.run(
        [sys.executable, "train.py", "data=local", f"data.path={path}", f"run_dir={tmp_path / 'run'}", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert f"{path} (train) has ended" in process.stderr
    assert "epoch 1, in a new row order" in process.stderr
