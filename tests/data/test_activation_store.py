"""One run writes its activations, later ones read them: the same batches, also after an end and a resume."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file

from dictlearn.data import ActivationData, StoredStream, store, stored
from dictlearn.data.manifest import LOCK, MANIFEST
from dictlearn.lm import LM
from dictlearn.training import run
from dictlearn.types import DictlearnError
from tests.data.helpers import random_documents, same
from tests.data.stores import BATCH, N_TOKENS, SITES, Make, batches, equal, manifest
from tests.runs import run_train, weight_hashes

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


@pytest.mark.parametrize(
    ("n_tokens", "sites", "batch_size", "ratio"),
    [(N_TOKENS, SITES[1:], BATCH, None), (N_TOKENS, SITES, 25, 1.05), (500, SITES, BATCH, 1.05)],
)
def test_a_reader_beside_a_run_of_its_own_settings(
    data: Make, tmp_path: Path, n_tokens: int, sites: tuple[str, ...], batch_size: int, ratio: float | None
) -> None:
    """Fewer sites without a norm filter, or a divisor of the batch size: the same; fewer tokens: up to the end."""
    batches(data(max_norm_ratio=ratio))
    changes = {"sites": sites, "batch_size": batch_size, "max_norm_ratio": ratio}
    read = batches(data(n_tokens, **changes))
    own = batches(data(n_tokens, store=str(tmp_path / "own"), **changes))
    assert equal(read[:5], own[:5])
    assert equal(read, own) == (n_tokens == N_TOKENS), "a shorter run ends with the slices that are left"


@pytest.mark.parametrize("ratio", [1.05, None])
def test_fewer_sites_under_a_norm_filter_are_said(
    data: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, ratio: float | None
) -> None:
    batches(data(max_norm_ratio=ratio))
    assert "max_norm_ratio" not in caplog.text
    read = batches(data(sites=SITES[1:], max_norm_ratio=ratio))
    said = r"any of its sites (resid_post.1, mlp_out.0); a run of mlp_out.0 alone"
    assert (said in caplog.text) == (ratio is not None)
    own = batches(data(sites=SITES[1:], max_norm_ratio=ratio, store=str(tmp_path / "own")))
    assert equal(read, own) == (ratio is None)


def test_no_cuda_event_is_made_for_batches_on_the_cpu(data: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: made.append(1))
    batches(data(100, max_norm_ratio=None))
    assert made == []


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
        assert (folder / MANIFEST).exists()  # so the folder is taken, whole shards or not
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
    first.statistics(300)
    next(iter(first.train_dataloader()))
    with pytest.raises(DictlearnError, match="is being written by another run: wait"):
        data().train_dataloader()
    first.close()
    batches(data())
    readers = [iter(data().train_dataloader()) for _ in range(2)]
    assert same(next(readers[0]), next(readers[1]))


def test_a_writer_that_was_ended_at_once_keeps_its_folder(data: Make) -> None:
    """No shard is whole yet, but a run of other settings does not take the folder from the one that resumes."""
    first = data()
    first.statistics(300)
    next(iter(first.train_dataloader()))
    first.close()
    with pytest.raises(DictlearnError, match=r"only a run of the same settings continues it: .*n_tokens"):
        data(n_tokens=N_TOKENS // 2).train_dataloader()
    assert len(batches(data())) > 0


def test_a_full_disk_ends_the_run_and_the_store_goes_on(
    data: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 4:  # two shards, each with the manifest
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

SMALL_EVALUATION = ("~evaluation.blocks.behaviour", "evaluation.n_tokens=500")


def test_runs_that_read_or_write_train_the_same_weights(
    tmp_path: Path, n_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites and a grid. The reader and the second writer are ended and resumed."""
    monkeypatch.setattr(stored, "SHARD_BYTES", 2**19)
    common = ["experiment=single", "n_tokens=4_000", "expansion=1", *SMALL_EVALUATION]
    both = [*common, "sites=[resid_post.1,attn_out.2]", "grid={optimizer.lr:[1e-3,2e-3]}"]
    run_train(tmp_path / "wrote", *both, f"data.store={tmp_path / 'store'}")
    expected = weight_hashes(tmp_path / "wrote")
    assert len(set(expected.values())) == 4
    for name, folder in (("read", "store"), ("second", "other")):
        n_read.clear()
        with monkeypatch.context() as patch:
            end_at_step(patch, 9)
            with pytest.raises(DictlearnError, match="Stopped at step 9"):
                run_train(tmp_path / name, *both, f"data.store={tmp_path / folder}")
        run_train_resumed(tmp_path / name)
        assert weight_hashes(tmp_path / name) == expected
        assert bool(n_read) == (name == "second"), "the evaluation does not go this way"
    shards = [[load_file(path) for path in sorted((tmp_path / at).glob("shard-*"))] for at in ("store", "other")]
    for at in (0, 1):
        assert sum(len(shard["rows"]) for shard in shards[at]) == 4_096
    for name in shards[0][0]:
        one, other = (torch.cat([shard[name] for shard in part]) for part in shards)
        assert torch.equal(one, other)
    store_of = f"data.store={tmp_path / 'store'}"
    text = refused(
        tmp_path / "no", *common, store_of, "site=attn_out.1", "seed=2", "data.ctx=64", "data.block_rows=8"
    )
    assert "seed is 0 there, 2 here" in text
    assert "data.ctx is 128 there, 64 here" in text
    assert "its sites are resid_post.1, attn_out.2" in text


@pytest.mark.parametrize("fails", ["build_members", "identity_of", "_fit"])
def test_a_run_that_fails_lets_others_use_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object) -> None:
        raise DictlearnError("this run fails")

    monkeypatch.setattr(run, fails, fail)
    with pytest.raises(DictlearnError, match="this run fails") as error:
        run_train(
            tmp_path / "run",
            "experiment=single",
            "site=resid_post.1",
            f"data.store={tmp_path / 'store'}",
            "statistics_n_tokens=200",
        )
    FileLock(tmp_path / "store" / LOCK).acquire(timeout=0).lock.release()
    assert error.tb is not None, "what the failed run holds is alive"


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
