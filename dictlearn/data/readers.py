"""Documents in one file of each format, from a position on. Imported by the tokenising worker: no torch here.

A document is text, or the token ids of text that is tokenised already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from dictlearn.files import reason

Document: TypeAlias = str | list[int]
MOST_ID = 2**31  # every token id is below


class SourceError(ValueError):
    """The text cannot be read as declared: states the place and what was expected."""


def as_document(value: Any, place: str, column: str) -> Document:
    """One value of a column: a string is text (null: none), a list of integers is token ids."""
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write a half of a pair of surrogates
            raise SourceError(
                f"{place}: column {column!r} holds text that is not valid Unicode: {error}"
            ) from error
        return value
    kind = type(value).__name__
    if isinstance(value, list):
        wrong = {type(v) for v in value} - {int}
        if not wrong:
            if value and not 0 <= min(value) <= max(value) < MOST_ID:
                bad = next(v for v in value if not 0 <= v < MOST_ID)
                raise SourceError(f"{place}: {bad} in column {column!r} is no token id")
            return value
        names = sorted("null" if v is type(None) else v.__name__ for v in wrong)
        kind = f"lists of {' and '.join(names)}"
    raise SourceError(f"{place}: column {column!r} holds {kind}, not text or lists of token ids")


def check_column(place: str, schema: Any, column: str) -> None:
    """Raise SourceError unless `column` of an Arrow schema has strings or lists of integers."""
    import pyarrow as pa

    if column not in schema.names:
        raise SourceError(f"{place}: no column {column!r}; it has {', '.join(schema.names)}")
    kind = declared = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not text and not (lists and pa.types.is_integer(kind.value_type)):
        raise SourceError(f"{place}: column {column!r} holds {declared}, not text or lists of token ids")


def read_whole(path: Path, position: int, column: str) -> Iterator[tuple[int, Document]]:  # noqa: ARG001
    """The file as one document."""
    if position:
        return
    lines = list(_lines(path, 0))
    size = lines[-1][0] if lines else 0
    yield max(size, 1), "\n".join(line for _, line in lines)


def _lines(path: Path, position: int) -> Iterator[tuple[int, str]]:
    """(byte offset after it, line) from byte `position` on."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            for raw in file:
                line = raw.decode("utf-8-sig" if position == 0 else "utf-8")
                position += len(raw)
                yield position, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} at byte {position + error.start} is not UTF-8 text") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read from byte {position} on: {reason(error)}") from error


def _read_txt(path: Path, position: int, column: str) -> Iterator[tuple[int, Document]]:  # noqa: ARG001
    return _lines(path, position)


def _read_jsonl(path: Path, position: int, column: str) -> Iterator[tuple[int, Document]]:
    for after, line in _lines(path, position):
        if line.strip():
            yield after, _json_document(f"{path} before byte {after}", line, column)


def _json_document(place: str, line: str, column: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also of numbers and nesting beyond Python's limits
        raise SourceError(f"{place}: a line of a .jsonl file is one JSON object, but {error}") from error
    if not isinstance(record, dict):
        raise SourceError(f"{place}: a line of a .jsonl file is one JSON object, not {line[:40]!r}")
    if column not in record:
        raise SourceError(f"{place}: no column {column!r}; it has {', '.join(map(str, record))}")
    return as_document(record[column], place, column)


def _read_parquet(path: Path, position: int, column: str) -> Iterator[tuple[int, Document]]:
    """(rows read so far, document) from row `position` on; one row group in memory at most."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            check_column(str(path), file.schema_arrow, column)
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                if row + n_rows <= position:
                    row += n_rows
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row > position:
                            yield row, as_document(value, f"{path} row {row}", column)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as parquet after row {row}: {reason(error)}") from error


Reader: TypeAlias = Callable[[Path, int, str], Iterator[tuple[int, Document]]]
READERS: dict[str, Reader] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
