"""The blocks `sparsity` and `reconstruction` on a real forward of a tiny LM."""

import math
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import context as context_module
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.evaluation.sections import density_histogram
from dictlearn.lm.load import LM
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from tests.evaluation.conftest import (
    CTX,
    D_MODEL,
    N_ROWS,
    autoencoder,
    constant,
    context_of,
    counted_mean,
    flat,
    forwards_counted,
    true_mlp,
)


def run(lm: LM, tokens: Tensor, dictionary: Dictionary, **options: Any) -> dict:
    return Reconstruction().run(context_of(lm, tokens, {"x": dictionary}, **options))["x"]


def hidden(lm: LM, tokens: Tensor, mask: Tensor) -> Tensor:
    """Counted activations of resid_post.1, float64, without our hooks."""
    return lm.model(tokens, output_hidden_states=True).hidden_states[2][mask].double()


def random_sae(n_latents: int = 24) -> Linear:
    sae = Linear(D_MODEL, D_MODEL, n_latents, TopK(k=5), reads=("resid_post.1",), writes=("resid_post.1",))
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sae.requires_grad_(False)


def test_identity(lm: LM, tokens: Tensor) -> None:
    got = run(lm, tokens, autoencoder())
    assert got["reconstruction"]["fvu"] == 0
    assert got["reconstruction"]["cosine"] == pytest.approx(1, abs=1e-9)
    assert got["reconstruction"]["relative_bias"] == pytest.approx(1, abs=1e-9)
    assert got["sparsity"]["l0"]["mean"] == D_MODEL
    assert got["sparsity"]["n_dead"] == 0
    for name in ("fvu_incl_masked", "fvu_centred", "fvu_token_p5", "fvu_token_median", "fvu_token_p95"):
        assert got["reconstruction"][name] == 0
    assert got["reconstruction"]["l2_ratio"] == pytest.approx(1, abs=1e-9)
    assert got["warnings"] == []


def test_mean_predictor(lm: LM, tokens: Tensor) -> None:
    got = run(lm, tokens, constant(counted_mean(lm, tokens, tokens != 0)))
    assert got["reconstruction"]["fvu"] == pytest.approx(1, abs=1e-9)
    assert got["sparsity"]["l0"] == {"mean": 0, "median": 0, "p5": 0, "p95": 0, "stderr": 0}
    assert got["sparsity"]["l1_mean"] == 0
    assert got["sparsity"]["frac_dead"] == 1
    for name in ("p5", "median", "p95", "mean"):
        assert got["reconstruction"][f"fvu_token_{name}"] == pytest.approx(1, abs=1e-6)
    assert [fvu for fvu in got["reconstruction"]["fvu_per_position"] if fvu is not None] == pytest.approx(
        [1] * (CTX - 1), abs=1e-6
    )
    assert got["warnings"] == []  # not worse than the mean


def test_zero_predictor(lm: LM, tokens: Tensor) -> None:
    x = hidden(lm, tokens, tokens != 0)
    variance = (x - x.mean(0)).square().sum(1).mean()
    sections = run(lm, tokens, constant(torch.zeros(D_MODEL)))
    got = sections["reconstruction"]
    assert sections["warnings"][0].startswith("reconstruction.fvu at resid_post.1 is ")
    assert got["l2_ratio"] == 0
    assert got["fvu"] == pytest.approx((1 + x.mean(0).square().sum() / variance).item(), rel=1e-9)
    assert math.isnan(got["cosine"])
    assert got["n_zero_norm"] == got["n_tokens"]


@pytest.mark.parametrize("a", [0.5, 0.875])
def test_shrink(lm: LM, tokens: Tensor, a: float) -> None:
    x = hidden(lm, tokens, tokens != 0)
    variance = (x - x.mean(0)).square().sum(1).mean()
    got = run(lm, tokens, autoencoder(scale=a))["reconstruction"]
    assert got["relative_bias"] == pytest.approx(a, rel=1e-6)
    assert got["cosine"] == pytest.approx(1, rel=1e-6)
    assert got["fvu"] == pytest.approx(((1 - a) ** 2 * x.square().sum(1).mean() / variance).item(), rel=1e-6)


def test_an_offset_is_an_error(lm: LM, tokens: Tensor) -> None:
    """A variance of the residual about its own mean would not see it."""
    x = hidden(lm, tokens, tokens != 0)
    variance = (x - x.mean(0)).square().sum(1).mean()
    got = run(lm, tokens, autoencoder(offset=torch.full((D_MODEL,), 0.5)))["reconstruction"]
    assert got["fvu"] == pytest.approx((D_MODEL * 0.25 / variance).item(), rel=1e-5)
    assert got["mse_per_dim"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("batch_rows", [1, 7, 100])
def test_batch_and_chunk_size_do_not_matter(
    lm: LM, tokens: Tensor, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = random_sae()
    expected = run(lm, tokens, sae)
    monkeypatch.setattr(context_module, "CHUNK_ELEMENTS", 24 * 3)  # three tokens at once
    order = torch.randperm(N_ROWS)
    got = run(lm, tokens[order], sae, batch_rows=batch_rows)
    assert flat(got["sparsity"]) == pytest.approx(flat(expected["sparsity"]), rel=1e-6)
    assert got["histograms"] == expected["histograms"]
    assert flat(got["reconstruction"]) == pytest.approx(flat(expected["reconstruction"]), rel=1e-5, nan_ok=True)
    pd.testing.assert_frame_equal(got["tables"]["latents"], expected["tables"]["latents"], rtol=1e-5)


def test_against_a_slow_version(lm: LM, tokens: Tensor) -> None:
    sae, x = random_sae(), hidden(lm, tokens, tokens != 0)
    got = run(lm, tokens, sae)
    out = sae(x.float())
    active = out.latents != 0
    assert got["sparsity"]["l0"]["mean"] == pytest.approx(active.sum(1).double().mean().item())
    assert got["sparsity"]["n_dead"] == int((~active.any(0)).sum())
    assert got["sparsity"]["n_tokens"] == len(x)
    sse = (x - out.recon.double()).square().sum()
    assert got["reconstruction"]["mse_per_token"] == pytest.approx((sse / len(x)).item(), rel=1e-5)
    assert got["reconstruction"]["fvu"] == pytest.approx((sse / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    recon = out.recon.double()
    token_fvu = ((x - recon).square().sum(1) / (x - x.mean(0)).square().sum(1)).numpy()
    assert got["reconstruction"]["fvu_token_median"] == pytest.approx(np.median(token_fvu), rel=1e-5)
    assert got["reconstruction"]["fvu_token_p95"] == pytest.approx(np.quantile(token_fvu, 0.95), rel=1e-5)
    assert got["reconstruction"]["l2_ratio"] == pytest.approx(
        (recon.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-5
    )
    assert got["sparsity"]["l1_mean"] == pytest.approx(out.latents.double().sum(1).mean().item(), rel=1e-5)


def test_position_by_position(lm: LM, tokens: Tensor) -> None:
    """Against a slow version; weighted by the spread about the data-set mean, positions make up the whole."""
    sae, mask = random_sae(), tokens != 0
    mask[:, 5] = False
    got = run(lm, tokens, sae, mask=mask)["reconstruction"]
    x = lm.model(tokens, output_hidden_states=True).hidden_states[2]
    error = (x.double() - sae(x).recon.double()).square().sum(-1)  # [rows, ctx]
    spread = (x.double() - x[mask].double().mean(0)).square().sum(-1)
    whole = 0.0
    for position in range(CTX):
        here = mask[:, position]
        fvu = got["fvu_per_position"][position]
        assert got["n_tokens_per_position"][position] == int(here.sum())
        if not here.any():
            assert fvu is None
            continue
        assert fvu == pytest.approx((error[here, position].sum() / spread[here, position].sum()).item(), rel=1e-5)
        whole += fvu * (spread[here, position].sum() / spread[mask].sum()).item()
    assert whole == pytest.approx(got["fvu"], rel=1e-6)
    assert [i for i, fvu in enumerate(got["fvu_per_position"]) if fvu is None] == [0, 5]


def test_masked_tokens_in_a_number_of_their_own(lm: LM, tokens: Tensor) -> None:
    sae = random_sae()
    got = run(lm, tokens, sae)["reconstruction"]
    x = hidden(lm, tokens, torch.ones_like(tokens, dtype=torch.bool))
    error = (x - sae(x.float()).recon.double()).square().sum()
    assert got["fvu_incl_masked"] == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    assert got["fvu_incl_masked"] != pytest.approx(got["fvu"], rel=1e-3)
    everything = run(lm, tokens, sae, mask=torch.ones_like(tokens, dtype=torch.bool))["reconstruction"]
    assert everything["fvu_incl_masked"] == everything["fvu"]


def test_standard_errors_are_over_rows(lm: LM, tokens: Tensor) -> None:
    sae, mask = random_sae(), tokens != 0
    got = run(lm, tokens, sae)
    x = lm.model(tokens, output_hidden_states=True).hidden_states[2]
    out = sae(x)
    values = {
        "cosine": torch.cosine_similarity(x.double(), out.recon.double(), dim=-1),
        "l2_ratio": out.recon.double().norm(dim=-1) / x.double().norm(dim=-1),
        "l0": (out.latents != 0).double().sum(-1),
    }
    stderr = got["reconstruction"]["stderr"] | {"l0": got["sparsity"]["l0"]["stderr"]}
    for name, value in values.items():
        off = torch.where(mask, value - value[mask].mean(), 0).sum(1)  # of each row
        expected = math.sqrt(N_ROWS / (N_ROWS - 1) * off.square().sum()) / int(mask.sum())
        assert stderr[name] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert stderr.keys() == {"fvu", "cosine", "l2_ratio", "relative_bias", "l0"}


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_masked_positions_move_nothing(
    lm: LM, tokens: Tensor, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the number that says that it has them in."""
    mask = tokens != 0
    mask[:, 5] = False
    sae = random_sae()
    expected = run(lm, tokens, sae, mask=mask)
    assert expected["sparsity"]["n_tokens"] == N_ROWS * (CTX - 2) - 4  # BOS, position 5, and 4 rows' second BOS
    true_activations = context_module.activations
    seen = cycle(mask.split(5))

    def poisoned(*args: Any) -> dict[str, Tensor]:
        hide = ~next(seen)
        return {name: acts.masked_fill(hide[..., None], poison) for name, acts in true_activations(*args).items()}

    monkeypatch.setattr(context_module, "activations", poisoned)
    got = run(lm, tokens, sae, mask=mask)
    pd.testing.assert_frame_equal(got.pop("tables")["latents"], expected.pop("tables")["latents"], check_exact=True)
    incl = got["reconstruction"].pop("fvu_incl_masked")
    assert math.isnan(incl) if math.isnan(poison) else incl != expected["reconstruction"]["fvu_incl_masked"]
    del expected["reconstruction"]["fvu_incl_masked"]
    assert got == expected


def test_right_padding_changes_nothing(lm: LM, tokens: Tensor) -> None:
    sae = random_sae()
    padded = torch.cat([tokens, torch.zeros(N_ROWS, 9, dtype=torch.int64)], dim=1)
    expected, got = run(lm, tokens, sae), run(lm, padded, sae)
    assert flat(got["sparsity"]) == pytest.approx(flat(expected["sparsity"]), rel=1e-6)
    for name in ("fvu_per_position", "n_tokens_per_position"):
        padding = got["reconstruction"].pop(name)[CTX:]
        assert not any(padding)
        expected["reconstruction"].pop(name)
    del got["reconstruction"]["fvu_incl_masked"], expected["reconstruction"]["fvu_incl_masked"]
    assert flat(got["reconstruction"]) == pytest.approx(flat(expected["reconstruction"]), rel=1e-5)


def test_one_pass_for_all_dictionaries(lm: LM, tokens: Tensor) -> None:
    """At one site and at several they get what each gets alone, in as many forwards as one: one pass for the means,
    which are cached, one for the rest.
    """
    dictionaries: dict[str, Dictionary] = {
        "a": random_sae(),
        "b": autoencoder(0.5),
        "t": true_mlp(lm, 1, "mlp_in.1", "mlp_out.1"),
    }
    alone = {name: run(lm, tokens, d) for name, d in dictionaries.items()}
    for names in ("a", "ab", "abt"):
        context = context_of(lm, tokens, {name: dictionaries[name] for name in names})
        with forwards_counted(lm) as forwards:
            together = Reconstruction().run(context)
        assert len(forwards) == 2 * math.ceil(N_ROWS / 5)
        for name in names:
            assert together[name]["reconstruction"] == alone[name]["reconstruction"]
            assert together[name]["sparsity"] == alone[name]["sparsity"]
    expected = counted_mean(lm, tokens, context.mask)
    torch.testing.assert_close(context.means["resid_post.1", ()], expected, rtol=1e-5, atol=1e-6)
    with forwards_counted(lm) as forwards:
        Reconstruction().run(context)
    assert len(forwards) == math.ceil(N_ROWS / 5)


def test_the_true_mlp_is_a_perfect_transcoder(lm: LM, tokens: Tensor) -> None:
    for layer in range(3):
        got = run(lm, tokens, true_mlp(lm, layer, f"mlp_in.{layer}", f"mlp_out.{layer}"))["reconstruction"]
        assert got["fvu"] < 1e-10
    assert run(lm, tokens, true_mlp(lm, 1, "mlp_in.1", "mlp_in.1"))["reconstruction"]["fvu"] > 0.5


def test_several_write_sites(lm: LM, tokens: Tensor) -> None:
    """Values are means over the sites, and `per_site` says which is which."""
    sites = ("resid_post.0", "resid_post.2")
    crosscoder = Crosscoder(D_MODEL, D_MODEL, 4, ReLU(l1=0.0), reads=sites, writes=sites)
    with torch.no_grad():
        crosscoder.b_dec[0] = counted_mean(lm, tokens, tokens != 0, layer=0)
    got = run(lm, tokens, crosscoder.requires_grad_(False))["reconstruction"]
    assert list(got["per_site"]) == list(sites)
    assert got["per_site"]["resid_post.0"]["fvu"] == pytest.approx(1, abs=1e-9)
    assert got["per_site"]["resid_post.2"]["fvu"] > 1 + 1e-3
    sections = list(got["per_site"].values())
    for name in set(sections[0]) - {"stderr", "fvu_per_position"}:
        mean = (sections[0][name] + sections[1][name]) / 2
        assert got[name] == pytest.approx(mean, rel=1e-9, abs=1e-9, nan_ok=True), name
    assert {"fvu_token_median", "fvu_incl_masked", "l2_ratio", "fvu_centred", "cosine"} <= sections[0].keys()
    for at_position in list(zip(got["fvu_per_position"], *(s["fvu_per_position"] for s in sections), strict=True))[
        1:
    ]:
        assert at_position[0] == pytest.approx((at_position[1] + at_position[2]) / 2)
    assert sections[0]["stderr"]["fvu"] == pytest.approx(0, abs=1e-7)
    assert got["stderr"]["fvu"] == pytest.approx(sections[1]["stderr"]["fvu"] / 2, rel=1e-6)


def test_planted_data_has_an_exact_dictionary(lm: LM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """x = sum f_i d_i with orthonormal d_i and known firing rates."""
    directions = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL)).Q
    rates = torch.cat([torch.logspace(-3, math.log10(0.5), D_MODEL - 3), torch.zeros(3)])
    many = torch.randint(2, lm.vocab_size, (1000, CTX))
    fired = torch.rand(1000, CTX, D_MODEL) < rates
    codes = fired * (1 + torch.rand(1000, CTX, D_MODEL))
    batches = cycle((codes @ directions).split(100))
    monkeypatch.setattr(context_module, "activations", lambda *_: {"resid_post.1": next(batches)})
    sae = Linear(D_MODEL, D_MODEL, D_MODEL, ReLU(l1=0.0), reads=("resid_post.1",), writes=("resid_post.1",))
    with torch.no_grad():
        sae.W_enc.copy_(directions.T)
        sae.W_dec.copy_(directions)
        sae.b_enc.fill_(-1e-4)  # rounding must not fire a silent latent
    got = run(lm, many, sae.requires_grad_(False), batch_rows=100)
    cosines = torch.nn.functional.normalize(sae.W_dec, dim=-1) @ directions.T
    matched = cosines[linear_sum_assignment(cosines.abs().numpy(), maximize=True)]
    assert matched.mean().item() == pytest.approx(1.0, abs=1e-5)  # mean correlation of the matched directions
    assert got["geometry"]["n_duplicates"] == 0
    density = fired.flatten(0, 1).double().mean(0)
    assert got["sparsity"]["frac_over"]["1e-1"] == pytest.approx((density > 0.1).double().mean().item())
    assert got["reconstruction"]["fvu"] < 1e-7
    assert got["sparsity"]["n_dead"] == int((~fired.flatten(0, 1).any(0)).sum()) >= 3
    assert got["sparsity"]["l0"]["mean"] == pytest.approx(fired.sum(-1).double().mean().item(), abs=1e-9)
    assert sum(got["histograms"]["density"]["n_latents"]) == D_MODEL - got["sparsity"]["n_dead"]
    assert sum(got["histograms"]["l0"]["n_tokens"]) == 1000 * CTX
    table = got["tables"]["latents"]
    assert table["count"].tolist() == fired.flatten(0, 1).sum(0).tolist()
    assert table.encoder_decoder_cosine.tolist() == pytest.approx([1] * D_MODEL, abs=1e-5)
    assert table["max"].dropna().tolist() == pytest.approx(
        codes.flatten(0, 1).amax(0)[density > 0].tolist(), abs=1e-3
    )
    mean = codes.flatten(0, 1).sum(0) / fired.flatten(0, 1).sum(0)
    assert table["mean"].dropna().tolist() == pytest.approx(mean[density > 0].tolist(), abs=1e-3)


def test_density_histogram() -> None:
    density = torch.tensor([0.0, 1e-12, 2e-6, 0.011, 0.012, 0.5, 1.0, 0.0], dtype=torch.float64)
    got = density_histogram(density)
    occupied = {low: n for low, n in zip(got["log10_low"], got["n_latents"], strict=True) if n}
    assert occupied == {-8.0: 1, -5.7: 1, -2.0: 2, -0.4: 1, -0.1: 1}
