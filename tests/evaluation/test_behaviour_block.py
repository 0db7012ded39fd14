"""The block `behaviour` on a tiny LM: closed forms, and an independent slow version."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.evaluation import behaviour as behaviour_module
from dictlearn.evaluation import context as context_module
from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.lm.load import LM, load_lm
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.evaluation.conftest import (
    CTX,
    D_MODEL,
    N_ROWS,
    autoencoder,
    constant,
    context_of,
    counted_mean,
    true_mlp,
)

ALL = ("ce_zero", "ce_mean", "kl_zero", "kl_mean")


def run(lm: LM, tokens: Tensor, dictionary: Dictionary, n_tokens: int = 10_000, **options: Any) -> dict:
    return Behaviour(n_tokens).run(context_of(lm, tokens, {"x": dictionary}, **options))["x"]["behaviour"]


def masks(tokens: Tensor) -> dict[str, Tensor]:
    holes = tokens != 0
    holes[:, 7:9] = False
    return {"none": torch.ones_like(tokens, dtype=torch.bool), "BOS": tokens != 0, "holes": holes}


def test_clean_loss_is_that_of_hugging_face(lm: LM, tokens: Tensor) -> None:
    expected = lm.model(tokens, labels=tokens).loss.item()
    got = run(lm, tokens, autoencoder(), mask=masks(tokens)["none"])
    assert got["ce_clean"] == pytest.approx(expected, abs=1e-5)
    assert got["n_tokens"] == N_ROWS * (CTX - 1)
    assert got["n_replaced"] == N_ROWS * CTX


def test_masked_loss_is_that_of_hugging_face(lm: LM, tokens: Tensor) -> None:
    """A masked token is not predicted, as with the label -100; what follows it is."""
    mask = masks(tokens)["holes"]
    expected = lm.model(tokens, labels=tokens.masked_fill(~mask, -100)).loss.item()
    got = run(lm, tokens, autoencoder(), mask=mask)
    assert got["ce_clean"] == pytest.approx(expected, abs=1e-5)
    assert got["n_tokens"] == int(mask[:, 1:].sum())
    assert got["n_replaced"] == int(mask.sum())


@pytest.mark.parametrize("mask", ["none", "BOS", "holes"])
def test_identity(lm: LM, tokens: Tensor, mask: str) -> None:
    got = run(lm, tokens, autoencoder(), mask=masks(tokens)[mask])
    assert got["delta_ce"] == pytest.approx(0, abs=1e-6)
    assert got["kl_rec"] == pytest.approx(0, abs=1e-6)
    for name in ALL:
        assert got[f"{name[:2]}_recovered_{name[3:]}"] == pytest.approx(1, abs=1e-5)
        assert got[name] > (got["ce_clean"] if name.startswith("ce") else 0) + 0.01  # the test has teeth


@pytest.mark.parametrize("mask", ["none", "BOS", "holes"])
@pytest.mark.parametrize("site", ["resid_post.1", "attn_out.1", "mlp_out.0"])
def test_zero_predictor_recovers_nothing(lm: LM, tokens: Tensor, mask: str, site: str) -> None:
    """Exactly 0: zero ablation replaces the very positions that the dictionary's zeros replace."""
    got = run(lm, tokens, constant(torch.zeros(D_MODEL), site), mask=masks(tokens)[mask])
    assert got["ce_recovered_zero"] == 0
    assert got["kl_recovered_zero"] == 0


@pytest.mark.parametrize("mask", ["none", "BOS", "holes"])
def test_mean_predictor_recovers_nothing(lm: LM, tokens: Tensor, mask: str) -> None:
    counted = masks(tokens)[mask]
    got = run(lm, tokens, constant(counted_mean(lm, tokens, counted)), mask=counted)
    assert got["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert got["kl_recovered_mean"] == pytest.approx(0, abs=1e-5)
    assert got["ce_rec"] == pytest.approx(got["ce_mean"], abs=1e-6)


def test_against_a_slow_version(lm: LM, tokens: Tensor) -> None:
    """One row at a time with a hook written here, softmax by hand in float64."""
    mask, half = masks(tokens)["holes"], 0.5
    got = run(lm, tokens, autoencoder(half), mask=mask)
    mean = counted_mean(lm, tokens, mask).float()
    ways = {
        "clean": lambda a: a,
        "rec": lambda a: half * a,
        "zero": lambda a: 0 * a,
        "mean": lambda a: 0 * a + mean,
    }
    sums = dict.fromkeys(["ce_clean", "ce_rec", "ce_zero", "ce_mean", "kl_rec", "kl_zero", "kl_mean"], 0.0)
    block = lm.model.get_submodule("transformer.h.1")
    for row, counted in zip(tokens, mask, strict=True):
        log_p: dict[str, list[list[float]]] = {}
        for way, change in ways.items():

            def hook(_module: object, _args: object, output: Tensor, change=change, counted=counted) -> Tensor:
                return torch.where(counted[None, :, None], change(output), output)

            handle = block.register_forward_hook(hook)
            logits = lm.model(row[None]).logits[0].double()
            handle.remove()
            log_p[way] = (logits - logits.exp().sum(-1, keepdim=True).log()).tolist()
        for position in range(CTX - 1):
            if not counted[position + 1]:
                continue
            for way, values in log_p.items():
                sums[f"ce_{way}"] -= values[position][row[position + 1]]
                if way != "clean":
                    pairs = zip(log_p["clean"][position], values[position], strict=True)
                    sums[f"kl_{way}"] += sum(math.exp(p) * (p - q) for p, q in pairs)
    expected = {name: total / got["n_tokens"] for name, total in sums.items()}
    expected["delta_ce"] = expected["ce_rec"] - expected["ce_clean"]
    for way in ("zero", "mean"):
        recovered = expected[f"ce_{way}"] - expected["ce_rec"]
        expected[f"ce_recovered_{way}"] = recovered / (expected[f"ce_{way}"] - expected["ce_clean"])
        expected[f"kl_recovered_{way}"] = 1 - expected["kl_rec"] / expected[f"kl_{way}"]
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert got["ce_rec"] - got["ce_clean"] > 0.01


@pytest.mark.parametrize("batch_rows", [1, 7, 100])
def test_batch_and_chunk_size_do_not_matter(
    lm: LM, tokens: Tensor, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(lm, tokens, autoencoder(0.7))
    monkeypatch.setattr(context_module, "CHUNK_ELEMENTS", 97 * 3)
    order = torch.randperm(N_ROWS)
    assert run(lm, tokens[order], autoencoder(0.7), batch_rows=batch_rows) == pytest.approx(expected, rel=1e-4)


def test_right_padding_changes_nothing(lm: LM, tokens: Tensor) -> None:
    padded = torch.cat([tokens, torch.zeros(N_ROWS, 9, dtype=torch.int64)], dim=1)
    assert run(lm, padded, autoencoder(0.7)) == pytest.approx(run(lm, tokens, autoencoder(0.7)), rel=1e-4)


def test_masked_positions_are_read_by_nobody(lm: LM, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(lm, tokens, autoencoder(0.7))
    true_run = behaviour_module._clean_run

    def checked(
        context: context_module.EvaluationContext, batch: context_module.RowBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, reads = true_run(context, batch)
        assert {len(acts) for acts in reads.values()} == {int(batch.mask.sum())}
        counted = torch.zeros_like(batch.mask)
        counted[:, :-1] = batch.mask[:, 1:]
        return logits.masked_fill(~counted[..., None], math.nan), reads

    monkeypatch.setattr(behaviour_module, "_clean_run", checked)
    assert run(lm, tokens, autoencoder(0.7)) == expected


def test_the_true_mlp_in_place_of_the_mlp(lm: LM, tokens: Tensor) -> None:
    got = run(lm, tokens, true_mlp(lm, 1, "mlp_in.1", "mlp_out.1"))
    assert got["kl_rec"] == pytest.approx(0, abs=1e-6)
    assert got["ce_recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert run(lm, tokens, true_mlp(lm, 1, "mlp_in.1", "mlp_in.1"))["kl_rec"] > 0.01


def test_dictionaries_share_runs_and_keep_their_own_numbers(lm: LM, tokens: Tensor) -> None:
    dictionaries: dict[str, Dictionary] = {
        "half": autoencoder(0.5),
        "zero": constant(torch.zeros(D_MODEL)),
        "mlp": true_mlp(lm, 1, "mlp_in.1", "mlp_out.1"),
    }
    n_forwards = 0

    def count(*_: object) -> None:
        nonlocal n_forwards
        n_forwards += 1

    context = context_of(lm, tokens, dictionaries, batch_rows=N_ROWS)
    context_module.site_means(context, ["resid_post.1", "mlp_out.1"])
    handle = lm.model.get_submodule("transformer.h.2").register_forward_hook(count)
    together = Behaviour().run(context)
    handle.remove()
    assert n_forwards == 1 + 3 + 2 * 2  # clean, one reconstruction each, two ablations of two sites
    for name, d in dictionaries.items():
        assert together[name]["behaviour"] == pytest.approx(run(lm, tokens, d, batch_rows=N_ROWS), rel=1e-6)


def test_several_write_sites_are_replaced_together(lm: LM, tokens: Tensor) -> None:
    """Each with its own part of the reconstruction, which comes from the clean forward."""
    sites = ("resid_post.0", "resid_post.1")
    crosscoder = Crosscoder(D_MODEL, D_MODEL, 32, ReLU(l1=0.0), reads=sites, writes=sites)
    for parameter in crosscoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    got = run(lm, tokens, crosscoder.requires_grad_(False))
    mask = tokens != 0
    hidden = lm.model(tokens, output_hidden_states=True).hidden_states
    recon = crosscoder(torch.stack([hidden[1], hidden[2]], dim=-2)).recon  # [rows, ctx, 2, d]
    handles = []
    for layer in (0, 1):

        def hook(_module: object, _args: object, output: Tensor, layer=layer) -> Tensor:
            return torch.where(mask[..., None], recon[..., layer, :], output)

        handles.append(lm.model.get_submodule(f"transformer.h.{layer}").register_forward_hook(hook))
    expected = lm.model(tokens, labels=tokens.masked_fill(~mask, -100)).loss.item()
    for handle in handles:
        handle.remove()
    assert got["ce_rec"] == pytest.approx(expected, abs=1e-5)


def test_only_the_first_rows(lm: LM, tokens: Tensor) -> None:
    got = run(lm, tokens, autoencoder(0.7), n_tokens=2 * CTX + 1)
    context = context_of(lm, tokens[:3], {"x": autoencoder(0.7)})
    context.means.update(context_module.site_means(context_of(lm, tokens, {"x": autoencoder()}), ["resid_post.1"]))
    assert got == pytest.approx(Behaviour().run(context)["x"]["behaviour"], rel=1e-6)
    assert got["n_tokens"] == int((tokens[:3, 1:] != 0).sum())


def test_an_ablation_that_changes_nothing_is_no_yardstick(lm: LM, tokens: Tensor) -> None:
    """What is replaced at position 1 cannot reach the only counted prediction, that of position 0."""
    sections = Behaviour().run(context_of(lm, tokens[:, :2], {"x": autoencoder(0.5)}))["x"]
    names = [f"{metric}_recovered_{way}" for way in ("zero", "mean") for metric in ("ce", "kl")]
    assert [sections["behaviour"][name] for name in names] == [None] * 4
    assert [warning.split()[0] for warning in sections["warnings"]] == [f"behaviour.{name}" for name in names]


def test_an_ablation_that_helps_is_pointed_out(lm: LM, tokens: Tensor) -> None:
    """Tokens that the LM thinks least likely: knowing nothing is better."""
    unlikely = torch.cat([tokens[:, :1], lm.model(tokens).logits[:, :-1, 1:].argmin(-1) + 1], dim=1)
    sections = Behaviour().run(context_of(lm, unlikely[:, :3], {"x": autoencoder(0.5)}))["x"]
    got = sections["behaviour"]
    assert got["ce_zero"] < got["ce_clean"]
    expected = (got["ce_zero"] - got["ce_rec"]) / (got["ce_zero"] - got["ce_clean"])
    assert got["ce_recovered_zero"] == pytest.approx(expected)
    assert any("ce_recovered_zero: zero ablation lowers the loss" in w for w in sections["warnings"])


def test_a_bfloat16_lm(lm: LM, tokens: Tensor) -> None:
    """The dictionary computes in float32; its reconstruction is rounded to what the LM holds."""
    half = load_lm(lm.name, dtype="bfloat16")
    got = run(half, tokens, autoencoder())
    assert got["kl_rec"] == 0
    assert got["delta_ce"] == 0
    assert got["kl_zero"] > 0.01
    zero = run(half, tokens, constant(torch.zeros(D_MODEL)))
    assert zero["ce_recovered_zero"] == 0


def test_nothing_to_predict_is_an_error(lm: LM, tokens: Tensor) -> None:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    with pytest.raises(DictlearnError, match="predicted"):
        run(lm, tokens, autoencoder(), mask=mask)
