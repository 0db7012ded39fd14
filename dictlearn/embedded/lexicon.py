"""The words of the embedded text: plain tables, no logic beyond inflection.

Every noun takes a plain -s, every verb a plain -s and -ed, so that one stem gives all forms. Tokens carry
their leading space (" boat"), as GPT-2's do. The word lists of the topics are disjoint: one topical word
tells the topic of its document.
"""

import math
from bisect import bisect
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import NamedTuple

FEMALE_NAMES = (
    " Mary Anna Emma Alice Sarah Laura Julia Clara Helen Grace Ruth Nina Lucy Rose Eva Sophie Martha Jane"
    " Diana Irene Olga Paula Vera Carol Kate Linda Molly Nora Susan Wendy"
)
MALE_NAMES = (
    " John Paul Peter James David Mark Thomas Henry Frank George Simon Adam Oscar Robert Martin Daniel Tom"
    " Victor Walter Edward Hugo Ivan Jacob Kevin Leo Max Nick Oliver Philip Ralph"
)


class Table[T](NamedTuple):
    """A finite distribution: `cumulative[i]` = P(one of items 0..i), `log_probs[i]` = ln P(items[i])."""

    items: tuple[T, ...]
    cumulative: tuple[float, ...]
    log_probs: tuple[float, ...]

    def draw(self, uniform: float) -> tuple[T, float]:
        """The item at quantile `uniform` in [0, 1), with its natural-log probability."""
        index = bisect(self.cumulative, uniform, 0, len(self.items) - 1)
        return self.items[index], self.log_probs[index]
