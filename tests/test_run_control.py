"""Runs that end early, go on, start from others, or are refused."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.embedded import LM_FOLDER
from dictlearn.training.resume import fix_commit, newest_whole, resumed_if_begun
from dictlearn.types import DictlearnError
from tests.runs import SMALL, command, composed, run_train, weight_hashes

ONE = ("experiment=single", "site=resid_post.1", "~evaluation.blocks.behaviour")


def text_file(path: Path, n_documents: int = 400) -> Path:
    """About 25 thousand tokens that the embedded LM knows."""
    words = ["the", "big", "cat", "saw", "a", "small", "dog", "and", "Mary", "went"]
    make = random.Random(0)
    path.write_text("\n".join(" ".join(make.choice(words) for _ in range(60)) for _ in range(n_documents)))
    return path


def without(key: str) -> list[str]:
    return [override for override in SMALL if not override.startswith(f"{key}=")]


def wait_for_step(run_dir: Path, step: int, process: object) -> None:
    """Until metrics.csv has this step, or the process has ended."""
    while process.poll() is None:  # type: ignore[attr-defined]
        if (run_dir / "metrics.csv").exists():
            lines = (run_dir / "metrics.csv").read_text().splitlines()[1:]
            if lines and lines[-1].split(",")[0].isdigit() and int(lines[-1].split(",")[0]) >= step:
                return
        time.sleep(0.005)


def test_killed_at_random_steps_gives_the_same_bits(tmp_path: Path) -> None:
    """Epochs, a grid and several sites; resume=auto goes on each time, also before the first checkpoint."""
    text = text_file(tmp_path / "text.txt")
    overrides = [*without("n_tokens"), "n_tokens=76_800", "data=local", f"data.path={text}", "experiment=single"]
    overrides += ["sites=[resid_post.1,attn_out.2]", "grid={sparsifier.k:[2,4]}", "dead_after_tokens=2_000"]
    overrides += ["~evaluation.blocks.behaviour", "resume=auto"]
    overrides.remove("sparsifier.k=4")
    whole = command("train.py", *overrides, f"run_dir={tmp_path / 'whole'}")
    out, _ = whole.communicate()
    assert whole.returncode == 0, out
    assert "epoch 2" in out
    cut_dir, make, n_killed = tmp_path / "cut", random.Random(time.time_ns()), 0
    for step in sorted(make.sample(range(1, 290), 4)):
        process = command("train.py", *overrides, f"run_dir={cut_dir}")
        wait_for_step(cut_dir, step, process)
        time.sleep(make.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        n_killed += process.returncode == -signal.SIGKILL
    assert n_killed >= 3  # the last one may have been too late
    final = command("train.py", *overrides, f"run_dir={cut_dir}")
    out, _ = final.communicate()
    assert final.returncode == 0, out
    assert weight_hashes(cut_dir) == weight_hashes(tmp_path / "whole")
    assert len(weight_hashes(cut_dir)) == 4
    steps = [pd.read_csv(folder / "metrics.csv").step.tolist() for folder in (cut_dir, tmp_path / "whole")]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_that_it_came_in(tmp_path: Path, sent: signal.Signals) -> None:
    overrides = [*without("n_tokens"), "n_tokens=120_000", *ONE]
    whole = command("train.py", *overrides, f"run_dir={tmp_path / 'whole'}")
    cut = command("train.py", *overrides, f"run_dir={tmp_path / 'cut'}")
    wait_for_step(tmp_path / "cut", 92, cut)  # windows of 46 steps, a checkpoint every 46
    cut.send_signal(sent)
    out, _ = cut.communicate()
    assert cut.returncode == 1, out
    assert "Traceback" not in out
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert f"Stopped at step {step} of 469. Go on with resume={tmp_path / 'cut'} (saved there)." in out
    assert step % 46 != 0 or step > 92
    (tmp_path / "cut").rename(tmp_path / "moved")  # a run folder may move
    resumed = command("train.py", f"resume={tmp_path / 'moved'}")
    out, _ = resumed.communicate()
    assert resumed.returncode == 0, out
    assert whole.wait() == 0
    assert weight_hashes(tmp_path / "moved") == weight_hashes(tmp_path / "whole")
    assert f"Continuing {tmp_path / 'moved'} from step {step}" in out
    tables = [pd.read_csv(tmp_path / name / "metrics.csv") for name in ("moved", "whole")]
    moved_table, whole_table = (table.drop(columns="tokens_per_second") for table in tables)
    pd.testing.assert_frame_equal(moved_table, whole_table)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_training_leaves_nothing_behind(tmp_path: Path, sent: signal.Signals) -> None:
    process = command("train.py", *SMALL, *ONE, "statistics_n_tokens=1_000_000", f"run_dir={tmp_path / 'run'}")
    while not (tmp_path / "run" / "config.yaml").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(sent)
    out, _ = process.communicate()
    assert process.returncode == 1, out
    assert "Interrupted before training began; nothing is lost." in out
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a copy of the LM and a text file."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(LM_FOLDER, folder / "lm")
    text = text_file(folder / "text.txt")
    run_train(folder / "run", *ONE, "lm=hf", f"lm.name={folder / 'lm'}", "data=local", f"data.path={text}")
    return folder


def of_finished(folder: Path) -> list[str]:
    text = f"data.path={folder / 'text.txt'}"
    return [*ONE, "lm=hf", f"lm.name={folder / 'lm'}", "data=local", text, "resume=auto"]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same files in a place of their own, the configuration following them."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    config = folder / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(folder)))
    return folder


def test_a_finished_run_and_moved_files_resume(copy: Path) -> None:
    before = weight_hashes(copy / "run")
    run_train(copy / "run", *of_finished(copy))
    assert weight_hashes(copy / "run") == before


def test_another_lm_under_the_same_name_is_refused(copy: Path) -> None:
    weights = load_file(copy / "lm" / "model.safetensors")
    weights["transformer.h.0.ln_1.bias"] += 0.5
    save_file(weights, copy / "lm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DictlearnError, match="the LM weights changed"):
        run_train(copy / "run", *of_finished(copy))


def test_another_text_under_the_same_name_is_refused(copy: Path) -> None:
    with (copy / "text.txt").open("a") as file:
        file.write("\nthe cat went and saw")
    with pytest.raises(DictlearnError, match="the text changed"):
        run_train(copy / "run", *of_finished(copy))


def test_a_changed_configuration_file_is_refused(copy: Path) -> None:
    config = copy / "run" / "config.yaml"
    config.write_text(config.read_text().replace("warmup_steps: 1000", "warmup_steps: 7"))
    process = command("train.py", f"resume={copy / 'run'}")
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "schedule.warmup_steps was 1000, now 7" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.decay=0.5", "schedule.decay = None, not 0.5"),
        ("site=resid_post.2", "site = 'resid_post.1', not 'resid_post.2'"),
        ("data.ctx=64", "data.ctx = 128, not 64"),
        ("lm=embedded", "lm.name = .*not 'embedded'"),
        ("seed=3", "seed = 0, not 3"),
    ],
)
def test_auto_refuses_another_configuration(finished: Path, override: str, message: str) -> None:
    before = (finished / "run" / "config.yaml").read_text()
    arguments = [o for o in of_finished(finished) if o.split("=")[0] != override.split("=")[0]]
    arguments = [o for o in arguments if override != "lm=embedded" or not o.startswith("lm.")]
    with pytest.raises(DictlearnError, match=message):
        run_train(finished / "run", *arguments, override)
    assert (finished / "run" / "config.yaml").read_text() == before


def test_auto_takes_the_commit_of_the_revision_that_was_asked_for(tmp_path: Path) -> None:
    cfg = composed("train", ["lm=hf", "lm.name=x/y", "lm.revision=main", f"run_dir={tmp_path}"])
    stored = cfg.copy()
    fix_commit(stored, "lm.revision", "0123abcd")
    assert OmegaConf.load(tmp_path / "config.yaml").lm.revision == "0123abcd"
    for revision in ("main", "0123abcd"):
        again = cfg.copy()
        again.lm.revision = revision
        assert resumed_if_begun(again) is None  # no checkpoint yet
        assert again.lm.revision == "0123abcd"
    for revision in ("step143000", None):
        again = cfg.copy()
        again.lm.revision = revision
        with pytest.raises(DictlearnError, match=r"lm\.revision = '0123abcd', not"):
            resumed_if_begun(again)


def test_a_checkpoint_with_other_bytes_is_passed_over(copy: Path) -> None:
    (checkpoint,) = (copy / "run" / "checkpoints").iterdir()
    content = bytearray(checkpoint.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = b"\xff" * 4096
    checkpoint.write_bytes(content)
    assert newest_whole(copy / "run") is None


def test_auto_needs_a_folder_that_stays(tmp_path: Path) -> None:
    process = command("train.py", "resume=auto", cwd=tmp_path)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "give run_dir=DIR" in out
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DictlearnError, match="holds files but no run"):
        run_train(tmp_path, *ONE, "resume=auto")


def the(folder: Path, name: str | None = None) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, dict)
    return loaded[name] if name else next(iter(loaded.values()))


@pytest.mark.parametrize("normalise", ["mean_norm", "none", "layer_norm"])
def test_a_run_starts_from_a_dictionary(tmp_path: Path, normalise: str) -> None:
    same = [*ONE, f"normalise={normalise}"]
    run_train(tmp_path / "first", *same)
    run_train(tmp_path / "tuned", *same, f"init_from={tmp_path / 'first'}", "optimizer.lr=1e-12")
    run_train(tmp_path / "fresh", *same, "optimizer.lr=1e-12", "seed=1")
    x = 3 * torch.randn(50, 128)
    first, tuned, fresh = (the(tmp_path / name)(x).recon for name in ("first", "tuned", "fresh"))
    torch.testing.assert_close(tuned, first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fresh, first, rtol=1e-2, atol=1e-2)
    assert the(tmp_path / "tuned").metadata["init_from"] == str(tmp_path / "first")


def test_init_from_that_does_not_fit_is_refused(finished: Path, tmp_path: Path) -> None:
    start = f"init_from={finished / 'run'}"
    with pytest.raises(DictlearnError, match="n_latents"):
        run_train(tmp_path / "a", *ONE, start, "expansion=4")
    with pytest.raises(DictlearnError, match=r"has no dictionary 'attn_out\.1'; it has resid_post\.1"):
        run_train(tmp_path / "b", "experiment=single", "site=attn_out.1", start)
    with pytest.raises(DictlearnError, match="nowhere"):
        run_train(tmp_path / "c", *ONE, "init_from=nowhere")
    assert not list(tmp_path.iterdir())


def test_what_a_run_started_from_may_move(copy: Path, tmp_path: Path) -> None:
    start = f"init_from={copy / 'run'}"
    stopped = command("train.py", *SMALL, *ONE, start, "n_tokens=50_000", f"run_dir={tmp_path / 'tuned'}")
    wait_for_step(tmp_path / "tuned", 1, stopped)
    stopped.send_signal(signal.SIGTERM)
    out, _ = stopped.communicate()
    assert "Stopped at step" in out, out
    shutil.rmtree(copy / "run")
    resumed = command("train.py", f"resume={tmp_path / 'tuned'}")
    out, _ = resumed.communicate()
    assert resumed.returncode == 0, out
    assert the(tmp_path / "tuned").metadata["init_from"] == str(copy / "run")


def test_a_relative_text_is_found_from_elsewhere(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "text.txt", tmp_path / "text.txt")
    text = ["data=local", "data.path=text.txt"]
    stopped = command("train.py", *SMALL, *ONE, *text, "n_tokens=50_000", "run_dir=run", cwd=tmp_path)
    wait_for_step(tmp_path / "run", 1, stopped)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate()
    resumed = command("train.py", f"resume={tmp_path / 'run'}")
    out, _ = resumed.communicate()
    assert resumed.returncode == 0, out


def test_a_signal_ends_a_sweep(tmp_path: Path) -> None:
    overrides = [*without("n_tokens"), "n_tokens=120_000", *ONE, f"run_dir={tmp_path}", "seed=0,1"]
    process = command("train.py", "-m", *overrides)
    wait_for_step(tmp_path / "0", 1, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "Stopped at step" in out
    assert "Traceback" not in out
    assert not (tmp_path / "1").exists()


def test_auto_does_not_train_over_dictionaries(copy: Path) -> None:
    shutil.rmtree(copy / "run" / "checkpoints")
    with pytest.raises(DictlearnError, match="trained dictionaries but no whole checkpoint"):
        run_train(copy / "run", *of_finished(copy))


def test_a_point_of_a_grid_is_the_run_of_its_values(tmp_path: Path) -> None:
    run_train(tmp_path / "grid", *ONE, "grid={sparsifier.k:[2,4],optimizer.lr:[1e-3,3e-3]}")
    small = [o for o in ONE if not o.startswith("sparsifier")]
    run_train(tmp_path / "alone", *small, "sparsifier.k=4", "optimizer.lr=3e-3")
    point, alone = weight_hashes(tmp_path / "grid"), weight_hashes(tmp_path / "alone")
    assert point["resid_post.1_k-4_lr-3e-3"] == alone["resid_post.1"]
    assert len(set(point.values())) == 4
    assert pd.read_csv(tmp_path / "grid" / "sweep.csv")["sparsifier.k"].tolist() == [2, 2, 4, 4]
    assert (tmp_path / "grid" / "plots" / "frontier.png").exists()
    assert the(tmp_path / "grid", "resid_post.1_k-2_lr-1e-3").metadata["point"] == {
        "sparsifier.k": 2,
        "optimizer.lr": 1e-3,
    }


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    sync = os.fsync

    def full_after_three(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.suffix == ".part" and path.parent.name == "checkpoints":
            written.append(descriptor)
            if len(written) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_three)
    with pytest.raises(DictlearnError, match=r"No space left on device.*last whole checkpoint is .*, of step 12"):
        run_train(tmp_path / "run", *ONE)
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name == "step-00000012.ckpt"
    monkeypatch.undo()
    run_train(tmp_path / "run", *ONE, "resume=auto")
    run_train(tmp_path / "whole", *ONE)
    assert weight_hashes(tmp_path / "run") == weight_hashes(tmp_path / "whole")


def test_a_diverged_run_names_step_dictionary_and_checkpoint(tmp_path: Path) -> None:
    own = "dictionaries.attn.set={optimizer.lr:1e30,optimizer.clip_norm:null}"
    with pytest.raises(DictlearnError) as error:
        run_train(tmp_path / "run", own, "~evaluation.blocks.behaviour")
    assert "attn_out.2" in str(error.value)
    assert "resid_post.2" not in str(error.value)
    assert "The loss of attn_out.2 is not finite since step " in str(error.value)
    assert "There is no checkpoint from before" in str(error.value)


def test_plan_loads_and_writes_nothing(tmp_path: Path) -> None:
    process = command("train.py", "plan=true", "sites=resid_post.*", "experiment=single", cwd=tmp_path)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "1,954 of 1,024 activations" in out
    # 4 dictionaries of 2 * 128 * 1024 + 1024 + 128 parameters, 16 bytes each in training, 24 on disk at most
    assert "16.9 MB" in out
    assert "25.3 MB" in out
    assert not list(tmp_path.iterdir())


def test_sequences_count_what_they_train_on(tmp_path: Path) -> None:
    run_train(tmp_path / "run", *ONE, "stream=sequences")  # 2 rows of 127 tokens a step
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert (table.n_tokens == 254 * table.step).all()
    assert table.step.iloc[-1] == 40
    report = json.loads((tmp_path / "run/dictionaries/resid_post.1/report.json").read_text())
    assert report["reconstruction"]["fvu"] < 0.9
