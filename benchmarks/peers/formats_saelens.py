"""SAELens: `save_model` and `SAE.load_from_disk`, all inference classes."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from formats_worker import D_OUT, N_LATENTS, D, K, randomise
from sae_lens import SAE
from torch import Tensor

SHAPE = (D,)
N_HEADS = 4
NORMS = ("none", "layer_norm", "constant_norm_rescale")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def make(architecture: str, **settings: Any) -> SAE:
    hooks = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"}
    metadata = {**hooks, **settings.pop("metadata", {})}
    made = SAE.from_dict(
        {"architecture": architecture, "d_in": D, "d_sae": N_LATENTS, "metadata": metadata, **settings}
    )
    randomise(made)
    return made


def below_0() -> SAE:
    made = make("jumprelu")
    made.threshold.neg_()
    return made


def variants(architecture: str, rescaled: tuple[bool, ...] = ()) -> dict[str, partial[SAE]]:
    """Each normalisation, with b_dec on the input or not, with latents rescaled by decoder norms or not."""
    found = {}
    for norm, centred, rescale in product(NORMS, (True, False), rescaled or (None,)):
        settings = {"normalize_activations": norm, "apply_b_dec_to_input": centred}
        parts = [architecture, norm, "b_dec on input" if centred else "input as it is"]
        if rescale is not None:
            settings |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
            parts.append("rescaled" if rescale else "not rescaled")
        found[", ".join(parts)] = partial(make, architecture, **settings)
    return found


KINDS = {
    **variants("standard"),
    **variants("jumprelu"),
    "jumprelu, thresholds below 0": below_0,
    **variants("gated"),
    **variants("topk", (True, False)),
    **variants("abstopk", (True, False)),
    "standard, hook_z": partial(
        make, "standard", reshape_activations="hook_z", metadata={"hook_name": "blocks.1.attn.hook_z"}
    ),
    **{name: partial(make, name, d_out=D_OUT, apply_b_dec_to_input=False) for name in TRANSCODERS},
    "transcoder (layer_norm)": partial(
        make, "transcoder", d_out=D_OUT, apply_b_dec_to_input=False, normalize_activations="layer_norm"
    ),
    "standard (expected_average_only_in)": partial(
        make, "standard", normalize_activations="expected_average_only_in"
    ),
    "matching_pursuit": partial(make, "matching_pursuit", max_iterations=K),
    "temporal": partial(make, "temporal", n_heads=2, n_attn_layers=1, bottleneck_factor=4, kval_topk=K),
}


def save(made: SAE, folder: Path) -> SAE:
    made.save_model(folder)
    return made


def load(folder: Path) -> SAE:
    return SAE.load_from_disk(folder, device="cpu")


def compute(made: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    if made.cfg.architecture() == "temporal":  # one document
        return tuple(found[0] for found in (made.encode(x[None]), made(x[None])))
    if made.cfg.reshape_activations == "hook_z":
        x = x.unflatten(-1, (N_HEADS, -1))
    return made.encode(x), made(x).reshape(len(x), -1)
