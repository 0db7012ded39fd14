"""One dictionary in training: its loss, its statistics, its gradient rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.config import NORMALISE
from dictlearn.data import Batch, SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.training.statistics import TrainingStatistics
from dictlearn.types import DictlearnError, Scalar, Step


@runtime_checkable
class LossTerm(Protocol):
    """A shared loss term: its coefficient included; None when it does not apply to this step."""

    def __call__(self, step: Step) -> Scalar | None: ...


class Learner(nn.Module):
    """A dictionary with its objective.

    The objective is the dictionary's own losses, the sparsifier's penalty and the terms of the run's objective.
    `variance` [n_writes] is that of the normalised targets, estimated once before the run.
    """

    variance: Tensor

    def __init__(
        self,
        name: str,
        dictionary: Dictionary,
        terms: Mapping[str, LossTerm],
        variance: Float[Tensor, " n_writes"],
        dead_after_tokens: int,
        clip_norm: float | None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dictionary = dictionary
        self.terms = dict(terms)
        self.clip_norm = clip_norm
        self.register_buffer("variance", variance)
        width = dictionary.flat_W_dec.shape[-1]
        self.statistics = TrainingStatistics(dictionary.n_latents, width, dead_after_tokens)

    def loss(self, batch: Batch) -> Scalar:
        """The total loss on one batch; counts it in the statistics."""
        dictionary = self.dictionary
        x, target = dictionary.select_reads(batch.acts), dictionary.select_writes(batch.acts)
        step = dictionary.step(x, target, self.variance, self.statistics.dead)
        parts = list(dictionary.losses(step).values())
        parts += [dictionary.sparsifier.penalty(step), *(term(step) for term in self.terms.values())]
        loss = torch.stack([part for part in parts if part is not None]).sum()
        self.statistics.update(step, loss.detach())
        return loss

    def clip_gradients_(self) -> None:
        """Project the decoder gradient where the decoder is constrained, then clip this dictionary's norm."""
        self.dictionary.project_gradient_()
        if self.clip_norm is None:
            return
        parameters = list(self.dictionary.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.is_cuda or norm > self.clip_norm:  # a look at it waits for a GPU
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)


def prepare(
    dictionary: Dictionary,
    statistics: Mapping[str, SiteStatistics],
    normalise: str,
    generator: torch.Generator,
    start: Dictionary | None = None,
) -> Float[Tensor, " n_writes"]:
    """Set the scales and the weights of `dictionary`; returns the variance of the normalised targets, per site.

    `normalise`: "mean_norm" scales every site to a mean norm of the root of its width; "none" and "layer_norm"
    leave the scales at 1, and biases and variance are those of the raw or the layer-normed activations.
    The weights are those of `start` in these scales, or random without it.
    Raises DictlearnError where `normalise` contradicts the dictionary's `input_norm`, or `start` does not fit,
    and for activations that do not vary.
    """
    if normalise not in NORMALISE:
        raise DictlearnError(f"normalise must be one of {', '.join(NORMALISE)}, got {normalise!r}.")
    layer_norm = dictionary.input_norm == "layer_norm"
    if layer_norm != (normalise == "layer_norm"):
        raise DictlearnError(
            f"normalise=layer_norm and input_norm=layer_norm go together, got normalise={normalise} and a "
            f"dictionary with input_norm={dictionary.input_norm}."
        )
    reads, writes = [statistics[s] for s in dictionary.reads], [statistics[s] for s in dictionary.writes]
    _check_that_they_vary({site: statistics[site] for site in (*dictionary.reads, *dictionary.writes)})
    if normalise == "mean_norm":
        dictionary.read_scale.copy_(torch.tensor([dictionary.d_in**0.5 / s.mean_norm for s in reads]))
        dictionary.write_scale.copy_(torch.tensor([dictionary.d_out**0.5 / s.mean_norm for s in writes]))
    if start is not None:
        dictionary.start_from_(start)
    else:
        means = [[s.layer_norm_mean if layer_norm else s.mean for s in sites] for sites in (reads, writes)]
        dictionary.initialise_(generator, *(torch.stack(per_site).float() for per_site in means))
    variances = [s.layer_norm_variance if layer_norm else s.variance for s in writes]
    return (torch.tensor(variances) * dictionary.write_scale.square()).float()


def _check_that_they_vary(statistics: Mapping[str, SiteStatistics]) -> None:
    constant = [site for site, s in statistics.items() if not s.variance > 1e-12 * s.mean_norm**2]  # rounding
    if constant:
        raise DictlearnError(
            f"The activations at {', '.join(constant)} are the same at every token of the statistics prefix: there "
            "is nothing to learn."
        )
