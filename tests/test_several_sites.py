"""Dictionaries over several sites through the two doors: trained, saved, evaluated, continued."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import dictlearn
from dictlearn.config import build
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.evaluation.run import Results
from dictlearn.lm import capture, load_lm, resolve
from dictlearn.training.plan import plan
from dictlearn.training.run import check
from tests.runs import composed, run_evaluate, run_train
from tests.test_config import problems

KINDS = {
    "resid_post.0-3": ("dictionary=crosscoder", "site=resid_post.*"),
    "mlp_out.0-3": ("dictionary=cross_layer", "site=mlp.*"),
}
SMALL = (
    "experiment=single",
    "n_tokens=6_000",
    "evaluation.n_tokens=1_000",
    "evaluation.blocks.behaviour.n_tokens=500",
)


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run_dir(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / name


@pytest.fixture(scope="module")
def results(name: str, run_dir: Path) -> Results:
    return run_train(run_dir, *SMALL, *KINDS[name])


def test_a_run_has_one_dictionary_over_all_sites(name: str, run_dir: Path, results: Results) -> None:
    assert not results.errors
    loaded = dictlearn.load(run_dir)
    assert isinstance(loaded, dict)
    assert list(loaded) == [name]
    layers = range(4)
    if name.startswith("mlp"):
        assert isinstance(loaded[name], CrossLayer)
        assert loaded[name].n_latents == 4 * 2 * 128  # expansion 2 in each layer
        assert loaded[name].reads == tuple(f"mlp_in.{layer}" for layer in layers)
        assert loaded[name].writes == tuple(f"mlp_out.{layer}" for layer in layers)
    else:
        assert isinstance(loaded[name], Crosscoder)
        assert loaded[name].n_latents == 2 * 128
        assert loaded[name].reads == loaded[name].writes == tuple(f"resid_post.{layer}" for layer in layers)
    assert loaded[name].metadata["lm_name"] == "embedded"
    files = {path.name for path in (run_dir / "plots").iterdir()}
    assert {"training.png", f"{name}_l0.png", f"{name}_ce_per_position.png"} <= files
    assert set(pd.read_csv(run_dir / "metrics.csv").columns) >= {f"{name}/fvu", f"{name}/l0"}


def test_the_report_has_every_site(name: str, run_dir: Path, results: Results) -> None:
    report = json.loads((run_dir / "dictionaries" / name / "report.json").read_text())
    section = report["reconstruction"]
    assert list(section["per_site"]) == report["dictionary"]["writes"]
    fvus = [site["fvu"] for site in section["per_site"].values()]
    assert section["fvu"] == pytest.approx(sum(fvus) / 4)
    assert all(0 < fvu < 1 for fvu in fvus)
    per_token = 4 * 4 if name.startswith("mlp") else 4  # k of each layer
    assert 0.7 * per_token < report["sparsity"]["l0"]["mean"] <= per_token
    assert 0 < report["behaviour"]["ce_recovered_zero"] < 1
    table = pd.read_parquet(run_dir / "dictionaries" / name / "latents.parquet")
    assert len(table) == report["dictionary"]["n_latents"]
    assert report["dictionary"]["sparsifier"] == {"kind": "top_k", "k": 4}
    assert results.reports[name]["reconstruction"]["fvu"] == section["fvu"]


def test_the_numbers_are_those_of_the_reconstructions(name: str, run_dir: Path, results: Results) -> None:
    """FVU by site, from the forwards of LM and dictionary alone."""
    lm, dictionary = load_lm("embedded"), dictlearn.load(run_dir / "dictionaries" / name)
    assert isinstance(dictionary, Dictionary)
    rows = build(composed("train", []).data).heldout(lm.tokenizer, 1_000)
    sites = [resolve(lm.model, site) for site in dict.fromkeys((*dictionary.reads, *dictionary.writes))]
    with torch.no_grad(), capture(lm.model, sites) as acts:
        clean = lm.model(rows.tokens).logits
    target, recon = dictionary.select_writes(acts), dictionary(dictionary.select_reads(acts)).recon
    counted, error = target[rows.mask], (target - recon)[rows.mask]
    fvus = error.square().sum((0, 2)) / (counted - counted.mean(0)).square().sum((0, 2))
    by_site = results.reports[name]["reconstruction"]["per_site"]
    assert [by_site[site]["fvu"] for site in dictionary.writes] == pytest.approx(fvus.tolist(), rel=1e-3)
    with torch.no_grad(), dictlearn.attach(lm, dictionary) as run:
        assert torch.equal(run(rows.tokens).logits, clean)
    torch.testing.assert_close(run.recon[name], recon)


def test_evaluate_gives_the_numbers_of_the_training(
    name: str, run_dir: Path, results: Results, tmp_path: Path
) -> None:
    evaluated = run_evaluate(
        f"load={run_dir}", f"out={tmp_path}", "n_tokens=1_000", "evaluation.blocks.behaviour.n_tokens=500"
    )
    assert not evaluated.errors
    for block in ("sparsity", "reconstruction", "behaviour"):
        expected = results.reports[name][block]
        for key, value in evaluated.reports[name][block].items():
            if isinstance(value, float):
                assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (block, key)


@pytest.mark.usefixtures("results")
def test_a_grid_that_starts_from_the_run(name: str, run_dir: Path, tmp_path: Path) -> None:
    more = ("n_tokens=256", "~evaluation.blocks.behaviour", f"init_from={run_dir}", "optimizer.lr=1e-30")
    run_train(tmp_path, *SMALL, *KINDS[name], *more, "grid={sparsifier.k:[2,3]}")
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table.dictionary.tolist() == [f"{name}_k-2", f"{name}_k-3"]
    assert (tmp_path / "plots" / "frontier.png").exists()
    before = dictlearn.load(run_dir / "dictionaries" / name)
    assert isinstance(before, Dictionary)
    assert set(table.site) == {"+".join(before.writes)}
    x = torch.randn(9, 4, 128)
    for k in (2, 3):
        again = dictlearn.load(tmp_path / "dictionaries" / f"{name}_k-{k}")
        assert isinstance(again, Dictionary)
        torch.testing.assert_close(again.pre_activations(x), before.pre_activations(x), rtol=1e-3, atol=1e-3)


def test_the_plan_counts_every_decoder() -> None:
    planned = plan(composed("train", ["experiment=single", "expansion=2", *KINDS["mlp_out.0-3"]]))
    n, d = 256, 128
    n_parameters = 4 * n * d + 4 * n + (4 + 3 + 2 + 1) * n * d + 4 * d
    assert planned.dictionary_disk == 4 * n_parameters
    rows = 8 * 16 * (4 * d + 10 * d)  # of the latents that fire, k in each layer
    assert planned.dictionary_flops == 2_000_000 * (2 * 4 * n * d + rows)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["dictionary=crosscoder", "site=[embed,mlp_hidden.0]"],
            "equally wide, got embed (128), mlp_hidden.0 (512)",
        ),
        (
            ["dictionary=crosscoder", "site=resid_post.*", "normalise=layer_norm"],
            "reads and writes one site, not resid_post.0 and resid_post.1",
        ),
        (["dictionary=crosscoder", "sites=resid_post.*"], "one dictionary over several sites"),
        (["dictionary=cross_layer", "site=mlp.*", "sparsifier.k=2_000"], "at most n_latents = 1024, got 2000"),
        (
            ["dictionary=crosscoder", "site=[resid_post.0,resid_post.1,resid_pre.2]"],
            "the sites of one dictionary must have different activations, but resid_post.1, resid_pre.2 are names "
            "of one tensor of this LM: leave all but one out",
        ),
        (
            ["dictionary=crosscoder", "site=[transformer.h.1,resid_post.1]"],
            "transformer.h.1, resid_post.1 are names",
        ),
        (["dictionary=crosscoder", "site=[attn_out.1,transformer.h.1.attn.c_proj]"], "names of one tensor"),
        (["dictionary=cross_layer", "site=mlp.*", "sites=mlp.*"], "site and sites cannot both be given"),
    ],
)
def test_preflight_refuses(overrides: list[str], message: str) -> None:
    assert message in problems("experiment=single", *overrides)


def test_sites_of_one_layer_are_different_activations() -> None:
    sites = "site=[embed,resid_pre.0,attn_out.0,resid_mid.0,mlp_in.0,mlp_out.0,resid_post.0]"
    given = ["experiment=single", "dictionary=crosscoder", sites]
    check(composed("train", given), given)
