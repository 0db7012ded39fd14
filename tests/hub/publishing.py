"""Dictionaries to publish."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation.report import write_report
from dictlearn.hub import save
from dictlearn.sparsifiers.top_k import TopK

REPO = "someone/mine"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def autoencoder(lm: str = "openai-community/gpt2") -> Dictionary:
    made = Linear.tiny()
    for parameter in made.parameters():
        parameter.data.normal_()
    made.metadata = {"lm_name": lm}
    return made.for_inference()


def transcoder() -> Dictionary:
    """SAELens has no TopK transcoder."""
    made = Linear(6, 8, 16, TopK(k=4), reads=("mlp_in.1",), writes=("mlp_out.1",), decoder_norm="free")
    return made.for_inference()


def write(folder: Path, dictionary: Dictionary, l0: float | None = None) -> Path:
    """With a report, where `l0` is given."""
    save(dictionary, folder)
    if l0 is not None:
        report: dict[str, Any] = {
            "dictionary": {"sha256": sha256((folder / "sae_weights.safetensors").read_bytes())},
            "data": {"n_counted": 200_113},
            "sparsity": {"l0": {"mean": l0}, "frac_dead": 0.25},
            "reconstruction": {"fvu": 0.12345, "cosine": 0.9},
            "behaviour": {"delta_ce": 0.0312, "ce_recovered_mean": None, "kl_rec": 0.5},
        }
        write_report(report, folder)
    return folder


def assert_bit_equal(loaded: object, made: Dictionary) -> None:
    assert isinstance(loaded, Dictionary)
    here, there = dict(made.named_parameters()), dict(loaded.named_parameters())
    assert here.keys() == there.keys()
    assert all(there[name].detach().numpy().tobytes() == p.detach().numpy().tobytes() for name, p in here.items())
