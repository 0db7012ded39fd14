"""What a loss term is to the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

from transformers import PreTrainedModel

from dictlearn.dictionaries import Dictionary
from dictlearn.types import DictlearnError, Scalar, Site, Step


@runtime_checkable
class LossTerm(Protocol):
    """A shared loss term: its coefficient included; None when it does not apply to this step.

    It is a mean over the tokens of the step, without other denominators of the batch, so that chunks of a batch
    add up. A term with a method `revives` gets, where that is true of the dictionary, `step.dead_rows` to learn
    through, and in a chunk `step.residual_variance`. One with a true attribute `needs_lm` is an `LMTerm`. An
    attribute `recon_coefficient` multiplies the loss that the dictionary calls recon. One with a method `check`
    gets the dictionary before training, perhaps on the meta device, and raises DictlearnError where it cannot work
    with it.
    """

    def __call__(self, step: Step) -> Scalar | None: ...


class LMTerm(LossTerm, Protocol):
    """A term that looks at what the LM does with the reconstruction: it gets `step.clean`, of whole batches.

    The activations at its sites, as far as they depend on what the dictionary writes, are in `step.clean.acts`.
    """

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """What it may look at; `model` may be on the meta device. Raises DictlearnError for an unknown name."""
        ...

    def bind(self, writes: Sequence[Site], later: Mapping[Site, float]) -> None:
        """Called before training: the dictionary's write sites, and those of `sites` that depend on them, each with
        the variance of its raw activations. Raises DictlearnError where it cannot work with these.
        """
        ...


def revive_dead(terms: Mapping[str, LossTerm], dictionary: Dictionary) -> bool:
    """Whether a term revives dead latents of the dictionary."""
    return any(revives(dictionary) for term in terms.values() if (revives := getattr(term, "revives", None)))


def check_terms(terms: Mapping[str, LossTerm], dictionary: Dictionary) -> None:
    """Raise DictlearnError where a term cannot work with a dictionary."""
    for term in terms.values():
        if (check := getattr(term, "check", None)) is not None:
            check(dictionary)


def check_chunks(name: str, dictionary: Dictionary, micro_batch_size: int | None) -> None:
    """Raise DictlearnError where a batch cannot be cut into chunks because its tokens depend on each other."""
    if micro_batch_size is not None and not dictionary.per_token:
        raise DictlearnError(
            f"micro_batch_size={micro_batch_size} needs a sparsifier that looks at one token at a time; "
            f"{dictionary.sparsifier.kind}, as {name} has it, looks at the whole batch: use null."
        )


def lm_terms(terms: Mapping[str, LossTerm]) -> dict[str, LMTerm]:
    """The terms that look at the LM."""
    return {name: cast(LMTerm, term) for name, term in terms.items() if getattr(term, "needs_lm", False)}


def micro_batch_problem(terms: Mapping[str, LossTerm], micro_batch_size: int | None) -> str | None:
    """What is wrong with chunks of a batch under these terms, one sentence."""
    if micro_batch_size is None or not (found := lm_terms(terms)):
        return None
    return (
        f"micro_batch_size={micro_batch_size} cuts rows of text apart, which objective.{', '.join(found)} needs "
        "whole: use null, and a smaller batch_size where memory is short"
    )
