"""circuit-tracer's cross-layer transcoders: `W_enc_LAYER.safetensors` and `W_dec_LAYER.safetensors` for each layer
(Ameisen et al. 2025; Hanna et al. 2025).

latents_l = relu(x_l @ W_enc_l.T + b_enc_l), with W_enc_l stored as [n_latents, d_in], or those above thresholds;
recon_m = sum over l <= m of latents_l @ W_dec_l[:, m - l] + b_dec_m + x_m @ W_skip_m, with W_dec_l [n_latents,
n_layers - l, d_out]. A skip path is one more file, `W_skip.safetensors`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import LayerSizes, Weights, cross_layer
from dictlearn.hub.codecs._writing import check_held, lacks, write_tensors
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.codecs.circuit_tracer import (
    CONFIG,
    READ,
    WRITE,
    WRITTEN,
    check_thresholds,
    origin,
    site_kind,
    their_config,
    unnamed,
    write_config,
)
from dictlearn.hub.files import Files
from dictlearn.hub.names import NORMALISED
from dictlearn.hub.weights import check_tensors, load_tensors, read_shapes, read_yaml
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import FormatError

ENCODER, DECODER, SKIP = "W_enc_{}.safetensors", "W_dec_{}.safetensors", "W_skip.safetensors"
KIND = "cross_layer_transcoder"
HOLDS = "circuit-tracer has ReLU and JumpReLU cross-layer transcoders of MLPs, of one width"


class CircuitTracerCLT:
    """ReLU and JumpReLU cross-layer transcoders."""

    layout: ClassVar[str] = f"W_enc_LAYER.safetensors, W_dec_LAYER.safetensors and {CONFIG} of a {KIND}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, ENCODER.format(0), DECODER.format(0), CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        return read_yaml(files.path(posixpath.join(place, CONFIG))).get("model_kind") == KIND

    def read(self, files: Files, place: str) -> Dictionary:
        config = files.path(posixpath.join(place, CONFIG))
        cfg = read_yaml(config)
        if cfg.get(READ) == NORMALISED:
            raise FormatError(
                f"{config}: {READ}={NORMALISED} is not supported because a "
                "cross-layer transcoder here has no input norm."
            )
        read, write = (site_kind(config, cfg, key) for key in (READ, WRITE))
        pairs = _pairs(files, place)
        sizes, jump = _sizes(*pairs[0])
        n_layers, skip = len(pairs), None
        if (name := posixpath.join(place, SKIP)) in files.names:
            skip = load_tensors(files.path(name))
            check_tensors(files.path(name), skip, {"W_skip": (n_layers, sizes.d_in, sizes.d_out)})
        if read == write:
            raise FormatError(f"{config}: {READ} and {WRITE} must be two sites, got {cfg[READ]} and {cfg[WRITE]}.")
        return cross_layer(
            pairs[0][0],
            sizes,
            _layers(pairs, sizes, jump, skip["W_skip"] if skip else None),
            None if jump else ReLU(l1=0.0),
            [f"{read}.{layer}" for layer in range(n_layers)],
            [f"{write}.{layer}" for layer in range(n_layers)],
            skip=skip is not None,
            metadata=origin(cfg),
        )

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """A skip path is refused, because circuit-tracer does not read it from files."""
        d, d_out = dictionary.d_in, dictionary.d_out
        layers = [f"{dictionary.reads[0].partition('.')[0]}.{layer}" for layer in range(len(dictionary.reads))]
        reasons = [
            *lacks(dictionary, WRITTEN, kind="cross_layer"),
            (dictionary.W_skip is not None, "it has a skip path"),
            (d != d_out, f"it reads a width of {d} and writes one of {d_out}"),
            unnamed(dictionary),
            (
                list(dictionary.reads) != layers,
                f"it reads {', '.join(dictionary.reads)}, and not all layers from 0",
            ),
        ]
        check_held(HOLDS, dictionary, reasons)
        write_config(folder / CONFIG, their_config(dictionary, KIND))
        n = dictionary.n_latents // len(layers)
        encoders = zip(dictionary.W_enc.T.split(n), dictionary.b_enc.split(n), dictionary.b_dec, strict=True)
        for i, (W_enc, b_enc, b_dec) in enumerate(encoders):
            own = {f"W_enc_{i}": W_enc, f"b_enc_{i}": b_enc, f"b_dec_{i}": b_dec}
            if dictionary.sparsifier.kind == "jump_relu":
                own[f"threshold_{i}"] = dictionary.get_parameter(f"sparsifier._layers.{i}.threshold")
            write_tensors(folder / ENCODER.format(i), own)
            write_tensors(folder / DECODER.format(i), {f"W_dec_{i}": dictionary.decoders[i]})


def _pairs(files: Files, place: str) -> list[tuple[Path, Path]]:
    """The encoder's and the decoder's file of every layer from 0."""
    pattern = re.compile(r"W_(?:enc|dec)_(\d+)\.safetensors")
    here = [posixpath.basename(name) for name in files.names if posixpath.dirname(name) == place]
    n_layers = 1 + max(int(found[1]) for name in here if (found := pattern.fullmatch(name)))
    needed = [(ENCODER.format(layer), DECODER.format(layer)) for layer in range(n_layers)]
    if missing := [name for pair in needed for name in pair if name not in here]:
        raise FormatError(f"{files.place(place)} must hold the files of {n_layers} layers; missing {missing[:4]}.")
    return [(files.path(posixpath.join(place, enc)), files.path(posixpath.join(place, dec))) for enc, dec in needed]


def _sizes(encoder: Path, decoder: Path) -> tuple[LayerSizes, bool]:
    """Widths, and whether there are thresholds, from the files of the first layer."""
    first, written = read_shapes(encoder), read_shapes(decoder)
    W_enc, W_dec = first.get("W_enc_0", ()), written.get("W_dec_0", ())
    if len(W_enc) != 2 or len(W_dec) != 3:
        raise FormatError(
            f"{encoder} must hold W_enc_0 with two axes and {decoder.name} W_dec_0 with three; they hold {first} "
            f"and {written}."
        )
    return LayerSizes(W_enc[1], W_dec[2], W_enc[0]), "threshold_0" in first


def _layers(
    pairs: Sequence[tuple[Path, Path]], sizes: LayerSizes, jump: bool, W_skip: Tensor | None
) -> Iterator[Weights]:
    """Layer by layer, checked."""
    d_in, d_out, n = sizes
    for i, (encoder, decoder) in enumerate(pairs):
        w, rows = load_tensors(encoder), load_tensors(decoder)
        threshold = f"threshold_{i}"
        if jump and threshold in w and w[threshold].shape == (1, n):
            w[threshold] = w[threshold][0]
        shapes = {f"W_enc_{i}": (n, d_in), f"b_enc_{i}": (n,), f"b_dec_{i}": (d_out,)}
        check_tensors(encoder, w, shapes | ({threshold: (n,)} if jump else {}))
        check_thresholds(encoder, w, threshold)
        check_tensors(decoder, rows, {f"W_dec_{i}": (n, len(pairs) - i, d_out)})
        W_enc, W_dec = w[f"W_enc_{i}"].T, rows[f"W_dec_{i}"]
        skip = None if W_skip is None else W_skip[i].T
        yield Weights(W_enc, w[f"b_enc_{i}"], W_dec, w[f"b_dec_{i}"], w.get(threshold), skip)
