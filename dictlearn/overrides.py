"""The command line against the configuration: unknown keys and choices, each with what was probably meant.

Hydra stops at the first one, with a text of its own; here all of them are found.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dictlearn.config import ConfigError, check_references, collect, hint, keys_of
from dictlearn.types import DictlearnError

OPEN = ("objective", "logger", "evaluation.blocks", "dictionaries")  # take further entries of any name
CLOSED = ("lm", "trainer")  # built with their own keys alone
MULTIRUN = ("-m", "--multirun")
TEXTS = ("graph",)  # keys whose value is any text, with commas, quotes and brackets as they are
QUOTED_TEXT = r"""("(\\.|[^"\\])*"|'(\\.|[^'\\])*')"""
QUOTED_TEXTS = re.compile(rf"\s*{QUOTED_TEXT}\s*(,\s*{QUOTED_TEXT}\s*)*", re.DOTALL)


def enter(
    conf: Path, name: str, main: Callable[[], Any], further: Callable[[DictConfig, list[str], int | None], None]
) -> None:
    """What a door does: `main`, Hydra's, unless the command line has mistakes; errors for users are their text.

    `further(cfg, overrides, job)` raises DictlearnError for what else is wrong with a run, or a job of a sweep.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra passes errors on, to be shown here
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: tensors on the CPU in huge pages, a sixth faster
    is_sweep = any(argument in MULTIRUN for argument in sys.argv[1:])
    sys.argv[1:] = [quoted(argument, is_sweep) for argument in sys.argv[1:]]
    try:
        refuse_mistakes(conf, name, sys.argv[1:], further)
        main()
    except DictlearnError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted before anything was computed.")


def quoted(argument: str, is_sweep: bool = False) -> str:
    """An override of one of `TEXTS` with its value in quotes for Hydra; as it is where that is null, or in a sweep
    a list of texts in quotes: key='"one","two"'.
    """
    key, _, value = argument.partition("=")
    if key not in TEXTS or value in ("", "null") or (is_sweep and QUOTED_TEXTS.fullmatch(value)):
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no reference to another key
    return f"{key}={QuotedString(text, Quote.double).with_quotes()}"


def refuse_mistakes(
    conf: Path,
    name: str,
    arguments: Sequence[str],
    further: Callable[[DictConfig, list[str], int | None], None],
) -> None:
    """Raise ConfigError if the command line names keys or choices that `conf/name.yaml` does not have.

    Then what `further` finds in the configuration without the mistakes is listed as well. Of a sweep (-m), every
    job is looked at before the first one starts. Does nothing where the command line has options of Hydra other
    than -m (--config-dir, --cfg, --help).
    """
    overrides = [argument for argument in arguments if argument not in MULTIRUN]
    if any(override.startswith("-") for override in overrides):
        return
    multirun = len(overrides) < len(arguments)
    with initialize_config_dir(str(conf), version_base="1.3"):
        problems, right = check(conf, name, overrides, multirun)
        if multirun:
            own_sweeper = any(override.startswith(("hydra/sweeper=", "hydra.sweeper")) for override in right)
            problems += [] if problems or own_sweeper else _job_problems(name, right, further)
        elif (cfg := _composed(name, right, problems)) is not None and problems:
            collect(problems, lambda: further(cfg, right, None))
    if problems:
        raise ConfigError(problems)


def check(conf: Path, name: str, overrides: Sequence[str], multirun: bool = False) -> tuple[list[str], list[str]]:
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
            problems.append(
                f"{text!r} is no override, which is written key=value, in quotes where the value has brackets, "
                f"braces, stars or spaces: {str(error).splitlines()[0]}"
            )
            continue
        (groups if (conf / parsed.key_or_group).is_dir() else values).append(parsed)
    good = [override for override in groups if _collect(problems, _choice_problem(conf, override))]
    fixed = [override for override in good if not override.is_sweep_override()]
    known = _composed(name, [str(override.input_line) for override in fixed], problems)
    if known is None:
        return problems, []
    good += [override for override in values if _collect(problems, _key_problem(conf, known, override))]
    right = [o for o in good if multirun or _collect(problems, _sweep_problem(o))]
    return problems, [str(override.input_line) for override in right]


def _composed(name: str, overrides: list[str], problems: list[str]) -> DictConfig | None:
    """The configuration, with all that it refers to; None, and a problem more, where Hydra cannot make it."""
    try:
        cfg = compose(name, overrides)
        check_references(cfg)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        problems.append(" ".join(str(error).split()))
        return None
    except ConfigError as error:
        problems += error.problems
        return None
    return cfg


def _job_problems(
    name: str, overrides: Sequence[str], further: Callable[[DictConfig, list[str], int | None], None]
) -> list[str]:
    """Of every job of a sweep, each with the values that it is the first to have the problem at."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    varied = [override for override in parsed if override.is_sweep_override()]
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        for override in varied
    ]
    fixed = [str(override.input_line) for override in parsed if override not in varied]
    jobs = list(itertools.product(*choices))
    first: dict[str, tuple[str, ...]] = {}
    times: Counter[str] = Counter()
    for job, chosen in enumerate(jobs):
        problems: list[str] = []
        if (cfg := _composed(name, [*fixed, *chosen], problems)) is not None:
            collect(problems, lambda c=cfg, o=[*fixed, *chosen], j=job: further(c, o, j))
        times.update(dict.fromkeys(problems, 1))
        for problem in problems:
            first.setdefault(problem, chosen)
    return [text if times[text] == len(jobs) else f"{' '.join(at)}: {text}" for text, at in first.items()]


def _collect(problems: list[str], problem: str | None) -> bool:
    """Whether there is none."""
    if problem is not None:
        problems.append(problem)
    return problem is None


def _sweep_problem(override: Override) -> str | None:
    if not override.is_sweep_override():
        return None
    key, _, several = str(override.input_line).partition("=")
    return f"{key}={several} is several values: add -m for a run with each of them, or write a list, {key}=[...]"


def _choice_problem(conf: Path, override: Override) -> str | None:
    choices = sorted(path.stem for path in (conf / override.key_or_group).glob("*.yaml"))
    if override.key_or_group.startswith("hydra/"):
        return None
    if override.is_delete():
        return f"{override.key_or_group} cannot be left out: the choices are {', '.join(choices)}"
    value = override.value()
    chosen = list(override.sweep_iterator()) if override.is_sweep_override() else [value]
    unknown = ["null" if c is None else str(c) for c in chosen if not isinstance(c, list) and str(c) not in choices]
    if not unknown:
        return None
    return f"{override.key_or_group}={unknown[0]}: the choices are {', '.join(choices)}{hint(unknown[0], choices)}"


def _key_problem(conf: Path, known: DictConfig, override: Override) -> str | None:
    """None where the key exists, or is added to a node that passes on or collects what it is given."""
    key = override.key_or_group
    if key.split(".")[0] == "hydra":
        return None
    keys = list(keys_of(known))
    is_open = any(key.startswith(f"{node}.") for node in OPEN)
    if key in keys:
        if override.is_delete() and not is_open:
            return f"{key} cannot be left out: only entries of {', '.join(OPEN)} can"
        added = override.is_add() and not isinstance(override.value(), dict | list)
        return f"+{key} adds a key, and there is one already: write {key}=..." if added else None
    parent, _, own = key.rpartition(".")
    if override.is_add() or override.is_force_add():
        if is_open or (_passes_on(known, parent) and parent not in CLOSED):
            return None
        return f"{key} is read by nothing{hint(key, keys)}"
    groups = [path.name for path in conf.iterdir() if path.is_dir()]
    start, _, rest = key.partition(".")
    if start == "dictionaries" and rest.count(".") > 1:  # a part of a shared node
        dictionary, _, shared = rest.partition(".")
        meant = f"dictionaries.{dictionary}.set={{{shared.removeprefix('set.').removeprefix('module.')}:...}}"
        return f"there is no key {key!r}: for one dictionary alone write '{meant}'"
    if _passes_on(known, parent) and parent not in CLOSED:
        there = [str(k) for k in OmegaConf.select(known, parent) if not str(k).startswith("_")]
        meant = hint(own, there) or f": it has {', '.join(there) or 'none'}"
        how = f" (to add an argument: +{key}=...)" if _takes(known, parent, own) else ""
        return f"there is no key {key!r} in {_target_name(known, parent)}{meant}{how}"
    same_end = [k for k in keys if k.rpartition(".")[2] == own]
    meant = f": did you mean {' or '.join(same_end[:3])}?" if same_end else hint(key, keys + groups)
    return f"there is no key {key!r}{meant}"


def _target_name(cfg: DictConfig, key: str) -> str:
    return str(OmegaConf.select(cfg, key)["_target_"]).rpartition(".")[2]


def _takes(cfg: DictConfig, key: str, argument: str) -> bool:
    """Whether what the node is built with has such an argument, or any."""
    parameters = inspect.signature(get_object(OmegaConf.select(cfg, key)["_target_"])).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _passes_on(cfg: DictConfig, key: str) -> bool:
    """Whether the node is built with all that stands in it."""
    node = OmegaConf.select(cfg, key, throw_on_resolution_failure=False, throw_on_missing=False) if key else None
    return isinstance(node, DictConfig) and "_target_" in node
