"""A two-layer attention model whose weights are set by hand: a head for the token before, and an induction head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dictlearn.circuits.pairs import PairBatch

N_WORDS, N_POSITIONS, LENGTH = 12, 10, 7
WIDTH = 2 * N_WORDS + N_POSITIONS  # the token, the position, the token before
TOKEN, POSITION, BEFORE = 0, N_WORDS, N_WORDS + N_POSITIONS
D_HEAD = WIDTH // 2
SHARP = 5.0
REFERENCE = torch.tensor([[True, False], [True, False]])  # heads 0.0 and 1.0


def induction_model() -> GPT2LMHeadModel:
    """Heads 0.0 (what was before) and 1.0 (what came after the same token) do it all; 0.1 and 1.1 write where they
    look, which is everywhere alike. No MLP; float64.
    """
    config = GPT2Config(vocab_size=N_WORDS, n_positions=N_POSITIONS, n_embd=WIDTH, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).double().eval().requires_grad_(False)
    inner: Any = model.transformer
    for parameter in model.parameters():
        parameter.zero_()
    inner.wte.weight[:, TOKEN : TOKEN + N_WORDS] = torch.eye(N_WORDS)
    inner.wpe.weight[:, POSITION : POSITION + N_POSITIONS] = torch.eye(N_POSITIONS)
    shifted = torch.eye(N_POSITIONS).roll(1, dims=1)  # the key of a position is the query of the next one
    _head(inner.h[0], (POSITION, torch.eye(N_POSITIONS)), (POSITION, shifted), BEFORE, 1.0)
    _head(inner.h[1], (TOKEN, torch.eye(N_WORDS)), (BEFORE, torch.eye(N_WORDS)), TOKEN, 4.0)
    for layer, n_ones in zip(inner.h, (2, 3), strict=True):
        _plain_norm(layer, n_ones)
        layer.attn.c_attn.weight[POSITION : POSITION + N_POSITIONS, 2 * WIDTH + D_HEAD :][:, :N_POSITIONS] = (
            torch.eye(N_POSITIONS)
        )
        layer.attn.c_proj.weight[D_HEAD : D_HEAD + N_POSITIONS, POSITION : POSITION + N_POSITIONS] = (
            0.1 * torch.eye(N_POSITIONS)
        )
    inner.ln_f.weight.fill_(1.0)
    return model


def _head(layer: Any, query: tuple[int, Tensor], key: tuple[int, Tensor], target: int, size: float) -> None:
    """Head 0 of a layer: which entries of the stream it compares, and where it copies the token to."""
    for offset, (start, rows) in ((0, query), (WIDTH, key)):
        scale = math.sqrt(SHARP * math.sqrt(D_HEAD))
        layer.attn.c_attn.weight[start : start + len(rows), offset : offset + rows.shape[1]] = scale * rows
    layer.attn.c_attn.weight[TOKEN : TOKEN + N_WORDS, 2 * WIDTH : 2 * WIDTH + N_WORDS] = torch.eye(N_WORDS)
    layer.attn.c_proj.weight[:N_WORDS, target : target + N_WORDS] = size * torch.eye(N_WORDS)


def _plain_norm(layer: Any, n_ones: int) -> None:
    """A layer norm that gives back a stream of so many ones, up to the mean, which the biases of attention undo."""
    mean = n_ones / WIDTH
    layer.ln_1.weight.fill_(math.sqrt(mean * (1 - mean)))
    layer.attn.c_attn.bias += mean * layer.attn.c_attn.weight.sum(0)


def induction_pairs(n: int = 24, seed: int = 0) -> PairBatch:
    """ "f f A B f f A" with B at random; in the patch prompt another token stands in place of the first A."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.tensor([4, 5, 0, 0, 6, 7, 0]).repeat(n, 1)
    clean[:, 3] = torch.randint(8, N_WORDS, (n,), generator=generator)
    patch = clean.clone()
    patch[:, 2] = 1
    wrong = torch.full((n, 1), 6)
    return PairBatch(clean, patch, clean[:, 3:4].clone(), wrong)
