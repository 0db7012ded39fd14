"""Activations of a known dictionary, without a language model.

They come from a model that has no language: its token ids are numbers of draws, and its one site, `planted`, gives
x = sum_i f_i d_i + offset + noise of that draw. So what reads a language model's activations reads these as well.
The site's input, `planted:in`, are the true feature values f.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dictlearn.checks import check_choice, check_count, check_number, check_positive
from dictlearn.data.features import (
    MOST_OPTIMISED,
    Features,
    Firing,
    Forest,
    directions,
    low_rank_loadings,
    zipf,
)
from dictlearn.data.rows import RowData, Rows, RowStore
from dictlearn.lm.load import LM
from dictlearn.types import DictlearnError, Site, TokenIds, TokenMask

FORMAT = 1  # of the draws; part of the fingerprint
CTX = 128  # draws of one random stream
HELDOUT = 2**40  # the first held-out row; training begins at row 0
NAME = "planted"
SITE = Site(NAME, NAME, "out")
FEATURE_VALUES = Site(f"{NAME}:in", NAME, "in")
MAGNITUDES = ("normal", "exponential")
DIRECTIONS = ("near_orthogonal", "random")


@dataclass
class Planted(RowData):
    """x [d] = sum_i f_i d_i + offset + noise, with features whose directions and firing are known.

    Row r is a function of `seed` and r alone, whatever the batch size; held-out rows are others than those trained
    on.

    Args:
        d: width. n_features: how many features there are.
        l0: features that fire at a token, on average.
        zipf_exponent, min_rate: firing rates are proportional to 1 / rank^zipf_exponent, none below min_rate or
            above 0.5.
        magnitude, magnitude_sd: of a feature that fires, |N(1, sd)| ("normal") or 1 + Exp(mean sd) ("exponential").
        directions: "near_orthogonal" or "random" unit vectors.
        direction_cosine, direction_groups: within each of so many groups, directions have this mean cosine.
        n_duplicates: so many features, the last ones, have the directions of the first ones.
        firing_correlation, firing_rank: roots fire together, by a Gaussian copula whose correlations are at most
            firing_correlation and have this rank.
        depth, branching, child_rate: features are trees with so many levels below their roots; each has `branching`
            children, which fire at a share `child_rate` of the tokens where it fires, and nowhere else.
        noise: root mean square norm of Gaussian noise; a feature's magnitude is about 1.
        offset: norm of a constant that is added to every activation.
    """

    d: int = 128
    n_features: int = 256
    l0: float = 12.0
    zipf_exponent: float = 0.5
    min_rate: float = 0.001
    magnitude: str = "normal"
    magnitude_sd: float = 0.25
    directions: str = "near_orthogonal"
    direction_cosine: float = 0.0
    direction_groups: int = 1
    n_duplicates: int = 0
    firing_correlation: float = 0.0
    firing_rank: int = 4
    depth: int = 0
    branching: int = 4
    child_rate: float = 0.5
    noise: float = 0.0
    offset: float = 0.0
    seed: int = 0
    # Draws are independent: they need no shuffle, and no filter; to draw them again is cheaper than to store them.
    ctx: int = field(default=CTX, init=False)
    lm_batch_rows: int = field(default=8, init=False)
    block_rows: int = field(default=8, init=False)
    n_slices: int = field(default=1, init=False)
    max_norm_ratio: float | None = field(default=None, init=False)
    store: str | None = field(default=None, init=False)
    store_dtype: str = field(default="float32", init=False)

    is_text: ClassVar[bool] = False

    @property
    def title(self) -> str:
        return f"{self.n_features} planted features of width {self.d}, seed {self.seed}"

    def problems(self, n_positions: int | None = None) -> list[str]:  # noqa: ARG002 - there are no positions
        counts = {"d": 2, "n_features": 1, "seed": 0, "depth": 0, "branching": 1, "firing_rank": 1}
        counts |= {"direction_groups": 1, "n_duplicates": 0}
        choices = {"magnitude": MAGNITUDES, "directions": DIRECTIONS}
        checks = [partial(self._check, check_count, key, least) for key, least in counts.items()]
        checks += [partial(self._check, check_positive, key) for key in ("l0", "min_rate")]
        checks += [
            partial(self._check, check_number, key) for key in ("zipf_exponent", "magnitude_sd", "noise", "offset")
        ]
        checks += [partial(self._check, check_choice, key, allowed) for key, allowed in choices.items()]
        checks += [
            partial(self._check_share, key) for key in ("direction_cosine", "firing_correlation", "child_rate")
        ]
        return _failures(checks) or _failures([self._check_directions, self._firing])

    def _check(self, check: Callable[..., None], key: str, *rule: Any) -> None:
        check(f"data.{key}", getattr(self, key), *rule)

    def _check_share(self, key: str) -> None:
        """child_rate is above 0 and may be 1, the others are below 1 and may be 0."""
        value = getattr(self, key)
        check_number(f"data.{key}", value)
        if key == "child_rate" and not 0 < value <= 1:
            raise DictlearnError(f"data.{key} must be above 0 and at most 1, got {value!r}")
        if key != "child_rate" and value >= 1:
            raise DictlearnError(f"data.{key} must be below 1, got {value!r}")

    def _check_directions(self) -> None:
        if 2 * self.n_duplicates > self.n_features:
            raise DictlearnError(
                f"data.n_duplicates must be at most half of data.n_features = {self.n_features}, "
                f"got {self.n_duplicates}"
            )
        if self.direction_cosine and self.direction_groups > self.d - 2:
            raise DictlearnError(
                f"data.direction_groups must leave two dimensions of data.d = {self.d}, got {self.direction_groups}"
            )
        if self.directions == "near_orthogonal" and self.n_features > MOST_OPTIMISED:
            raise DictlearnError(
                f"data.directions=near_orthogonal is for at most {MOST_OPTIMISED} features, got {self.n_features}: "
                "use data.directions=random"
            )

    def train(self, tokenizer: PreTrainedTokenizerBase) -> PlantedRows:  # noqa: ARG002 - there is no text
        return PlantedRows(self, "train", 0)

    def heldout(self, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> Rows:  # noqa: ARG002 - as above
        store = PlantedRows(self, "heldout", HELDOUT)
        tokens = store.rows(0, store.wait_counted(n_tokens))
        info = {
            "text": self.title,
            "split": "heldout",
            "ctx": CTX,
            "n_rows": len(tokens),
            "n_tokens": tokens.numel(),
            "fingerprint": store.fingerprint,
        }
        return Rows(tokens, store.mask(tokens), info)

    def own_lm(self, device: str = "cpu") -> LM:
        model = PlantedModel(self.d, self.n_features)
        model.plant_(self.features, self.seed, self.offset)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({}, unk_token="")))
        nn.Module.to(model.eval().requires_grad_(False), device)
        return LM(model, tokenizer, NAME, None, "float32")

    def own_skeleton(self) -> PreTrainedModel:
        check_count("data.d", self.d, 2)
        check_count("data.n_features", self.n_features)
        with torch.device("meta"):
            return PlantedModel(self.d, self.n_features)

    @property
    def fingerprint(self) -> str:
        parts = [FORMAT, CTX, self.record()]
        return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def features(self) -> Features:
        """The ground truth."""
        rng = _generator(self.seed, 2**63)
        rows = directions(
            rng,
            self.n_features,
            self.d,
            optimised=self.directions == "near_orthogonal",
            cosine=self.direction_cosine,
            n_groups=self.direction_groups,
        )
        rows[self.n_features - self.n_duplicates :] = rows[: self.n_duplicates]
        return Features(rows, self._firing(), self.magnitude, self.magnitude_sd, self.noise)

    def _firing(self) -> Firing:
        forest = Forest.of(self.n_features, self.depth, self.branching)
        per_root = sum((self.branching * self.child_rate) ** level for level in range(self.depth + 1))
        least = self.min_rate / self.child_rate**self.depth
        chance = np.full(self.n_features, float(self.child_rate))
        chance[: forest.n_roots] = zipf(forest.n_roots, self.l0 / per_root, self.zipf_exponent, least)
        if not self.firing_correlation:
            return Firing(forest, chance)
        rng = _generator(self.seed, 2**63 + 1)
        loadings = low_rank_loadings(
            rng, forest.n_roots, self.n_features, self.firing_correlation, self.firing_rank
        )
        return Firing(forest, chance, loadings)


class PlantedRows(RowStore):
    """Rows of draw numbers from row `first` on, endless; every one counts."""

    def __init__(self, planted: Planted, split: str, first: int) -> None:
        self.ctx, self.first = CTX, first
        self.name = f"{planted.title} ({split})"
        self._fingerprint = planted.fingerprint
        self._n_rows = 0

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def n_rows(self) -> int:
        return self._n_rows

    @property
    def n_counted(self) -> int:
        return self._n_rows * CTX

    @property
    def most_counted(self) -> int:
        return CTX

    def prefetch(self, n_counted: int) -> None:
        """Nothing is prepared: rows are numbers."""

    def wait(self, n_rows: int) -> int:
        self._n_rows = max(self._n_rows, n_rows)
        return n_rows

    def wait_counted(self, n_counted: int) -> int:
        return self.wait(-(-n_counted // CTX))

    def take(self, indices: np.ndarray) -> TokenIds:
        starts = torch.from_numpy((indices.astype(np.int64) + self.first) * CTX)
        return starts.unsqueeze(1) + torch.arange(CTX)

    def mask(self, rows: TokenIds) -> TokenMask:
        return torch.ones_like(rows, dtype=torch.bool)


class PlantedConfig(PretrainedConfig):
    model_type = NAME

    def __init__(self, d: int = 2, n_features: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_size, self.n_features = d, n_features
        self.num_hidden_layers = self.vocab_size = 0


class PlantedModel(PreTrainedModel):
    """Token ids [rows, ctx], numbers of draws, to activations at its module `planted`."""

    config_class = PlantedConfig

    def __init__(self, d: int, n_features: int) -> None:
        super().__init__(PlantedConfig(d, n_features))
        self.planted = _Sum(n_features, d)
        self.features: Features | None = None
        self.seed = 0

    @torch.no_grad()
    def plant_(self, features: Features, seed: int, offset: float) -> None:
        constant = torch.from_numpy(_generator(seed, 2**63 + 2).standard_normal(self.config.hidden_size))
        self.features, self.seed = features, seed
        self.planted.weight.copy_(torch.from_numpy(features.directions.T))
        self.planted.bias.copy_(offset * constant / constant.norm())

    @property
    def directions(self) -> Float[Tensor, "n_features d"]:
        """The true decoder rows."""
        return self.planted.weight.T

    def forward(self, input_ids: TokenIds, **_: Any) -> Float[Tensor, "rows ctx d"]:
        drawn = [self._draw(row) for row in input_ids.cpu()]
        values, noise = (torch.stack(part).to(input_ids.device) for part in zip(*drawn, strict=True))
        return self.planted(values, noise)

    def _draw(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Feature values and noise of one row."""
        assert self.features is not None
        values, noise = self.features.draw(_generator(self.seed, int(numbers[0]) // CTX), CTX)
        return values[numbers % CTX], noise[numbers % CTX]


class _Sum(nn.Linear):
    """Feature values [*, n_features] to activations [*, d]: a linear layer, so that its width is known."""

    def forward(self, values: Tensor, noise: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(values) + noise


def _generator(seed: int, stream: int) -> np.random.Generator:
    """A generator that depends on its arguments alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64)))


def _failures(checks: Sequence[Callable[[], Any]]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except DictlearnError as error:
            problems.append(str(error))
    return problems
