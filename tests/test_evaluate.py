"""The evaluation door."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dictlearn.evaluation import EvaluationContext
from dictlearn.types import DictlearnError
from tests.runs import command, run_evaluate, run_train

SMALL = ("n_tokens=3_000", "evaluation.blocks.behaviour.n_tokens=1_000")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_train(folder)
    return folder


def numbers(folder: Path, name: str) -> dict[str, Any]:
    report = json.loads((folder / name / "report.json").read_text())
    return {block: report[block] for block in ("sparsity", "reconstruction", "behaviour")}


def test_a_run_folder_gives_the_numbers_of_its_training(run_dir: Path, tmp_path: Path) -> None:
    results = run_evaluate(f"load={run_dir}", f"out={tmp_path}", *SMALL)
    assert sorted(results.reports) == ["attn_out.2", "mlp_out.2", "resid_post.2"]
    for name in results.reports:
        for block, values in numbers(tmp_path, name).items():
            expected = numbers(run_dir / "dictionaries", name)[block]
            for key, value in values.items():
                if isinstance(value, float):
                    assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (name, block, key)
    assert (tmp_path / "plots" / "mlp_out.2_density.png").exists()


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


def test_what_does_not_work_is_said_before_the_lm_loads(run_dir: Path, tmp_path: Path) -> None:
    assert "load is required" in refused(f"out={tmp_path}")
    assert "holds no dictionary" in refused("load=nowhere", f"out={tmp_path}")
    dictionary = tmp_path / "copy"
    dictionary.mkdir()
    source = run_dir / "dictionaries" / "resid_post.2"
    save_file(load_file(source / "sae_weights.safetensors"), dictionary / "sae_weights.safetensors")
    cfg = json.loads((source / "cfg.json").read_text())
    cfg["metadata"]["dictlearn"]["reads"] = cfg["metadata"]["dictlearn"]["writes"] = ["resid_post.9"]
    (dictionary / "cfg.json").write_text(json.dumps(cfg))
    assert "resid_post.9" in refused(f"load={dictionary}", f"out={tmp_path / 'x'}")
    cfg["metadata"]["dictlearn"]["metadata"]["data"] = {"kind": "os.system"}
    (dictionary / "cfg.json").write_text(json.dumps(cfg))
    assert "EmbeddedText, LocalText" in refused(f"load={dictionary}", f"out={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()


def test_a_dictionary_of_another_width_is_refused(run_dir: Path, tmp_path: Path) -> None:
    dictionary = tmp_path / "copy"
    dictionary.mkdir()
    source = run_dir / "dictionaries" / "resid_post.2"
    weights = load_file(source / "sae_weights.safetensors")
    weights = {name: w[..., :64] if name in ("W_dec", "b_dec") else w for name, w in weights.items()}
    weights["W_enc"] = weights["W_enc"][:64]
    save_file({name: w.contiguous() for name, w in weights.items()}, dictionary / "sae_weights.safetensors")
    cfg = json.loads((source / "cfg.json").read_text())
    cfg["d_in"] = 64
    cfg["metadata"]["dictlearn"] |= {"d_in": 64, "d_out": 64}
    (dictionary / "cfg.json").write_text(json.dumps(cfg))
    assert "64 wide" in refused(f"load={dictionary}", f"out={tmp_path / 'x'}", *SMALL)
