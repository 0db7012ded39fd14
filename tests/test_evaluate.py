"""The evaluation door."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dictlearn.config import ConfigError
from dictlearn.dictionaries.linear import Linear
from dictlearn.evaluation import EvaluationContext
from dictlearn.evaluation import main as evaluation_main
from dictlearn.hub import save
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.types import DictlearnError
from tests.runs import command, composed, run_evaluate, run_train

NUMBERS = ("sparsity", "geometry", "reconstruction", "behaviour")
SMALL = ("n_tokens=3_000", "evaluation.blocks.behaviour.n_tokens=1_000")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_train(folder)
    return folder


def numbers(folder: Path, name: str) -> dict[str, Any]:
    report = json.loads((folder / name / "report.json").read_text())
    return {block: report[block] for block in NUMBERS}


def test_a_run_folder_gives_the_numbers_of_its_training(run_dir: Path, tmp_path: Path) -> None:
    results = run_evaluate(f"load={run_dir}", f"out={tmp_path}", *SMALL)
    assert sorted(results.reports) == ["attn_out.2", "mlp_out.2", "resid_post.2"]
    for name in results.reports:
        for block, values in numbers(tmp_path, name).items():
            expected = numbers(run_dir / "dictionaries", name)[block]
            for key, value in values.items():
                if isinstance(value, float):
                    assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (name, block, key)
    for name in results.reports:
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["latents.parquet", "report.json"]
        for kind in ("density", "l0", "fvu_per_position", "ce_per_position"):
            assert (tmp_path / "plots" / f"{name}_{kind}.png").exists()
            assert (tmp_path / "plots" / f"{name}_{kind}.csv").exists()


def test_what_is_there_is_overwritten_and_the_report_says_how_much_was_used(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "attn_out.2").mkdir()
    (tmp_path / "attn_out.2" / "report.json").write_text("old")
    n_tokens = ("n_tokens=2_000", "evaluation.blocks.behaviour.n_tokens=500")
    run_evaluate(f"load={run_dir}/dictionaries/attn_out.2", f"out={tmp_path}", *n_tokens)
    report = json.loads((tmp_path / "attn_out.2" / "report.json").read_text())
    assert 2_000 <= report["data"]["n_counted"] == report["reconstruction"]["n_tokens"] < 2_000 + 128
    assert report["behaviour"]["n_rows"] == 4
    assert 450 < report["behaviour"]["n_tokens"] <= report["behaviour"]["n_replaced"] <= 512


def test_the_norm_filter_is_that_of_the_text(run_dir: Path, tmp_path: Path) -> None:
    one = f"load={run_dir}/dictionaries/resid_post.2"
    ratio = "data.max_norm_ratio=1.2"
    results = run_evaluate(one, "lm=embedded", "data=embedded", ratio, f"out={tmp_path}", *SMALL)
    data = results.reports["resid_post.2"]["data"]
    assert data["max_norm_ratio"] == 1.2
    assert 0 < data["n_norm_filtered"] < data["n_masked"]


def test_lists_and_globs(run_dir: Path, tmp_path: Path) -> None:
    one, two = (run_dir / "dictionaries" / name for name in ("attn_out.2", "mlp_out.2"))
    listed = run_evaluate(f"load=[{one},{two}]", f"out={tmp_path / 'a'}", *SMALL)
    matched = run_evaluate(f"load='{run_dir}/dictionaries/*_out.2'", f"out={tmp_path / 'b'}", *SMALL)
    assert sorted(listed.reports) == sorted(matched.reports) == ["attn_out.2", "mlp_out.2"]


def test_another_lm_and_text(run_dir: Path, tmp_path: Path) -> None:
    dictionary = run_dir / "dictionaries" / "resid_post.2"
    results = run_evaluate(
        f"load={dictionary}", "lm=embedded", "data=embedded", "data.seed=5", f"out={tmp_path}", *SMALL
    )
    other = results.reports["resid_post.2"]["reconstruction"]["fvu"]
    trained_on = numbers(run_dir / "dictionaries", "resid_post.2")["reconstruction"]["fvu"]
    assert other != trained_on
    assert other == pytest.approx(trained_on, rel=0.3)


def test_a_dictionary_of_another_format(run_dir: Path, tmp_path: Path) -> None:
    """The numbers are those of the same dictionary in ours; its L0 is not the one in its name."""
    weights = load_file(run_dir / "dictionaries/resid_post.2/sae_weights.safetensors")
    params = {"W_enc": weights["W_enc"], "b_enc": weights["b_enc"], "W_dec": weights["W_dec"]}
    params |= {"b_dec": weights["b_dec"], "threshold": torch.full_like(weights["b_enc"], 1.0)}
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_900"
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {key: value.numpy() for key, value in params.items()}
    np.savez(folder / "params.npz", **arrays)
    save(as_jump_relu(params), tmp_path / "ours")
    overrides = ("lm=embedded", "data=embedded", f"out={tmp_path / 'out'}", *SMALL)
    results = run_evaluate(f"load=[{folder},{tmp_path / 'ours'}]", *overrides)
    foreign, own = results.reports["average_l0_900"], results.reports["ours"]
    for block in NUMBERS:
        assert foreign[block] == own[block]
    assert foreign["dictionary"]["sha256"] == hashlib.sha256((folder / "params.npz").read_bytes()).hexdigest()
    assert foreign["dictionary"]["metadata"]["source"]["format"] == "gemma_scope"
    l0 = foreign["sparsity"]["l0"]["mean"]
    said = f"L0 is {l0:.3g} here and 900 as published: it was made for google/gemma-2-2b, this is embedded"
    assert said in foreign["warnings"]
    assert not any("as published" in warning for warning in own["warnings"])


def as_jump_relu(params: dict[str, Tensor]) -> Linear:
    d, n = params["W_enc"].shape
    made = Linear(d, d, n, JumpReLU(penalty="l0"), ["resid_post.2"], ["resid_post.2"], decoder_norm="free")
    for name, value in params.items():
        made.get_parameter("sparsifier.threshold" if name == "threshold" else name).data.copy_(value)
    return made


class FailingBlock:
    """An evaluation block that cannot do its work."""

    def run(self, context: EvaluationContext) -> dict[str, Any]:
        raise RuntimeError("no such luck")


def test_the_command_keeps_what_it_could_compute(run_dir: Path, tmp_path: Path) -> None:
    failing = "+evaluation.blocks.failing._target_=tests.test_evaluate.FailingBlock"
    process = command("evaluate.py", f"load={run_dir}/dictionaries/attn_out.2", f"out={tmp_path}", *SMALL, failing)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "failing: RuntimeError: no such luck" in out
    report = json.loads((tmp_path / "attn_out.2" / "report.json").read_text())
    assert report["errors"] == ["failing: RuntimeError: no such luck"]
    assert 0 < report["reconstruction"]["fvu"] < 1
    assert report["behaviour"]["ce_rec"] > 0


def refused(*overrides: str) -> str:
    with pytest.raises(DictlearnError) as error:
        run_evaluate(*overrides)
    return str(error.value)


def changed(source: Path, copy: Path, metadata: dict[str, Any], own: dict[str, Any]) -> Path:
    """A copy of a dictionary's folder with other words in cfg.json."""
    shutil.copytree(source, copy)
    cfg = json.loads((copy / "cfg.json").read_text())
    cfg["metadata"]["dictlearn"]["metadata"] |= metadata
    cfg["metadata"]["dictlearn"] |= own
    (copy / "cfg.json").write_text(json.dumps(cfg))
    return copy


def test_what_does_not_work_is_said_before_the_lm_loads(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_main, "load_lm", lambda *_: pytest.fail("the LM was loaded"))
    assert "load is required" in refused(f"out={tmp_path}")
    assert "out is required" in refused(f"load={run_dir}")
    assert "holds no dictionary" in refused("load=nowhere", f"out={tmp_path}")
    source = run_dir / "dictionaries" / "resid_post.2"
    out = f"out={tmp_path / 'x'}"
    for load in ("5", "[]", "[5]", "''", "{a:1}"):
        assert "load must be a dictionary folder" in refused(f"load={load}", out)
    sites = changed(source, tmp_path / "sites", {}, {"reads": ["resid_post.9"], "writes": ["resid_post.9"]})
    assert "resid_post.9" in refused(f"load={sites}", out)
    data = changed(source, tmp_path / "data", {"data": {"kind": "os.system"}}, {})
    assert "EmbeddedText, HubText, LocalText" in refused(f"load={data}", out)
    lm = changed(source, tmp_path / "lm", {"lm_name": str(tmp_path / "no_lm")}, {})
    assert "no_lm" in refused(f"load={lm}", out)
    wide = changed(source, tmp_path / "wide", {}, {"reads": ["mlp_hidden.1"], "writes": ["mlp_hidden.1"]})
    assert "'wide' is 128 wide at mlp_hidden.1, where embedded is 512 wide" in refused(f"load={wide}", out)
    for n_tokens in ("0", "-5", "2.5", "many", "true"):
        assert "n_tokens must be a whole number of at least 1" in refused(
            f"load={source}", out, f"n_tokens={n_tokens}"
        )
    for device in ("gpu", "5", "meta"):
        assert "device must be like cpu, cuda or cuda:0" in refused(f"load={source}", out, f"device={device}")
    assert "needs a GPU" in refused(f"load={source}", out, "device=cuda:99")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        assert f"{tmp_path / 'file'} is a file" in refused(f"load={source}", f"out={tmp_path / place}")
    assert "out must be the folder" in refused(f"load={source}", "out=5")
    assert "cannot" in refused(f"load={source}", "out=/proc/reports")
    assert not (tmp_path / "x").exists()
    assert evaluation_main.problems(composed("evaluate", [f"load={source}", out])) == []
    absent, wrong = evaluation_main.problems(composed("evaluate", [out, "device=tpu"]))
    assert absent.startswith("load is required")
    assert wrong.startswith("device must")


def test_blocks_and_keys_that_cannot_be_used_are_refused_before_anything_runs(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_main, "load_lm", lambda *_: pytest.fail("the LM was loaded"))
    given = (f"load={run_dir}/dictionaries/attn_out.2", f"out={tmp_path / 'x'}")
    for block in ("+evaluation.blocks.behaviour.foo=1", "evaluation.blocks.behaviour=null"):
        assert "  - evaluation.blocks.behaviour: " in refused(*given, block)
        assert "None" not in refused(*given, block).replace("got None", "")
    both = refused("load=5", "out=5", "n_tokens=0", "evaluation.blocks.behaviour=null")
    assert "load must" in both
    assert "n_tokens must" in both
    assert "evaluation.blocks.behaviour: " in both
    assert "evaluation.n_tokens must be a whole number" in refused(*given, "~evaluation.n_tokens", "n_tokens=1000")
    assert "evaluation.batch_rows must be a whole number" in refused(*given, "~evaluation.batch_rows")
    assert "evaluation must be a choice of conf/evaluation, got None" in refused(*given, "~evaluation")


def test_one_text_shuffled_in_two_ways_is_one_text(run_dir: Path, tmp_path: Path) -> None:
    source = run_dir / "dictionaries" / "attn_out.2"
    recorded = json.loads((source / "cfg.json").read_text())["metadata"]["dictlearn"]["metadata"]["data"]
    shuffle = {key: recorded[key] + 1 for key in ("block_rows", "n_slices", "lm_batch_rows")}
    copy = changed(source, tmp_path / "copy", {"data": recorded | shuffle}, {})
    results = run_evaluate(f"load=[{source},{copy}]", f"out={tmp_path / 'out'}", *SMALL)
    assert len(results.reports) == 2
    for name, key, value in (("ctx", "ctx", 64), ("ratio", "max_norm_ratio", 3.0), ("seed", "seed", 9)):
        other = changed(source, tmp_path / name, {"data": recorded | shuffle | {key: value}}, {})
        text = refused(f"load=[{source},{other}]", f"out={tmp_path / 'x'}")
        assert f"text: {key} is {recorded[key]} (attn_out.2), {value} ({name}): give data=..." in text
        assert "block_rows" not in text
    silent = changed(source, tmp_path / "silent", {"data": None, "lm_name": None}, {})
    text = refused(f"load=[{source},{silent}]", f"out={tmp_path / 'x'}")
    assert "silent does not record its text: give data=..." in text
    assert "silent does not record its LM: give lm=..." in text
    lm = changed(source, tmp_path / "lm", {"lm_name": "gpt2"}, {})
    text = refused(f"load=[{source},{lm}]", f"out={tmp_path / 'x'}")
    assert "LM: lm_name is 'embedded' (attn_out.2), 'gpt2' (lm): give lm=..." in text


def test_all_that_is_wrong_is_one_list(run_dir: Path, tmp_path: Path) -> None:
    source = run_dir / "dictionaries" / "resid_post.2"
    sites = changed(source, tmp_path / "sites", {}, {"reads": ["resid_post.9"], "writes": ["resid_post.9"]})
    with pytest.raises(ConfigError) as error:
        run_evaluate(
            f"load={sites}",
            "out=5",
            "n_tokens=0",
            "device=tpu",
            "evaluation.batch_rows=0",
            "data=local",
            "data.path=nowhere.txt",
        )
    wanted = ("out must", "n_tokens must", "device must", "batch_rows must", "resid_post.9", "nowhere.txt")
    assert len(error.value.problems) == len(wanted)
    for words in wanted:
        assert sum(words in problem for problem in error.value.problems) == 1, words


def test_another_lm_than_that_of_the_training_is_in_the_report(run_dir: Path, tmp_path: Path) -> None:
    source = run_dir / "dictionaries" / "resid_post.2"
    other = changed(source, tmp_path / "other", {"lm_name": "some/lm"}, {})
    results = run_evaluate(f"load=[{other},{source}]", "lm=embedded", f"out={tmp_path / 'x'}", *SMALL)
    assert "was trained on some/lm, is evaluated on embedded" in results.reports["other"]["warnings"]
    assert not any("trained on" in warning for warning in results.reports["resid_post.2"]["warnings"])


def test_a_dictionary_of_another_width_is_refused(run_dir: Path, tmp_path: Path) -> None:
    source, copy = run_dir / "dictionaries" / "resid_post.2", tmp_path / "copy"
    weights = load_file(source / "sae_weights.safetensors")
    weights = {name: w[..., :64] if name in ("W_dec", "b_dec") else w for name, w in weights.items()}
    weights["W_enc"] = weights["W_enc"][:64]
    changed(source, copy, {}, {"d_in": 64, "d_out": 64})
    save_file({name: w.contiguous() for name, w in weights.items()}, copy / "sae_weights.safetensors")
    cfg = json.loads((copy / "cfg.json").read_text())
    cfg["d_in"] = 64
    (copy / "cfg.json").write_text(json.dumps(cfg))
    assert "64 wide" in refused(f"load={copy}", f"out={tmp_path / 'x'}", *SMALL)
