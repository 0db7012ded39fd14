"""Publishing, with the genuine client and a local server that takes uploads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import dictlearn
from dictlearn.evaluation.table import COLUMNS
from dictlearn.hub.__main__ import main
from dictlearn.hub.card import BEGIN, METRICS
from dictlearn.hub.publish import push
from dictlearn.types import DictlearnError
from tests.hub.publishing import REPO, assert_bit_equal, autoencoder, sha256, transcoder, write
from tests.hub.server import Repository
from tests.hub.uploads import FIRST_COMMIT, WritableHub

NUMBERS = {"cfg.json", "report.json", "sae_weights.safetensors"}


def manifest(server: WritableHub, repo: str = REPO) -> dict[str, dict[str, Any]]:
    lines = server.files(repo)["manifest.jsonl"].decode().splitlines()
    return {line["path"]: line for line in map(json.loads, lines)}


def table(card: str) -> dict[str, dict[str, str]]:
    """The table's rows by path, as a reader of the markdown sees them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


@pytest.mark.parametrize("path", ["", "layer_1/a"])
def test_what_is_pushed_comes_back(server: WritableHub, tmp_path: Path, path: str) -> None:
    made = autoencoder()
    folder = write(tmp_path / "a", made, l0=3.0)
    (folder / "latents.parquet").write_bytes(b"left out")
    pushed = dictlearn.push(folder, REPO, path)
    assert pushed.url == f"{server.url}/{REPO}/commit/{pushed.oid}"
    assert server.repositories[REPO].revisions["main"] == pushed.oid
    assert pushed.refs == (f"{REPO}:{path}@{pushed.oid}" if path else f"{REPO}@{pushed.oid}",)
    assert_bit_equal(dictlearn.load(pushed.refs[0]), made)
    assert_bit_equal(dictlearn.load(REPO), made)
    files = server.files(REPO)
    inside = {f"{path}/{name}" if path else name for name in NUMBERS}
    assert set(files) == {".gitattributes", "README.md", "manifest.jsonl", *inside}
    assert {name: files[f"{path}/{name}" if path else name] for name in NUMBERS} == {
        name: (folder / name).read_bytes() for name in NUMBERS
    }
    assert pushed.sizes == {name: len(files[name]) for name in {"README.md", "manifest.jsonl", *inside}}
    lines = manifest(server)
    assert {name: (line["size"], line["sha256"]) for name, line in lines.items()} == {
        name: (len(files[name]), sha256(files[name])) for name in inside
    }
    assert pushed == push(folder, REPO, path), "nothing has changed, so that there is nothing to commit"


def test_a_run_is_one_commit_with_a_card(server: WritableHub, tmp_path: Path) -> None:
    made = {"resid_post.1": autoencoder(), "mlp_out.1_k-4": transcoder()}
    for (name, dictionary), l0 in zip(made.items(), (31.26, None), strict=True):
        write(tmp_path / "run" / "dictionaries" / name, dictionary, l0)
    (tmp_path / "run" / "config.yaml").write_text("secret: 1")
    pushed = push(tmp_path / "run", REPO, "v1")
    assert set(server.repositories[REPO].revisions.values()) == {FIRST_COMMIT, pushed.oid}
    for name, dictionary in made.items():
        assert_bit_equal(dictlearn.load(f"{REPO}:v1/{name}"), dictionary)
    assert not [name for name in server.files(REPO) if "config" in name]

    card = ModelCard(server.files(REPO)["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "dictlearn",
        "tags": ["dictlearn", "saelens", "sparse-autoencoder", "transcoder"],
        "base_model": "openai-community/gpt2",
    }
    rows = table(card.text)
    assert set(rows) == {"v1/resid_post.1", "v1/mlp_out.1_k-4"}
    measured = {key: rows["v1/resid_post.1"][key] for key in METRICS}
    numbers = ("31.3", "25.0%", "0.1235", "0.900", "0.0312", "-", "0.5000", "200,113")
    assert measured == dict(zip(METRICS, numbers, strict=True))
    assert {rows["v1/mlp_out.1_k-4"][key] for key in METRICS} == {"-"}
    assert [rows[f"v1/{name}"]["SAELens"] for name in made] == ["yes", "no"]
    assert rows["v1/mlp_out.1_k-4"]["writes"] == "mlp_out.1"
    ran: dict[str, Any] = {}
    exec(card.text.split("```python\n")[1].split("```")[0], ran)  # how to load it
    assert_bit_equal(ran["dictionary"], made["mlp_out.1_k-4"])
    assert f'SAE.from_pretrained("{REPO}", "v1/resid_post.1")' in card.text


def test_the_card_has_numbers_of_the_report_by_their_names() -> None:
    of_reports = {path for path, _ in COLUMNS.values()} | {"data.n_counted"}
    assert {path for path, _ in METRICS.values()} <= of_reports


def test_a_second_push_keeps_the_first_and_what_others_wrote(server: WritableHub, tmp_path: Path) -> None:
    first, second = autoencoder(), autoencoder("EleutherAI/pythia-70m")
    push(write(tmp_path / "a", first, l0=1.0), REPO, "a")
    files = dict(server.files(REPO))
    edited = files["README.md"].decode().replace("---\n\n#", "license: mit\n---\n\n#") + "\nBy hand.\n"
    line = '{"path": "b/notes.txt", "size": 1, "sha256": "0", "author": "me"}\n{"path": "gone", "size": 1}\n'
    files |= {"README.md": edited.encode(), "b/notes.txt": b"?"}
    server.put(REPO, files | {"manifest.jsonl": files["manifest.jsonl"] + line.encode()})
    push(write(tmp_path / "b", second, l0=2.0), REPO, "b")
    assert_bit_equal(dictlearn.load(f"{REPO}:a"), first)
    assert_bit_equal(dictlearn.load(f"{REPO}:b"), second)
    text = server.files(REPO)["README.md"].decode()
    assert text.endswith("\nBy hand.\n")
    assert text.count(BEGIN) == 1
    assert {path: row["L0"] for path, row in table(text).items()} == {"a": "1.0", "b": "2.0"}
    assert ModelCard(text).data.to_dict() == {
        "library_name": "dictlearn",
        "tags": ["dictlearn", "saelens", "sparse-autoencoder"],
        "base_model": ["openai-community/gpt2", "EleutherAI/pythia-70m"],
        "license": "mit",
    }
    lines = manifest(server)
    assert set(lines) == {f"{place}/{name}" for place in "ab" for name in NUMBERS} | {"b/notes.txt"}
    assert lines["b/notes.txt"]["author"] == "me"


def test_a_dictionary_is_replaced_with_its_report(server: WritableHub, tmp_path: Path) -> None:
    push(write(tmp_path / "a", autoencoder(), l0=1.0), REPO, "x")
    made = autoencoder()
    push(write(tmp_path / "b", made), REPO, "x")
    assert_bit_equal(dictlearn.load(f"{REPO}:x"), made)
    assert "x/report.json" not in {*server.files(REPO), *manifest(server)}
    assert table(server.files(REPO)["README.md"].decode())["x"]["L0"] == "-"


@pytest.mark.parametrize("text", [b"# By hand\n", b"---\n- a list\n---\n"], ids=["no block", "no header"])
def test_a_card_that_others_wrote_stays(
    server: WritableHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes
) -> None:
    text += BEGIN.encode() if b"list" in text else b""
    server.repositories[REPO] = Repository({"README.md": text}, {"main": FIRST_COMMIT, FIRST_COMMIT: FIRST_COMMIT})
    push(write(tmp_path / "a", autoencoder()), REPO, "a")
    assert server.files(REPO)["README.md"] == text
    assert "README.md of someone/mine stays as it is" in caplog.text


def test_a_branch(server: WritableHub, tmp_path: Path) -> None:
    old, new = autoencoder(), autoencoder()
    push(write(tmp_path / "a", old), REPO, "a")
    push(write(tmp_path / "b", new), REPO, "a", branch="v2")
    assert_bit_equal(dictlearn.load(f"{REPO}:a"), old)
    assert_bit_equal(dictlearn.load(f"{REPO}:a@v2"), new)
    text = server.files(REPO, "v2")["README.md"].decode()
    assert f'dictlearn.load("{REPO}:a@v2")' in text
    assert f'snapshot_download("{REPO}", revision="v2", allow_patterns=["a/cfg.json",' in text


def test_private(server: WritableHub, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", autoencoder())
    push(folder, REPO, private=True)
    assert server.repositories[REPO].private
    push(folder, "someone/public")
    assert not server.repositories["someone/public"].private
    with pytest.raises(
        DictlearnError, match=r"someone/public is there already and is public.*Nothing was committed"
    ):
        push(folder, "someone/public", private=True)


def test_paths_of_this_computer_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    made = autoencoder(str(tmp_path))
    made.metadata["data"] = {"files": ["/home/me/texts"], "name": "wikitext"}
    push(write(tmp_path / "a", made), REPO, dry_run=True)
    assert f"name paths of this computer: /home/me/texts, {tmp_path}" in caplog.text
    out = capsys.readouterr().out
    assert str(tmp_path) not in out
    assert "base_model" not in out


def test_a_dry_run_sends_nothing(server: WritableHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", autoencoder(), l0=5.0)
    planned = push(folder, REPO, "x", dry_run=True)
    assert not server.requests
    out = capsys.readouterr().out
    assert (planned.oid, planned.url, planned.refs) == (None, None, (f"{REPO}:x",))
    pushed = push(folder, REPO, "x")
    assert planned.sizes == pushed.sizes
    listing, _, card = out.partition("\n\nREADME.md:\n\n")
    printed = dict(line.removesuffix(" bytes").split() for line in listing.splitlines()[1:])
    assert printed == {name: f"{size:,d}" for name, size in pushed.sizes.items()}
    assert card.encode() == server.files(REPO)["README.md"]


def test_the_command(
    server: WritableHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(write(tmp_path / "a", autoencoder()))
    main(["push", folder, REPO, "--path", "x", "--branch", "v1", "--private"])
    oid = server.repositories[REPO].revisions["v1"]
    assert capsys.readouterr().out == f"{server.url}/{REPO}/commit/{oid}\n{REPO}:x@{oid}\n"
    with pytest.raises(SystemExit) as stopped:
        main(["push", folder, REPO, "--path", "/x"])
    assert str(stopped.value.code).startswith("path must be a folder in the repository")
    with pytest.raises(SystemExit) as stopped:
        main(["push", "--help"])
    assert stopped.value.code == 0
    assert "--dry-run" in capsys.readouterr().out


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", autoencoder())
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dictlearn.hub", "push", str(folder), REPO, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=nowhere, check=True)
    assert "sae_weights.safetensors" in done.stdout
    assert f'dictlearn.load("{REPO}")' in done.stdout
