"""Configuration: the rules that need no LM, and one error that lists all problems."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from dictlearn.choices import ACCELERATORS, DTYPES, NORMALISE, PRECISIONS, STREAMS, is_count, is_subspace
from dictlearn.types import DictlearnError

T = TypeVar("T")
AT_LEAST = {"n_tokens": 1, "batch_size": 1, "statistics_n_tokens": 1, "seed": 0}
WHOLE = ("lm", "data", "trainer", "evaluation", "dictionaries", "sparsifier", "optimizer", "schedule", "objective")


class ConfigError(DictlearnError):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        lines = "\n".join(f"  - {end_sentence(problem)}" for problem in self.problems)
        super().__init__(f"The configuration has {len(self.problems)} problem(s):\n{lines}")


def end_sentence(text: str) -> str:
    return text if text.endswith(("?", "!", ".", ")")) else f"{text}."


def collect(problems: list[str], attempt: Callable[[], T]) -> T | None:
    """What `attempt` returns; None where it raises a DictlearnError, whose text joins `problems`."""
    try:
        return attempt()
    except ConfigError as error:
        problems += error.problems
    except DictlearnError as error:
        problems.append(str(error))
    return None


def check_references(cfg: DictConfig) -> None:
    """Raise ConfigError where a value refers, as `${other}`, to something that is not there."""
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        return  # said of the missing value
    except OmegaConfBaseException as error:
        raise ConfigError([f"{error.full_key}: {str(error).splitlines()[0]}"]) from error


def missing(cfg: DictConfig) -> list[str]:
    """Required values that are not given, one sentence each."""
    try:
        absent = OmegaConf.missing_keys(cfg)
    except InterpolationToMissingValueError:  # another value is made of one of them
        absent = {str(key) for key in cfg if OmegaConf.is_missing(cfg, key)}
    return [f"{key} is required: give {key}=<value>" for key in sorted(absent)]


def value_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the plain values of a training configuration, one sentence each."""
    if broken := [key for key in WHOLE if not OmegaConf.is_missing(cfg, key) and not _is_node(cfg, key)]:
        return [
            f"{key} must be a group of settings, such as the choices in conf/{key}, got {cfg[key]!r}"
            for key in broken
        ]
    problems = [
        f"{key} must be a whole number of at least {least}, got {cfg[key]!r}{_whole(cfg[key])}"
        for key, least in AT_LEAST.items()
        if not is_count(cfg[key], least)
    ]
    problems += dictionary_problems(cfg)
    if (micro := cfg.micro_batch_size) is not None and not is_count(micro, 1):
        problems.append(f"micro_batch_size must be null or a whole number above 0, got {micro!r}{_whole(micro)}")
    elif micro is not None and is_count(cfg.batch_size, 1) and micro > cfg.batch_size:
        problems.append(f"micro_batch_size must be at most batch_size = {cfg.batch_size}, got {micro}")
    if is_count(cfg.seed, 2**32):
        problems.append(f"seed must be below 2^32, got {cfg.seed}")
    choices = {
        "stream": (cfg.stream, STREAMS),
        "trainer.precision": (cfg.trainer.precision, PRECISIONS),
        "trainer.accelerator": (cfg.trainer.accelerator, ACCELERATORS),
        "lm.dtype": (cfg.lm.dtype, (None, *DTYPES)),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            names = ", ".join("null" if name is None else name for name in allowed)
            problems.append(f"{key} must be one of {names}, got {value!r}")
    if cfg.site is not None and cfg.sites is not None:
        problems.append("site and sites cannot both be given: sites=[...] lists all of them")
    for key in ("plan", "trainer.deterministic"):
        if not isinstance(value := OmegaConf.select(cfg, key), bool):
            problems.append(f"{key} must be true or false, got {value!r}")
    if (devices := cfg.trainer.devices) not in (1, "1", [0]):
        problems.append(f"trainer.devices must be 1: training on several devices is not supported, got {devices!r}")
    return problems + evaluation_problems(cfg.evaluation)


def dictionary_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the plain values that each dictionary may have for itself, one sentence each."""
    problems = []
    if not is_count(cfg.expansion, 1):
        value = cfg.expansion
        problems.append(f"expansion must be a whole number of at least 1, got {value!r}{_whole(value)}")
    if cfg.normalise not in NORMALISE:
        problems.append(f"normalise must be one of {', '.join(NORMALISE)}, got {cfg.normalise!r}")
    if cfg.dead_after_tokens is not None and not is_count(cfg.dead_after_tokens, 1):
        problems.append(f"dead_after_tokens must be null or a whole number above 0, got {cfg.dead_after_tokens!r}")
    if not is_subspace(cfg.init_subspace):
        problems.append(
            "init_subspace must be auto, null, a share of the variance above 0 and below 1, or a whole number of "
            f"dimensions, got {cfg.init_subspace!r}"
        )
    return problems


def evaluation_problems(evaluation: DictConfig) -> list[str]:
    """What is wrong with the plain values of conf/evaluation, one sentence each."""
    counts = {f"evaluation.{key}": evaluation.get(key) for key in ("n_tokens", "batch_rows")}
    return [
        f"{key} must be a whole number of at least 1, got {value!r}{_whole(value)}"
        for key, value in counts.items()
        if not is_count(value, 1)
    ]


def unused_overrides(cfg: DictConfig, overrides: Iterable[str]) -> list[str]:
    """Overrides of `site`, `sites` or `dictionary` that no dictionary of the experiment uses."""
    raw = OmegaConf.to_container(cfg.dictionaries, resolve=False)
    if "${dictionary}" in str(raw):  # the one of experiment=single
        return []
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    return [
        f"{key} has no effect on this experiment, whose dictionaries are {', '.join(map(str, cfg.dictionaries))}: "
        f"add experiment=single"
        for key in keys
        if key in ("site", "sites") or key.split(".")[0] == "dictionary"
    ]


def build(node: Any, **arguments: Any) -> Any:
    """Hydra's `instantiate`, with a user error of ours as it is, and a wrong argument as a user error."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, DictlearnError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError | ImportError):
            raise DictlearnError(f"{_target(node)}: {error.__cause__}") from error
        reason = str(error).splitlines()[0]
        raise DictlearnError(f"Cannot build {_target(node)}: {error.__cause__ or reason}") from error
    except (OmegaConfBaseException, TypeError) as error:  # Hydra's own keys, such as _partial_
        raise DictlearnError(f"Cannot build {_target(node)}: {str(error).splitlines()[0]}") from error


def values_at(cfg: DictConfig, values: Mapping[str, Any], where: str) -> DictConfig:
    """A copy of `cfg` with single values changed, `{"sparsifier.k": 32}`; what refers to them follows.

    Raises ConfigError for keys that do not exist or are whole groups; `where` names the setting.
    """
    changed = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    assert isinstance(changed, DictConfig)
    problems = []
    for key, value in values.items():
        node = OmegaConf.select(cfg, key, default=_ABSENT)
        if node is _ABSENT:
            problems.append(f"{where}: there is no key {key!r}{hint(key, keys_of(cfg))}")
        elif (shared := _shared_parent(cfg, key)) is not None:
            problems.append(f"{where}: {key} belongs to {shared}, which several dictionaries share: vary that")
        elif isinstance(node, DictConfig):
            problems.append(
                f"{where}: {key} is a group, and only single values such as sparsifier.k can stand here: "
                f"a sweep over groups is 'train.py -m {key}=A,B'"
            )
        else:
            OmegaConf.update(changed, key, value, merge=False)
    if problems:
        raise ConfigError(problems)
    return changed


def _shared_parent(cfg: DictConfig, key: str) -> str | None:
    """Where the node lies that an interpolation on the way to `key` points to."""
    parts = key.split(".")
    for n in range(1, len(parts)):
        parent = OmegaConf.select(cfg, ".".join(parts[: n - 1])) if n > 1 else cfg
        if isinstance(parent, DictConfig) and OmegaConf.is_interpolation(parent, parts[n - 1]):
            return ".".join([str(parent._get_node(parts[n - 1])._value())[2:-1], *parts[n:]])  # type: ignore[union-attr]
    return None


_ABSENT = object()


def plain(value: Any) -> Any:
    """Lists and dicts of plain values, interpolations resolved."""
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def _is_node(cfg: DictConfig, key: str) -> bool:
    return isinstance(cfg.get(key), DictConfig)


def _target(node: Any) -> str:
    return str(node.get("_target_", "the configuration") if isinstance(node, Mapping | DictConfig) else node)


def _whole(value: Any) -> str:
    """A way to write a whole float."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f": write {int(value):_}"
    return ""


def keys_of(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """All paths that can be overridden: those behind an interpolation belong to the node it points to."""
    for key in cfg:
        path = f"{prefix}{key}"
        yield path
        if OmegaConf.is_interpolation(cfg, str(key)) or OmegaConf.is_missing(cfg, str(key)):
            continue
        node: Any = cfg[key]
        if isinstance(node, DictConfig):
            yield from keys_of(node, f"{path}.")


def hint(wrong: str, choices: Iterable[str]) -> str:
    """ ": did you mean a or b?", or nothing."""
    meant = [choice for choice in dict.fromkeys(choices) if not choice.endswith("_")]  # no _target_
    close = difflib.get_close_matches(wrong, meant, n=3, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ""
