"""Tokens of outlying norm: which they are, and that they move nothing."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.evaluation import behaviour as behaviour_module
from dictlearn.evaluation import context as context_module
from dictlearn.evaluation import evaluate
from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.evaluation.context import target_means
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.lm.load import LM
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.evaluation.conftest import (
    CTX,
    D_MODEL,
    N_ROWS,
    autoencoder,
    context_of,
    flat,
    forwards_counted,
    true_mlp,
)

RATIO = 1.15  # filters some tokens at every site of the tiny LM, and not most


def kept(lm: LM, tokens: Tensor, sites: tuple[str, ...], ratio: float = RATIO) -> Tensor:
    """A slow version, with hooks written here: sites are outputs (or inputs) of MLPs and blocks."""
    seen: dict[str, Tensor] = {}
    handles = []
    for layer in range(3):
        block = lm.model.get_submodule(f"transformer.h.{layer}")

        def save(name: str, index: int):
            def hook(module: Any, args: Any, output: Any) -> None:
                value = args[0] if index else output
                seen[name] = value[0] if isinstance(value, tuple) else value

            return hook

        mlp = block.get_submodule("mlp")
        handles.append(block.register_forward_hook(save(f"resid_post.{layer}", 0)))
        handles.append(mlp.register_forward_hook(save(f"mlp_out.{layer}", 0)))
        handles.append(mlp.register_forward_hook(save(f"mlp_in.{layer}", 1)))
    lm.model(tokens)
    for handle in handles:
        handle.remove()
    mask = tokens != 0
    keep = mask.clone()
    for site in sites:
        norms = seen[site].double().norm(dim=-1)
        keep &= norms <= ratio * np.median(norms[mask].numpy())
    return keep


def sections(lm: LM, tokens: Tensor, dictionaries: dict[str, Dictionary], **options: Any) -> dict[str, dict]:
    context = context_of(lm, tokens, dictionaries, **options)
    found = Reconstruction().run(context)
    for name, more in Behaviour().run(context).items():
        found[name] |= more
    return found


def some() -> dict[str, Dictionary]:
    return {"sae": autoencoder(0.7), "other": autoencoder(0.5), "late": autoencoder(0.7, site="resid_post.2")}


def test_it_is_the_mask_without_those_tokens(lm: LM, tokens: Tensor) -> None:
    """Every number is that of a run whose mask leaves them out, of each dictionary by its own sites."""
    dictionaries = some() | {"mlp": true_mlp(lm, 1, "mlp_in.1", "mlp_out.1")}
    got = sections(lm, tokens, dictionaries, max_norm_ratio=RATIO)
    masks = []
    for name, d in dictionaries.items():
        mask = kept(lm, tokens, (*d.reads, *d.writes))
        masks.append(mask)
        assert 0.4 * tokens.numel() < mask.sum() < (tokens != 0).sum()  # the test has teeth
        alone = sections(lm, tokens, {name: d}, mask=mask)[name]
        for block in ("sparsity", "geometry", "reconstruction", "behaviour", "histograms"):
            assert flat(got[name][block]) == pytest.approx(flat(alone[block]), rel=1e-5, abs=1e-6, nan_ok=True)
        pd.testing.assert_frame_equal(got[name]["tables"]["latents"], alone["tables"]["latents"], rtol=1e-5)
        assert got[name]["behaviour"]["n_replaced"] == mask.sum()
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])


@pytest.mark.parametrize("batch_rows", [1, 7])
def test_batch_size_and_company_do_not_matter(lm: LM, tokens: Tensor, batch_rows: int) -> None:
    together = sections(lm, tokens, some(), max_norm_ratio=RATIO)
    for name, d in some().items():
        alone = sections(lm, tokens, {name: d}, max_norm_ratio=RATIO, batch_rows=batch_rows)[name]
        for block in ("sparsity", "reconstruction", "behaviour"):
            expected = flat(together[name][block])
            assert flat(alone[block]) == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


def test_all_sites_of_a_dictionary_count(lm: LM, tokens: Tensor) -> None:
    sites = ("resid_post.0", "resid_post.2")
    crosscoder = Crosscoder(D_MODEL, D_MODEL, 4, ReLU(l1=0.0), reads=sites, writes=sites).requires_grad_(False)
    context = context_of(lm, tokens, {"x": crosscoder}, max_norm_ratio=RATIO)
    assert torch.equal(context.masks[sites], kept(lm, tokens, sites))


def test_one_more_pass_and_only_with_a_ratio(lm: LM, tokens: Tensor) -> None:
    n_passes = {}
    for ratio, names in product((None, RATIO), (("sae",), ("sae", "other", "late"))):
        context = context_of(lm, tokens, {name: some()[name] for name in names}, max_norm_ratio=ratio)
        with forwards_counted(lm) as forwards:
            target_means(context)
            Reconstruction().run(context)
        n_passes[ratio, len(names)] = len(forwards) / math.ceil(N_ROWS / 5)
    assert n_passes == {(None, 1): 2, (None, 3): 2, (RATIO, 1): 3, (RATIO, 3): 3}


def test_ablations_are_shared_where_the_tokens_are_the_same(lm: LM, tokens: Tensor) -> None:
    """A transcoder that writes the same site filters by its read site too, so its ablations are its own."""
    dictionaries: dict[str, Dictionary] = {
        "a": autoencoder(0.5, site="mlp_out.1"),
        "b": autoencoder(0.7, site="mlp_out.1"),
        "t": true_mlp(lm, 1, "mlp_in.1", "mlp_out.1"),
    }
    n_forwards = {}
    for ratio in (None, RATIO):
        context = context_of(lm, tokens, dictionaries, batch_rows=N_ROWS, max_norm_ratio=ratio)
        target_means(context)
        with forwards_counted(lm) as forwards:
            Behaviour().run(context)
        n_forwards[ratio] = len(forwards)
    assert n_forwards == {None: 1 + 3 + 2, RATIO: 1 + 3 + 2 + 2}


def test_the_report_says_how_many(lm: LM, tokens: Tensor, out_dir: Path) -> None:
    context = context_of(lm, tokens, some(), max_norm_ratio=RATIO)
    evaluate(context, {"reconstruction": Reconstruction()}, {name: out_dir / name for name in some()})
    for name, d in some().items():
        report = json.loads((out_dir / name / "report.json").read_text())
        n_counted = int(kept(lm, tokens, d.reads).sum())
        n_filtered = int((tokens != 0).sum()) - n_counted
        assert n_filtered > 0
        expected = {"max_norm_ratio": RATIO, "n_norm_filtered": n_filtered, "n_counted": n_counted}
        assert expected.items() <= report["data"].items()
        assert report["data"]["n_masked"] == N_ROWS * CTX - n_counted
        assert report["reconstruction"]["n_tokens"] == n_counted
        assert report["reconstruction"]["fvu_incl_masked"] != report["reconstruction"]["fvu"]


@pytest.mark.parametrize("poison", [1e6, math.nan])
def test_poisoned_tokens_move_nothing(
    lm: LM, tokens: Tensor, poison: float, monkeypatch: pytest.MonkeyPatch, out_dir: Path
) -> None:
    """Counted tokens with absurd activations are found and then change nothing but `fvu_incl_masked`."""
    poisoned = torch.zeros_like(tokens, dtype=torch.bool)
    poisoned[2, 4] = poisoned[7, 15] = True
    true_activations, true_run = context_module.activations, behaviour_module._clean_run

    def at(input_ids: Tensor) -> Tensor:
        (first,) = [i for i in range(N_ROWS) if torch.equal(tokens[i : i + len(input_ids)], input_ids)]
        return poisoned[first : first + len(input_ids), :, None]

    def poisoned_activations(model: Any, sites: Any, input_ids: Tensor) -> dict[str, Tensor]:
        acts = true_activations(model, sites, input_ids)
        return {name: act.masked_fill(at(input_ids), poison) for name, act in acts.items()}

    def poisoned_run(context: Any, batch: Any) -> Any:
        logits, reads = true_run(context, batch)
        return logits, {name: act.masked_fill(at(batch.tokens), poison) for name, act in reads.items()}

    blocks = {"reconstruction": Reconstruction(), "behaviour": Behaviour()}
    out_dirs = {name: out_dir / name for name in some()}
    expected = evaluate(context_of(lm, tokens, some(), mask=(tokens != 0) & ~poisoned), blocks, out_dirs).reports
    monkeypatch.setattr(context_module, "activations", poisoned_activations)
    monkeypatch.setattr(behaviour_module, "_clean_run", poisoned_run)
    got = evaluate(context_of(lm, tokens, some(), max_norm_ratio=50.0), blocks, out_dirs).reports
    for name in some():
        assert got[name]["data"]["n_norm_filtered"] == 2
        incl = got[name]["reconstruction"].pop("fvu_incl_masked")
        assert incl != expected[name]["reconstruction"].pop("fvu_incl_masked")
        warnings = [w for w in got[name]["warnings"] if "fvu_incl_masked" in w]
        assert (incl, len(warnings)) == (None, 1) if math.isnan(poison) else warnings == []
        for block in ("sparsity", "geometry", "reconstruction", "behaviour", "histograms"):
            assert got[name][block] == expected[name][block]


@pytest.mark.filterwarnings("error")
def test_a_ratio_that_leaves_nothing_is_refused(lm: LM, tokens: Tensor) -> None:
    for ratio in (1.0, 0.0, -3.0, math.nan):
        with pytest.raises(DictlearnError, match="max_norm_ratio must be null or above 1"):
            context_of(lm, tokens, some(), max_norm_ratio=ratio)
    context = context_of(lm, tokens, some(), max_norm_ratio=RATIO)
    nan = torch.full(tokens.shape, math.nan)
    context.norms.update({"resid_post.1": nan, "resid_post.2": nan})
    with pytest.raises(DictlearnError, match=r"No token is left for 'sae': at one of resid_post.1"):
        Reconstruction().run(context)
