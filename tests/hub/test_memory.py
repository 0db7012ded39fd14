"""What loading takes in private memory, as a multiple of the dictionary's size in float32."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub import save
from dictlearn.sparsifiers.jump_relu import JumpReLU

STATUS = Path("/proc/self/status")
D, N = 576, 16_384  # 75 MB in float32

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the memory of a process is read from /proc")


def private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


@contextmanager
def most_used() -> Iterator[list[int]]:
    """The most that is used inside beyond what was before, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed goes back: else it is taken from there
    before, done, peak = private_bytes(), Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], private_bytes() - before)
            time.sleep(0.001)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def weights(n: int) -> dict[str, Tensor]:
    shapes = {"W_enc": (D, n), "b_enc": (n,), "W_dec": (n, D), "b_dec": (D,), "threshold": (n,)}
    return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}


def native(folder: Path, n: int) -> Path:
    made = Linear(D, D, n, JumpReLU(penalty="l0"), decoder_norm="free")
    save(made.for_inference(), folder)
    return folder


def gemma_scope(folder: Path, n: int) -> Path:
    folder.mkdir()
    np.savez(folder / "params.npz", allow_pickle=False, **{name: w.numpy() for name, w in weights(n).items()})
    return folder


def sparsify(folder: Path, n: int) -> Path:
    """bfloat16, and the encoder as [n_latents, d_in]."""
    folder.mkdir()
    w = {name: value.bfloat16() for name, value in weights(n).items()}
    named = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file(named | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "k": 32, "num_latents": n, "activation": "topk"}))
    return folder


def goodfire(folder: Path, n: int) -> Path:
    """Both matrices transposed, in a torch file."""
    folder.mkdir()
    w = weights(n)
    named = {"encoder_linear.weight": w["W_enc"].T.contiguous(), "encoder_linear.bias": w["b_enc"]}
    named |= {"decoder_linear.weight": w["W_dec"].T.contiguous(), "decoder_linear.bias": w["b_dec"]}
    torch.save(named, folder / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    return folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"


def dictionary_learning(folder: Path, n: int) -> Path:
    """Both transposed, and decoder rows get unit norm."""
    folder.mkdir()
    w = weights(n)
    named = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "bias": w["b_dec"]}
    torch.save(named | {"decoder.weight": w["W_dec"].T.contiguous()}, folder / "ae.pt")
    return folder


@pytest.mark.parametrize(
    ("write", "most"),
    [(native, 1.2), (gemma_scope, 1.2), (sparsify, 1.6), (goodfire, 1.6), (dictionary_learning, 1.6)],
)
def test_loading_takes_little_more_than_the_dictionary(
    tmp_path: Path, write: Callable[[Path, int], Path], most: float
) -> None:
    dictlearn.load(write(tmp_path / "first", 64))  # what is imported and set up once
    path = write(tmp_path / "large", N)
    with most_used() as peak:
        loaded = dictlearn.load(path)
    assert isinstance(loaded, Dictionary)
    size = 4 * sum(parameter.numel() for parameter in loaded.parameters())
    assert size > 4 * 2 * D * N
    assert peak[0] < most * size, f"{peak[0] / size:.2f} x its size"
