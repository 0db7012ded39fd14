"""Constructors as users meet them: without the type checker of the tests, which refuses wrong types first."""

import inspect
from typing import Any, TypeVar

T = TypeVar("T")


def unchecked(cls: type[T], **arguments: Any) -> T:
    """`cls(**arguments)`, the arguments' types unchecked."""
    made = cls.__new__(cls)
    inspect.unwrap(cls.__init__)(made, **arguments)
    return made
