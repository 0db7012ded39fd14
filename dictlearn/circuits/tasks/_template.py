"""A template of prompts on a tokenizer: which words fill its slots, as one token each, and where they stand.

"When {name:IO} and {name:S1} went to the {place}, ..." has slots of a pool of words (name, place), each with a
role, which is the name of the pool where none is given. The blank before a slot belongs to its word. A template
ends with the slot `answer`, and the text before it is the prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dictlearn.types import DictlearnError

SLOT = re.compile(r"( ?)\{(\w+)(?::(\w+))?\}")
ANSWER = "answer"

Values = Mapping[str, str]  # the words of a prompt, by role


class NotCarried(DictlearnError):
    """The tokenizer does not write a template as its task needs it."""


class Slot(NamedTuple):
    """`before` is the fixed text since the slot before, `blank` the space that the word begins with, or nothing."""

    before: str
    blank: str
    pool: str
    role: str


def slots_of(template: str) -> list[Slot]:
    found, at = [], 0
    for match in SLOT.finditer(template):
        blank, pool, role = match.groups()
        found.append(Slot(template[at : match.start()], blank, pool, role or pool))
        at = match.end()
    return found


class Carried:
    """A template with the words that a tokenizer carries: one token each, and no other token changes by them.

    Attributes:
        words: by pool, those carried at every slot of the pool, in the order of the pool.
        positions: token positions in the prompt, by role; without a beginning-of-sequence token.

    Raises NotCarried where a fixed word is unknown, and where a slot is left without words.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, pools: Mapping[str, Sequence[str]]
    ) -> None:
        self.tokenizer, self.pools = tokenizer, pools
        self.slots = slots_of(template)
        self._special = set(tokenizer.all_special_ids)  # the unknown token among them
        self._fixed: list[list[int]] = []  # tokens between the slots
        self._ids: dict[tuple[str, str], dict[str, int]] = {}  # of words, by pool and blank
        stems = [""]
        for slot in self.slots:
            stems = self._place(slot, stems if slot.before + slot.blank == "" else stems[:1])
        self.words = {
            pool: [w for w in words if all(w in ids for (name, _), ids in self._ids.items() if name == pool)]
            for pool, words in pools.items()
        }
        self.positions: dict[str, int] = {}
        end = 0
        for slot, fixed in zip(self.slots, self._fixed, strict=True):
            self.positions[slot.role] = end + len(fixed)
            end += len(fixed) + 1

    def _place(self, slot: Slot, stems: list[str]) -> list[str]:
        """Find the tokens of one slot after the texts `stems`; returns the texts that the next slot may follow.

        What follows a blank does not depend on the words before it, so one text is enough there, and what fits the
        first slot of a pool fits the others; `check` sees to it that this is true. A slot glued to the one before
        (the halves of a year) is tried after all of that one's words.
        """
        starts, heads = self.encode(stems), [stem + slot.before for stem in stems]
        begun = self.encode(heads)
        fixed = begun[0][len(starts[0]) :]
        if begun[0][: len(starts[0])] != starts[0] or self._special & set(fixed):
            raise NotCarried(
                f"{slot.before!r} has unknown words, or is no token of its own: {self._tokens(begun[0])}"
            )
        self._fixed.append(fixed)
        key = (slot.pool, slot.blank)
        if key not in self._ids:
            self._ids[key] = self._fitting(slot, heads, begun)
        return [heads[0] + slot.blank + word for word in self._ids[key]]

    def _fitting(self, slot: Slot, heads: list[str], begun: list[list[int]]) -> dict[str, int]:
        """The words of a slot that are one more token after one of the texts `heads`, whose tokens are `begun`."""
        words = self.pools[slot.pool]
        fits: dict[str, int] = {}
        for head, tokens in zip(heads, begun, strict=True):
            for word, found in zip(words, self.encode([head + slot.blank + w for w in words]), strict=True):
                if found[:-1] == tokens and found[-1] not in self._special:
                    fits[word] = found[-1]
        if not fits:
            text = heads[0] + slot.blank + words[0]
            tokens = self._tokens(self.encode([text])[0][-8:])
            raise NotCarried(
                f"none of {len(words)} words of {slot.pool!r} is one token: {text!r} ends with {tokens}"
            )
        return fits

    def _tokens(self, ids: list[int]) -> str:
        return " ".join(map(repr, self.tokenizer.convert_ids_to_tokens(ids)))

    def need(self, pool: str, n: int) -> list[str]:
        """The carried words of a pool. Raises NotCarried when they are fewer than `n`."""
        found = self.words[pool]
        if len(found) < n:
            of = f"{len(found)} of {len(self.pools[pool])}"
            raise NotCarried(f"{n} words of {pool!r} must be one token each, but {of} are: {', '.join(found)}")
        return found

    def after(self, role: str, words: Values) -> list[str]:
        """Those words of a slot which are one token after the prompt up to it, filled with `words`."""
        slot = next(slot for slot in self.slots if slot.role == role)
        head = self.text(words, role)
        start, pool, ids = self.encode([head])[0], self.words[slot.pool], self._ids_of(slot)
        found = self.encode([head + slot.blank + word for word in pool])
        return [word for word, tokens in zip(pool, found, strict=True) if tokens == [*start, ids[word]]]

    def fill(self, rng: random.Random, values: Values) -> dict[str, str]:
        """`values` and random words for all roles that are left."""
        rest = {s.role: rng.choice(self.words[s.pool]) for s in self.slots[:-1] if s.role not in values}
        return {**values, **rest}

    def text(self, values: Values, until: str = ANSWER) -> str:
        """The prompt, or as much of it as comes before the word of role `until`."""
        parts: list[str] = []
        for slot in self.slots:
            parts.append(slot.before)
            if slot.role == until:
                break
            parts.append(slot.blank + values[slot.role])
        return "".join(parts)

    def answer_ids(self, words: Sequence[str]) -> list[int]:
        ids = self._ids_of(self.slots[-1])
        return [ids[word] for word in words]

    def prompt_ids(self, values: Values) -> list[int]:
        """The tokens of the prompt, put together from those of its parts."""
        found: list[int] = []
        for slot, fixed in zip(self.slots[:-1], self._fixed, strict=False):
            found += [*fixed, self._ids_of(slot)[values[slot.role]]]
        return found + self._fixed[-1]

    def _ids_of(self, slot: Slot) -> dict[str, int]:
        return self._ids[slot.pool, slot.blank]

    def check(self, prompts: Sequence[Values], nexts: Sequence[Sequence[str]]) -> None:
        """Raise NotCarried unless every prompt, alone and with each of its next words, is split into its parts."""
        blank = self.slots[-1].blank
        expected: dict[str, list[int]] = {}
        for values, words in zip(prompts, nexts, strict=True):
            text, ids = self.text(values), self.prompt_ids(values)
            expected[text] = ids
            for word, id_ in zip(words, self.answer_ids(words), strict=True):
                expected[text + blank + word] = [*ids, id_]
        for (text, ids), found in zip(expected.items(), self.encode(list(expected)), strict=True):
            if ids != found:
                tokens = self._tokens(found)
                raise NotCarried(f"The tokenizer splits {text!r} in another way than its parts: {tokens}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]  # pyright: ignore[reportReturnType]
