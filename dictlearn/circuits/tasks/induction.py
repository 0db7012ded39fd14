"""Induction (Olsson et al. 2022): what followed the last words when they were written before follows again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dictlearn.circuits.tasks._template import ANSWER, Carried
from dictlearn.circuits.tasks._words import bare
from dictlearn.circuits.tasks.base import Draw, Pair, Task
from dictlearn.embedded.lexicon import SPAN_WORDS

COPY = "_copy"
SPAN = "{word:first} {word:second} {word:source} {word:next}"
AGAIN = "{word:first_copy} {word:second_copy} {word:answer}"


class Induction(Task):
    """Answer: the word at `source`, which followed the two words that are repeated; wrong: the word after it.

    The words are random and different. In the patch prompt, the words at `source` and `next` are exchanged, so
    that the wrong answer is right there.

    Roles: first, second, source, next, first_copy, second_copy (= end), and those of the words before them.
    """

    @property
    def templates(self) -> Sequence[str]:
        before = "{word:1} {word:2} {word:3}"
        again = before.replace("}", COPY + "}")
        return (
            f"List: {before} {SPAN} {{word:4}}\nList: {again} {AGAIN}",
            f"Repeat {SPAN}, and again {AGAIN}",
            f"The code was {SPAN}; yes, {AGAIN}",
        )

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return {"word": bare(SPAN_WORDS)}

    def draws(self, carried: Carried) -> Draw:
        roles = [role for role in carried.positions if not role.endswith(COPY) and role != ANSWER]
        words = carried.need("word", len(roles))

        def draw(rng: random.Random) -> Pair:
            clean = dict(zip(roles, rng.sample(words, len(roles)), strict=True))
            source, following = clean["source"], clean["next"]
            clean |= {role: clean[role.removesuffix(COPY)] for role in carried.positions if role.endswith(COPY)}
            return Pair(clean, {"source": following, "next": source}, [source], [following])

        return draw
