"""What a run will cost, before anything is loaded: steps, memory, disk and time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from dictlearn.config import build
from dictlearn.data import RowData
from dictlearn.data.manifest import bytes_per_activation, read_manifest
from dictlearn.data.module import store_folder
from dictlearn.data.stored import SHARD_BYTES
from dictlearn.dictionaries import Dictionary
from dictlearn.lm import site_width, skeleton
from dictlearn.training.build import build_dictionary
from dictlearn.training.points import Entry, entries, sites_of
from dictlearn.training.terms import lm_terms
from dictlearn.types import Site

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE_BYTES = 12  # a weight and its two Adam moments, float32, in memory and in a checkpoint; no optimizer has more
GRADIENT_BYTES = 4
OVERHEAD = 1.5  # of a step over its matrix products: optimizer, statistics, gathers


class Plan(NamedTuple):
    """Sizes in bytes, time in seconds."""

    n_steps: int
    tokens_per_step: int
    lm_memory: int
    pool_memory: int
    store_memory: int  # two parts of the activation store: one in use, one on its way to or from the disk
    dictionary_memory: int
    token_disk: int
    store_disk: int  # of the activation store, whether it is written or read; 0 without one
    checkpoint_disk: int
    dictionary_disk: int
    lm_flops: float
    dictionary_flops: float


def plan(cfg: DictConfig) -> Plan:
    """Of a configuration without problems; the LM is not loaded.

    The widths of sites that are known by module path alone count as the LM's width.
    """
    text: RowData = build(cfg.data)
    model = text.own_skeleton() or skeleton(cfg.lm.name, cfg.lm.revision)
    found = entries(cfg, model)
    n_bytes = BYTES[lm_dtype(cfg)]
    reads = reads_store(text)
    width = sum(_width(model, site) for site in sites_of(found))
    dictionaries = [build_dictionary(entry, _widths(model, entry), "meta") for entry in found]
    rows = max(1, cfg.batch_size // text.ctx)  # of a batch of sequences
    per_batch = cfg.batch_size if cfg.stream == "shuffled" else rows * (text.ctx - 1)
    n_steps = math.ceil(cfg.n_tokens / per_batch)
    at_once = text.block_rows if cfg.stream == "shuffled" else rows  # the last block is read whole
    n_read = math.ceil(n_steps * per_batch / (text.ctx - 1) / at_once) * at_once * text.ctx
    pooled = n_bytes if text.store is None else BYTES[text.store_dtype]
    n_stored = 0 if text.store is None else n_steps * per_batch
    store_disk = n_stored * bytes_per_activation(width, text.store_dtype)
    passes = _lm_passes(found)
    logits = 3 * per_batch * model.config.get_text_config().vocab_size if passes else 0  # two, and a gradient
    n_parameters = sum(p.numel() for d in dictionaries for p in d.parameters())
    return Plan(
        n_steps=n_steps,
        tokens_per_step=per_batch,
        lm_memory=(sum(p.numel() for p in model.parameters()) + logits) * n_bytes,
        pool_memory=0 if reads else _pool(text, cfg.stream, width, pooled),
        store_memory=2 * min(SHARD_BYTES, store_disk),
        dictionary_memory=n_parameters * (STATE_BYTES + GRADIENT_BYTES),
        token_disk=n_read * (2 if model.config.get_text_config().vocab_size < 2**16 else 4) if text.is_text else 0,
        checkpoint_disk=2 * n_parameters * STATE_BYTES,  # the old one goes when the new one is whole
        dictionary_disk=n_parameters * 4,
        store_disk=store_disk,
        lm_flops=0.0
        if reads
        else n_read * 2 * (_lm_parameters_used(model, sites_of(found)) + passes * _lm_parameters(model)),
        dictionary_flops=cfg.n_tokens * sum(_flops_per_token(d) for d in dictionaries),
    )


def show(planned: Plan, cfg: DictConfig, console: Console) -> None:
    """Print the plan; the time is estimated from a matrix product measured here."""
    device = "cuda" if cfg.trainer.accelerator == "gpu" else "cpu"
    dtype = getattr(torch, lm_dtype(cfg))
    lm_seconds = planned.lm_flops / _flops_per_second(device, dtype)
    own_seconds = OVERHEAD * planned.dictionary_flops / _flops_per_second(device, torch.float32)
    table = Table(title="Plan: nothing is loaded or written", show_header=False, box=None, title_justify="left")
    rows = {
        "steps": f"{planned.n_steps:,} of {planned.tokens_per_step:,} activations",
        "memory: LM": _size(planned.lm_memory),
        "memory: shuffling pool": _size(planned.pool_memory),
        "memory: parts of data.store": _size(planned.store_memory),
        "memory: dictionaries, gradients, optimizer": _size(planned.dictionary_memory),
        "disk: token rows": f"{_size(planned.token_disk)} (kept for later runs on the same text)",
        "disk: activations of data.store": f"{_size(planned.store_disk)} "
        + ("(written by this run)" if planned.lm_flops else "(there already: the LM does not run in training)"),
        "disk: checkpoints, at most": _size(planned.checkpoint_disk),
        "disk: dictionaries": _size(planned.dictionary_disk),
        "time, roughly": f"{_duration(lm_seconds + own_seconds)} ({_duration(lm_seconds)} in the LM, "
        f"{_duration(own_seconds)} in the dictionaries), without evaluation",
    }
    if not planned.store_disk:
        del rows["disk: activations of data.store"], rows["memory: parts of data.store"]
    if not planned.token_disk:
        del rows["disk: token rows"]
    if cfg.lm.name is None:  # activations are drawn
        del rows["memory: LM"]
        rows["time, roughly"] = f"{_duration(own_seconds)} in the dictionaries, without drawing and evaluation"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def reads_store(text: RowData) -> bool:
    """Whether the run reads its activations from a store that is complete."""
    manifest = None if text.store is None else read_manifest(store_folder(text.store))
    return manifest is not None and manifest.complete


def lm_dtype(cfg: DictConfig) -> str:
    """The dtype that the LM will have."""
    return cfg.lm.dtype or ("bfloat16" if cfg.trainer.accelerator == "gpu" else "float32")


def _widths(model: PreTrainedModel, entry: Entry) -> dict[str, int]:
    return {site.name: _width(model, site) for site in sites_of([entry])}


def _width(model: PreTrainedModel, site: Site) -> int:
    return site_width(model, site) or model.config.get_text_config().hidden_size


def _pool(text: RowData, stream: str, width: int, n_bytes: int) -> int:
    """Bytes of activations that wait; `width` summed over the sites."""
    if stream == "sequences":
        return text.lm_batch_rows * text.ctx * width * n_bytes
    return math.ceil(text.block_rows * text.ctx * (text.n_slices + 1) / 2 * (width * n_bytes + 24))


def _lm_passes(found: Sequence[Entry]) -> int:
    """Of terms that look at the LM: a forward for all, and there and back for each dictionary."""
    n_looking = sum(bool(lm_terms(build(entry.config.objective))) for entry in found)
    return 1 + 2 * n_looking if n_looking else 0


def _lm_parameters(model: PreTrainedModel) -> int:
    """Parameters that a whole forward multiplies with: the layers and the logits."""
    config = model.config.get_text_config()
    return _lm_parameters_used(model, ()) + config.vocab_size * config.hidden_size


def _lm_parameters_used(model: PreTrainedModel, sites: Sequence[Site]) -> int:
    """Parameters of the layers that run, up to the last site; embeddings are looked up, not multiplied."""
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    if not lists:
        return sum(p.numel() for p in model.parameters())
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(lists[0])] + "."
    numbers = [int(s.module.removeprefix(prefix).split(".")[0]) for s in sites if s.module.startswith(prefix)]
    return sum(
        p.numel() for layer in lists[0][: max(numbers, default=n_layers - 1) + 1] for p in layer.parameters()
    )


def _flops_per_token(d: Dictionary) -> float:
    """A compact code makes the encoder product dense and the rest sparse; a dense one costs five dense products.

    A product of two encoders has dense gradients, and a further decode, of the gates, those of the code alone.
    """
    encoders = [d.get_parameter(name).numel() for name in d.latent_axis if name in ("W_enc", "W_gate")]
    encoder, decoder = sum(encoders), sum(rows.numel() for rows in d.decoders)
    if not d.sparsifier.compact:
        return 4 * encoder + (2 + 4 * getattr(d, "n_decodes", 1)) * decoder
    k = sum(getattr(layer, "k", 0) for layer in getattr(d.sparsifier, "layers", [d.sparsifier]))
    if len(encoders) > 1:
        return 4 * encoder + 8 * k * decoder / d.n_latents
    return 2 * encoder + 8 * k * (encoder + decoder) / d.n_latents


def _flops_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a matrix product here, the best of three."""
    a, b = (torch.randn(n, 1024, device=device).to(dtype) for n in (2048, 1024))
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        (a @ b.T).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 1024 * 1024 / best


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
