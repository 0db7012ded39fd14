"""Where text comes from: documents in a fixed order, each with the cursor after it, chosen by hash.

A cursor is a short list of integers; reading from it gives the documents that follow, so a store of tokens
can be continued. Imported by the tokenising worker: nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from dictlearn.data.readers import READERS, Document, SourceError, read_whole
from dictlearn.files import reason

Cursor = list[int]
HASHES = 2**64  # a document's hash is an integer in [0, HASHES)
HASHED_BYTES = 2**26  # files up to this size are identified by their content, larger ones by size and time


@runtime_checkable
class Source(Protocol):
    """Documents in a fixed order. `start` is the cursor of the first one; `endless` text has no last one."""

    start: Cursor
    endless: bool

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, Document]]:
        """(cursor after it, document) of the non-blank documents from `cursor` on whose hash satisfies `keep`."""
        ...

    def place(self, cursor: Cursor) -> str:
        """Where the document before `cursor` is, for messages."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the text, JSON-able: equal identities give equal documents and cursors."""
        ...

    def spec(self) -> dict[str, Any]:
        """JSON-able; `source_from` makes an equal source of it."""
        ...


def document_hash(content: Document) -> int:
    """Uniform in [0, HASHES), the same on every machine; of token ids where the document is token ids."""
    if isinstance(content, str):
        return int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")
    ids = np.array(content, dtype="<i8").tobytes()
    return int.from_bytes(blake2b(ids, digest_size=8).digest(), "big")


def is_blank(document: Document) -> bool:
    return not document or (isinstance(document, str) and document.isspace())


@dataclass(frozen=True)
class EmbeddedSource:
    """The endless text of `dictlearn.embedded`; hashed by index, so only chosen documents are generated."""

    seed: int
    start = [0]  # noqa: RUF012
    endless = True

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, Document]]:
        from dictlearn.embedded.text import document

        for index in count(cursor[0]):
            if keep(document_hash(f"{self.seed} {index}")):
                yield [index + 1], document(self.seed, index).text

    def place(self, cursor: Cursor) -> str:
        return f"document {cursor[0] - 1} of seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        folder = Path(__file__).parents[1] / "embedded"
        code = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        return {"kind": "embedded", "seed": self.seed, "generator": blake2b(code, digest_size=16).hexdigest()}

    def spec(self) -> dict[str, Any]:
        return {"kind": "embedded", **asdict(self)}


@dataclass(frozen=True)
class FileSource:
    """Local files of one format, read in the given order; hashed by their content, so copies stay together.

    `document`: what is one document of a .txt file, a line or the file.
    """

    files: tuple[str, ...]
    column: str
    document: Literal["line", "file"] = "line"
    start = [0, 0]  # noqa: RUF012
    endless = False

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, Document]]:
        first, position = cursor
        for number, name in enumerate(self.files[first:], first):
            read = read_whole if self.document == "file" else READERS[Path(name).suffix]
            for after, document in read(Path(name), position if number == first else 0, self.column):
                if not is_blank(document) and keep(document_hash(document)):
                    yield [number, after], document

    def place(self, cursor: Cursor) -> str:
        name = self.files[cursor[0]]
        return f"{name} row {cursor[1]}" if name.endswith(".parquet") else f"{name} before byte {cursor[1]}"

    def identity(self) -> dict[str, Any]:
        is_txt = Path(self.files[0]).suffix == ".txt"
        return {
            "kind": "files",
            "files": [file_identity(Path(name)) for name in self.files],
            "column": None if is_txt else self.column,
            "document": self.document if is_txt else None,
        }

    def spec(self) -> dict[str, Any]:
        return {"kind": "files", **asdict(self)}


def source_from(spec: dict[str, Any]) -> Source:
    fields: dict[str, Any] = {key: value for key, value in spec.items() if key != "kind"}
    if "files" in fields:
        fields["files"] = tuple(fields["files"])
    if spec["kind"] == "embedded":
        return EmbeddedSource(**fields)
    if spec["kind"] == "files":
        return FileSource(**fields)
    from dictlearn.data.hub import HubSource  # a second to import

    return HubSource(**fields)


def file_identity(path: Path) -> list[Any]:
    """Suffix, size and content of a file; of a large one, its place and time instead of the content."""
    try:
        stat = path.stat()
        if stat.st_size > HASHED_BYTES:
            return [path.suffix, stat.st_size, str(path.resolve()), stat.st_mtime_ns]
        with path.open("rb") as file:
            return [path.suffix, stat.st_size, file_digest(file, "blake2b").hexdigest()[:32]]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {reason(error)}") from error
