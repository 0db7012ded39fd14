"""Checks of single values that users give, with one wording."""

from __future__ import annotations

import sys
from typing import Any

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError

LARGEST = sys.float_info.max


def check_count(name: str, value: Any, least: int = 1, or_null: bool = False) -> None:
    """Raise DictlearnError unless `value` is a whole number of at least `least` (or null)."""
    if is_count(value, least) or (or_null and value is None):
        return
    null = "null or " if or_null else ""
    raise DictlearnError(f"{name} must be {null}a whole number, at least {least}, got {value!r}.")


def check_number(name: str, value: Any, least: float = 0.0, or_null: bool = False) -> None:
    """Raise DictlearnError unless `value` is a finite number of at least `least` (or null)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (number and least <= value <= LARGEST) or (or_null and value is None):
        return
    null = "null or " if or_null else ""
    raise DictlearnError(f"{name} must be {null}a finite number, at least {least:g}, got {value!r}.")


def check_positive(name: str, value: Any, or_null: bool = False) -> None:
    """Raise DictlearnError unless `value` is a finite number above 0 (or null)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (number and 0 < value <= LARGEST) or (or_null and value is None):
        return
    null = " or null" if or_null else ""
    raise DictlearnError(f"{name} must be a positive number{null}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise DictlearnError unless `value` is one of `choices`."""
    if value not in choices:
        raise DictlearnError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise DictlearnError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise DictlearnError(f"{name} must be true or false, got {value!r}.")
