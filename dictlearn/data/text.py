"""Which text, and how it is divided: what conf/data/*.yaml builds."""

from __future__ import annotations

import glob
import json
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dictlearn.data.packing import PackingSpec
from dictlearn.data.sources import (
    HASHES,
    READERS,
    EmbeddedSource,
    FileSource,
    Source,
    SourceError,
    document_hash,
)
from dictlearn.data.tokens import TokenStore
from dictlearn.types import DictlearnError, TokenIds, TokenMask

log = logging.getLogger(__name__)
FORMAT = 1  # of the token store; part of every fingerprint
MOST_HELDOUT = 0.2  # of a small text
SAMPLE_CHARS = 2**16  # tokenised to learn how many tokens a character is
SPECIAL = ("bos", "eos", "pad", "sep", "cls", "mask")


class Rows(NamedTuple):
    """Held-out text: token ids, which of them count, and `info` for the report."""

    tokens: TokenIds
    mask: TokenMask
    info: dict[str, Any]


@dataclass
class TextData(ABC):
    """Text, how it is packed into rows, and how activations of it are shuffled.

    Subclasses say where the text comes from. `ctx` is tokens per row. Held-out are the documents chosen by
    hash: `heldout_fraction` of them; of a small text more, to reach about `heldout_min_tokens`, but at most
    a fifth (a text of fewer than 10 rows: at least one document, about 2 rows). `cache_dir`: default
    $DICTLEARN_CACHE, else ~/.cache/dictlearn.

    The shuffle (schedule.py): blocks of `block_rows` rows are cut into `n_slices` slices; about
    block_rows * ctx * (n_slices + 1) / 2 activations per site are in memory. The LM runs `lm_batch_rows` at once.
    """

    ctx: int = 128
    heldout_fraction: float = 0.02
    heldout_min_tokens: int = 100_000
    lm_batch_rows: int = 32
    block_rows: int = 256
    n_slices: int = 8
    cache_dir: str | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What the text is, for messages and reports."""

    @abstractmethod
    def source(self) -> Source:
        """Raises DictlearnError when there is no such text."""

    def problems(self, n_positions: int | None = None) -> list[str]:
        """What is wrong with this configuration, one sentence each; `n_positions` is the LM's longest context.

        Looks at values and at the beginning of the text; needs no LM or tokenizer.
        """
        found = []
        for key, least in {
            "ctx": 2,
            "lm_batch_rows": 1,
            "block_rows": 1,
            "n_slices": 1,
            "heldout_min_tokens": 0,
        }.items():
            value = getattr(self, key)
            if type(value) is not int or value < least:
                found.append(f"data.{key} must be a whole number of at least {least}, got {value!r}")
        if not found and n_positions is not None and self.ctx > n_positions:
            found.append(f"data.ctx must be at most the LM's {n_positions} positions, got {self.ctx}")
        if not isinstance(self.heldout_fraction, float) or not 0 < self.heldout_fraction <= MOST_HELDOUT:
            found.append(
                f"data.heldout_fraction must be above 0 and at most {MOST_HELDOUT}, got {self.heldout_fraction!r}"
            )
        try:
            source = self.source()
            if next(source.documents(source.start, lambda _: True), None) is None:
                found.append(f"data.path must hold text, but every document of {self.name} is blank")
        except (DictlearnError, SourceError) as error:
            found.append(str(error))
        return found

    def train(self, tokenizer: PreTrainedTokenizerBase) -> TokenStore:
        """The rows of all documents that are not held out."""
        return self._store(tokenizer, "train")

    def heldout(self, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> Rows:
        """The first held-out rows with at least `n_tokens` counted tokens, or all (with a warning) if fewer.

        Raises DictlearnError when there is no whole row of held-out text.
        """
        store = self._store(tokenizer, "heldout")
        n_rows = store.wait_counted(n_tokens)
        store.close()
        if n_rows == 0:
            raise DictlearnError(
                f"Held-out text must fill at least one row of data.ctx = {self.ctx} tokens, "
                f"but the held-out documents of {self.name} do not: use a smaller data.ctx or more text"
            )
        tokens = store.rows(0, n_rows)
        mask = store.mask(tokens)
        counted = int(mask.sum())
        if counted < n_tokens:
            log.warning("%s has %d held-out tokens; %d were asked for", self.name, counted, n_tokens)
        info = {
            "text": self.name,
            "split": "heldout",
            "heldout_fraction": store.spec.threshold / HASHES,
            "ctx": self.ctx,
            "n_rows": n_rows,
            "n_tokens": counted,
            "fingerprint": store.fingerprint,
        }
        return Rows(tokens, mask, info)

    def _store(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TokenStore:
        backend = _backend(tokenizer)
        source = self.source()
        try:
            threshold = self._threshold(source, backend)
            identity = source.identity()
        except SourceError as error:
            raise DictlearnError(str(error)) from error
        special = special_ids(tokenizer)
        spec = PackingSpec(
            source=source.spec(),
            split=split,
            threshold=threshold,
            ctx=self.ctx,
            bos=special.get("bos", special.get("eos")),
            special=sorted(set(special.values())),
            dtype="uint16" if max(backend.get_vocab().values()) < 2**16 else "uint32",
        )
        tokenizer_json = backend.to_str()
        parts = [FORMAT, identity, tokenizer_json, {**asdict(spec), "source": None}]
        fingerprint = blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()
        if split == "train":
            log.info("%s: %.2f %% of the documents are held out", self.name, 100 * threshold / HASHES)
        return TokenStore(
            self._cache() / "tokens" / fingerprint, spec, source.start, tokenizer_json, f"{self.name} ({split})"
        )

    def _threshold(self, source: Source, backend: Tokenizer) -> int:
        if source.endless:
            return int(self.heldout_fraction * HASHES)
        return heldout_threshold(source, backend, self.heldout_fraction, self.heldout_min_tokens, self.ctx)

    def _cache(self) -> Path:
        default = os.environ.get("DICTLEARN_CACHE") or Path.home() / ".cache" / "dictlearn"
        return Path(self.cache_dir or default).expanduser()


@dataclass
class EmbeddedText(TextData):
    """The endless text of the embedded LM; it was trained on seed 0, other seeds are unseen."""

    seed: int = 1

    @property
    def name(self) -> str:
        return f"embedded text, seed {self.seed}"

    def source(self) -> Source:
        return EmbeddedSource(self.seed)


@dataclass
class LocalText(TextData):
    """Text files: `path` is a file, a folder (with its subfolders) or a glob, of one format.

    .txt: one document a line; .jsonl: one JSON object a line, and .parquet: the text in `column`.
    """

    path: str = ""
    column: str = "text"

    @property
    def name(self) -> str:
        return str(self.path)

    def source(self) -> Source:
        return FileSource(tuple(str(path) for path in text_files(str(self.path or ""))), self.column)


def text_files(path: str) -> list[Path]:
    """The text files of a file, a folder or a glob, sorted. Raises DictlearnError unless all have one format."""
    choices = ", ".join(READERS)
    if not path:
        raise DictlearnError(f"data.path must be a file, a folder or a glob of {choices} files; it is empty")
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.suffix in READERS and p.is_file())
        if not files:
            raise DictlearnError(f"data.path must have files that end in {choices}; there is none in {path}")
    elif place.exists():
        files = [place]
    else:
        files = sorted(p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file())  # noqa: PTH207
        if not files:
            raise DictlearnError(
                f"data.path must be a file, a folder or a glob, but there is no {path} (from {Path.cwd()})"
            )
    suffixes = sorted({p.suffix for p in files})
    if unknown := [s for s in suffixes if s not in READERS]:
        raise DictlearnError(f"data.path must have files that end in {choices}, got {unknown[0]!r} ({path})")
    if len(suffixes) > 1:
        raise DictlearnError(f"data.path must have files of one format, but {path} has {', '.join(suffixes)}")
    return files


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that are never counted: bos, eos, pad, sep, cls and mask, where the tokenizer has them."""
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    return {name: token for name, token in ids.items() if isinstance(token, int)}


def heldout_threshold(source: Source, backend: Tokenizer, fraction: float, min_tokens: int, ctx: int) -> int:
    """Documents of a finite source whose hash is below this are held out.

    That is `fraction` of them. If that would be fewer than `min_tokens` tokens (estimated from the number of
    characters), documents are added by rising hash until there are as many, at most a fifth of the tokens; but
    at least one document, and about 2 rows, as long as half of the text stays for training.
    """
    tokens_per_char = _tokens_per_char(source, backend)
    sizes: dict[int, float] = {}  # document hash -> estimated tokens; copies of a document share one
    total = 0.0
    for _, text in source.documents(source.start, lambda _: True):
        n_tokens = len(text) * tokens_per_char
        key = document_hash(text)
        sizes[key] = sizes.get(key, 0.0) + n_tokens
        total += n_tokens
        if fraction * total >= min_tokens:
            return int(fraction * HASHES)
    least = min(2 * ctx, total / 2)
    wanted = max(min(min_tokens, MOST_HELDOUT * total), least)
    most = max(MOST_HELDOUT * total, least)
    heldout = 0.0
    for key in sorted(sizes):
        if heldout >= wanted or (heldout and heldout + sizes[key] > most):
            return key
        heldout += sizes[key]
    return max(sizes, default=0)  # the last document stays for training


def _tokens_per_char(source: Source, backend: Tokenizer) -> float:
    """Measured on the beginning of the text."""
    sample: list[str] = []
    left = SAMPLE_CHARS
    for _, text in source.documents(source.start, lambda _: True):
        sample.append(text[:left])
        left -= len(sample[-1])
        if left == 0:
            break
    encodings = backend.encode_batch_fast(sample, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings) / max(SAMPLE_CHARS - left, 1)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the fast tokenizer, without truncation and padding."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(fast, Tokenizer):
        raise DictlearnError(
            f"Text is packed with fast tokenizers (tokenizer.json), but {tokenizer.name_or_path} "
            f"has only {type(tokenizer).__name__}, a slow one"
        )
    backend = Tokenizer.from_str(fast.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
