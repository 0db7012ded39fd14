"""Gendered pronoun: a name decides between he and she."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dictlearn.circuits.tasks._template import Carried, NotCarried
from dictlearn.circuits.tasks._words import FEMALE, GIFTS, MALE, NAMES
from dictlearn.circuits.tasks.base import Draw, Pair, Task

PRONOUNS = ("she", "he")


class Pronoun(Task):
    """Answer: the pronoun of the name's gender; wrong: the other. The patch prompt has a name of the other gender.

    Roles: name, end, and gift where the template has it.
    """

    @property
    def templates(self) -> Sequence[str]:
        first = "It rained in May, June and July. "  # so that a sentence may begin with a name
        return (
            "So {name} is a really great friend, isn't {pronoun:answer}",
            first + "{name} lost the {gift} because {pronoun:answer}",
            first + "{name} said that {pronoun:answer}",
        )

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return {"name": NAMES, "gift": GIFTS, "pronoun": PRONOUNS}

    def draws(self, carried: Carried) -> Draw:
        carried.need("pronoun", 2)
        names = [[name for name in carried.words["name"] if name in of] for of in (FEMALE, MALE)]
        if not all(names):
            raise NotCarried("no female name, or no male name, is one token")

        def draw(rng: random.Random) -> Pair:
            gender = rng.randrange(2)
            clean = carried.fill(rng, {"name": rng.choice(names[gender])})
            patch = {"name": rng.choice(names[1 - gender])}
            return Pair(clean, patch, [PRONOUNS[gender]], [PRONOUNS[1 - gender]])

        return draw
