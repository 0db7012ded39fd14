"""Copies of models with parts taken out, so that closed forms hold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel


def unbiased(model: PreTrainedModel) -> PreTrainedModel:
    """Without biases, position embeddings and the softcap of logits."""
    own = copy.deepcopy(model)
    config = own.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None) is not None:
        config.final_logit_softcapping = None
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if name.endswith(("bias", "wpe.weight", "embed_positions.weight")):
                parameter.zero_()
    return own


def with_modules(model: PreTrainedModel, kind: type[nn.Module], make: Callable[[], nn.Module]) -> PreTrainedModel:
    """With all modules of a class replaced."""
    own = copy.deepcopy(model)
    for path, module in list(own.named_modules()):
        if isinstance(module, kind):
            parent, _, name = path.rpartition(".")
            setattr(own.get_submodule(parent), name, make())
    return own
