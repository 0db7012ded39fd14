"""`manifest.jsonl` of a published repository: one line for each file of a dictionary, {path, size, sha256}.

The line of the weights has the dictionary's facts besides, under `dictionary`; the model card is made of them.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub import CommitOperationAdd

from dictlearn.hub.card import Facts
from dictlearn.types import FormatError

MANIFEST = "manifest.jsonl"

Lines = dict[str, dict[str, Any]]  # by path


def sha256(addition: CommitOperationAdd) -> str:
    return addition.upload_info.sha256.hex()


def read_lines(text: str, where: str) -> Lines:
    """Raises FormatError for a line without a path; others may have written more into them than we do."""
    lines: Lines = {}
    for i, raw in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(raw)
            lines[str(line["path"])] = line
        except (json.JSONDecodeError, RecursionError, TypeError, KeyError) as error:
            raise FormatError(
                f"{where}, line {i}, is no JSON object with a path: correct it, or remove it."
            ) from error
    return lines


def merged(
    old: Mapping[str, dict[str, Any]], present: Collection[str], additions: list[CommitOperationAdd]
) -> Lines:
    """The lines of what is `present` in the repository and of what is added to it."""
    lines = {path: line for path, line in old.items() if path in present}
    for addition in additions:
        path = addition.path_in_repo
        lines[path] = {"path": path, "size": addition.upload_info.size, "sha256": sha256(addition)}
    return lines


def rows(lines: Lines) -> dict[str, Facts]:
    """The facts of dictionaries, by their folders."""
    known = {path: line.get("dictionary") for path, line in lines.items()}
    return {posixpath.dirname(path): facts for path, facts in known.items() if isinstance(facts, dict)}


def text_of(lines: Lines) -> str:
    return "".join(f"{json.dumps(lines[path])}\n" for path in sorted(lines))
