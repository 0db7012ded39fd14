"""The embedded text: an endless, deterministic stream of short documents, addressed by (seed, index).

4 or more sentences of mixed kinds; after the fourth, a document ends with probability P_END at each full
stop, and always from MAX_TOKENS on (the longest document fits 126 tokens).
"""

from collections.abc import Iterator
from typing import NamedTuple

from dictlearn.embedded.grammar import sentence
from dictlearn.embedded.writer import Writer

MIN_SENTENCES, P_END, MAX_TOKENS = 4, 0.4, 88


class Document(NamedTuple):
    """One document; probabilities are natural logs, in nats."""

    text: str
    tokens: tuple[str, ...]
    log_probs: tuple[float, ...]  # of each token given those before it, as the generator chose; 0.0 = forced
    end_log_prob: float  # of the document ending here, i.e. of the BOS token that follows

    @property
    def bound(self) -> float:
        """Nats, summed over the tokens and the BOS that follows: no model can expect a lower loss."""
        return -sum(self.log_probs) - self.end_log_prob


def write(seed: int, index: int) -> Writer:
    """The document with the generator's notes: kinds of sentences, marks of the tasks, pending = its end."""
    w = Writer(seed, index)
    for _ in range(MIN_SENTENCES):
        sentence(w)
    while len(w.tokens) < MAX_TOKENS and not w.flip(P_END):
        sentence(w)
    return w


def document(seed: int, index: int) -> Document:
    """Document `index` of the stream `seed`: the same on every machine, whatever was asked for before."""
    w = write(seed, index)
    return Document("".join(w.tokens), tuple(w.tokens), tuple(w.log_probs), w.pending)


def documents(seed: int, start: int = 0) -> Iterator[Document]:
    """Documents `start`, `start` + 1, ... of the stream `seed`, without end."""
    index = start
    while True:
        yield document(seed, index)
        index += 1
