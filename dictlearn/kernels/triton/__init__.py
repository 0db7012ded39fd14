"""The kernels for GPUs, in Triton; imported only where they are used. Public ones are in the modules above."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def on_the_device_of_the_first(fn: Callable[P, T]) -> Callable[P, T]:
    """Launch what `fn` launches on the GPU of its first argument, which need not be the current one."""

    @wraps(fn)
    def launch(*args: Any, **kwargs: Any) -> T:
        with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
            return fn(*args, **kwargs)

    return launch  # type: ignore[return-value]
