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

from dictlearn.data.packing import LOCK_FILE, TOKENIZER_FILE, CacheError, PackingSpec, Writer, cached_in
from dictlearn.data.readers import Document, SourceError
from dictlearn.data.sources import Cursor, Source, source_from

FIRST_CHARS, MOST_CHARS = 2**15, 2**20  # characters or token ids between two appends: few at first, to start fast
POLL_SECONDS = 0.1
NICENESS = 5  # runs ahead in what the training leaves free


def run(job: dict[str, Any]) -> None:
    """`job`: folder, spec (of PackingSpec), n_counted (the target), parent (process id)."""
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    folder, spec = Path(job["folder"]), PackingSpec(**job["spec"])
    with cached_in(folder):
        lock = FileLock(folder / LOCK_FILE, poll_interval=POLL_SECONDS).acquire()
    with lock:
        source = source_from(spec.source)
        writer = Writer(folder, spec, source.start)
        if writer.meta.complete or writer.meta.n_counted >= job["n_counted"]:
            return
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        documents = _checked(source, source.documents(writer.meta.cursor, spec.keep), tokenizer, spec.bos)
        for chunk, cursor, last in _chunks(documents, writer.meta.cursor):
            writer.append(_token_ids(tokenizer, chunk), cursor, complete=last)
            if writer.meta.n_counted >= job["n_counted"]:
                return


def _checked(
    source: Source, documents: Iterator[tuple[Cursor, Document]], tokenizer: Tokenizer, bos: int | None
) -> Iterator[tuple[Cursor, Document]]:
    """Token ids without a BOS of their own, which the packer writes; SourceError where one is none of the LM's."""
    n_ids = max(tokenizer.get_vocab().values()) + 1
    for cursor, document in documents:
        if isinstance(document, str):
            yield cursor, document
            continue
        if (largest := max(document)) >= n_ids:
            raise SourceError(
                f"{source.place(cursor)}: token id {largest} is not in the vocabulary of the LM, which ends at "
                f"{n_ids - 1}: the text was tokenised for another LM"
            )
        yield cursor, document[1:] if document[0] == bos else document


def _token_ids(tokenizer: Tokenizer, documents: list[Document]) -> list[list[int]]:
    texts = [document for document in documents if isinstance(document, str)]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return [next(encodings).ids if isinstance(document, str) else document for document in documents]


def _chunks(
    documents: Iterator[tuple[Cursor, Document]], cursor: Cursor
) -> Iterator[tuple[list[Document], Cursor, bool]]:
    """(documents, cursor after them, whether the text ends here), each twice as long as the one before."""
    chunk: list[Document] = []
    n_chars, limit = 0, FIRST_CHARS
    for cursor, document in documents:
        chunk.append(document)
        n_chars += len(document)
        if n_chars >= limit:
            yield chunk, cursor, False
            chunk, n_chars, limit = [], 0, min(2 * limit, MOST_CHARS)
    yield chunk, cursor, True


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    os.nice(NICENESS)
    try:
        run(json.load(sys.stdin))
    except (SourceError, CacheError) as error:
        sys.exit(str(error))
