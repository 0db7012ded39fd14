"""Evaluate dictionaries: run every block, write one report per dictionary, keep what was computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dictlearn.evaluation.context import EvaluationBlock, EvaluationContext, Sections
from dictlearn.evaluation.published import l0_warnings
from dictlearn.evaluation.report import new_report, without_nan, write_report, write_table

log = logging.getLogger(__name__)


class Results(NamedTuple):
    """Reports by dictionary name; `errors` says what failed, one line each, and is empty when nothing did."""

    reports: dict[str, dict[str, Any]]

    @property
    def errors(self) -> list[str]:
        return [f"{name}: {error}" for name, report in self.reports.items() for error in report["errors"]]


def evaluate(
    context: EvaluationContext, blocks: Mapping[str, EvaluationBlock], out_dir_of: Mapping[str, Path]
) -> Results:
    """Run `blocks` in order and write `report.json` into each dictionary's folder after every one, and the tables
    of a block as `<table>.parquet` beside it. What was there is replaced.

    A block that fails is recorded under `errors` of the reports and the others still run; the caller should exit
    non-zero when `Results.errors` is not empty.

    Raises DictlearnError, before anything runs, where a dictionary does not fit the LM or the norm filter leaves no
    token.
    """
    context.check_widths()
    reports = {name: new_report(context, name) for name in context.dictionaries}
    for block_name, block in blocks.items():
        started = time.perf_counter()
        sections, errors = _run_block(block_name, block, context)
        seconds = time.perf_counter() - started
        for name, report in reports.items():
            _add(report, sections.get(name, {}), [errors[name]] if name in errors else [])
            report["compute"]["seconds"] += seconds
            report["compute"]["seconds_by_block"][block_name] = seconds
            for table_name, table in sections.get(name, {}).get("tables", {}).items():
                write_table(table, out_dir_of[name] / f"{table_name}.parquet")
            write_report(report, out_dir_of[name])
    for name, report in reports.items():
        if found := l0_warnings(report):
            report["warnings"] += found
            write_report(report, out_dir_of[name])
    return Results(reports)


def _run_block(
    block_name: str, block: EvaluationBlock, context: EvaluationContext
) -> tuple[dict[str, Sections], dict[str, str]]:
    """Sections and errors by dictionary name.

    When a block fails for several dictionaries together it runs again for each alone, so that one broken
    dictionary does not cost the others their numbers.
    """
    try:
        return block.run(context), {}
    except Exception as error:
        together = f"{type(error).__name__}: {error}"
        log.exception("evaluation block %s failed for %s", block_name, ", ".join(context.dictionaries))
        if len(context.dictionaries) == 1:
            return {}, {name: f"{block_name}: {type(error).__name__}: {error}" for name in context.dictionaries}
    sections: dict[str, Sections] = {}
    errors: dict[str, str] = {}
    for name, dictionary in context.dictionaries.items():
        own_sections, own_errors = _run_block(block_name, block, replace(context, dictionaries={name: dictionary}))
        sections |= own_sections
        errors |= own_errors
    for own in sections.values():
        alone = f"{block_name} ran for each dictionary alone, because together it failed: {together}"
        own["warnings"] = [*own.get("warnings", []), alone]
    return sections, errors


def _add(report: dict[str, Any], sections: Sections, errors: list[str]) -> None:
    """Add the sections to the report; `warnings` and `errors` stay last."""
    warnings = [*report.pop("warnings"), *sections.get("warnings", [])]
    errors = [*report.pop("errors"), *errors]
    for title, section in sections.items():
        if title not in ("warnings", "tables"):
            report[title], found = without_nan(section, title)
            warnings += found
    report |= {"warnings": warnings, "errors": errors}
