"""Comparisons at equal L0: fewer latents cost reconstruction, so dictionaries compare at the same number alone.

Rows are measured dictionaries: each has `l0`, `fvu`, `seed`, what else is compared, and a key that says of what
kind it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

LOG = ("fvu",)  # columns that are nearly powers of L0, interpolated by their logarithm
Rows = Sequence[Mapping[str, Any]]


def at_l0(l0s: Sequence[float], values: Sequence[float], l0: float, log: bool) -> float:
    """What `values` are at `l0`, linear in log L0 between its two neighbours; NaN outside of the measured range.

    log: the logarithm of `values` is linear, not they themselves.
    """
    points = sorted((a, b) for a, b in zip(l0s, values, strict=True) if a > 0 and math.isfinite(b))
    if not points or not points[0][0] <= l0 <= points[-1][0]:
        return math.nan
    x, y = np.log([a for a, _ in points]), np.array([b for _, b in points])
    found = float(np.interp(math.log(l0), x, np.log(y) if log else y))
    return math.exp(found) if log else found


def by_seed(rows: Rows, name: str, l0: float, column: str, key: str = "architecture") -> dict[int, float]:
    """`column` of the rows whose `key` is `name`, at `l0`, by seed, without seeds that do not reach it."""
    own = [row for row in rows if row[key] == name]
    found = {}
    for seed in dict.fromkeys(row["seed"] for row in own):
        points = [row for row in own if row["seed"] == seed]
        values = [row[column] for row in points]
        found[seed] = at_l0([row["l0"] for row in points], values, l0, column in LOG)
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def stderr(values: Sequence[float]) -> float:
    """The standard error of the mean; NaN of fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def at_equal_l0(
    rows: Rows, l0s: Sequence[float], columns: Sequence[str], key: str = "architecture"
) -> list[dict[str, Any]]:
    """For each value of `key` and each L0 that a seed reaches: means over seeds and their standard errors."""
    found = []
    for name in dict.fromkeys(row[key] for row in rows):
        for l0 in l0s:
            values = {column: list(by_seed(rows, name, l0, column, key).values()) for column in columns}
            if not values[columns[0]]:
                continue
            means = {column: fmean(own) for column, own in values.items() if own}
            errors = {f"{column}_stderr": stderr(own) for column, own in values.items()}
            found.append({key: name, "l0": l0, "n_seeds": len(values[columns[0]]), **means, **errors})
    return found


def ratio(rows: Rows, a: str, b: str, l0: float, key: str = "architecture") -> dict[str, Any]:
    """FVU of `a` over that of `b` at equal L0: the geometric mean over the seeds that both reach, and its error.

    The seeds are paired: of one seed both have seen the same activations.
    """
    first, second = (by_seed(rows, name, l0, "fvu", key) for name in (a, b))
    logs = [math.log(first[seed] / second[seed]) for seed in first if seed in second]
    mean = math.exp(fmean(logs)) if logs else math.nan
    return {"a": a, "b": b, "l0": l0, "ratio": mean, "stderr": mean * stderr(logs), "n_seeds": len(logs)}


def holds(result: Mapping[str, Any]) -> bool:
    """Whether a `ratio` is at most 1, within its standard error."""
    error = result["stderr"]
    return bool(result["ratio"] <= 1 + (0.0 if math.isnan(error) else error))


def write_json(report: Any, file: Path) -> None:
    """What is not a number becomes null."""
    file.write_text(json.dumps(_without_nan(report), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def with_error(mean: float, error: float, digits: int = 4) -> str:
    """ "0.1234 ± 0.0005"; the error is left out where there is none."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
