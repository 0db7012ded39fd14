"""The tokenising process: `python -m dictlearn.data.worker` with a JSON job on standard input.

Started by TokenStore; appends to the store until the asked number of counted tokens, or the end of the text.
It may be killed at any moment, and ends by itself when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer

from dictlearn.data.packing import LOCK_FILE, TOKENIZER_FILE, PackingSpec, Writer
from dictlearn.data.sources import Cursor, SourceError, source_from

FIRST_CHARS, MOST_CHARS = 2**15, 2**20  # text tokenised between two appends: little at first, for a fast start
POLL_SECONDS = 0.1
NICENESS = 5  # runs ahead in what the training leaves free


def run(job: dict[str, Any]) -> None:
    """`job`: folder, spec (of PackingSpec), n_counted (the target), parent (process id)."""
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    folder, spec = Path(job["folder"]), PackingSpec(**job["spec"])
    with FileLock(folder / LOCK_FILE, poll_interval=POLL_SECONDS):
        source = source_from(spec.source)
        writer = Writer(folder, spec, source.start)
        if writer.meta.complete or writer.meta.n_counted >= job["n_counted"]:
            return
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        documents = source.documents(writer.meta.cursor, spec.keep)
        for texts, cursor, last in _chunks(documents, writer.meta.cursor):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            writer.append([encoding.ids for encoding in encodings], cursor, complete=last)
            if writer.meta.n_counted >= job["n_counted"]:
                return


def _chunks(documents: Iterator[tuple[Cursor, str]], cursor: Cursor) -> Iterator[tuple[list[str], Cursor, bool]]:
    """(texts, cursor after them, whether the text ends here), each twice as long as the one before."""
    texts: list[str] = []
    n_chars, limit = 0, FIRST_CHARS
    for cursor, text in documents:
        texts.append(text)
        n_chars += len(text)
        if n_chars >= limit:
            yield texts, cursor, False
            texts, n_chars, limit = [], 0, min(2 * limit, MOST_CHARS)
    yield texts, cursor, True


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    os.nice(NICENESS)
    try:
        run(json.load(sys.stdin))
    except SourceError as error:
        sys.exit(str(error))
