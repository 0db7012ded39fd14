"""The LightningModule: K independent dictionaries on the batches of one LM pass."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dictlearn.data import Batch, Sequences
from dictlearn.lm import LM, CleanRun
from dictlearn.training.learner import Learner
from dictlearn.training.optimizers import OptimizerSettings, RunOptimizer, average_, build_optimizer
from dictlearn.training.resampling import Resample, resample_
from dictlearn.training.schedules import Schedule
from dictlearn.training.statistics import WindowMetrics
from dictlearn.types import DictlearnError

MOST_PER_WINDOW = 50  # steps; at the end of a window: one transfer from the device, one row in metrics.csv


class Diverged(DictlearnError):
    """A loss or a weight is not finite."""


class Member(NamedTuple):
    """A dictionary in training, with its own optimizer settings and schedule; `seed` is that of what it samples."""

    learner: Learner
    optimizer: OptimizerSettings
    schedule: Schedule
    seed: int = 0


class DictionaryTraining(L.LightningModule):
    """Trains every member on every batch; losses are independent, so their sum has each one's own gradients.

    `lm`, of which the batches are, is there for terms that look at it; it is in no module tree. Metrics stay on the
    device and leave it once per window in one transfer. `latest` holds the values of the last window, which ended
    at step `latest_step`, and the mean speed of the run, in all its processes.
    """

    def __init__(self, members: list[Member], n_steps: int, tokens_per_batch: int, lm: LM | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.members = members
        self.learners = nn.ModuleList(member.learner for member in members)
        self.n_steps, self.tokens_per_batch = n_steps, tokens_per_batch
        self.window = max(1, min(MOST_PER_WINDOW, n_steps // 10))
        self.latest: dict[str, float] = {}
        self.latest_step = 0
        self._seconds = 0.0  # in training before this process
        self._since: float | None = None  # when this process began with its first step

    def training_step(self, batch: Batch | Sequences, batch_idx: int) -> Tensor:
        flat = batch.flat() if isinstance(batch, Sequences) else batch
        clean = None
        if self.lm is not None and isinstance(batch, Sequences):
            clean = CleanRun(self.lm.model, batch.tokens, batch.counted, flat.acts)
        return torch.stack([member.learner.loss(flat, clean) for member in self.members]).sum()

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer([(m.learner.dictionary, m.optimizer) for m in self.members])
        members = [self.members[group["member"]] for group in optimizer.param_groups]
        factors = [lambda step, m=m: m.schedule.factor(step, self.n_steps) for m in members]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"},
        }

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        for member in self.members:
            member.learner.clip_gradients_()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here and not in a batch-end hook: checkpoints are saved before those run.
        super().optimizer_step(*args, **kwargs)
        for member in self.members:
            self._optimizer.project_(member.learner.dictionary)
        self.zero_grad()  # a batch in chunks takes its gradients before Lightning would free these

    def on_train_batch_start(self, batch: Batch | Sequences, batch_idx: int) -> None:
        # A window ends before the next step, not after its last: a checkpoint saved between the two then holds
        # the whole window, and the resumed run ends it here as this one does.
        if self._since is None:
            self._since = time.perf_counter()
        for member in self.members:
            member.learner.at(self.global_step, self.n_steps)  # before resampling, which takes a step of its own
        if self.global_step > 0 and self.global_step % self.window == 0:
            self._flush(self.global_step)
            self._resample(batch.flat() if isinstance(batch, Sequences) else batch)

    def on_train_epoch_end(self) -> None:
        if self.global_step == self.n_steps:  # the last window, in time for the callbacks' on_train_end
            self._flush(self.global_step)  # a run that was stopped goes on in its window

    def on_fit_end(self) -> None:
        for member in self.members:
            average_(self._optimizer, member.learner.dictionary)

    @property
    def _optimizer(self) -> RunOptimizer:
        return cast(RunOptimizer, self.trainer.optimizers[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is not finite never replaces a checkpoint: the one before is deleted after this one.

        The weights in it are those to evaluate; of averages, `trained_weights` are what the run goes on from.
        """
        optimizer = self._optimizer
        bad = []
        for member in self.members:
            learner = member.learner
            weights = list(learner.dictionary.parameters())
            moments = [v for p in weights for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
            states = {"loss": [learner.statistics.sums], "weights": weights, "optimizer state": moments}
            bad += [f"{what} of {learner.name}" for what, values in states.items() if not _all_finite(values)]
        if bad:
            raise self._diverged(", ".join(bad), self.global_step)
        checkpoint["seconds"] = self._seconds_so_far()
        checkpoint["trained_weights"] = self._average(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._seconds = checkpoint["seconds"]
        checkpoint["state_dict"].update(checkpoint["trained_weights"])

    @torch.no_grad()
    def _average(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put averages into `state` in place of weights; returns the weights that have them."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        replaced = {}
        for member in self.members:
            for parameter, trained in average_(self._optimizer, member.learner.dictionary).items():
                state[names[parameter]] = parameter.detach().clone()
                replaced[names[parameter]] = trained
                parameter.copy_(trained)
        return replaced

    def _seconds_so_far(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def _flush(self, step: int) -> None:
        windows = [member.learner.statistics.flush() for member in self.members]
        values = torch.stack([value.double() for window in windows for value in window]).tolist()
        names = [f"{m.learner.name}/{field}" for m in self.members for field in WindowMetrics._fields]
        speed = step * self.tokens_per_batch / self._seconds_so_far()
        if bad := [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]:
            raise self._diverged(", ".join(bad), step)
        self.latest = {**dict(zip(names, values, strict=True)), "tokens_per_second": speed}
        self.latest_step = step
        row = {"n_tokens": float(step * self.tokens_per_batch), **self.latest}
        for logger in self.loggers:
            logger.log_metrics(row, step=step)

    def _resample(self, batch: Batch) -> None:
        step = self.global_step
        times = [n * self.tokens_per_batch for n in (step - self.window, step, self.n_steps)]
        for learner, _, _, seed in self.members:
            for term in learner.terms.values():
                if isinstance(term, Resample) and term.is_due(*times):
                    resample_(learner, batch, self._optimizer, term.encoder_scale, seed + step)

    def _diverged(self, what: str, step: int) -> Diverged:
        first = {m.learner.name: int(m.learner.statistics.n_finite) + 1 for m in self.members}
        since = [f"The loss of {name} is not finite since step {at}. " for name, at in first.items() if at <= step]
        return Diverged(
            f"Training diverged by step {step}: {what} not finite. {''.join(since)}Lower optimizer.lr, or set "
            "optimizer.clip_norm."
        )


def _all_finite(values: Iterable[Tensor]) -> bool:
    return all(torch.stack([value.isfinite().all() for value in values] or [torch.tensor(True)]).tolist())
