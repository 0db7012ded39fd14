"""Subject-verb agreement (Marks et al. 2024): the verb has the number of its subject, whatever is in between."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from dictlearn.checks import check_choice
from dictlearn.circuits.tasks._template import ANSWER, Carried, NotCarried
from dictlearn.circuits.tasks._words import GROUPS, Forms, Group, bare
from dictlearn.circuits.tasks.base import Draw, Pair, Task
from dictlearn.embedded.lexicon import PREPOSITIONS

TEMPLATES = {
    "simple": ("The {thing:subject} {verb:answer}", "Today the {person:subject} {act:answer}"),
    "nounpp": (
        "The {person:subject} {preposition} the {thing:other} {verb:answer}",
        "The {thing:subject} {preposition} the {thing:other} {verb:answer}",
    ),
    "rc": ("The {thing:subject} that the {person:other} {act} {verb:answer}",),
    "within_rc": ("The {thing:other} that the {person:subject} {act:answer}",),
}
VERBS: tuple[Forms, ...] = (("is", "are"), ("has", "have"), ("does", "do"), ("goes", "go"))
FORMS = ("person", "thing", "verb", "act")  # pools of pairs of words, singular and plural


class Agreement(Task):
    """Answer: the form of a verb that agrees with the subject; wrong: its other form.

    The patch prompt has the subject in the other number. Numbers of subject and other noun are drawn
    independently.

    Roles: subject (the noun that decides), other, preposition, act, as the structure has them, end.

    Args:
        structure: "simple" (the boat | is), "nounpp" (the sailor near the boats | is), "rc" (the boat that the
            sailors mend | is), "within_rc" (the boats that the sailor | mends).
    """

    def __init__(self, structure: str = "nounpp", template: int = 0) -> None:
        check_choice("structure", structure, tuple(TEMPLATES))
        super().__init__(template)
        self.structure = structure

    @property
    def templates(self) -> Sequence[str]:
        return TEMPLATES[self.structure]

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        found = {pool: [w for group in GROUPS for forms in _forms(group)[pool] for w in forms] for pool in FORMS}
        return {**found, "verb": [w for forms in VERBS for w in forms], "preposition": bare(PREPOSITIONS)}

    def draws(self, carried: Carried) -> Draw:
        needed = {slot.pool for slot in carried.slots} & set(FORMS)
        groups = [{pool: _carried(forms, carried.words[pool]) for pool, forms in _forms(g).items()} for g in GROUPS]
        groups = [group for group in groups if all(group[pool] for pool in needed)]
        if not groups:
            raise NotCarried(f"no words that go together are one token each in singular and plural: {needed}")

        def draw(rng: random.Random) -> Pair:
            group = rng.choice(groups)
            plural = {"subject": rng.random() < 0.5, "other": rng.random() < 0.5}
            plural |= {"act": plural["other"], ANSWER: plural["subject"]}
            forms = {slot.role: rng.choice(group[slot.pool]) for slot in carried.slots if slot.pool in FORMS}
            words = {role: found[plural[role]] for role, found in forms.items()}
            right, wrong = words.pop(ANSWER), forms[ANSWER][not plural[ANSWER]]
            patch = {"subject": forms["subject"][not plural["subject"]]}
            return Pair(carried.fill(rng, words), patch, [right], [wrong])

        return draw


def _forms(group: Group) -> dict[str, tuple[Forms, ...]]:
    return {"person": group.people, "thing": group.things, "verb": VERBS, "act": group.acts}


def _carried(forms: Sequence[Forms], words: Sequence[str]) -> list[Forms]:
    return [pair for pair in forms if pair[0] in words and pair[1] in words]
