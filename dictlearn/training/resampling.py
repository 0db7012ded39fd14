"""Dead latents start again as directions that are badly reconstructed (Bricken et al. 2023, "Towards
Monosemanticity").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.checks import check_count, check_positive
from dictlearn.data import Batch
from dictlearn.dictionaries import Dictionary
from dictlearn.training.learner import Learner
from dictlearn.training.optimizers import RunOptimizer
from dictlearn.types import Step

UNTIL = 0.75  # of the run: later ones would not be trained to the end


class Resample:
    """An entry of the objective that is no loss: every `every_n_tokens`, dead latents get new weights.

    Of the batch at hand, tokens are drawn without replacement, with probabilities in proportion to the square of
    their reconstruction loss. A latent takes the direction of its token's residual as decoder row, as long as the
    mean of the living ones (1 where the decoder is unit), and as encoder row the same direction, in a transcoder
    that of the read about the batch's mean, `encoder_scale` times as long as the mean of the living ones. With its
    bias it sees the read about that mean; the paper, whose encoder subtracts b_dec, has 0 there. What the optimizer
    remembers of these rows is forgotten. Draws are those of the seed and the step alone.

    Args:
        every_n_tokens: activations from one time to the next, rounded up to a window of the statistics; None: the
            times are spread over the first half of the run.
        n_times: at most; and none in the last quarter of the run.
        encoder_scale: 0.2 in the paper, so that new latents start quietly.
    """

    def __init__(self, every_n_tokens: int | None = None, n_times: int = 4, encoder_scale: float = 0.2) -> None:
        check_count("objective.resample.every_n_tokens", every_n_tokens, or_null=True)
        check_count("objective.resample.n_times", n_times)
        check_positive("objective.resample.encoder_scale", encoder_scale)
        self.every_n_tokens, self.n_times, self.encoder_scale = every_n_tokens, n_times, encoder_scale

    def __call__(self, step: Step) -> None:
        """No loss."""

    def is_due(self, before: int, now: int, total: int) -> bool:
        """Whether at `now` of `total` tokens, the window before having ended at `before`."""
        every = max(self.every_n_tokens or total // (2 * self.n_times), now - before)
        time = now // every
        return before // every < time <= self.n_times and now <= UNTIL * total

    def problem(self, n_tokens: int) -> str | None:
        """What is wrong with these settings in a run of `n_tokens`, one sentence."""
        if self.every_n_tokens is None or self.every_n_tokens <= UNTIL * n_tokens:
            return None
        return (
            f"objective.resample.every_n_tokens must be at most 3/4 of n_tokens = {n_tokens}, after which "
            f"nothing is resampled, got {self.every_n_tokens}"
        )


@torch.no_grad()
def resample_(learner: Learner, batch: Batch, optimizer: RunOptimizer, scale: float, seed: int) -> None:
    """Give dead latents of `learner` new weights, as `Resample` says; at most as many as there are tokens."""
    dictionary, dead = learner.dictionary, learner.statistics.dead
    if dead is None:
        return
    reconstructed = _reconstruct(learner, batch)
    latents = dead[: len(reconstructed.loss)]
    tokens = draw(reconstructed.loss.square(), len(latents), torch.Generator().manual_seed(seed))
    mean = reconstructed.reads.mean(0)
    residual = reconstructed.residual[tokens]
    reads = residual if dictionary.is_autoencoder else reconstructed.reads[tokens] - mean
    living = (~learner.statistics.is_dead).nonzero().squeeze(-1)
    _set_encoder_(dictionary, latents, living, reads, mean, scale)
    _set_decoder_(dictionary, latents, living, residual)
    for name, value in dictionary.fresh.items():
        rows = dictionary.get_parameter(name).movedim(dictionary.latent_axis[name], 0)
        rows[latents] = dictionary.get_parameter(value)[latents] if isinstance(value, str) else value
    for name, axis, places in dictionary.parts_of(latents):
        optimizer.restart_rows_(dictionary.get_parameter(name), axis, places)
    for parameter, places in dictionary.sparsifier.restart_(latents):
        optimizer.restart_rows_(parameter, 0, places)
    learner.statistics.revive_(latents)


def draw(weights: Float[Tensor, " n"], n_drawn: int, generator: torch.Generator) -> Int[Tensor, " n_drawn"]:
    """Places, drawn one by one without replacement, each time in proportion to the weights that are left."""
    waits = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator)
    return (waits.to(weights.device) / weights.double()).topk(n_drawn, largest=False).indices


class _Reconstructed(NamedTuple):
    """Of every token of a batch, in normalised units: what is read, target - recon, and the reconstruction loss."""

    reads: Float[Tensor, "batch reads"]
    residual: Float[Tensor, "batch writes"]
    loss: Float[Tensor, " batch"]


def _reconstruct(learner: Learner, batch: Batch) -> _Reconstructed:
    dictionary = learner.dictionary
    x, target = dictionary.select_reads(batch.acts), dictionary.select_writes(batch.acts)
    size = min(learner.micro_batch_size or len(x), len(x))
    parts = []
    with _unmoved(dictionary):
        for chunk in zip(x.split(size), target.split(size), strict=True):
            step = dictionary.step(*chunk, learner.variance)
            residual = step.target - step.recon
            loss = (step.per_site(residual.square()).sum(-1) / step.variance).mean(-1)
            parts.append((step.x, residual, loss))
    return _Reconstructed(*(torch.cat(values) for values in zip(*parts, strict=True)))


@contextmanager
def _unmoved(dictionary: Dictionary) -> Iterator[None]:
    """What a sparsifier follows in training, such as BatchTopK its threshold, does not see the steps inside."""
    before = [(buffer, buffer.clone()) for buffer in dictionary.sparsifier.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def _set_encoder_(
    dictionary: Dictionary,
    latents: Int[Tensor, " n"],
    living: Int[Tensor, " n_living"],
    reads: Float[Tensor, "n reads"],
    mean: Float[Tensor, " reads"],
    scale: float,
) -> None:
    n_codes = len(dictionary.reads) if dictionary.layered else 1
    code = latents // (dictionary.n_latents // n_codes)  # which of the read sites a latent sees
    nth = torch.arange(len(latents), device=latents.device)
    own, own_mean = (t.expand(len(latents), -1).unflatten(-1, (n_codes, -1))[nth, code] for t in (reads, mean))
    axis = dictionary.latent_axis["W_enc"]
    by_latent = dictionary.W_enc.movedim(axis, 0)  # [n_latents, *reads]
    rows = scale * _mean_norm(by_latent, living) * F.normalize(own, dim=-1)
    by_latent[latents] = rows.view(-1, *by_latent.shape[1:])
    dictionary.b_enc[latents] = -(rows * own_mean).sum(-1)


def _set_decoder_(
    dictionary: Dictionary,
    latents: Int[Tensor, " n"],
    living: Int[Tensor, " n_living"],
    residual: Float[Tensor, "n writes"],
) -> None:
    first = 0
    for rows in dictionary.decoders:  # of successive latents, for the last of the write sites
        here, alive = (t[(t >= first) & (t < first + len(rows))] - first for t in (latents, living))
        own = residual[(latents >= first) & (latents < first + len(rows))][:, -rows[0].numel() :]
        rows[here] = (_mean_norm(rows, alive) * F.normalize(own, dim=-1)).view(-1, *rows.shape[1:])
        first += len(rows)


def _mean_norm(rows: Float[Tensor, "n_latents *width"], living: Int[Tensor, " n_living"]) -> float | Tensor:
    """Of the living ones; 1 where there are none."""
    return rows.flatten(1).norm(dim=-1)[living].mean() if len(living) else 1.0
