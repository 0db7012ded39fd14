"""The slots of the sentence templates: `{name}` in a template calls SLOTS["name"](writer).

A slot says one or more tokens. Slots that stand at the same place of two templates begin with different
tokens, so a text can be parsed in one way only and its log-probability is exact.
"""

from collections.abc import Callable, Sequence

from dictlearn.embedded.lexicon import (
    CENTURIES,
    DAYS,
    EVENTS,
    FEMALE_NAMES,
    FUNCTIONS,
    GIFTS,
    GIVING,
    MONTHS,
    MOODS,
    NAMES,
    NUMBERS,
    PARAMETERS,
    PLACES,
    PREPOSITIONS,
    SPAN_WORDS,
    TOPICS,
    YEAR_HALVES,
    Noun,
    Topic,
)
from dictlearn.embedded.writer import Writer

Slot = Callable[[Writer], None]
SLOTS: dict[str, Slot] = {}
BRACKETS = {" (": ")", " [": "]"}
INDENT = "\n    "


def slot(function: Slot) -> Slot:
    SLOTS[function.__name__.rstrip("_")] = function
    return function


def _uniform(items: Sequence[str]) -> Slot:
    return lambda w: w.say(w.choose(items))


SLOTS |= {
    "place": _uniform(PLACES),
    "gift": _uniform(GIFTS),
    "gave": _uniform(GIVING),
    "prep": _uniform(PREPOSITIONS),
    "mood": _uniform(MOODS),
    "event": _uniform(EVENTS),
    "number": _uniform(NUMBERS),
}


# Names: each is drawn from all names but those already in the sentence.


@slot
def name(w: Writer) -> None:
    w.names.append(w.choose_new(NAMES, w.names))
    w.say(w.names[-1])


@slot
def giver(w: Writer) -> None:
    """One of the two names; the other one is the receiver."""
    if w.below(2):
        w.names.reverse()
    w.say(w.names[0])


@slot
def receiver(w: Writer) -> None:
    w.mark("ioi", w.names[0])
    w.say(w.names[1])


def _gendered(female: str, male: str) -> Slot:
    def pronoun(w: Writer) -> None:
        right, wrong = (female, male) if w.names[0] in FEMALE_NAMES else (male, female)
        w.mark("pronoun", wrong)
        w.say(right)

    return pronoun


SLOTS |= {
    "he": _gendered(" she", " he"),
    "He": _gendered(" She", " He"),
    "his": _gendered(" her", " his"),
    "himself": _gendered(" herself", " himself"),
}


# Topical words and agreement.


def topic(w: Writer) -> Topic:
    """The topic of the document, drawn (and charged to its first topical word) when first needed."""
    if w.topic is None:
        w.topic = w.choose(TOPICS)
    return w.topic


def _subject(w: Writer, noun: Noun) -> None:
    w.noun = w.other = noun
    w.say(noun.token)


@slot
def person(w: Writer) -> None:
    _subject(w, w.choose(topic(w).people))


@slot
def thing(w: Writer) -> None:
    _subject(w, w.choose(topic(w).things))


@slot
def one_person(w: Writer) -> None:
    _subject(w, w.choose(topic(w).people[::2]))


@slot
def other_person(w: Writer) -> None:
    w.other = w.choose(topic(w).people)
    w.say(w.other.token)


@slot
def other_thing(w: Writer) -> None:
    w.other = w.choose(topic(w).things)
    w.say(w.other.token)


@slot
def where(w: Writer) -> None:
    w.say(w.choose(topic(w).places))


@slot
def adj(w: Writer) -> None:
    """An adjective typical of the subject, after it."""
    w.adjective = w.draw(topic(w).adjective_of[w.noun.stem])
    w.say(w.adjective)


@slot
def other_adj(w: Writer) -> None:
    w.say(w.choose_new(topic(w).adjectives, [w.adjective]))


@slot
def any_adj(w: Writer) -> None:
    """An adjective before its noun."""
    w.adjective = w.choose(topic(w).adjectives)
    w.say(w.adjective)


@slot
def thing_of_adj(w: Writer) -> None:
    _subject(w, w.draw(topic(w).thing_of[w.adjective]))


@slot
def object_(w: Writer) -> None:
    w.other = w.draw(w.verb.objects)
    w.say(w.other.token)


def _agree(w: Writer, noun: Noun, singular: str, plural: str) -> None:
    right, wrong = (plural, singular) if noun.plural else (singular, plural)
    if w.other.plural != noun.plural:  # something of the other number stands in between
        w.mark("agreement", wrong)
    w.say(right)


def _copula(singular: str, plural: str) -> Slot:
    return lambda w: _agree(w, w.noun, singular, plural)


SLOTS |= {"is": _copula(" is", " are"), "was": _copula(" was", " were")}


@slot
def verbs(w: Writer) -> None:
    """A verb in the present, agreeing with the subject."""
    w.verb = w.choose(topic(w).verbs)
    _agree(w, w.noun, w.verb.singular, w.verb.base)


@slot
def other_verbs(w: Writer) -> None:
    """A verb in the present, agreeing with the noun just before it."""
    w.verb = w.choose(topic(w).verbs)
    w.say(w.verb.base if w.other.plural else w.verb.singular)


@slot
def verbed(w: Writer) -> None:
    w.verb = w.choose(topic(w).verbs)
    w.say(w.verb.past)


# Years: a century, then a half without a space.


@slot
def year(w: Writer) -> None:
    w.century = w.choose(CENTURIES)
    w.say(w.century)
    w.half = w.below(99)
    w.say(YEAR_HALVES[w.half])


@slot
def later(w: Writer) -> None:
    """A later year of the same century, uniform over those left."""
    w.say(w.century)
    w.mark("greater_than", *YEAR_HALVES[: w.half + 1])
    w.say(w.choose(YEAR_HALVES[w.half + 1 :]))


# Successors: 3 to 5 consecutive members, "a, b and c".


def _list(members: Sequence[str], cyclic: bool) -> Slot:
    def items(w: Writer) -> None:
        n, at = 1, w.below(len(members) - (0 if cyclic else 4))
        w.say(members[at])
        last = False
        while not last:
            last = n >= 2 and (n == 4 or w.flip(0.5))
            w.say(" and" if last else ",")
            n, at = n + 1, (at + 1) % len(members)
            w.mark("successor")
            w.say(members[at])

    return items


def _next(members: Sequence[str], cyclic: bool) -> Slot:
    def pair(w: Writer) -> None:
        at = w.below(len(members) - (not cyclic))
        w.say(members[at])
        w.say(" is")
        w.mark("successor")
        w.say(members[(at + 1) % len(members)])

    return pair


SLOTS |= {
    "days": _list(DAYS, cyclic=True),
    "months": _list(MONTHS, cyclic=True),
    "numbers": _list(NUMBERS, cyclic=False),
    "day_is_next": _next(DAYS, cyclic=True),
    "month_is_next": _next(MONTHS, cyclic=True),
    "number_is_next": _next(NUMBERS, cyclic=False),
}


# Induction: 3 to 6 random words, and again from the first or second of them.


@slot
def span(w: Writer) -> None:
    while len(w.words) < 3 or (len(w.words) < 6 and w.flip(0.6)):
        w.words.append(w.choose_new(SPAN_WORDS, w.words))
        w.say(w.words[-1])


@slot
def copy(w: Writer) -> None:
    start = w.below(2)
    w.say(w.words[start])
    for word in w.words[start + 1 :]:
        w.mark("induction")
        w.say(word)


# Quotes and brackets.


@slot
def quote(w: Writer) -> None:
    w.say(' "')
    w.glue = True


@slot
def unquote(w: Writer) -> None:
    w.mark("closing")
    w.say('"')


@slot
def open_(w: Writer) -> None:
    w.bracket = w.choose(tuple(BRACKETS))
    w.say(w.bracket)
    w.glue = True


@slot
def close(w: Writer) -> None:
    w.mark("closing", *(right for right in BRACKETS.values() if right != BRACKETS[w.bracket]))
    w.say(BRACKETS[w.bracket])


# Code: a signature of 2 to 4 parameters, and a line about each, in its order.


@slot
def docstring(w: Writer) -> None:
    if not w.glue:
        w.say("\n")
    w.say("def")
    w.say(w.choose(FUNCTIONS))
    w.say("(")
    w.say("self")
    params: list[str] = []
    while len(params) < 2 or (len(params) < 4 and w.flip(0.5)):
        w.say(",")
        params.append(w.choose_new(PARAMETERS, params))
        w.say(params[-1])
    w.say(")")
    w.say(":")
    for param in params:
        w.say(INDENT)
        w.say(":param")
        w.mark("docstring")
        w.say(param)
        w.say(":")
        any_adj(w)
        w.say(w.draw(topic(w).thing_of[w.adjective]).token)
    w.say("\n")
    w.glue = True
