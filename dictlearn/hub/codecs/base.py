"""The interface of a codec, and the checks that every file of weights goes through."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.files import Files
from dictlearn.types import FormatError


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


def folders_with(names: Sequence[str], *needed: str) -> list[str]:
    """The folders, "" for the first one, that hold all these files."""
    found = {posixpath.dirname(name) for name in names if posixpath.basename(name) == needed[0]}
    present = set(names)
    return sorted(folder for folder in found if all(posixpath.join(folder, name) in present for name in needed))


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
    check_tensors(path, tensors, shapes)
    return {key: tensor.to(torch.float32) for key, tensor in tensors.items()}


def check_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError unless there are exactly these keys and shapes, and all values are finite."""
    if set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise FormatError(f"{path} must hold {sorted(shapes)}; missing {missing}, unexpected {extra}.")
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape)
        if found != shape:
            raise FormatError(f"{path}: {key} must have shape {list(shape)}, found {list(found)}.")
        if tensors[key].numel() and not all(bound.isfinite() for bound in tensors[key].aminmax()):
            raise FormatError(f"{path}: {key} has values that are not finite.")
