"""Prompt pairs: what a circuit is found on and judged by.

Each row has a clean prompt, which shows the behaviour, and a patch prompt of the same tokens but for those that
decide it (the counterfactual). All rows of a batch have one length and one template, so that a position has the
same role in each of them; the answer is what follows the last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.circuits.metrics import METRICS
from dictlearn.circuits.parts import widened
from dictlearn.types import DictlearnError, TokenIds

NONE = -1  # fills up rows of fewer answers than others


@dataclass(frozen=True)
class PairBatch:
    """`n` prompt pairs.

    Args:
        clean, patch: token ids, the beginning-of-sequence token included where there is one.
        answers, wrong: ids of the right next tokens of the clean prompts, and of those that the metric holds
            against them; rows of fewer are filled up with -1.
        metric: which number of the logits is the behaviour, see metrics.py; higher is the clean one.
        roles: positions in the rows, by what stands there ("subject", "end").
        n_special: leading special tokens, such as the beginning of the sequence; they are never ablated.
    """

    clean: TokenIds
    patch: TokenIds
    answers: Int[Tensor, "n n_answers"]
    wrong: Int[Tensor, "n n_wrong"]
    metric: str = "logit_difference"
    roles: Mapping[str, int] = field(default_factory=dict)
    n_special: int = 0

    def __post_init__(self) -> None:
        sizes = {len(self.clean), len(self.patch), len(self.answers), len(self.wrong)}
        if self.clean.shape != self.patch.shape or len(sizes) > 1 or not self.clean.numel():
            raise DictlearnError(
                "Clean and patch prompts must have one shape [n, ctx] and n rows of answers, got "
                f"{list(self.clean.shape)}, {list(self.patch.shape)}, {len(self.answers)} and {len(self.wrong)}."
            )
        if self.metric not in METRICS:
            raise DictlearnError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}.")
        for name, ids in (("answers", self.answers), ("wrong", self.wrong)):
            if not (ids != NONE).any(-1).all():
                raise DictlearnError(f"Every row must have one of {name} at least.")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def ctx(self) -> int:
        return self.clean.shape[1]

    @property
    def since(self) -> int:
        """The first position at which any pair differs; what a causal LM computes before it is the same. The last
        position where none differs.
        """
        (differing,) = (self.clean != self.patch).any(0).nonzero(as_tuple=True)
        return int(differing[0]) if len(differing) else self.ctx - 1

    def value(self, logits: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        """The metric of each row, from the logits after its last token, in float32 at least."""
        return METRICS[self.metric](widened(logits), self.answers, self.wrong)

    def select(self, rows: slice | Tensor) -> PairBatch:
        """Some of the pairs."""
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> PairBatch:
        """All pairs, `times` times in a row."""
        return self._map(lambda tensor: tensor.repeat(times, 1))

    def to(self, device: torch.device) -> PairBatch:
        return self._map(lambda tensor: tensor.to(device))

    def split(self, n_rows: int) -> Iterator[PairBatch]:
        """Parts of at most `n_rows` pairs."""
        for first in range(0, len(self), n_rows):
            yield self.select(slice(first, first + n_rows))

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        names = ("clean", "patch", "answers", "wrong")
        return replace(self, **{name: change(getattr(self, name)) for name in names})
