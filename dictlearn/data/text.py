"""Which text, and how it is divided: what conf/data/*.yaml builds."""

from __future__ import annotations

import glob
import json
import logging
import os
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dictlearn.choices import is_count
from dictlearn.data.heldout import MOST_HELDOUT, heldout_threshold
from dictlearn.data.packing import CacheError, PackingSpec, cached_in, write_atomically
from dictlearn.data.readers import READERS, SourceError
from dictlearn.data.rows import RowData, Rows
from dictlearn.data.sources import HASHES, EmbeddedSource, FileSource, Source
from dictlearn.data.tokens import TokenStore
from dictlearn.files import folder_problem, reason
from dictlearn.types import DictlearnError, TokenIds, TokenMask

if TYPE_CHECKING:
    from dictlearn.data.hub import HubSource

log = logging.getLogger(__name__)
FORMAT = 1  # of the token store; part of every fingerprint
Unit = Literal["line", "file"]
SPECIAL = ("bos", "eos", "pad", "sep", "cls", "mask")
COUNTS = {"ctx": 2, "lm_batch_rows": 1, "block_rows": 1, "n_slices": 1, "heldout_min_tokens": 0}  # the least values
MOST_UNKNOWN = 0.01  # share of the counted tokens; more is warned of


@dataclass
class TextData(RowData):
    """Text that is packed into rows of `ctx` tokens.

    Subclasses say where the text comes from. Held-out are the documents chosen by hash: `heldout_fraction` of them;
    of a small text more, to reach about `heldout_min_tokens`, but at most a fifth (a text of fewer than 10 rows: at
    least one document, about 2 rows). `cache_dir`: default $DICTLEARN_CACHE, else ~/.cache/dictlearn.
    """

    heldout_fraction: float = 0.02
    heldout_min_tokens: int = 100_000
    cache_dir: str | None = None

    @abstractmethod
    def source(self) -> Source:
        """Raises DictlearnError or SourceError when there is no such text, or a value that says which is wrong."""

    def sample(self) -> Source:
        """A source of the same documents whose beginning is cheap to look at."""
        return self.source()

    def problems(self, n_positions: int | None = None) -> list[str]:
        """What is wrong with this configuration, one sentence each; `n_positions` is the LM's longest context.

        Looks at values and at the beginning of the text; needs no LM or tokenizer.
        """
        found = [
            f"data.{key} must be a whole number of at least {least}, got {getattr(self, key)!r}"
            for key, least in COUNTS.items()
            if not is_count(getattr(self, key), least)
        ]
        if not found and n_positions is not None and self.ctx > n_positions:
            found.append(f"data.ctx must be at most the LM's {n_positions} positions, got {self.ctx}")
        if not isinstance(self.heldout_fraction, float) or not 0 < self.heldout_fraction <= MOST_HELDOUT:
            found.append(
                f"data.heldout_fraction must be above 0 and at most {MOST_HELDOUT}, got {self.heldout_fraction!r}"
            )
        ratio = self.max_norm_ratio
        if ratio is not None and not (type(ratio) in (int, float) and 1 < ratio < float("inf")):
            found.append(f"data.max_norm_ratio must be null or a number above 1, got {ratio!r}")
        for check in (self._cache_problem, self._document_problem):
            try:
                problem = check()
            except (DictlearnError, SourceError) as error:
                problem = str(error)
            if problem is not None:
                found.append(problem)
        return found

    def _cache_problem(self) -> str | None:
        is_place = self.cache_dir is None or (isinstance(self.cache_dir, str) and self.cache_dir)
        return folder_problem("data.cache_dir", str(self._cache()) if is_place else self.cache_dir)

    def _document_problem(self) -> str | None:
        """Of the beginning of the text: whether there is one document to train on and one to hold out."""
        source = self.sample()
        n_documents = len(list(islice(source.documents(source.start, lambda _: True), 2)))
        if n_documents == 0:
            return f"data must hold text, but every document of {self.title} is blank"
        if n_documents == 1:
            return (
                f"data must hold two documents at least, one to train on and one to hold out, but {self.title} is "
                f"a single one: {self._more_documents()}"
            )
        return None

    def _more_documents(self) -> str:
        """How a text of one document becomes one of several."""
        return "add documents"

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
                f"but the held-out documents of {self.title} do not: use a smaller data.ctx or more text"
            )
        tokens = store.rows(0, n_rows)
        mask = store.mask(tokens)
        counted = int(mask.sum())
        if counted < n_tokens:
            log.warning("%s has %d held-out tokens; %d were asked for", self.title, counted, n_tokens)
        warn_of_unknown(tokenizer, store.name, tokens, mask)
        info = {
            "text": self.title,
            "split": "heldout",
            "heldout_fraction": store.spec.threshold / HASHES,
            "ctx": self.ctx,
            "n_rows": n_rows,
            "n_tokens": counted,
            "fingerprint": store.fingerprint,
        }
        return Rows(tokens, mask, info)

    def _store(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TokenStore:
        try:
            return self._opened_store(tokenizer, split)
        except (SourceError, CacheError) as error:
            raise DictlearnError(str(error)) from error

    def _opened_store(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TokenStore:
        backend = _backend(tokenizer)
        source = self.source()
        identity = source.identity()
        threshold = self._threshold(source, identity, backend)
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
        fingerprint = _digest(parts)
        if split == "train":
            log.info("%s: %.2f %% of the documents are held out", self.title, 100 * threshold / HASHES)
        return TokenStore(
            self._cache() / "tokens" / fingerprint, spec, source.start, tokenizer_json, f"{self.title} ({split})"
        )

    def _threshold(self, source: Source, identity: dict[str, Any], backend: Tokenizer) -> int:
        """Measured once: of a text that is streamed, that takes as long as downloading its beginning."""
        if source.endless:
            return int(self.heldout_fraction * HASHES)
        how = [self.heldout_fraction, self.heldout_min_tokens, self.ctx]
        path = self._cache() / "heldout" / f"{_digest([FORMAT, identity, backend.to_str(), how])}.json"
        with cached_in(path.parent):
            if path.exists():
                return json.loads(path.read_text())
        threshold = heldout_threshold(source, backend, *how)
        write_atomically(path, json.dumps(threshold))
        return threshold

    def _cache(self) -> Path:
        place = self.cache_dir or os.environ.get("DICTLEARN_CACHE") or "~/.cache/dictlearn"
        try:
            return Path(place).expanduser()
        except RuntimeError as error:  # there is no such user
            raise DictlearnError(f"data.cache_dir must be a folder, got {place}: {error}") from error


@dataclass
class EmbeddedText(TextData):
    """The endless text of the embedded LM; it was trained on seed 0, other seeds are unseen."""

    seed: int = 1

    @property
    def title(self) -> str:
        return f"embedded text, seed {self.seed}"

    def source(self) -> Source:
        if not is_count(self.seed, 0):
            raise DictlearnError(f"data.seed must be a whole number of at least 0, got {self.seed!r}")
        return EmbeddedSource(self.seed)


@dataclass
class LocalText(TextData):
    """Text files: `path` is a file, a folder (with its subfolders) or a glob, of one format.

    .txt: one document a line or a file, as `document` says; .jsonl: one JSON object a line, and .parquet: `column`
    has the text, or lists of token ids of this LM's tokenizer.
    """

    path: str = ""
    column: str = "text"
    document: Unit = "line"
    max_norm_ratio: float | None = 10.0

    @property
    def title(self) -> str:
        return str(self.path)

    def source(self) -> Source:
        if self.document not in get_args(Unit):
            choices = ", ".join(get_args(Unit))
            raise DictlearnError(f"data.document must be one of {choices}, got {self.document!r}")
        try:
            files = tuple(str(path) for path in text_files(str(self.path or "")))
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is closed, no such user
            raise DictlearnError(f"data.path {self.path} cannot be read: {reason(error)}") from error
        is_txt = files[0].endswith(".txt")
        if self.document == "file" and not is_txt:
            raise DictlearnError(
                f"data.document=file is for .txt files; a row of {self.column!r} is one document in {files[0]}"
            )
        if self.column != "text" and is_txt:
            raise DictlearnError(
                f"data.column={self.column} is for .jsonl and .parquet files; {files[0]} has no columns"
            )
        return FileSource(files, self.column, self.document)

    def _more_documents(self) -> str:
        if self.document == "file":
            return "data.document=line makes each line of it a document"
        return "add documents (of a .txt file each line is one)"


@dataclass
class HubText(TextData):
    """A data set of the Hugging Face Hub, or a folder laid out like one (or written by save_to_disk).

    `name` is its Hub id or the folder; `column` has the text, or lists of token ids of this LM's tokenizer.
    Streaming reads what is needed, over the network; otherwise all of `config` is downloaded first. Both give the
    same documents. `revision` is a branch, tag or commit; once looked up, it is the commit (and a folder is an
    absolute path), so that what is recorded names the text exactly.
    """

    name: str = ""
    config: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    revision: str | None = None
    max_norm_ratio: float | None = 10.0

    @property
    def title(self) -> str:
        return f"{self.name}, {self.config or 'default config'}, split {self.split}"

    def source(self) -> Source:
        return self._found

    def sample(self) -> Source:
        return replace(self._found, streaming=True)

    @cached_property
    def _found(self) -> HubSource:
        for key in ("name", "config", "split", "column", "revision"):
            value = getattr(self, key)
            if not isinstance(value, str | None):
                quoted = f"\"data.{key}='{value}'\""
                raise DictlearnError(f"data.{key} must be text, got {value!r}: quote it, {quoted}")
        if not isinstance(self.streaming, bool):
            raise DictlearnError(f"data.streaming must be true or false, got {self.streaming!r}")
        from dictlearn.data.hub import find  # a second to import

        found = find(self.name or "", self.config, self.split, self.column, self.streaming, self.revision)
        self.name, self.revision = found.name, found.commit
        return found


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


def warn_of_unknown(tokenizer: PreTrainedTokenizerBase, name: str, tokens: TokenIds, mask: TokenMask) -> None:
    """Warn when more than MOST_UNKNOWN of the counted tokens of `name` are none that the LM's tokenizer knows.

    They count as text, unless the token for them is also a special one (GPT-2 has one for all).
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in special_ids(tokenizer).values():
        return
    n_counted, n_unknown = int(mask.sum()), int((mask & (tokens == unknown)).sum())
    if n_unknown > MOST_UNKNOWN * n_counted:
        log.warning(
            "%.0f %% of the first %d tokens of %s are unknown to the LM's tokenizer, which knows %d, and are read "
            "as %s: numbers on this text say little about the LM",
            100 * n_unknown / n_counted,
            n_counted,
            name,
            len(tokenizer),
            tokenizer.unk_token,
        )


def _digest(parts: Any) -> str:
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


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
