"""Inference dictionaries with random weights, to be written."""

from __future__ import annotations

from typing import Any

import torch

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers import Sparsifier


def made(
    sparsifier: Sparsifier,
    sites: tuple[str, str] = ("resid_post.2", "resid_post.2"),
    d: tuple[int, int] = (6, 6),
    n_latents: int = 24,
    **arguments: Any,
) -> Linear:
    """Of random weights, with thresholds from 0; `d` are the widths of what is read and written."""
    reads, writes = ([site] for site in sites)
    dictionary = Linear(*d, n_latents, sparsifier, reads, writes, **arguments)
    fill(dictionary)
    return dictionary


def cross_layer(sparsifier: Sparsifier, reads: list[str], writes: list[str], **arguments: Any) -> CrossLayer:
    """The same of several layers, of 14 latents each and of width 5."""
    dictionary = CrossLayer(5, 5, 14 * len(reads), sparsifier, reads, writes, **arguments)
    fill(dictionary)
    return dictionary


def fill(dictionary: Dictionary) -> None:
    for parameter in dictionary.parameters():
        torch.nn.init.normal_(parameter)
    dictionary.sparsifier.project_()
    dictionary.metadata = {"lm_name": "org/lm", "ctx": 64}
    dictionary.requires_grad_(False).eval()


def same(read: object, written: Dictionary, atol: float = 0.0, lm_name: str | None = "org/lm") -> None:
    """What is read is what was written: weights, sites and, where the format has it, the language model."""
    assert isinstance(read, type(written))
    assert (read.reads, read.writes, read.input_norm) == (written.reads, written.writes, written.input_norm)
    assert read.metadata["lm_name"] == lm_name
    assert read.sparsifier.kind == written.sparsifier.kind
    theirs = dict(read.named_parameters())
    assert set(theirs) == set(dict(written.named_parameters()))
    for name, parameter in written.named_parameters():
        torch.testing.assert_close(theirs[name], parameter, rtol=0.0, atol=atol)
