"""Features with known directions and a known way to fire: what planted activations are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtri
from torch import Tensor

from dictlearn.types import DictlearnError

MOST_RATE = 0.5
MOST_OPTIMISED = 4096  # directions; the cost grows with the square
OPTIMISATION_STEPS = 300


@dataclass(frozen=True)
class Forest:
    """Trees of `depth` levels below their roots, every feature with `branching` children.

    Features are numbered level by level, roots first. A child fires only where its parent does.
    """

    parents: Int[np.ndarray, " n_features"]  # -1: a root
    levels: Int[np.ndarray, " n_features"]

    @property
    def n_roots(self) -> int:
        return int((self.levels == 0).sum())

    @staticmethod
    def tree_size(depth: int, branching: int) -> int:
        return sum(branching**level for level in range(depth + 1))

    @classmethod
    def of(cls, n_features: int, depth: int, branching: int) -> Forest:
        """Raises DictlearnError unless trees of this size make up `n_features`."""
        size = cls.tree_size(depth, branching)
        if n_features % size:
            raise DictlearnError(
                f"data.n_features must be a multiple of {size}, the size of a tree with data.depth = {depth} and "
                f"data.branching = {branching}, got {n_features}"
            )
        level_sizes = [n_features // size * branching**level for level in range(depth + 1)]
        starts = np.cumsum([0, *level_sizes])
        parents = [np.full(level_sizes[0], -1)]
        parents += [starts[level] + np.arange(level_sizes[level + 1]) // branching for level in range(depth)]
        return cls(np.concatenate(parents), np.repeat(np.arange(depth + 1), level_sizes))


@dataclass(frozen=True)
class Firing:
    """When features fire.

    Root i fires at a share `chance[i]` of the tokens, a child at that share of those where its parent fires.
    With `loadings` A (rows of norm below 1, zero for children), roots fire together: the Gaussian copula with
    correlations A A^T off the diagonal.
    """

    forest: Forest
    chance: Float[np.ndarray, " n_features"]
    loadings: Float[np.ndarray, "n_features rank"] | None = None

    @property
    def rates(self) -> Float[np.ndarray, " n_features"]:
        """The share of tokens at which each feature fires."""
        rates = self.chance.copy()
        for members in self._below():
            rates[members] *= rates[self.forest.parents[members]]
        return rates

    def draw(self, rng: np.random.Generator, n_tokens: int) -> np.ndarray:
        """Which features fire, bool [n_tokens, n_features]."""
        shape = (n_tokens, len(self.chance))
        if self.loadings is None:
            fires = rng.random(shape, dtype=np.float32) < self.chance.astype(np.float32)
        else:
            own = np.sqrt(1 - np.square(self.loadings).sum(1)).astype(np.float32)
            common = rng.standard_normal((n_tokens, self.loadings.shape[1]), dtype=np.float32)
            score = own * rng.standard_normal(shape, dtype=np.float32) + common @ self.loadings.T.astype(np.float32)
            fires = score < ndtri(self.chance).astype(np.float32)
        for members in self._below():
            fires[:, members] &= fires[:, self.forest.parents[members]]
        return fires

    def _below(self) -> list[np.ndarray]:
        """The features of each level below the roots, the upper ones first."""
        levels = self.forest.levels
        return [np.flatnonzero(levels == level) for level in range(1, levels.max() + 1)]


def zipf(n: int, total: float, exponent: float, least: float) -> Float[np.ndarray, " n"]:
    """Rates proportional to 1 / rank^exponent, none below `least` or above MOST_RATE, that sum to `total`.

    Raises DictlearnError where there are none.
    """
    if not n * least <= total * (1 + 1e-9) <= n * MOST_RATE:
        raise DictlearnError(
            f"{n} firing rates of {least:g} (data.min_rate) to {MOST_RATE} cannot sum to {total:g} (data.l0): the "
            f"sum is {n * least:g} at least and {n * MOST_RATE:g} at most"
        )
    weights = np.arange(1, n + 1) ** -float(exponent)
    if weights[-1] == 0:
        raise DictlearnError(
            f"data.zipf_exponent must be smaller: 1 / {n}^{exponent:g} is no longer a number above 0"
        )

    def rates(log_scale: float) -> np.ndarray:
        return np.clip(np.exp(log_scale) * weights, least, MOST_RATE)

    low, high = np.log(1e-12), np.log(MOST_RATE) - np.log(weights[-1])  # all at the least, all at the most
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rates(middle).sum() < total else (low, middle)
    return rates(high)


def low_rank_loadings(
    rng: np.random.Generator, n_roots: int, n_features: int, correlation: float, rank: int
) -> Float[np.ndarray, "n_features rank"]:
    """Loadings sqrt(correlation) * a_i of the roots with a_i random unit vectors, zero for the others."""
    loadings = np.zeros((n_features, rank))
    loadings[:n_roots] = np.sqrt(correlation) * _unit(rng.standard_normal((n_roots, rank)))
    return loadings


def directions(
    rng: np.random.Generator, n: int, d: int, optimised: bool = True, cosine: float = 0.0, n_groups: int = 1
) -> Float[np.ndarray, "n d"]:
    """Unit vectors d_i = sqrt(cosine) s_g(i) + sqrt(1 - cosine) u_i.

    The s_g are orthonormal, one for each of `n_groups` groups (i belongs to group i mod n_groups), and orthogonal
    to all u_i. So <d_i, d_j> = cosine [same group] + (1 - cosine) <u_i, u_j>. The u_i are near-orthogonal if
    `optimised`, else random.
    """
    n_shared = n_groups if cosine > 0 else 0
    axes, _ = np.linalg.qr(rng.standard_normal((d, d)))
    own = _unit(rng.standard_normal((n, d - n_shared)))
    own = near_orthogonal(own) if optimised else own
    shared = axes[np.arange(n) % n_shared] if n_shared else 0.0
    return np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * own @ axes[n_shared:]


def near_orthogonal(start: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Unit vectors with a small largest |cosine|: orthonormal if there are at most d.

    From `start`, by descent on sum_ij cos_ij^16 with a step that falls to zero. The largest |cosine| of n vectors
    is at least sqrt((n - d) / (d (n - 1))) (Welch 1974); 256 of width 64 reach 0.14, the bound being 0.11.
    """
    n, d = start.shape
    if n <= d:
        return np.linalg.qr(start.T)[0].T
    vectors = torch.from_numpy(start).clone()
    momentum = torch.zeros_like(vectors)
    for step in range(OPTIMISATION_STEPS):
        cosines = (vectors @ vectors.T).fill_diagonal_(0)
        cosines /= cosines.abs().max()  # only the largest ones count
        square = cosines * cosines
        fourth = square * square
        gradient = (cosines * square * fourth * (fourth * fourth)) @ vectors  # cos^15
        gradient -= (gradient * vectors).sum(-1, keepdim=True) * vectors
        momentum = 0.9 * momentum + gradient / gradient.norm(dim=-1).max()
        vectors -= 0.02 * (1 - step / OPTIMISATION_STEPS) * momentum
        vectors /= vectors.norm(dim=-1, keepdim=True)
    return vectors.numpy()


@dataclass(frozen=True)
class Features:
    """Directions and how they fire; a feature that fires has the magnitude |N(1, sd)|, or 1 + Exp(mean sd).

    `noise` is the root mean square norm of Gaussian noise that is added to the sum.
    """

    directions: Float[np.ndarray, "n_features d"]
    firing: Firing
    magnitude: str = "normal"
    magnitude_sd: float = 0.25
    noise: float = 0.0

    def draw(
        self, rng: np.random.Generator, n_tokens: int
    ) -> tuple[Float[Tensor, "n_tokens n_features"], Float[Tensor, "n_tokens d"]]:
        """Feature values, and the noise."""
        fires = self.firing.draw(rng, n_tokens)
        places = np.flatnonzero(fires)
        if self.magnitude == "normal":
            sizes = np.abs(1 + self.magnitude_sd * rng.standard_normal(len(places), dtype=np.float32))
        else:
            sizes = 1 + self.magnitude_sd * rng.standard_exponential(len(places), dtype=np.float32)
        values = np.zeros(fires.shape, dtype=np.float32)
        values.ravel()[places] = sizes
        d = self.directions.shape[1]
        noise = np.zeros((n_tokens, d), dtype=np.float32)
        if self.noise:
            noise = rng.standard_normal((n_tokens, d), dtype=np.float32) * np.float32(self.noise / d**0.5)
        return torch.from_numpy(values), torch.from_numpy(noise)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
