"""The token store: packed rows on disk, read by index while a worker process still appends to them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import torch

from dictlearn.data.packing import (
    ROWS_FILE,
    TOKENIZER_FILE,
    Meta,
    PackingSpec,
    cached_in,
    read_meta,
    write_atomically,
)
from dictlearn.data.rows import RowStore
from dictlearn.types import DictlearnError, TokenIds, TokenMask

log = logging.getLogger(__name__)
POLL_SECONDS = 0.01
NOTE_SECONDS = 5
LOG_TAIL_CHARS = 2000
PACKAGE_PARENT = Path(__file__).parents[2]
WORKER_ENVIRONMENT = {
    "USE_TORCH": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class TokenStore(RowStore):
    """Rows of `ctx` token ids, addressed by index; what is not there yet is tokenised when it is asked for.

    `name` says in messages what the text is. Row i is the same whenever and however often the store was grown.
    Raises CacheError when the folder cannot be made or read.
    """

    def __init__(self, folder: Path, spec: PackingSpec, start: list[int], tokenizer_json: str, name: str) -> None:
        self.folder, self.spec, self.name = folder, spec, name
        self.ctx = spec.ctx
        self._meta = Meta(cursor=start)
        self._rows = np.empty((0, spec.ctx), dtype=spec.dtype)
        self._special = torch.tensor(spec.special, dtype=torch.int64)
        self._worker: _Worker | None = None
        with cached_in(folder):
            if not (folder / TOKENIZER_FILE).exists():
                write_atomically(folder / TOKENIZER_FILE, tokenizer_json)
            self._refresh()

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints mean equal rows: the folder's name."""
        return self.folder.name

    @property
    def n_rows(self) -> int:
        """Rows on disk now; all rows there are once `complete`."""
        return self._meta.n_rows

    @property
    def n_counted(self) -> int:
        """Tokens of the rows on disk now that are not masked."""
        return self._meta.n_counted

    @property
    def complete(self) -> bool:
        """Whether the text has ended: there will be no further rows."""
        return self._meta.complete

    def prefetch(self, n_counted: int) -> None:
        """Start tokenising ahead, until `n_counted` counted tokens are there or the text ends; does not wait."""
        self._refresh()
        if not (self._meta.complete or self._meta.n_counted >= n_counted or self._running()):
            self._worker = _Worker(self.folder, self.spec, n_counted)

    def wait(self, n_rows: int) -> int:
        """The smaller of `n_rows` and all rows there are, once they are on disk.

        Raises DictlearnError, with the worker's last words, when it ended without them.
        """
        self._wait(lambda meta: meta.n_rows >= n_rows, n_rows * self.ctx)
        return min(n_rows, self.n_rows)

    def wait_counted(self, n_counted: int) -> int:
        """The number of first rows that hold `n_counted` counted tokens, or all rows when the text ends before."""
        self._wait(lambda meta: meta.n_counted >= n_counted, n_counted)
        n_rows = total = 0
        while n_rows < self.n_rows and total < n_counted:
            counts = self.mask(self.rows(n_rows, min(n_rows + 4096, self.n_rows))).sum(1)
            sums = total + counts.cumsum(0)
            enough = int((sums < n_counted).sum()) + 1
            n_rows, total = n_rows + min(enough, len(sums)), int(sums[-1])
        return n_rows

    def take(self, indices: np.ndarray) -> TokenIds:
        """The rows of these indices, int64, in their order; waits for them."""
        last = int(indices.max(initial=-1))
        if self.wait(last + 1) <= last:
            raise IndexError(f"row {last} of {self.name}, which has {self.n_rows}")
        return torch.from_numpy(self._rows[indices].astype(np.int64))

    def mask(self, rows: TokenIds) -> TokenMask:
        """True where a token is counted: not a special token, and not position 0 of a row without BOS."""
        mask = ~torch.isin(rows, self._special)
        if self.spec.bos is None:
            mask[:, 0] = False
        return mask

    def close(self) -> None:
        """End the worker, if there is one; what it has written stays."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _wait(self, enough: Callable[[Meta], bool], target: int) -> None:
        """Until `enough`, or the end of the text; `target`: counted tokens that are enough in any case."""
        if self._meta.complete or enough(self._meta):
            return
        note = time.monotonic() + NOTE_SECONDS
        while True:
            running = self._running()  # before the look at the disk: what a worker wrote until its end is seen
            self._refresh()
            if self._meta.complete or enough(self._meta):
                return
            if not running:
                self._worker = _Worker(self.folder, self.spec, target)
            if time.monotonic() > note:
                log.info("waiting for %s to be tokenised, %d rows so far", self.name, self.n_rows)
                note += NOTE_SECONDS
            time.sleep(POLL_SECONDS)

    def _running(self) -> bool:
        """Whether the worker runs; raises when it failed."""
        if self._worker is None:
            return False
        code = self._worker.code()
        if code is None:
            return True
        tail = self._worker.log_tail() or f"It left no word: are {self.folder} (data.cache_dir) and /tmp writable?"
        self._worker = None
        if code != 0:
            how = f"ended by signal {-code}" if code < 0 else f"failed with exit status {code}"
            raise DictlearnError(f"Tokenising {self.name} {how} after {self.n_rows} rows. {tail}".rstrip())
        return False

    def _refresh(self) -> None:
        """Look at what is on disk now."""
        meta = read_meta(self.folder)
        path = self.folder / ROWS_FILE
        if meta is None or meta == self._meta or meta.n_rows < self._meta.n_rows:
            return
        shape = (meta.n_rows, self.ctx)
        n_bytes = meta.n_rows * self.ctx * np.dtype(self.spec.dtype).itemsize
        if not path.exists() or path.stat().st_size < n_bytes:
            return  # damaged: the next writer starts again
        if meta.n_rows:
            self._rows = np.memmap(path, dtype=self.spec.dtype, mode="r", shape=shape)
        self._meta = meta


class _Worker:
    """One tokenising process; ends with this object, and with the process that made it."""

    def __init__(self, folder: Path, spec: PackingSpec, n_counted: int) -> None:
        job = {"folder": str(folder), "spec": asdict(spec), "n_counted": n_counted, "parent": os.getpid()}
        path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dictlearn.data.worker"],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=self.output,
            env={**os.environ, **WORKER_ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the training, which may still need rows
        )
        stdin = self.process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # it ended at once: its exit status will tell
            stdin.write(json.dumps(job).encode())
            stdin.close()
        self.end = weakref.finalize(self, _end, self.process)

    def code(self) -> int | None:
        return self.process.poll()

    def log_tail(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-LOG_TAIL_CHARS:]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
