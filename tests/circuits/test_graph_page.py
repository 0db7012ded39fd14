"""The page of a graph: its data, what it escapes, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from dictlearn.circuits.graphs.build import attribution_graph
from dictlearn.circuits.graphs.graph import Graph, Logit
from dictlearn.circuits.graphs.influence import Kept, graph_scores, prune
from dictlearn.circuits.graphs.page import page_data, write_page
from dictlearn.circuits.graphs.top_tokens import TopTokens
from dictlearn.lm import load_lm
from tests.circuits.graphs_setup import N_LAYERS, some_ids, transcoders
from tests.tiny_lms import tiny_lm_folder

NASTY = ["</script><b id=x>", " \"'&", "<!--", "😀\u2028", "\n", "a", "{{ data }}"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def nasty_graph() -> Graph:
    """Seven tokens; latent 0 reads two embeddings and an error, latent 1 reads latent 0 and a bias."""
    kinds = ["latent", "latent", "error", "error", *["embedding"] * 7, "bias", "other", "logit"]
    table = pd.DataFrame({"kind": kinds, "dictionary": "", "layer": -1, "position": -1, "index": -1})
    table.loc[:1, ["dictionary", "index"]] = [["mlp.0 <i>", 3], ["mlp.1", 4]]
    table.loc[:3, "layer"] = [0, 1, 0, 1]
    table.loc[:3, "position"] = [2, 6, 2, 6]
    table.loc[4:10, "position"] = range(7)
    table.loc[4:10, "index"] = range(20, 27)
    table.loc[13, ["layer", "position", "index"]] = [2, 6, 50]
    edges = torch.zeros(3, 13, dtype=torch.float64)
    edges[0, [2, 4, 6, 11]] = torch.tensor([0.5, 4.0, -1.0, 0.25], dtype=torch.float64)
    edges[1, [0, 3, 11, 12]] = torch.tensor([2.0, 0.5, -0.75, 1.0], dtype=torch.float64)
    edges[2, [0, 1, 10]] = torch.tensor([-1.0, 3.0, 0.01], dtype=torch.float64)
    info = {"n_layers": 2, "lm": "<lm>", "dictionaries": ["mlp.0 <i>", "mlp.1"], "n_per_layer": {}}
    return Graph(
        "".join(NASTY),
        torch.arange(20, 27),
        NASTY,
        table,
        edges,
        torch.tensor([3.75, 2.75]).double(),
        edges.sum(-1),
        [Logit("<script>alert(1)</script>", 50, None, 0.5)],
        torch.tensor([0.5]).double(),
        info,
    )


TOPS = {0: TopTokens(["</script>", "b"], ["&amp;"]), 1: TopTokens(["zebra"], ["\n"])}


class Tags(HTMLParser):
    """The tags of a page, and the text in each script by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = (dict(attrs).get("id") or "") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.inside = None


def test_rows_add_up_to_their_totals(tmp_path: Path) -> None:
    lm = load_lm(str(tiny_lm_folder(tmp_path, "gpt2", n_layers=N_LAYERS)))
    lm.model.double()
    graph = attribution_graph(lm, transcoders(lm.model), some_ids(), max_latents=20)
    kept = prune(graph, 0.7, 0.8)
    data = page_data(graph, kept, {})
    sums = [0.0] * len(data["nodes"])
    for source, target, weight in data["edges"]:
        assert source < len(data["nodes"])
        sums[target] += weight
    rows = [(node["row"], own) for node, own in zip(data["nodes"], sums, strict=True) if "row" in node]
    assert len(rows) == int(kept.nodes[: graph.n_latents].sum()) + graph.n_logits
    assert any(row["other"] for row, _ in rows)
    for row, own in rows:
        assert own + row["pruned"] + row["bias"] + row["other"] == pytest.approx(
            row["total"], abs=1e-5 * row["size"]
        )
    assert data["counts"]["edges"] == int(kept.edges.sum())
    assert data["counts"]["latents"] == sum(node["kind"] == "latent" for node in data["nodes"])
    assert data["scores"]["replacement"] == pytest.approx(graph_scores(graph).replacement, rel=1e-5)


def test_shares_of_influence_by_hand() -> None:
    # logit: latents 1/4.01 and 3/4.01; latent 1: latent 0 and its error 4 to 1; latent 0: 5.5 in all
    graph = nasty_graph()
    data = page_data(graph, everything(graph), TOPS)
    found = {node["id"]: node["influence"] for node in data["nodes"] if "influence" in node}
    of_1 = 3 / 4.01
    of_0 = 1 / 4.01 + of_1 * 0.8
    total = of_1 + of_0 + of_1 * 0.2 + of_0 + 0.01 / 4.01
    assert found["1_4_6"] == pytest.approx(of_1 / total, rel=1e-5)
    assert found["0_3_2"] == pytest.approx(of_0 / total, rel=1e-5)
    assert found["E_20_0"] == pytest.approx(of_0 * 4 / 5.5 / total, rel=1e-5)
    rows = {node["id"]: node["row"] for node in data["nodes"] if "row" in node}
    assert rows["1_4_6"] == {"total": 2.75, "pruned": 0, "bias": -0.75, "other": 1, "size": 2.5, "n_pruned": 0}


def everything(graph: Graph) -> Kept:
    return prune(graph, 1.0, 1.0)


def test_nothing_of_the_data_is_markup(tmp_path: Path) -> None:
    graph = nasty_graph()
    text = write_page(graph, everything(graph), tmp_path / "page.html", TOPS).read_text(encoding="utf-8")
    page = Tags(text)
    assert json.loads(page.scripts["data"]) == page_data(graph, everything(graph), TOPS)
    assert not {"b", "i", "lm"} & set(page.tags)
    assert page.tags.count("script") == 3
    addresses = set(re.findall(r"https?://[^\s\"'<]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace
    assert "default-src 'none'" in text
    assert not re.search(r"\bsrc=|\bhref=|@import|url\(|innerHTML", text)


# -- in a browser --


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., str]:
    """The document after its scripts have run, at an address and after further JavaScript."""

    def run(address: str = "", script: str = "", keep: Kept | None = None, graph: Graph | None = None) -> str:
        graph = graph or nasty_graph()
        file = write_page(graph, keep or everything(graph), tmp_path / "page.html", TOPS)
        if script:
            text = file.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
            file.write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,800", "--enable-logging=stderr"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        found = subprocess.run(
            [
                str(CHROMIUM),
                *flags,
                profile,
                "--virtual-time-budget=2000",
                "--dump-dom",
                f"{file.as_uri()}{address}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "CONSOLE" not in found.stderr, found.stderr
        return found.stdout

    return run


def section(document: str, name: str) -> str:
    """The text of the element with this id, tags taken off, one line for each button."""
    start = document.index(f'id="{name}"')
    end = min(document.find(mark, start) for mark in ("</section>", "</aside>") if mark in document[start:])
    text = document[document.index(">", start) + 1 : end].replace("<button", "\n<button").replace("<div", "\n<div")
    return re.sub(r"<[^>]*>", " ", text)


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("\N{MINUS SIGN}", "-")


def classes(document: str) -> list[str]:
    return re.findall(r'<g class="node ([^"]*)"', picture(document))


def picture(document: str) -> str:
    return document.partition('id="panel"')[0]


@needs_browser
def test_the_picture(opened: Callable[..., str]) -> None:
    document = opened()
    assert sorted(classes(document)) == sorted(["latent"] * 2 + ["error"] * 2 + ["embedding"] * 7 + ["logit"])
    assert document.count('class="edge ') == 8  # the strongest three inputs of three targets, but one has two
    assert "&lt;script&gt;ale… 50 %" in document
    places = re.findall(r'<g class="node [^"]*" transform="translate\(([\d.-]+) ([\d.-]+)\)"', picture(document))
    assert len(set(places)) == len(classes(document))  # none upon another
    assert "mlp.1 / 4 @6 {{ data }} → zebra" in section(document, "top")


@needs_browser
def test_a_link_selects_and_pins(opened: Callable[..., str]) -> None:
    document = opened("#clicked=1_4_6&pinned=0_3_2,1_4_6,nothing")
    inputs = section(document, "inputs").splitlines()
    assert "mlp.0 &lt;i&gt; / 3 @2 &lt;!-- → &lt;/script&gt;" in inputs[1]
    assert re.search(r"\+2\.00\s+80 %", inputs[1])
    assert re.search(r"error of layer 1.*\+0\.500\s+20 %", inputs[2])
    sums = plain(section(document, "sums"))
    assert "0 pruned edges 0.00" in sums
    assert "biases -0.750 latents that are no nodes +1.00 sum: pre-activation +2.75" in sums
    assert re.search(r"logit “&lt;script.*\+3\.00\s+75 %", section(document, "outputs"))
    assert len(re.findall('class="drop"', document)) == 2
    found = classes(document)
    assert sum("clicked" in own for own in found) == 1
    assert sum("pinned" in own for own in found) == 2
    assert sum("dim" in own for own in found) == len(found) - 4  # itself, two inputs, one output
    drawn = document.partition('id="active"')[2].partition("</g>")[0]
    assert drawn.count('class="edge ') == 4  # three of its own, one between the two pinned nodes


@needs_browser
def test_pruned_edges_are_summed(opened: Callable[..., str]) -> None:
    keep = everything(nasty_graph())
    keep.edges[0, 2] = keep.edges[0, 6] = False
    sums = plain(section(opened("#clicked=0_3_2", keep=keep), "sums"))
    assert "2 pruned edges -0.500 biases +0.250 sum: pre-activation +3.75" in sums


@needs_browser
def test_chosen_targets_and_numbers_within_a_layer(opened: Callable[..., str]) -> None:
    """A difference has two probabilities; cross-layer latents are counted in their layer, and in all."""
    graph = nasty_graph()
    graph.info["n_per_layer"]["mlp.1"] = 3  # type: ignore[index]
    graph.logits[0] = Logit("␣a - ␣b", 50, 51, 0.5, 0.25)
    document = opened("#clicked=1_1_6", graph=graph)
    selected = plain(re.sub("<[^>]*>", " ", section(document, "selected")))
    assert "mlp.1 layer 1 / 1 at" in selected
    assert "number in mlp.1 4" in selected
    assert "␣a - ␣b</text>" in document
    assert "NaN" not in document
    sums = plain(section(opened("#clicked=3_50_6", graph=graph), "sums"))
    assert "sum: difference of logits +2.01" in sums
    selected = plain(re.sub("<[^>]*>", " ", section(opened("#clicked=3_50_6", graph=graph), "selected")))
    assert "probabilities 50 %, 25 %" in selected
    graph.logits[0] = Logit(" a", 50, None, 0.5)
    document = opened("#clicked=3_50_6", graph=graph)
    assert "␣a 50 %</text>" in document
    assert "probability 50 %" in plain(re.sub("<[^>]*>", " ", section(document, "selected")))
    script = """
        const numbers = ["mlp.1/4", "1/1", "mlp.1 layer 1 / 1", "1", "4"].map((text) => matches(text).length);
        document.title = JSON.stringify(numbers);"""
    title = opened("", script, graph=graph).partition("<title>")[2].partition("</title>")[0]
    assert json.loads(title) == [1, 1, 1, 1, 0]


STEPS = {  # what the reader does, and the address then
    "select(byId.get('1_4_6'))": "#clicked=1_4_6",
    "at('1_4_6'); at('0_3_2', {ctrlKey: true})": "#clicked=1_4_6&pinned=0_3_2",
    "at('0_3_2', {shiftKey: true}); at('E_20_0', {metaKey: true})": "#pinned=0_3_2,E_20_0",
    "at('1_4_6'); at('1_4_6')": "",
    "at('1_4_6'); get('pin').click()": "#clicked=1_4_6&pinned=1_4_6",
    "at('0_3_2', {ctrlKey: true}); document.querySelector('.drop').click()": "",
    "at('1_4_6'); document.querySelector('#inputs .row').click()": "#clicked=0_3_2",
    "at('1_4_6'); document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))": "",
    "find('mlp.1 / 4')": "#clicked=1_4_6",
    "find('1/4')": "#clicked=1_4_6",
    "find('ZEBRA')": "#clicked=1_4_6",
    "find('😀')": "#clicked=E_23_3",
    "find('nowhere')": "",
}


@needs_browser
def test_what_the_reader_does(opened: Callable[..., str]) -> None:
    steps = "".join(
        f"select(null); for (const node of [...state.pinned]) pin(node);\n{step};\nfound.push(location.hash);\n"
        for step in STEPS
    )
    document = opened(
        script=f"""
        const found = [];
        const at = (id, keys = {{}}) => byId.get(id).element.firstChild.dispatchEvent(
          new MouseEvent("click", {{bubbles: true, ...keys}}));
        function find(text) {{
          get("search").value = text;
          get("search").dispatchEvent(new Event("input"));
          get("search").dispatchEvent(new KeyboardEvent("keydown", {{key: "Enter"}}));
        }}
        {steps}
        document.title = JSON.stringify(found);"""
    )
    title = document.partition("<title>")[2].partition("</title>")[0]
    assert dict(zip(STEPS, json.loads(unescape(title)), strict=True)) == STEPS


@needs_browser
def test_hover_and_search(opened: Callable[..., str]) -> None:
    over = "byId.get('1_4_6').element.firstChild.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
    document = opened("#clicked=0_3_2", over)
    tip = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", document.partition('id="tip"')[2].partition("<script")[0]))
    for words in (
        "mlp.1 / 4",
        "activation 2.75",
        "promotes zebra",
        "suppresses ⏎",
        "edge from mlp.0 &lt;i&gt; / 3: +2.00",
    ):
        assert words in tip
    document = opened("", "get('search').value = 'zebra'; search();")
    assert ">1 node<" in document
    assert [own for own in classes(document) if "match" in own] == ["latent match"]
