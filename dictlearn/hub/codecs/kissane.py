"""Kissane, Krzyzanowski et al. 2024: attention autoencoders of GPT-2 small, `NAME.pt` beside `NAME_cfg.json`.

latents = relu((x - b_dec) @ W_enc + b_enc); recon = latents @ W_dec + b_dec, of all heads' values side by side: the
input of attention's output projection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.files import Files
from dictlearn.hub.names import from_hook_name
from dictlearn.hub.weights import check_tensors, encoder_sizes, read_json, read_torch
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import FormatError

LM, CTX = "gpt2", 128


class Kissane:
    """Attention autoencoders of GPT-2 small."""

    layout: ClassVar[str] = "NAME.pt with W_enc, beside NAME_cfg.json with `act_name`"

    def find(self, names: Sequence[str]) -> list[str]:
        present = set(names)
        return [name for name in names if name.endswith(".pt") and _config(name) in present]

    def matches(self, files: Files, place: str) -> bool:
        return "act_name" in read_json(files.path(_config(place)))

    def read(self, files: Files, place: str) -> Dictionary:
        path, config = files.path(place), files.path(_config(place))
        hook, w = read_json(config).get("act_name"), read_torch(path)
        if not isinstance(hook, str) or not re.fullmatch(r"blocks\.\d+\.attn\.hook_z", hook):
            raise FormatError(f"{config}: act_name must be blocks.LAYER.attn.hook_z, got {hook!r}.")
        d, n = encoder_sizes(path, w, "W_enc")
        check_tensors(path, w, {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)})
        site = from_hook_name(hook)
        metadata = {"lm_name": LM, "ctx": CTX, "prepend_bos": True}
        return linear(path, Weights(**w), ReLU(l1=0.0), site, site, b_dec_on_input=True, metadata=metadata)


def _config(name: str) -> str:
    return f"{name.removesuffix('.pt')}_cfg.json"
