"""The interface of a codec, and the checks that every file of weights goes through."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError


@runtime_checkable
class Codec(Protocol):
    """Reads and writes one on-disk format. Files are data: nothing in them names code to run."""

    def matches(self, files: Iterable[str], cfg: Mapping[str, Any]) -> bool:
        """Whether a folder with these file names and this `cfg.json` (empty if absent) is of this format."""
        ...

    def read(self, folder: Path) -> Dictionary:
        """The dictionary in `folder`, frozen. Raises FormatError naming file, key and expectation."""
        ...

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """Write an inference dictionary into `folder`."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FormatError if the file is missing, not JSON or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise FormatError(f"{path} is not valid JSON: nested too deeply.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}.") from None


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file as float32, with exactly the keys and shapes given, all finite."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}.") from None
    if set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise FormatError(f"{path} must hold {sorted(shapes)}; missing {missing}, unexpected {extra}.")
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape)
        if found != shape:
            raise FormatError(f"{path}: {key} must have shape {list(shape)}, found {list(found)}.")
        tensors[key] = tensors[key].to(torch.float32)
        if not tensors[key].isfinite().all():
            raise FormatError(f"{path}: {key} has values that are not finite.")
    return tensors
