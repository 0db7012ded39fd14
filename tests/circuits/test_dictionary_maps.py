"""A dictionary's linear maps against its own encoder and decoder, and against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dictlearn.circuits.dictionary_maps import (
    check_linear,
    decoder_rows,
    encoder_columns,
    layers_of_latents,
    skipped,
    token_norm,
    written_bias,
)
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries._input_norm import INPUT_NORMS, undone
from dictlearn.dictionaries.bilinear import Bilinear
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.types import DictlearnError

D_IN, D_OUT, N_LATENTS = 6, 5, 12
CASES = [*INPUT_NORMS, "several sites", "layers"]


def made(case: str, skip: bool = True) -> Dictionary:
    """Random in float64, with scales that are not folded."""
    a, b = ("a", "b", "c"), ("d", "e", "f")
    if case == "several sites":
        found = Crosscoder(D_IN, D_OUT, N_LATENTS, ReLU(0.0), a[:2], b, skip=skip)
    elif case == "layers":
        found = CrossLayer(D_IN, D_OUT, N_LATENTS, ReLU(0.0), a, b, skip=skip)
    else:
        d_out, write = (D_IN, "a") if undone(case) else (D_OUT, "d")
        found = Linear(D_IN, d_out, N_LATENTS, ReLU(0.0), ["a"], [write], skip=skip, input_norm=case)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        nn.init.normal_(parameter, generator=generator)
    for scale in (found.read_scale, found.write_scale):
        scale.uniform_(0.5, 2.0, generator=generator)
    return found.double()


def some_reads(dictionary: Dictionary) -> tuple[Tensor, Sequence[Tensor]]:
    """As the dictionary takes them, and by site."""
    axes = (3, 4, len(dictionary.reads), D_IN) if dictionary.site_axis else (3, 4, D_IN)
    x = torch.randn(axes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    return x, x.unbind(-2) if dictionary.site_axis else [x]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_columns_give_the_pre_activations(case: str) -> None:
    dictionary = made(case)
    x, by_site = some_reads(dictionary)
    found = dictionary.b_enc.expand(3, 4, -1)
    for read, own in enumerate(by_site):
        found = found + own @ encoder_columns(dictionary, read=read).T / token_norm(dictionary, own).divisor
    expected = dictionary.pre_activations(x)
    assert expected is not None
    close(found, expected)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_rows_skip_path_and_bias_give_what_is_written(case: str, skip: bool) -> None:
    dictionary = made(case, skip)
    x, by_site = some_reads(dictionary)
    latents = torch.randn(3, 4, N_LATENTS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    recon = dictionary.decode(latents, x)
    for write, expected in enumerate(recon.unbind(-2) if dictionary.site_axis else [recon]):
        found = latents @ decoder_rows(dictionary, write=write) + written_bias(dictionary, write)
        paths = 0
        for read, own in enumerate(by_site):
            part = skipped(dictionary, own, token_norm(dictionary, own).divisor, read, write)
            if part is not None:
                found, paths = found + part, paths + 1
        assert paths == (0 if not skip else 2 if case == "several sites" else 1)
        norm = token_norm(dictionary, by_site[0])
        close(found * norm.factor + (norm.shift if undone(dictionary.input_norm) else 0.0), expected)


def test_numbers_by_hand() -> None:
    d = Linear(2, 2, 2, ReLU(0.0), ["a"], ["d"], skip=True, input_norm="lm_layer_norm").double()
    for weight, value in (
        (d.W_enc, [[1.0, 2.0], [3.0, 8.0]]),
        (d.W_dec, [[2.0, -6.0], [0.0, 1.0]]),
        (d.b_dec, [8.0, 4.0]),
        (d.W_skip, [[1.0, 0.0], [0.0, 2.0]]),
        (d.read_scale, [10.0]),
        (d.write_scale, [4.0]),
    ):
        assert weight is not None
        weight.data.copy_(torch.tensor(value))
    columns = encoder_columns(d)  # (1, 3) and (2, 8), ten times, about their means 20 and 50
    assert columns.tolist() == [[-10.0, 10.0], [-30.0, 30.0]]
    assert decoder_rows(d).tolist() == [[0.5, -1.5], [0.0, 0.25]]
    assert written_bias(d).tolist() == [2.0, 1.0]
    x, divisor = torch.tensor([3.0, 1.0]).double(), torch.tensor([0.5]).double()  # not the token's own, which is 1
    written = skipped(d, x, divisor)  # (1, -1) / 0.5 * 10 = (20, -20), written as (20, -40) / 4
    assert written is not None
    assert written.tolist() == [5.0, -10.0]
    assert float(token_norm(d, x).divisor) == pytest.approx((1 + 1e-5) ** 0.5)


def test_latents_of_layers_read_once_and_write_from_there_on() -> None:
    dictionary = made("layers")
    assert layers_of_latents(dictionary, torch.arange(N_LATENTS)).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    columns = torch.stack([encoder_columns(dictionary, read=read) for read in range(3)])
    assert (columns.abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    rows = torch.stack([decoder_rows(dictionary, write=write) for write in range(3)], dim=1)
    close(rows, dictionary.W_dec / dictionary.write_scale.unsqueeze(-1))
    assert not rows[4:8, 0].any()
    x = torch.ones(1, D_IN).double()
    assert skipped(dictionary, x, torch.ones(1, 1).double(), read=0, write=1) is None


@pytest.mark.parametrize("case", ["centre", "several sites", "layers"])
def test_some_latents(case: str) -> None:
    dictionary, some = made(case), torch.tensor([7, 0, 11])
    place = 1 if dictionary.site_axis else 0
    for part in (encoder_columns, decoder_rows):
        assert torch.equal(part(dictionary, some, place), part(dictionary, None, place)[some])
        for wrong in ([12], [-1, 0]):
            with pytest.raises(DictlearnError, match=rf"There are latents 0 to 11, got {wrong[0]}\."):
                part(dictionary, torch.tensor(wrong))


def test_float32_at_least() -> None:
    dictionary = made("layers").bfloat16()
    x = torch.ones(2, D_IN).bfloat16()
    written = skipped(dictionary, x, token_norm(dictionary, x).divisor)
    assert written is not None
    for found in (encoder_columns(dictionary), decoder_rows(dictionary), written_bias(dictionary), written):
        assert found.dtype == torch.float32
        assert not found.requires_grad
    exact = made("layers").bfloat16().double()
    exact.read_scale, exact.write_scale = dictionary.read_scale.double(), dictionary.write_scale.double()
    torch.testing.assert_close(encoder_columns(dictionary).double(), encoder_columns(exact), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(decoder_rows(dictionary).double(), decoder_rows(exact), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["several sites", "layers", "bilinear"])
def test_encoders_that_are_not_linear_in_one_read(case: str) -> None:
    dictionary = Bilinear.tiny() if case == "bilinear" else made(case)
    message = rf"Paths need a linear encoder of one read site, not that of a {type(dictionary).__name__} that reads"
    with pytest.raises(DictlearnError, match=message):
        check_linear(dictionary, "Paths need")
    check_linear(made("rms_norm"), "Paths need")
