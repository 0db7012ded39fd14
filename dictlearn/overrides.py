"""The command line against the configuration: unknown keys and choices, each with what was probably meant.

Hydra stops at the first one, with a text of its own; here all of them are found.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dictlearn.config import ConfigError

OPEN = ("objective", "logger", "evaluation.blocks", "dictionaries")  # take further entries of any name
CLOSED = ("lm", "trainer")  # built with their own keys alone
MULTIRUN = ("-m", "--multirun")


def refuse_mistakes(
    conf: Path, name: str, arguments: Sequence[str], further: Callable[[DictConfig, list[str]], list[str]]
) -> None:
    """Raise ConfigError if the command line names keys or choices that `conf/name.yaml` does not have.

    `further` finds the problems of a configuration; those of the configuration without the mistakes are listed as
    well. Does nothing where the command line has options of Hydra other than -m (--config-dir, --cfg, --help).
    """
    overrides = [argument for argument in arguments if argument not in MULTIRUN]
    if any(override.startswith("-") for override in overrides):
        return
    with initialize_config_dir(str(conf), version_base="1.3"):
        problems, right = check(conf, name, overrides)
        if not problems:
            return
        if len(overrides) == len(arguments):  # a multirun has no one configuration
            problems += further(compose(name, right), right)
    raise ConfigError(problems)


def check(conf: Path, name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is wrong with the overrides, one sentence each, and the overrides that are right.

    Call it with Hydra's config directory initialised.
    """
    parser = OverridesParser.create()
    problems: list[str] = []
    groups: list[Override] = []
    values: list[Override] = []
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            problems.append(f"{text!r} is no override, which is written key=value: {str(error).splitlines()[0]}")
            continue
        (groups if (conf / parsed.key_or_group).is_dir() else values).append(parsed)
    good = [override for override in groups if _collect(problems, _choice_problem(conf, override))]
    fixed = [override for override in good if not override.is_sweep_override() and not override.is_delete()]
    known = compose(name, [str(override.input_line) for override in fixed])
    good += [override for override in values if _collect(problems, _key_problem(conf, known, override))]
    return problems, [str(override.input_line) for override in good]


def _collect(problems: list[str], problem: str | None) -> bool:
    """Whether there is none."""
    if problem is not None:
        problems.append(problem)
    return problem is None


def _choice_problem(conf: Path, override: Override) -> str | None:
    choices = sorted(path.stem for path in (conf / override.key_or_group).glob("*.yaml"))
    if override.key_or_group.startswith("hydra/") or override.is_delete():
        return None
    value = override.value()
    chosen = list(override.sweep_iterator()) if override.is_sweep_override() else [value]
    unknown = ["null" if c is None else str(c) for c in chosen if not isinstance(c, list) and str(c) not in choices]
    if not unknown:
        return None
    return f"{override.key_or_group}={unknown[0]}: the choices are {', '.join(choices)}{_hint(unknown[0], choices)}"


def _key_problem(conf: Path, known: DictConfig, override: Override) -> str | None:
    """None where the key exists, or is added to a node that passes on or collects what it is given."""
    key = override.key_or_group
    if key.split(".")[0] == "hydra":
        return None
    keys = list(_keys(known))
    if key in keys:
        return None
    parent, _, own = key.rpartition(".")
    if override.is_add() or override.is_force_add():
        if any(key.startswith(f"{node}.") for node in OPEN) or (_passes_on(known, parent) and parent not in CLOSED):
            return None
        return f"{key} is read by nothing{_hint(key, keys)}"
    groups = [path.name for path in conf.iterdir() if path.is_dir()]
    start, _, rest = key.partition(".")
    if start == "dictionaries" and rest.count(".") > 1:  # a part of a shared node
        dictionary, _, shared = rest.partition(".")
        meant = f"dictionaries.{dictionary}.set={{{shared.removeprefix('set.').removeprefix('module.')}:...}}"
        return f"there is no key {key!r}: for one dictionary alone write '{meant}'"
    add = f" (to add an argument: +{key}=...)" if _passes_on(known, parent) and parent not in CLOSED else ""
    same_end = [k for k in keys if k.rpartition(".")[2] == own]
    hint = f": did you mean {' or '.join(same_end[:3])}?" if same_end else _hint(key, keys + groups)
    return f"there is no key {key!r}{hint}{add}"


def _passes_on(cfg: DictConfig, key: str) -> bool:
    """Whether the node is built with all that stands in it."""
    node = OmegaConf.select(cfg, key, throw_on_resolution_failure=False, throw_on_missing=False) if key else None
    return isinstance(node, DictConfig) and "_target_" in node


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """All paths that can be overridden: those behind an interpolation belong to the node it points to."""
    for key in cfg:
        path = f"{prefix}{key}"
        yield path
        if OmegaConf.is_interpolation(cfg, str(key)) or OmegaConf.is_missing(cfg, str(key)):
            continue
        node: Any = cfg[key]
        if isinstance(node, DictConfig):
            yield from _keys(node, f"{path}.")


def _hint(wrong: str, choices: Sequence[str]) -> str:
    meant = [choice for choice in dict.fromkeys(choices) if not choice.endswith("_")]  # no _target_
    close = difflib.get_close_matches(wrong, meant, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""
