"""Reading weights that others have written: plain tensors and JSON, of the shapes expected, all values finite.

Files are data. safetensors and npz hold arrays alone; of torch's pickles only tensors and plain values are read.
Tensors of safetensors and torch files are views of the file until they are copied.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dictlearn.types import FormatError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of its name and extra field
MOST_INFLATED = 1_100  # times what is stored; deflate reaches 1,032
MOST_BYTES, MOST_VALUES = 1_000_000, 100_000  # of a configuration in YAML
MOST_JSON_BYTES = 10_000_000
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
NUMPY_FLOATS = (np.float16, np.float32, np.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

DAMAGED = (  # what numpy and torch raise of files that are cut off or have other bytes
    *(OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, RuntimeError, SyntaxError, TokenError, UnpicklingError),
    *(struct.error, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile),
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FormatError if the file is missing, not JSON or not an object."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {MOST_JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        _text(content)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
    except RecursionError:
        raise FormatError(f"{path} is not valid JSON: nested too deeply.") from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of values that JSON has as well, others as text; FormatError where there is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if _n_values(content, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        content = json.loads(_text(content))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except (*DAMAGED, yaml.YAMLError) as error:
        raise FormatError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a mapping, found {type(content).__name__}.")
    return content


class _Loader(yaml.SafeLoader):
    """Plain values, without merge keys: a few nested ones stand for more pairs than there is memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", node.start_mark)


def _text(content: object) -> bytes:
    """In JSON; ValueError where text in it has halves of characters, which could not be printed in a message."""
    return json.dumps(content, default=str, ensure_ascii=False).encode()


def _n_values(value: Any, known: dict[int, int]) -> int:
    """How many values there are with repeated ones written out, which takes no time that grows with them."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES  # of one that holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_n_values(part, known) for part in parts)
    return known[id(value)]


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file, from its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}.") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, unchecked."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}.") from None


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with exactly the keys and shapes given, all finite."""
    tensors = load_tensors(path)
    check_tensors(path, tensors, shapes)
    return tensors


def encoder_sizes(path: Path, tensors: Mapping[str, Any], key: str) -> tuple[int, int]:
    """The two axes of the encoder's weights; FormatError where there is no such tensor."""
    encoder = tensors.get(key)
    if not isinstance(encoder, Tensor) or encoder.is_nested or encoder.ndim != 2:
        raise FormatError(f"{path} must hold {key} with two axes; it holds {sorted(map(str, tensors))}.")
    return encoder.shape[0], encoder.shape[1]


def check_tensors(
    path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], integers: Collection[str] = ()
) -> None:
    """Raise FormatError unless there are exactly these keys and shapes, and all values are finite.

    integers: keys of those that may hold whole numbers.
    """
    if set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(map(str, set(tensors) - set(shapes)))
        raise FormatError(f"{path} must hold {sorted(shapes)}; missing {missing}, unexpected {extra}.")
    if odd := sorted(key for key in shapes if not isinstance(tensors[key], Tensor)):
        raise FormatError(f"{path} must hold tensors; {', '.join(odd)} are not.")
    for key, shape in shapes.items():
        tensor = tensors[key]
        allowed = (*FLOATS, *INTEGERS) if key in integers else FLOATS
        if tensor.layout != torch.strided or tensor.is_nested or tensor.dtype not in allowed:
            raise FormatError(f"{path}: {key} must hold real numbers, found {tensor.dtype} {tensor.layout}.")
        found = tuple(tensor.shape)
        if found != shape:
            raise FormatError(f"{path}: {key} must have shape {list(shape)}, found {list(found)}.")
        if not tensor.numel() or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            stored = 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
            raise FormatError(f"{path}: {key} must hold values, found {stored} bytes for shape {list(shape)}.")
        if not is_finite(tensor):
            raise FormatError(f"{path}: {key} has values that are not finite.")


def number_in(value: object) -> int | float | None:
    """A number, or the one in a tensor; None for anything else."""
    if (
        isinstance(value, Tensor)
        and value.dtype in (*FLOATS, *INTEGERS)
        and value.numel() == 1
        and not value.is_meta
    ):
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; without a copy, in whatever order of axes they are stored."""
    if not tensor.numel():
        return True
    in_order = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return all(bool(bound.isfinite()) for bound in in_order.aminmax())


def read_npz(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The arrays of numbers in an npz file, which are none but `names`: others are not even unpacked. Raises
    FormatError where it is no such file, has others, or holds objects.

    Arrays that are not compressed are views of the file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if odd := sorted({name.removesuffix(".npy") for name in file.namelist()} - set(names)):
                raise FormatError(f"{path} has unexpected {odd}; it may hold {sorted(names)}.")
            arrays = {m.filename.removesuffix(".npy"): _array(path, file, m) for m in file.infolist()}
    except FileNotFoundError:
        raise FormatError(f"{path} is missing.") from None
    except DAMAGED as error:
        raise FormatError(f"{path} is not a whole npz file of arrays: {error}.") from None
    if odd := sorted(key for key, array in arrays.items() if array.dtype.type not in NUMPY_FLOATS):
        raise FormatError(f"{path} must hold arrays of real numbers; {', '.join(odd)} are not.")
    return {
        key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        for key, array in arrays.items()
    }


def _array(path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array, of which there is as much as its header says; a view of the file where it is not compressed."""
    with file.open(member) as stream:
        shape, fortran, dtype = NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        n_header = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    n_bytes = member.file_size - n_header
    if math.prod(shape) * dtype.itemsize != n_bytes or member.file_size > MOST_INFLATED * member.compress_size:
        raise ValueError(f"{member.filename} has {n_bytes} bytes, which are not {list(shape)} of {dtype}")
    if member.compress_type == zipfile.ZIP_STORED and shape and n_bytes:
        return np.memmap(path, dtype, "c", _start(path, member) + n_header, shape, "F" if fortran else "C")
    with file.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member that is stored as it is begins in the file; its checksum is compared."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        _, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if zlib.crc32(np.memmap(path, np.uint8, "r", start, (member.file_size,)).data) != member.CRC:
        raise zipfile.BadZipFile(f"bad checksum of {member.filename}")
    return start


def read_torch(path: Path) -> dict[str, Any]:
    """The mapping in a file of torch.save; FormatError where there is none, or code would have to be run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGED as error:
        raise FormatError(f"{path} is not a torch file of tensors and plain values: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a mapping, found {type(content).__name__}.")
    return content
