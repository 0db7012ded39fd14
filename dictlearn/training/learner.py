"""One dictionary in training: its loss, its statistics, its gradient rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.data import Batch, SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.training.statistics import TrainingStatistics
from dictlearn.types import Scalar, Step


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
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.dictionary.parameters(), self.clip_norm)


def prepare(
    dictionary: Dictionary, statistics: Mapping[str, SiteStatistics], normalise: bool, generator: torch.Generator
) -> Float[Tensor, " n_writes"]:
    """Set the scales (mean norm to the root of the width) and the initial weights; the normalised variance."""
    reads, writes = [statistics[s] for s in dictionary.reads], [statistics[s] for s in dictionary.writes]
    if normalise:
        dictionary.read_scale.copy_(torch.tensor([dictionary.d_in**0.5 / s.mean_norm for s in reads]))
        dictionary.write_scale.copy_(torch.tensor([dictionary.d_out**0.5 / s.mean_norm for s in writes]))
    means = [torch.stack([s.mean for s in sites]).float() for sites in (reads, writes)]
    dictionary.initialise_(generator, *means)
    variance = torch.tensor([s.variance for s in writes]) * dictionary.write_scale.square()
    return variance.float()
