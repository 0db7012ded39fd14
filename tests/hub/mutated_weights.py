"""Files of weights with something wrong in them: headers, members, and tensors of other shapes and types."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from tests.hub.mutations import (
    ODD,
    WRITTEN,
    any_bytes,
    change_tree,
    json_values,
    odd,
    one_of,
    some,
    with_text_keys,
    written,
    yaml_values,
)
from tests.hub.samples import their_classes

Mutate = Callable[[bytes, Generator], bytes]

DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I32", "U32", "I64", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "C64")
DTYPES += ("F8_E8M0", "F4", "F6_E2M3", "F128", "f32", "")
SIZES = (0, 1, 2, 3, 5, 6, 7, 12, 20, 64, 10**6, 10**12, 2**31, 2**32, 2**63, 2**64, -1, 1.5, "6", None)
PATTERNS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00", b"\xff\xff\xff\xff")
PATTERNS += (b"\x00\x00\x00\x00", b"\xc0\x7f\xc0\x7f", b"\x00\x00\x80\x3f")


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: Any, data: bytes) -> bytes:
    text = written(json.dumps(with_text_keys(header)), WRITTEN)
    return struct.pack("<Q", len(text)) + text + data


def header_values(content: bytes, random: Generator) -> bytes:
    """A safetensors file with other values in a header of the right length."""
    header, data = _parts(content)
    choices = (*SIZES, *DTYPES, *ODD, *WRITTEN)
    changed = _joined(change_tree(header, lambda _: odd(random, choices), random), data)
    if random.random() < 0.1:
        changed = struct.pack("<Q", one_of(random, (0, 1, 8, 100, 2**27, 2**40, 2**63, 2**64 - 1))) + changed[8:]
    return changed


def other_tensors(content: bytes, random: Generator) -> bytes:
    """A whole safetensors file of other tensors: shapes, types, values and names."""
    header, data = _parts(content)
    tensors = {
        key: (item["dtype"], item["shape"], data[slice(*item["data_offsets"])]) for key, item in header.items()
    }
    for _ in some(random):
        key, other = (one_of(random, list(tensors)) for _ in range(2))
        dtype, shape, values = tensors[key]
        match int(random.integers(7)):
            case 0:
                tensors[key] = tensors[other]
            case 1 if len(tensors) > 1:
                del tensors[key]
            case 2:
                tensors[one_of(random, ("x", "threshold", "W_skip", f"{key}_", ""))] = tensors.pop(key)
            case 3:
                tensors[key] = _relabelled(one_of(random, DTYPES[:14]), shape, values)
            case 4:
                pattern = one_of(random, PATTERNS)
                start = int(random.integers(len(values) + 1)) // 4 * 4
                filled = pattern * (1 if random.random() < 0.5 else len(values) // 4)
                tensors[key] = dtype, shape, (values[:start] + filled + values[start:])[: len(values)]
            case _:
                size = len(values) // max(math.prod(shape), 1)
                shape = _other_shape(shape, random)
                values = (values * 20)[: size * math.prod(shape)]
                tensors[key] = dtype, shape, values + bytes(size * math.prod(shape) - len(values))
    header, data = {}, b""
    for key, (dtype, shape, values) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    return _joined(header, data)


def _relabelled(dtype: str, shape: list[int], values: bytes) -> tuple[str, list[int], bytes]:
    """As many values of another type."""
    bits = int((re.findall(r"\d+", dtype) or [8])[0])
    needed = math.prod(shape) * bits // 8
    return dtype, shape, (values * 8)[:needed]


def _other_shape(shape: Sequence[int], random: Generator) -> list[int]:
    shape = list(shape)
    i = int(random.integers(len(shape))) if shape else 0
    match int(random.integers(8)):
        case 0:
            return shape[::-1]
        case 1:
            return [1, *shape]
        case 2:
            return [math.prod(shape)]
        case 3:
            return []
        case 4 if shape:
            shape[i] = 0
        case 5 if shape:
            shape[i] += 1
        case 6 if shape:
            shape[i] = 1
        case _:
            return [*shape, 1]
    return shape


# -- zip files: npz and torch --


def members(content: bytes, random: Generator) -> bytes:
    """A zip file with members that are missing, of another name or with other bytes, and right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        found = [(info.filename, file.read(info)) for info in file.infolist()]
    for _ in some(random):
        i, other = (int(random.integers(len(found))) for _ in range(2))
        name, stored = found[i]
        match int(random.integers(7)):
            case 0 if len(found) > 1:
                del found[i]
            case 1:
                found[i] = (one_of(random, ("x", "../x", f"{name}_", name.upper(), found[other][0])), stored)
            case 2:
                found[i], found[other] = (name, found[other][1]), (found[other][0], stored)
            case 3:
                found.append((name, stored))
            case 4:
                huge = one_of(random, (b"1000000000000", b"99999", b"3", b"0", b"-5"))
                found[i] = (name, re.sub(rb"\d+(?=[,)])", huge, stored, count=1))
            case _:
                found[i] = (name, any_bytes(stored, random))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name, stored in found:
            compression = zipfile.ZIP_STORED if random.random() < 0.8 else zipfile.ZIP_DEFLATED
            file.writestr(zipfile.ZipInfo(name), stored, compression)
    return target.getvalue()


ARRAYS: tuple[Callable[[np.ndarray], Any], ...] = (
    *(lambda a, dtype=dtype: a.astype(dtype) for dtype in ("f2", "f8", "g", ">f4", "i4", "u8", "?", "c8", "S4")),
    lambda a: a.astype(object),
    lambda a: a.astype([("a", "f4")]),
    lambda a: a.view("i4").astype("M8[s]"),
    lambda a: np.asfortranarray(a.T),
    lambda a: a * np.nan,
    lambda a: a.astype("f8") * 1e300,
    lambda a: a * np.float32(1e37),
    lambda a: a[:0],
    lambda a: a[None],
    lambda a: a.ravel(),
    lambda a: a.sum(),
    lambda a: np.broadcast_to(a, (2, *a.shape)),
    lambda a: a.astype(str),
)


def other_arrays(content: bytes, random: Generator) -> bytes:
    """A whole npz file of other arrays."""
    with np.load(io.BytesIO(content)) as file:
        arrays = dict(file)
    for _ in some(random):
        key, other = (one_of(random, list(arrays)) for _ in range(2))
        match int(random.integers(6)):
            case 0 if len(arrays) > 1:
                del arrays[key]
            case 1:
                arrays[one_of(random, ("x", "w_enc", f"{key}.npy", ""))] = arrays.pop(key)
            case 2:
                arrays[key] = arrays[other]
            case _ if arrays[key].dtype.kind == "f":
                arrays[key] = np.asarray(one_of(random, ARRAYS)(arrays[key]))
    target = io.BytesIO()
    one_of(random, (np.savez, np.savez_compressed))(target, allow_pickle=True, **arrays)
    return target.getvalue()


TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    *(Tensor.bool, Tensor.int, Tensor.long, Tensor.half, Tensor.double, Tensor.bfloat16, Tensor.tolist),
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint16)),
    *(
        lambda t: t * math.nan,
        lambda t: t * 1e37,
        lambda t: t.double() * 1e300,
        lambda t: -t.abs(),
        torch.zeros_like,
    ),
    *(lambda t: t[None], Tensor.flatten, lambda t: t.T, lambda t: t[:0], lambda t: t[..., :0], lambda t: t[0]),
    *(Tensor.sum, lambda t: t.sum().view(1), lambda t: torch.cat([t, t]), lambda t: t.new_zeros(0, 0)),
    *(lambda t: t.new_zeros(0, 10**12), lambda t: t.new_zeros(1, 1).expand(10**6, 10**6)),
    *(lambda t: t.new_zeros(1).expand(10**12), lambda t: t.new_ones(1, 1).expand(t.shape) if t.ndim == 2 else t),
    *(Tensor.to_sparse, lambda t: t.to_sparse_csr(), lambda t: t.to("meta"), lambda t: t.to("meta")[0]),
    *(lambda t: torch.nn.Parameter(t), lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    *(
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: t.to(torch.complex64).conj().imag,
        lambda t: t.numpy(),
    ),
    *(
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.dtype,
        lambda t: t.shape,
        set,
    ),
)
MOST_VALUES = 10_000  # of a tensor that is changed again
NUMBERS = tuple(torch.tensor(value) for value in (3, [4], 2.5, math.nan, 1e38, True, [1.0, 1.0], [], 2j))
NUMBERS += (torch.ones((), device="meta"),)


def other_content(content: bytes, random: Generator) -> bytes:
    """A torch file of other tensors and values."""

    def other(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() <= MOST_VALUES and random.random() < 0.7:
            try:
                return one_of(random, TENSORS)(value)
            except (RuntimeError, IndexError, TypeError, ValueError):  # not of this shape or type
                return None
        return odd(random, (*ODD, *NUMBERS))

    target = io.BytesIO()
    with their_classes():
        tree = torch.load(io.BytesIO(content), weights_only=False)
        torch.save(change_tree(tree, other, random), target, _use_new_zipfile_serialization=random.random() < 0.95)
    return target.getvalue()


BY_SUFFIX: dict[str, tuple[Mutate, ...]] = {
    ".json": (json_values, json_values, json_values),
    ".yaml": (yaml_values, yaml_values, yaml_values),
    ".safetensors": (header_values, other_tensors, other_tensors),
    ".npz": (members, other_arrays),
    **dict.fromkeys((".pt", ".pth"), (members, other_content, other_content)),
}


def mutated(name: str, content: bytes, random: Generator) -> bytes:
    """A file of this name with something wrong in it."""
    formats = BY_SUFFIX.get(PurePosixPath(name).suffix, ())
    return one_of(random, (any_bytes, *formats))(content, random)
