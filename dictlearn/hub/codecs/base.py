"""The interface of a codec."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.files import Files


@runtime_checkable
class Codec(Protocol):
    """Reads one format of files. Files are data: nothing in them names code to run.

    A dictionary is at a place: the name of a folder ("" for that of `files` itself) or of a file.
    """

    layout: ClassVar[str]  # the files of a dictionary, in a message

    def find(self, names: Sequence[str]) -> list[str]:
        """The places of dictionaries, as far as the names of the files tell."""
        ...

    def matches(self, files: Files, place: str) -> bool:
        """Whether what is at one of these places is of this format, by its content."""
        ...

    def read(self, files: Files, place: str) -> Dictionary:
        """The dictionary at a place, frozen. Raises FormatError naming file, key and expectation."""
        ...


@runtime_checkable
class WritingCodec(Codec, Protocol):
    """Writes the format as well."""

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Write an inference dictionary into `folder`."""
        ...


@runtime_checkable
class NamingCodec(Codec, Protocol):
    """Has files besides that are loaded (or refused with the reason) by their own path alone."""

    def named(self, names: Sequence[str]) -> list[str]:
        """The places of these: they are what neither a folder nor a pattern stands for."""
        ...


def folders_with(names: Sequence[str], *needed: str) -> list[str]:
    """The folders, "" for the first one, that hold all these files."""
    found = {posixpath.dirname(name) for name in names if posixpath.basename(name) == needed[0]}
    present = set(names)
    return sorted(folder for folder in found if all(posixpath.join(folder, name) in present for name in needed))
