"""A kind is a file: `lookup("dictlearn.sparsifiers", "top_k")` is the class that `top_k.py` defines.

Adding an architecture, sparsifier, loss or codec is adding one file; nothing else lists the kinds.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType

from dictlearn.types import DictlearnError


def kinds(package: str) -> list[str]:
    """Names of the public modules in `package`, except `base`, sorted."""
    path = importlib.import_module(package).__path__
    names = (info.name for info in pkgutil.iter_modules(path))
    return sorted(name for name in names if not name.startswith("_") and name != "base")


def lookup(package: str, kind: str) -> type:
    """The class of `kind`: the last public class that the module itself defines.

    Raises DictlearnError, with the choices, when there is no such file. Only names from the folder listing are
    imported, so a `kind` read from a downloaded file cannot name anything else.
    """
    choices = kinds(package)
    if kind not in choices:
        close = difflib.get_close_matches(kind, choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DictlearnError(f"{package} has no kind {kind!r}; it has {', '.join(choices)}.{hint}")
    module = importlib.import_module(f"{package}.{kind}")
    return _own_classes(module)[-1]


def _own_classes(module: ModuleType) -> list[type]:
    """Public classes in the order of their definitions, which is that of a module's names."""
    members = [m for m in vars(module).values() if inspect.isclass(m) and m.__module__ == module.__name__]
    public = [m for m in members if not m.__name__.startswith("_")]
    if not public:
        raise TypeError(f"{module.__name__} defines no public class")
    return public


def kind_of(obj: object) -> str:
    """The kind of an instance: the name of the file that defines its class."""
    return type(obj).__module__.rsplit(".", 1)[-1]
