"""Tiny random models in float64 with dictionaries at several sites, and prompt pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dictlearn.circuits.pairs import PairBatch
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import load_lm, resolve
from dictlearn.lm.sites import site_width
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from tests.tiny_lms import tiny_lm_folder

FAMILIES = ("gpt2", "llama", "gemma2")
N_LATENTS = 24


def tiny_model(folder: Path, family: str, n_layers: int = 3) -> PreTrainedModel:
    """A tiny LM in float64."""
    return load_lm(str(tiny_lm_folder(folder, family, n_layers=n_layers))).model.double()


def filled(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    dictionary.sparsifier.project_()
    return dictionary.double().for_inference()


def some_dictionaries(model: PreTrainedModel) -> dict[str, Dictionary]:
    """Autoencoders of the stream, of attention and MLP outputs, of z with a layer norm, and a transcoder."""

    def width(site: str) -> int:
        found = site_width(model, resolve(model, site))
        assert found is not None
        return found

    def sae(site: str, sparsifier, seed: int, **arguments) -> Dictionary:
        d = width(site)
        return filled(Linear(d, d, N_LATENTS, sparsifier, [site], [site], **arguments), seed)

    d = width("resid_post.0")
    return {
        "stream": sae("resid_post.0", TopK(k=5), 0),
        "attention": sae("attn_out.1", ReLU(l1=0.0), 1),
        "z": sae("attn_z.2", TopK(k=3), 2, input_norm="layer_norm"),
        "transcoder": filled(Linear(d, d, N_LATENTS, TopK(k=4), ["mlp_in.1"], ["mlp_out.1"], skip=True), 3),
        "mlp": sae("mlp_out.2", JumpReLU(), 4),
    }


def cross_layer(model: PreTrainedModel) -> dict[str, Dictionary]:
    d = site_width(model, resolve(model, "mlp_out.0"))
    assert d is not None
    reads, writes = ([f"{kind}.{layer}" for layer in range(3)] for kind in ("mlp_in", "mlp_out"))
    return {"clt": filled(CrossLayer(d, d, 30, TopK(k=4), reads, writes), 5)}


def scaled_dictionaries(model: PreTrainedModel) -> dict[str, Dictionary]:
    """`some_dictionaries` with scales that are not 1, as before `for_inference`."""
    return _scaled(some_dictionaries(model))


def scaled_cross_layer(model: PreTrainedModel) -> dict[str, Dictionary]:
    return _scaled(cross_layer(model))


def _scaled(dictionaries: dict[str, Dictionary]) -> dict[str, Dictionary]:
    generator = torch.Generator().manual_seed(0)
    for d in dictionaries.values():
        for scale in (d.read_scale, d.write_scale):
            scale.copy_(0.5 + torch.rand(scale.shape, generator=generator))
    return dictionaries


def skipping(model: PreTrainedModel) -> dict[str, Dictionary]:
    """With skip paths: a transcoder, an autoencoder whose norm is undone, a cross-layer transcoder; scaled."""
    d = site_width(model, resolve(model, "mlp_out.0"))
    assert d is not None
    reads, writes = ([f"{kind}.{layer}" for layer in range(3)] for kind in ("mlp_in", "mlp_out"))
    norm = Linear(
        d, d, N_LATENTS, TopK(k=4), ["resid_post.1"], ["resid_post.1"], skip=True, input_norm="layer_norm"
    )
    clt = CrossLayer(d, d, 30, TopK(k=4), reads, writes, skip=True)
    return _scaled(
        {"transcoder": some_dictionaries(model)["transcoder"], "norm": filled(norm, 6), "clt": filled(clt, 7)}
    )


def rows_of(d: Dictionary) -> Tensor:
    """What latents write in raw units: [n_latents, d_out], of several write sites [n_latents, n_writes, d_out]."""
    return d.W_dec / (d.write_scale.unsqueeze(-1) if d.site_axis else d.write_scale)


def some_pairs(n: int = 4, ctx: int = 6, vocab: int = 97, n_special: int = 0, seed: int = 0) -> PairBatch:
    """Random prompts; the patch prompts differ at the tokens 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(2, vocab, (n, ctx), generator=generator)
    patch = clean.clone()
    patch[:, [1, 3]] = torch.randint(2, vocab, (n, 2), generator=generator)
    answers, wrong = torch.randint(2, vocab, (2, n, 1), generator=generator)
    return PairBatch(clean, patch, answers, wrong, n_special=n_special)
