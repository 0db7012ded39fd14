"""Texts that end or are not for this LM: what is said of them, when, and where the user looks."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dictlearn.data import NormFilter, SequenceStream
from tests.data.helpers import BOS, Reader, make_stream, random_documents, unique_store

SMALL = (
    "n_tokens=15_000 data.block_rows=16 batch_size=256 expansion=2 sparsifier.k=4 statistics_n_tokens=2_048 "
    "evaluation.n_tokens=1_000"
)
ROOT = Path(__file__).parents[2]
N_ROWS, CTX = 50, 8  # 350 counted tokens a pass


@pytest.fixture
def store(tmp_path):
    return unique_store(tmp_path / "store", n_rows=N_ROWS, ctx=CTX)


@pytest.fixture
def said(caplog):
    """The epochs announced so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [int(re.findall(r"epoch (\d+) begins", record.getMessage())[0]) for record in caplog.records]


def sequences(store, n_tokens):
    return SequenceStream(Reader(), store, batch_size=3 * CTX, n_tokens=n_tokens, lm_batch_rows=2)


@pytest.mark.parametrize("make", [make_stream, sequences])
@pytest.mark.parametrize(
    ("n_tokens", "epochs"),
    [(300, []), (334, []), (380, [2]), (437, [2]), (690, [2]), (760, [2, 3]), (1_090, [2, 3, 4])],
)
def test_every_pass_that_the_run_takes_and_no_other(store, said, make, n_tokens, epochs):
    """Although the last block may begin another one."""
    stream = make(store, n_tokens)
    list(stream)
    assert said() == epochs
    assert stream.store.n_counted == N_ROWS * (CTX - 1)


def test_more_rows_are_read_than_are_announced(store, said):
    stream = make_stream(store, n_tokens=690, block_rows=15)
    stream.read = read = Reader()
    list(stream)
    assert read.n_rows > 2 * N_ROWS, "into the third pass"
    assert said() == [2]


def test_a_pass_is_announced_when_its_first_row_comes(store, said):
    """Blocks of 4 rows: row 50 is in block 12, which opens group 12. Three rows in a batch of sequences."""
    stream = make_stream(store, n_tokens=700, batch_size=1)
    opened = []
    for _ in stream:
        state = stream.state_dict()
        opened.append(state["group"] - (state["offset"] == 0))
        assert said() == ([2] if opened[-1] >= 12 else [])
    assert opened[-1] > 20
    for number, _ in enumerate(sequences(store, 690)):
        assert said()[1:] == ([2] if number >= 16 else [])


@pytest.mark.parametrize(("make", "group"), [(make_stream, 14), (sequences, 18)])
def test_a_continued_run_does_not_say_it_again(store, said, make, group):
    stream = make(store, 1_000)
    for _ in stream:
        if stream.state_dict()["group"] == group:
            break
    assert said() == [2]
    again = make(store, 1_000)
    again.load_state_dict(stream.state_dict())
    list(again)
    assert said() == [2, 3]


def test_a_text_shorter_than_a_block(tmp_path, said):
    store = unique_store(tmp_path / "short", n_rows=3, ctx=CTX)
    list(make_stream(store, n_tokens=21, block_rows=10))
    assert said() == []
    list(make_stream(store, n_tokens=22, block_rows=10))
    assert said() == [2]


class Alternating(Reader):
    """Every second token is of a large norm."""

    def __call__(self, tokens):
        acts = super().__call__(tokens)
        large = 1 + 1e6 * (tokens % 2 == 0).double()
        return {site: torch.ones_like(value) * large[..., None] for site, value in acts.items()}


def test_tokens_that_are_left_out_make_passes_shorter(store, said):
    """About half are: 280 of 350 tokens take 1.6 passes."""
    stream = make_stream(store, n_tokens=280)
    stream.read, stream.norm_filter = Alternating(), NormFilter(10.0, {"a": 10.0, "b": 10.0})
    kept = torch.cat([batch.tokens for batch in stream])
    assert (kept % 2 == 1).all()
    assert BOS not in kept
    assert said() == [2]


def test_what_is_said_in_the_terminal(tmp_path):
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
    words = " ".join(process.stderr.split())
    assert f"{path} (train) has ended" in process.stderr
    assert "epoch 2 begins, in a new row order; the run takes 1." in words
    assert "epoch 3" not in words
    for split in ("train", "heldout"):
        assert re.search(rf"6\d % of the first \d+ tokens of {path} \({split}\) are unknown to the LM's", words)
