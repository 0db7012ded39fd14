"""End-to-end training: what the LM does with the reconstruction in place of the activations (Braun et al. 2024,
arXiv 2405.12241).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dictlearn.checks import check_number, check_positive
from dictlearn.lm import resolve
from dictlearn.metrics.behaviour import kl_divergence, log_probs
from dictlearn.types import DictlearnError, Scalar, Site, Step

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

MOST_LOGITS = 2**24  # whose log-probabilities are in memory at once, in float32


class EndToEnd:
    """`kl` times KL(clean || patched) of the next token, in nats, plus `downstream` times the error at later sites.

    The reconstruction takes the place of the write sites' activations at the counted tokens, and the frozen LM
    runs on to its logits. Both parts are means over these tokens; the error at a site is the squared error over
    the site's variance, and sites count alike. `recon` is the factor of the dictionary's own reconstruction loss.
    In the paper, e2e is the divergence alone, as by default, and e2e + ds has kl=0.5 and `downstream` above 0; the
    sparsity is the sparsifier's.

    Args:
        kl: weight of the divergence.
        downstream: weight of the error at later sites.
        sites: names of these sites; null: resid_post of every layer that the write sites reach.
        recon: weight of the reconstruction loss at the write sites.
    """

    needs_lm: ClassVar[bool] = True

    def __init__(
        self, kl: float = 1.0, downstream: float = 0.0, sites: Sequence[str] | None = None, recon: float = 0.0
    ) -> None:
        check_positive("end_to_end.kl", kl)
        check_number("end_to_end.downstream", downstream)
        check_number("end_to_end.recon", recon)
        names = [] if sites is None or isinstance(sites, str) else list(sites)
        if sites is not None and not (names and all(isinstance(name, str) for name in names)):
            raise DictlearnError(f"end_to_end.sites must be null or a list of site names, got {sites!r}.")
        if names and downstream == 0:
            raise DictlearnError("end_to_end.sites has no effect without end_to_end.downstream above 0.")
        self.kl, self.downstream, self.names, self.recon_coefficient = kl, downstream, names, recon
        self.writes: tuple[Site, ...] = ()
        self.later: dict[Site, float] = {}

    def check(self, dictionary: Dictionary) -> None:
        """Raises DictlearnError for a dictionary that would lose its nesting with its reconstruction loss."""
        if dictionary.nested and self.recon_coefficient == 0:
            raise DictlearnError(
                f"end_to_end.recon must be above 0 for a {type(dictionary).__name__}, whose reconstruction loss "
                "makes it one, got 0."
            )

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """Where later sites may be. Raises DictlearnError for an unknown name."""
        if self.downstream == 0:
            return []
        n_layers = model.config.get_text_config().num_hidden_layers
        return [resolve(model, name) for name in self.names or [f"resid_post.{i}" for i in range(n_layers)]]

    def bind(self, writes: Sequence[Site], later: Mapping[Site, float]) -> None:
        """What the dictionary writes, and the later sites that depend on it with the variance of their activations.

        Raises DictlearnError where a given one does not, or none of the LM's layers does.
        """
        self.writes, self.later = tuple(writes), dict(later)
        if self.downstream == 0:
            return
        written, found = ", ".join(site.name for site in writes), [site.name for site in later]
        if self.names and (others := [name for name in self.names if name not in found]):
            raise DictlearnError(
                f"end_to_end.sites must come after what the dictionary writes, {written}; {', '.join(others)} does "
                "not depend on it."
            )
        if not found:
            raise DictlearnError(f"No resid_post comes after {written}: use end_to_end.downstream=0.")

    def __call__(self, step: Step) -> Scalar:
        clean, dictionary = step.clean, step.dictionary
        if clean is None:
            raise DictlearnError("end_to_end runs the LM on whole rows: it needs stream=sequences.")
        recon = dictionary.denormalise(step.recon, dictionary.select_reads(clean.acts))
        values = dict(zip(self.writes, dictionary.split_writes(recon).values(), strict=True))
        patched = clean.patched(values, list(self.later))
        loss = self.kl * mean_kl(clean.logits, patched.logits)
        if not self.later:
            return loss
        errors = [
            _squared_error(clean.acts[site.name], patched.acts[site.name]) / variance
            for site, variance in self.later.items()
        ]
        return loss + self.downstream * torch.stack(errors).mean()


def _squared_error(clean: Float[Tensor, "n d"], patched: Float[Tensor, "n d"]) -> Scalar:
    """Summed over the width, the mean over tokens; in float32 at least."""
    dtype = torch.promote_types(clean.dtype, torch.float32)
    return (patched.to(dtype) - clean.to(dtype)).square().sum(-1).mean()


def mean_kl(clean: Float[Tensor, "n vocab"], patched: Float[Tensor, "n vocab"]) -> Scalar:
    """KL(clean || patched) in nats, the mean over tokens, from logits.

    Log-probabilities take several times the memory of bfloat16 logits, so they are made for a part of the tokens at
    a time, and once more for the gradient.
    """
    size = max(1, MOST_LOGITS // clean.shape[-1])
    parts = zip(clean.split(size), patched.split(size), strict=True)
    sums = [checkpoint(_kl_sum, p, q, use_reentrant=False, preserve_rng_state=False) for p, q in parts]
    return torch.stack(sums).sum() / len(clean)


def _kl_sum(clean: Float[Tensor, "n vocab"], patched: Float[Tensor, "n vocab"]) -> Scalar:
    return kl_divergence(log_probs(clean), log_probs(patched)).sum()
