"""Where text comes from: documents in a fixed order, each with the cursor after it, chosen by hash.

A cursor is a short list of integers; reading from it gives the documents that follow, so a store of tokens
can be continued. Imported by the tokenising worker: nothing here may import torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from itertools import count
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Cursor = list[int]
HASHES = 2**64  # a document's hash is an integer in [0, HASHES)
HASHED_BYTES = 2**26  # files up to this size are identified by their content, larger ones by size and time


class SourceError(ValueError):
    """The text cannot be read as declared: states the file and what was expected."""


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order. `start` is the cursor of the first one; `endless` text has no last one."""

    start: Cursor
    endless: bool

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, str]]:
        """(cursor after it, text) of the non-blank documents from `cursor` on whose hash satisfies `keep`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the text, JSON-able: equal identities give equal documents."""
        ...

    def spec(self) -> dict[str, Any]:
        """JSON-able; `source_from` makes an equal source of it."""
        ...


def document_hash(content: str) -> int:
    """Uniform in [0, HASHES), the same on every machine."""
    return int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class EmbeddedSource:
    """The endless text of `dictlearn.embedded`; hashed by index, so only chosen documents are generated."""

    seed: int
    start = [0]  # noqa: RUF012
    endless = True

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, str]]:
        from dictlearn.embedded.text import document

        for index in count(cursor[0]):
            if keep(document_hash(f"{self.seed} {index}")):
                yield [index + 1], document(self.seed, index).text

    def identity(self) -> dict[str, Any]:
        folder = Path(__file__).parents[1] / "embedded"
        code = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        return {"kind": "embedded", "seed": self.seed, "generator": blake2b(code, digest_size=16).hexdigest()}

    def spec(self) -> dict[str, Any]:
        return {"kind": "embedded", **asdict(self)}


@dataclass(frozen=True)
class FileSource:
    """Local files of one format, read in the given order; hashed by their text, so copies stay together."""

    files: tuple[str, ...]
    column: str
    start = [0, 0]  # noqa: RUF012
    endless = False

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, str]]:
        first, position = cursor
        for number, name in enumerate(self.files[first:], first):
            read = READERS[Path(name).suffix]
            for after, text in read(Path(name), position if number == first else 0, self.column):
                if text and not text.isspace() and keep(document_hash(text)):
                    yield [number, after], text

    def identity(self) -> dict[str, Any]:
        uses_column = Path(self.files[0]).suffix != ".txt"
        return {
            "kind": "files",
            "files": [_file_identity(Path(name)) for name in self.files],
            "column": self.column if uses_column else None,
        }

    def spec(self) -> dict[str, Any]:
        return {"kind": "files", **asdict(self)}


def source_from(spec: dict[str, Any]) -> Source:
    if spec["kind"] == "embedded":
        return EmbeddedSource(spec["seed"])
    return FileSource(tuple(spec["files"]), spec["column"])


def _file_identity(path: Path) -> list[Any]:
    stat = path.stat()
    if stat.st_size > HASHED_BYTES:
        return [path.suffix, stat.st_size, str(path.resolve()), stat.st_mtime_ns]
    with path.open("rb") as file:
        return [path.suffix, stat.st_size, file_digest(file, "blake2b").hexdigest()[:32]]


def _lines(path: Path, position: int) -> Iterator[tuple[int, str]]:
    """(byte offset after it, line) from byte `position` on."""
    with path.open("rb") as file:
        file.seek(position)
        for raw in file:
            try:
                line = raw.decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path} at byte {position + error.start} is not UTF-8 text") from error
            position += len(raw)
            yield position, line.rstrip("\r\n")


def _read_txt(path: Path, position: int, column: str) -> Iterator[tuple[int, str]]:  # noqa: ARG001
    return _lines(path, position)


def _read_jsonl(path: Path, position: int, column: str) -> Iterator[tuple[int, str]]:
    for after, line in _lines(path, position):
        if line.strip():
            yield after, _json_text(f"{path} before byte {after}", line, column)


def _json_text(place: str, line: str, column: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"{place}: a line of a .jsonl file is one JSON object, but {error}") from error
    if not isinstance(record, dict):
        raise SourceError(f"{place}: a line of a .jsonl file is one JSON object, not {line[:40]!r}")
    if column not in record:
        raise SourceError(f"{place}: no column {column!r}; it has {', '.join(map(str, record))}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{place}: column {column!r} holds {type(text).__name__}, not text")
    return text or ""


def _read_parquet(path: Path, position: int, column: str) -> Iterator[tuple[int, str]]:
    """(rows read so far, text) from row `position` on; one row group in memory at most."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path} is not a parquet file: {error}") from error
    with file:
        _check_parquet_column(path, file.schema_arrow, column)
        row = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if row + n_rows <= position:
                row += n_rows
                continue
            for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > position:
                        yield row, text or ""


def _check_parquet_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa

    if column not in schema.names:
        raise SourceError(f"{path}: no column {column!r}; it has {', '.join(schema.names)}")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise SourceError(f"{path}: column {column!r} holds {kind}, not text")


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
