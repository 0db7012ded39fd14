"""What a change inside the LM does to its predictions, accumulated per prediction, in nats.

Log-probabilities in float32 at least, from log-softmax and never as the log of a softmax, so that they are finite
for any finite logits; sums in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

Logits = Float[Tensor, "n_predictions vocab"]


class _MeanPerPrediction(Metric):
    """A mean over all predictions seen: float64 sum over int64 count."""

    full_state_update = False
    total: Tensor  # []
    n_predictions: Tensor  # []

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_predictions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Float[Tensor, ""]:
        return self.total / self.n_predictions


class CrossEntropy(_MeanPerPrediction):
    """Mean of -log softmax(logits)[next token]."""

    def update(self, logits: Logits, next_tokens: Int[Tensor, " n_predictions"]) -> None:
        log_p = _log_softmax(logits).gather(-1, next_tokens.unsqueeze(-1))  # [n_predictions, 1]
        self.total = self.total - log_p.sum(dtype=torch.float64)
        self.n_predictions = self.n_predictions + len(next_tokens)


class KLDivergence(_MeanPerPrediction):
    """Mean of KL(clean || patched) = sum p (log p - log q), p from `clean`, q from `patched` logits.

    Summed as p (log p - log q) + q - p, which is the same since p and q sum to 1, but whose terms are not negative
    and to which a rounded normaliser adds nothing in first order.
    """

    def update(self, clean: Logits, patched: Logits) -> None:
        log_p, log_q = _log_softmax(clean), _log_softmax(patched)
        p = log_p.exp()
        terms = p * (log_p - log_q) + log_q.exp() - p  # [n_predictions, vocab]
        per_prediction = terms.sum(-1).clamp(min=0)  # below zero only by rounding
        self.total = self.total + per_prediction.sum(dtype=torch.float64)
        self.n_predictions = self.n_predictions + len(clean)


def _log_softmax(logits: Logits) -> Logits:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
