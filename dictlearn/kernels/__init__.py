"""Sparse maths on compact latents: the encoder product is the only dense one.

Per token a dense step costs 6 x 2 d n_latents FLOP and this one 2 d n_latents + 8 d k. No operation makes a second
`[batch, n_latents]` tensor. Each has one public function, which chooses between Triton on a GPU (triton/), compiled
code on a CPU (native.cpp) and plain torch (backend.py); what it computes is written out, dense, in reference.py.
"""

from dictlearn.kernels.decode import decode
from dictlearn.kernels.encode import encode_abs_top_k, encode_batch_top_k, encode_group_max, encode_top_k
from dictlearn.kernels.gather import row_products, scatter_outer
from dictlearn.kernels.layer_norm import EPS, LayerNormed, layer_norm
from dictlearn.kernels.rows import normalise_rows_, project_rows_
from dictlearn.kernels.select import top_columns, top_entries

__all__ = [
    "EPS",
    "LayerNormed",
    "decode",
    "encode_abs_top_k",
    "encode_batch_top_k",
    "encode_group_max",
    "encode_top_k",
    "layer_norm",
    "normalise_rows_",
    "project_rows_",
    "row_products",
    "scatter_outer",
    "top_columns",
    "top_entries",
]
