"""dictlearn through its classes, with the settings that train.py has, for what cannot import Hydra's world."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bare  # noqa: F401
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lms import DOCUMENTS

from dictlearn.data import ActivationData, Batch, SiteStatistics, stored
from dictlearn.data.text import LocalText
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import load_lm, resolve
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.learner import Learner, prepare
from dictlearn.training.loggers import CsvLogger
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.training.optimizers import Adam
from dictlearn.training.schedules import WarmupDecay

DEAD_AFTER = 10_000_000  # tokens, as in a long run: none dies here
STATISTICS_TOKENS = 65_536
N_STEPS = 10**6  # of a run that ends when it is told to


def load_data(spec: dict[str, Any], names: Sequence[str]) -> ActivationData:
    """Activations of the LM in spec["folder"] at the sites `names`; its text is tokenised before this returns.

    With spec["store_steps"], from a store of as many steps.
    """
    folder = Path(spec["folder"])
    lm = load_lm(str(folder), dtype=spec["lm_dtype"], device=spec["device"])
    text = LocalText(
        path=str(folder / DOCUMENTS),
        column="tokens",
        ctx=spec["ctx"],
        block_rows=spec["block_rows"],
        heldout_min_tokens=0,
        cache_dir=str(folder / "cache"),
        store=str(folder / "acts") if "store_steps" in spec else None,
    )
    stored.SHARD_BYTES = 2**23  # so that a turn reads several shards of a store
    sites = [resolve(lm.model, name) for name in names]
    n_tokens = spec.get("store_steps", N_STEPS) * spec["batch_size"]
    data = ActivationData(text, lm, sites, spec["batch_size"], n_tokens)
    data.store.wait(10**9)
    return data


def make_member(name: str, statistics: dict[str, SiteStatistics], spec: dict[str, Any]) -> Member:
    """A TopK autoencoder at the site `name`."""
    d = len(statistics[name].mean)
    dictionary = Linear(d, d, spec["n_latents"], TopK(spec["k"]), reads=(name,), writes=(name,))
    variance = prepare(dictionary, statistics, "mean_norm", torch.Generator().manual_seed(0))
    learner = Learner(name, dictionary, {"aux_k": AuxK()}, variance, DEAD_AFTER, clip_norm=1.0)
    optimizer = Adam(lr=None, lr_factor=3.0, betas=(0.9, 0.999), eps=6.25e-10, clip_norm=1.0)
    return Member(learner, optimizer, WarmupDecay(warmup_steps=1000, decay=0.2))


def make_module(members: list[Member], spec: dict[str, Any]) -> DictionaryTraining:
    return DictionaryTraining(members, N_STEPS, spec["batch_size"])


def make_trainer(spec: dict[str, Any], callbacks: Sequence[Callback] = (), **options: Any) -> L.Trainer:
    """Lightning as a run sets it up; its checkpoints and its display come with `callbacks` and `options`."""
    on_gpu = spec["device"] == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    return L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if spec["precision"] == "mixed" else "32-true",
        logger=[CsvLogger(spec["folder"])],
        callbacks=list(callbacks),
        max_steps=N_STEPS,
        max_epochs=-1,
        enable_progress_bar=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        default_root_dir=spec["folder"],
        **options,
    )


class Gated:
    """Batches behind the gate of fit_worker.py, of the length of a run."""

    def __init__(self, batches: Iterable[Batch], gate: Any) -> None:
        self.batches, self.gate = batches, gate

    def __len__(self) -> int:
        return N_STEPS

    def __iter__(self) -> Iterator[Batch]:
        return self.gate.batches(self.batches)


class BareLoop:
    """The work of a training step without Lightning."""

    def __init__(self, module: DictionaryTraining, spec: dict[str, Any]) -> None:
        self.module = module.to(spec["device"])
        configured = module.configure_optimizers()
        self.optimizer, self.scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.device, self.is_mixed = spec["device"], spec["precision"] == "mixed"
        self.n_steps = 0

    def step(self, batch: Batch) -> None:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.is_mixed):
            loss = self.module.training_step(batch, self.n_steps)
        self.optimizer.zero_grad()
        loss.backward()
        self.module.configure_gradient_clipping()
        self.optimizer.step()
        for member in self.module.members:
            member.learner.dictionary.project_()
        self.scheduler.step()
        self.n_steps += 1
        if self.n_steps % self.module.window == 0:
            windows = [member.learner.statistics.flush() for member in self.module.members]
            torch.stack([value.double() for window in windows for value in window]).tolist()
