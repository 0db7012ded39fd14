"""Whether a released dictionary does here what its release says: its L0 beside the published one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dictlearn.choices import is_number
from dictlearn.evaluation.report import value_at

FAR = 2.0  # times the published L0, or less than it over this
BAD_FVU = 0.5


def l0_warnings(report: Mapping[str, Any]) -> list[str]:
    """A warning, with the likely reason, where the measured L0 is far from the published one."""
    metadata = report["dictionary"]["metadata"]
    published, measured = metadata.get("published_l0"), value_at(report, "sparsity.l0.mean")
    if not is_number(published) or not is_number(measured) or published <= 0:
        return []
    if published / FAR <= measured <= published * FAR:
        return []
    return [f"L0 is {measured:.3g} here and {published:.3g} as published: {_reason(report, metadata)}"]


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
