"""What the nodes outside a circuit are set to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dictlearn.checks import check_choice, check_count
from dictlearn.circuits.cuts import Cut, check_cuts, record
from dictlearn.circuits.pairs import PairBatch
from dictlearn.lm import LM, model_of

PER_PAIR = ("patch", "resample")
MEANS = ("mean", "mean_positional")
ABLATIONS = (*PER_PAIR, *MEANS, "zero")


class Ablated(NamedTuple):
    """Values of a dictionary's nodes, to be broadcast over pairs and positions.

    `values` [n or 1, ctx or 1, n_latents], `rest` and `skipped` [n or 1, ctx or 1, n_writes, d_out]; no rest: the
    bias alone. `skipped` is what the skip path writes: only the model without any node has it ablated.
    """

    values: Float[Tensor, "_ _ n_latents"]
    rest: Float[Tensor, "_ _ n_writes d_out"] | None
    skipped: Float[Tensor, "_ _ n_writes d_out"] | None


class Ablation:
    """Values of ablated nodes, from the patch prompts of a task.

    Args:
        kind: "patch": the pair's own patch prompt, which scores of (patch - clean) estimate; "resample": the patch
            prompt of another pair; "mean_positional": the mean over pairs, at each position (Marks et al. 2024);
            "mean": over positions as well; "zero": no latent is active and no error there.
        n_rows: prompts in one forward.
        seed: of the pairs that "resample" draws.
    """

    def __init__(
        self,
        model: LM | PreTrainedModel,
        cuts: Sequence[Cut],
        batch: PairBatch,
        kind: str = "patch",
        n_rows: int = 32,
        seed: int = 0,
    ) -> None:
        check_choice("ablation", kind, ABLATIONS)
        check_count("n_rows", n_rows)
        check_cuts(cuts)
        self._model, self._cuts, self._kind = model_of(model), cuts, kind
        self._batch, self._n_rows = batch, n_rows
        generator = torch.Generator().manual_seed(seed)
        n = len(batch)
        shift = torch.randint(1, n, (), generator=generator).item() if n > 1 else 0
        order = torch.randperm(n, generator=generator)
        self._other = torch.empty_like(order)
        self._other[order] = order.roll(int(shift))  # no pair draws its own, unless there is only one
        self._means = self._over_pairs() if kind in MEANS else {}

    def chunks(self) -> Iterator[tuple[PairBatch, dict[str, Ablated]]]:
        """All pairs, `n_rows` at a time, with the values of their ablated nodes by dictionary."""
        for first in range(0, len(self._batch), self._n_rows):
            rows = slice(first, first + self._n_rows)
            chunk = self._batch.select(rows)
            yield chunk, self._of(chunk, self._other[rows])

    @torch.no_grad()
    def _of(self, chunk: PairBatch, others: Tensor) -> dict[str, Ablated]:
        if self._kind in MEANS:
            return self._means
        if self._kind == "zero":
            zeros = {c.name: torch.zeros(1, 1, c.dictionary.n_latents).to(c.dictionary.b_dec) for c in self._cuts}
            return {name: Ablated(values, None, None) for name, values in zeros.items()}
        ids = chunk.patch if self._kind == "patch" else self._batch.patch[others.to(chunk.patch.device)]
        _, acts = record(self._model, self._cuts, ids)
        return {cut.name: Ablated(*_nodes(cut, acts)) for cut in self._cuts}

    @torch.no_grad()
    def _over_pairs(self) -> dict[str, Ablated]:
        totals: dict[str, list[Tensor]] = {}
        for chunk in self._batch.split(self._n_rows):
            _, acts = record(self._model, self._cuts, chunk.patch)
            for cut in self._cuts:
                parts = [part.sum(0, keepdim=True, dtype=torch.float64) for part in _nodes(cut, acts)]
                before = totals.get(cut.name, [0] * len(parts))
                totals[cut.name] = [part + earlier for part, earlier in zip(parts, before, strict=True)]
        return {cut.name: Ablated(*(self._mean(cut, part) for part in totals[cut.name])) for cut in self._cuts}

    def _mean(self, cut: Cut, total: Float[Tensor, "1 ctx *node"]) -> Float[Tensor, "1 _ *node"]:
        if self._kind == "mean":
            total = total[:, self._batch.n_special :].mean(1, keepdim=True)
        return (total / len(self._batch)).to(cut.dictionary.b_dec)


def _nodes(cut: Cut, acts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x = cut.dictionary.select_reads(acts)
    values = cut.dense_values(x)
    return values, cut.rests(acts, cut.written(values)), cut.skipped(x)
