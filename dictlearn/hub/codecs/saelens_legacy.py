"""SAELens before version 6: a flat `cfg.json`, at first the whole configuration of the training.

The rules are those of version 6 under older names and other defaults. A `scaling_factor` multiplies the latents in
the reconstruction alone. Where activations were scaled in training (`expected_average_only_in`), the factor is in
no file: it is known here of the releases that have one. Of activations with centred writing weights (the releases
below, or where the configuration says so) `input_norm` is centre.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dictlearn.checks import check_choice
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import check_finite
from dictlearn.hub.codecs._sae_lens import CONFIG, WEIGHTS, is_before_6, read_sae_lens
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors, read_json
from dictlearn.types import DictlearnError, FormatError

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
SCALED = "expected_average_only_in"
SCALING_FACTORS = ("scaling_factor", "finetuning_scaling_factor")

# Of releases, by the name of their repository.
MLP_OUT = "gpt2-small-mlp-out-saes"
CENTRED = ("GPT2-Small-SAEs-Reformatted", "GPT2-Small-Feature-Splitting-Experiment-Layer-8", MLP_OUT)
NORMALISED = {"Mistral-7B-Residual-Stream-SAEs": "constant_norm_rescale"}  # whatever the configuration says
_MLP_OUT_SCALES = (  # by layer: version in the folder's name, scale
    (1, 1.049317316132615),
    (0, 2.3693984005104283),
    (0, 1.6411934982190302),
    (0, 1.8958522157897557),
    (0, 1.81673478700627),
    (0, 1.550234472245924),
    (0, 1.3237742807210804),
    (0, 1.1042905114723296),
    (1, 0.9123762783479742),
    (0, 0.6955335635232373),
    (0, 0.3619728926727644),
    (2, 0.2851548652550073),
)
SCALES = {  # by what activations are multiplied, by folder
    MLP_OUT: {
        f"sae_group_gpt2_blocks.{layer}.hook_mlp_out_24576:v{version}": scale
        for layer, (version, scale) in enumerate(_MLP_OUT_SCALES)
    },
    "Gemma-2b-Residual-Stream-SAEs": {"gemma_2b_blocks.12.hook_resid_post_16384": 0.21381938399317255},
}


class SAELensLegacy:
    """Standard, TopK, JumpReLU and gated autoencoders of SAELens 0.2 to 5."""

    layout: ClassVar[str] = f"{CONFIG} with `d_in` and no sae_lens_version from 6, beside {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS, CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        cfg = read_json(files.path(posixpath.join(place, CONFIG)))
        return "d_in" in cfg and is_before_6(cfg)

    def read(self, files: Files, place: str) -> Dictionary:
        config, path = (files.path(posixpath.join(place, name)) for name in (CONFIG, WEIGHTS))
        cfg, tensors = read_json(config), load_tensors(path)
        where = files.origin(place)
        _, n_latents = encoder_sizes(path, tensors, "W_enc")
        factors = {name: tensors.pop(name) for name in SCALING_FACTORS if name in tensors}
        check_tensors(path, factors, dict.fromkeys(list(factors)[:1], (n_latents,)))
        if "log_threshold" in tensors:  # of a training checkpoint
            tensors["threshold"] = tensors.pop("log_threshold").float().exp()
        try:
            scale, cfg = _version_6(cfg, n_latents, where)
            made = read_sae_lens(cfg, path, tensors)
        except FormatError:
            raise
        except DictlearnError as error:
            raise FormatError(f"{config}: {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{config}: missing or wrong field: {error!r}.") from None
        _fold(made, scale, *factors.values())
        check_finite(path, made)
        return made


def _version_6(cfg: Mapping[str, Any], n_latents: int, where: str) -> tuple[float, dict[str, Any]]:
    """By what activations are multiplied, and the configuration in the words of version 6."""
    cfg = {RENAMED.get(key, key): value for key, value in cfg.items()}
    mode, scale = _normalisation(cfg.get("normalize_activations"), where)
    kwargs = cfg.get("model_from_pretrained_kwargs") or {}
    if any(_is_of(where, repo) for repo in CENTRED):
        kwargs = {**kwargs, "center_writing_weights": True}
    return scale, {
        "architecture": _architecture(cfg),
        "d_in": cfg["d_in"],
        "d_sae": cfg.get("d_sae", n_latents),
        "k": (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k")),
        "apply_b_dec_to_input": cfg.get("apply_b_dec_to_input", True),
        "normalize_activations": mode,
        "metadata": {
            **{key: cfg.get(key) for key in ("hook_name", "hook_head_index", "model_name", "context_size")},
            "prepend_bos": cfg.get("prepend_bos", True),
            "model_from_pretrained_kwargs": kwargs,
        },
    }


def _architecture(cfg: Mapping[str, Any]) -> str:
    architecture, activation = cfg.get("architecture", "standard"), cfg.get("activation_fn", "relu")
    check_choice("architecture", architecture, ARCHITECTURES)
    if activation == "tanh-relu":
        raise DictlearnError(
            f"activation_fn={activation} is not supported because no sparsifier bounds latents by 1."
        )
    check_choice("activation_fn", activation, ("relu", "topk"))
    if activation == "relu":
        return str(architecture)
    if architecture not in ("standard", "topk"):
        raise DictlearnError(f"activation_fn=topk goes with architecture=standard or topk, got {architecture}.")
    return "topk"


def _normalisation(mode: object, where: str) -> tuple[str, float]:
    """How each token is normalised, and by what all are multiplied."""
    if known := [kind for repo, kind in NORMALISED.items() if _is_of(where, repo)]:
        return known[0], 1.0
    if mode is None or mode is False:
        return "none", 1.0
    if mode is not True and mode != SCALED:
        return str(mode), 1.0
    folder = posixpath.basename(where)
    if scales := [scale[folder] for repo, scale in SCALES.items() if _is_of(where, repo) and folder in scale]:
        return "none", scales[0]
    raise DictlearnError(
        f"normalize_activations={mode} is not supported because the scale is not in the file, and {where!r} "
        "is none of the releases whose scale is known."
    )


def _is_of(where: str, repo: str) -> bool:
    """Whether a place is in a copy of the repository: one on the Hub, in its cache, or a folder of this name."""
    return re.search(rf"(?:^|/|--){re.escape(repo)}(?:/|$)", where) is not None


@torch.no_grad()
def _fold(made: Linear, scale: float, *factors: Tensor) -> None:
    """The scale of the activations, and what multiplies the latents in the reconstruction."""
    made.W_enc.mul_(scale)
    made.W_dec.div_(scale)
    made.b_dec.div_(scale)
    for factor in factors:
        made.W_dec.mul_(factor.unsqueeze(-1))
