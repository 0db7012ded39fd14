"""What a change inside the LM does to its predictions, per prediction, in nats.

Log-probabilities in float32 at least, from log-softmax and never as the log of a softmax, so that they are finite
for any finite logits. `TokenRatio` sums what these functions return in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LogProbs = Float[Tensor, "n_predictions vocab"]
PerPrediction = Float[Tensor, " n_predictions"]


def log_probs(logits: Float[Tensor, "n_predictions vocab"]) -> LogProbs:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(log_p: LogProbs, next_tokens: Int[Tensor, " n_predictions"]) -> PerPrediction:
    """-log p[next token]."""
    return -log_p.gather(-1, next_tokens.unsqueeze(-1)).squeeze(-1)


def kl_divergence(log_p: LogProbs, log_q: LogProbs) -> PerPrediction:
    """KL(p || q) = sum p (log p - log q); p of the clean model, q of the patched one.

    Summed as p (log p - log q) + q - p, which is the same since p and q sum to 1, but whose terms are not negative
    and to which a rounded normaliser adds nothing in first order.
    """
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).add_(log_q.exp()).sub_(p)  # [n_predictions, vocab]
    return terms.sum(-1).clamp(min=0)  # below zero only by rounding


def top1_agrees(log_p: LogProbs, log_q: LogProbs) -> Bool[Tensor, " n_predictions"]:
    """Whether the most probable token is the same."""
    return log_p.argmax(-1) == log_q.argmax(-1)
