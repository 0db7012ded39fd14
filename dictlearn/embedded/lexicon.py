"""The words of the embedded text: tables, no logic beyond inflection.

Every noun takes a plain -s, every verb a plain -s and -ed, so one stem gives all forms. Tokens carry their
leading space (" boat"), as GPT-2's do. The topics share no word: one topical word tells a document's topic.
"""

import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Table(Generic[Item]):
    """A finite distribution: `cumulative[i]` = P(one of items 0..i), `log_probs[i]` = ln P(items[i])."""

    items: tuple[Item, ...]
    cumulative: tuple[float, ...]
    log_probs: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[Item, float]) -> "Table[Item]":
        total = math.fsum(weights.values())
        cumulative = tuple(sum_ / total for sum_ in accumulate(weights.values()))
        return cls(tuple(weights), cumulative, tuple(math.log(w / total) for w in weights.values()))

    def draw(self, uniform: float) -> tuple[Item, float]:
        """The item at quantile `uniform` in [0, 1), with its natural-log probability."""
        index = bisect(self.cumulative, uniform, 0, len(self.items) - 1)
        return self.items[index], self.log_probs[index]


class Noun(NamedTuple):
    """One inflected noun; `stem` is shared by its singular and plural."""

    token: str
    stem: str
    plural: bool


class Verb(NamedTuple):
    """One verb with its forms and the things (either number) it is typically done to."""

    base: str
    singular: str
    past: str
    objects: Table[Noun]


class Topic(NamedTuple):
    """What the sentences of one document talk about."""

    people: tuple[Noun, ...]
    things: tuple[Noun, ...]
    adjectives: tuple[str, ...]
    adjective_of: dict[str, Table[str]]  # stem of a thing -> its adjectives
    thing_of: dict[str, Table[Noun]]  # adjective -> things
    verbs: tuple[Verb, ...]
    places: tuple[str, ...]


TYPICAL, OTHER = 5.0, 0.5  # weights of a typical and of any other adjective or object of the topic


def tokens(words: str) -> tuple[str, ...]:
    """Words separated by blanks, each with its leading space."""
    return tuple(f" {word}" for word in words.split())


def _forms(stems: tuple[str, ...]) -> tuple[Noun, ...]:
    return tuple(Noun(stem + "s" * plural, stem, plural) for stem in stems for plural in (False, True))


def _typical(line: str) -> tuple[str, tuple[str, ...]]:
    head, tail = line.split(":")
    return f" {head.strip()}", tokens(tail)


def _verb(line: str, things: tuple[Noun, ...]) -> Verb:
    base, objects = _typical(line)
    weights = {noun: TYPICAL if noun.stem in objects else OTHER for noun in things}
    return Verb(base, base + "s", base + "ed", Table.of(weights))


def _topic(people: str, adjectives: str, things: str, verbs: str, places: str) -> Topic:
    """`things`: "thing: its typical adjectives; ..."; `verbs`: "verb: its typical objects; ..."."""
    typical = dict(_typical(line) for line in things.split(";"))
    nouns, adjs = _forms(tuple(typical)), tokens(adjectives)
    weight = {stem: {a: TYPICAL if a in typical[stem] else OTHER for a in adjs} for stem in typical}
    return Topic(
        people=_forms(tokens(people)),
        things=nouns,
        adjectives=adjs,
        adjective_of={stem: Table.of(weight[stem]) for stem in typical},
        thing_of={a: Table.of({noun: weight[noun.stem][a] for noun in nouns}) for a in adjs},
        verbs=tuple(_verb(line, nouns) for line in verbs.split(";")),
        places=tokens(places),
    )


TOPICS = (
    _topic(
        "sailor captain pirate",
        "salty wet rusty wooden deep",
        "boat: wooden wet; net: wet salty; rope: wet; wave: deep salty; shell: salty; anchor: rusty",
        "mend: net rope; row: boat; haul: net anchor; gather: shell",
        "harbor beach",
    ),
    _topic(
        "cook baker waiter",
        "sweet hot fresh spicy burnt",
        "cake: sweet fresh; soup: hot spicy; pan: hot burnt; spoon: hot; pot: burnt; onion: fresh spicy",
        "boil: soup onion; heat: pan pot; roast: onion; clean: spoon pan",
        "bakery pantry",
    ),
    _topic(
        "gardener florist neighbor",
        "green leafy tall blooming thorny",
        "rose: thorny blooming; tulip: blooming; tree: tall leafy; seed: green; fence: tall; weed: green leafy",
        "plant: tree seed; water: tulip rose; pick: rose; paint: fence",
        "meadow greenhouse",
    ),
    _topic(
        "soldier general knight",
        "sharp heavy burning royal iron",
        "sword: sharp iron; shield: heavy iron; tower: burning royal; bridge: burning; cannon: heavy; flag: royal",
        "defend: tower bridge; sharpen: sword; lift: shield flag; load: cannon",
        "castle fortress",
    ),
    _topic(
        "teacher student pupil",
        "difficult short clever boring long",
        "lesson: boring long; pencil: short; poem: clever short; exam: difficult long; "
        "chart: boring; answer: clever",
        "explain: lesson answer; learn: poem; correct: exam answer; print: chart",
        "classroom library",
    ),
    _topic(
        "singer drummer violinist",
        "loud soft gentle cheerful sad",
        "song: sad cheerful; drum: loud; tune: gentle cheerful; guitar: soft; piano: loud soft; concert: loud",
        "play: guitar piano drum; perform: song; record: tune song; enjoy: concert",
        "theater studio",
    ),
    _topic(
        "shepherd rancher farmer",
        "muddy hungry brown noisy strong",
        "cow: brown hungry; goat: noisy hungry; barn: muddy; cart: muddy; horse: strong brown; plow: strong",
        "milk: cow goat; pull: plow cart; groom: horse; repair: barn cart",
        "pasture stable",
    ),
    _topic(
        "chemist doctor scientist",
        "bright distant tiny precise complex",
        "star: bright distant; planet: distant; comet: bright tiny; telescope: precise; rocket: complex;"
        "formula: complex precise",
        "discover: planet comet; design: telescope rocket; sight: star; test: formula rocket",
        "laboratory observatory",
    ),
)

FEMALE_NAMES = tokens(
    "Mary Anna Emma Alice Sarah Laura Julia Clara Helen Grace Ruth Nina Lucy Sophie Eva Martha Jane Diana"
    " Irene Olga Paula Vera Carol Kate Linda Molly Nora Susan Wendy Betty"
)
MALE_NAMES = tokens(
    "John Paul Peter James David Mark Thomas Henry Frank George Simon Adam Oscar Robert Martin Daniel Tom"
    " Victor Walter Edward Hugo Ivan Jacob Kevin Leo Max Nick Oliver Philip Ralph"
)
NAMES = tuple(name for pair in zip(FEMALE_NAMES, MALE_NAMES, strict=True) for name in pair)
PLACES = tokens("store park market station museum school hospital office river hotel church cafe")
GIFTS = tokens("book ring ball drink letter coin hat watch key bag coat basket")
GIVING = tokens("gave handed offered sent showed passed")
PREPOSITIONS = tokens("near behind beside above under")
MOODS = tokens("tired happy angry late cold proud sick bored")
EVENTS = tokens("war siege reign strike journey trial festival project drought voyage")
CENTURIES = tuple(f" {century}" for century in range(11, 20))
YEAR_HALVES = tuple(f"{half:02}" for half in range(100))
DAYS = tokens("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = tokens("January February March April May June July August September October November December")
NUMBERS = tokens(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen twenty"
)
FUNCTIONS = tokens("open read write find copy merge split sort parse draw")
PARAMETERS = tokens("path size mode name file width index color label count user text depth url line port")
SPAN_WORDS = (
    *dict.fromkeys(noun.stem for topic in TOPICS for noun in topic.things),
    *(adjective for topic in TOPICS for adjective in topic.adjectives),
    *PLACES,
    *GIFTS,
)
