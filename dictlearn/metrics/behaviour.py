"""What a change inside the LM does to its predictions, accumulated per prediction, in nats."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
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
        self.total = self.total + F.cross_entropy(logits.double(), next_tokens, reduction="sum")
        self.n_predictions = self.n_predictions + len(next_tokens)


class KLDivergence(_MeanPerPrediction):
    """Mean of KL(clean || patched) = sum p (log p - log q), p from `clean`, q from `patched` logits.

    From log-softmax, never the log of a softmax: finite for any finite logits.
    """

    def update(self, clean: Logits, patched: Logits) -> None:
        log_p, log_q = clean.double().log_softmax(-1), patched.double().log_softmax(-1)
        self.total = self.total + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        self.n_predictions = self.n_predictions + len(clean)
