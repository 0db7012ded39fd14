"""How large latents start: so that the first reconstructions have the least squared error.

Tied weights of norm 1 write far too much, because the latents that a token selects are those that point its way:
the more of them, and the fewer dimensions they lie in, the more. Training would begin by unlearning that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.dictionaries import Dictionary

N_TOKENS = 256


@torch.no_grad()
def first_scale(
    dictionary: Dictionary,
    generator: torch.Generator,
    means: Float[Tensor, "n_reads d_in"],
    variances: Sequence[float],
) -> float:
    """The factor of the latents at which recon is nearest to x on average, for an autoencoder as it starts.

    Of Gaussian activations with these means, and these variances per site, equal in all directions: what the
    covariance is like hardly matters. 1 where nothing is written.
    """
    spreads = (torch.tensor(variances) / dictionary.d_in).sqrt().unsqueeze(-1)
    x = means + spreads * torch.randn(N_TOKENS, *means.shape, generator=generator)  # [n, n_reads, d_in]
    x = x if dictionary.site_axis else x.squeeze(1)
    was_training = dictionary.training
    dictionary.eval()  # nothing is to be learnt from these
    step = dictionary.step(x, x, torch.ones(len(dictionary.writes)))
    dictionary.train(was_training)
    bias = dictionary.b_dec.flatten()
    written, wanted = step.recon - bias, step.target - bias
    square = float(written.square().sum())
    return float((written * wanted).sum()) / square if square > 0 else 1.0
