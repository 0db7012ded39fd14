"""The behaviour of a prompt as one number of its logits, differentiable; higher is the clean answer.

`answers` and `wrong` are token ids [n, *], where -1 stands for none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Ids = Int[Tensor, "n _"]
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]


def logit_difference(logits: Float[Tensor, "n vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " n"]:
    """Mean logit of the answers minus that of the wrong tokens (IOI: Wang et al. 2023)."""
    return _mean(logits, answers) - _mean(logits, wrong)


def logit_margin(logits: Float[Tensor, "n vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " n"]:
    """Mean logit of the answers minus the largest of the wrong tokens (docstring: Heimersheim & Janiak 2023)."""
    found = logits.gather(1, wrong.clamp_min(0)).masked_fill(wrong < 0, -torch.inf)
    return _mean(logits, answers) - found.amax(-1)


def probability_difference(logits: Float[Tensor, "n vocab"], answers: Ids, wrong: Ids) -> Float[Tensor, " n"]:
    """Probability of the answers minus that of the wrong tokens (greater-than: Hanna et al. 2023)."""
    probs = logits.softmax(-1)
    return _sum(probs, answers) - _sum(probs, wrong)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (logit_difference, logit_margin, probability_difference)
}


def _sum(values: Float[Tensor, "n vocab"], ids: Ids) -> Float[Tensor, " n"]:
    return values.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0).sum(-1)


def _mean(values: Float[Tensor, "n vocab"], ids: Ids) -> Float[Tensor, " n"]:
    return _sum(values, ids) / (ids >= 0).sum(-1)
