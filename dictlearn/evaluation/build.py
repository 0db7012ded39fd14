"""Objects of a configuration by name, such as its evaluation blocks."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dictlearn.config import ConfigError, build, collect
from dictlearn.evaluation.context import EvaluationBlock
from dictlearn.types import DictlearnError


def build_blocks(evaluation: DictConfig) -> dict[str, EvaluationBlock]:
    """The blocks of `evaluation.blocks` by name, in their order. Raises like `build_named`."""
    return build_named(evaluation.get("blocks"), "evaluation.blocks", EvaluationBlock, "has no run(context)")


def build_named(nodes: Any, key: str, kind: type, lacks: str) -> dict[str, Any]:
    """What the mapping `nodes`, at `key` of the configuration, builds, by name, in its order.

    Raises ConfigError with one sentence for every one that is not a mapping with a `_target_` that builds a `kind`;
    `lacks` says of another object why it is none.
    """
    if not isinstance(nodes, DictConfig):
        raise ConfigError([f"{key} must name its {key.rpartition('.')[2]}, got {nodes!r}"])
    problems: list[str] = []
    built = {str(name): collect(problems, lambda n=name: _one(nodes, key, str(n), kind, lacks)) for name in nodes}
    if problems:
        raise ConfigError(problems)
    return {name: one for name, one in built.items() if one is not None}


def _one(nodes: DictConfig, parent: str, name: str, kind: type, lacks: str) -> Any:
    """Raises DictlearnError that starts with the object's key."""
    key = f"{parent}.{name}"
    try:
        node: Any = nodes[name]
        target = node.get("_target_") if isinstance(node, DictConfig) else None
    except OmegaConfBaseException as error:
        raise DictlearnError(f"{key}: {str(error).splitlines()[0]}") from error
    if not isinstance(target, str):
        raise DictlearnError(f"{key}: must be a mapping with a _target_ (leave it out with ~{key}), got {node}")
    try:
        one = build(node)
    except DictlearnError as error:
        raise DictlearnError(f"{key}: {' '.join(str(error).splitlines())}") from error
    if not isinstance(one, kind):
        raise DictlearnError(f"{key}: {target} builds a {type(one).__name__}, which {lacks}")
    return one
