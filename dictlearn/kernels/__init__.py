"""Sparse maths on compact latents, in plain torch: the encoder product is the only dense one.

Per token a dense step costs 6 x 2 d n_latents FLOP and this one 2 d n_latents + 8 d k. No operation makes a second
`[batch, n_latents]` tensor.
"""

from dictlearn.kernels.decode import decode
from dictlearn.kernels.encode import encode_top_k
from dictlearn.kernels.gather import row_products, scatter_outer
from dictlearn.kernels.layer_norm import LayerNormed, layer_norm
from dictlearn.kernels.select import top_columns

__all__ = ["LayerNormed", "decode", "encode_top_k", "layer_norm", "row_products", "scatter_outer", "top_columns"]
