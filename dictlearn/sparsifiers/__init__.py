"""Sparsifiers: pre-activations to latents, and the penalty that makes them sparse. One file per kind."""

from dictlearn.sparsifiers.base import Sparsifier

__all__ = ["Sparsifier"]
