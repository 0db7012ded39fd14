"""Candidates for the top k: a product whose epilogue keeps the maxima of groups, and a choice among few groups.

The pre-activations of a tile of tokens are written once, in the type of the product, and read again only where the
maximum of their group of 16 is among the largest. The choice is a search of the threshold, bit by bit, on 16-bit
keys that order as the numbers do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels.triton import on_the_device_of_the_first

GROUP = 16  # columns
MOST_GROUPS = 16_384  # of a row, held by one program
TILE_BYTES = 128 * 2**20  # of pre-activations in memory at once
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
STAGE_BYTES = (128 + 256) * 64 * 2  # of shared memory for each step of the product that is loaded ahead


def fits(n_latents: int, m: int) -> bool:
    """Whether the `m` largest of a row are found here: enough groups, and not too many for one program."""
    n_groups = triton.cdiv(n_latents, GROUP)
    return m <= n_groups <= MOST_GROUPS and triton.next_power_of_2(m) * GROUP <= MOST_GROUPS


@on_the_device_of_the_first
def propose(
    x: Float[Tensor, "n_tokens d"], rows: Float[Tensor, "n_latents d"], b: Float[Tensor, " n_latents"], m: int
) -> tuple[Float[Tensor, "n_tokens m"], Int[Tensor, "n_tokens m"]]:
    """The `m` largest of each row of `x @ rows.T + b` and where they are, ascending; of equal ones the lower index.

    `x` and `rows` in bfloat16 or float16; the pre-activations are rounded to that type. Needs `fits`.
    """
    (n_tokens, d), n_latents = x.shape, len(rows)
    n_groups = triton.cdiv(n_latents, GROUP)
    x, rows, b = x.contiguous(), rows.contiguous(), b.contiguous()
    values = x.new_empty(n_tokens, m)
    indices = torch.empty(n_tokens, m, dtype=torch.int64, device=x.device)
    tile = min(n_tokens, max(1, TILE_BYTES // (n_latents * x.element_size())))
    pre_acts = x.new_empty(tile, n_latents)
    maxima = x.new_empty(tile, n_groups)
    groups = torch.empty(tile, m, dtype=torch.int64, device=x.device)
    for start in range(0, n_tokens, max(tile, 1)):
        part = x[start : start + tile]
        n = len(part)
        _product[(triton.cdiv(n, BLOCKS["BLOCK_M"]) * triton.cdiv(n_latents, BLOCKS["BLOCK_N"]),)](
            part, rows, b, pre_acts, maxima, n, n_latents, d, n_groups,
            GROUP=GROUP, UPCAST=_interpreted(), **BLOCKS, num_warps=8, num_stages=_n_stages(x.device),
        )  # fmt: skip
        _largest[(n,)](maxima, groups, n_groups, m, BLOCK=triton.next_power_of_2(n_groups), num_warps=4)
        _largest_of_groups[(n,)](
            pre_acts, groups, values[start:], indices[start:], n_latents, m,
            GROUP=GROUP, BLOCK=triton.next_power_of_2(m), num_warps=4,
        )  # fmt: skip
    return values, indices


def _interpreted() -> bool:
    """The interpreter multiplies the bits of bfloat16 numbers, not their values."""
    return not isinstance(_product, triton.JITFunction)


def _n_stages(device: torch.device) -> int:
    """So many that at most 3 steps of the product are in shared memory."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return n_stages(properties.shared_memory_per_block_optin, properties.major)


def n_stages(shared_memory: int, generation: int) -> int:
    """Before Hopper (9), Triton holds one step fewer than there are stages."""
    return max(1, min(3, shared_memory // STAGE_BYTES)) + (generation < 9)


@triton.jit
def _product(
    x, rows, b, pre_acts, maxima, n_tokens, n_latents, d, n_groups,
    GROUP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that share rows of the weight run together: tokens vary first.
    n_blocks = tl.cdiv(n_tokens, BLOCK_M)
    token = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    latent = (tl.program_id(0) // n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_latent = token < n_tokens, latent < n_latents
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, d, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = tl.load(x + token[:, None] * d + k[None, :], mask=is_token[:, None] & (k < d)[None, :], other=0.0)
        right = tl.load(
            rows + latent[:, None] * d + k[None, :], mask=is_latent[:, None] & (k < d)[None, :], other=0.0
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, tl.trans(right), acc)
    acc += tl.load(b + latent, mask=is_latent, other=0.0).to(tl.float32)[None, :]
    rounded = acc.to(pre_acts.dtype.element_ty)
    tl.store(
        pre_acts + token[:, None] * n_latents + latent[None, :],
        rounded,
        mask=is_token[:, None] & is_latent[None, :],
    )
    kept = tl.where(is_latent[None, :], rounded.to(tl.float32), float("-inf"))
    kept = tl.where(kept != kept, float("inf"), kept)  # NaN, which a maximum would leave out
    best = tl.max(tl.reshape(kept, (BLOCK_M, BLOCK_N // GROUP, GROUP)), axis=2)
    group = (tl.program_id(0) // n_blocks).to(tl.int64) * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    tl.store(
        maxima + token[:, None] * n_groups + group[None, :],
        best.to(maxima.dtype.element_ty),
        mask=is_token[:, None] & (group < n_groups)[None, :],
    )


@triton.jit
def keys_of(values):
    """0 to 65,535, in the order of 16-bit floats; of NaN the largest."""
    bits = values.to(tl.int16, bitcast=True).to(tl.int32)
    number = values.to(tl.float32)
    return tl.where(number != number, 65535, tl.where(bits < 0, bits ^ 0x7FFF, bits) + 32768)


@triton.jit
def _choose(keys, m):
    """Which of `keys` [n] are the `m` largest, of equal ones the first; keys below 0 do not count."""
    threshold = 0
    for i in range(16):
        higher = threshold | (32768 >> i)
        threshold = tl.where(tl.sum((keys >= higher).to(tl.int32), axis=0) >= m, higher, threshold)
    above = keys > threshold
    at = (keys == threshold).to(tl.int32)
    n_wanted = m - tl.sum(above.to(tl.int32), axis=0)
    return above | ((at > 0) & (tl.cumsum(at, axis=0) <= n_wanted))


@triton.jit
def _largest(values, chosen, width, m, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    keys = keys_of(tl.load(values + row * width + column, mask=column < width, other=0.0))
    taken = _choose(tl.where(column < width, keys, -1), m)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(chosen + row * m + place, column.to(tl.int64), mask=taken)


@triton.jit
def _largest_of_groups(
    pre_acts, groups, values, indices, width, m, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK * GROUP)
    is_entry = entry // GROUP < m
    group = tl.load(groups + row * m + entry // GROUP, mask=is_entry, other=0)
    column = group * GROUP + entry % GROUP
    is_entry = is_entry & (column < width)
    number = tl.load(pre_acts + row * width + column, mask=is_entry, other=0.0)
    taken = _choose(tl.where(is_entry, keys_of(number), -1), m)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(values + row * m + place, number, mask=taken)
    tl.store(indices + row * m + place, column, mask=taken)
