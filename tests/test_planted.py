"""`experiment=planted` through both doors: nothing of a language model is loaded."""

import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from dictlearn.config import ConfigError
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation import main as evaluation
from dictlearn.evaluation import present
from dictlearn.evaluation.run import Results
from dictlearn.hub import load
from dictlearn.training import plan, preflight, run
from dictlearn.training.module import DictionaryTraining
from dictlearn.types import DictlearnError, Stopped
from tests.runs import composed, run_evaluate, weight_hashes

SMALL = (
    "experiment=planted",
    "data.d=16",
    "data.n_features=24",
    "data.l0=2.0",
    "n_tokens=6_000",
    "batch_size=200",
    "expansion=2",
    "sparsifier.k=2",
    "statistics_n_tokens=2_048",
    "evaluation.n_tokens=2_000",
)


@pytest.fixture(autouse=True)
def no_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        pytest.fail("a language model was asked for")

    for module in (run, evaluation):
        monkeypatch.setattr(module, "load_lm", refused)
    for module in (plan, preflight, evaluation):
        monkeypatch.setattr(module, "skeleton", refused)
    monkeypatch.setattr(present, "plot_report", lambda *_: [])  # most of the time
    monkeypatch.setattr(run, "plot_training", lambda *_: None)


def train(run_dir: Path, *overrides: str) -> Results:
    cfg = composed("train", [*SMALL, *overrides, f"run_dir={run_dir}"])
    return run.train(cfg, overrides, Console(quiet=True))


def problems(*overrides: str) -> str:
    with pytest.raises(DictlearnError) as error:
        run.check(composed("train", overrides), overrides)
    return str(error.value)


def test_train_and_evaluate(tmp_path: Path) -> None:
    results = train(tmp_path / "run", "data.depth=1", "data.branching=3", "data.noise=0.1")
    assert results.errors == []
    trained = results.reports["planted"]
    assert trained["ground_truth"]["n_features"] == 24
    assert [level["n_features"] for level in trained["ground_truth"]["levels"]] == [6, 18]
    assert "behaviour" not in trained
    folder = tmp_path / "run" / "dictionaries" / "planted"
    dictionary = load(folder)
    assert isinstance(dictionary, Dictionary)
    metadata = dictionary.metadata
    assert metadata["lm_name"] is None
    expected = {"kind": "Planted", "d": 16, "depth": 1, "noise": 0.1}
    assert expected.items() <= metadata["data"].items()
    assert not {"ctx", "store", "block_rows"} & set(metadata["data"])
    again = run_evaluate(f"load={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "n_tokens=2_000")
    assert again.errors == []
    assert again.reports["planted"]["ground_truth"] == trained["ground_truth"]
    assert again.reports["planted"]["data"] == trained["data"]
    features = pd.read_parquet(tmp_path / "out" / "planted" / "features.parquet")
    assert features.parent.isna().sum() == 6
    other = run_evaluate(f"load={tmp_path / 'run'}", f"out={tmp_path / 'o'}", "data=planted", "data.d=16")
    assert other.reports["planted"]["ground_truth"]["n_features"] == 256


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole")
    step = DictionaryTraining.training_step

    def interrupted(self: DictionaryTraining, *args: Any) -> Any:
        if self.global_step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DictionaryTraining, "training_step", interrupted)
        with pytest.raises(Stopped, match="Stopped at step 14 of 30"):
            train(tmp_path / "cut")
    cfg = composed("train", [f"resume={tmp_path / 'cut'}"])
    assert run.train(cfg, [f"resume={tmp_path / 'cut'}"], Console(quiet=True)).errors == []
    assert weight_hashes(tmp_path / "cut") == weight_hashes(tmp_path / "whole")
    stored = OmegaConf.load(tmp_path / "cut" / "config.yaml")
    stored.data.noise = 0.5
    OmegaConf.save(stored, tmp_path / "cut" / "config.yaml")
    with pytest.raises(DictlearnError, match=r"the text changed; data.noise was 0.0, now 0.5"):
        run.train(cfg, [f"resume={tmp_path / 'cut'}"], Console(quiet=True))


def test_a_grid_is_a_sweep(tmp_path: Path) -> None:
    results = train(tmp_path / "run", "grid={sparsifier.k:[1,3]}")
    assert set(results.reports) == {"planted_k-1", "planted_k-3"}
    table = pd.read_csv(tmp_path / "run" / "sweep.csv")
    assert table["sparsifier.k"].tolist() == [1, 3]
    assert table.fvu.notna().all()


def test_plan_needs_no_text_and_no_lm() -> None:
    planned = plan.plan(composed("train", [*SMALL, "run_dir=unused"]))
    assert planned.n_steps == 30
    assert planned.token_disk == planned.store_disk == 0
    assert planned.lm_memory == (24 * 16 + 16) * 4
    assert planned.lm_flops > 0


def test_what_makes_no_sense_is_refused() -> None:
    assert "but lm.name is 'embedded': add experiment=planted" in problems("data=planted")
    assert "lm.name is 'gpt2'" in problems("experiment=planted", "lm=gpt2")
    assert "stream=sequences is for text" in problems("experiment=planted", "stream=sequences")
    found = problems("experiment=planted", "data.child_rate=2", "data.directions=x", "sparsifier.k=0")
    assert "data.child_rate must be above 0 and at most 1, got 2" in found
    assert "data.directions must be one of near_orthogonal, random" in found
    assert "sparsifier.k" in found
    assert problems("experiment=planted", "data.d=0").count("data.d must be a whole number, at least 2, got 0") == 1
    site = problems("experiment=planted", "sites=[resid_post.1]", "site=null")
    assert "Site 'resid_post.1'" in site
    assert "this model has e.g. planted" in site
    assert "lm.name must be 'embedded', a folder or a Hub id, got None" in problems("lm=none")


def test_a_planted_dictionary_is_of_no_language_model(tmp_path: Path) -> None:
    train(tmp_path / "run", "n_tokens=400")
    ref = f"load={tmp_path / 'run'}"
    with pytest.raises(ConfigError, match="lm has no use"):
        run_evaluate(ref, f"out={tmp_path / 'out'}", "lm=gpt2")
    with pytest.raises(ConfigError, match="planted does not record its LM: give lm="):
        run_evaluate(ref, f"out={tmp_path / 'out'}", "data=embedded")
