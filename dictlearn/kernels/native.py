"""Compiled kernels for the CPU: native.cpp, built once per machine by its C++ compiler, where there is one.

`available()` says whether there are any; without a compiler, or with DICTLEARN_NATIVE=0, torch does the same work.
Float32 and contiguous rows, where a function does not say otherwise.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
SECONDS = 120  # at most, for compiling


@cache
def available() -> bool:
    return _library() is not None


def top_columns(
    values: Float[Tensor, "n width"], m: int, bias: Float[Tensor, " width"] | None
) -> Int[Tensor, "n m"]:
    """Where the `m` largest of each row of `values + bias` are, ascending; of equal ones the first.

    `values` in float32 or bfloat16, `bias` in float32.
    """
    n, width = values.shape
    _check(m <= width, f"m must be at most the {width} columns, got {m}")
    indices = torch.empty(n, m, dtype=torch.int64)
    if m:
        function = "top_columns_bfloat16" if values.dtype == torch.bfloat16 else "top_columns_float32"
        _call(function, values, bias, n, width, m, indices)
    return indices


def top_entries(values: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    """Where the `m` largest are, ascending; of equal ones the first. `values` in float32 or bfloat16."""
    _check(m <= len(values), f"m must be at most the {len(values)} entries, got {m}")
    indices = torch.empty(m, dtype=torch.int64)
    if m:
        function = "top_entries_bfloat16" if values.dtype == torch.bfloat16 else "top_entries_float32"
        _call(function, values, len(values), m, indices)
    return indices


def row_products(
    x: Float[Tensor, "n_tokens d"],
    rows: Float[Tensor, "n_latents d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
) -> Float[Tensor, " nnz"]:
    _check_indices(indices, len(rows))
    out = x.new_empty(len(indices))
    _call("row_products", x, rows, indices, offsets, len(x), x.shape[-1], out)
    return out


def scatter_outer(
    values: Float[Tensor, " nnz"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " n_tokens_plus_1"],
    x: Float[Tensor, "n_tokens d"],
    n_latents: int,
) -> Float[Tensor, "n_latents d"]:
    _check_indices(indices, n_latents)
    out = x.new_empty(n_latents, x.shape[-1])
    _call("scatter_outer", values, indices, offsets, x, len(x), n_latents, x.shape[-1], out)
    return out


def project_rows_(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    squares = grad.new_empty(len(grad))
    _call("project_rows", grad, rows, *grad.shape, squares)
    return squares


def normalise_rows_(rows: Float[Tensor, "n d"]) -> None:
    _call("normalise_rows", rows, *rows.shape)


def _call(function: str, *arguments: Tensor | int | None) -> None:
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    _check(
        all(t.is_contiguous() and t.device.type == "cpu" for t in tensors), f"{function} takes contiguous tensors"
    )
    passed = [ctypes.c_int64(a) if isinstance(a, int) else _address(a) for a in arguments]
    getattr(_library(), function)(*passed, ctypes.c_int(torch.get_num_threads()))


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def _check_indices(indices: Int[Tensor, " nnz"], n_latents: int) -> None:
    if len(indices):
        least, most = (int(bound) for bound in indices.aminmax())
        _check(least >= 0 and most < n_latents, f"indices must be from 0 to {n_latents - 1}, got {least} to {most}")


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++"))), None)
    if os.environ.get("DICTLEARN_NATIVE") == "0" or platform.system() != "Linux" or compiler is None:
        return None
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=SECONDS).stdout
        parts = (FLAGS, version, platform.libc_ver(), _processor(), SOURCE.read_text())
        key = blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        cached = Path(os.environ.get("DICTLEARN_CACHE") or "~/.cache/dictlearn").expanduser()
        path = cached / "kernels" / f"native-{key}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", None)
        log.warning("No compiled kernels, torch does their work, slower: %s", text.decode() if text else error)
        return None


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        built.replace(path)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
