"""Successor (Gould et al. 2023): the next member of a series."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from dictlearn.circuits.tasks._template import ANSWER, Carried, NotCarried
from dictlearn.circuits.tasks._words import bare
from dictlearn.circuits.tasks.base import Draw, Pair, Task
from dictlearn.embedded.lexicon import DAYS, MONTHS, NUMBERS

SERIES = {"number": bare(NUMBERS), "month": bare(MONTHS), "day": bare(DAYS), "letter": tuple(ascii_uppercase)}
CYCLIC = ("month", "day")


class Successor(Task):
    """Answer: the member that follows the last; wrong: the one that is right in the patch prompt.

    The patch prompt has as many members, in order too, from another start.

    Roles: first, second, third (where the template has them), end.
    """

    @property
    def templates(self) -> Sequence[str]:
        return (
            "We counted {number:first}, {number:second}, {number:third} and {number:answer}",
            "It rained in {month:first}, {month:second}, {month:third} and {month:answer}",
            "They met on {day:first}, {day:second}, {day:third} and {day:answer}",
            "The number after {number:first} is {number:answer}",
            "The month after {month:first} is {month:answer}",
            "The day after {day:first} is {day:answer}",
            "The letters are {letter:first}, {letter:second}, {letter:third}, {letter:answer}",
        )

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return SERIES

    def draws(self, carried: Carried) -> Draw:
        roles = [slot.role for slot in carried.slots]
        runs = _runs(carried.slots[-1].pool, len(roles), carried)

        def draw(rng: random.Random) -> Pair:
            clean, patch = (dict(zip(roles, run, strict=True)) for run in rng.sample(runs, 2))
            return Pair(clean, patch, [clean[ANSWER]], [patch[ANSWER]])

        return draw


def _runs(series: str, length: int, carried: Carried) -> list[list[str]]:
    """All runs of consecutive members that the tokenizer carries."""
    members, words = SERIES[series], carried.words[series]
    n = len(members)
    starts = range(n if series in CYCLIC else n - length + 1)
    runs = [[members[(start + i) % n] for i in range(length)] for start in starts]
    runs = [run for run in runs if all(member in words for member in run)]
    if len(runs) < 2:
        raise NotCarried(f"only in {len(runs)} places are {length} members of {series!r} in a row one token each")
    return runs
