"""The table of latents: `latents.parquet` beside the report, one row per latent."""

from __future__ import annotations

import pandas as pd
import torch

from dictlearn.dictionaries import Dictionary
from dictlearn.metrics.geometry import Nearest, row_cosines
from dictlearn.metrics.sparsity import LatentValues


@torch.no_grad()
def latent_table(dictionary: Dictionary, latents: LatentValues, neighbours: Nearest) -> pd.DataFrame:
    """One row per latent, what is not defined missing (null on disk):

    - `latent`: its index. `count`: on how many counted held-out tokens it is active (not zero), int64.
    - `density`: count / counted tokens. `mean`, `max`: its values where it is active; missing for a dead latent.
    - `decoder_norm`: ||W_dec_i||, of several write sites the sum of their norms; of a cross-layer transcoder the
      norm over all of them.
    - `encoder_decoder_cosine`: cosine of its encoder and its decoder direction, over all sites together; missing
      where reads and writes differ in width, or a direction is zero.
    - `nearest_latent`, `nearest_cosine`: the other latent whose decoder direction has the largest cosine with its
      own, over all write sites together; missing for a zero direction.
    """
    W_enc, W_dec = dictionary.flat_W_enc.T, dictionary.flat_W_dec
    comparable = W_enc.shape == W_dec.shape
    cosine = row_cosines(W_enc, W_dec) if comparable else torch.full_like(latents.total, torch.nan)
    nearest_latent = pd.Series(neighbours.latent.cpu().numpy(), dtype="Int64")
    return pd.DataFrame(
        {
            "latent": range(dictionary.n_latents),
            "count": latents.n_fired.cpu().numpy(),
            "density": latents.density.cpu().numpy(),
            "mean": latents.mean.cpu().numpy(),
            "max": latents.max.cpu().numpy(),
            "decoder_norm": dictionary.decoder_norms().float().cpu().numpy(),
            "encoder_decoder_cosine": cosine.cpu().numpy(),
            "nearest_latent": nearest_latent.mask(nearest_latent < 0),
            "nearest_cosine": neighbours.cosine.cpu().numpy(),
        }
    )
