"""dictlearn: Lightning's loop over the shuffled stream, one dictionary for each of the spec's sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ours import STATISTICS_TOKENS, Gated, load_data, make_member, make_module, make_trainer

T = TypeVar("T")


def fit(spec: dict[str, Any], gate: Any) -> None:
    if "store_steps" in spec:
        write_store(spec)
    data = load_data(spec, spec["sites"])
    gate.loaded()
    statistics = data.statistics(STATISTICS_TOKENS)
    members = [make_member(name, statistics, spec) for name in spec["sites"]]
    loader = Gated(again(data.train_dataloader()), gate)
    make_trainer(spec, enable_checkpointing=False).fit(make_module(members, spec), loader)


def write_store(spec: dict[str, Any]) -> None:
    """What an earlier run leaves behind."""
    data = load_data(spec, spec["sites"])
    data.statistics(STATISTICS_TOKENS)
    for _ in data.train_dataloader():
        pass
    data.close()


def again(batches: Iterable[T]) -> Iterator[T]:
    while True:
        yield from batches
