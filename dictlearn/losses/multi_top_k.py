"""Multi-TopK: the reconstruction from more latents than k shall be good too (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dictlearn.checks import check_count, check_number
from dictlearn.losses.recon import recon_loss
from dictlearn.types import DictlearnError, Scalar, Step

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary
    from dictlearn.dictionaries.cross_layer import CrossLayer
    from dictlearn.dictionaries.linear import Linear


class MultiTopK:
    """`coefficient` times the FVU of the reconstruction from the `factor` * k largest pre-activations of a token.

    Trained at one k alone, a dictionary is bad at larger ones; with this term it is good up to `factor` * k, at a
    little loss at k. While k is annealed, the term has the k of the end.

    Cost: a second encoder product and selection, and decode and weight gradients of `factor` * k latents. With it a
    step on a CPU takes 2.3 times as long at 768 x 12,288 and k = 32, 2.9 times at 128 x 1,024 and k = 16.

    Raises DictlearnError for values that are no weight and no count.
    """

    def __init__(self, coefficient: float = 1 / 8, factor: int = 4) -> None:
        check_number("multi_top_k.coefficient", coefficient)
        check_count("multi_top_k.factor", factor, least=2)
        self.coefficient, self.factor = coefficient, factor

    def check(self, dictionary: Dictionary) -> None:
        """Raise DictlearnError where the term cannot work with a dictionary."""
        sparsifier = dictionary.sparsifier
        n_latents = dictionary.n_latents // (len(dictionary.reads) if dictionary.layered else 1)  # of one selection
        if not (dictionary.linear_encoder or dictionary.layered):
            raise DictlearnError(
                f"objective.multi_top_k needs one linear encoder, which {type(dictionary).__name__} does not have."
            )
        if (wider := sparsifier.widened(self.factor)) is None:
            raise DictlearnError(
                "objective.multi_top_k needs a sparsifier with as many latents for every token, top_k or "
                f"abs_top_k, got {type(sparsifier).__name__}."
            )
        if (k := wider.config()["k"]) > n_latents:
            raise DictlearnError(
                f"objective.multi_top_k.factor x sparsifier.k must be at most n_latents = {n_latents}, got {k}."
            )

    def __call__(self, step: Step) -> Scalar:
        dictionary = cast("Linear | CrossLayer", step.dictionary)
        wider = dictionary.sparsifier.widened(self.factor)
        assert wider is not None
        return self.coefficient * recon_loss(step, step.target - dictionary.recon_with(wider, step.x))
