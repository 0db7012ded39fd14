"""The digest of the weights: what changes it and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dictlearn.lm.fingerprint as module
from dictlearn.lm import load_lm


@pytest.fixture
def lm(folder):
    return load_lm(str(folder("gpt2")))


def test_two_loads_agree(lm, folder, tmp_path):
    digest = lm.fingerprint()
    assert len(digest) == 16
    int(digest, 16)
    assert load_lm(str(folder("gpt2"))).fingerprint() == digest
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert load_lm(str(tmp_path)).fingerprint() == digest  # the folder does not count
    others = [load_lm(str(folder("gpt2")), dtype="bfloat16"), load_lm(str(folder("llama")))]
    assert len({digest, *(other.fingerprint() for other in others)}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bit_of_one_weight_changes_it(folder, dtype):
    lm = load_lm(str(folder("gpt2")), dtype=dtype)
    weight = lm.model.get_parameter("transformer.h.2.mlp.c_fc.weight")
    digest, old = lm.fingerprint(), weight[3, 5].clone()
    weight[3, 5] = torch.nextafter(old, torch.tensor(torch.inf, dtype=old.dtype))
    assert lm.fingerprint() != digest
    weight[3, 5] = old
    assert lm.fingerprint() == digest


def test_swapped_weights_change_it(lm):
    digest = lm.fingerprint()
    weight = lm.model.get_parameter("transformer.h.2.mlp.c_fc.weight")  # [16, 64]
    for swapped in ([1, 0, *range(2, 16)], [15, *range(1, 15), 0]):
        weight.copy_(weight[swapped].clone())
        assert lm.fingerprint() != digest
        weight.copy_(weight[swapped].clone())
    assert lm.fingerprint() == digest
    weight[0, 0], weight[9, 7] = weight[9, 7].item(), weight[0, 0].item()
    assert lm.fingerprint() != digest


def test_equal_shapes_that_trade_places_change_it(lm):
    digest = lm.fingerprint()
    one, two = (lm.model.get_parameter(f"transformer.h.{i}.ln_1.weight") for i in (0, 1))
    old = one.clone()
    one.copy_(two)
    two.copy_(old)
    assert lm.fingerprint() != digest


def test_sums_are_those_of_python_integers(monkeypatch):
    """At any chunk size and thread count, negative bits, bools and overflow included."""
    bias = torch.randint(-(2**63), 2**63 - 1, (37,))
    tensors = {"f": torch.randn(5, 7), "h": torch.randn(40).bfloat16(), "b": torch.rand(9) > 0.5, "i": bias}
    for value in tensors.values():
        bits = value.flatten().view(module.INT_OF_BYTES[value.element_size()]).tolist()
        exact = [sum(bits), sum(i * v for i, v in enumerate(bits))]
        wrapped = [(s + 2**63) % 2**64 - 2**63 for s in exact]
        for chunk in (3, 8, 2**17):
            monkeypatch.setattr(module, "CHUNK", chunk)
            assert module._sums(value).tolist() == wrapped


def test_neither_chunks_nor_threads_nor_layout_matter(monkeypatch):
    made = nn.Linear(300, 200)
    digest = module.fingerprint(made)
    monkeypatch.setattr(module, "CHUNK", 1000)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert module.fingerprint(made) == digest
    torch.set_num_threads(n_threads)
    made.weight.data = made.weight.data.T.contiguous().T
    assert module.fingerprint(made) == digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter(folder):
    for dtype in ("float32", "bfloat16"):
        digests = {
            load_lm(str(folder("gpt2")), dtype=dtype, device=device).fingerprint() for device in ("cpu", "cuda")
        }
        assert len(digests) == 1
