"""Words of more than one task, without their leading spaces; those of the embedded text are among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dictlearn.embedded import lexicon


def listed(words: str) -> tuple[str, ...]:
    """Words separated by blanks."""
    return tuple(words.split())


def bare(words: Iterable[str]) -> tuple[str, ...]:
    """Words of the embedded text without their leading space."""
    return tuple(word.strip() for word in words)


FEMALE = bare(lexicon.FEMALE_NAMES)
MALE = bare(lexicon.MALE_NAMES)
NAMES = bare(lexicon.NAMES)
PLACES = bare(lexicon.PLACES)
GIFTS = bare(lexicon.GIFTS)

Forms = tuple[str, str]  # singular and plural


class Group(NamedTuple):
    """Words that go together: a document of the embedded text is about one such group."""

    people: tuple[Forms, ...]
    things: tuple[Forms, ...]
    acts: tuple[Forms, ...]  # what the people do to the things: "mends", "mend"
    adjectives: tuple[str, ...]


def _nouns(words: str) -> tuple[Forms, ...]:
    return tuple((word, word + "s") for word in listed(words))


def _acts(words: str) -> tuple[Forms, ...]:
    return tuple((word + "s", word) for word in listed(words))


def _group(topic: lexicon.Topic) -> Group:
    people, things = (" ".join(noun.token for noun in nouns[::2]) for nouns in (topic.people, topic.things))
    acts = "".join(verb.base for verb in topic.verbs)
    return Group(_nouns(people), _nouns(things), _acts(acts), bare(topic.adjectives))


GROUPS = (
    Group(
        _nouns("author minister manager lawyer artist senator guard actor dancer driver writer officer"),
        _nouns("car table house door machine picture window ship computer phone garden"),
        _acts("like know see help want need love hate"),
        listed("new old small large good bad simple full"),
    ),
    *map(_group, lexicon.TOPICS),
)
