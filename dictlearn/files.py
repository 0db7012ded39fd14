"""Folders that will be written to, and what the operating system says where a file cannot be used."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def folder_problem(key: str, value: Any) -> str | None:
    """What is wrong with `value` as the folder of the setting `key`, one sentence; None if it can be written to.

    A folder that does not exist yet is judged by the nearest one above it that does. Nothing is left behind.
    """
    if not isinstance(value, str) or not value:
        return f"{key} must be a folder, got {value!r}"
    try:
        there = next(path for path in (Path(value), *Path(value).absolute().parents) if _exists(path))
        if not there.is_dir():
            return f"{key} must be a folder, but {there} is a file"
        TemporaryDirectory(dir=there).cleanup()  # permission bits say nothing to root or of read-only file systems
    except OSError as error:
        return f"{key} must be a folder that can be written, but {value} cannot: {reason(error)}"
    return None


def reason(error: Exception) -> str:
    """What happened, in one line without the place: "No space left on device"."""
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def _exists(path: Path) -> bool:
    """Links that lead nowhere exist. Raises OSError where that cannot be known, as of a name that is too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
