"""Which implementation an operation takes: Triton's on a GPU, the compiled one on a CPU, plain torch elsewhere.

DICTLEARN_TRITON=0 and DICTLEARN_NATIVE=0 leave it to torch.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dictlearn.kernels import native

log = logging.getLogger(__name__)
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # Triton's kernels sum in float32
OLDEST = (8, 0)  # compute capability with products of bfloat16


def use_triton(*tensors: Tensor) -> bool:
    return all(t.is_cuda and t.dtype in TYPES for t in tensors) and _triton_works(tensors[0].device)


def use_native(*tensors: Tensor, types: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    return all(t.device.type == "cpu" and t.dtype in types for t in tensors) and native.available()


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a kernel runs there: Triton needs a C compiler for its launchers."""
    if os.environ.get("DICTLEARN_TRITON") == "0" or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        from dictlearn.kernels.triton import rows

        rows.normalise_rows_(torch.ones(1, 1, device=device))
    except Exception as error:  # noqa: BLE001  (compilers and drivers fail in many ways; torch does the work then)
        log.warning("Triton does not work on %s, torch does its work, slower: %s", device, error)
        return False
    return True
