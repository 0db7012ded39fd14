"""The benchmarks build and run at toy size, and their summaries are what they say; no timing is judged."""

from __future__ import annotations

import importlib
import io
import json
from itertools import takewhile
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

FOLDER = Path(__file__).parent.parent / "benchmarks"
SPEC = {
    "k": 4,
    "n_latents": 64,
    "batch_size": 64,
    "block_rows": 2,
    "lm_batch_rows": 2,
    "ctx": 128,
    "device": "cpu",
    "precision": "mixed",
    "lm_dtype": "float32",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    return importlib.import_module


@pytest.fixture
def folder(load: Any, tmp_path: Path) -> Path:
    load("lms").save_lm("tiny", tmp_path, n_rows=24)
    return tmp_path


def turns_of(fit: ModuleType, worker: ModuleType, spec: dict[str, Any], monkeypatch: Any) -> list[dict[str, Any]]:
    """The answers of a trainer to turns of 2 and 3 steps."""
    answers = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n3\n"))
    with pytest.raises(worker.Finished):
        fit.fit(spec, worker.Gate(answers, on_gpu=False))
    ready, *turns = answers.getvalue().splitlines()
    assert ready == "ready"
    return [json.loads(turn) for turn in turns]


def test_the_programs_of_ours_take_turns(load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {**SPEC, "folder": str(folder), "sites": ["resid_post.0", "resid_post.2"], "d": 16, "callbacks": True}
    beside: dict[str, set[str]] = {
        "dictlearn": set(),
        "many": {"lm_seconds", "single_steps_seconds"},
        "loop": {"bare_seconds"},
    }
    beside["dictlearn from a store"] = set()
    for program, further in beside.items():
        name, _, from_store = program.partition(" ")
        with_store = {**spec, "store_steps": 2} if from_store else spec  # read twice and a half
        turns = turns_of(load(f"fit_{name}"), load("fit_worker"), with_store, monkeypatch)
        assert [turn["n_steps"] for turn in turns] == [2, 5]
        assert turns[1]["busy_seconds"] == pytest.approx(turns[0]["seconds"] + turns[1]["seconds"])
        assert further == set(turns[0]) - {"seconds", "busy_seconds", "n_steps", "setup_seconds"}
        assert all(turn[key] > 0 for turn in turns for key in ("seconds", *further))


def test_the_bare_loop_does_what_lightning_does(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, loop, data = load("ours"), load("fit_loop"), load("dictlearn.data")
    spec = {**SPEC, "folder": str(tmp_path), "d": 16}
    zeros = torch.zeros(64, dtype=torch.long)
    batches = [data.Batch({"x": x}, zeros, zeros, zeros) for x in load("worker").planted(spec)]
    statistics = {"x": loop.statistics_of(batches[0].acts["x"])}
    bare, module = (ours.make_module([ours.make_member("x", statistics, spec)], spec) for _ in range(2))
    by_hand = ours.BareLoop(bare, spec)
    for batch in batches:
        by_hand.step(batch)
    monkeypatch.setattr("sys.stdin", io.StringIO("4\n"))
    worker = load("fit_worker")
    loader = ours.Gated(batches, worker.Gate(io.StringIO(), on_gpu=False))
    with pytest.raises(worker.Finished):
        ours.make_trainer(spec, enable_checkpointing=False).fit(module, loader)
    for name, weight in bare.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=0, atol=0, msg=name)


def test_all_read_the_same_tokens(load: Any, folder: Path) -> None:
    lms = load("lms")
    rows = np.load(folder / lms.TOKENS)
    documents = [json.loads(line)["tokens"] for line in (folder / lms.DOCUMENTS).open()]
    assert rows.shape == (24, 128)
    assert (rows[:, 0] == 0).all()
    assert rows[:, 1:].tolist() == documents
    assert rows[:, 1:].min() == 1
    assert rows.max() == 100
    store = load("ours").load_data({**SPEC, "folder": str(folder)}, ["resid_post.0"]).store
    trained_on = {tuple(row) for row in store.rows(0, store.n_rows).tolist()}
    assert len(trained_on) > 12  # of 24, less those held out
    assert trained_on <= {tuple(row) for row in rows.tolist()}


def test_summaries(load: Any) -> None:
    turn = {"setup_seconds": 3.0, "busy_seconds": 7.0, "n_steps": 10}
    found = load("pipeline").summary({"turns": [{**turn, "seconds": s} for s in (4.0, 1.0, 2.0)]}, 2, 100)
    assert found["tokens_per_second"] == 100
    assert found["fastest"] == 200
    assert found["whole_run_tokens_per_second"] == 100  # 1000 tokens in 10 s
    turns = [{"seconds": 2.2, "bare_seconds": 2.0}, {"seconds": 4.4, "bare_seconds": 4.0}]
    found = load("loop").summary([*turns, {"seconds": 3.3, "bare_seconds": 3.0}], 10)
    assert found["overhead_ms"] == pytest.approx(30)
    assert found["overhead_percent"] == pytest.approx(10)
    results = {
        "one pass": {"turns": [{"seconds": 8.0, "lm_seconds": 1.0, "single_steps_seconds": 4.0}]},
        "run of the first layer": {"turns": [{"seconds": 1.0}]},
        "run of the last layer": {"turns": [{"seconds": 3.0}]},
    }
    found = load("many").summary(results, n_sites=5, n_steps=2)
    assert found["one_pass_ms"] == 4000
    assert found["over_parts"] == pytest.approx(8 / 5)
    assert found["separate_runs_ms"] == 5000  # 1, 1.5, 2, 2.5 and 3 s, for two steps
    assert found["over_runs"] == pytest.approx(8 / 10)


def test_a_contender_that_cannot_run_says_why(load: Any) -> None:
    contenders = load("contenders")
    spec = {"n_threads": 1, "device": "cpu", "n_warmup": 1}
    assert contenders.in_turns({"x": ("missing", spec)}, n_rounds=1, n_steps=1) == {
        "x": {"unavailable": "ModuleNotFoundError: No module named 'fit_missing'"}
    }


def test_a_file_that_ends_the_process_is_one_failure(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = load("fuzz")
    answers = {3: fuzz.LOADED, 4: fuzz.REFUSED, 6: fuzz.REFUSED, 7: "ValueError: x"}  # and 5 crashes

    def run(command: list[str], **_: object) -> CompletedProcess[str]:
        assert command[2:4] == [fuzz.WORKER, "sparsify"]
        alive = takewhile(answers.__contains__, range(int(command[4]), int(command[5])))
        return CompletedProcess(command, -11, "".join(f"{json.dumps(answers[seed])}\n" for seed in alive), "why")

    monkeypatch.setattr(fuzz.subprocess, "run", run)
    found = fuzz.judge("sparsify", range(3, 8))
    assert found.pop("seconds") >= 0
    assert found == {
        "files": 5,
        "loaded": 1,
        "format_errors": 2,
        "failures": 2,
        "first_failures": {5: "ended with -11: why", 7: "ValueError: x"},
    }


def test_table(load: Any) -> None:
    text = load("table").table("title", ["a", "long"], [["name", "1"], ["b", "23"]])
    assert text.splitlines()[3:] == ["a     long", "----  ----", "name     1", "b       23"]


def test_fvu_of_pca_is_scikit_learns(load: Any) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    train, heldout = (rng.normal(size=(n, 12)) @ mixing + 3 for n in (300, 200))
    fitted = PCA(4).fit(train)
    residual = heldout - fitted.inverse_transform(fitted.transform(heldout))
    expected = (residual**2).sum() / ((heldout - heldout.mean(0)) ** 2).sum()
    assert load("pca").fvu_of_pca(train, heldout, 4) == pytest.approx(expected, rel=1e-10)
