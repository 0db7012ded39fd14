"""What a prompt asks for, found in its text by rules that are not those by which it was made."""

from __future__ import annotations

import calendar
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from string import ascii_uppercase
from typing import NamedTuple

from dictlearn.embedded.lexicon import FEMALE_NAMES

NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)


class Solved(NamedTuple):
    """What a prompt asks for, as found in its text; `wrong` is None where the patch prompt decides it."""

    right: set[str]
    wrong: set[str] | None = None


def solve_ioi(text: str) -> Solved:
    counts = Counter(re.findall("[A-Z][a-z]+", text.partition(" ")[2].removeprefix("Friends ")))
    assert sorted(counts.values()) == [1, 2]
    (subject, _), (other, _) = counts.most_common()
    return Solved({f" {other}"}, {f" {subject}"})


def solve_greater_than(text: str) -> Solved:
    century, half, again = re.fullmatch(r"The \w+ [a-z ]+ (\d\d)(\d\d) [a-z ]+ (\d\d)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert century == again
    return Solved({f"{i:02}" for i in range(int(half) + 1, 100)}, {f"{i:02}" for i in range(int(half) + 1)})


def solve_docstring(text: str) -> Solved:
    defined = re.search(r"\(self, (.*)\):", text).group(1).split(", ")  # pyright: ignore[reportOptionalMemberAccess]
    described = re.findall(r"    :param (\w+): \w+ \w+\n", text)
    assert len(described) == 2
    assert text.endswith("    :param")
    answer = defined[defined.index(described[1]) + 1]
    assert defined.index(described[0]) + 2 == defined.index(answer)
    return Solved({f" {answer}"}, {f" {other}" for other in defined if other != answer})


def solve_agreement(text: str) -> Solved:
    """Nouns in the plural end with s, and so do verbs in the singular."""
    words = text.split()
    nouns = [word for before, word in pairwise(words) if before.lower() == "the"]
    that = "that" in words
    if that and words[-1] != nouns[1]:  # "the boat that the sailors mend"
        assert words[-1].endswith("s") != nouns[1].endswith("s")
    subject = nouns[1] if that and words[-1] == nouns[1] else nouns[0]
    return Solved({"plural" if subject.endswith("s") else "singular"})


def number_of(verb: str) -> str:
    return "singular" if verb.endswith("s") else "plural"


def base_form(verb: str) -> str:
    irregular = {" are": " is", " have": " has", " do": " does", " go": " goes"}
    return irregular.get(verb, verb if verb in irregular.values() else verb.removesuffix("s"))


def solve_pronoun(text: str) -> Solved:
    name = re.search(r"(?:So|July\.)( [A-Z]\w+)", text).group(1)  # pyright: ignore[reportOptionalMemberAccess]
    return Solved({" she" if name in FEMALE_NAMES else " he"})


def solve_successor(text: str) -> Solved:
    series: list[Sequence[str]] = [
        NUMBERS.split(),
        list(calendar.month_name)[1:],
        list(calendar.day_name),
        ascii_uppercase,
    ]
    members = next(found for one in series if (found := [w for w in re.findall(r"\w+", text) if w in one]))
    full = next(one for one in series if members[0] in one)
    at = [list(full).index(member) for member in members]
    assert all((b - a) % len(full) == 1 for a, b in pairwise(at))
    return Solved({f" {full[(at[-1] + 1) % len(full)]}"})


def solve_colored_objects(text: str) -> Solved:
    shot, _, question = text.rpartition("Q: ")
    found = []
    for part in (shot, question):
        colors = {thing: color for color, thing in re.findall(r"a (\w+) (\w+)(?:,|\.| and)", part)}
        asked, answer = re.search(r"the (\w+)\?\nA:(.*)", part).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert len(set(colors.values())) == 3
        found.append((f" {colors.pop(asked)}", answer, {f" {color}" for color in colors.values()}))
    assert found[0][0] == found[0][1]
    return Solved({found[1][0]}, found[1][2])


def solve_induction(text: str) -> Solved:
    words = re.findall(r"\w+", text)
    at = next(i for i in range(len(words)) if words[i : i + 2] == words[-2:])
    return Solved({f" {words[at + 2]}"})


SOLVERS: dict[str, Callable[[str], Solved]] = {
    name.removeprefix("solve_"): solver for name, solver in globals().items() if name.startswith("solve_")
}
