"""One dictionary in training: its loss, its statistics, its gradient rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dictlearn.choices import NORMALISE
from dictlearn.data import Batch, SiteStatistics
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import CleanRun
from dictlearn.training.first_scale import first_scale
from dictlearn.training.gradients import with_gradients
from dictlearn.training.statistics import TrainingStatistics
from dictlearn.training.subspace import Size, Subspace, subspaces
from dictlearn.training.terms import LossTerm, check_chunks, check_terms, micro_batch_problem, revive_dead
from dictlearn.types import DictlearnError, Scalar, Step


class Learner(nn.Module):
    """A dictionary with its objective.

    The objective is the dictionary's own losses, the sparsifier's penalty and the terms of the run's objective.
    `variance` [n_writes] is that of the normalised targets, estimated once before the run. `micro_batch_size` is
    the largest number of activations whose pre-activations are in memory at once; None: the whole batch.
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
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.dictionary = dictionary
        self.terms = dict(terms)
        self.revives_dead = revive_dead(self.terms, dictionary)
        self.recon_coefficient = math.prod(getattr(t, "recon_coefficient", 1.0) for t in self.terms.values())
        self.clip_norm = clip_norm
        check_terms(terms, dictionary)
        if problem := micro_batch_problem(terms, micro_batch_size):
            raise DictlearnError(f"{problem}.")
        check_chunks(name, dictionary, micro_batch_size)
        self.micro_batch_size = micro_batch_size
        self.register_buffer("variance", variance)
        width = dictionary.b_dec.numel()
        self.statistics = TrainingStatistics(dictionary.n_latents, width, dead_after_tokens)

    def at(self, step: int, n_steps: int) -> None:
        """Called before the training step `step`, from 0, of `n_steps`: schedules move."""
        self.dictionary.at(step, n_steps)

    def loss(self, batch: Batch, clean: CleanRun | None = None) -> Scalar:
        """The total loss on one batch; counts it in the statistics. `clean`: the LM on the rows it is from.

        A batch of more than `micro_batch_size` activations goes through in chunks. Each chunk's gradients are taken
        at once, in proportion to its size, so that its graph is gone before the next one begins; all terms are
        means over tokens, so loss and gradients are those of the whole batch up to rounding. While latents are
        dead, a term that revives them costs a further pass without gradients, for the whole batch's residual.
        """
        dictionary, dead = self.dictionary, self.statistics.dead
        x, target = dictionary.select_reads(batch.acts), dictionary.select_writes(batch.acts)
        revived = dead if self.revives_dead else None
        size = min(self.micro_batch_size or len(x), len(x))
        if size == len(x) and revived is None:
            loss = self._total(replace(dictionary.step(x, target, self.variance, dead), clean=clean))
        else:
            parameters = [p for p in dictionary.parameters() if p.requires_grad]
            chunks = list(zip(x.split(size), target.split(size), strict=True))
            loss = with_gradients(parameters, lambda: self._accumulate(parameters, chunks, revived, clean))
        self.statistics.end_step(loss.detach(), len(x))
        return loss

    def _total(self, step: Step) -> Scalar:
        """The loss on a step or a chunk of one, which is counted."""
        dictionary = self.dictionary
        own = dictionary.losses(step).items()
        parts = [loss * self.recon_coefficient if name == "recon" else loss for name, loss in own]
        parts += [dictionary.penalty(step), *(term(step) for term in self.terms.values())]
        self.statistics.count(step)
        return torch.stack([part for part in parts if part is not None]).sum()

    def _accumulate(
        self,
        parameters: list[nn.Parameter],
        chunks: Sequence[tuple[Tensor, Tensor]],
        revived: Int[Tensor, " n_dead"] | None,
        clean: CleanRun | None,
    ) -> Scalar:
        """The loss on all chunks; adds its gradients to `.grad` of the parameters.

        Dead latents that a term revives have their own copies of their weights in it: a second gradient of whole
        weights would cost as much as all the rest of that term.
        """
        dictionary = self.dictionary
        n_tokens = sum(len(x) for x, _ in chunks)
        rows = residual_variance = None
        if revived is not None:
            found = dictionary.latent_rows(revived)
            rows = {name: row.detach().requires_grad_() for name, row in found.items()}
            residual_variance = self._residual_variance(chunks) if len(chunks) > 1 else None
        leaves = [*parameters, *(rows or {}).values()]
        whole = clean if len(chunks) == 1 else None

        def chunk_loss(x: Tensor, target: Tensor) -> Scalar:
            step = dictionary.step(x, target, self.variance, self.statistics.dead)
            step = replace(step, dead_rows=rows, residual_variance=residual_variance, clean=whole)
            loss = self._total(step) * (len(x) / n_tokens)
            with torch.autocast(x.device.type, enabled=False):
                loss.backward(inputs=leaves)
            return loss.detach()

        total = torch.stack([chunk_loss(*chunk) for chunk in chunks]).sum()
        if rows is not None and revived is not None:
            dictionary.add_row_gradients_(revived, rows)
        return total

    @torch.no_grad()
    def _residual_variance(self, chunks: Sequence[tuple[Tensor, Tensor]]) -> Scalar:
        """The mean over all tokens of ||r - mean r||^2, r = target - recon: that within chunks and that between."""
        n_tokens = sum(len(x) for x, _ in chunks)
        shares = [len(x) / n_tokens for x, _ in chunks]
        means, within = [], []
        for x, target in chunks:
            residual = self._residual(x, target)
            means.append(residual.mean(0))
            within.append((residual - means[-1]).square().sum(-1).mean())
        torch.clear_autocast_cache()  # torch 2.9 would use weights cast without a gradient in the passes with one
        mean = sum(share * m for share, m in zip(shares, means, strict=True))
        between = [(m - mean).square().sum() for m in means]
        return torch.stack([s * (w + b) for s, w, b in zip(shares, within, between, strict=True)]).sum()

    def _residual(self, x: Tensor, target: Tensor) -> Float[Tensor, "chunk writes"]:
        step = self.dictionary.step(x, target, self.variance)
        return step.target - step.recon

    def clip_gradients_(self) -> None:
        """Project the decoder gradient where the decoder is constrained, then clip this dictionary's norm."""
        square = self.dictionary.project_gradient_()
        if self.clip_norm is None:
            return
        parameters = list(self.dictionary.parameters())
        known = set() if square is None else {id(rows) for rows in self.dictionary.decoders}
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None and id(p) not in known])
        if square is not None:
            norm = torch.hypot(norm, square.sqrt())
        if norm.is_cuda or norm > self.clip_norm:  # a look at it waits for a GPU
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)


@torch.no_grad()
def prepare(
    dictionary: Dictionary,
    statistics: Mapping[str, SiteStatistics],
    normalise: str,
    generator: torch.Generator,
    start: Dictionary | None = None,
    subspace_sizes: Mapping[str, Size] = MappingProxyType({}),
) -> Float[Tensor, " n_writes"]:
    """Set the scales and the weights of `dictionary`; returns the variance of the normalised targets, per site.

    `normalise`: "mean_norm" scales every site to a mean norm of the root of its width; "none" and "layer_norm"
    leave the scales at 1, and biases and variance are those of the raw or the layer-normed activations.
    The weights are those of `start` in these scales, or random without it: at the read sites in `subspace_sizes`,
    with directions in the subspace of that size. An autoencoder's latents start at the size of `first_scale`.
    Raises DictlearnError where `normalise` contradicts the dictionary's `input_norm`, or `start` does not fit,
    and for activations that do not vary.
    """
    if normalise not in NORMALISE:
        raise DictlearnError(f"normalise must be one of {', '.join(NORMALISE)}, got {normalise!r}.")
    layer_norm = dictionary.input_norm == "layer_norm"
    if dictionary.input_norm != ("layer_norm" if normalise == "layer_norm" else "none"):
        raise DictlearnError(
            f"normalise=layer_norm and input_norm=layer_norm go together, got normalise={normalise} and a "
            f"dictionary with input_norm={dictionary.input_norm}."
        )
    reads, writes = [statistics[s] for s in dictionary.reads], [statistics[s] for s in dictionary.writes]
    _check_that_they_vary({site: statistics[site] for site in (*dictionary.reads, *dictionary.writes)})
    if normalise == "mean_norm":
        dictionary.read_scale.copy_(torch.tensor([dictionary.d_in**0.5 / s.mean_norm for s in reads]))
        dictionary.write_scale.copy_(torch.tensor([dictionary.d_out**0.5 / s.mean_norm for s in writes]))
    spreads = [s.layer_norm_variance if layer_norm else s.variance for s in reads]
    found = {} if start is not None else subspaces(subspace_sizes, statistics, layer_norm)
    units = _units(dictionary, spreads, found)
    dictionary.set_unit_(units)
    if start is not None:
        dictionary.start_from_(start)
        dictionary.set_unit_(units * _encoder_norms(dictionary))
        dictionary.start_from_(start)  # again: a new unit sets what the sparsifier learns
    else:
        means = [[s.layer_norm_mean if layer_norm else s.mean for s in sites] for sites in (reads, writes)]
        read_means, write_means = (torch.stack(per_site).float() for per_site in means)
        dictionary.initialise_(generator, read_means, write_means, {site: s.basis for site, s in found.items()})
        if dictionary.is_autoencoder:  # a transcoder writes nothing yet
            scale = first_scale(dictionary, generator, read_means, spreads)
            dictionary.scale_latents_(torch.full((dictionary.n_latents,), scale))
            dictionary.set_unit_(scale * units)
    variances = [s.layer_norm_variance if layer_norm else s.variance for s in writes]
    return (torch.tensor(variances) * dictionary.write_scale.square()).float()


def _units(
    dictionary: Dictionary, spreads: Sequence[float], found: Mapping[str, Subspace]
) -> Float[Tensor, " n_reads"]:
    """The root mean square of the product of normalised activations and a random direction, at each read site."""
    by_site = zip(dictionary.reads, spreads, strict=True)
    along = [found[site].variance if site in found else spread / dictionary.d_in for site, spread in by_site]
    return torch.tensor(along).sqrt() * dictionary.read_scale


def _encoder_norms(dictionary: Dictionary) -> Float[Tensor, " n_reads"]:
    """The mean norm of the encoder rows that see each read site."""
    rows = dictionary.W_enc.movedim(dictionary.latent_axis["W_enc"], 0).flatten(1)  # [n_latents, reads]
    by_code = rows.norm(dim=-1).view(len(dictionary.reads) if dictionary.layered else 1, -1).mean(-1)
    return torch.where(by_code > 0, by_code, 1.0).expand(len(dictionary.reads))


def _check_that_they_vary(statistics: Mapping[str, SiteStatistics]) -> None:
    constant = [site for site, s in statistics.items() if not s.variance > 1e-12 * s.mean_norm**2]  # rounding
    if constant:
        raise DictlearnError(
            f"The activations at {', '.join(constant)} are the same at every token of the statistics prefix: there "
            "is nothing to learn."
        )
