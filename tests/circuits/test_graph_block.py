"""The block `graph`, and evaluate.py graph=..."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from dictlearn.circuits.graphs.block import PromptGraph, slug_of
from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.influence import graph_scores, prune
from dictlearn.config import ConfigError
from dictlearn.data.planted import Planted
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.embedded import LM_FOLDER
from dictlearn.evaluation import EvaluationContext
from dictlearn.lm import LM, load_lm, skeleton
from dictlearn.overrides import enter, quoted
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError
from tests.circuits.setup import filled
from tests.runs import ROOT, command, composed, run_evaluate, run_train

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm(str(LM_FOLDER))


def some_transcoders() -> dict[str, Dictionary]:
    sites = {f"t{layer}": ([f"mlp_in.{layer}"], [f"mlp_out.{layer}"]) for layer in (1, 3)}
    return {name: filled(Linear(128, 128, 64, TopK(k=4), *own), 1).float() for name, own in sites.items()}


def test_the_numbers_are_those_of_the_graph(lm: LM, tmp_path: Path) -> None:
    own, ids = some_transcoders(), torch.randint(3, 600, (2, 16))
    context = EvaluationContext(lm, own, ids, torch.ones_like(ids, dtype=torch.bool))
    settings: dict[str, Any] = {"max_latents": 40, "max_logits": 3, "logit_share": 0.99}
    block = PromptGraph(PROMPT, str(tmp_path / "graph"), **settings, node_share=0.95, edge_share=0.9)
    sections = block.run(context)
    assert sections["t1"] == sections["t3"]
    found = sections["t1"]["graph"]
    graph = attribution_graph(lm, own, PROMPT, **settings)
    kept = prune(graph, 0.95, 0.9)
    scores = graph_scores(graph)
    assert (found["replacement"], found["completeness"]) == pytest.approx(tuple(scores))
    assert found["n_active"] == 2 * 4 * len(graph.tokens) > found["n_latents"] == 40
    assert found["n_kept_edges"] == int(kept.edges.sum())
    assert found["n_kept_latents"] + found["n_kept_errors"] + len(graph.tokens) == int(kept.nodes.sum())
    assert found["targets"] == [own.text for own in graph.logits]
    assert found["target_probabilities"] == [[own.probability] for own in graph.logits]
    assert (found["next_token"], found["probability"]) == (graph.logits[0].text, graph.logits[0].probability)
    assert found["dictionaries"] == ["t1", "t3"]
    json.dumps(found, allow_nan=False)
    model = json.loads(Path(found["json"]).read_text(encoding="utf-8"))
    assert len(model["links"]) == found["n_kept_edges"]
    assert model["metadata"]["node_threshold"] == 0.95
    own_scores = model["metadata"]["dictlearn"]
    assert own_scores.pop("n_per_layer") == {}
    assert own_scores.items() <= found.items()
    assert own_scores["replacement"] == pytest.approx(scores.replacement)
    latents = [node for node in model["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert latents
    assert all(len(node["clerp"].split()) == 3 for node in latents)  # labels are promoted tokens
    assert Path(found["page"]).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {path.name for path in (tmp_path / "graph").iterdir()} == {
        Path(found["page"]).name,
        Path(found["json"]).name,
        "graph-metadata.json",
    }


def test_without_a_prompt_there_is_none(tmp_path: Path) -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model = Planted().own_lm("cpu")
    assert model is not None
    context = EvaluationContext(model, some_transcoders(), ids, torch.ones_like(ids, dtype=torch.bool))
    assert PromptGraph(None, str(tmp_path / "graph")).run(context) == {}
    assert not (tmp_path / "graph").exists()
    with pytest.raises(DictlearnError, match="planted activations come without a language model"):
        PromptGraph("a", str(tmp_path / "graph")).run(context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "graph must be the text of a prompt, or null, got ' '"),
        ({"targets": "w"}, "targets must be a list of tokens, or null, got 'w'"),
        ({"targets": [["a", "b", "c"]]}, "A target is a token, as text or id, or a pair"),
        ({"max_latents": 0}, "max_latents must be a whole number, at least 1, got 0"),
        ({"max_logits": True}, "max_logits must be a whole number"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"logit_share": 0}, "logit_share must be above 0 and at most 1, got 0"),
        ({"node_share": 1.1}, r"node_share must be above 0 and at most 1, got 1\.1"),
        ({"edge_share": math.nan}, "edge_share must be above 0 and at most 1, got nan"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        PromptGraph(**{"prompt": "a", "folder": "b", **settings})


def test_a_prompt_longer_than_the_lm_takes(lm: LM) -> None:
    with pytest.raises(DictlearnError, match=rf"The prompt has 400 tokens, and .* takes {lm.n_positions} at most"):
        attribution_graph(lm, some_transcoders(), torch.full((1, 400), 5))


def test_chosen_targets_are_a_graph_of_their_own(lm: LM, tmp_path: Path) -> None:
    """Two graphs of one prompt lie beside each other, with their scores, and the same one again replaces itself."""
    own, ids = some_transcoders(), torch.randint(3, 600, (2, 16))
    context = EvaluationContext(lm, own, ids, torch.ones_like(ids, dtype=torch.bool))
    for targets in (None, [[" Mary", " John"]], [[" Mary", " John"]]):
        block = PromptGraph(PROMPT, str(tmp_path), targets, max_latents=20)
        found = block.run(context)["t1"]["graph"]
    assert found["targets"] == ["␣Mary - ␣John"]
    ids = attribution_graph(lm, own, PROMPT).ids[None]
    p = lm.model(ids).logits[0, -1].softmax(-1)
    of_words = [
        float(p[lm.tokenizer(word, add_special_tokens=False)["input_ids"][0]]) for word in (" Mary", " John")
    ]
    assert found["target_probabilities"] == [pytest.approx(of_words, rel=1e-3)]
    listed = json.loads((tmp_path / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    likeliest = [logit.text for logit in attribution_graph(lm, own, PROMPT).logits]
    assert found["next_token"] == likeliest[0]
    assert [one["dictlearn"]["targets"] for one in listed] == [likeliest, ["␣Mary - ␣John"]]
    assert listed[1]["dictlearn"]["completeness"] == found["completeness"]
    assert len(list(tmp_path.glob("*.html"))) == 2


def test_what_is_wrong_with_a_prompt_is_known_without_weights(lm: LM) -> None:
    model = skeleton(str(LM_FOLDER))
    own = some_transcoders()

    def found(prompt: str, targets: Any = None) -> list[str]:
        return PromptGraph(prompt, "x", targets).problems(model, "embedded", lambda: lm.tokenizer, own)

    assert found(PROMPT) == found(PROMPT, [" Mary", [" Mary", " John"]]) == []
    assert found(" ".join(["Mary"] * 400)) == [
        f"The prompt has 400 tokens, and embedded takes {lm.n_positions} at most."
    ]
    (problem,) = found(PROMPT, [" Mary John"])
    assert problem.startswith("A target is one token, ' Mary John' is 2: ")


def test_a_file_of_another_kind_in_the_folder_is_found_first(lm: LM, tmp_path: Path) -> None:
    block = PromptGraph(PROMPT, str(tmp_path))

    def found() -> list[str]:
        return block.problems(lm.model, "embedded", lambda: lm.tokenizer, some_transcoders())

    file = tmp_path / "graph-metadata.json"
    for text, message in (
        ("{", " must be a list of graphs in JSON: "),
        ("[1]", ' must be {"graphs": [...]}, got [1]'),
    ):
        file.write_text(text, encoding="utf-8")
        (problem,) = found()
        assert problem.startswith(f"{file}{message}")
    file.unlink()
    assert found() == []


def test_slugs() -> None:
    assert slug_of("When Mary, and")[:-7] == "when-mary-and"
    assert slug_of("x" * 99)[:-7] == "x" * 40
    assert slug_of("a", ["b"]) != slug_of("a") != slug_of("a", ["c"]) != slug_of("a", ["b"])
    assert slug_of("a", [("b", "c")]) != slug_of("a", ["b", "c"])
    prompts = ["a", "a ", "A", "x" * 99, "x" * 98, "é", "…"]
    assert len({slug_of(prompt) for prompt in prompts}) == len(prompts)
    assert all(set(slug_of(prompt)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for prompt in prompts)


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        "John's [x] {y: 1} = 2",
        'say "hi", \\"ho\\" \\',
        "a ${load} b \\${x} $x",
        " lead and trail ",
        "1234",
        "true",
        "null ",
        "two\nlines",
        '"Hi," said Mary, "and bye"',
        '"Hi"',
        "'one','two'",
        '"',
        "😀 </script>",
    ],
)
def test_any_text_is_a_prompt(prompt: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", ["load=x", "out=y", quoted(f"graph={prompt}")])
    assert cfg.evaluation.blocks.graph.prompt == prompt


def test_other_overrides_are_as_they_are() -> None:
    for override in ("graph=null", "graph=", "load=a b", "graph", "evaluation=graph"):
        assert quoted(override) == quoted(override, True) == override
    for override in (
        'graph="a, b"',
        'graph="a, b","c"',
        "graph='a'",
        "graph='a' , \"b's\"",
        r'graph="a \"b\"","c"',
    ):
        assert quoted(override, True) == override
        assert quoted(override) != override
    for override in (
        'graph="Hi," said Mary, "and bye"',
        'graph="a","b',
        'graph="a",',
        "graph=\"a','b\"x",
        'graph="',
    ):
        assert quoted(override, True) != override


@pytest.mark.parametrize(
    ("override", "prompts"),
    [
        ("graph=Mary, John", ["Mary, John"]),
        ('graph="Mary, John","a=b, c"', ["Mary, John", "a=b, c"]),
        ('graph="Hi," said Mary, "and bye"', ['"Hi," said Mary, "and bye"']),
        ('graph="Mary"', ["Mary"]),
    ],
)
def test_a_sweep_splits_no_prompt(monkeypatch: pytest.MonkeyPatch, override: str, prompts: list[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr("sys.argv", ["evaluate.py", "-m", "load=a", "out=b", override])

    def jobs() -> None:
        parsed = OverridesParser.create().parse_overrides(sys.argv[2:])
        (own,) = [one for one in parsed if one.key_or_group == "graph"]
        texts = own.sweep_string_iterator() if own.is_sweep_override() else [own.get_value_element_as_str()]
        started.extend(composed("evaluate", ["out=b", f"graph={text}"]).graph for text in texts)

    started: list[str] = []
    enter(ROOT / "conf", "evaluate", jobs, lambda cfg, _, __: seen.append(cfg.graph))
    assert seen == started == prompts


def test_through_the_doors(tmp_path: Path) -> None:
    """A run with transcoders and an SAE: training knows no graph; evaluate.py makes one, but not with the SAE."""
    run = tmp_path / "run"
    sites = ("~dictionaries.attn", "dictionaries.resid.site=resid_post.1")
    assert not run_train(run, *sites).errors
    assert "graph" not in composed("train", []).evaluation.blocks
    out = tmp_path / "out"
    overrides = ("evaluation=graph", f"graph={PROMPT}", f"out={out}")
    load = f"load={run / 'dictionaries' / 'mlp_out.2'}"
    door = command("evaluate.py", *overrides, load)
    printed, _ = door.communicate(timeout=300)
    assert door.returncode == 0, printed
    report = json.loads((out / "mlp_out.2" / "report.json").read_text())
    assert "sparsity" not in report
    graph = report["graph"]
    assert graph["prompt"] == PROMPT
    assert Path(graph["page"]).parent == out / "graph"
    assert f"Graph: {graph['page']} (replacement score {graph['replacement']:.3f}" in printed
    with pytest.raises(
        ConfigError, match=r"graph: Attribution graphs are of transcoders .* resid_post\.1 is a Linear"
    ):
        run_evaluate("evaluation=graph", "graph=Mary", f"load={run}", f"out={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match=r"graph: The prompt has 4\d\d tokens, and embedded takes \d+ at most"):
        run_evaluate("evaluation=graph", f"graph={'Mary ' * 400}", load, f"out={tmp_path / 'none'}")
    targets = "evaluation.blocks.graph.targets=[[' Mary',' Jo hn']]"
    with pytest.raises(ConfigError, match=r"graph: A target is one token, ' Jo hn' is 2"):
        run_evaluate("evaluation=graph", "graph=Mary", targets, load, f"out={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    chosen = run_evaluate("evaluation=graph", "graph=Mary", targets.replace("o h", "oh"), load, f"out={out}")
    assert chosen.reports["mlp_out.2"]["graph"]["targets"] == ["␣Mary - ␣John"]
    results = run_evaluate(f"load={run}", f"out={out}", "n_tokens=500", "~evaluation.blocks.behaviour")
    assert not results.errors
    assert all("graph" not in report for report in results.reports.values())


def test_it_is_a_choice_of_evaluate(tmp_path: Path) -> None:
    cfg = composed("evaluate", ["load=a", f"out={tmp_path}", "graph=b", "evaluation=graph"])
    assert list(cfg.evaluation.blocks) == ["graph"]
    assert cfg.evaluation.blocks.graph.folder == f"{tmp_path}/graph"
    with pytest.raises(ConfigError, match=r"evaluation\.blocks\.graph: max_latents must be"):
        run_evaluate("load=a", f"out={tmp_path}", "graph=b", "evaluation.blocks.graph.max_latents=0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=graph"], 'evaluation=graph makes nothing without graph="a prompt"'),
        (["evaluation=graph", "graph=b", "circuits=[ioi]"], "circuits has no effect: .* it has graph"),
        (["graph=b", "~evaluation.blocks.graph"], "graph has no effect: .* no block 'graph'"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_evaluate("load=a", f"out={tmp_path / 'out'}", *overrides)
    assert not (tmp_path / "out").exists()


def test_what_a_reader_should_know(lm: LM, tmp_path: Path) -> None:
    own, ids = some_transcoders(), torch.randint(3, 600, (2, 16))
    context = EvaluationContext(lm, own, ids, torch.ones_like(ids, dtype=torch.bool))

    def warnings(prompt: str, **settings: Any) -> list[str]:
        return PromptGraph(prompt, str(tmp_path), **settings).run(context)["t1"]["warnings"]

    assert warnings("When Mary went") == []
    (unknown,) = warnings("When windowsills went")
    assert unknown.startswith("1 tokens of the prompt are words that")
    assert "at positions 1:" in unknown
    (few,) = warnings("When Mary went", max_latents=5)
    assert few.startswith("5 of 24 active latents are nodes")


def test_a_target_that_lacks_its_space(lm: LM, tmp_path: Path) -> None:
    """At the end of the prompt ' Mary' is likely, and 'Mary' another token, which is not."""
    own, ids = some_transcoders(), torch.randint(3, 600, (2, 16))
    context = EvaluationContext(lm, own, ids, torch.ones_like(ids, dtype=torch.bool))

    def warnings(*targets: Any) -> list[str]:
        return PromptGraph(PROMPT, str(tmp_path), targets).run(context)["t1"]["warnings"]

    assert warnings(" Mary", [" Mary", " John"]) == []
    found = warnings("Mary", ["Mary", " John"], [" John", "Mary"])
    assert len(found) == 1
    assert re.fullmatch(r"target 'Mary' has probability \S+e-06, ' Mary' 0\.98\d: did you mean it\?", found[0])
