"""Colored objects (Merullo et al. 2024): the color of one of three objects, after one example."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dictlearn.checks import check_choice
from dictlearn.circuits.tasks._template import ANSWER, Carried
from dictlearn.circuits.tasks._words import listed
from dictlearn.circuits.tasks.base import Draw, Pair, Task

COLORS = listed("red blue green yellow black white brown purple pink gray silver gold")
OBJECTS = listed("cup book ball pen hat bag box key phone plate shirt bottle ring coin clock lamp knife mug")
PLACES: tuple[str, ...] = ("first", "second", "third")
QUESTION = (
    "Q: On the table, I see a {color:first} {object:first_object}, a {color:second} {object:second_object} and a "
    "{color:third} {object:third_object}. What color is the {object:asked}?\nA: {color:answer}"
)
SHOT = "shot_"  # the roles of the example begin with it


class ColoredObjects(Task):
    """Answer: the color of the object asked for; wrong: the colors of the other two.

    In the patch prompt the colors have moved on by one object, or by two. The example asks for any of its objects.

    Roles: first, second, third (colors), first_object, second_object, third_object, asked, end, and the same of
    the example, shot_first to shot_asked and shot_answer.

    Args:
        asked: "first", "second" or "third", the place of the object asked for.
    """

    def __init__(self, asked: str = "third", template: int = 0) -> None:
        check_choice("asked", asked, PLACES)
        super().__init__(template)
        self.asked = asked

    @property
    def templates(self) -> Sequence[str]:
        shot = QUESTION.replace("{color:", "{color:" + SHOT).replace("{object:", "{object:" + SHOT)
        return (f"{shot}\n{QUESTION}",)

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return {"color": COLORS, "object": OBJECTS}

    def draws(self, carried: Carried) -> Draw:
        colors, objects = carried.need("color", len(PLACES)), carried.need("object", len(PLACES))

        def ask(rng: random.Random, asked: str) -> dict[str, str]:
            found = zip(PLACES, rng.sample(colors, len(PLACES)), rng.sample(objects, len(PLACES)), strict=True)
            values = {
                role: word for at, color, thing in found for role, word in ((at, color), (f"{at}_object", thing))
            }
            return values | {"asked": values[f"{asked}_object"], ANSWER: values[asked]}

        def draw(rng: random.Random) -> Pair:
            shot = {SHOT + role: word for role, word in ask(rng, rng.choice(PLACES)).items()}
            clean = ask(rng, self.asked)
            right, by = clean[self.asked], rng.choice((1, 2))
            patch = {place: clean[PLACES[(at + by) % len(PLACES)]] for at, place in enumerate(PLACES)}
            wrong = [clean[place] for place in PLACES if place != self.asked]
            return Pair(shot | clean, patch, [right], wrong)

        return draw
