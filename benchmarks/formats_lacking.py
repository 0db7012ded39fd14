"""Inference dictionaries in random weights that a peer has no counterpart of."""

from __future__ import annotations

from typing import Any

import torch
from formats_worker import D_OUT, N_LATENTS, N_LAYERS, D, K

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK

STREAM = ["resid_post.1"]
LAYERS = ["mlp_in.0", "mlp_in.1"], ["mlp_out.0", "mlp_out.1"]


def autoencoder(sparsifier: Sparsifier, **further: Any) -> Dictionary:
    return filled(Linear(D, D, N_LATENTS, sparsifier, STREAM, STREAM, **further))


def transcoder(sparsifier: Sparsifier, d_out: int = D, read: str = "mlp_in.1", **further: Any) -> Dictionary:
    return filled(Linear(D, d_out, N_LATENTS, sparsifier, [read], [read.replace("_in", "_out")], **further))


def cross_layer(sparsifier: Sparsifier, **further: Any) -> Dictionary:
    return filled(CrossLayer(D, D, N_LATENTS * N_LAYERS, sparsifier, *LAYERS, **further))


def filled(dictionary: Dictionary) -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    for parameter in dictionary.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    dictionary.sparsifier.project_()
    return dictionary.requires_grad_(False).eval()


def lacking(peer: str) -> dict[str, Dictionary]:
    """By what they are."""
    nobody = {
        "crosscoder": filled(Crosscoder(D, D, N_LATENTS, TopK(K), LAYERS[0], LAYERS[0])),
        "bilinear": Bilinear.tiny().for_inference(),
        "cross-layer TopK": cross_layer(TopK(K)),
        "GroupMax transcoder": transcoder(GroupMax(K), D_OUT),
        "centred autoencoder": autoencoder(TopK(K), input_norm="centre"),
        "autoencoder with skip": autoencoder(ReLU(l1=0.0), skip=True),
    }
    layer_norm = {"layer-norm autoencoder": autoencoder(TopK(K), input_norm="layer_norm")}
    signed = {"signed autoencoder": autoencoder(AbsTopK(K))}
    return nobody | {
        "saelens": {
            "TopK transcoder": transcoder(TopK(K)),
            "RMS-norm transcoder": transcoder(ReLU(l1=0.0), input_norm="rms_norm"),
        },
        "dictionary_learning": {"ReLU transcoder": transcoder(ReLU(l1=0.0)), **layer_norm, **signed},
        "sparsify": {
            "ReLU autoencoder": autoencoder(ReLU(l1=0.0)),
            "JumpReLU transcoder": transcoder(JumpReLU()),
            "TopK of two widths": transcoder(TopK(K), D_OUT),
            **layer_norm,
            **signed,
        },
        "circuit_tracer": {
            "ReLU autoencoder": autoencoder(ReLU(l1=0.0)),
            "ReLU of two widths": transcoder(ReLU(l1=0.0), D_OUT),
            "ReLU of attention": transcoder(ReLU(l1=0.0), read="attn_in.1"),
            "cross-layer with skip": cross_layer(ReLU(l1=0.0), skip=True),
        },
    }.get(peer, {})
