"""Reading weights that others have written: plain tensors and JSON, of the shapes expected, all values finite.

Files are data. safetensors and npz hold arrays alone; of torch's pickles only tensors and plain values are read.
Tensors of safetensors and torch files are views of the file until they are copied.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dictlearn.types import FormatError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of its name and extra field
LOCAL_SIGNATURE = b"PK\x03\x04"
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

DAMAGED = (  # what numpy and torch raise of files that are cut off or have other bytes
    *(OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, RuntimeError, SyntaxError, TokenError, UnpicklingError),
    *(struct.error, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile),
)


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
    except ValueError as error:
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
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise FormatError(f"{path} must hold {key} with two axes; it holds {sorted(map(str, tensors))}.")
    return encoder.shape[0], encoder.shape[1]


def check_tensors(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError unless there are exactly these keys and shapes, and all values are finite."""
    if set(tensors) != set(shapes):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(map(str, set(tensors) - set(shapes)))
        raise FormatError(f"{path} must hold {sorted(shapes)}; missing {missing}, unexpected {extra}.")
    if odd := sorted(key for key in shapes if not isinstance(tensors[key], Tensor)):
        raise FormatError(f"{path} must hold tensors; {', '.join(odd)} are not.")
    for key, shape in shapes.items():
        found = tuple(tensors[key].shape)
        if found != shape:
            raise FormatError(f"{path}: {key} must have shape {list(shape)}, found {list(found)}.")
        if tensors[key].layout != torch.strided or tensors[key].is_complex() or tensors[key].is_quantized:
            raise FormatError(
                f"{path}: {key} must hold real numbers, found {tensors[key].dtype} {tensors[key].layout}."
            )
        if not is_finite(tensors[key]):
            raise FormatError(f"{path}: {key} has values that are not finite.")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; without a copy, in whatever order of axes they are stored."""
    if not tensor.numel():
        return True
    in_order = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    return all(bool(bound.isfinite()) for bound in in_order.aminmax())


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of numbers in an npz file. Raises FormatError where it is none, or holds objects.

    Arrays that are not compressed are views of the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            assert file.zip is not None
            stored = {info.filename: info for info in file.zip.infolist()}
            arrays = {
                key: _stored_array(path, stored[f"{key}.npy"]) if f"{key}.npy" in stored else None
                for key in file.files
            }
            arrays = {key: file[key] if array is None else array for key, array in arrays.items()}
    except DAMAGED as error:
        why = "it holds Python objects" if "allow_pickle" in str(error) else str(error)
        raise FormatError(f"{path} is not a whole npz file of arrays: {why}.") from None
    if odd := sorted(key for key, array in arrays.items() if not np.issubdtype(array.dtype, np.floating)):
        raise FormatError(f"{path} must hold arrays of real numbers; {', '.join(odd)} are not.")
    return {
        key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        for key, array in arrays.items()
    }


def _stored_array(path: Path, member: zipfile.ZipInfo) -> np.ndarray | None:
    """A view of an array that is stored as it is, its checksum compared; None where numpy has to read it."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER.size)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(local)
        if signature != LOCAL_SIGNATURE:
            raise zipfile.BadZipFile(f"no local header of {member.filename}")
        start = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if zlib.crc32(np.memmap(path, np.uint8, "r", start, (member.file_size,)).data) != member.CRC:
            raise zipfile.BadZipFile(f"bad checksum of {member.filename}")
        file.seek(start)
        version = np.lib.format.read_magic(file)
        if version not in NPY_HEADERS:
            return None
        shape, fortran, dtype = NPY_HEADERS[version](file)
        offset = file.tell()
    if dtype.hasobject or not shape:
        return None
    return np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")


def read_torch(path: Path) -> dict[str, Any]:
    """The mapping in a file of torch.save; FormatError where there is none, or code would have to be run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGED as error:
        raise FormatError(f"{path} is not a torch file of tensors and plain values: {error}.") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a mapping, found {type(content).__name__}.")
    return content
