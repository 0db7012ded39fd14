"""Docstring (Heimersheim & Janiak 2023): the next argument to be described is the next one of the definition."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

from dictlearn.circuits.tasks._template import Carried, NotCarried
from dictlearn.circuits.tasks._words import GROUPS, Group, bare, listed
from dictlearn.circuits.tasks.base import Draw, Pair, Task
from dictlearn.embedded.lexicon import FUNCTIONS, PARAMETERS

MORE = listed("files last image value data list group time error state title token cache total")
LINES = (
    "    :param {argument:A_doc}: {adjective:a1} {thing:t1}\n"
    "    :param {argument:B_doc}: {adjective:a2} {thing:t2}\n"
    "    :param {argument:answer}"
)
THREE = "{argument:A_def}, {argument:B_def}, {argument:C_def}"
DEFINED = ("first", "second", "A_def", "B_def", "C_def", "last")
RANDOM: tuple[str, ...] = (
    "A_def",
    "B_def",
    "C_def",
    "A_doc",
    "B_doc",
)  # drawn anew in the patch prompt, each by itself


class Docstring(Task):
    """Answer: the third of the arguments A, B, C; wrong: the other arguments of the definition.

    In the patch prompt, A, B and C of the definition and A and B of the lines are five other words, so that
    nothing is repeated.

    Roles: A_def, B_def, C_def, A_doc, B_doc, end, function, and those of the other words.
    """

    metric: ClassVar[str] = "logit_margin"

    @property
    def templates(self) -> Sequence[str]:
        return (
            f"def {{function}}(self, {{argument:first}}, {{argument:second}}, {THREE}, {{argument:last}}):\n"
            f'    """Return the {{adjective}} {{thing}}.\n\n{LINES}',
            f"def {{function}}(self, {THREE}, {{argument:last}}):\n{LINES}",
            f"def {{function}}(self, {THREE}):\n{LINES}",
        )

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return {
            "function": bare(FUNCTIONS),
            "argument": (*bare(PARAMETERS), *MORE),
            "adjective": [word for group in GROUPS for word in group.adjectives],
            "thing": [word for group in GROUPS for forms in group.things for word in forms],
        }

    def draws(self, carried: Carried) -> Draw:
        defined = [role for role in DEFINED if role in carried.positions]
        arguments = carried.need("argument", len(defined) + len(RANDOM))
        topics = [topic for topic in (_topic(group, carried) for group in GROUPS) if all(topic.values())]
        if not topics:
            raise NotCarried("no adjective and noun that go together are one token each")

        def draw(rng: random.Random) -> Pair:
            names = rng.sample(arguments, len(defined) + len(RANDOM))
            values = dict(zip(defined, names, strict=False))
            values |= {"A_doc": values["A_def"], "B_doc": values["B_def"]}
            topic = rng.choice(topics)
            values |= {slot.role: rng.choice(topic[slot.pool]) for slot in carried.slots if slot.pool in topic}
            patch = dict(zip(RANDOM, names[len(defined) :], strict=True))
            wrong = [values[role] for role in defined if role != "C_def"]
            return Pair(carried.fill(rng, values), patch, [values["C_def"]], wrong)

        return draw


def _topic(group: Group, carried: Carried) -> dict[str, list[str]]:
    """The adjectives and things of a group that the tokenizer carries."""
    things = {word for forms in group.things for word in forms}
    return {
        "adjective": [word for word in carried.words["adjective"] if word in group.adjectives],
        "thing": [word for word in carried.words["thing"] if word in things],
    }
