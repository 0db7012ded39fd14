"""The largest entries of a whole batch, by a search of their threshold: no sort, no synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.kernels.triton import on_the_device_of_the_first

BLOCK = 4096
BLOCKS_PER_PROGRAM = 8  # of the histogram, whose programs meet in 256 counters


@on_the_device_of_the_first
def top_entries(values: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    """Where the `m` largest of `values` are, ascending; of equal ones the first.

    A radix search: the numbers become integers of the same order, whose histogram by the next 8 bits says in which
    of 256 parts the m-th largest lies.
    """
    n, values = len(values), values.contiguous()
    n_bits = 8 * values.element_size()
    state = torch.zeros(2, dtype=torch.int64, device=values.device)  # the threshold's bits so far, and
    state[1:].fill_(m)  # how many entries are wanted there; a copy from the host would wait
    counts = torch.zeros(256, dtype=torch.int64, device=values.device)
    for shift in range(n_bits - 8, -1, -8):
        grid = (triton.cdiv(n, BLOCK * BLOCKS_PER_PROGRAM),)
        _histogram[grid](
            values, state, counts, n, shift, N_BITS=n_bits, BLOCK=BLOCK, N_BLOCKS=BLOCKS_PER_PROGRAM, num_warps=8
        )
        _next_digit[(1,)](counts, state)
    found = torch.empty(m, dtype=torch.int64, device=values.device)
    n_blocks = triton.cdiv(n, BLOCK)
    above = torch.empty(n_blocks, dtype=torch.int64, device=values.device)
    at = torch.empty_like(above)
    _count[(n_blocks,)](values, state, above, at, n, N_BITS=n_bits, BLOCK=BLOCK, num_warps=8)
    above, at = above.cumsum(0) - above, at.cumsum(0) - at  # before each block
    _collect[(n_blocks,)](values, state, above, at, found, n, N_BITS=n_bits, BLOCK=BLOCK, num_warps=8)
    return found


@triton.jit
def _keys(values, entry, n, N_BITS: tl.constexpr):
    """Integers from 0 in the order of the numbers, of NaN the largest; -1 beyond the end."""
    number = tl.load(values + entry, mask=entry < n, other=0.0)
    if N_BITS == 16:
        bits = number.to(tl.int16, bitcast=True).to(tl.int64)
        keys = tl.where(bits < 0, bits ^ 0x7FFF, bits) + 0x8000
    else:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64)
        keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 0x80000000
    as_float = number.to(tl.float32)
    keys = tl.where(as_float != as_float, (1 << N_BITS) - 1, keys)
    return tl.where(entry < n, keys, -1)


@triton.jit
def _histogram(values, state, counts, n, shift, N_BITS: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr):
    prefix = tl.load(state)
    total = tl.zeros((256,), tl.int32)
    for block in range(N_BLOCKS):
        entry = (tl.program_id(0).to(tl.int64) * N_BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        keys = _keys(values, entry, n, N_BITS)
        digit = ((keys >> shift) & 255).to(tl.int32)
        total += tl.histogram(digit, 256, mask=(keys >= 0) & ((keys >> (shift + 8)) == prefix))
    tl.atomic_add(counts + tl.arange(0, 256), total.to(tl.int64))


@triton.jit
def _next_digit(counts, state):
    """Append to the threshold the digit at which the wanted entries end, and start the next histogram."""
    digits = tl.arange(0, 256)
    here = tl.load(counts + digits)
    prefix, wanted = tl.load(state), tl.load(state + 1)
    or_higher = tl.sum(here, axis=0) - tl.cumsum(here, axis=0) + here
    digit = tl.sum((or_higher >= wanted).to(tl.int64), axis=0) - 1
    higher = tl.sum(tl.where(digits > digit, here, 0), axis=0)
    tl.store(state, prefix * 256 + digit)
    tl.store(state + 1, wanted - higher)
    tl.store(counts + digits, tl.zeros((256,), tl.int64))


@triton.jit
def _count(values, state, above, at, n, N_BITS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    keys = _keys(values, block * BLOCK + tl.arange(0, BLOCK), n, N_BITS)
    threshold = tl.load(state)
    tl.store(above + block, tl.sum((keys > threshold).to(tl.int64), axis=0))
    tl.store(at + block, tl.sum((keys == threshold).to(tl.int64), axis=0))


@triton.jit
def _collect(values, state, above_before, at_before, found, n, N_BITS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    keys = _keys(values, entry, n, N_BITS)
    threshold, wanted = tl.load(state), tl.load(state + 1)
    n_at = tl.load(at_before + block)
    at = (keys == threshold).to(tl.int64)
    taken = (keys > threshold) | ((at > 0) & (n_at + tl.cumsum(at, axis=0) <= wanted))
    first = tl.load(above_before + block) + tl.minimum(n_at, wanted)
    tl.store(found + first + tl.cumsum(taken.to(tl.int64), axis=0) - 1, entry, mask=taken)
