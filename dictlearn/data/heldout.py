"""Which documents of a finite text are held out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from tokenizers import Tokenizer

from dictlearn.data.readers import Document
from dictlearn.data.sources import HASHES, Source, document_hash

MOST_HELDOUT = 0.2  # of a small text
SAMPLE_CHARS = 2**16  # tokenised to learn how many tokens a character is


def heldout_threshold(source: Source, backend: Tokenizer, fraction: float, min_tokens: int, ctx: int) -> int:
    """Documents of a finite source whose hash is below this are held out.

    That is `fraction` of them. If that would be fewer than `min_tokens` tokens (estimated from the number of
    characters), documents are added by rising hash until there are as many, at most a fifth of the tokens; but
    at least one document, and about 2 rows, as long as half of the text stays for training.
    """
    documents = (document for _, document in source.documents(source.start, lambda _: True))
    head = _head(documents)
    tokens_per_char = _tokens_per_char(head, backend)
    sizes: dict[int, float] = {}  # document hash -> estimated tokens; copies of a document share one
    total = 0.0
    for document in chain(head, documents):
        n_tokens = len(document) * tokens_per_char if isinstance(document, str) else len(document)
        key = document_hash(document)
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


def _head(documents: Iterator[Document]) -> list[Document]:
    """The first documents, of SAMPLE_CHARS characters or token ids."""
    head: list[Document] = []
    n_chars = 0
    for document in documents:
        head.append(document)
        n_chars += len(document)
        if n_chars >= SAMPLE_CHARS:
            break
    return head


def _tokens_per_char(head: list[Document], backend: Tokenizer) -> float:
    """Of the first documents that are text; 0 where they are token ids."""
    texts = [document[:SAMPLE_CHARS] for document in head if isinstance(document, str)]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings) / max(sum(map(len, texts)), 1)
