"""The training door, from configuration to run folder."""

import io
import json
import math
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image
from rich.console import Console
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue] - made at import

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation.run import Results
from dictlearn.overrides import refuse_mistakes
from dictlearn.training.resume import resumed
from dictlearn.training.run import _load, check_ahead, train
from dictlearn.types import DictlearnError
from tests.runs import ROOT, SMALL, command, composed, run_train, weight_hashes

NAMES = ["attn_out.2", "mlp_out.2", "resid_post.2"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "default"


@pytest.fixture(scope="module")
def results(run_dir: Path) -> Results:
    return run_train(run_dir)


@pytest.mark.usefixtures("results")
def test_the_run_folder(run_dir: Path) -> None:
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "dictionaries",
        "metrics.csv",
        "plots",
    ]
    assert [path.suffix for path in (run_dir / "checkpoints").iterdir()] == [".ckpt"]
    assert sorted(path.name for path in (run_dir / "dictionaries").iterdir()) == NAMES
    for name in NAMES:
        files = sorted(path.name for path in (run_dir / "dictionaries" / name).iterdir())
        assert files == ["cfg.json", "latents.parquet", "report.json", "sae_weights.safetensors"]
    kinds = ("density", "l0", "fvu_per_position", "ce_per_position")
    stems = {"training", *(f"{name}_{kind}" for name in NAMES for kind in kinds)}
    assert {path.name for path in (run_dir / "plots").iterdir()} == {
        f"{s}{e}" for s in stems for e in (".png", ".csv")
    }
    for png in (run_dir / "plots").glob("*.png"):
        assert min(Image.open(png).size) > 200


def test_reports_have_every_block_and_finite_numbers(results: Results, run_dir: Path) -> None:
    assert not results.errors
    fields = {
        "sparsity": {"l0", "n_dead", "frac_dead"},
        "reconstruction": {"fvu", "fve", "mse_per_token", "mse_per_dim", "cosine", "relative_bias"},
        "behaviour": {
            "ce_clean",
            "ce_rec",
            "ce_zero",
            "ce_mean",
            "delta_ce",
            "ce_recovered_zero",
            "ce_recovered_mean",
            "kl_rec",
        },
    }
    for name in NAMES:
        report = json.loads((run_dir / "dictionaries" / name / "report.json").read_text())
        assert {"dictionary", "lm", "data", "compute", *fields} <= set(report)
        for block, keys in fields.items():
            assert keys <= set(report[block])
            numbers = [value for value in report[block].values() if isinstance(value, int | float)]
            assert all(math.isfinite(value) for value in numbers)
        assert report["sparsity"]["l0"]["mean"] <= 4
        assert 0 < report["reconstruction"]["fvu"] < 1


@pytest.mark.usefixtures("results")
def test_the_log_has_every_window(run_dir: Path) -> None:
    table = pd.read_csv(run_dir / "metrics.csv")
    assert table.n_tokens.tolist() == [256 * step for step in range(4, 41, 4)]  # a tenth of 40 steps
    for name in NAMES:
        assert table[[f"{name}/{key}" for key in ("loss", "fvu", "l0", "frac_dead")]].notna().to_numpy().all()


@pytest.mark.usefixtures("results")
def test_lines_of_progress_are_rows_of_the_log(tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "experiment=single",
        "site=resid_post.1",
        "n_tokens=11_000",
        "~evaluation.blocks.behaviour",
    ]
    console = Console(file=io.StringIO(), width=200)
    train(composed("train", [*overrides, f"run_dir={tmp_path}"]), overrides, console)
    assert isinstance(console.file, io.StringIO)
    printed = re.findall(r"(?m)^step (\d+)/43, .* loss (\S+) FVU (\S+) L0", console.file.getvalue())
    table = pd.read_csv(tmp_path / "metrics.csv")
    loss, fvu = (table[f"resid_post.1/{key}"].map("{:.4f}".format) for key in ("loss", "fvu"))
    assert printed == list(zip(table.step.map(str), loss, fvu, strict=True))
    assert printed[-1][0] == "43"


def test_what_was_trained_loads(run_dir: Path) -> None:
    loaded = dictlearn.load(run_dir)
    assert isinstance(loaded, dict)
    assert {name: (d.reads, d.writes) for name, d in loaded.items()} == {
        "attn_out.2": (("attn_out.2",), ("attn_out.2",)),
        "mlp_out.2": (("mlp_in.2",), ("mlp_out.2",)),
        "resid_post.2": (("resid_post.2",), ("resid_post.2",)),
    }
    assert all(d.n_latents == 256 for d in loaded.values())
    assert all(d.metadata["lm_name"] == "embedded" for d in loaded.values())


@pytest.mark.usefixtures("results")
def test_same_seed_same_weights(run_dir: Path, tmp_path: Path) -> None:
    run_train(tmp_path / "again")
    run_train(tmp_path / "other", "seed=1")
    assert weight_hashes(tmp_path / "again") == weight_hashes(run_dir)
    assert not set(weight_hashes(tmp_path / "other").values()) & set(weight_hashes(run_dir).values())


KNOBS: list[tuple[list[str], Any]] = [
    (["site=attn_z.1"], lambda d: d.reads == ("attn_z.1",)),
    (["site=transformer.h.1.ln_2:in"], lambda d: d.writes == ("transformer.h.1.ln_2:in",)),
    (["site=mlp.1", "dictionary=transcoder"], lambda d: (d.reads, d.writes) == (("mlp_in.1",), ("mlp_out.1",))),
    (["site=mlp.1", "dictionary=transcoder", "dictionary.module.skip=true"], lambda d: d.W_skip is not None),
    (["site=resid_pre.1", "sparsifier=relu", "sparsifier.l1=0.5"], lambda d: d.sparsifier.l1 == 0.5),
    (["site=resid_pre.1", "sparsifier.k=7"], lambda d: d.sparsifier.k == 7),
    (["site=resid_pre.1", "expansion=3"], lambda d: d.n_latents == 384),
    (["site=mlp_hidden.1", "expansion=1"], lambda d: d.n_latents == 512),
    (["site=resid_pre.1", "trainer.precision=bf16-mixed"], lambda d: d.W_enc.dtype == torch.float32),
]


@pytest.mark.parametrize(("overrides", "holds"), KNOBS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_single_experiment_builds_what_was_asked(tmp_path: Path, overrides: list[str], holds: Any) -> None:
    run_train(tmp_path / "run", "experiment=single", "n_tokens=1_000", "~evaluation.blocks.behaviour", *overrides)
    (dictionary,) = dictlearn.load(tmp_path / "run").values()  # type: ignore[union-attr]
    assert isinstance(dictionary, Dictionary)
    assert holds(dictionary)


SHORT = ["experiment=single", "site=resid_post.1", "n_tokens=20_000", "~evaluation.blocks.behaviour"]
BASES = {"usual": SHORT, "with dead latents": [*SHORT, "expansion=16", "sparsifier.k=1"]}


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, overrides in BASES.items():
        run_train(run_dir := tmp_path_factory.mktemp("base"), *overrides)
        found[name] = weight_hashes(run_dir)
    return found


@pytest.mark.parametrize(
    "override",
    [
        "normalise=none",
        "normalise=layer_norm",
        "stream=sequences",
        "statistics_n_tokens=4_096",
        "optimizer.betas=[0.8,0.99]",
        "objective.aux_k.coefficient=1",
        "data.max_norm_ratio=1.5",
        "data.block_rows=8",
        "dictionary.set={optimizer.lr:1e-4}",
        "optimizer.lr=1e-4",
        "optimizer.lr_factor=0.5",
        "optimizer.clip_norm=0.001",
        "schedule.warmup_steps=0",
        "schedule.decay=1.0",
        "batch_size=128",
        "data.ctx=64",
        "data.seed=7",
        "data.n_slices=2",
        "objective=plain",
        "dead_after_tokens=1_000_000",
        "dictionary.module.decoder_norm=free",
    ],
)
def test_every_knob_changes_the_weights(base_weights: dict[str, Any], tmp_path: Path, override: str) -> None:
    which = "with dead latents" if override.startswith(("objective", "dead_after_tokens")) else "usual"
    run_train(tmp_path, *BASES[which], override)
    assert weight_hashes(tmp_path) != base_weights[which]


def test_local_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = ["the", "big", "cat", "saw", "a", "small", "dog"]
    text.write_text("\n".join(" ".join(words[(i * j) % 7] for j in range(1, 60)) for i in range(400)))
    run_train(tmp_path / "run", "experiment=single", "site=resid_post.1", "data=local", f"data.path={text}")
    (dictionary,) = dictlearn.load(tmp_path / "run").values()  # type: ignore[union-attr]
    assert dictionary.metadata["data"]["path"] == str(text)


def test_a_sweep_writes_into_its_own_folders(tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, "experiment=single", "site=resid_post.1", "sparsifier.k=2,4"]
    arguments.remove("sparsifier.k=4")
    process = command("train.py", *arguments, "run_dir=sweep", "name=s", cwd=tmp_path)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    folders = sorted(path for path in (tmp_path / "sweep").glob("[0-9]*"))
    assert [folder.name for folder in folders] == ["0", "1"]
    k = [d.sparsifier.k for folder in folders for d in dictlearn.load(folder).values()]  # type: ignore[union-attr]
    assert k == [2, 4]
    table = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert table["sparsifier.k"].tolist() == [2, 4]
    assert table["dictionary"].tolist() == ["0/resid_post.1", "1/resid_post.1"]
    reports = [json.loads((f / "dictionaries/resid_post.1/report.json").read_text()) for f in folders]
    assert table.fvu.tolist() == pytest.approx([report["reconstruction"]["fvu"] for report in reports])
    assert (tmp_path / "sweep" / "plots" / "frontier.png").exists()


def test_a_sweep_of_jobs_of_a_cluster(tmp_path: Path) -> None:
    """The Slurm launcher's own local twin: each job in a process of its own, unpickled there."""
    arguments = ["-m", "hydra/launcher=submitit_local", "resume=auto", *SMALL, "experiment=single"]
    arguments += ["site=resid_post.1", "sparsifier.k=2,8", f"run_dir={tmp_path}", "~evaluation.blocks.behaviour"]
    arguments.remove("sparsifier.k=4")
    process = command("train.py", *arguments)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert pd.read_csv(tmp_path / "sweep.csv")["sparsifier.k"].tolist() == [2, 8]


def test_the_slurm_launcher_composes() -> None:
    process = command("train.py", "hydra/launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher")
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert "submitit_launcher.SlurmLauncher" in out
    assert "max_num_timeout: 20" in out


def finished_records(path: Path) -> list[Any]:
    """All of an offline run's records: W&B's own process may still be writing them when the run has ended."""
    for _ in range(600):
        records = list(wandb_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def wandb_records(content: bytes) -> Iterator[Any]:
    """Protobufs in the log format of LevelDB, after a header of 7 bytes."""
    at, pending = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):
            return
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def test_each_dictionary_is_a_member_of_a_wandb_group(tmp_path: Path) -> None:
    sites = ["experiment=single", "sites=[resid_post.1,resid_post.2]", "name=group1"]
    run_train(tmp_path / "run", *sites, "logger=wandb", "logger.wandb.mode=offline")
    logged = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(logged) == 2
    runs = {}
    for folder in logged:
        records = finished_records(next(folder.glob("*.wandb")))
        (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        summary = {"/".join(i.nested_key) or i.key for r in records for i in r.summary.update}
        artefacts = [r.request.log_artifact.artifact for r in records] + [r.artifact for r in records]
        names = {(artefact.name, artefact.type) for artefact in artefacts if artefact.name}
        runs[started.display_name] = (started, summary, names, records)
    assert sorted(runs) == ["resid_post.1", "resid_post.2"]
    for name, (started, summary, names, records) in runs.items():
        assert started.run_group == "group1"
        assert "reconstruction.fvu" in summary
        assert (name, "dictionary") in names
        keys = {"/".join(i.nested_key) or i.key for r in records for i in r.history.item}
        assert "fvu" in keys
        assert not any(key.startswith("resid_post") for key in keys)
        config = {item.key: item.value_json for item in started.config.update}
        assert any(name in value for value in config.values())
    ids = json.loads((tmp_path / "run" / "wandb_ids.json").read_text())
    assert sorted(ids) == ["resid_post.1", "resid_post.2"]
    assert {folder.name.rpartition("-")[2] for folder in logged} == set(ids.values())
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_train(tmp_path / "run", "experiment=single", "site=resid_post.1", "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert [e.step for e in events.Scalars("resid_post.1/fvu")] == table.step.tolist()
    assert [e.value for e in events.Scalars("resid_post.1/fvu")] == pytest.approx(
        table["resid_post.1/fvu"].tolist()
    )


def test_a_sweeper_is_given_the_mean_fvu(tmp_path: Path) -> None:
    import train

    overrides = [*SMALL, f"run_dir={tmp_path / 'run'}", "hydra.job.num=0", "hydra.job.id=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg.hydra
    returned = train.main.__wrapped__(cfg)
    reports = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("dictionaries/*/report.json")]
    assert returned == pytest.approx(sum(r["reconstruction"]["fvu"] for r in reports) / 3)


def test_resume_takes_the_newest_whole_checkpoint(tmp_path: Path, results: Results, run_dir: Path) -> None:
    assert not results.errors
    shutil.copytree(run_dir, tmp_path / "r")
    (whole,) = (tmp_path / "r" / "checkpoints").iterdir()
    (whole.parent / "step-00000039.ckpt").write_bytes(whole.read_bytes()[:1_000])
    assert resumed(str(tmp_path / "r"), [])[1].path == whole


def test_the_seed_reaches_the_order_of_the_text(tmp_path: Path) -> None:
    cfg = composed("train", [*SMALL, "seed=5", f"run_dir={tmp_path}"])
    assert _load(cfg, print).data.seed == 5


def test_a_sweep_with_an_impossible_job_does_not_start(tmp_path: Path) -> None:
    process = command("train.py", "-m", "sparsifier.k=4000,4", f"run_dir={tmp_path / 'sweep'}")
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "sparsifier.k=4000: sparsifier.k must be at most n_latents = 1024" in out
    assert "Traceback" not in out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("there", "overrides", "problem"),
    [
        ("config.yaml", [], "holds a single run"),
        ("config.yaml", ["resume=auto"], "holds a single run"),
        ("0/config.yaml", [], "is not empty: choose another one, or continue the sweep in it by resume=auto"),
        ("0/metrics.csv", ["resume=auto"], "holds files but no run"),
        ("sweep.csv", [], "is not empty"),
        ("sweep.csv", ["resume=auto"], None),
    ],
)
def test_a_sweep_does_not_go_into_a_folder_in_use(
    tmp_path: Path, there: str, overrides: list[str], problem: str | None
) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    arguments = ["-m", "experiment=single", "site=resid_post.1", "seed=1,2", f"run_dir={tmp_path}", *overrides]
    with nullcontext() if problem is None else pytest.raises(DictlearnError, match=problem):
        refuse_mistakes(ROOT / "conf", "train", arguments, check_ahead)


def test_a_run_without_its_csv_file_is_whole(tmp_path: Path) -> None:
    results = run_train(tmp_path, "experiment=single", "site=resid_post.1", "~logger.csv")
    assert results.reports["resid_post.1"]["reconstruction"]["fvu"] > 0
    assert weight_hashes(tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_failing_job_leaves_the_others_of_a_sweep(tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, "experiment=single", "site=resid_post.1", "optimizer.lr=1e30,1e-3"]
    arguments += ["optimizer.clip_norm=null", f"run_dir={tmp_path}", "~evaluation.blocks.behaviour"]
    process = command("train.py", *arguments)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "Job 0 failed: Training diverged" in out
    assert "Traceback" not in out
    assert weight_hashes(tmp_path / "1")
    assert pd.read_csv(tmp_path / "sweep.csv")["dictionary"].tolist() == ["1/resid_post.1"]
