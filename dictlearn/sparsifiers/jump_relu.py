"""JumpReLU: a latent fires where its pre-activation exceeds its own threshold (Rajamanoharan et al. 2024,
arXiv 2407.14435), with the penalties of that paper, of Anthropic (Circuits Updates, January 2025) and a target L0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dictlearn.checks import check_choice, check_number, check_positive
from dictlearn.ramp import Ramp, check_ramp, ramp_factor
from dictlearn.sparsifiers.base import Sparsifier
from dictlearn.types import DictlearnError, Encoded, Scalar, Step

PENALTIES = ("tanh", "l0", "target_l0")


class JumpReLU(Sparsifier):
    """`pre_act * 1[pre_act > threshold_i]`; thresholds are learnt through a rectangle of width `bandwidth`.

    With K the indicator of |z| < 1/2 and e the bandwidth, the pseudo-derivatives by the threshold are
    -(threshold / e) K((pre_act - threshold) / e) of a latent and -(1 / e) K(...) of its step. Pre-activations have
    the true ones, and with the tanh penalty those of the thresholds with the other sign as well: Anthropic lets the
    estimator's gradient through to all parameters, which is understood here as SAELens does.

    The penalty is the mean over tokens, times `coefficient`, of

        tanh: sum_i tanh(4 latent_i ||W_dec_i|| / s), with s the target's root mean square about its mean
        l0: the number of latents that fire
        target_l0: (L0 / `target_l0` - 1)^2, L0 the mean number that fires in the batch

    with ||W_dec_i|| that of `Dictionary.penalty_norms`. A cross-layer transcoder has the mean over layers, so l0 is
    the mean L0 of a layer, and `target_l0` that of each layer.

    Args:
        coefficient: of the penalty, beside a reconstruction loss that is an FVU.
        penalty: tanh, l0 or target_l0; tanh leaves decoder norms free.
        target_l0: latents per token that penalty=target_l0 aims at.
        threshold: where thresholds start; like `bandwidth`, a multiple of the root mean square of the
            pre-activations of a random direction, so that both mean the same at every activation scale.
        bandwidth: width of the rectangle.
        pre_act_coefficient: of the mean over tokens of sum_i relu(threshold_i - pre_act_i) ||W_dec_i|| / s over
            the dead latents i, which gives them a gradient.
        ramp: over which the coefficient rises from 0: null, a number of steps, a share of the run, or `run`.
    """

    SHARPNESS: ClassVar[float] = 4.0  # of tanh
    per_latent: ClassVar[bool] = True

    unit: Float[Tensor, ""]  # the root mean square of the pre-activations of a random direction

    def __init__(
        self,
        coefficient: float = 0.0,
        penalty: str = "tanh",
        target_l0: float | None = None,
        threshold: float = 0.1,
        bandwidth: float = 2.0,
        pre_act_coefficient: float = 0.0,
        ramp: Ramp = "run",
    ) -> None:
        super().__init__()
        check_number("sparsifier.coefficient", coefficient)
        check_choice("sparsifier.penalty", penalty, PENALTIES)
        check_positive("sparsifier.target_l0", target_l0, or_null=True)
        check_number("sparsifier.threshold", threshold)
        check_positive("sparsifier.bandwidth", bandwidth)
        check_number("sparsifier.pre_act_coefficient", pre_act_coefficient)
        check_ramp("sparsifier.ramp", ramp)
        if (penalty == "target_l0") != (target_l0 is not None):
            raise DictlearnError(
                f"sparsifier.target_l0 goes with penalty=target_l0, got target_l0={target_l0!r} and "
                f"penalty={penalty}."
            )
        self.coefficient, self.kind_of_penalty, self.target_l0 = coefficient, penalty, target_l0
        self.start, self.bandwidth, self.pre_act_coefficient = threshold, bandwidth, pre_act_coefficient
        self.ramp, self.factor = ramp, 1.0
        self.norm_weighted = penalty == "tanh"
        self.per_token = penalty != "target_l0"
        self.threshold: nn.Parameter | None = None  # [n_latents], once bound
        self.register_buffer("unit", torch.ones(()))

    @classmethod
    def fixed(cls, thresholds: Float[Tensor, " n_latents"]) -> JumpReLU:
        """Of an inference dictionary: these thresholds, no penalty, pre-activations with their true derivatives."""
        made = cls(penalty="l0")
        made.threshold = nn.Parameter(thresholds.detach().clone(), requires_grad=False)
        return made.to(thresholds.device)

    @property
    def thresholds(self) -> Float[Tensor, " n_latents"]:
        if self.threshold is None:
            raise RuntimeError("JumpReLU has its thresholds once a dictionary has bound it to its latents")
        return self.threshold

    def forward(self, pre_acts: Float[Tensor, "*batch n_latents"]) -> Float[Tensor, "*batch n_latents"]:
        return _JumpReLU.apply(pre_acts, self.thresholds, self.width, self.norm_weighted)  # type: ignore[no-any-return]

    def select(self, pre_acts: Float[Tensor, "n_tokens n_latents"]) -> Encoded:
        return Encoded(self(pre_acts), pre_acts)

    @property
    def width(self) -> Float[Tensor, ""]:
        """The bandwidth in the units of pre-activations."""
        return self.bandwidth * self.unit

    def penalty(self, step: Step) -> Scalar | None:
        assert isinstance(step.latents, Tensor)
        assert step.pre_acts is not None
        terms: list[Scalar] = []
        spread = (step.variance.sum() / step.target.shape[-1]).sqrt()
        weights = step.dictionary.penalty_norms() / spread
        if self.coefficient > 0:
            terms.append(self.coefficient * self.factor * self._sparsity(step.latents, step.pre_acts, weights))
        if self.pre_act_coefficient > 0 and step.dead is not None:
            below = (self.thresholds[step.dead] - step.pre_acts[:, step.dead]).relu()  # [batch, n_dead]
            terms.append(self.pre_act_coefficient * (below * weights[step.dead]).sum(-1).mean())
        return torch.stack(terms).sum() if terms else None

    def _sparsity(self, latents: Tensor, pre_acts: Tensor, weights: Float[Tensor, " n_latents"]) -> Scalar:
        if self.kind_of_penalty == "tanh":
            return _Tanh.apply(latents, self.SHARPNESS * weights) / len(latents)  # type: ignore[no-any-return]
        l0 = _L0.apply(pre_acts.detach(), self.thresholds, self.width)
        if self.target_l0 is None:
            return l0  # type: ignore[no-any-return]
        return (l0 / self.target_l0 - 1).square()  # type: ignore[no-any-return]

    def at(self, step: int, n_steps: int) -> None:
        self.factor = ramp_factor(self.ramp, step, n_steps)

    @torch.no_grad()
    def project_(self) -> None:
        self.thresholds.clamp_(min=0)

    @torch.no_grad()
    def restart_(self, latents: Int[Tensor, " n"]) -> list[tuple[nn.Parameter, Tensor]]:
        self.thresholds[latents] = self.start * self.unit
        assert self.threshold is not None
        return [(self.threshold, latents)]

    def bind(self, n_latents: int) -> None:
        if self.target_l0 is not None and self.target_l0 > n_latents:
            raise DictlearnError(
                f"sparsifier.target_l0 must be at most n_latents = {n_latents}, got {self.target_l0}."
            )
        self.threshold = nn.Parameter(torch.full((n_latents,), float(self.start)))

    @torch.no_grad()
    def set_unit_(self, unit: float) -> None:
        self.unit.fill_(unit)
        self.thresholds.fill_(self.start * unit)

    @torch.no_grad()
    def scale_latents_(self, factor: Float[Tensor, " n_latents"]) -> None:
        self.thresholds.mul_(factor)

    def for_inference(self) -> JumpReLU:
        return JumpReLU.fixed(self.thresholds)

    def config(self) -> dict[str, Any]:
        return {
            "coefficient": self.coefficient,
            "penalty": self.kind_of_penalty,
            "target_l0": self.target_l0,
            "threshold": self.start,
            "bandwidth": self.bandwidth,
            "pre_act_coefficient": self.pre_act_coefficient,
            "ramp": self.ramp,
        }

    @classmethod
    def tiny(cls) -> JumpReLU:
        return cls(coefficient=0.01, threshold=0.3, bandwidth=0.5, pre_act_coefficient=0.01)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, width: Tensor, to_inputs: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold, width)
        ctx.to_inputs = to_inputs
        return torch.where(pre_acts > threshold, pre_acts, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        pre_acts, threshold, width = ctx.saved_tensors
        by_threshold, by_pre_act = None, torch.where(pre_acts > threshold, grads[0], 0.0)
        if ctx.needs_input_grad[1] or ctx.to_inputs:
            near = torch.where(_near(pre_acts, threshold, width), grads[0], 0.0)
            total = near.reshape(-1, near.shape[-1]).sum(0, dtype=threshold.dtype)  # [n_latents]
            by_threshold = -threshold / width * total
            if ctx.to_inputs:
                by_pre_act += near.mul_((threshold / width).to(near.dtype))
        return by_pre_act, by_threshold, None, None


class _L0(torch.autograd.Function):
    """The mean number of pre-activations above their thresholds, per token."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        near = _near(pre_acts, threshold, width).sum(0)
        ctx.save_for_backward(near.to(threshold.dtype) / width / len(pre_acts))
        return (pre_acts > threshold).sum().to(threshold.dtype) / len(pre_acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return None, -grads[0] * slope, None


class _Tanh(torch.autograd.Function):
    """sum over tokens and latents of tanh(weight_i * latent_i)."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(latents, weights)
        return (latents * weights.to(latents.dtype)).tanh_().sum(dtype=weights.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        latents, weights = ctx.saved_tensors
        in_dtype = weights.to(latents.dtype)
        slope = (latents * in_dtype).tanh_().square_().neg_().add_(1)  # 1 - tanh^2
        by_weight = (slope * latents).sum(0, dtype=weights.dtype)
        return slope.mul_(in_dtype).mul_(grads[0].to(latents.dtype)), grads[0] * by_weight


def _near(pre_acts: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
    return (pre_acts > threshold - width / 2) & (pre_acts < threshold + width / 2)
