"""What a dictionary was in training is in its metadata, where the stored one does not say it."""

import json
from pathlib import Path
from typing import Any

import pytest

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.gated import Gated
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.batch_top_k import BatchTopK
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.run import trained_as
from tests.runs import run_evaluate, run_train

ANNEALED = {"kind": "top_k", "k": 3, "k_start": 9, "anneal": "run"}
BLOCKS = ("~evaluation.blocks.behaviour",)
P_ANNEALED = {"kind": "relu", "l1": 0.1, "p": 0.5, "anneal_from": 0.4}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Linear(6, 6, 16, TopK(3)), None),
        (Linear(6, 6, 16, ReLU(0.1)), None),
        (Crosscoder.tiny(), None),
        (Linear(6, 6, 16, BatchTopK(3)), {"dictionary": "linear", "sparsifier": {"kind": "batch_top_k", "k": 3}}),
        (Linear(6, 6, 16, TopK(3, k_start=9)), {"dictionary": "linear", "sparsifier": ANNEALED}),
        (Linear(6, 6, 16, ReLU(0.1, p=0.5)), {"dictionary": "linear", "sparsifier": P_ANNEALED}),
        (Gated(6, 6, 16, ReLU(0.1)), {"dictionary": "gated", "sparsifier": {"kind": "relu", "l1": 0.1}}),
    ],
)
def test_only_what_the_stored_dictionary_does_not_say(made: Dictionary, expected: dict[str, Any] | None) -> None:
    assert trained_as(made, made.for_inference()) == ({} if expected is None else {"trained_as": expected})


def test_it_is_in_the_files_and_the_reports(tmp_path: Path) -> None:
    results = run_train(
        tmp_path / "run",
        *("experiment=single", "site=resid_post.1", "dictionary=matryoshka", "sparsifier=batch_top_k"),
        *("n_tokens=256", "dictionary.module.prefixes=[0.5,1.0]", "evaluation.n_tokens=300", *BLOCKS),
    )
    sparsifier = {"kind": "batch_top_k", "k": 4}
    expected = {"dictionary": "matryoshka", "prefixes": [0.5, 1.0], "sparsifier": sparsifier}
    folder = tmp_path / "run" / "dictionaries" / "resid_post.1"
    own = json.loads((folder / "cfg.json").read_text())["metadata"]["dictlearn"]
    assert (own["kind"], own["sparsifier"]["kind"]) == ("linear", "jump_relu")
    assert own["metadata"]["trained_as"] == expected
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    assert loaded.metadata["trained_as"] == expected
    again = run_evaluate(f"load={folder}", f"out={tmp_path / 'again'}", "evaluation.n_tokens=300", *BLOCKS)
    for report in (*results.reports.values(), *again.reports.values()):
        assert report["dictionary"]["metadata"]["trained_as"] == expected
