"""Whether a dictionary has the L0 that it should: that of its release, or the target of its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dictlearn.choices import is_number
from dictlearn.evaluation.report import value_at

FAR = 2.0  # times the published L0, or less than it over this
OFF_TARGET = 1.5  # the same of `target_l0`
BAD_FVU = 0.5


def l0_warnings(report: Mapping[str, Any]) -> list[str]:
    """Warnings, with the likely reason, where the measured L0 is far from the published one or the target."""
    metadata, measured = report["dictionary"]["metadata"], value_at(report, "sparsity.l0.mean")
    found = []
    if _far(measured, published := metadata.get("published_l0"), FAR):
        found.append(f"L0 is {measured:.3g} here and {published:.3g} as published: {_reason(report, metadata)}")
    if _far(measured, target := _target(report), OFF_TARGET):
        more = "train longer, or with a larger sparsifier.coefficient"
        found.append(f"L0 is {measured:.3g} and sparsifier.target_l0 aims at {target:.3g}: {more}")
    return found


def _far(measured: Any, wanted: Any, factor: float) -> bool:
    if not is_number(wanted) or not is_number(measured) or wanted <= 0:
        return False
    return not wanted / factor <= measured <= wanted * factor


def _target(report: Mapping[str, Any]) -> float | None:
    """The L0 that the penalty of its training aims at, in all layers together."""
    target = value_at(report, "dictionary.metadata.trained_as.sparsifier.target_l0")
    layered = value_at(report, "dictionary.metadata.trained_as.dictionary") == "cross_layer"
    return target * len(report["dictionary"]["reads"]) if layered and is_number(target) else target


def _reason(report: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    lm, own = report["lm"]["name"], metadata.get("lm_name")
    if own is not None and own != lm and Path(own).name != Path(lm).name:
        return f"it was made for {own}, this is {lm}"
    if metadata.get("prepend_bos") is False:
        return "it was made on text without a BOS token, and here every row starts with one"
    ctx, longest = report["data"]["ctx"], metadata.get("ctx")
    if is_number(longest) and ctx > longest:
        return f"it was made on rows of {longest} tokens, these have {ctx}: give data.ctx={longest}"
    fvu = value_at(report, "reconstruction.fvu")
    if is_number(fvu) and fvu > BAD_FVU:
        return (
            f"its reconstruction is bad as well (FVU {fvu:.2f}), so its activations are others than these: another "
            "site, revision or precision of the language model"
        )
    return (
        "its reconstruction is sound, so likely the text is of another kind, or the scale of the activations or "
        "the thresholds is not that of the release"
    )
