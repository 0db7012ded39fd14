"""One run writes its activations, later ones read them: the same batches, and clear words where they cannot."""

import json
import math
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dictlearn.data import ActivationData, Batch, LocalText, StoredStream, module, store, stored
from dictlearn.data.manifest import MANIFEST, STATISTICS
from dictlearn.lm import LM, load_lm, resolve
from dictlearn.types import DictlearnError
from tests.data.helpers import random_documents, same
from tests.runs import run_train, weight_hashes
from tests.tiny_lms import tiny_lm_folder

BATCH, N_TOKENS = 50, 1000
SITES = ("resid_post.1", "mlp_out.0")
Make = Callable[..., ActivationData]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), vocab=410)), dtype="float32")


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that the LM was run on, one number per forward."""
    rows: list[int] = []
    run = module.activations

    def counted(model: Any, sites: Any, tokens: torch.Tensor) -> Any:
        rows.append(len(tokens))
        return run(model, sites, tokens)

    monkeypatch.setattr(module, "activations", counted)
    return rows


@pytest.fixture
def data(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(stored, "SHARD_BYTES", 150 * (2 * 16 * 2 + 16))  # of two sites of width 16 in bfloat16
    path = tmp_path / "text.txt"
    path.write_text("\n".join(random_documents(400)) + "\n")

    def make(
        n_tokens: int = N_TOKENS,
        seed: int = 0,
        sites: tuple[str, ...] = SITES,
        batch_size: int = BATCH,
        stream: str = "shuffled",
        of: LM = lm,
        **changes: Any,
    ) -> ActivationData:
        sizes = {"ctx": 16, "lm_batch_rows": 4, "block_rows": 8, "n_slices": 3, "path": str(path)}
        text = LocalText(**{**sizes, "store": str(tmp_path / "store"), "max_norm_ratio": 1.05, **changes})
        text.cache_dir = str(tmp_path / "cache")
        found = [resolve(of.model, site) for site in sites]
        return ActivationData(text, of, found, batch_size, n_tokens, seed, stream)

    return make


def batches(made: ActivationData, n: int | None = None) -> list[Batch]:
    """All batches, or the first `n` and then the process ends."""
    made.statistics(300)
    found = [
        batch for _, batch in zip(range(n or len(made.train_dataloader())), made.train_dataloader(), strict=False)
    ]
    made.close()
    return found


def manifest(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "store" / MANIFEST).read_text())


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))


# -- what is read is what was written, and what the stream gives --


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ratio", [1.05, None])
def test_writer_and_reader_see_the_rounded_batches_of_the_stream(
    data: Make, n_read: list[int], tmp_path: Path, dtype: str, ratio: float | None
) -> None:
    plain = data(store=None, max_norm_ratio=ratio)
    if ratio is None:
        expected = list(plain.train_dataloader())
    else:  # the limits are of what is trained on: the rounded activations
        plain.read = lambda t: {k: v.to(getattr(torch, dtype)) for k, v in ActivationData.read(plain, t).items()}  # type: ignore[method-assign]
        expected = list(plain.train_dataloader())
    wrote = batches(data(store_dtype=dtype, max_norm_ratio=ratio))
    n_read.clear()
    read = batches(data(store_dtype=dtype, max_norm_ratio=ratio))
    assert n_read == [], "neither the stream nor the statistics run the LM"
    assert equal(wrote, read)
    rounded = [
        batch._replace(acts={site: acts.to(getattr(torch, dtype)) for site, acts in batch.acts.items()})
        for batch in expected
    ]
    assert equal(read, rounded)
    assert len(manifest(tmp_path)["shards"]) == (7 if dtype == "bfloat16" else 20), "150 or 50 of 1000 activations"


def test_a_reader_starts_from_the_statistics_of_the_writer(data: Make) -> None:
    writer = data()
    expected, limits = writer.statistics(300), writer.norm_filter
    batches(writer)
    reader = data(sites=SITES[1:])
    found = reader.statistics(300)
    assert list(found) == ["mlp_out.0"]
    one, other = found["mlp_out.0"], expected["mlp_out.0"]
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(one, other, strict=True))
    assert [type(x) for x in one] == [type(x) for x in other]
    assert reader.norm_filter == limits
    with pytest.raises(DictlearnError, match="statistics of statistics_n_tokens = 300, not of 400"):
        reader.statistics(400)


@pytest.mark.parametrize("batch_size", [7, 64, 2000])
def test_any_batch_size_sites_and_fewer_tokens(data: Make, batch_size: int) -> None:
    wrote = batches(data())
    flat = {site: torch.cat([batch.acts[site] for batch in wrote]) for site in SITES}
    tokens = torch.cat([batch.tokens for batch in wrote])
    for n_tokens in (1, 151, 1000):
        read = batches(data(n_tokens, sites=SITES[:1], batch_size=batch_size))
        assert len(read) == math.ceil(n_tokens / batch_size)
        n = min(len(read) * batch_size, N_TOKENS)
        assert [len(batch.tokens) for batch in read[:-1]] == [batch_size] * (len(read) - 1)
        assert list(read[0].acts) == ["resid_post.1"]
        assert torch.equal(torch.cat([batch.acts["resid_post.1"] for batch in read]), flat["resid_post.1"][:n])
        assert torch.equal(torch.cat([batch.tokens for batch in read]), tokens[:n])


def test_only_the_tensors_of_its_sites_are_read(data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    batches(data())
    names: list[str] = []

    class Recording:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Recording":
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(store, "safe_open", Recording)
    batches(data(sites=("mlp_out.0",)))
    assert set(names) == {"mlp_out.0", "tokens", "rows", "positions"}


def test_epochs_end_up_in_the_store(data: Make) -> None:
    text = str(data().text.path).replace("text.txt", "short.txt")  # type: ignore[attr-defined]
    Path(text).write_text("\n".join(random_documents(12)))
    wrote = batches(data(path=text, max_norm_ratio=None))
    assert equal(batches(data(path=text, max_norm_ratio=None)), wrote)
    assert len({(int(r), int(p)) for b in wrote for r, p in zip(b.rows, b.positions, strict=True)}) < 600


# -- continuing --


@pytest.mark.parametrize("size", [50, 30])
def test_a_reader_resumes(data: Make, size: int) -> None:
    batches(data())
    stream = data(batch_size=size).train_dataloader()
    states, read = [stream.state_dict()], []
    for batch in stream:
        read.append(batch)
        states.append(stream.state_dict())
    for done in (0, 1, 3, 4, len(read) // 2, len(read) - 1, len(read)):
        state = states[done]
        resumed = data(batch_size=size).train_dataloader()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        assert equal(list(resumed), read[done:])
    with pytest.raises(DictlearnError, match="continues with the activations and the batch size"):
        data(batch_size=size + 1).train_dataloader().load_state_dict(states[1])


@pytest.mark.parametrize("ended_after", [1, 3, 10, 20])
def test_a_writer_that_was_ended_is_continued_from_any_checkpoint(
    data: Make, n_read: list[int], tmp_path: Path, ended_after: int
) -> None:
    """Shards of 3 batches. The checkpoint may lie before or behind what is in them."""
    expected = batches(data(store=str(tmp_path / "whole")))
    for checkpoint in {0, ended_after // 2, ended_after}:
        folder = tmp_path / f"store{checkpoint}"
        first = data(store=str(folder))
        first.statistics(300)
        stream = first.train_dataloader()
        states = [
            stream.state_dict(),
            *(stream.state_dict() for _, _ in zip(range(ended_after), stream, strict=False)),
        ]
        first.close()
        assert (folder / MANIFEST).exists() == (ended_after >= 3)
        before = [path.read_bytes() for path in sorted(folder.glob("shard-*"))]
        rest = data(store=str(folder))
        rest.statistics(300)
        resumed = rest.train_dataloader()
        resumed.load_state_dict(states[checkpoint])
        assert equal(list(resumed), expected[checkpoint:])
        rest.close()
        after = [path.read_bytes() for path in sorted(folder.glob("shard-*"))]
        assert after[: len(before)] == before, "whole shards stay"
        n_read.clear()
        assert equal(batches(data(store=str(folder))), expected)
        assert n_read == []


def test_a_begun_store_is_read_before_the_lm_runs(data: Make, n_read: list[int]) -> None:
    wrote = batches(data(), 10)
    n_read.clear()
    made = data()
    again = iter(made.train_dataloader())
    assert equal([next(again) for _ in range(9)], wrote[:9])
    assert n_read == []
    next(again)
    assert n_read
    made.close()


def test_a_store_in_use_is_refused(data: Make) -> None:
    first = data()
    next(iter(first.train_dataloader()))
    with pytest.raises(DictlearnError, match="is being written by another run: wait"):
        data().train_dataloader()
    first.close()
    batches(data())
    readers = [iter(data().train_dataloader()) for _ in range(2)]
    assert same(next(readers[0]), next(readers[1]))


def test_a_full_disk_ends_the_run_and_the_store_goes_on(
    data: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 5:  # statistics, and two shards with the manifest
            raise OSError(28, "No space left on device")
        sync(descriptor)

    made = data()
    made.statistics(300)
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(DictlearnError, match=r"Cannot write .*shard-00002.safetensors .*No space left"):
        list(made.train_dataloader())
    monkeypatch.setattr(store.os, "fsync", sync)
    made.close()
    assert not list((tmp_path / "store").glob("*.part"))
    assert manifest(tmp_path)["n_stored"] == 300
    assert not manifest(tmp_path)["complete"]
    assert equal(batches(data()), batches(data(store=str(tmp_path / "other"))))


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
    with pytest.raises(DictlearnError, match=r"shard-00003.safetensors is damaged \(.*\): delete .*data.store"):
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


def test_damaged_statistics_are_refused(data: Make, tmp_path: Path) -> None:
    batches(data())
    flip(tmp_path / "store" / STATISTICS, -1)
    with pytest.raises(DictlearnError, match=r"statistics.safetensors is damaged \(it has another sha256"):
        data().statistics(300)


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
    ],
)
def test_a_manifest_that_is_none_is_refused(data: Make, tmp_path: Path, change: Any, message: str) -> None:
    batches(data())
    path = tmp_path / "store" / MANIFEST
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DictlearnError, match=message):
        data().statistics(300)


def test_the_manifest_says_where_its_activations_come_from(data: Make, tmp_path: Path, lm: LM) -> None:
    batches(data())
    found = manifest(tmp_path)
    assert found["complete"]
    assert found["n_stored"] == N_TOKENS == sum(shard["n"] for shard in found["shards"])
    contents = found["contents"]
    assert contents["sites"] == {"resid_post.1": 16, "mlp_out.0": 16}
    assert (contents["lm"], contents["lm_name"], contents["dtype"]) == (lm.fingerprint(), lm.name, "bfloat16")
    assert str(tmp_path / "store") not in (tmp_path / "store" / MANIFEST).read_text()


def test_streams_of_a_store_are_stored_streams(data: Make) -> None:
    made = data()
    assert isinstance(made.train_dataloader(), StoredStream)
    assert made.train_dataloader() is made.train_dataloader()
    made.close()
    assert not isinstance(data(store=None).train_dataloader(), StoredStream)


# -- whole runs --


def test_runs_that_read_train_the_same_weights(
    tmp_path: Path, n_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites and a grid; a reader that is ended and resumed; one site of the two; another batch size."""
    monkeypatch.setattr(stored, "SHARD_BYTES", 2**20)
    common = ["experiment=single", f"data.store={tmp_path / 'store'}", "~evaluation.blocks.behaviour"]
    both = [*common, "sites=[resid_post.1,attn_out.2]", "grid={optimizer.lr:[1e-3,2e-3]}"]
    run_train(tmp_path / "wrote", *both)
    n_read.clear()
    run_train(tmp_path / "read", *both)
    assert n_read == [], "the LM ran in the evaluation alone, which does not go this way"
    expected = weight_hashes(tmp_path / "wrote")
    assert len(expected) == 4
    assert weight_hashes(tmp_path / "read") == expected
    end_at_step(monkeypatch, 17)
    with pytest.raises(DictlearnError, match="Stopped at step 17"):
        run_train(tmp_path / "cut", *both)
    monkeypatch.undo()
    run_train_resumed(tmp_path / "cut")
    assert weight_hashes(tmp_path / "cut") == expected
    run_train(tmp_path / "one", *common, "site=attn_out.2", "batch_size=100", "n_tokens=5_000")
    text = refused(tmp_path / "no", *common, "site=attn_out.1", "seed=2", "data.ctx=64", "data.block_rows=8")
    assert "seed is 0 there, 2 here" in text
    assert "data.ctx is 128 there, 64 here" in text
    assert "its sites are resid_post.1, attn_out.2" in text


def end_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from dictlearn.training.interrupt import StopOnSignal

    def start(self: StopOnSignal, trainer: Any, *_: object) -> None:
        if trainer.global_step == step - 1:
            self.requested = "SIGTERM"

    monkeypatch.setattr(StopOnSignal, "on_train_batch_start", start, raising=False)


def run_train_resumed(run_dir: Path) -> None:
    from rich.console import Console

    from dictlearn.training.run import train
    from tests.runs import composed

    train(composed("train", [f"resume={run_dir}"]), [f"resume={run_dir}"], Console(quiet=True))


def refused(run_dir: Path, *overrides: str) -> str:
    with pytest.raises(DictlearnError) as error:
        run_train(run_dir, *overrides)
    assert not run_dir.exists()
    return str(error.value)


def test_a_writer_that_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SHARD_BYTES", 2**20)
    one = ["experiment=single", "site=resid_post.1", "~evaluation.blocks.behaviour"]
    run_train(tmp_path / "whole", *one, f"data.store={tmp_path / 'a'}")
    end_at_step(monkeypatch, 21)
    with pytest.raises(DictlearnError, match="Stopped at step 21"):
        run_train(tmp_path / "cut", *one, f"data.store={tmp_path / 'b'}")
    monkeypatch.undo()
    run_train_resumed(tmp_path / "cut")
    assert weight_hashes(tmp_path / "cut") == weight_hashes(tmp_path / "whole")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert "shard" not in path.name or path.stat().st_size > 0
    run_train(tmp_path / "read", *one, f"data.store={tmp_path / 'b'}")
    assert weight_hashes(tmp_path / "read") == weight_hashes(tmp_path / "whole")
