"""What can be done to latents: set, scale, ablate, steer; at which positions."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, SupportsIndex, TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dictlearn.choices import is_count
from dictlearn.types import DictlearnError

Amount: TypeAlias = int | float | Tensor  # of shape [], [n_latents], or [rows or 1, ctx or 1, n_latents or 1]
Positions: TypeAlias = slice | Sequence[int] | Tensor | None


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """Other values of some latents of a dictionary, in the latents' own units.

    With an `input_norm` these are the units of the normalised token; `for_inference()` and `dictlearn.load` give
    latents in units of raw activations elsewhere. A further kind is a subclass with `__call__` alone.

    Args:
        latents: one index or several.
        positions: columns of the prompt, from 0, padding included: a slice (`slice(5, None)`: from there on, tokens
            that are generated included), indices, or a mask `[rows, ctx]` (or `[1, ctx]`), which reach no generated
            token; where several sequences are generated from each row, its mask is that of all of them. None:
            everywhere.

    Raises DictlearnError for latents or positions of another kind, negative, or named twice, and for amounts that
    are no finite numbers.
    """

    latents: SupportsIndex | Sequence[SupportsIndex] | Tensor
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if len(set(self.indices)) < len(self.indices):
            raise DictlearnError(f"latents must be named once in an intervention, got {self.indices}.")
        for own in fields(self):
            if own.type in ("Amount", Amount):
                check_amount(own.name, getattr(self, own.name))
        at = self.positions
        if isinstance(at, slice):
            _whole_numbers("positions", [bound for bound in (at.start, at.stop) if bound is not None])
            if at.step is not None and not is_count(at.step, 1):
                raise DictlearnError(f"positions must go forward, by a step of at least 1, got {at}.")
        elif _is_mask(at):
            if at.ndim != 2:
                raise DictlearnError(f"positions as a mask must be [rows, ctx], got {list(at.shape)}.")
        elif at is not None:
            _whole_numbers("positions", at)

    @property
    def indices(self) -> list[int]:
        """Of the latents."""
        is_one = isinstance(self.latents, SupportsIndex) and not getattr(self.latents, "ndim", 0)
        return _whole_numbers("latents", [self.latents] if is_one else self.latents)

    @abstractmethod
    def __call__(self, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
        """The new values of the latents, from those they have, at all positions."""


@dataclass(frozen=True, eq=False)
class Set(Intervention):
    """The latents get this value."""

    value: Amount

    def __call__(self, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
        return _spread(self.value, values)


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """The latents are multiplied by this factor."""

    factor: Amount

    def __call__(self, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
        return values * _spread(self.factor, values)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """The latents are set to zero."""

    def __call__(self, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
        return torch.zeros_like(values)


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """The strength is added to the latents: strength times the decoder row, active or not."""

    strength: Amount

    def __call__(self, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
        return values + _spread(self.strength, values)


def _spread(amount: Amount, values: Float[Tensor, "rows ctx n"]) -> Float[Tensor, "rows ctx n"]:
    """`amount` for each of `values`. Raises DictlearnError where its shape does not fit."""
    amount = torch.as_tensor(amount, dtype=values.dtype, device=values.device)
    try:
        return amount.expand_as(values)
    except RuntimeError as error:
        raise DictlearnError(
            "What latents are set to, scaled by or steered with must be a number or a tensor that broadcasts to "
            f"[rows, ctx, latents] = {list(values.shape)}, got {list(amount.shape)}."
        ) from error


def check_amount(name: str, value: Any) -> None:
    """Raises DictlearnError unless an amount is a finite number, or a tensor of such."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, Tensor):
        is_number = value.dtype != torch.bool and not value.is_complex()
    if not is_number:
        what = str(value.dtype) if isinstance(value, Tensor) else repr(value)
        raise DictlearnError(f"{name} must be a number or a tensor of numbers, got {what}.")
    if not torch.as_tensor(value).isfinite().all():
        raise DictlearnError(f"{name} must be finite, got {value}.")


def _is_mask(positions: Positions) -> TypeGuard[Tensor]:
    return isinstance(positions, Tensor) and positions.dtype == torch.bool


def _whole_numbers(name: str, given: Any) -> list[int]:
    """As integers. Raises DictlearnError, with `name`, for others, truth values too, and for negative ones."""
    try:
        found = [operator.index(i) for i in given]
        is_mask = any(isinstance(i, bool) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in given)
    except TypeError:
        found, is_mask = [-1], False
    if is_mask:
        raise DictlearnError(
            f"{name} must be whole numbers, counted from 0, got truth values: the numbers of a mask are "
            "mask.nonzero().flatten()."
        )
    if min(found, default=0) < 0:
        raise DictlearnError(f"{name} must be whole numbers, counted from 0, got {given!r}.")
    return found


def mask_at(positions: Positions, rows: int, first: int, ctx: int, device: torch.device) -> Bool[Tensor, "_ {ctx}"]:
    """Where `positions` are among the columns `first` to `first + ctx`, which a forward has after a cache.

    Raises DictlearnError for positions that the prompt does not have, from the forward that begins with it.
    """
    end = first + ctx
    mask = torch.zeros(1, end, dtype=torch.bool, device=device)
    reach = 0
    if positions is None or isinstance(positions, slice):
        mask[:, slice(None) if positions is None else positions] = True
    elif _is_mask(positions):
        if not len(positions) or rows % len(positions):
            raise DictlearnError(f"positions is a mask of {len(positions)} rows, and the model runs on {rows}.")
        reach = positions.shape[1]
        mask = F.pad(positions.to(device), (0, max(0, end - reach)))[:, :end]
        if len(positions) > 1:  # generate repeats each row for its beams, or for the sequences it returns
            mask = mask.repeat_interleave(rows // len(positions), dim=0)
    else:
        found = _whole_numbers("positions", positions)
        reach = max(found, default=-1) + 1
        mask[:, [place for place in found if place < end]] = True
    if first == 0 and reach > ctx:
        raise DictlearnError(f"positions reach to {reach - 1}, and the last one of the prompt is {ctx - 1}.")
    return mask[:, first:]
