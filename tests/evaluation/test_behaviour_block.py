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
    flat,
    forwards_counted,
    true_mlp,
)

ALL = ("ce_zero", "ce_mean", "kl_zero", "kl_mean")


def run(lm: LM, tokens: Tensor, dictionary: Dictionary, n_tokens: int = 10_000, **options: Any) -> dict:
    return Behaviour(n_tokens).run(context_of(lm, tokens, {"x": dictionary}, **options))["x"]["behaviour"]


@pytest.fixture(autouse=True)
def all_yardsticks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random LM of twelve rows: most changes of its loss are noise."""
    if request.function is not test_an_ablation_within_its_noise_is_no_yardstick:
        monkeypatch.setattr(behaviour_module, "NOISE", 0.0)


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
    assert got["top1_agree"] == 1
    assert got["stderr"]["delta_ce"] < 1e-6 < got["stderr"]["ce_clean"]  # paired
    for name in ALL:
        assert got[f"{name[:2]}_recovered_{name[3:]}"] == pytest.approx(1, abs=1e-5)
        assert got["stderr"][f"{name[:2]}_recovered_{name[3:]}"] == pytest.approx(0, abs=1e-5)
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
    names = ["ce_clean", "ce_rec", "ce_zero", "ce_mean", "kl_rec", "kl_zero", "kl_mean", "top1_agree"]
    sums: dict[str, float] = dict.fromkeys(names, 0.0)
    by_row: list[dict[str, float]] = []
    by_position: dict[str, list[list[float]]] = {way: [[] for _ in range(CTX - 1)] for way in ways}
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
        before = dict(sums)
        for position in range(CTX - 1):
            if not counted[position + 1]:
                continue
            best = [max(range(97), key=log_p[way][position].__getitem__) for way in ("clean", "rec")]
            sums["top1_agree"] += best[0] == best[1]
            for way, values in log_p.items():
                by_position[way][position].append(-values[position][row[position + 1]])
                sums[f"ce_{way}"] -= values[position][row[position + 1]]
                if way != "clean":
                    pairs = zip(log_p["clean"][position], values[position], strict=True)
                    sums[f"kl_{way}"] += sum(math.exp(p) * (p - q) for p, q in pairs)
        by_row.append({name: sums[name] - before[name] for name in names})
    expected = {name: total / got["n_tokens"] for name, total in sums.items()}
    expected["delta_ce"] = expected["ce_rec"] - expected["ce_clean"]
    for way in ("zero", "mean"):
        recovered = expected[f"ce_{way}"] - expected["ce_rec"]
        expected[f"ce_recovered_{way}"] = recovered / (expected[f"ce_{way}"] - expected["ce_clean"])
        expected[f"kl_recovered_{way}"] = 1 - expected["kl_rec"] / expected[f"kl_{way}"]
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert got["ce_rec"] - got["ce_clean"] > 0.01
    assert 0.05 < got["top1_agree"] < 0.95
    for way, at_positions in by_position.items():
        means = [sum(values) / len(values) if values else None for values in at_positions]
        assert got["ce_per_position"][way] == [m if m is None else pytest.approx(m, rel=1e-4) for m in means]
    assert got["n_tokens_per_position"] == [len(values) for values in by_position["clean"]]
    n = mask[:, 1:].sum(1).tolist()

    def stderr(name: str) -> float:
        sum_sq = sum((row[name] - expected[name] * m) ** 2 for row, m in zip(by_row, n, strict=True))
        return math.sqrt(N_ROWS / (N_ROWS - 1) * sum_sq) / sum(n)

    for row in by_row:
        row["delta_ce"] = row["ce_rec"] - row["ce_clean"]
    for name in [*names, "delta_ce"]:
        assert got["stderr"][name] == pytest.approx(stderr(name), rel=1e-3), name
    # of a recovered share by leaving out a row at a time (the jackknife), which agrees in first order
    for way in ("zero", "mean"):
        left_out = []
        for row in by_row:
            ablated, rec, clean = (sums[f"ce_{w}"] - row[f"ce_{w}"] for w in (way, "rec", "clean"))
            left_out.append((ablated - rec) / (ablated - clean))
        spread = torch.tensor(left_out).std().item() * (N_ROWS - 1) / math.sqrt(N_ROWS)
        assert got["stderr"][f"ce_recovered_{way}"] == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("batch_rows", [1, 7, 100])
def test_batch_and_chunk_size_do_not_matter(
    lm: LM, tokens: Tensor, batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(lm, tokens, autoencoder(0.7))
    monkeypatch.setattr(context_module, "CHUNK_ELEMENTS", 97 * 3)
    order = torch.randperm(N_ROWS)
    got = run(lm, tokens[order], autoencoder(0.7), batch_rows=batch_rows)
    assert flat(got) == pytest.approx(flat(expected), rel=1e-4, abs=1e-7, nan_ok=True)


def test_right_padding_changes_nothing(lm: LM, tokens: Tensor) -> None:
    padded = torch.cat([tokens, torch.zeros(N_ROWS, 9, dtype=torch.int64)], dim=1)
    got, expected = run(lm, padded, autoencoder(0.7)), run(lm, tokens, autoencoder(0.7))
    assert not any(got["n_tokens_per_position"][CTX - 1 :])
    got["ce_per_position"] = {way: ces[: CTX - 1] for way, ces in got["ce_per_position"].items()}
    got["n_tokens_per_position"] = got["n_tokens_per_position"][: CTX - 1]
    assert flat(got) == pytest.approx(flat(expected), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_masked_positions_are_read_by_nobody(
    lm: LM, tokens: Tensor, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the logits of predictions that do not count nor activations at masked positions."""
    expected = run(lm, tokens, autoencoder(0.7))
    true_run, true_activations = behaviour_module._clean_run, context_module.activations

    def poisoned_run(
        context: context_module.EvaluationContext, batch: context_module.RowBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, reads = true_run(context, batch)
        counted = torch.zeros_like(batch.mask)
        counted[:, :-1] = batch.mask[:, 1:]
        hidden = {name: acts.masked_fill(~batch.mask[..., None], poison) for name, acts in reads.items()}
        return logits.masked_fill(~counted[..., None], poison), hidden

    def poisoned(model: Any, sites: Any, input_ids: Tensor) -> dict[str, Tensor]:
        acts = true_activations(model, sites, input_ids)
        return {name: act.masked_fill((input_ids == 0)[..., None], poison) for name, act in acts.items()}

    monkeypatch.setattr(behaviour_module, "_clean_run", poisoned_run)
    monkeypatch.setattr(context_module, "activations", poisoned)
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
    context = context_of(lm, tokens, dictionaries, batch_rows=N_ROWS)
    context_module.target_means(context)
    with forwards_counted(lm) as forwards:
        together = Behaviour().run(context)
    assert len(forwards) == 1 + 3 + 2 * 2  # clean, one reconstruction each, two ablations of two sites
    for name, d in dictionaries.items():
        alone = run(lm, tokens, d, batch_rows=N_ROWS)
        assert flat(together[name]["behaviour"]) == pytest.approx(flat(alone), rel=1e-6, nan_ok=True)
    one = context_of(lm, tokens, {"half": dictionaries["half"]}, batch_rows=N_ROWS)
    with forwards_counted(lm) as forwards:
        Behaviour().run(one)
    assert len(forwards) == 1 + 1 + 1 + 2  # the means; clean, one reconstruction, two ablations


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
    context.means.update(context_module.target_means(context_of(lm, tokens, {"x": autoencoder()})))
    expected = Behaviour().run(context)["x"]["behaviour"]
    assert flat(got) == pytest.approx(flat(expected), rel=1e-6, nan_ok=True)
    assert got["n_rows"] == 3
    assert got["n_tokens"] == int((tokens[:3, 1:] != 0).sum())


def test_an_ablation_that_changes_nothing_is_no_yardstick(lm: LM, tokens: Tensor) -> None:
    """What is replaced at position 1 cannot reach the only counted prediction, that of position 0."""
    sections = Behaviour().run(context_of(lm, tokens[:, :2], {"x": autoencoder(0.5)}))["x"]
    names = [f"{metric}_recovered_{way}" for way in ("zero", "mean") for metric in ("ce", "kl")]
    assert [sections["behaviour"][name] for name in names] == [None] * 4
    assert [warning.split()[0] for warning in sections["warnings"]] == [f"behaviour.{name}" for name in names]


def test_an_ablation_within_its_noise_is_no_yardstick(lm: LM, tokens: Tensor) -> None:
    """delta CE of the zero predictor is what zero ablation changes, so its standard error is that of the change."""
    seen = set()
    for site in ("resid_post.1", "attn_out.1", "mlp_out.0"):
        for mask in masks(tokens).values():
            context = context_of(lm, tokens, {"x": constant(torch.zeros(D_MODEL), site)}, mask=mask)
            sections = Behaviour().run(context)["x"]
            got = sections["behaviour"]
            noisy = abs(got["delta_ce"]) < 2 * got["stderr"]["delta_ce"]
            assert (got["ce_recovered_zero"] is None) == (got["stderr"]["ce_recovered_zero"] is None) == noisy
            said = f"nats, and the standard error of that is {got['stderr']['delta_ce']:.1e}"
            assert any(said in w and "ce_recovered_zero is null" in w for w in sections["warnings"]) == noisy
            assert got["kl_recovered_zero"] == 0
            seen.add(noisy)
    assert seen == {True, False}


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
