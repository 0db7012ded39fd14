"""Data sets in folders of every layout, and over HTTP from a server that speaks the Hub's protocol."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dictlearn.data import HubText, LocalText
from dictlearn.data.hub import HubSource
from dictlearn.data.packing import ROWS_FILE
from dictlearn.data.readers import SourceError
from dictlearn.data.sources import source_from
from tests.data.fake_hub import COMMIT, NAME, serve
from tests.data.helpers import bos_tokenizer, random_documents, token_ids

ROOT = Path(__file__).parents[2]
DOCUMENTS = list(random_documents(300))
VALIDATION = ["w1 w2", "w3"]
README = """---
configs:
- config_name: plain
  default: true
  data_files:
  - split: train
    path: plain/*.jsonl
- config_name: other
  data_files:
  - split: train
    path: other/*.jsonl
---
"""


@pytest.fixture(autouse=True)
def private_downloads(tmp_path, monkeypatch):
    """Of this process and of the workers it starts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=7)


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def parquet_folder(folder):
    for i in range(3):
        write_parquet(folder / "data" / f"train-{i:05d}-of-00003.parquet", DOCUMENTS[100 * i : 100 * (i + 1)])
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", VALIDATION)


def jsonl_folder(folder):
    write_jsonl(folder / "train.jsonl", DOCUMENTS)
    write_jsonl(folder / "validation.jsonl", VALIDATION)


def readme_folder(folder):
    write_jsonl(folder / "plain" / "1.jsonl", DOCUMENTS[:200])
    write_jsonl(folder / "plain" / "2.jsonl", DOCUMENTS[200:])
    write_jsonl(folder / "other" / "1.jsonl", VALIDATION)
    (folder / "README.md").write_text(README)


def saved_folder(folder):
    splits = {"train": DOCUMENTS, "validation": VALIDATION}
    made = {key: datasets.Dataset.from_dict({"id": range(len(v)), "text": v}) for key, v in splits.items()}
    saved: Any = datasets.DatasetDict(made)  # type: ignore[call-overload]
    saved.save_to_disk(str(folder), num_shards={"train": 2, "validation": 1})


LAYOUTS = [parquet_folder, jsonl_folder, readme_folder, saved_folder]


def every(_):
    return True


def read(source, cursor=None):
    return list(source.documents(cursor or source.start, every))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_document_once_and_from_every_cursor(tmp_path, layout, streaming):
    layout(tmp_path / "set")
    text = HubText(name=str(tmp_path / "set"), streaming=streaming)
    assert text.problems() == []
    source = text.source()
    found = read(source)
    assert [document for _, document in found] == DOCUMENTS
    assert source_from(json.loads(json.dumps(source.spec()))) == source
    for i in [0, 1, 6, 7, 99, 100, 101, 150, 199, 200, 298, 299]:
        assert [document for _, document in read(source, found[i][0])] == DOCUMENTS[i + 1 :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_or_not_rows_and_held_out_documents_are_those_of_a_plain_file(tmp_path, layout):
    layout(tmp_path / "set")
    (tmp_path / "plain.txt").write_text("\n".join(DOCUMENTS) + "\n")
    sizes = {"ctx": 16, "cache_dir": str(tmp_path / "cache")}
    name = str(tmp_path / "set")
    texts = [HubText(name=name, streaming=s, **sizes) for s in (True, False)]
    plain = LocalText(path=str(tmp_path / "plain.txt"), **sizes)
    for split in ("train", "heldout"):
        stores = [text._store(bos_tokenizer(), split) for text in (*texts, plain)]
        for store in stores:
            store.wait(10**9)
        assert len({(store.folder / ROWS_FILE).read_bytes() for store in stores}) == 1
        assert len({store.spec.threshold for store in stores}) == 1
        assert stores[0].n_rows > 10


def test_a_config_and_a_split_are_chosen(tmp_path):
    readme_folder(tmp_path / "a")
    assert [d for _, d in read(HubText(name=str(tmp_path / "a"), config="other").source())] == VALIDATION
    parquet_folder(tmp_path / "b")
    assert [d for _, d in read(HubText(name=str(tmp_path / "b"), split="validation").source())] == VALIDATION


def test_one_saved_split(tmp_path):
    datasets.Dataset.from_dict({"text": VALIDATION}).save_to_disk(str(tmp_path / "set"))
    assert [d for _, d in read(HubText(name=str(tmp_path / "set")).source())] == VALIDATION
    (problem,) = HubText(name=str(tmp_path / "set"), split="test").problems()
    assert "data.split must be one of train, got 'test'" in problem


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (parquet_folder, {"split": "test"}, "data.split must be one of train, validation, got 'test'"),
        (parquet_folder, {"config": "en"}, "data.config must be one of default, got 'en'"),
        (readme_folder, {"config": "en"}, "data.config must be one of plain, other, got 'en'"),
        (parquet_folder, {"column": "body"}, "no column 'body'; it has id, text"),
        (parquet_folder, {"column": "id"}, "column 'id' holds int64, not text or lists of token ids"),
        (jsonl_folder, {"column": "body"}, "no column 'body'; it has text"),
        (saved_folder, {"column": "body"}, "no column 'body'; it has id, text"),
        (saved_folder, {"column": "id"}, "column 'id' holds int64, not text or lists of token ids"),
        (saved_folder, {"config": "en"}, "data.config must be null"),
        (parquet_folder, {"revision": "v1"}, "data.revision=v1 is for data sets on the Hub"),
        (parquet_folder, {"name": "./nothing"}, "there is no folder ./nothing"),
        (parquet_folder, {"name": ""}, "it is empty"),
        (lambda folder: folder.mkdir(), {}, "as a data set: "),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_what_does_not_exist_is_named_with_the_choices(tmp_path, layout, changes, message, streaming):
    layout(tmp_path / "set")
    (problem,) = HubText(**{"name": str(tmp_path / "set"), "streaming": streaming, **changes}).problems()
    assert message in problem
    assert not list((tmp_path / "arrow").rglob("*.arrow")), "nothing is downloaded or converted to find out"


def test_a_column_that_is_known_only_once_it_is_read(tmp_path, monkeypatch):
    """Some formats have no schema while they are streamed."""
    jsonl_folder(tmp_path / "set")
    monkeypatch.setattr(datasets.IterableDataset, "features", property(lambda _: None))
    assert [d for _, d in read(HubText(name=str(tmp_path / "set")).source())] == DOCUMENTS
    (problem,) = HubText(name=str(tmp_path / "set"), column="body").problems()
    assert "no column 'body'; it has text" in problem


def test_a_configuration_must_be_chosen_where_none_is_the_default(tmp_path):
    readme_folder(tmp_path)
    (tmp_path / "README.md").write_text(README.replace("  default: true\n", ""))
    (problem,) = HubText(name=str(tmp_path)).problems()
    assert "data.config must be one of plain, other, got None" in problem


def test_identity_changes_with_what_decides_the_rows(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "changed")]
    for folder in folders:
        readme_folder(folder)
    write_jsonl(folders[2] / "plain" / "2.jsonl", ["w1"])

    def identity(folder, **changes):
        return json.dumps(HubText(name=str(folder), **changes).source().identity())

    base = identity(folders[0])
    assert identity(folders[1]) == base, "the same content elsewhere"
    write_jsonl(folders[0] / "other" / "1.jsonl", ["w2"])
    assert identity(folders[0]) == base, "another configuration's file"
    others = [identity(folders[2]), identity(folders[0], config="other"), identity(folders[0], streaming=False)]
    assert len({base, *others}) == 4
    parquet_folder(tmp_path / "p")
    assert identity(tmp_path / "p") != identity(
        tmp_path / "p", column="id" if False else "text", split="validation"
    )


def test_identity_of_a_data_set_of_the_hub_is_its_commit():
    source = HubSource("someone/stories", "en", "train", "text", True, "a" * 40, ())
    others = [
        {"name": "someone/tales"},
        {"commit": "b" * 40},
        {"config": "de"},
        {"split": "test"},
        {"column": "body"},
    ]
    identities = [json.dumps(replace(source, **change).identity()) for change in [{}, {}, *others]]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 6


def test_rows_that_cannot_be_read_are_said(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", DOCUMENTS)
    source = HubText(name=str(tmp_path)).source()
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(SourceError, match=r"Cannot read .*, split train: DataFilesNotFoundError"):
        read(source)


def test_a_growing_store_of_a_streamed_set(tmp_path):
    """Each target is another worker that continues from the cursor."""
    for i in range(3):
        write_parquet(tmp_path / "set" / f"train-{i}.parquet", [f"{d} w{i}" for d in random_documents(2000)])
    text = HubText(name=str(tmp_path / "set"), ctx=16, cache_dir=str(tmp_path / "once"))
    whole = text.train(bos_tokenizer())
    whole.wait(10**9)
    text = HubText(name=str(tmp_path / "set"), ctx=16, cache_dir=str(tmp_path / "grown"))
    sizes = []
    for target in (1, 60_000, 120_000, 10**9):
        store = text.train(bos_tokenizer())
        store.wait_counted(target)
        store.close()
        sizes.append((store.folder / ROWS_FILE).stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    assert (store.folder / ROWS_FILE).read_bytes() == (whole.folder / ROWS_FILE).read_bytes()


ASK = """
import json, sys, time
start = time.monotonic()
from dictlearn.data import HubText
answers = []
for fields in json.load(sys.stdin):
    text = HubText(cache_dir=CACHE, **fields)
    problems = text.problems()
    documents = []
    if not problems:
        source = text.source()
        documents = [d for _, d in source.documents(source.start, lambda _: True)]
        identity = source.identity()
    answers.append([problems, documents, text.revision, time.monotonic() - start])
print(json.dumps(answers))
"""


def ask(tmp_path, address, questions, **environment):
    """Answers of a process whose Hub is at `address` (which is read when the libraries are imported)."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "http", "HTTP"))}
    environ |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "USE_TORCH": "0", **environment}
    code = ASK.replace("CACHE", repr(str(tmp_path / "cache")))
    process = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_data_set_of_the_hub(tmp_path):
    parquet_folder(tmp_path / "repo")
    hub = {"name": NAME}
    with serve(tmp_path / "repo") as (address, asked):
        (problems, documents, revision, _) = ask(tmp_path, address, [hub])[0]
        assert (problems, documents, revision) == ([], DOCUMENTS, COMMIT)
        assert not any("validation" in request for request in asked), "only what is needed is read"
        asked.clear()
        answers = ask(
            tmp_path,
            address,
            [
                {**hub, "streaming": False},
                {**hub, "revision": "main", "split": "validation"},
                {**hub, "revision": COMMIT},
                {**hub, "revision": "v1"},
                {**hub, "config": "en"},
                {**hub, "split": "test"},
                {**hub, "column": "body"},
                {"name": "someone/nothing"},
                {"name": "a/b/c"},
            ],
        )
    assert [answer[:3] for answer in answers[:3]] == [
        [[], DOCUMENTS, COMMIT],
        [[], VALIDATION, COMMIT],
        [[], DOCUMENTS, COMMIT],
    ]
    messages = [
        "data.revision must be a branch, tag or commit of someone/stories, got 'v1'",
        "data.config must be one of default, got 'en'",
        "data.split must be one of train, validation, got 'test'",
        "no column 'body'; it has id, text",
        "data.name must be a data set on the Hub or a folder, and 'someone/nothing' is neither",
        "data.name must be a data set on the Hub or a folder, and 'a/b/c' is neither",
    ]
    for answer, message in zip(answers[3:], messages, strict=True):
        assert len(answer[0]) == 1
        assert message in answer[0][0]
    offline = ask(
        tmp_path, "http://127.0.0.1:9", [{**hub, "streaming": False}, {**hub, "revision": "v1"}], HF_HUB_OFFLINE="1"
    )
    assert offline[0][:3] == [[], DOCUMENTS, COMMIT], "what was downloaded is there without the Hub"
    assert f"must be the commit in the cache, {COMMIT}, while offline" in offline[1][0][0]


def test_a_hub_that_cannot_be_reached_is_said_at_once(tmp_path):
    start = time.monotonic()
    (answer,) = ask(tmp_path, "http://127.0.0.1:9", [{"name": NAME}])
    assert "The Hub at http://127.0.0.1:9 must be reached to look up someone/stories" in answer[0][0]
    assert time.monotonic() - start < 90  # not the many minutes of retries


WORK = """
import json, sys
from dictlearn.data.worker import run
run(json.load(sys.stdin))
sys.exit("torch" in sys.modules)
"""


def test_the_worker_reads_data_sets_without_torch(tmp_path):
    from dictlearn.data.tokens import WORKER_ENVIRONMENT

    parquet_folder(tmp_path / "set")
    store = HubText(name=str(tmp_path / "set"), ctx=16, cache_dir=str(tmp_path)).train(bos_tokenizer())
    job = {"folder": str(store.folder), "spec": asdict(store.spec), "n_counted": 10**9, "parent": os.getpid()}
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    process = subprocess.run(
        [sys.executable, "-c", WORK], input=json.dumps(job), text=True, cwd=ROOT, env=environment, check=False
    )
    assert process.returncode == 0
    assert store.wait(10**9) > 10


def test_recorded_values_give_the_same_text_again(tmp_path, monkeypatch):
    parquet_folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    text = HubText(name="set", split="validation")
    source = text.source()
    monkeypatch.chdir("/")
    again = HubText(**asdict(text)).source()
    assert isinstance(source, HubSource)
    assert again == source


def test_token_ids_of_every_layout(tmp_path):
    ids = [token_ids(d) for d in DOCUMENTS]
    write_parquet(tmp_path / "p" / "train.parquet", ids, "input_ids")
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "s"))
    for name in ("p", "s"):
        for streaming in (True, False):
            text = HubText(name=str(tmp_path / name), column="input_ids", streaming=streaming)
            assert [d for _, d in read(text.source())] == ids
