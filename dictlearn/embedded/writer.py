"""A document being written: random choices are charged, as log-probability, to the token that shows them."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from dictlearn.embedded.lexicon import Noun, Table, Topic, Verb

Item = TypeVar("Item")
LOG = (0.0, *(math.log(n) for n in range(1, 512)))


class Mark(NamedTuple):
    """tokens[position] answers `task`; `wrong` are the counterparts it can be told from (may be empty)."""

    task: str
    position: int
    wrong: tuple[str, ...]


class Writer:
    """Tokens so far and what the current sentence has to remember."""

    noun: Noun  # subject
    other: Noun  # a noun between the subject and its verb
    verb: Verb
    adjective: str
    century: str
    half: int
    bracket: str

    def __init__(self, seed: int, index: int) -> None:
        self.uniform = random.Random(f"{seed}/{index}").random  # the same on every platform
        self.tokens: list[str] = []
        self.log_probs: list[float] = []
        self.marks: list[Mark] = []
        self.kinds: list[str] = []  # one per sentence
        self.topic: Topic | None = None  # drawn when first needed, kept to the end of the document
        self.names: list[str] = []  # of this sentence, in order of appearance
        self.words: list[str] = []  # the random span of this sentence
        self.pending = 0.0  # nats, charged to the next token
        self.glue = True  # the next token opens a line, bracket or quote: no leading space

    def say(self, token: str) -> None:
        if self.glue:
            token, self.glue = token.removeprefix(" "), False
        self.tokens.append(token)
        self.log_probs.append(self.pending)
        self.pending = 0.0

    def mark(self, task: str, *wrong: str) -> None:
        """The next token is one that a model can only get right by solving `task`."""
        self.marks.append(Mark(task, len(self.tokens), wrong))

    def below(self, n: int) -> int:
        """Uniform over 0..n-1."""
        self.pending -= LOG[n]
        return int(self.uniform() * n)

    def choose(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def choose_new(self, items: Sequence[Item], used: Sequence[Item]) -> Item:
        """Uniform over the items that are not in `used`, all of which are among `items`."""
        self.pending -= LOG[len(items) - len(used)]
        while (item := items[int(self.uniform() * len(items))]) in used:
            pass
        return item

    def draw(self, table: Table[Item]) -> Item:
        item, log_prob = table.draw(self.uniform())
        self.pending += log_prob
        return item

    def flip(self, p: float) -> bool:
        """True with probability p."""
        heads = self.uniform() < p
        self.pending += math.log(p if heads else 1 - p)
        return heads
