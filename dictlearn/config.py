"""Configuration: the rules that need no LM, and one error that lists all problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dictlearn.types import DictlearnError

AT_LEAST = {"n_tokens": 1, "batch_size": 1, "expansion": 1, "statistics_n_tokens": 1, "seed": 0}
NORMALISE = ("mean_norm", "none")
PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("cpu", "gpu")


class ConfigError(DictlearnError):
    """All problems of a configuration, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {problem.rstrip('.')}." for problem in self.problems)
        super().__init__(f"The configuration has {len(self.problems)} problem(s):\n{lines}")


def value_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the plain values of a training configuration, one sentence each."""
    problems = [f"{key} is required: give {key}=<value>" for key in sorted(OmegaConf.missing_keys(cfg))]
    for key, least in AT_LEAST.items():
        if not _is_count(cfg[key], least):
            problems.append(f"{key} must be a whole number of at least {least}, got {cfg[key]!r}")
    if cfg.dead_after_tokens is not None and not _is_count(cfg.dead_after_tokens, 1):
        problems.append(f"dead_after_tokens must be null or a whole number above 0, got {cfg.dead_after_tokens!r}")
    if cfg.normalise not in NORMALISE:
        problems.append(f"normalise must be one of {', '.join(NORMALISE)}, got {cfg.normalise!r}")
    if _is_count(cfg.seed, 2**32):
        problems.append(f"seed must be below 2^32, got {cfg.seed}")
    if cfg.trainer.precision not in PRECISIONS:
        problems.append(f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {cfg.trainer.precision!r}")
    if cfg.trainer.accelerator not in ACCELERATORS:
        problems.append(f"trainer.accelerator must be cpu or gpu, got {cfg.trainer.accelerator!r}")
    problems += evaluation_problems(cfg.evaluation)
    devices = cfg.trainer.devices
    if devices not in (1, "1", [0]):
        problems.append(f"trainer.devices must be 1: training on several devices is not supported, got {devices!r}")
    if not cfg.get("dictionaries"):
        problems.append("dictionaries is empty: choose experiment=default or experiment=single")
    elif any(node.site is None for node in cfg.dictionaries.values()):
        problems.append("site is required: give site=..., such as resid_post.2, or mlp.2 for a transcoder")
    return problems


def evaluation_problems(evaluation: DictConfig) -> list[str]:
    """What is wrong with conf/evaluation, one sentence each."""
    counts = {f"evaluation.{key}": evaluation[key] for key in ("n_tokens", "batch_rows")}
    counts |= {
        f"evaluation.blocks.{name}.n_tokens": block.n_tokens
        for name, block in evaluation.blocks.items()
        if "n_tokens" in block
    }
    return [
        f"{key} must be a whole number of at least 1, got {value!r}"
        for key, value in counts.items()
        if not _is_count(value, 1)
    ]


def unused_overrides(cfg: DictConfig, overrides: Iterable[str]) -> list[str]:
    """Overrides of `site` or `dictionary` that no dictionary of the experiment uses."""
    raw = OmegaConf.to_container(cfg.dictionaries, resolve=False)
    if "${dictionary}" in str(raw):  # the one of experiment=single
        return []
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    return [
        f"{key} has no effect on this experiment, whose dictionaries are {', '.join(cfg.dictionaries)}: "
        f"add experiment=single"
        for key in keys
        if key == "site" or key.split(".")[0] == "dictionary"
    ]


def build(node: Any, **arguments: Any) -> Any:
    """Hydra's `instantiate`, with a user error of ours coming out as it is."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, DictlearnError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError):
            raise DictlearnError(f"{node.get('_target_')}: {error.__cause__}") from error
        raise


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
