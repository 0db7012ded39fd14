"""A tiny GPT-2 whose predictions depend on every site, rows with masked positions, and true dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import EvaluationContext
from dictlearn.lm.load import LM, load_lm
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from tests.tiny_lms import tiny_lm_folder

D_MODEL, N_ROWS, CTX = 16, 12, 20
SITE = "resid_post.1"


class Gelu(Sparsifier):
    """GPT-2's own non-linearity, so that a linear transcoder can be the MLP itself."""

    def forward(self, pre_acts: Tensor) -> Tensor:
        return torch.nn.functional.gelu(pre_acts, approximate="tanh")

    def config(self) -> dict[str, object]:
        return {}

    @classmethod
    def tiny(cls) -> Gelu:
        return cls()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these matrices."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), "gpt2", d_model=D_MODEL)))


@pytest.fixture
def tokens(lm: LM) -> Tensor:
    """Rows that start with BOS (id 0) and have one in the middle of some, drawn from the LM's own predictions, so
    that every ablation costs something."""
    tokens = torch.zeros(N_ROWS, 1, dtype=torch.int64)
    for position in range(1, CTX):
        logits = lm.model(tokens).logits[:, -1, 1:]
        drawn = 1 + torch.multinomial(logits.softmax(-1), 1)
        if position == 11:
            drawn[::3] = 0
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def autoencoder(scale: float = 1.0, offset: Tensor | None = None, site: str = SITE) -> Linear:
    """recon = scale * x + offset, from the latents relu(x) and relu(-x)."""
    sae = Linear(D_MODEL, D_MODEL, 2 * D_MODEL, ReLU(l1=0.0), reads=(site,), writes=(site,))
    eye = torch.eye(D_MODEL)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(scale * torch.cat([eye, -eye]))
        if offset is not None:
            sae.b_dec.copy_(offset)
    return sae.requires_grad_(False)


def constant(value: Tensor, site: str = SITE) -> Linear:
    """recon = value for every input, no latent ever active."""
    sae = Linear(D_MODEL, D_MODEL, 8, ReLU(l1=0.0), reads=(site,), writes=(site,))
    with torch.no_grad():
        sae.b_enc.fill_(-1.0)
        sae.b_dec.copy_(value)
    return sae.requires_grad_(False)


def true_mlp(lm: LM, layer: int, reads: str, writes: str) -> Linear:
    """The MLP of `layer` as a transcoder."""
    mlp = lm.model.get_submodule(f"transformer.h.{layer}.mlp")
    transcoder = Linear(D_MODEL, D_MODEL, 4 * D_MODEL, Gelu(), reads=(reads,), writes=(writes,))
    parameters = {"W_enc": "c_fc.weight", "b_enc": "c_fc.bias", "W_dec": "c_proj.weight", "b_dec": "c_proj.bias"}
    with torch.no_grad():
        for ours, theirs in parameters.items():
            transcoder.get_parameter(ours).copy_(mlp.get_parameter(theirs))
    return transcoder.requires_grad_(False)


def context_of(
    lm: LM,
    tokens: Tensor,
    dictionaries: Mapping[str, Dictionary],
    mask: Tensor | None = None,
    batch_rows: int = 5,
    max_norm_ratio: float | None = None,
) -> EvaluationContext:
    """BOS tokens are masked unless a mask is given."""
    mask = tokens != 0 if mask is None else mask
    return EvaluationContext(
        lm, dictionaries, tokens, mask, {"name": "random"}, batch_rows, max_norm_ratio=max_norm_ratio
    )


@contextmanager
def forwards_counted(lm: LM) -> Iterator[list[str]]:
    """One entry for every forward that begins inside the block."""
    seen: list[str] = []
    handle = lm.model.get_submodule("transformer.h.0").register_forward_hook(lambda *_: seen.append("forward"))
    yield seen
    handle.remove()


def flat(section: object, name: str = "") -> dict[str, float]:
    """Every number of a report section, however deep, by path; None as NaN."""
    if isinstance(section, dict):
        return {k: v for key, part in section.items() for k, v in flat(part, f"{name}.{key}").items()}
    if isinstance(section, list):
        return {k: v for i, part in enumerate(section) for k, v in flat(part, f"{name}[{i}]").items()}
    if section is None:
        return {name: math.nan}
    return {name: float(section)} if isinstance(section, int | float) else {}


def counted_mean(lm: LM, tokens: Tensor, mask: Tensor, layer: int = 1) -> Tensor:
    """Mean of resid_post of `layer` over the counted tokens, through `output_hidden_states`."""
    hidden = lm.model(tokens, output_hidden_states=True).hidden_states[layer + 1]
    return hidden[mask].double().mean(0)


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    return tmp_path / "out"
