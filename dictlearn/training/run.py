"""What `train.py` does: preflight, train, save, evaluate."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dictlearn.config import ConfigError, build, check_references, collect, plain
from dictlearn.data import ActivationData, RowData
from dictlearn.dictionaries import Dictionary
from dictlearn.evaluation import EvaluationContext, Results
from dictlearn.evaluation.build import build_blocks
from dictlearn.evaluation.plots import plot_training
from dictlearn.evaluation.present import evaluate_and_show
from dictlearn.hub import save
from dictlearn.hub.codecs.native import WEIGHTS
from dictlearn.lm import LM, load_lm
from dictlearn.registry import kind_of
from dictlearn.training.build import build_callbacks, build_members, captured_sites, sizes_of, starting_dictionaries
from dictlearn.training.callbacks import (
    Environment,
    Identity,
    LastCheckpoint,
    NotWritten,
    ProgressDisplay,
    RandomState,
    WholeFiles,
    keep_newest,
    periodic_checkpoint,
)
from dictlearn.training.interrupt import StopOnSignal, as_interrupt
from dictlearn.training.loggers import DictionaryLogger
from dictlearn.training.module import DictionaryTraining, Diverged, Member
from dictlearn.training.plan import plan, show
from dictlearn.training.points import Entry, entries
from dictlearn.training.preflight import problems
from dictlearn.training.resume import (
    AUTO,
    CONFIG,
    Checkpoint,
    check_identity,
    fix_commit,
    identity_of,
    newest_whole,
    resumed,
    resumed_if_begun,
)
from dictlearn.training.sweep import write_run_table
from dictlearn.types import DictlearnError, Stopped

log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """What a run is made of, loaded."""

    lm: LM
    data: ActivationData
    entries: list[Entry]
    members: list[Member]


def train(cfg: DictConfig, overrides: Sequence[str], console: Console, job: int | None = None) -> Results:
    """Run `cfg` to the end: train, save the dictionaries, evaluate them. Returns the reports.

    `job` is the number of a job of a sweep, which runs in a folder of its own. Raises DictlearnError before
    anything is loaded or written if the configuration does not work; with `plan`, nothing is. SIGTERM and Ctrl-C
    raise Stopped, which says how to go on.
    """
    with as_interrupt():
        with _interruptible("Interrupted; nothing is written"), console.status("Checking the configuration"):
            cfg, checkpoint = check(cfg, overrides, job)
        if cfg.plan:
            show(plan(cfg), cfg, console)
            return Results({})
        _quieten()
        L.seed_everything(cfg.seed, verbose=False)
        with ExitStack() as opened:
            with _folder(cfg, checkpoint, console), console.status("") as status:
                say = status.update if console.is_terminal else console.print
                setup = _load(cfg, say, resuming=checkpoint is not None)
                opened.callback(setup.data.close)
                identity = identity_of(cfg, setup.lm, setup.data.store.fingerprint)
                if checkpoint is not None:
                    check_identity(checkpoint, identity)
            return _train_and_evaluate(cfg, setup, identity, checkpoint, console)


def _train_and_evaluate(
    cfg: DictConfig, setup: Setup, identity: dict[str, Any], checkpoint: Checkpoint | None, console: Console
) -> Results:
    run_dir = Path(cfg.run_dir)
    loggers = list(build(cfg.logger).values())
    own_loggers = [logger for logger in loggers if isinstance(logger, DictionaryLogger)]
    folders = {entry.name: run_dir / "dictionaries" / entry.name for entry in setup.entries}
    results = Results({})
    try:
        for logger in own_loggers:
            logger.start({entry.name: _logged_config(cfg, entry) for entry in setup.entries})
        _fit(cfg, setup, identity, loggers, checkpoint, console)
        with _interruptible(f"Interrupted after the last step. Go on with resume={run_dir}"):
            dictionaries = _save(cfg, setup, folders)
        with _interruptible(f"Interrupted; the dictionaries are saved: evaluate.py load={run_dir} out=..."):
            if (table := run_dir / "metrics.csv").exists():  # without logger.csv there is none
                plot_training(table, run_dir / "plots")
            results = _evaluate(cfg, setup, dictionaries, folders, console)
    finally:
        for logger in own_loggers:
            logger.finish(results.reports, folders)
    return results


def check(
    cfg: DictConfig, overrides: Sequence[str], job: int | None = None
) -> tuple[DictConfig, Checkpoint | None]:
    """The configuration of the run, and the checkpoint that it continues from; nothing is loaded or written.

    Raises DictlearnError with all that is wrong.
    """
    check_references(cfg)
    fixed_folder = "${now:" not in str(OmegaConf.to_container(cfg, resolve=False)["run_dir"])  # type: ignore[index]
    if isinstance(cfg.run_dir, str):  # else said with the other problems
        cfg.run_dir = cfg.run_dir if job is None else str(Path(cfg.run_dir) / str(job))  # `now` is a fixed time now
    if cfg.resume is not None and cfg.resume != AUTO:
        cfg, checkpoint = resumed(str(cfg.resume), overrides)
        if found := problems(cfg, [], resuming=True):
            raise ConfigError(found)
        return cfg, checkpoint
    _make_absolute(cfg)
    found = problems(cfg, overrides, resuming=cfg.resume == AUTO)
    if cfg.resume == AUTO and not fixed_folder:
        found.append("resume=auto continues what is in run_dir: give run_dir=DIR")
    if found:
        raise ConfigError(found)
    return cfg, resumed_if_begun(cfg) if cfg.resume == AUTO else None


def check_ahead(cfg: DictConfig, overrides: Sequence[str], job: int | None = None) -> None:
    """`check`, before anything is written: then the folder of a sweep has to be empty, or to hold a begun sweep.

    Raises DictlearnError with all that is wrong.
    """
    found: list[str] = []
    if job is not None and isinstance(cfg.run_dir, str) and not cfg.plan:
        folder = Path(cfg.run_dir)
        if (folder / CONFIG).exists():
            found.append(f"run_dir {folder} holds a single run: choose another one for the runs of -m")
        elif cfg.resume != AUTO and any(folder.glob("*")):
            found.append(
                f"run_dir {folder} is not empty: choose another one, or continue the sweep in it by resume=auto"
            )
    collect(found, lambda: check(cfg, overrides, job))
    if found:
        raise ConfigError(found)


@contextmanager
def _folder(cfg: DictConfig, checkpoint: Checkpoint | None, console: Console) -> Iterator[None]:
    """The run folder with its configuration. A new run that fails inside the block leaves nothing behind."""
    run_dir = Path(cfg.run_dir)
    is_new = not (run_dir / CONFIG).exists()
    if checkpoint is not None:
        console.print(f"Continuing {run_dir} from step {checkpoint.step}", soft_wrap=True)
    elif is_new:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, run_dir / CONFIG)
    try:
        yield
    except BaseException as error:
        if is_new:
            (run_dir / CONFIG).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                run_dir.rmdir()
        if isinstance(error, KeyboardInterrupt):
            raise Stopped("Interrupted before training began; nothing is lost.") from None
        raise


def _make_absolute(cfg: DictConfig) -> None:
    """Local places in the configuration hold wherever the run is continued from."""
    for key in ("lm.name", "data.path", "data.name", "data.cache_dir", "data.store", "init_from"):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if not isinstance(value, str) or (key == "lm.name" and value == "embedded"):
            continue
        with suppress(RuntimeError, OSError):  # an impossible path, which is said with the other problems
            path = Path(value).expanduser()
            if path.exists() or key in ("data.path", "data.cache_dir", "data.store"):
                OmegaConf.update(cfg, key, str(path.absolute()))


def _quieten() -> None:
    """Lightning's notes that are not for the user of a run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 calling torch 2.13
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")  # it does on resume


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    """Ctrl-C inside the block is an error with this message."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"{message}.") from None


def _load(cfg: DictConfig, say: Callable[[str], None], resuming: bool = False) -> Setup:
    """LM, text and dictionaries; the commits of what is on the Hub are fixed in the run's configuration.

    `resuming`: the weights will come from a checkpoint.
    """
    device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
    text: RowData = build(cfg.data)
    say(f"Loading {cfg.lm.name}" if text.is_text else f"Drawing {text.title}")
    lm = text.own_lm(device) or load_lm(cfg.lm.name, cfg.lm.revision, cfg.lm.dtype, device)
    fix_commit(cfg, "lm.revision", lm.revision)
    found = entries(cfg, lm.model)
    sites = captured_sites(found, lm.model)
    data = ActivationData(text, lm, sites, cfg.batch_size, cfg.n_tokens, cfg.seed, stream=cfg.stream)
    with ExitStack() as after_failure:
        after_failure.callback(data.close)
        starts = {} if resuming else starting_dictionaries(cfg.init_from, found)
        say(_store_line(data) or "Measuring the activations")
        covariances = {site for entry in found if entry.name not in starts for site in sizes_of(entry, lm.model)}
        statistics = data.statistics(cfg.statistics_n_tokens, covariances)
        fix_commit(cfg, "data.revision", getattr(data.text, "revision", None))  # known once the text is open
        if cfg.evaluation.blocks:
            data.heldout(1)  # an error now, not after the training
        setup = Setup(lm, data, found, build_members(cfg, found, lm, statistics, starts))
        after_failure.pop_all()
    return setup


def _store_line(data: ActivationData) -> str | None:
    """What the run does with its activation store, if it has one."""
    store = data.activation_store
    if store is None:
        return None
    if store.complete:
        return f"Reading activations from {store.folder}: the LM does not run in training"
    return f"Writing activations to {store.folder}: {store.n_bytes / 1e9:,.2f} GB"


def _fit(
    cfg: DictConfig,
    setup: Setup,
    identity: dict[str, Any],
    loggers: list[Any],
    checkpoint: Checkpoint | None,
    console: Console,
) -> None:
    """Train to the end, or raise DictlearnError that says where it stopped and how to go on."""
    run_dir = Path(cfg.run_dir)
    checkpoints = run_dir / "checkpoints"
    stream = setup.data.train_dataloader()
    n_steps = len(stream)
    module = DictionaryTraining(setup.members, n_steps, stream.tokens_per_batch, setup.lm)
    stopper = StopOnSignal(checkpoints, console)
    trainer = build(
        cfg.trainer,
        logger=loggers,
        callbacks=[
            ProgressDisplay(console),
            RandomState(),
            Environment(),
            Identity(identity),
            stopper,
            LastCheckpoint(checkpoints),
            periodic_checkpoint(checkpoints, n_steps),
            *build_callbacks(cfg).values(),
        ],
        plugins=[WholeFiles(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        max_steps=n_steps,
        max_epochs=-1,
        enable_progress_bar=False,
        log_every_n_steps=1,  # nothing is logged through Lightning, which warns of short runs
        enable_model_summary=False,
        default_root_dir=run_dir,
    )
    if cfg.trainer.accelerator == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32
    path = None if checkpoint is None else str(checkpoint.path)
    stopped = f"Stopped at step {{}} of {n_steps}. Go on with resume={run_dir}"
    try:
        with stopper.listening():
            trainer.fit(module, datamodule=setup.data, ckpt_path=path, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        if stopper.requested is None:
            raise  # a cluster's own end of the job, which queues it again
        raise Stopped(f"{stopped.format(module.global_step)}, from its last checkpoint.") from None
    except (Diverged, NotWritten) as error:
        raise DictlearnError(f"{error} {_last_whole(run_dir)}") from None
    finally:
        torch.set_float32_matmul_precision("highest")  # evaluation selects latents in float32
        setup.data.close()
    keep_newest(checkpoints)
    if stopper.requested is not None:  # perhaps after the last step, which is saved as well
        raise Stopped(f"{stopped.format(module.global_step)} (saved there).")


def _last_whole(run_dir: Path) -> str:
    newest = newest_whole(run_dir)
    if newest is None:
        return "There is no checkpoint from before."
    return f"The last whole checkpoint is {newest.path}, of step {newest.step}."


def _logged_config(cfg: DictConfig, entry: Entry) -> dict[str, Any]:
    """The configuration of one dictionary in a flat run: its own settings, and what the run shares."""
    shared = ("lm", "data", "n_tokens", "batch_size", "seed", "stream", "statistics_n_tokens", "trainer")
    own = {"reads": "+".join(site.name for site in entry.reads), "writes": entry.site, **entry.values}
    return {"dictionary": plain(entry.config), **own, **{key: plain(cfg[key]) for key in shared}}


def _save(cfg: DictConfig, setup: Setup, folders: Mapping[str, Path]) -> dict[str, Dictionary]:
    """Inference dictionaries by name, written in the native format with where they come from."""
    dictionaries = {}
    for entry, member in zip(setup.entries, setup.members, strict=True):
        trained = member.learner.dictionary
        dictionary = trained.for_inference()
        dictionary.metadata = _metadata(cfg, setup.lm, setup.data.text, entry) | trained_as(trained, dictionary)
        save(dictionary, folders[entry.name])
        dictionaries[entry.name] = dictionary
    return dictionaries


def _metadata(cfg: DictConfig, lm: LM, text: RowData, entry: Entry) -> dict[str, Any]:
    """Where a dictionary comes from, in its cfg.json."""
    return {
        "lm_name": lm.name if text.is_text else None,
        "lm_revision": lm.revision,
        "lm_dtype": lm.dtype,
        "store_dtype": None if text.store is None else text.store_dtype,
        "ctx": text.ctx,
        "prepend_bos": (lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id) is not None,
        "data": text.record(),
        "seed": cfg.seed,
        "n_tokens": cfg.n_tokens,
        "normalise": entry.config.normalise,
        "init_from": cfg.init_from,
        "point": entry.values,
    }


def trained_as(trained: Dictionary, stored: Dictionary) -> dict[str, Any]:
    """Kind, own settings and sparsifier in training, as `trained_as`; empty where the stored ones are the same."""

    def of(dictionary: Dictionary) -> dict[str, Any]:
        sparsifier = {"kind": dictionary.sparsifier.kind, **dictionary.sparsifier.config()}
        settings = {key: value for key, value in dictionary.config().items() if key not in stored.config()}
        return {"dictionary": kind_of(dictionary), **settings, "sparsifier": sparsifier}

    return {} if of(trained) == of(stored) else {"trained_as": of(trained)}


def _evaluate(
    cfg: DictConfig,
    setup: Setup,
    dictionaries: Mapping[str, Dictionary],
    folders: Mapping[str, Path],
    console: Console,
) -> Results:
    run_dir = Path(cfg.run_dir)
    with console.status("Preparing held-out text"):
        rows = setup.data.heldout(cfg.evaluation.n_tokens)
    context = EvaluationContext(
        lm=setup.lm,
        dictionaries={name: d.to(setup.lm.device) for name, d in dictionaries.items()},
        tokens=rows.tokens,
        mask=rows.mask,
        data=rows.info,
        batch_rows=cfg.evaluation.batch_rows,
        weight_files={name: folder / WEIGHTS for name, folder in folders.items()},
        max_norm_ratio=setup.data.text.max_norm_ratio,
    )
    results = evaluate_and_show(context, build_blocks(cfg.evaluation), folders, run_dir / "plots", console)
    if cfg.grid is not None or cfg.sites is not None:
        write_run_table(setup.entries, results.reports, run_dir)
        console.print(f"Sweep: {run_dir / 'sweep.csv'}, {run_dir / 'plots' / 'frontier.png'}")
    console.print(f"Run folder: {run_dir}")
    return results
