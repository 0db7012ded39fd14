"""Activation stores of other settings, in use, without room or damaged: clear words before anything runs, and what
helps.
"""

import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from dictlearn.data import schedule, store
from dictlearn.data.manifest import LOCK, MANIFEST, STATISTICS
from dictlearn.lm import LM
from dictlearn.types import DictlearnError
from tests.data.stores import SITES, Make, batches, equal, manifest

# -- refusals --


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"ctx": 12}, "data.ctx is 16 there, 12 here"),
        ({"block_rows": 9, "n_slices": 2}, "data.block_rows is 8 there, 9 here; data.n_slices is 3 there, 2 here"),
        ({"lm_batch_rows": 3}, "data.lm_batch_rows is 4 there, 3 here"),
        ({"max_norm_ratio": None}, "data.max_norm_ratio is 1.05 there, None here"),
        ({"store_dtype": "float32"}, "data.store_dtype is 'bfloat16' there, 'float32' here"),
        ({"heldout_fraction": 0.1, "heldout_min_tokens": 0}, "the text is '[0-9a-f]{32}' there"),
        ({"n_tokens": 1001}, "it holds 1,000 activations, and n_tokens is 1,001"),
        (
            {"sites": ("mlp_out.0", "mlp_out.1")},
            "its sites are resid_post.1, mlp_out.0, those of the run mlp_out.0, ",
        ),
    ],
)
def test_other_activations_are_refused(
    data: Make, n_read: list[int], changes: dict[str, Any], message: str
) -> None:
    batches(data())
    n_read.clear()
    with pytest.raises(DictlearnError, match=f"holds other activations: {message}") as error:
        data(**changes).statistics(300)
    assert "Use the settings that it was written with, another folder, or data.store=null" in str(error.value)
    assert n_read == []
    if "ctx" in changes:
        assert "the text is" not in str(error.value), "the rows follow from ctx"


def test_another_lm_is_refused(data: Make, lm: LM) -> None:
    batches(data())
    other = lm.model.get_parameter("transformer.wpe.weight")
    other.data[0, 0] += 1
    try:
        with pytest.raises(DictlearnError, match=r"the LM's weights is '\w+' there, '\w+' here \(/.* there, /"):
            data().statistics(300)
    finally:
        other.data[0, 0] -= 1
    with pytest.raises(DictlearnError, match=r"lm.dtype is 'float32' there, 'bfloat16' here"):
        data(of=lm._replace(dtype="bfloat16")).statistics(300)


def test_a_store_that_is_not_complete_is_not_read_by_another_run(data: Make) -> None:
    batches(data(), 10)
    for changes in ({"batch_size": 25}, {"n_tokens": 500}, {"sites": SITES[:1]}):
        with pytest.raises(DictlearnError, match=r"is not complete \(450 of 1,000 activations\), and only"):
            data(**changes).statistics(300)


def test_a_begun_store_of_another_order_is_not_continued(
    data: Make, n_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its order would change in the middle; a complete one is read as it is, and says of which version it is."""
    expected = batches(data(store=(complete := str(data().text.store) + "2")))
    batches(data(), 10)
    state = data(store=complete).train_dataloader().state_dict()
    n_read.clear()
    monkeypatch.setattr(schedule, "VERSION", schedule.VERSION + 1)
    versions = f"is {schedule.VERSION - 1} there, {schedule.VERSION} here"
    with pytest.raises(DictlearnError, match=f"is not complete .*: the version of dictlearn's shuffle {versions}"):
        data().statistics(300)
    reader = data(store=complete)
    assert reader.activation_store is not None
    assert reader.activation_store.contents["schedule"] == schedule.VERSION - 1
    reader.train_dataloader().load_state_dict(state)
    assert equal(batches(reader), expected)
    assert n_read == []
    shutil.rmtree(complete)
    with pytest.raises(DictlearnError, match="was the store written again"):
        data(store=complete).train_dataloader().load_state_dict(state)


def test_stores_from_before_the_version_was_recorded_are_of_version_2(
    data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "VERSION", 2)
    expected = batches(data(store=str(tmp_path / "whole")))
    batches(data(), 10)
    path = tmp_path / "store" / MANIFEST
    raw = manifest(tmp_path)
    assert raw["contents"].pop("schedule") == 2
    path.write_text(json.dumps(raw))
    assert equal(batches(data()), expected)


def test_a_folder_of_something_else_is_refused(data: Make, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("")
    with pytest.raises(DictlearnError, match=r"must be an empty folder or an activation store, but .*'thesis.tex'"):
        data().statistics(300)
    with pytest.raises(DictlearnError, match=r"data.store must be a folder, but .*text.txt is a file"):
        data(store=str(tmp_path / "text.txt")).statistics(300)


def test_settings_that_cannot_be_are_refused(data: Make) -> None:
    with pytest.raises(DictlearnError, match=r"data.store_dtype must be one of bfloat16, float32, got 'float16'"):
        data(store_dtype="float16")
    with pytest.raises(DictlearnError, match=r"data.store must be null or a folder, got ''"):
        data(store="")
    with pytest.raises(DictlearnError, match=r"shuffled activations: use stream=shuffled .* got stream=sequences"):
        data(stream="sequences")


def test_a_disk_without_room_is_refused_before_anything_runs(
    data: Make, n_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 1000 * (2 * 16 * 2 + 16)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(DictlearnError, match=r"needs 0.00 GB for 1,000 activations, and the disk has 0.00 GB free"):
        data().statistics(300)
    assert n_read == []
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    made = data()
    made.statistics(300)
    assert made.activation_store is not None
    assert made.activation_store.n_bytes == needed
    batches(made)
    files = sum(path.stat().st_size for path in made.activation_store.folder.glob("shard-*"))
    assert needed <= files < needed + 7 * 600, "and a header in each"


# -- damage --


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -150 * 16 - 1, 12])
def test_a_damaged_shard_is_an_error_that_names_it(data: Make, tmp_path: Path, place: int) -> None:
    batches(data())
    flip(tmp_path / "store" / "shard-00003.safetensors", place)
    stream = iter(data().train_dataloader())
    assert len(list(islice(stream, 9))) == 9, "what comes before it is whole"
    with pytest.raises(
        DictlearnError, match=r"shard-00003.safetensors is damaged \(.*\): delete it and all shards of higher"
    ):
        next(stream)


def test_a_shard_with_other_tensors_is_refused(data: Make, tmp_path: Path) -> None:
    batches(data())
    path = tmp_path / "store" / "shard-00000.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "tokens": tensors["tokens"].float()}, path)
    with pytest.raises(DictlearnError, match=r"shard-00000.*damaged \(tokens is \[150\] torch.float32"):
        list(data().train_dataloader())


@pytest.mark.parametrize("how", ["missing", "short"])
def test_missing_and_short_files_are_seen_at_once(data: Make, n_read: list[int], tmp_path: Path, how: str) -> None:
    batches(data())
    path = tmp_path / "store" / "shard-00005.safetensors"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DictlearnError, match=r"shard-00005.safetensors is missing or has another size"):
        data().statistics(300)


@pytest.mark.parametrize("first", [0, 3, 6])
def test_a_damaged_shard_and_what_comes_after_it_are_written_again(
    data: Make, n_read: list[int], tmp_path: Path, first: int
) -> None:
    """As the error says: once they are deleted, a run of the same settings writes the same files."""
    expected = batches(data())
    files = {path.name: path.read_bytes() for path in (tmp_path / "store").glob("shard-*")}
    assert len(files) == 7
    for name in sorted(files)[first:]:
        (tmp_path / "store" / name).unlink()
    with pytest.raises(DictlearnError, match=rf"is not complete \({150 * first} of 1,000 activations\), and only"):
        data(n_tokens=100).statistics(300)
    n_read.clear()
    assert equal(batches(data()), expected)
    assert n_read
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").glob("shard-*")} == files
    n_read.clear()
    assert equal(batches(data()), expected)
    assert n_read == []


def test_damaged_statistics_are_refused(data: Make, tmp_path: Path) -> None:
    batches(data())
    flip(tmp_path / "store" / STATISTICS, -1)
    with pytest.raises(DictlearnError, match=r"statistics.safetensors is damaged \(it has another sha256"):
        data().statistics(300)


POSITIONS = ({"offset": "1"}, {"offset": -1}, {"batch": True}, {"seed": 0.5}, {"fingerprint": 3}, {"n_ready": None})


def with_position(manifest: dict[str, Any], change: dict[str, Any]) -> str:
    """Of the last shard; None leaves a field out."""
    shard = manifest["shards"][-1]
    shard["position"] = {k: v for k, v in (shard["position"] | change).items() if v is not None}
    return json.dumps(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "{", "manifest.json cannot be read"),
        (lambda _: "[]", "must be an activation store of format 1, got format None"),
        (lambda m: json.dumps(m | {"format": 2}), "of format 1, got format 2"),
        (lambda m: json.dumps(m | {"shards": [{"n": 1}]}), "manifest.json is damaged"),
        (lambda m: json.dumps(m | {"shards": m["shards"] * 2}), "manifest.json is damaged"),
        (lambda m: json.dumps(m | {"contents": m["contents"] | {"ctx": "16"}}), "manifest.json is damaged"),
        (
            lambda m: json.dumps(m | {"contents": m["contents"] | {"sites": {"tokens": 3}}}),
            "manifest.json is damaged",
        ),
        (lambda m: json.dumps(m | {"contents": m["contents"] | {"batch_size": 0}}), "manifest.json is damaged"),
        *((partial(with_position, change=change), "manifest.json is damaged") for change in POSITIONS),
    ],
)
def test_a_manifest_that_is_none_is_refused(data: Make, tmp_path: Path, change: Any, message: str) -> None:
    batches(data())
    path = tmp_path / "store" / MANIFEST
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DictlearnError, match=message):
        data().statistics(300)


def test_a_store_that_another_run_has_written_meanwhile_is_let_go(
    data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look finds nothing in the way, the second one, under the lock, does."""
    looks = iter([[], ["another run wrote there"]])
    monkeypatch.setattr(store, "store_problems", lambda *_: next(looks))
    with pytest.raises(DictlearnError, match="another run wrote there") as error:
        data().statistics(300)
    FileLock(tmp_path / "store" / LOCK).acquire(timeout=0).lock.release()
    assert error.tb is not None, "what was refused is alive"
