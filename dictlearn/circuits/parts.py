"""The parts of a Hugging Face model that attribution treats by rules of their own.

Whether a model is known is decided before it runs: its family must be one of `FAMILIES`, and every module must be
linear, a norm, an activation, or nothing but a container of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dictlearn.lm import resolve
from dictlearn.lm.sites import FAMILIES
from dictlearn.types import DictlearnError, Site

LINEAR = (nn.Linear, Conv1D, nn.Embedding, nn.Dropout, nn.Identity)  # dropout does nothing in eval mode
GAINS = {  # of an RMS norm, as its class keeps it: the weight itself, or what is added to one
    "LlamaRMSNorm": 0.0,
    "MistralRMSNorm": 0.0,
    "Qwen2RMSNorm": 0.0,
    "Qwen3RMSNorm": 0.0,
    "Phi3RMSNorm": 0.0,
    "Olmo2RMSNorm": 0.0,
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
}
STREAM = ("mlp_in", "resid_mid", "resid_pre", "resid_post")  # where the stream is read, mlp_in behind a norm
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where their classes are


class Parts(NamedTuple):
    """Modules of the language model by what they compute.

    `products` are MLPs that multiply an activation with a linear map, `attentions` one module for each layer.
    """

    norms: list[nn.Module]
    activations: list[nn.Module]
    products: list[nn.Module]
    attentions: list[nn.Module]


def parts_of(model: PreTrainedModel) -> Parts:
    """The parts of `model`, which is left as it is.

    Raises DictlearnError, with its name, for a family or a module that is not known, and in training mode.
    """
    family = model.config.get_text_config().model_type
    if family not in FAMILIES:
        raise DictlearnError(
            f"Attribution by rules for each module is known for {', '.join(FAMILIES)} models, not for {family!r}."
        )
    if model.training:
        raise DictlearnError("Attribution needs a model without dropout: call model.eval() first.")
    parts = Parts([], [], [], [modules_at(model, "attn_in", layer) for layer in range(n_layers(model))])
    root = resolve(model, "embed").module.rpartition(".")[0]
    for path, module in model.get_submodule(root).named_modules(prefix=root):
        if is_norm(module):
            parts.norms.append(module)
        elif type(module).__module__ in ACTIVATIONS:
            parts.activations.append(module)
        elif hasattr(module, "down_proj"):
            parts.products.append(module)
        elif not _is_plain(module):
            raise DictlearnError(
                f"{path} is a {type(module).__name__}: attribution has rules for linear modules, LayerNorm, "
                f"{', '.join(GAINS)} and activations."
            )
    return parts


def n_layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers


def modules_at(model: PreTrainedModel, kind: str, layer: int) -> nn.Module:
    """The module of a readable site ("attn_in" has the attention, "attn_z" its output projection)."""
    return model.get_submodule(resolve(model, f"{kind}.{layer}").module)


def layer_at(model: PreTrainedModel, site: Site, kinds: Sequence[str]) -> tuple[int, str] | None:
    """The layer of a site, by whichever name, and which of `kinds` it is; None if it is none of them."""
    for layer in range(n_layers(model)):
        for kind in kinds:
            if kind == "resid_mid" and is_parallel(model):
                continue
            if resolve(model, f"{kind}.{layer}")[1:] == site[1:]:
                return layer, kind
    return None


def output_weight(model: PreTrainedModel, layer: int) -> Float[Tensor, "heads d"]:
    """What the heads of a layer, side by side, write to the residual stream: rows for each entry of attn_z."""
    projection = modules_at(model, "attn_z", layer)
    weight = projection.get_parameter("weight")
    return weight if isinstance(projection, Conv1D) else weight.T


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether attention and MLP both read the stream before the layer."""
    config = model.config.get_text_config()
    return config.model_type == "phi" or getattr(config, "use_parallel_residual", False)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__ in GAINS


def inverse_scale(norm: nn.Module, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """One over the denominator of a norm, float32 or wider."""
    x = widened(x)
    if isinstance(norm, nn.LayerNorm):
        return torch.rsqrt(x.var(-1, correction=0, keepdim=True) + norm.eps)
    eps: float = getattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps")
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def normed(
    norm: nn.Module, x: Float[Tensor, "*batch d"], inverse: Float[Tensor, "*#batch 1"]
) -> Float[Tensor, "*batch d"]:
    """The output of a norm whose denominator is given: affine in `x`."""
    wide = widened(x)
    if isinstance(norm, nn.LayerNorm):
        out = (wide - wide.mean(-1, keepdim=True)) * inverse
        out = out if norm.weight is None else out * norm.weight
        out = out if norm.bias is None else out + norm.bias
    else:
        out = wide * inverse * (norm.get_parameter("weight").to(wide.dtype) + GAINS[type(norm).__name__])
    return out.to(x.dtype)


def gate_and_up(mlp: nn.Module, x: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor]:
    """What one of `products` multiplies, before the activation of the first: each `[*batch, d_mlp]`."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = mlp.get_submodule("gate_up_proj")(x).chunk(2, dim=-1)
        return gate, up
    return mlp.get_submodule("gate_proj")(x), mlp.get_submodule("up_proj")(x)


def activation_of(mlp: nn.Module) -> nn.Module:
    """The activation of one of `products`."""
    return next(module for module in mlp.children() if type(module).__module__ in ACTIVATIONS)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is linear, turns positions into angles, or has no more to it than its parts."""
    name = type(module).__name__
    return isinstance(module, LINEAR) or name.endswith("RotaryEmbedding") or bool(list(module.children()))


def widened(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
