"""The evaluation block and the callback, on the embedded LM."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import lightning as L
import pandas as pd
import pytest
import torch
from rich.console import Console

from dictlearn.circuits import baselines, faithfulness
from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.block import Circuits, _Baselines, _seen
from dictlearn.circuits.callback import CircuitsInTraining
from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.faithfulness import curve
from dictlearn.circuits.methods.relp import RelP
from dictlearn.circuits.scores import node_scores
from dictlearn.circuits.tasks.ioi import IOI
from dictlearn.config import ConfigError
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.embedded import LM_FOLDER
from dictlearn.evaluation import EvaluationContext
from dictlearn.evaluation.present import evaluate_and_show
from dictlearn.lm import LM, load_lm
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.run import train
from dictlearn.types import DictlearnError
from tests.circuits.setup import filled
from tests.runs import composed, run_evaluate, run_train, weight_hashes

SMALL = {"n_pairs": 6, "method": "gradient"}


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm(str(LM_FOLDER))


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of three circuits."""
    monkeypatch.setattr(faithfulness, "sizes_for", lambda n: (0, n // 2, n))


def dictionary(site: str, seed: int) -> Dictionary:
    return filled(Linear(128, 128, 64, TopK(k=8), [site], [site]), seed).float()


def context(lm: LM, dictionaries: Mapping[str, Dictionary]) -> EvaluationContext:
    tokens = torch.randint(3, 600, (4, 32))
    return EvaluationContext(lm, dictionaries, tokens, torch.ones_like(tokens, dtype=torch.bool))


@pytest.mark.usefixtures("few_sizes")
def test_the_numbers_are_those_of_the_parts(lm: LM) -> None:
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("attn_out.2", 1)}
    block = Circuits(["ioi"], **SMALL)
    sections = block.run(context(lm, own))
    assert sections["a"] == sections["b"]  # in both reports
    section = sections["a"]["circuits"]
    assert section["dictionaries"] == ["a", "b"]
    found = section["tasks"]["ioi"]
    find, test = IOI().halves(lm.tokenizer, 6, seed=0, bos=False)
    assert (found["n_pairs_find"], found["n_pairs_test"]) == (6, 6)
    cuts = cuts_of(lm.model, own)
    scores = node_scores(lm, own, find)
    for mode in ("scored", "kept", "removed"):
        expected = curve(lm.model, cuts, Ablation(lm.model, cuts, test), scores, errors=mode)
        numbers = found["dictionaries"][mode]
        assert numbers["curve"]["faithfulness"] == pytest.approx(expected.faithfulness.tolist(), abs=1e-5)
        assert numbers["n_candidates"] == expected.n_candidates
    assert set(found) > {"neurons", "pca", "random", "accuracy", "metric_clean", "metric_patch"}
    for kind in ("neurons", "pca"):
        assert list(found[kind]) == ["scored"]
        shares = found[kind]["scored"]["curve"]["faithfulness"]
        assert shares[0] == pytest.approx(0, abs=1e-4)
        assert found[kind]["scored"]["faithfulness_of_all"] == pytest.approx(1, abs=1e-4)
        assert "error_share" not in found[kind]
    decided = int((find.clean != find.patch).any(0).nonzero()[0])  # nodes before have no score, errors none at all
    assert found["neurons"]["scored"]["n_candidates"] == 2 * 128 * (find.ctx - decided)
    assert found["pca"]["scored"]["n_candidates"] == 2 * 128 * (find.ctx - decided)
    plain = test.value(lm.model(test.clean).logits[:, -1])
    assert found["accuracy"] == float((plain > 0).double().mean()) > 0.5
    assert found["metric_clean"] == pytest.approx(float(plain.mean()), rel=1e-5)
    json.dumps(sections["a"], allow_nan=False)


@pytest.mark.usefixtures("few_sizes")
def test_dictionaries_of_one_site_are_measured_alone(lm: LM) -> None:
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.1", 1)}
    sections = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))
    assert [sections[name]["circuits"]["dictionaries"] for name in own] == [["a"], ["b"]]
    curves = [sections[n]["circuits"]["tasks"]["ioi"]["dictionaries"]["scored"]["curve"] for n in own]
    assert curves[0] != curves[1]
    alone = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, {"a": own["a"]}))
    assert alone["a"] == sections["a"]


def test_settings_that_nobody_gave() -> None:
    """What the yaml files say is what the constructors have, and nodes are ablated to what scores estimate."""
    of_block = inspect.signature(Circuits).parameters
    of_callback = inspect.signature(CircuitsInTraining).parameters
    evaluation = composed("evaluate", ["load=x", "out=y"]).evaluation.blocks.circuits
    training = composed("train", ["callbacks=circuits"]).callbacks.circuits
    for signature, given in ((of_block, evaluation), (of_callback, training)):
        own = {name: value for name, value in given.items() if name not in ("_target_", "tasks", "folder")}
        assert own == {str(name): signature[str(name)].default for name in own}
        assert own["ablation"] == "patch"
    assert inspect.signature(Ablation).parameters["kind"].default == "patch"


@pytest.mark.usefixtures("few_sizes")
def test_a_forward_has_so_many_rows(lm: LM) -> None:
    own, seen = context(lm, {"a": dictionary("resid_post.1", 0)}), []
    hook = lm.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    few = Circuits(["ioi"], n_pairs=8, n_rows=3, baselines=False).run(own)["a"]["circuits"]["tasks"]["ioi"]
    hook.remove()
    assert max(seen) == 3
    many = Circuits(["ioi"], n_pairs=8, baselines=False).run(own)["a"]["circuits"]["tasks"]["ioi"]
    assert few["metric_patch"] == pytest.approx(many["metric_patch"], rel=1e-4)
    assert few["dictionaries"]["scored"]["cpr"] == pytest.approx(many["dictionaries"]["scored"]["cpr"], rel=1e-2)


def test_no_task_is_no_section(lm: LM) -> None:
    assert Circuits().run(context(lm, {"a": dictionary("resid_post.1", 0)})) == {}


@pytest.mark.usefixtures("few_sizes")
def test_a_task_that_cannot_be_is_a_warning_and_the_others_are_kept(lm: LM) -> None:
    own = {"a": dictionary("resid_post.1", 0)}
    sections = Circuits(["colored_objects", "ioi"], **SMALL, baselines=False).run(context(lm, own))
    assert list(sections["a"]["circuits"]["tasks"]) == ["ioi"]
    assert sections["a"]["warnings"][0].startswith(
        "circuits.colored_objects is left out: The tokenizer carries no template"
    )


def test_null_is_no_settings() -> None:
    block = Circuits([{"ioi": None}], method={"relp": None})
    assert list(block.tasks) == ["ioi"]
    assert isinstance(block.method, RelP)


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize(
    "settings",
    [{"order": "signed"}, {"ablation": "zero"}, {"positions": "all"}, {"method": "magnitude"}, {"n_pairs": 5}],
)
def test_every_setting_is_obeyed(lm: LM, settings: dict[str, Any]) -> None:
    own, given = {"a": dictionary("resid_post.1", 0)}, SMALL | settings
    found = Circuits(["ioi"], **given, baselines=False).run(context(lm, own))["a"]["circuits"]["tasks"]["ioi"]
    find, test = IOI().halves(lm.tokenizer, given["n_pairs"], seed=0, bos=False)
    cuts = cuts_of(lm.model, own)
    scores = node_scores(lm, own, find, method=given["method"], positions=given.get("positions", "each"))
    ablation = Ablation(lm.model, cuts, test, given.get("ablation", "patch"))
    expected = curve(lm.model, cuts, ablation, scores, order=given.get("order", "absolute"))
    measured = found["dictionaries"]["scored"]
    assert measured["curve"]["faithfulness"] == pytest.approx(expected.faithfulness.tolist(), abs=1e-5)
    plain = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))["a"]["circuits"]["tasks"]["ioi"]
    assert measured["cpr"] != pytest.approx(plain["dictionaries"]["scored"]["cpr"], abs=1e-4)


@pytest.mark.usefixtures("few_sizes")
def test_prompts_begin_as_those_of_training(lm: LM) -> None:
    plain, begun = {"a": dictionary("resid_post.1", 0)}, {"a": dictionary("resid_post.1", 0)}
    begun["a"].metadata["prepend_bos"] = True
    for own, bos in ((plain, False), (begun, True)):
        found = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))["a"]["circuits"]["tasks"]["ioi"]
        _, test = IOI().halves(lm.tokenizer, 6, seed=0, bos=bos)
        expected = float(test.value(lm.model(test.clean).logits[:, -1]).mean())
        assert found["metric_clean"] == pytest.approx(expected, rel=1e-5)


def test_baselines_are_equals_at_the_same_sites(lm: LM) -> None:
    """Of equal L0 and number of latents, directions of each site its own; PCA is about the mean."""
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.2", 1)}
    acts = {site: torch.randn(200, 128) + 3 for site in ("resid_post.1", "resid_post.2")}
    made = {site: baselines.random(site, acts[site], 64, 7.6) for site in acts}
    for site, d in made.items():
        assert ((d.encode(acts[site]) != 0).sum(-1) == 8).all()
        torch.testing.assert_close(d.W_dec.norm(dim=-1), torch.ones(64))
    assert not torch.equal(made["resid_post.1"].W_dec, made["resid_post.2"].W_dec)
    centred = baselines.pca("resid_post.1", acts["resid_post.1"])
    mean = acts["resid_post.1"].mean(0)
    assert centred.encode(mean).abs().max() < 1e-3  # about the mean
    variances = centred.encode(acts["resid_post.1"]).var(0)
    assert (variances[:-1] >= variances[1:] - 1e-4).all()  # the largest first
    shown = context(lm, own)
    at = _Baselines(shown).of(own)
    l0 = _seen(shown, own)["a"].l0
    assert l0 == pytest.approx(8)
    random = at["random"]["resid_post.1"]
    assert (random.n_latents, cast(TopK, random.sparsifier).k) == (64, 8)


@pytest.mark.usefixtures("few_sizes")
def test_a_sweep_of_one_site_measures_its_baselines_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.1", 1)}
    own["c"] = filled(Linear(128, 128, 64, TopK(k=4), ["resid_post.1"], ["resid_post.1"]), 2).float()
    measured: list[str] = []
    plain = Circuits._of_cut

    def counted(self: Circuits, lm: LM, cut: Mapping[str, Dictionary], *rest: Any, **more: Any) -> Any:
        measured.extend(cut)
        return plain(self, lm, cut, *rest, **more)

    monkeypatch.setattr(Circuits, "_of_cut", counted)
    sections = Circuits(["ioi"], **SMALL).run(context(lm, own))
    assert sorted(measured) == ["a", "b", "c", *["resid_post.1"] * 4]  # neurons, PCA, random of L0 8 and 4
    tasks = [sections[name]["circuits"]["tasks"]["ioi"] for name in own]
    assert tasks[0]["random"] == tasks[1]["random"] != tasks[2]["random"]
    alone = Circuits(["ioi"], **SMALL).run(context(lm, {"b": own["b"]}))["b"]["circuits"]["tasks"]["ioi"]
    assert alone["neurons"]["scored"]["cpr"] == pytest.approx(tasks[1]["neurons"]["scored"]["cpr"])


@pytest.mark.usefixtures("few_sizes")
def test_pairs_are_drawn_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    plain = IOI.halves
    monkeypatch.setattr(IOI, "halves", lambda *arguments, **more: drawn.append("") or plain(*arguments, **more))
    own = {name: dictionary("resid_post.1", seed) for seed, name in enumerate("ab")}
    Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))
    assert len(drawn) == 1


@pytest.mark.usefixtures("few_sizes")
def test_a_dictionary_that_is_not_finite_is_named(lm: LM) -> None:
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.2", 1)}
    own["b"].W_dec[0] = float("nan")
    (warning,) = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))["a"]["warnings"]
    assert "Those of b are not: the dictionary is not, or" in warning


@pytest.mark.usefixtures("few_sizes")
def test_dictionaries_measured_together_are_drawn_and_warned_of_once(lm: LM, tmp_path: Path) -> None:
    console = Console(record=True, width=400)
    blocks = {"circuits": Circuits(["ioi", "colored_objects"], **SMALL, baselines=False)}

    def shown(own: Mapping[str, Dictionary], folder: Path) -> set[str]:
        out = {name: folder / name for name in own}
        results = evaluate_and_show(context(lm, own), blocks, out, folder / "plots", console)
        assert all(report["circuits"]["tasks"] for report in results.reports.values())
        return {png.name for png in (folder / "plots").glob("*circuits*.png")}

    apart = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.2", 1)}
    assert shown(apart, tmp_path / "apart") == {"circuits.png"}
    said = console.export_text()
    assert said.count("colored_objects is left out") == 1
    assert "a, b: circuits.colored_objects is left out" in said
    (scored,) = [
        line.split() for line in said.splitlines() if line.split()[:4] == ["ioi", "2", "dictionaries", "scored"]
    ]
    assert float(scored[-2]) == 1.0  # f of all
    sweep = {"a": dictionary("resid_post.1", 0), "b": dictionary("resid_post.1", 1)}
    assert shown(sweep, tmp_path / "sweep") == {"a_circuits.png", "b_circuits.png", "circuits_sweep.png"}


@pytest.mark.usefixtures("few_sizes")
def test_one_activation_by_two_names_is_measured_apart(lm: LM) -> None:
    own = {"a": dictionary("resid_post.0", 0), "b": dictionary("resid_pre.1", 1), "c": dictionary("mlp_out.2", 2)}
    sections = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))
    assert [sections[name]["circuits"]["dictionaries"] for name in own] == [["a"], ["b"], ["c"]]


def dead(site: str) -> Dictionary:
    found = dictionary(site, 0)
    found.W_enc.zero_()
    found.b_enc.zero_()
    return found


@pytest.mark.usefixtures("few_sizes")
def test_dead_dictionaries_keep_what_there_is(lm: LM) -> None:
    """Errors as nodes, and the baselines."""
    section = Circuits(["ioi"], **SMALL).run(context(lm, {"a": dead("resid_post.1")}))["a"]
    found = section["circuits"]["tasks"]["ioi"]
    assert list(found["dictionaries"]) == ["error_share", "scored"]
    assert found["dictionaries"]["error_share"] == 1
    assert set(found) > {"neurons", "pca", "random"}
    assert "circuits.ioi, errors kept and removed, is left out: No node has a score" in section["warnings"][0]


@pytest.mark.usefixtures("few_sizes")
def test_too_few_pairs_to_find_circuits_on_are_said(lm: LM) -> None:
    own = {"a": dictionary("resid_post.1", 0), "b": dictionary("mlp_out.2", 1)}
    section = Circuits(["ioi"], **SMALL, baselines=False).run(context(lm, own))["a"]
    share = section["circuits"]["tasks"]["ioi"]["dictionaries"]["scored"]["faithfulness_of_candidates"]
    assert share < 0.9
    (warning,) = section["warnings"]
    assert f"all nodes that have a score carry {share:.2f} of the behaviour" in warning
    zero = Circuits(["ioi"], **SMALL, baselines=False, ablation="zero").run(context(lm, own))["a"]
    assert not any("have a score carry" in text for text in zero["warnings"])


def trainer_at(step: int) -> L.Trainer:
    return Mock(spec=L.Trainer, global_step=step)


def trained(lm: LM, step: int) -> Any:
    """A module whose dictionary is another one at each step."""
    member = SimpleNamespace(learner=SimpleNamespace(name="a", dictionary=dictionary("resid_post.1", step)))
    rest = {"tokens_per_batch": 10, "device": torch.device("cpu"), "n_steps": 6}
    return SimpleNamespace(lm=lm, members=[member], **rest)


def train_steps(lm: LM, folder: Path, first: int, last: int) -> bytes:
    callback = CircuitsInTraining(["ioi"], folder, every_n_steps=2, n_pairs=4)
    callback.on_train_start(trainer_at(first), trained(lm, first))
    for step in range(first + 1, last + 1):
        callback.on_train_batch_end(trainer_at(step), trained(lm, step))
    callback.on_train_end(trainer_at(last), trained(lm, last))
    return (folder / "circuits.csv").read_bytes()


@pytest.mark.usefixtures("few_sizes")
@pytest.mark.parametrize(("stopped", "resumed"), [(5, 3), (5, 4), (3, 3), (6, 2), (1, 0)])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_stopped(
    lm: LM, tmp_path: Path, stopped: int, resumed: int
) -> None:
    """From a checkpoint at any step, on the grid of measurements or not, after which rows may have been written."""
    whole = train_steps(lm, tmp_path / "whole", 0, 6)
    assert pd.read_csv(tmp_path / "whole" / "circuits.csv").step.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    train_steps(lm, tmp_path / "cut", 0, stopped)
    assert train_steps(lm, tmp_path / "cut", resumed, 6) == whole


@pytest.mark.usefixtures("few_sizes")
def test_a_dictionary_that_dies_does_not_end_the_run(lm: LM, tmp_path: Path) -> None:
    callback = CircuitsInTraining(["ioi"], tmp_path, every_n_steps=1, n_pairs=4)
    callback.on_train_start(trainer_at(0), trained(lm, 0))
    module = trained(lm, 1)
    module.members[0].learner.dictionary = dead("resid_post.1")
    callback.on_train_batch_end(trainer_at(1), module)
    table = pd.read_csv(tmp_path / "circuits.csv")
    assert table.errors.tolist() == ["scored", "removed"] * 2
    assert table.why_not.isna().tolist() == [True, True, True, False]
    assert table.why_not.iloc[-1].startswith("No node has a score")
    assert table.error_share.iloc[2:].tolist() == [1, 1]
    assert 0 < table.error_share.iloc[0] == table.error_share.iloc[1] < 1
    (cut,) = cuts_of(lm.model, trained(lm, 0).members[0].learner.dictionary)
    find, _ = IOI().halves(lm.tokenizer, 4, 0, bos=False)
    scores = RelP().scores(lm.model, [cut], find, "each")
    assert table.error_share.iloc[0] == pytest.approx(faithfulness.error_share(scores))


@pytest.mark.usefixtures("few_sizes")
def test_tasks_with_settings(lm: LM) -> None:
    block = Circuits([{"agreement": {"structure": "nounpp"}}, "ioi"], **SMALL, baselines=False)
    assert list(block.tasks) == ["agreement_nounpp", "ioi"]
    found = block.run(context(lm, {"a": dictionary("resid_post.1", 0)}))
    assert list(found["a"]["circuits"]["tasks"]) == ["agreement_nounpp", "ioi"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "ioi"}, "circuits must be a list of tasks"),
        ({"tasks": ["iou"]}, "has no kind 'iou'"),
        ({"tasks": [{}]}, "A task is a name, or one name with its settings, got {}"),
        ({"tasks": [{"ioi": "abc"}]}, "Settings are names with values, as in {ioi: {name: value}}, got 'abc'"),
        ({"tasks": [{"ioi": {1: 2}}]}, "Settings are names with values, as in {ioi: {name: value}}, got {1: 2}"),
        ({"tasks": ["ioi", "successor", {"ioi": None}]}, "circuits must name each task once, got ioi again"),
        ({"method": {"relp": "fast"}}, "Settings are names with values, as in {relp: {name: value}}, got 'fast'"),
        ({"tasks": [{"ioi": {"colour": 3}}]}, "ioi: .*unexpected keyword argument 'colour'"),
        ({"method": "exactly"}, "has no kind 'exactly'"),
        ({"method": {}}, "method must be a name, or one name with its settings, got {}"),
        ({"ablation": "none"}, "ablation must be one of"),
        ({"positions": "some"}, "positions must be one of"),
        ({"order": "some"}, "order must be one of"),
        ({"order": "signed", "method": "magnitude"}, "scores of magnitude are never negative: order=absolute"),
        ({"n_pairs": 1}, "n_pairs must be a whole number, at least 2"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        Circuits(**settings)


@pytest.mark.usefixtures("few_sizes")
def test_through_both_doors(tmp_path: Path) -> None:
    """Training with the callback, then evaluation with the block, plots included; weights as without them."""
    run = tmp_path / "run"
    circuits = ("callbacks=circuits", "callbacks.circuits.every_n_steps=20", "callbacks.circuits.n_pairs=4")
    run_train(run, "circuits=[ioi]", *circuits, "~evaluation.blocks.circuits")
    table = pd.read_csv(run / "circuits.csv")
    assert table.step.tolist() == [0, 0, 20, 20, 40, 40]
    assert table.errors.tolist() == ["scored", "removed"] * 3
    assert table.query("errors == 'scored'").faithfulness_of_all.tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    assert table.query("errors == 'removed'").faithfulness_of_all.iloc[0] < 0.5  # not trained yet
    assert set(table.task) == {"ioi"}
    assert table.n_tokens.unique().tolist() == [0, 5120, 10240]
    assert all(isinstance(value, float) and value == value for value in table["cpr"].tolist())
    run_train(tmp_path / "plain")
    assert weight_hashes(run) == weight_hashes(tmp_path / "plain")
    small = ("evaluation.blocks.circuits.n_pairs=4", "~evaluation.blocks.behaviour", "n_tokens=3_000")
    results = run_evaluate(f"load={run}", f"out={tmp_path / 'out'}", "circuits=[ioi,successor]", *small)
    assert not results.errors
    for report in results.reports.values():
        assert list(report["circuits"]["tasks"]) == ["ioi", "successor"]
        assert report["circuits"]["dictionaries"] == list(results.reports)
    drawn = pd.read_csv(tmp_path / "out" / "plots" / "circuits.csv")
    assert set(drawn.cut) == {"dictionaries", "neurons", "pca", "random"}
    assert set(drawn.task) == {"ioi", "successor"}


def test_callbacks_that_have_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.circuits: Circuits in training need tasks"):
        run_train(tmp_path / "run", "callbacks=circuits")
    assert not (tmp_path / "run").exists()
    planted = (
        "experiment=planted",
        "callbacks=circuits",
        "circuits=[ioi]",
        "n_tokens=10_000",
        "statistics_n_tokens=2_000",
    )
    with pytest.raises(DictlearnError, match="Planted activations come without a language model: callbacks=none"):
        train(composed("train", [*planted, f"run_dir={tmp_path / 'planted'}"]), planted, Console(quiet=True))


def test_a_wrong_task_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for overrides in (("circuits=[iou]",), ("circuits=[iou]", "callbacks=circuits", "~evaluation.blocks.circuits")):
        with pytest.raises(ConfigError, match="has no kind 'iou'"):
            run_train(tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists()
