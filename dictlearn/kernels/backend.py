"""Which implementation an operation takes: Triton's on a GPU, the compiled one on a CPU, plain torch elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dictlearn.kernels import native

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # Triton's kernels sum in float32


def use_triton(*tensors: Tensor) -> bool:
    return all(t.is_cuda and t.dtype in TYPES for t in tensors) and _has_triton()


def use_native(*tensors: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    return all(t.device.type == "cpu" and t.dtype in types for t in tensors) and native.available()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
