"""The sentences: templates per kind, merged into one trie so that every choice is charged where it shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from dictlearn.embedded import lexicon
from dictlearn.embedded.lexicon import Table
from dictlearn.embedded.slots import BRACKETS, INDENT, SLOTS, Slot
from dictlearn.embedded.writer import Writer

TOKEN = re.compile(r'\n    |\n|:param| ?[A-Za-z]+| ?[0-9]{2}| ?["(\[]|[^A-Za-z0-9\s]')
PART = re.compile(r" ?\{(\w+)\}|" + TOKEN.pattern)

WEIGHTS = {  # shares of all sentences; ioi, induction and docstring need long-range copying
    "ioi": 0.18,
    "induction": 0.10,
    "docstring": 0.06,
    "agreement": 0.17,
    "pronoun": 0.12,
    "greater_than": 0.08,
    "successor": 0.09,
    "closing": 0.09,
    "description": 0.11,
}
COPYING = ("ioi", "induction", "docstring")

TEMPLATES = {
    "ioi": (
        "When {name} and {name} went to the {place}, {giver} {gave} a {gift} to {receiver}.",
        "When {name} and {name} had lunch at the {place}, {giver} {gave} the {gift} to {receiver}.",
        "After {name} and {name} went to the {place}, {giver} decided to give a {gift} to {receiver}.",
        "While {name} and {name} were at the {place}, {giver} said hello to {receiver}.",
        "Then {name} and {name} met at the {place}, and {giver} {gave} a {gift} to {receiver}.",
        "Then {name} and {name} found a {gift}, and {giver} {gave} it to {receiver}.",
        "{name} and {name} worked at the {place}. Later {giver} {gave} a {gift} to {receiver}.",
        "{name} and {name} had a long talk, and {giver} got a {gift} from {receiver}.",
    ),
    "induction": (
        "Repeat {span}, and again {copy}.",
        "{name} wrote {span}. Then {name} wrote {copy}.",
        "The code was {span}; yes, {copy}.",
    ),
    "docstring": ("{docstring}",),
    "agreement": (
        "The {person} {prep} the {other_thing} {is} {mood}.",
        "The {person} {prep} the {other_person} {was} {mood}.",
        "The {person} {prep} the {other_thing} {verbs} the {object}.",
        "The {thing} {prep} the {other_thing} {is} {adj}.",
        "The {thing} {prep} the {other_person} {was} {adj}.",
        "The {thing} that the {other_person} {other_verbs} {is} {adj}.",
        "The {person} who {verbs} the {object} {is} {mood}.",
        "Today the {person} {verbs} the {object}.",
    ),
    "pronoun": (
        "{name} lost the {gift} because {he} was {mood}.",
        "{name} said that {he} was {mood}.",
        "{name} saw {himself} in the mirror.",
        "{name} forgot {his} {gift} at the {place}.",
        "{name} is a {one_person}. {He} {verbs} the {object}.",
    ),
    "greater_than": (
        "The {event} lasted from {year} to {later}.",
        "The {event} began in {year} and ended in {later}.",
        "{name} was born in {year} and died in {later}.",
    ),
    "successor": (
        "They met on {days}.",
        "It rained in {months}.",
        "We counted {numbers}.",
        "The day after {day_is_next}.",
        "The month after {month_is_next}.",
        "The number after {number_is_next}.",
    ),
    "closing": (
        "{name} said, {quote} The {thing} {is} {adj}.{unquote}",
        "{name} asked, {quote} Who {verbed} the {object} at the {where}?{unquote}",
        "Later {name} said, {quote} The {person} {verbed} the {object}.{unquote}",
        "The {person} {open} the {other_person} {prep} the {where} {close} {was} {mood}.",
        "The {thing} {open} see number {number} {close} {was} {adj}.",
    ),
    "description": (
        "The {any_adj} {thing_of_adj} {was} {prep} the {where}.",
        "The {person} {verbed} the {object}.",
        "At the {where}, the {person} {verbed} the {object}.",
        "{name} {verbed} the {object} at the {where}.",
        "The {thing} {is} {adj} and {other_adj}.",
    ),
}


@dataclass(frozen=True, eq=False)
class Node:
    """One literal token or slot of the trie; a leaf has the kind of its sentence and no children."""

    part: str | Slot
    children: Table["Node"]
    kind: str


Path = tuple[tuple[str, ...], float, str]  # parts left, weight, kind


def parts(template: str) -> tuple[str, ...]:
    """Tokens and "{slot}"s of a template, which begins like the sentence inside a line: with a space."""
    found = (match.group() for match in PART.finditer(" " + template))
    return tuple(part.strip() if "{" in part else part for part in found)


def _children(paths: list[Path]) -> Table[Node]:
    paths = sorted(paths, key=lambda path: path[0][:1])
    weights: dict[Node, float] = {}
    for first, group in groupby(paths, key=lambda path: path[0][0] if path[0] else ""):
        same = list(group)
        rest = _children([(left[1:], weight, kind) for left, weight, kind in same if left])
        node = Node(SLOTS[first[1:-1]] if first[:1] == "{" else first, rest, "" if first else same[0][2])
        weights[node] = sum(weight for _, weight, _ in same)
    return Table.of(weights)


def trie(kinds: dict[str, float]) -> Table[Node]:
    """All templates of these kinds, each kind with its weight shared evenly by its templates."""
    return _children(
        [
            (parts(template), weight / len(TEMPLATES[kind]), kind)
            for kind, weight in kinds.items()
            for template in TEMPLATES[kind]
        ]
    )


SENTENCES = trie(WEIGHTS)


def sentence(w: Writer, start: Table[Node] = SENTENCES) -> None:
    """Write one sentence, and its kind into `w.kinds`."""
    w.names, w.words = [], []
    children = start
    while True:
        node = children.items[0] if len(children.items) == 1 else w.draw(children)
        if node.kind:
            w.kinds.append(node.kind)
            return
        if isinstance(node.part, str):
            w.say(node.part)
        else:
            node.part(w)
        children = node.children


def _literals() -> Iterator[str]:
    """Every literal token of the templates, in the forms in which it occurs."""
    for templates in TEMPLATES.values():
        for template in templates:
            before = "{line}"
            for part in parts(template):
                if part[0] != "{":
                    yield from {"{line}": (part, part.strip())}.get(before) or (
                        [part.strip()] if before in ("{quote}", "{open}") else [part]
                    )
                before = part


def vocabulary() -> tuple[str, ...]:
    """Every token the generator can say, without special tokens; sorted."""
    nouns = {noun.token for topic in lexicon.TOPICS for noun in (*topic.people, *topic.things)}
    verbs = {form for topic in lexicon.TOPICS for verb in topic.verbs for form in verb[:3]}
    names = {form for name in lexicon.NAMES for form in (name, name.strip())}
    code = {"\n", INDENT, ":param", "def", "self", "(", ")", ":", ","}
    grammatical = {" he", " she", " He", " She", " his", " her", " himself", " herself"}
    grammatical |= {" is", " are", " was", " were", " and", ' "', '"', *BRACKETS, *BRACKETS.values()}
    lists = (
        *(lexicon.PLACES, lexicon.GIFTS, lexicon.GIVING, lexicon.PREPOSITIONS, lexicon.MOODS),
        *(lexicon.EVENTS, lexicon.CENTURIES, lexicon.YEAR_HALVES, lexicon.DAYS, lexicon.MONTHS),
        *(lexicon.NUMBERS, lexicon.FUNCTIONS, lexicon.PARAMETERS, lexicon.SPAN_WORDS),
        *(words for topic in lexicon.TOPICS for words in (topic.adjectives, topic.places)),
    )
    words = {word for words in lists for word in words}
    return tuple(sorted(nouns | verbs | names | code | grammatical | words | set(_literals())))
