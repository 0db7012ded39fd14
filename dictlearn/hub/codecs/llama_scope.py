"""Llama Scope (He et al. 2024, arXiv 2410.20526): `hyperparams.json` and `checkpoints/final.safetensors`.

The weights are those of the training: with s = sqrt(d) / n_in, n_in the average norm of the data, and s' the same
of the write site,

    pre = (x * s) @ encoder.weight.T + encoder.bias;  recon = (latents @ decoder.weight.T + decoder.bias) / s'

Their loader folds both scales and gives decoder rows norm 1, and `jump_relu_threshold` was measured after that:
the latents, in raw units, are pre * ||decoder_i|| / s' where this exceeds it.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from dictlearn.checks import check_choice, check_count, check_number, check_positive
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import Weights, check_finite, linear
from dictlearn.hub.codecs.openmoss import check_supported, flag, site_of, top_k
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, load_tensors, read_json
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
LM, CTX = "meta-llama/Llama-3.1-8B", 1024


class LlamaScope:
    """Residual, MLP and attention autoencoders of Llama 3.1 8B."""

    layout: ClassVar[str] = f"{CONFIG} above {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        present = set(names)
        folders = {posixpath.dirname(name) for name in names if posixpath.basename(name) == CONFIG}
        return sorted(folder for folder in folders if posixpath.join(folder, WEIGHTS) in present)

    def matches(self, files: Files, place: str) -> bool:
        return True  # no other format has these two files

    def read(self, files: Files, place: str) -> Dictionary:
        config, path = (files.path(posixpath.join(place, name)) for name in (CONFIG, WEIGHTS))
        cfg = read_json(config)
        try:
            read, write = _check(cfg)
            sparsifier, threshold = _top_k(cfg), float(cfg.get("jump_relu_threshold") or 0.0)
            sites = [site_of(cfg, end) for end in ("hook_point_in", "hook_point_out")]
        except (DictlearnError, OverflowError) as error:
            raise FormatError(f"{config}: {error}") from None
        d, n = cfg["d_model"], cfg["d_sae"]
        w = load_tensors(path)
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
        if not flag(cfg, "use_decoder_bias", True):
            del shapes["decoder.bias"]
        check_tensors(path, w, shapes)
        weights = Weights(
            w["encoder.weight"].T,
            w["encoder.bias"],
            w["decoder.weight"].T,
            w.get("decoder.bias", torch.zeros(d)),
            None if sparsifier else torch.full((n,), threshold, dtype=torch.float64),
        )
        metadata = {"lm_name": LM, "ctx": CTX, "prepend_bos": True}
        made = linear(path, weights, sparsifier, *sites, metadata=metadata)
        _fold(made, read, write, flag(cfg, "sparsity_include_decoder_norm", True))
        check_finite(path, made)
        return made


@torch.no_grad()
def _fold(made: Linear, read: float, write: float, decoder_norms: bool) -> None:
    """What their loader does; thresholds are those of its result."""
    made.W_dec.mul_(read / write)
    made.b_dec.div_(write)
    made.b_enc.div_(read)
    if decoder_norms:
        norms = made.decoder_norms()
        made.W_enc.mul_(norms)
        made.b_enc.mul_(norms)
        made.W_dec.div_(torch.where(norms > 0, norms, 1.0).unsqueeze(-1))


def _check(cfg: Mapping[str, Any]) -> tuple[float, float]:
    """The scales of the read and of the write site. Raises DictlearnError for what is not read here."""
    check_supported(cfg)
    check_choice("act_fn", act_fn := cfg.get("act_fn"), ("jumprelu", "topk"))
    check_number("jump_relu_threshold", cfg.get("jump_relu_threshold"), or_null=act_fn == "topk")
    check_choice("norm_activation", cfg.get("norm_activation"), ("dataset-wise",))
    check_count("d_model", d := cfg.get("d_model"))
    check_count("d_sae", cfg.get("d_sae"))
    assert isinstance(d, int)
    for key in ("use_decoder_bias", "sparsity_include_decoder_norm"):
        flag(cfg, key, True)
    norms = cfg.get("dataset_average_activation_norm")
    averages = [norms.get(end) if isinstance(norms, dict) else None for end in ("in", "out")]
    for end, norm in zip(("in", "out"), averages, strict=True):
        check_positive(f"dataset_average_activation_norm.{end}", norm)
    read, write = (math.sqrt(d) / float(norm) for norm in averages if norm is not None)
    return read, write


def _top_k(cfg: Mapping[str, Any]) -> TopK | None:
    """None where there is a threshold, which those trained with topk may have as well."""
    if cfg["act_fn"] == "jumprelu" or cfg.get("jump_relu_threshold"):
        return None
    return top_k(cfg, cfg["d_sae"])
