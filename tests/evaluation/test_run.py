"""evaluate(): the report, and what is kept when a block or a dictionary fails."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pyarrow import ArrowInvalid, parquet
from torch import Tensor

from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import EvaluationContext, Results, evaluate
from dictlearn.evaluation.behaviour import Behaviour
from dictlearn.evaluation.reconstruction import Reconstruction
from dictlearn.evaluation.report import without_nan, write_report, write_table
from dictlearn.evaluation.table import COLUMNS, report_table
from dictlearn.lm.load import LM
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError
from tests.evaluation.conftest import CTX, D_MODEL, N_ROWS, autoencoder, constant, context_of, true_mlp

L0_KEYS = {"mean", "median", "p5", "p95", "stderr"}
SPARSITY_KEYS = {"l0", "l1_mean", "n_dead", "frac_dead", "n_below", "frac_over", "mass_over", "n_tokens"}
RECONSTRUCTION_KEYS = {
    *("fvu", "fve", "fvu_centred", "fvu_incl_masked", "mse_per_token", "mse_per_dim", "cosine", "l2_ratio"),
    *("relative_bias", "fvu_token_p5", "fvu_token_median", "fvu_token_p95", "fvu_token_mean", "stderr"),
    *("fvu_per_position", "n_tokens_per_position", "n_zero_norm", "n_tokens"),
}
BEHAVIOUR_KEYS = {
    *("ce_clean", "ce_rec", "ce_zero", "ce_mean", "delta_ce", "ce_recovered_zero", "ce_recovered_mean"),
    *("kl_rec", "kl_zero", "kl_mean", "kl_recovered_zero", "kl_recovered_mean", "top1_agree", "stderr"),
    *("ce_per_position", "n_tokens_per_position", "n_tokens", "n_replaced", "n_rows"),
}


class Broken:
    """Fails for one dictionary, or for every one."""

    def __init__(self, culprit: str | None = None) -> None:
        self.culprit = culprit

    def run(self, context: EvaluationContext) -> dict[str, dict[str, Any]]:
        if self.culprit is None or self.culprit in context.dictionaries:
            raise RuntimeError("out of luck")
        return {name: {"luck": {"value": 1.0}} for name in context.dictionaries}


def blocks() -> dict[str, Any]:
    return {"reconstruction": Reconstruction(), "behaviour": Behaviour(n_tokens=100)}


def dirs(context: EvaluationContext, out_dir: Path) -> dict[str, Path]:
    return {name: out_dir / name for name in context.dictionaries}


@pytest.fixture
def context(lm: LM, tokens: Tensor) -> EvaluationContext:
    return context_of(lm, tokens, {"a": autoencoder(0.7), "t": true_mlp(lm, 1, "mlp_in.1", "mlp_out.1")})


def strict(file: Path) -> dict[str, Any]:
    """NaN and Infinity are no JSON."""
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {file}"))


def test_report(context: EvaluationContext, out_dir: Path) -> None:
    results = evaluate(context, blocks(), dirs(context, out_dir))
    assert results.errors == []
    for name in context.dictionaries:
        report = strict(out_dir / name / "report.json")
        assert report == results.reports[name]
        assert report["schema_version"] == 1
        assert report["sparsity"]["l0"].keys() == L0_KEYS
        assert report["sparsity"].keys() == SPARSITY_KEYS
        assert report["sparsity"]["n_below"].keys() == {"1e-5", "1e-6", "1e-7"}
        assert report["sparsity"]["frac_over"].keys() == report["sparsity"]["mass_over"].keys() == {"1e-2", "1e-1"}
        assert report["geometry"].keys() == {"n_duplicates", "mean_max_decoder_cosine"}
        assert report["reconstruction"].keys() == RECONSTRUCTION_KEYS
        assert report["behaviour"].keys() == BEHAVIOUR_KEYS
        assert "tables" not in report
        assert list(report)[-2:] == ["warnings", "errors"]
        null = [key for key, value in report["behaviour"].items() if value is None]  # so few rows are noisy
        assert set(null) <= {"ce_recovered_zero", "ce_recovered_mean"}
        assert [w.split(" is null: ")[0] for w in report["warnings"]] == [f"behaviour.{key}" for key in null]
        assert all("the standard error of that is" in warning for warning in report["warnings"])
    report = results.reports["t"]
    expected = {"name": "t", "kind": "linear", "reads": ["mlp_in.1"], "writes": ["mlp_out.1"], "skip": False}
    assert expected.items() <= report["dictionary"].items()
    assert report["lm"] == {
        "name": context.lm.name,
        "revision": None,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    n_counted = N_ROWS * (CTX - 1) - 4
    assert report["data"] == {
        "name": "random",
        "n_rows": N_ROWS,
        "ctx": CTX,
        "n_tokens": N_ROWS * CTX,
        "n_counted": n_counted,
        "n_masked": N_ROWS + 4,
        "max_norm_ratio": None,
        "n_norm_filtered": 0,
    }
    assert report["reconstruction"]["n_tokens"] == n_counted
    assert report["compute"]["seconds"] == pytest.approx(sum(report["compute"]["seconds_by_block"].values()))
    assert report["compute"]["device"] == "cpu"


def test_nothing_is_left_beside_the_report(context: EvaluationContext, out_dir: Path) -> None:
    evaluate(context, {"reconstruction": Reconstruction()}, dirs(context, out_dir))
    assert sorted(file.name for file in (out_dir / "a").iterdir()) == ["latents.parquet", "report.json"]


def test_the_table_of_latents(lm: LM, tokens: Tensor, out_dir: Path) -> None:
    """What is not defined is null on disk, not NaN; directions are compared where they are equally wide."""
    narrow = Linear(D_MODEL, 4 * D_MODEL, 8, ReLU(l1=0.0), reads=("resid_post.1",), writes=("mlp_hidden.1",))
    context = context_of(lm, tokens, {"a": autoencoder(-0.5), "dead": constant(torch.ones(16)), "narrow": narrow})
    evaluate(context, {"reconstruction": Reconstruction()}, dirs(context, out_dir))
    columns = {"latent": "int64", "count": "int64", "density": "double", "mean": "double", "max": "float"}
    columns |= {"decoder_norm": "float", "encoder_decoder_cosine": "double", "nearest_latent": "int64"}
    columns |= {"nearest_cosine": "float"}
    tables = {name: parquet.read_table(out_dir / name / "latents.parquet") for name in context.dictionaries}
    for table in tables.values():
        assert {field.name: str(field.type) for field in table.schema} == columns
    a = tables["a"].to_pydict()
    assert a["latent"] == list(range(2 * D_MODEL))
    assert all(count > 0 for count in a["count"])
    n_counted = int((tokens != 0).sum())
    assert a["density"] == [count / n_counted for count in a["count"]]
    x = lm.model(tokens, output_hidden_states=True).hidden_states[2][tokens != 0].double()
    assert a["max"] == pytest.approx([*x.amax(0).tolist(), *(-x).amax(0).tolist()], rel=1e-5)
    active = [column[column > 0].mean().item() for column in [*x.T, *(-x).T]]
    assert a["mean"] == pytest.approx(active, rel=1e-5)
    assert a["decoder_norm"] == [0.5] * (2 * D_MODEL)
    assert a["encoder_decoder_cosine"] == pytest.approx([-1] * (2 * D_MODEL))
    assert a["nearest_cosine"] == [0] * (2 * D_MODEL)
    dead = tables["dead"].to_pydict()
    assert dead["count"] == dead["density"] == dead["decoder_norm"] == [0] * 8
    for name in ("mean", "max", "encoder_decoder_cosine", "nearest_latent", "nearest_cosine"):
        assert dead[name] == [None] * 8
    assert tables["narrow"].to_pydict()["encoder_decoder_cosine"] == [None] * 8


def test_a_failed_table_leaves_the_old_one(out_dir: Path) -> None:
    file = write_table(pd.DataFrame({"a": [1]}), out_dir / "t.parquet")
    with pytest.raises(ArrowInvalid):
        write_table(pd.DataFrame({"a": [1, "x", object()]}), file)
    assert pd.read_parquet(file).a.tolist() == [1]
    assert [path.name for path in out_dir.iterdir()] == ["t.parquet"]


def test_warnings_given_beforehand_are_in_the_report(lm: LM, tokens: Tensor, out_dir: Path) -> None:
    context = replace(
        context_of(lm, tokens, {"a": constant(torch.ones(D_MODEL)), "b": autoencoder()}), warnings={"a": ["beware"]}
    )
    reports = evaluate(context, {"reconstruction": Reconstruction()}, dirs(context, out_dir)).reports
    assert reports["a"]["warnings"][0] == "beware"
    assert any("the mean of the target reconstructs it better" in warning for warning in reports["a"]["warnings"])
    assert reports["b"]["warnings"] == []


def test_sha256_of_the_weights(lm: LM, tokens: Tensor, out_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    context = EvaluationContext(
        lm, {"a": autoencoder(), "b": autoencoder()}, tokens, tokens != 0, weight_files={"a": file}
    )
    reports = evaluate(context, {}, dirs(context, out_dir)).reports
    assert reports["a"]["dictionary"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert reports["b"]["dictionary"]["sha256"] is None


def test_a_failing_block_keeps_what_was_computed(context: EvaluationContext, out_dir: Path) -> None:
    several = {"reconstruction": Reconstruction(), "broken": Broken(), "behaviour": Behaviour(n_tokens=100)}
    results = evaluate(context, several, dirs(context, out_dir))
    assert results.errors == [f"{name}: broken: RuntimeError: out of luck" for name in context.dictionaries]
    for name in context.dictionaries:
        report = strict(out_dir / name / "report.json")
        assert report["errors"] == ["broken: RuntimeError: out of luck"]
        assert report["reconstruction"].keys() == RECONSTRUCTION_KEYS
        assert report["behaviour"].keys() == BEHAVIOUR_KEYS


def test_one_broken_dictionary_does_not_cost_the_others_their_numbers(
    context: EvaluationContext, out_dir: Path
) -> None:
    results = evaluate(context, {"luck": Broken(culprit="t")}, dirs(context, out_dir))
    assert results.errors == ["t: luck: RuntimeError: out of luck"]
    assert strict(out_dir / "a" / "report.json")["luck"] == {"value": 1.0}
    assert "luck" not in results.reports["t"]


def test_the_report_is_on_disk_after_every_block(context: EvaluationContext, out_dir: Path) -> None:
    class Interrupted:
        def run(self, context: EvaluationContext) -> dict[str, dict[str, Any]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(context, {"reconstruction": Reconstruction(), "last": Interrupted()}, dirs(context, out_dir))
    assert strict(out_dir / "a" / "report.json")["reconstruction"]["fvu"] > 0


def test_undefined_numbers_are_null_with_a_warning(lm: LM, tokens: Tensor, out_dir: Path) -> None:
    context = context_of(lm, tokens, {"zero": constant(torch.zeros(D_MODEL))})
    report = evaluate(context, blocks(), dirs(context, out_dir)).reports["zero"]
    assert strict(out_dir / "zero" / "report.json")["reconstruction"]["cosine"] is None
    assert report["reconstruction"]["relative_bias"] is None
    assert [warning.split()[0] for warning in report["warnings"]] == [
        "reconstruction.fvu",
        "sparsity.mass_over.1e-1",
        "sparsity.mass_over.1e-2",
        "geometry.mean_max_decoder_cosine",
        "reconstruction.cosine",
        "reconstruction.relative_bias",
        "reconstruction.stderr.cosine",
        "reconstruction.stderr.relative_bias",
    ]


def test_a_dictionary_with_nan_weights_reports_no_number(lm: LM, tokens: Tensor, out_dir: Path) -> None:
    context = context_of(lm, tokens, {"nan": constant(torch.full((D_MODEL,), math.nan)), "a": autoencoder(0.7)})
    reports = evaluate(context, blocks(), dirs(context, out_dir)).reports
    nan = strict(out_dir / "nan" / "report.json")
    assert nan["reconstruction"]["fvu"] is None
    assert nan["behaviour"]["ce_rec"] is None
    assert nan["behaviour"]["ce_recovered_zero"] is None
    assert nan["behaviour"]["ce_zero"] == reports["a"]["behaviour"]["ce_zero"]
    assert len(nan["warnings"]) >= 8
    assert reports["a"]["warnings"] == []


def test_without_nan_names_the_place() -> None:
    section = {"a": [1.0, math.inf], "b": {"c": math.nan, "d": True, "e": "nan", "f": 3}}
    clean, warnings = without_nan(section, "s")
    assert clean == {"a": [1.0, None], "b": {"c": None, "d": True, "e": "nan", "f": 3}}
    assert warnings == ["s.a[1] is null: its value is inf", "s.b.c is null: its value is nan"]


def test_lists_of_numbers_are_one_line(tmp_path: Path) -> None:
    report = {"a": {"b": [1, -2.5, 1e-7], "c": ["x [1,\n 2]", None], "d": []}, "e": [[1, 2], [3]], "f": [1.5, None]}
    file = write_report(report, tmp_path)
    assert strict(file) == report
    assert "[ 1, -2.5, 1e-07 ]" in file.read_text()
    assert "[ 1.5, null ]" in file.read_text()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path) -> None:
    file = write_report({"a": 1}, tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report({"a": math.nan}, tmp_path)
    assert strict(file) == {"a": 1}


def test_a_dictionary_of_another_width_is_refused_before_anything_runs(
    lm: LM, tokens: Tensor, out_dir: Path
) -> None:
    sae = Linear(D_MODEL + 1, D_MODEL + 1, 8, ReLU(l1=0.0), reads=("resid_post.1",), writes=("resid_post.1",))
    context = context_of(lm, tokens, {"wide": sae})
    with pytest.raises(DictlearnError, match=r"'wide' is 17 wide at resid_post.1, where .* is 16"):
        evaluate(context, blocks(), dirs(context, out_dir))
    assert not out_dir.exists()


def test_context_without_counted_tokens_is_refused(lm: LM, tokens: Tensor) -> None:
    with pytest.raises(DictlearnError, match="all are masked"):
        context_of(lm, tokens, {"a": autoencoder()}, mask=torch.zeros_like(tokens, dtype=torch.bool))


def test_table(context: EvaluationContext, out_dir: Path) -> None:
    results: Results = evaluate(context, {"reconstruction": Reconstruction()}, dirs(context, out_dir))
    table = report_table(results.reports)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["dictionary"] == ["a", "t"]
    assert cells["FVU"][0] == f"{results.reports['a']['reconstruction']['fvu']:.4f}"
    assert cells["delta\nCE"] == ["-", "-"]  # the block did not run
    assert len(cells) == 1 + len(COLUMNS)


def test_every_column_of_the_table_is_in_the_report(context: EvaluationContext, out_dir: Path) -> None:
    reports = evaluate(context, blocks(), dirs(context, out_dir)).reports
    table = report_table(reports)
    noisy = [r["behaviour"][f"ce_recovered_{kind}"] is None for r in reports.values() for kind in ("zero", "mean")]
    assert [cell for column in table.columns for cell in column.cells].count("-") == sum(noisy)


def test_the_table_says_what_is_measured_on_which_tokens(context: EvaluationContext, out_dir: Path) -> None:
    reports = evaluate(context, blocks(), dirs(context, out_dir)).reports
    n_counted, behaviour = reports["a"]["data"]["n_counted"], reports["a"]["behaviour"]
    assert behaviour["n_tokens"] < n_counted
    expected = f"{n_counted} held-out tokens; CE and KL of {behaviour['n_tokens']} predictions in the first rows"
    assert report_table(reports).title == f"{expected}, clean CE {behaviour['ce_clean']:.4f} nats"
    reports["t"]["data"]["n_counted"] = 12_345
    assert str(report_table(reports).title).startswith(f"{n_counted} to 12,345 held-out tokens; CE")
    del reports["a"]["behaviour"], reports["t"]["behaviour"]
    assert report_table(reports).title == f"{n_counted} to 12,345 held-out tokens"


def test_recovered_shares_outside_0_and_1_are_marked(context: EvaluationContext, out_dir: Path) -> None:
    reports = evaluate(context, blocks(), dirs(context, out_dir)).reports
    for inside in (0.0, 0.5, 1.0):
        for report in reports.values():
            report["behaviour"] |= {"ce_recovered_zero": inside, "ce_recovered_mean": inside, "kl_rec": 3.0}
        assert report_table(reports).caption is None
    reports["t"]["behaviour"] |= {"ce_recovered_zero": -21.5, "ce_recovered_mean": 1.25}
    table = report_table(reports)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["CE rec.\n(zero)"] == ["1.0000", "-21.5000!"]
    assert cells["CE rec.\n(mean)"] == ["1.0000", "1.2500!"]
    assert str(table.caption).startswith("! outside [0, 1]")
