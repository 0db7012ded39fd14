"""What the text demands of a model, one task per kind of circuit, as prompts cut from fresh documents.

A prompt is the document up to a token that the grammar forces (so the right answer is top-1 over the whole
vocabulary), with two exceptions:
- agreement: the verb agrees with its subject across a noun of the other number; right when the verb form
  that was written is more likely than its counterpart of the other number ("is" and "are").
- greater_than: the half of a year later than one in the prompt; scored by the probability of later halves
  minus that of the others.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

from dictlearn.embedded.lexicon import YEAR_HALVES
from dictlearn.embedded.text import write

TASKS = ("ioi", "agreement", "pronoun", "successor", "docstring", "induction", "closing", "greater_than")
COMPARED = ("agreement",)  # tasks in which the right token is compared with the wrong one only


class Prompt(NamedTuple):
    """`answers` are the right next tokens (one, but for greater_than), `wrong` their counterparts."""

    task: str
    tokens: tuple[str, ...]
    answers: tuple[str, ...]
    wrong: tuple[str, ...]  # empty where nothing in particular is confused with the answer

    @property
    def text(self) -> str:
        return "".join(self.tokens)


def all_prompts(seed: int) -> Iterator[Prompt]:
    """Every prompt of every task in the documents of stream `seed`, in order, without end."""
    for index in count():
        w = write(seed, index)
        for task, at, wrong in w.marks:
            answers = (w.tokens[at],)
            if task == "greater_than":
                answers = tuple(half for half in YEAR_HALVES if half not in wrong)
            yield Prompt(task, tuple(w.tokens[:at]), answers, wrong)


def prompts(task: str, n: int, seed: int) -> list[Prompt]:
    """The first `n` prompts of `task` in the stream `seed` (the LM is trained on seed 0)."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, but must be one of {', '.join(TASKS)}")
    return list(islice((prompt for prompt in all_prompts(seed) if prompt.task == task), n))


def prompts_of_all(n: int, seed: int) -> dict[str, list[Prompt]]:
    """`prompts(task, n, seed)` for every task, in one pass over the documents."""
    found: dict[str, list[Prompt]] = {task: [] for task in TASKS}
    for prompt in all_prompts(seed):
        if len(found[prompt.task]) < n:
            found[prompt.task].append(prompt)
        elif min(map(len, found.values())) == n:
            break
    return found
