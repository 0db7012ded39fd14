"""Greater-than (Hanna et al. 2023): what began in 1732 ends in a later year of that century."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

from dictlearn.circuits.tasks._template import Carried, NotCarried
from dictlearn.circuits.tasks._words import bare, listed
from dictlearn.circuits.tasks.base import Draw, Pair, Task
from dictlearn.embedded.lexicon import CENTURIES, EVENTS, YEAR_HALVES

MORE = listed("campaign conflict expedition investigation operation program mission battle protest study")
EARLY = "01"  # the year in the patch prompts: nearly all halves are later
# Halves of a century that must be tokens after it. GPT-2 has them from 12 to 17; of the years 1800 to 1899 a
# fifth are one token each, and all from 1900 on.
MOST = 90


class GreaterThan(Task):
    """Answers: the halves of years strictly greater than YY; wrong: those less than or equal to YY.

    YY is neither the first nor the last half of its century, and later than 01. In the patch prompt it is 01.
    Both years are split into a century (one token with its leading space) and a half of two digits; halves that
    are not one token after the century are left out.

    Roles: noun, XX (the century), YY, end (the century again).
    """

    metric: ClassVar[str] = "probability_difference"

    @property
    def templates(self) -> Sequence[str]:
        return (
            "The {noun} lasted from the year {century:XX}{half:YY} to the year {century:end}{half:answer}",
            "The {noun} lasted from {century:XX}{half:YY} to {century:end}{half:answer}",
            "The {noun} began in {century:XX}{half:YY} and ended in {century:end}{half:answer}",
        )

    @property
    def pools(self) -> Mapping[str, Sequence[str]]:
        return {"noun": (*bare(EVENTS), *MORE), "century": bare(CENTURIES), "half": YEAR_HALVES}

    def draws(self, carried: Carried) -> Draw:
        noun = carried.words["noun"][0]
        halves = {
            century: carried.after("YY", {"noun": noun, "XX": century}) for century in carried.words["century"]
        }
        halves = {century: found for century, found in halves.items() if EARLY in found and len(found) >= MOST}
        if not halves:
            raise NotCarried(f"no century is followed by {MOST} of the 100 halves 00 to 99 as one token each")

        def draw(rng: random.Random) -> Pair:
            century = rng.choice(list(halves))
            choices = halves[century]
            half = rng.choice([half for half in choices[1:-1] if half > EARLY])
            clean = carried.fill(rng, {"XX": century, "YY": half, "end": century})
            later = [other for other in choices if other > half]
            return Pair(clean, {"YY": EARLY}, later, [other for other in choices if other <= half])

        return draw
