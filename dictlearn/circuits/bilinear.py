"""Latents of bilinear encoders by eigenvectors of their weights (Pearce et al. 2024, arXiv 2410.08417).

A pre-activation (a . x + b_a) * (g . x + b_g) is a quadratic form of what is read, x^T Q x + linear . x + constant
with Q = (a g^T + g a^T) / 2; so is any sum of them, such as what a transcoder writes along a direction. The
eigenvectors of Q say exactly, for every input, what it depends on: x^T Q x = sum_k value_k (vector_k . x)^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dictlearn.circuits.dictionary_maps import decoder_rows
from dictlearn.circuits.parts import widened
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.types import DictlearnError, Scalar


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors, in rows, of a quadratic form; the largest absolute eigenvalues first."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k d_in"]

    def contributions(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch k"]:
        """value_k * (vector_k . x)^2."""
        return self.values * (x @ self.vectors.T).square()


class QuadraticForm(NamedTuple):
    """x^T matrix x + linear . x + constant, of what a dictionary reads; the matrix is symmetric."""

    matrix: Float[Tensor, "d_in d_in"]
    linear: Float[Tensor, " d_in"]
    constant: Scalar

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch"]:
        return ((x @ self.matrix) * x).sum(-1) + x @ self.linear + self.constant

    def spectrum(self, k: int | None = None) -> Spectrum:
        """The `k` eigenvalues of largest absolute value (None: all). That of one latent has two that are not 0."""
        values, vectors = torch.linalg.eigh(self.matrix)
        order = values.abs().argsort(descending=True)[:k]
        return Spectrum(values[order], vectors[:, order].T)

    def with_biases(self) -> Float[Tensor, "d_in_and_1 d_in_and_1"]:
        """The same as one matrix, of x with a 1 after it."""
        edge = self.linear[:, None] / 2
        return torch.cat([torch.cat([self.matrix, edge], 1), torch.cat([edge.T, self.constant.view(1, 1)], 1)])


@torch.no_grad()
def pre_activation_form(dictionary: Bilinear, latent: int) -> QuadraticForm:
    """The pre-activation of a latent as a function of raw reads."""
    _check(dictionary)
    if not 0 <= latent < dictionary.n_latents:
        raise DictlearnError(f"latent must be from 0 to {dictionary.n_latents - 1}, got {latent}.")
    weights = torch.zeros_like(widened(dictionary.b_enc))
    weights[latent] = 1
    return _form(dictionary, weights)


@torch.no_grad()
def output_form(
    dictionary: Bilinear, direction: Float[Tensor, " d_out"], latents: Int[Tensor, " n"] | None = None
) -> QuadraticForm:
    """What `latents` (None: all) would write along `direction`, raw, were each its pre-activation; without b_dec.

    Exact for an input whose active latents these are, where active latents are their pre-activations (ReLU, TopK).
    """
    _check(dictionary)
    weights = decoder_rows(dictionary)
    weights = weights @ direction.to(weights)  # [n_latents]
    if latents is not None:
        weights = torch.zeros_like(weights).index_copy(0, latents, weights[latents])
    return _form(dictionary, weights)


def _check(dictionary: Bilinear) -> None:
    if dictionary.input_norm != "none":
        raise DictlearnError(
            f"A quadratic form needs input_norm=none, got {dictionary.input_norm!r}: its norm is no polynomial."
        )


def _form(dictionary: Bilinear, weights: Float[Tensor, " n_latents"]) -> QuadraticForm:
    """The sum over latents of weight * pre-activation."""
    some = weights.nonzero()[:, 0]
    scale, weight = widened(dictionary.read_scale), weights[some]
    a, g = (widened(w)[:, some].T * scale for w in (dictionary.flat_W_enc, dictionary.W_gate.flatten(0, -2)))
    b_a, b_g = (widened(b)[some] for b in (dictionary.b_enc, dictionary.b_gate))
    product = (weight[:, None] * a).T @ g
    linear = (weight * b_g) @ a + (weight * b_a) @ g
    return QuadraticForm((product + product.T) / 2, linear, (weight * b_a * b_g).sum())
