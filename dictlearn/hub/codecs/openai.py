"""OpenAI's autoencoders of GPT-2 small: `LOCATION/autoencoders/LAYER.pt` (Gao et al. 2024, arXiv 2406.04093).

pre = (x~ - pre_bias) @ encoder.weight.T + latent_bias; latents are its ReLU, or that of the k largest; recon =
latents @ decoder.weight.T + pre_bias. With TopK each token is normalised, x~ = (x - mean) / (std + 1e-5) with the
unbiased std, and mean and std are put back. Without BOS, contexts of 64 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.files import Files
from dictlearn.hub.weights import check_tensors, encoder_sizes, number_in, read_torch
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

NAME = re.compile(r"(?:.*/)?\d+\.pt")
LOCATIONS = {  # the name of the folder above, without its version
    "mlp_post_act": "mlp_hidden",
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")  # of their training
LM, CTX = "gpt2", 64


class OpenAI:
    """ReLU and TopK autoencoders of GPT-2 small."""

    layout: ClassVar[str] = "LAYER.pt with pre_bias and latent_bias"

    def find(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if NAME.fullmatch(name)]

    def matches(self, files: Files, place: str) -> bool:
        return {"pre_bias", "latent_bias"} <= set(read_torch(files.path(place)))

    def read(self, files: Files, place: str) -> Dictionary:
        path = files.path(place)
        content = read_torch(path)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        w = {key: value for key, value in tensors.items() if key not in STATISTICS}
        n, d = encoder_sizes(path, w, "encoder.weight")
        shapes = {"encoder.weight": (n, d), "latent_bias": (n,), "decoder.weight": (d, n), "pre_bias": (d,)}
        check_tensors(path, w, shapes)
        sparsifier = _sparsifier(path, content, n)
        site = _site(files.origin(place))
        return linear(
            path,
            Weights(w["encoder.weight"].T, w["latent_bias"], w["decoder.weight"].T, w["pre_bias"]),
            sparsifier,
            site,
            site,
            b_dec_on_input=True,
            input_norm="layer_norm" if isinstance(sparsifier, TopK) else "none",
            metadata={"lm_name": LM, "ctx": CTX, "prepend_bos": False},
        )


def _sparsifier(path: Path, content: Mapping[str, Any], n_latents: int) -> Sparsifier:
    match content.get("activation"), content.get("activation_state_dict"):
        case "ReLU", _:
            return ReLU(l1=0.0)
        case "TopK", {"k": k, **rest} if rest.get("postact_fn", "ReLU") == "ReLU":
            try:
                check_count("k", k := number_in(k))
                sparsifier = TopK(cast(int, k))
                sparsifier.bind(n_latents)
            except DictlearnError as error:
                raise FormatError(f"{path}: {error}") from None
            return sparsifier
        case activation, _:
            raise FormatError(
                f"{path}: activation must be ReLU, or TopK with a k and ReLU in its state; got {activation!r}."
            )


def _site(where: str) -> str:
    found = re.search(r"([a-z_]+?)(?:_v\d[\w]*)?/autoencoders/(\d+)\.pt", where)
    return f"{LOCATIONS[found[1]]}.{found[2]}" if found and found[1] in LOCATIONS else "x"
