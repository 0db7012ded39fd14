import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dictlearn.data import EmbeddedText, LocalText, tokens
from dictlearn.data.packing import META_FILE, ROWS_FILE, TOKENIZER_FILE, read_meta
from dictlearn.types import DictlearnError
from tests.data.helpers import bos_tokenizer, make_stream, meta_of, random_documents, same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path):
    """About 120,000 tokens of distinct documents, more than one append of the worker."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(4000)) + "\n")
    return lambda cache="cache": LocalText(path=str(path), ctx=16, cache_dir=str(tmp_path / cache))


def content(store):
    return (store.folder / ROWS_FILE).read_bytes()


def test_growing_gives_the_rows_of_one_go(text):
    once = text("once").train(bos_tokenizer())
    n_rows = once.wait(10**9)
    assert once.complete
    sizes = []
    for target in (1, 40_000, 80_000, 10**9):  # each time a new run
        grown = text("grown").train(bos_tokenizer())
        grown.wait_counted(target)
        sizes.append(len(content(grown)))
    assert sizes[0] < sizes[1] < sizes[-1]
    assert content(grown) == content(once)
    assert meta_of(grown) == meta_of(once)
    assert grown.n_rows == n_rows


def test_a_row_is_the_same_before_and_after_the_store_grew(text):
    store = text().train(bos_tokenizer())
    early = store.rows(0, 20)
    n_early = store.n_rows
    store.wait(10**9)
    assert store.n_rows > n_early
    assert torch.equal(store.rows(0, 20), early)
    assert torch.equal(store.take(np.array([19, 3, 3])), early[[19, 3, 3]])


def test_beyond_the_end(text):
    store = text().train(bos_tokenizer())
    n_rows = store.wait(10**9)
    assert len(store.rows(0, n_rows)) == n_rows
    with pytest.raises(IndexError, match=f"which has {n_rows}"):
        store.rows(0, n_rows + 1)


@pytest.fixture
def endless(tmp_path):
    return lambda cache="cache": EmbeddedText(ctx=16, cache_dir=str(tmp_path / cache)).train(bos_tokenizer())


def test_the_first_rows_come_while_the_rest_is_tokenised(endless):
    store = endless()
    store.prefetch(10**12)
    assert store.rows(0, 30).shape == (30, 16)
    n_rows = store.n_rows
    store.wait(n_rows + 1)
    assert store.n_rows > n_rows


def test_a_killed_worker_is_an_error_and_the_next_run_continues(endless):
    store = endless()
    store.prefetch(10**12)
    store.wait(1)
    store._worker.process.send_signal(signal.SIGKILL)
    with pytest.raises(DictlearnError, match="ended by signal 9 after"):
        store.wait(10**9)
    n_rows = store.n_rows
    with (store.folder / ROWS_FILE).open("ab") as file:
        file.write(b"what was being written")
    rows = endless().rows(0, n_rows + 500)
    assert torch.equal(rows, endless("whole").rows(0, n_rows + 500))


def test_a_worker_killed_again_and_again(endless):
    """At moments of all kinds: while it starts, reads, writes rows, writes meta.json."""
    for attempt in range(8):
        store = endless()
        store.prefetch(10**12)
        time.sleep(0.1 + 0.04 * attempt)
        store.close()  # SIGKILL
    n_rows = endless().n_rows + 500
    assert torch.equal(endless().rows(0, n_rows), endless("whole").rows(0, n_rows))


def test_the_last_words_of_a_worker(text, tmp_path):
    lines = [json.dumps({"text": d}) for d in random_documents(4000)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join([*lines, '{"body": "x"}', "{"]))
    local = LocalText(path=str(path), ctx=16, cache_dir=str(tmp_path), heldout_min_tokens=0)
    store = local.train(bos_tokenizer())
    assert len(store.rows(0, 10)) == 10, "what is whole can be used"
    with pytest.raises(DictlearnError, match=r"exit status 1 after \d+ rows. .*no column 'text'; it has body"):
        store.wait(10**9)


def test_a_file_that_is_gone_is_said_by_the_worker(text):
    store = text().train(bos_tokenizer())
    Path(store.spec.source["files"][0]).unlink()
    with pytest.raises(DictlearnError, match=r"exit status 1 after 0 rows. \S*text.txt cannot be read from byte 0"):
        store.wait(1)


@pytest.fixture
def largest_file():
    """Sets the size in bytes at which writing fails, for this process and those that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_folder_and_the_setting(text, largest_file):
    store = text().train(bos_tokenizer())
    largest_file(50_000)
    store.prefetch(10**9)
    largest_file(resource.RLIM_INFINITY)
    message = rf"after \d+ rows. The cache {store.folder} cannot be used \(File too large\): .* set data.cache_dir"
    with pytest.raises(DictlearnError, match=message) as error:
        store.wait(10**9)
    assert "Traceback" not in str(error.value)
    again = text().train(bos_tokenizer())
    n_rows = again.wait(10**9)
    whole = text("whole").train(bos_tokenizer())
    assert (n_rows, content(again)) == (whole.wait(10**9), content(whole)), "goes on once there is room"


def test_a_disk_too_full_for_last_words(text, largest_file):
    store = text().train(bos_tokenizer())
    largest_file(0)
    store.prefetch(10**9)
    largest_file(resource.RLIM_INFINITY)
    with pytest.raises(DictlearnError, match=rf"It left no word: are {store.folder} \(data.cache_dir\)"):
        store.wait(10**9)


@pytest.mark.parametrize("folder", ["heldout", "tokens"])
def test_a_full_disk_in_this_process(text, monkeypatch, folder):
    """The file of the held-out part, and the store's tokenizer."""

    def full(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(cache / folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    made = text()
    cache = Path(made.cache_dir)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DictlearnError, match=rf"The cache {cache / folder}\S* cannot be used \(No space left on"):
        made.train(bos_tokenizer())
    assert not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    assert made.train(bos_tokenizer()).wait(5) == 5


def test_the_traceback_of_a_worker_is_shown(text):
    store = text().train(bos_tokenizer())
    (store.folder / TOKENIZER_FILE).unlink()
    with pytest.raises(DictlearnError, match=r"(?s)exit status 1 after 0 rows. Traceback .*No such file"):
        store.wait(1)


def test_a_worker_that_does_not_start(text, monkeypatch):
    monkeypatch.setattr(tokens.sys, "executable", "/bin/false")
    with pytest.raises(DictlearnError, match="failed with exit status 1 after 0 rows"):
        text().train(bos_tokenizer()).wait(1)


def test_two_runs_share_a_store(text):
    """The second waits by reading what the first appends, and goes on where the first is killed."""
    first, second = text().train(bos_tokenizer()), text().train(bos_tokenizer())
    assert first.folder == second.folder
    first.prefetch(10**9)
    second.prefetch(10**9)
    assert torch.equal(second.rows(0, 30), first.rows(0, 30))
    first._worker.process.kill()
    first.close()
    n_rows = second.wait(10**9)
    assert first.wait(10**9) == n_rows
    whole = text("whole").train(bos_tokenizer())
    whole.wait(10**9)
    assert content(second) == content(whole)


def test_a_second_run_that_needs_more(text):
    first, second = text().train(bos_tokenizer()), text().train(bos_tokenizer())
    first.prefetch(1000)
    n_rows = second.wait(10**9)
    assert n_rows == first.wait(10**9)


RUN = """
import json, os, subprocess, sys, time
job = json.loads(sys.argv[1])
job["parent"] = os.getpid()
worker = subprocess.Popen([sys.executable, "-m", "dictlearn.data.worker"], stdin=subprocess.PIPE)
worker.stdin.write(json.dumps(job).encode())
worker.stdin.close()
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_with_the_run_that_started_it(tmp_path):
    """Text without end, and a run that is killed: no process may stay."""
    store = EmbeddedText(ctx=16, cache_dir=str(tmp_path)).train(bos_tokenizer())
    job = {"folder": str(store.folder), "spec": asdict(store.spec), "n_counted": 10**12}
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(job)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    until(lambda: read_meta(store.folder) is not None)
    assert _alive(worker)
    run.kill()
    run.wait()
    until(lambda: not _alive(worker))


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_worker_stops_at_its_target(text):
    store = text().train(bos_tokenizer())
    store.prefetch(2000)
    worker = store._worker.process
    assert worker.wait(timeout=30) == 0
    meta = meta_of(store)
    assert meta.n_counted >= 2000
    assert not meta.complete
    store.prefetch(2000)
    assert store.n_counted >= 2000


def test_the_worker_does_without_torch():
    code = "import dictlearn.data.worker, dictlearn.embedded.text, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_damaged_store_is_made_again(text):
    store = text().train(bos_tokenizer())
    store.wait(10**9)
    expected = content(store)
    (store.folder / META_FILE).write_text('{"n_rows"')
    again = text().train(bos_tokenizer())
    again.wait(10**9)
    assert content(again) == expected


def test_batches_do_not_depend_on_the_state_of_the_cache(tmp_path):
    def batches(cache, n_tokens=3000):
        store = EmbeddedText(ctx=16, cache_dir=str(tmp_path / cache)).train(bos_tokenizer())
        return list(make_stream(store, n_tokens=n_tokens))

    fresh, cached = batches("one"), batches("one")
    longer = batches("two", n_tokens=9000)
    assert all(same(one, other) for one, other in zip(fresh, cached, strict=True))
    assert all(same(one, other) for one, other in zip(fresh, longer, strict=False))


def test_epochs_do_not_depend_on_the_state_of_the_cache(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(60)) + "\n")

    def batches(n_tokens):
        text = LocalText(path=str(path), ctx=16, cache_dir=str(tmp_path / "cache"))
        return list(make_stream(text.train(bos_tokenizer()), n_tokens=n_tokens))

    few, many, again = batches(600), batches(8000), batches(8000)
    assert all(same(one, other) for one, other in zip(many, again, strict=True))
    n_same = 540 // 7  # the groups of all 10 blocks: 20 + 40 + 8 * 60 activations; then the shorter one ends
    assert all(same(one, other) for one, other in zip(few[:n_same], many, strict=False))
