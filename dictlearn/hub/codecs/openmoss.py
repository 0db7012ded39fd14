"""OpenMOSS (Language-Model-SAEs): `config.json` beside `sae_weights.safetensors`; Llama Scope R1 and 2.

With x_s = x * sqrt(d) / n_in, where n_in is the average norm of the data at the read site (x_s = x where
`norm_activation` is "inference"; of Llama Scope R1 the norms are known here, where its files lack them):

    pre = x_s @ W_E + b_E;  latents = pre where its activation, of pre * ||W_D_i||, is not zero
    recon = (latents @ W_D + b_D) * n_out / sqrt(d)

Without `sparsity_include_decoder_norm` the activation is that of pre. Older files hold `nn.Linear` weights, [out,
in]. Latents are theirs, but for topk with decoder norms: there they are multiplied by ||W_D_i||, because the k
largest are selected in these units.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dictlearn.checks import check_choice, check_count, check_flag
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import Weights, check_finite, linear
from dictlearn.hub.codecs._llama_scope_r1 import scale_of
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.names import from_hook_name
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors, read_json
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
NORM, THRESHOLD = "dataset_average_activation_norm.", "log_jumprelu_threshold"
ENDS = ("hook_point_in", "hook_point_out")
LAYOUTS = (  # weights and biases of encoder and decoder, thresholds; axes: d the width, n the latents
    {"W_E": "dn", "b_E": "n", "W_D": "nd", "b_D": "d", f"activation_function.{THRESHOLD}": "n"},
    {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn", "decoder.bias": "d", THRESHOLD: "n"},
)
PER_TOKEN, OF_A_BATCH = ("relu", "jumprelu", "topk"), ("batchtopk", "layertopk", "batchlayertopk")
SCALES, OF_TOKENS = ("dataset-wise", "inference"), ("token-wise", "batch-wise")
LANGUAGE_MODELS = {
    r"Llama-Scope-2-(Qwen3-[\w.]+)": "Qwen/{}",
    r"Llama-Scope-(R1-Distill)": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
NORMALISED = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")
RMS_NORMED = "Qwen/Qwen3-"  # language models whose norm is input_norm=rms_norm


class OpenMOSS:
    """ReLU, JumpReLU and TopK autoencoders and transcoders."""

    layout: ClassVar[str] = f"{CONFIG} with `d_model` and `expansion_factor`, beside {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS, CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        return {"d_model", "expansion_factor"} <= set(read_json(files.path(posixpath.join(place, CONFIG))))

    def read(self, files: Files, place: str) -> Dictionary:
        config, path = (files.path(posixpath.join(place, name)) for name in (CONFIG, WEIGHTS))
        cfg, where = read_json(config), files.origin(place)
        lm = _lm_name(where)
        stored = load_tensors(path)
        try:
            _check(cfg)
            (read, norm), write = _read_site(cfg, lm), site_of(cfg, "hook_point_out")
            weights, threshold = _weights(path, cfg, stored)
            sparsifier = _sparsifier(cfg, len(weights.b_enc))
        except FormatError:
            raise
        except DictlearnError as error:
            raise FormatError(f"{config}: {error}") from None
        scales, metadata = _scales(path, cfg, stored, where), {"lm_name": lm, "prepend_bos": True}
        made = linear(path, weights, sparsifier, read, write, input_norm=norm, metadata=metadata)
        _fold(made, cfg, threshold, *scales)
        check_finite(path, made)
        return made


def check_supported(cfg: Mapping[str, Any]) -> None:
    """Raise DictlearnError where there is a gate or a bias before the encoder."""
    for key, why in {
        "use_glu_encoder": "a gated encoder is not linear",
        "apply_decoder_bias_to_pre_encoder": "no release has it",
    }.items():
        if cfg.get(key, False) is not False:
            raise DictlearnError(f"{key}={cfg[key]!r} is not supported because {why}; it must be false.")


def site_of(cfg: Mapping[str, Any], end: str) -> str:
    """The site of `hook_point_in` or `hook_point_out`."""
    hook = cfg.get(end)
    site = from_hook_name(hook) if isinstance(hook, str) else hook
    if not isinstance(site, str) or site == hook:
        raise DictlearnError(f"{end}={hook!r} is not supported because it is no place that is known here.")
    return site


def flag(cfg: Mapping[str, Any], key: str, default: bool) -> bool:
    """A setting that is true or false."""
    check_flag(key, value := cfg.get(key, default))
    return bool(value)


def top_k(cfg: Mapping[str, Any], n_latents: int) -> TopK:
    """The sparsifier of topk."""
    check_count("top_k", k := cfg.get("top_k", 50))
    sparsifier = TopK(k)
    sparsifier.bind(n_latents)
    return sparsifier


def _check(cfg: Mapping[str, Any]) -> None:
    """Raise DictlearnError where the rule of this configuration is none that is read here."""
    if (kind := cfg.get("sae_type", "sae")) != "sae":
        raise DictlearnError(
            f"sae_type={kind!r} is not supported because only dictionaries of single tokens with one read and one "
            "write site are: it must be 'sae'."
        )
    check_supported(cfg)
    if (act_fn := cfg.get("act_fn", "relu")) in OF_A_BATCH:
        raise DictlearnError(
            f"act_fn={act_fn} is not supported because whether a latent fires depends on other tokens or layers."
        )
    check_choice("act_fn", act_fn, PER_TOKEN)
    if (mode := cfg.get("norm_activation", "dataset-wise")) in OF_TOKENS:
        raise DictlearnError(
            f"norm_activation={mode} is not supported because a reconstruction has the scale of its target."
        )
    check_choice("norm_activation", mode, SCALES)
    check_count("d_model", cfg.get("d_model"))
    for key in ("use_decoder_bias", "sparsity_include_decoder_norm"):
        flag(cfg, key, True)


def _read_site(cfg: Mapping[str, Any], lm: str | None) -> tuple[str, str]:
    """The read site, and how its tokens are normalised."""
    hook = cfg.get("hook_point_in")
    found = NORMALISED.fullmatch(hook) if isinstance(hook, str) else None
    if found is None:
        return site_of(cfg, "hook_point_in"), "none"
    if lm is None or not lm.startswith(RMS_NORMED):
        raise DictlearnError(
            f"hook_point_in={hook} is not supported because only Qwen 3's norm is known here, and the language "
            f"model is {lm or 'not known'}: a folder above must have its repository's name, Llama-Scope-2-Qwen3-..."
        )
    return f"resid_mid.{found[1]}", "rms_norm"


def _weights(
    path: Path, cfg: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[Weights, Float[Tensor, " n_latents"] | None]:
    """The weights of the file as they are, and the thresholds of the gate."""
    shapes = dict(LAYOUTS["encoder.weight" in stored])
    encoder, b_enc, decoder, b_dec, threshold = shapes
    if not flag(cfg, "use_decoder_bias", True):
        del shapes[b_dec]
    if cfg.get("act_fn") != "jumprelu":
        del shapes[threshold]
    sizes = dict(zip(shapes[encoder], encoder_sizes(path, stored, encoder), strict=True))
    sizes["d"] = cfg["d_model"]
    # Where data have no norm, what is stored under its name is memory that nobody has set.
    w = {key: tensor for key, tensor in stored.items() if not key.startswith(NORM)}
    check_tensors(path, w, {key: tuple(sizes[axis] for axis in axes) for key, axes in shapes.items()})
    W_enc, W_dec = (w[encoder], w[decoder]) if shapes[encoder] == "dn" else (w[encoder].T, w[decoder].T)
    weights = Weights(W_enc, w[b_enc], W_dec, w[b_dec] if b_dec in w else torch.zeros(sizes["d"]))
    return weights, w[threshold].float().exp() if threshold in w else None


def _sparsifier(cfg: Mapping[str, Any], n_latents: int) -> Sparsifier | None:
    """None where there are thresholds."""
    match cfg.get("act_fn", "relu"):
        case "topk":
            return top_k(cfg, n_latents)
        case "relu":
            return ReLU(l1=0.0)
    return None


def _scales(path: Path, cfg: Mapping[str, Any], stored: Mapping[str, Tensor], where: str) -> tuple[float, float]:
    """sqrt(d) / average norm, of the read and of the write site."""
    if cfg.get("norm_activation", "dataset-wise") == "inference":
        return 1.0, 1.0
    keys = [f"{NORM}{cfg[end]}" for end in ENDS]
    norms = {key: stored[key] for key in keys if key in stored}
    if not norms:
        known = scale_of(where, cfg["hook_point_in"]) if len(set(keys)) == 1 else None
        if known is None:
            raise FormatError(
                f"{path}: missing {sorted(set(keys))}: without them it is not supported because activations are "
                f"scaled by their average norm, and {where!r} is no place of Llama Scope R1, of which it is known "
                "here."
            )
        return known, known
    check_tensors(path, norms, {key: (1,) if key in norms and norms[key].ndim == 1 else () for key in keys})
    for key, norm in norms.items():
        if norm.item() <= 0:
            raise FormatError(f"{path}: {key} must be positive, got {norm.item()}.")
    read, write = (math.sqrt(cfg["d_model"]) / float(norms[key]) for key in keys)
    return read, write


@torch.no_grad()
def _fold(
    made: Linear, cfg: Mapping[str, Any], threshold: Float[Tensor, " n_latents"] | None, read: float, write: float
) -> None:
    """Scales and decoder norms, into weights as they are in the file."""
    norms = made.decoder_norms() if flag(cfg, "sparsity_include_decoder_norm", True) else None
    made.W_enc.mul_(read)
    made.W_dec.div_(write)
    made.b_dec.div_(write)
    if threshold is not None:
        least = threshold if norms is None else threshold / norms  # a row of norm 0 never fires
        made.get_parameter("sparsifier.threshold").copy_(least.clamp(max=torch.finfo(least.dtype).max))
    elif norms is not None and cfg.get("act_fn") == "topk":
        made.W_dec.div_(torch.where(norms > 0, norms, 1.0).unsqueeze(-1))
        made.scale_latents_(norms)


def _lm_name(where: str) -> str | None:
    for pattern, name in LANGUAGE_MODELS.items():
        if found := re.search(pattern, where):
            return name.format(found[1])
    return None
