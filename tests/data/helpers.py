"""A word tokenizer, made-up documents, and a store whose every token is one of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dictlearn.data.packing import Meta, PackingSpec, Writer, read_meta
from dictlearn.data.pool import Pool
from dictlearn.data.stream import ActivationStream, Batch
from dictlearn.data.tokens import TokenStore

N_WORDS = 400
BOS = 0


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Word i is "w{i}" with id i + 3; ids 0, 1, 2 are <bos>, <eos>, <unk>."""
    ids = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(N_WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


def bos_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(bos_token="<bos>", eos_token="<eos>")


@cache
def random_documents(n: int, seed: int = 0, longest: int = 60) -> tuple[str, ...]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, n)
    return tuple(" ".join(f"w{i}" for i in rng.integers(0, N_WORDS, length)) for length in lengths)


def token_ids(document: str) -> list[int]:
    """Of a document of random_documents, without a tokenizer."""
    return [int(word[1:]) + 3 for word in document.split()]


def brute_force_rows(documents: Sequence[Sequence[int]], ctx: int, bos: int | None) -> list[list[int]]:
    """Rows token by token: BOS opens each row and each document, once where both meet."""
    rows: list[list[int]] = []
    row: list[int] = []

    def emit(token: int) -> None:
        if bos is not None and not row:
            row.append(bos)
        if row == [bos] and token == bos:
            return
        row.append(token)
        if len(row) == ctx:
            rows.append(list(row))
            row.clear()

    for ids in documents:
        if bos is not None:
            emit(bos)
        for token in ids:
            emit(token)
    return rows


def unique_store(
    folder: Path, n_rows: int, ctx: int, masked: Callable[[int], bool] = lambda _: False
) -> TokenStore:
    """A complete store: token (row, position) is 1 + row * ctx + position, but 0 (BOS, not counted) at position 0
    and where `masked(token)`."""
    spec = PackingSpec({}, "train", 0, ctx, BOS, [BOS], "uint32")
    tokens = 1 + np.arange(n_rows * ctx).reshape(n_rows, ctx)
    tokens[:, 0] = BOS
    tokens[np.vectorize(masked, otypes=[bool])(tokens)] = BOS
    folder.mkdir(parents=True)
    writer = Writer(folder, spec, [0, 0])
    # rows, not documents: written through a packer that keeps them as they are
    writer.packer.add = lambda documents: np.array(documents).reshape(-1, ctx)  # type: ignore[method-assign]
    writer.append(tokens.tolist(), [0, 0], complete=True)
    return TokenStore(folder, spec, [0, 0], "{}", "made-up text")


class Reader:
    """A stand-in for the LM: at site "a" the token id and its row's first one, at "b" minus and plus the id."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        self.n_rows += len(tokens)
        self.calls.append(tuple(tokens.shape))
        a = torch.stack([tokens, tokens[:, 1:2].expand_as(tokens)], dim=-1).double()
        return {"a": a, "b": torch.stack([-tokens, tokens], dim=-1).double()}


def make_stream(store: TokenStore, n_tokens: int, **changes: int) -> ActivationStream:
    sizes = {"batch_size": 7, "seed": 3, "lm_batch_rows": 3, "block_rows": 4, "n_slices": 3}
    return ActivationStream(Reader(), store, n_tokens=n_tokens, **{**sizes, **changes})  # type: ignore[arg-type]


def pool_of(stream: ActivationStream) -> Pool:
    assert stream._pool is not None
    return stream._pool


def meta_of(store: TokenStore) -> Meta:
    """What is on disk now."""
    meta = read_meta(store.folder)
    assert meta is not None
    return meta


def same(one: Batch, other: Batch) -> bool:
    pairs = zip([*one.acts.values(), *one[1:]], [*other.acts.values(), *other[1:]], strict=True)
    return list(one.acts) == list(other.acts) and all(torch.equal(x, y) for x, y in pairs)
