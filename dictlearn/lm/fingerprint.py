"""A digest of a model's weights, exact and in one pass over them: equal on every device, for any thread count."""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Int
from torch import Tensor, nn

INT_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**17  # elements at once, in the cache of a core; the result does not depend on it


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits from every entry of the state dict: its name, shape, dtype and bits.

    The bits of an entry count as integers v_0, v_1, ... by sum v_i and sum i * v_i, both modulo 2^64: any one
    weight that changes changes the first, any two that swap the second.
    """
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    sums = torch.stack([_sums(value) for value in state.values()]).tolist()
    digest = blake2b(digest_size=8)
    for (name, value), pair in zip(state.items(), sums, strict=True):
        digest.update(f"{name} {list(value.shape)} {value.dtype} {pair}\n".encode())
    return digest.hexdigest()


def _sums(value: Tensor) -> Int[Tensor, " 2"]:
    bits = value.contiguous().flatten().view(INT_OF_BYTES[value.element_size()])
    place = torch.arange(min(CHUNK, len(bits)), device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        total = chunk.sum()
        sums += torch.stack([total, start * total + (place[: len(chunk)] * chunk).sum()])
    return sums
