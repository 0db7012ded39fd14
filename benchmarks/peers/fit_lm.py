"""The LM alone, as ours runs it up to the site: no trainer that reads it can be faster."""

from __future__ import annotations

from typing import Any

from ours import load_data


def fit(spec: dict[str, Any], gate: Any) -> None:
    data = load_data(spec, spec["sites"])
    batch_rows = spec["batch_size"] // spec["ctx"]
    rows = data.store.rows(0, data.store.n_rows // batch_rows * batch_rows)
    gate.loaded()
    while True:
        for part in rows.split(batch_rows):
            gate.step()
            data.read(part)
