"""The evaluation report of one dictionary: `report.json`, strict JSON, written atomically.

A number that is not defined is null with an entry under `warnings`, never NaN and never a stand-in like -1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import dictlearn
from dictlearn.evaluation.context import EvaluationContext
from dictlearn.registry import kind_of

SCHEMA_VERSION = 1
NUMBERS = re.compile(
    r"\[\n(?:null|[\d\s.,eE+-])*\]"
)  # a list of numbers or nulls in indented JSON: goes on one line
PACKAGES = ("torch", "transformers", "torchmetrics")


def new_report(context: EvaluationContext, name: str) -> dict[str, Any]:
    """The report of dictionary `name` before any block has run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"name": "dictlearn", "version": dictlearn.__version__},
        "dictionary": dictionary_section(context, name),
        "lm": lm_section(context),
        "data": data_section(context, name),
        "compute": compute_section(context),
        "warnings": list(context.warnings.get(name, [])),
        "errors": [],
    }


def dictionary_section(context: EvaluationContext, name: str) -> dict[str, Any]:
    d = context.dictionaries[name]
    file = context.weight_files.get(name)
    return {
        "name": name,
        "kind": kind_of(d),
        "reads": list(d.reads),
        "writes": list(d.writes),
        "d_in": d.d_in,
        "d_out": d.d_out,
        "n_latents": d.n_latents,
        "skip": d.W_skip is not None,
        "sparsifier": {"kind": d.sparsifier.kind, **d.sparsifier.config()},
        "sha256": sha256(file) if file else None,
        "metadata": dict(d.metadata),
    }


def lm_section(context: EvaluationContext) -> dict[str, Any]:
    lm = context.lm
    return {
        "name": lm.name,
        "revision": lm.revision,
        "dtype": lm.dtype,
        "attn_implementation": lm.model.config._attn_implementation,
    }


def data_section(context: EvaluationContext, name: str) -> dict[str, Any]:
    """`n_masked` tokens are neither measured nor replaced: special tokens, a first position without BOS, and
    `n_norm_filtered` tokens whose norm at one of this dictionary's sites is above `max_norm_ratio` x the median.
    """
    n_rows, ctx = context.tokens.shape
    n_counted = int(context.masks[context.mask_key(name)].sum())
    return {
        **context.data,
        "n_rows": n_rows,
        "ctx": ctx,
        "n_tokens": n_rows * ctx,
        "n_counted": n_counted,
        "n_masked": n_rows * ctx - n_counted,
        "max_norm_ratio": context.max_norm_ratio,
        "n_norm_filtered": int(context.mask.sum()) - n_counted,
    }


def compute_section(context: EvaluationContext) -> dict[str, Any]:
    """`seconds`, by block and in all, are those of all dictionaries evaluated together."""
    device = context.lm.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "gpu": gpu,
        "batch_rows": context.batch_rows,
        "n_dictionaries": len(context.dictionaries),
        "n_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seconds": 0.0,
        "seconds_by_block": {},
    }


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def without_nan(section: Any, path: str) -> tuple[Any, list[str]]:
    """`section` with None for every number that is not finite, and one warning for each, naming its `path`."""
    if isinstance(section, float) and not math.isfinite(section):
        return None, [f"{path} is null: its value is {section}"]
    if isinstance(section, Mapping):
        parts = {key: without_nan(value, f"{path}.{key}") for key, value in section.items()}
        return {key: part for key, (part, _) in parts.items()}, [w for _, ws in parts.values() for w in ws]
    if isinstance(section, list | tuple):
        items = [without_nan(value, f"{path}[{i}]") for i, value in enumerate(section)]
        return [item for item, _ in items], [w for _, ws in items for w in ws]
    return section, []


def value_at(report: Mapping[str, Any], path: str) -> Any:
    """What a report has at a dotted path, `sparsity.l0.mean`; None where there is nothing."""
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/report.json`; a reader sees the old file or the new one, never a part.

    Raises ValueError where a number is not finite.
    """
    text = json.dumps(report, indent=2, allow_nan=False)
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n"
    return write_whole(folder / "report.json", lambda file: file.write_text(text))


def write_table(table: pd.DataFrame, file: Path) -> Path:
    """Write a table as parquet, whole or not at all; missing values are null."""
    return write_whole(file, lambda partial: table.to_parquet(partial, index=False))


def write_whole(file: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a file beside `file`, then put it in its place; make the folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file
