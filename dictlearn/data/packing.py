"""Documents -> rows of `ctx` token ids, and the folder that keeps them. Nothing here may import torch.

A store is a folder: `rows.bin`, rows of ctx unsigned integers, only ever appended to; `meta.json`, how many of
them count and where to continue, replaced atomically after the rows are on disk. Killed at any moment, what
meta.json says is true, and the next writer cuts off the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dictlearn.files import reason

ROWS_FILE, META_FILE, LOCK_FILE, TOKENIZER_FILE = "rows.bin", "meta.json", "lock", "tokenizer.json"


class CacheError(Exception):
    """The cache cannot be used: states the folder, what happened and the setting."""


@contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """An OSError inside the block, about the files in `folder`, becomes a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"The cache {folder} cannot be used ({reason(error)}): make room there, or set data.cache_dir to "
            f"another folder"
        ) from error


@dataclass(frozen=True)
class PackingSpec:
    """What a store holds, JSON-able. `special` are the token ids that are never counted.

    Split "heldout" is the documents whose hash is below `threshold`, split "train" all others.
    """

    source: dict[str, Any]
    split: str
    threshold: int
    ctx: int
    bos: int | None
    special: list[int]
    dtype: str  # of rows.bin

    def keep(self, document_hash: int) -> bool:
        return (document_hash < self.threshold) == (self.split == "heldout")


@dataclass(frozen=True)
class Meta:
    """The state of a store: whole rows on disk, and where the next document starts."""

    cursor: list[int]
    n_rows: int = 0
    n_counted: int = 0  # tokens of these rows that are not masked
    pending: tuple[int, ...] = ()  # tokens of documents before the cursor that fill no row yet
    complete: bool = False  # the text has ended


class Packer:
    """Cuts a stream of documents, each preceded by BOS, into rows.

    A row is BOS and the next ctx - 1 tokens of the stream; a document's own BOS is not repeated where it falls
    at the start of a row. Without a BOS token a row is the next ctx tokens. How the documents are divided over
    calls of `add` does not matter.
    """

    def __init__(self, ctx: int, bos: int | None, pending: Sequence[int] = ()) -> None:
        self.ctx, self.bos = ctx, bos
        self.pending = list(pending)

    def add(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """The rows that are now full, [n, ctx]; the rest stays in `pending`. Empty documents are skipped."""
        stream = self.pending
        for ids in documents:
            if ids:
                stream.extend(ids if self.bos is None else [self.bos, *ids])
        width = self.ctx if self.bos is None else self.ctx - 1
        starts, position = [], self._skip_bos(stream, 0)
        while position + width <= len(stream):
            starts.append(position)
            position = self._skip_bos(stream, position + width)
        rows = np.array(stream, dtype=np.int64)[np.array(starts, dtype=np.int64)[:, None] + np.arange(width)]
        self.pending = stream[position:]
        if self.bos is None:
            return rows
        return np.concatenate([np.full((len(rows), 1), self.bos), rows], axis=1)

    def _skip_bos(self, stream: list[int], position: int) -> int:
        while self.bos is not None and position < len(stream) and stream[position] == self.bos:
            position += 1
        return position


def counted(rows: np.ndarray, special: Sequence[int], bos: int | None) -> np.ndarray:
    """True where a token is trained on: not special, and not at position 0 of a row without BOS."""
    mask = ~np.isin(rows, special)
    if bos is None:
        mask[:, 0] = False
    return mask


def read_meta(folder: Path) -> Meta | None:
    """The state of the store, or None where there is no whole one (not yet written, or damaged)."""
    try:
        fields = json.loads((folder / META_FILE).read_text())
        return Meta(**{**fields, "pending": tuple(fields["pending"])})
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        return None


class Writer:
    """Appends rows to a store; the caller holds its lock. Repairs what a killed writer left."""

    def __init__(self, folder: Path, spec: PackingSpec, start: list[int]) -> None:
        self.folder, self.spec = folder, spec
        self.row_bytes = spec.ctx * np.dtype(spec.dtype).itemsize
        path = folder / ROWS_FILE
        with cached_in(folder):
            size = path.stat().st_size if path.exists() else 0
            meta = read_meta(folder)
            if meta is None or meta.n_rows * self.row_bytes > size:  # nothing whole: start again
                meta = Meta(cursor=start)
            path.touch()
            os.truncate(path, meta.n_rows * self.row_bytes)
        self.meta = meta
        self.packer = Packer(spec.ctx, spec.bos, meta.pending)

    def append(self, documents: Sequence[Sequence[int]], cursor: list[int], complete: bool) -> None:
        """Tokenised documents, and the cursor after the last of them."""
        rows = self.packer.add(documents)
        with cached_in(self.folder), (self.folder / ROWS_FILE).open("ab") as file:
            file.write(rows.astype(self.spec.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.meta = Meta(
            cursor=cursor,
            n_rows=self.meta.n_rows + len(rows),
            n_counted=self.meta.n_counted + int(counted(rows, self.spec.special, self.spec.bos).sum()),
            pending=tuple(self.packer.pending),
            complete=complete,
        )
        write_atomically(self.folder / META_FILE, json.dumps(asdict(self.meta)))


def write_atomically(path: Path, content: str) -> None:
    """Readers see the old file or the new one, never a part. Makes the folder. Raises CacheError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with cached_in(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
