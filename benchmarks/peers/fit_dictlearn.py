"""dictlearn: Lightning's loop over the shuffled stream, one dictionary for each of the spec's sites."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train.py does

from ours import STATISTICS_TOKENS, Gated, load_data, make_member, make_module, make_trainer


def fit(spec: dict[str, Any], gate: Any) -> None:
    data = load_data(spec, spec["sites"])
    gate.loaded()
    statistics = data.statistics(STATISTICS_TOKENS)
    members = [make_member(name, statistics, spec) for name in spec["sites"]]
    loader = Gated(data.train_dataloader(), gate)
    make_trainer(spec, enable_checkpointing=False).fit(make_module(members, spec), loader)
