"""The evaluation blocks of a configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dictlearn.config import ConfigError, build, collect
from dictlearn.evaluation.context import EvaluationBlock
from dictlearn.types import DictlearnError


def build_blocks(evaluation: DictConfig) -> dict[str, EvaluationBlock]:
    """The blocks of `evaluation.blocks` by name, in their order.

    Raises ConfigError with one sentence for every one that is not a mapping with a `_target_` that builds an object
    with `run(context)`.
    """
    blocks = evaluation.get("blocks")
    if not isinstance(blocks, DictConfig):
        raise ConfigError([f"evaluation.blocks must name its blocks, got {blocks!r}"])
    problems: list[str] = []
    built = {str(name): collect(problems, lambda n=name: _block(blocks, str(n))) for name in blocks}
    if problems:
        raise ConfigError(problems)
    return {name: block for name, block in built.items() if block is not None}


def _block(blocks: DictConfig, name: str) -> EvaluationBlock:
    """Raises DictlearnError that starts with the block's key."""
    key = f"evaluation.blocks.{name}"
    try:
        node: Any = blocks[name]
        target = node.get("_target_") if isinstance(node, DictConfig) else None
    except OmegaConfBaseException as error:
        raise DictlearnError(f"{key}: {str(error).splitlines()[0]}") from error
    if not isinstance(target, str):
        raise DictlearnError(
            f"{key}: must be a mapping with a _target_ (leave the block out with ~{key}), got {node}"
        )
    try:
        block = build(node)
    except DictlearnError as error:
        raise DictlearnError(f"{key}: {' '.join(str(error).splitlines())}") from error
    if not isinstance(block, EvaluationBlock):
        raise DictlearnError(f"{key}: {target} builds a {type(block).__name__}, which has no run(context)")
    return block
