"""Evaluation on a tiny LM of every family: the numbers of Hugging Face, whatever is masked, padded or rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.lm import activations, capture, edit, load_lm, resolve, site_width
from dictlearn.lm.load import LM
from dictlearn.types import Site
from tests.evaluation.conftest import D_MODEL, autoencoder, context_of
from tests.lm.reference import REFERENCES
from tests.lm.test_sites import names
from tests.tiny_lms import tiny_lm_folder

N_ROWS, CTX = 5, 12
LENGTHS = [12, 3, 9, 12, 5]  # of the rows where they are padded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny_lm_folder(tmp_path_factory.mktemp(family), family, n_layers=2, d_model=D_MODEL)
        return made[family]

    return get


@pytest.fixture(params=REFERENCES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lm(folder: Callable[[str], Path], family: str) -> LM:
    return load_lm(str(folder(family)))


@pytest.fixture
def sites(lm: LM, family: str) -> list[Site]:
    """Every readable site."""
    return [resolve(lm.model, name) for name in names(family) if not name.endswith((".2", ".3"))]


@pytest.fixture
def tokens() -> Tensor:
    """Rows that start with BOS (id 0), some with another in the middle."""
    tokens = torch.randint(2, 97, (N_ROWS, CTX), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = 0
    tokens[::3, 6] = 0
    return tokens


@pytest.fixture
def lengths() -> Tensor:
    """True at the real tokens of padded rows."""
    return torch.arange(CTX) < torch.tensor(LENGTHS)[:, None]


def behaviour(lm: LM, tokens: Tensor, mask: Tensor | None = None, batch_rows: int = 3) -> dict[str, Any]:
    context = context_of(lm, tokens, {"x": autoencoder(0.9)}, mask, batch_rows)
    return Behaviour(10_000).run(context)["x"]["behaviour"]


def test_clean_loss_is_that_of_hugging_face(lm: LM, tokens: Tensor) -> None:
    holes = tokens != 0
    holes[:, 4:6] = False
    for mask in (torch.ones_like(holes), tokens != 0, holes):
        expected = lm.model(tokens, labels=tokens.masked_fill(~mask, -100)).loss.item()
        got = behaviour(lm, tokens, mask)
        assert got["ce_clean"] == pytest.approx(expected, abs=1e-5)
        assert got["n_tokens"] == int(mask[:, 1:].sum())


def test_padding_changes_no_real_token(lm: LM, sites: list[Site], tokens: Tensor, lengths: Tensor) -> None:
    """On the right, with an attention mask: rows longer than any window, pads that are words or special tokens."""
    for pad in (1, 50):
        padded = tokens.masked_fill(~lengths, pad)
        together = activations(lm.model, sites, padded, lengths)
        for row, length in enumerate(LENGTHS):
            alone = activations(lm.model, sites, tokens[row : row + 1, :length])
            for name, act in alone.items():
                assert_close(together[name][row, :length], act[0], rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_that_is_counted(lm: LM, tokens: Tensor, lengths: Tensor) -> None:
    mask = lengths & (tokens != 0)
    got = [behaviour(lm, tokens.masked_fill(~lengths, pad), mask) for pad in (1, 50)]
    assert got[0]["n_tokens"] == got[1]["n_tokens"] == int(mask[:, 1:].sum())
    assert got[0]["n_replaced"] == got[1]["n_replaced"] == int(mask.sum())
    for key in ("ce_clean", "ce_rec", "ce_zero", "kl_rec", "kl_mean"):
        assert got[0][key] == pytest.approx(got[1][key], abs=1e-5)
    total, n_predictions = 0.0, 0
    for row, length in enumerate(LENGTHS):  # each row alone, without any padding
        own = tokens[row : row + 1, :length]
        labels = own.masked_fill(own == 0, -100)
        n_own = int((labels[:, 1:] != -100).sum())
        total += lm.model(own, labels=labels).loss.item() * n_own
        n_predictions += n_own
    assert got[0]["ce_clean"] == pytest.approx(total / n_predictions, abs=1e-5)


def test_bfloat16_counts_the_same_and_comes_close(lm: LM, folder, family: str, tokens: Tensor) -> None:
    rounded = load_lm(str(folder(family)), dtype="bfloat16")
    exact, got = behaviour(lm, tokens), behaviour(rounded, tokens)
    for key in ("n_tokens", "n_replaced", "n_tokens_per_position"):
        assert got[key] == exact[key]
    for key in ("ce_clean", "ce_rec", "ce_zero"):
        assert got[key] == pytest.approx(exact[key], rel=0.03)


def test_an_activation_in_its_own_place_changes_nothing(lm: LM, sites: list[Site], tokens: Tensor) -> None:
    with torch.inference_mode():
        with capture(lm.model, sites) as acts:
            clean = lm.model(tokens).logits
        for site in sites:
            with edit(lm.model, {site: lambda _, own=acts[site.name]: own.clone()}):
                assert torch.equal(lm.model(tokens).logits, clean), site.name
        with edit(lm.model, {site: lambda _, own=acts[site.name]: own.clone() for site in sites}):
            assert torch.equal(lm.model(tokens).logits, clean)


def test_a_dictionary_that_is_the_identity_costs_nothing(lm: LM, sites: list[Site], tokens: Tensor) -> None:
    """And one that is not costs something: replaced is what the LM goes on with."""
    wide = [site.name for site in sites if site_width(lm.model, site) == D_MODEL]
    identity = {name: autoencoder(1.0, site=name) for name in wide}
    moved = {f"moved {name}": autoencoder(1.0, torch.randn(D_MODEL), site=name) for name in wide}
    sections = Behaviour(10_000).run(context_of(lm, tokens, identity | moved, batch_rows=N_ROWS))
    for name in wide:
        got, other = sections[name]["behaviour"], sections[f"moved {name}"]["behaviour"]
        assert got["ce_rec"] == pytest.approx(got["ce_clean"], abs=1e-4), name
        assert got["kl_rec"] == pytest.approx(0, abs=1e-5), name
        assert other["kl_rec"] > 1e-4, name
