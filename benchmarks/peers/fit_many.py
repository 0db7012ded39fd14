"""dictlearn: a dictionary at every site in one pass; beside it one LM forward and as many single steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from ours import STATISTICS_TOKENS, BareLoop, Gated, load_data, make_member, make_module, make_trainer

from dictlearn.data import ActivationData, Batch, SiteStatistics
from dictlearn.lm.taps import activations

N_BATCHES = 4


class Parts:
    """What a pass is made of, measured alone: the LM as far as the last site, and single steps at that site."""

    def __init__(
        self, data: ActivationData, statistics: dict[str, SiteStatistics], spec: dict[str, Any], gate: Any
    ) -> None:
        self.data, self.gate, self.site = data, gate, data.sites[-1]
        self.n_sites, self.batch_size, self.ctx = len(data.sites), spec["batch_size"], spec["ctx"]
        self.lm_batch_rows = spec["lm_batch_rows"]
        self.loop = BareLoop(make_module([make_member(self.site.name, statistics, spec)], spec), spec)
        rows = data.store.rows(0, math.ceil(N_BATCHES * self.batch_size / self.ctx))
        acts = torch.cat([self._forward(part) for part in rows.split(self.lm_batch_rows)])
        zeros = torch.zeros(self.batch_size, dtype=torch.long, device=acts.device)
        batches = acts.flatten(0, 1).clone().split(self.batch_size)[:N_BATCHES]
        self.batches = [Batch({self.site.name: batch}, zeros, zeros, zeros) for batch in batches]
        self(1)

    def __call__(self, n_steps: int) -> dict[str, float]:
        """Seconds for the tokens of `n_steps` steps: of the LM, and of the single steps of all sites together."""
        rows = self.data.store.rows(0, math.ceil(n_steps * self.batch_size / (self.ctx - 1)))
        started = self.gate.now()
        for part in rows.split(self.lm_batch_rows):
            self._forward(part)
        read = self.gate.now()
        for index in range(self.n_sites):
            self.loop.step(self.batches[index % N_BATCHES])
        ended = self.gate.now()
        return {"lm_seconds": read - started, "single_steps_seconds": (ended - read) * n_steps}

    def _forward(self, rows: torch.Tensor) -> torch.Tensor:
        lm = self.data.lm
        return activations(lm.model, [self.site], rows.to(lm.device))[self.site.name]


def fit(spec: dict[str, Any], gate: Any) -> None:
    data = load_data(spec, spec["sites"])
    gate.loaded()
    statistics = data.statistics(STATISTICS_TOKENS)
    members = [make_member(name, statistics, spec) for name in spec["sites"]]
    gate.after_turn = Parts(data, statistics, spec, gate)
    loader = Gated(data.train_dataloader(), gate)
    make_trainer(spec, enable_checkpointing=False).fit(make_module(members, spec), loader)
