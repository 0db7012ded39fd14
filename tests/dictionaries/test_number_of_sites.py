"""What a coefficient weighs does not depend on the number of sites or layers: against copies of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.linear import Linear
from dictlearn.losses.aux_k import AuxK
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK

D, N, N_TOKENS = 6, 16, 50
DEAD = torch.tensor([2, 5, 11])
SPARSIFIERS: dict[str, Callable[[], Sparsifier]] = {
    "relu": lambda: ReLU(0.3),
    "p": lambda: ReLU(0.3, p=0.5),
    "tanh": lambda: JumpReLU(0.3, "tanh", threshold=0.4, pre_act_coefficient=0.2),
    "l0": lambda: JumpReLU(0.3, "l0", threshold=0.4, pre_act_coefficient=0.2),
    "target_l0": lambda: JumpReLU(0.3, "target_l0", target_l0=3.0, threshold=0.4, pre_act_coefficient=0.2),
    "top_k": lambda: TopK(3),
}
Gradients = dict[str, Tensor]
sparsifiers = pytest.mark.parametrize("kind", SPARSIFIERS)


def drawn(dictionary: Dictionary) -> None:
    """Any weights, in float64."""
    dictionary.double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in dictionary.named_parameters():
        if not name.startswith("sparsifier."):
            parameter.data.normal_(generator=generator)


def tokens(*axes: int) -> Tensor:
    return torch.randn(N_TOKENS, *axes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def total(
    dictionary: Dictionary, x: Tensor, y: Tensor, variance: list[float], dead: Tensor
) -> tuple[Tensor, Gradients]:
    """Reconstruction, penalty and, where there are no layers to choose among, AuxK; and their gradients."""
    step = dictionary.step(x, y, torch.tensor(variance, dtype=torch.float64), dead)
    parts = [*dictionary.losses(step).values(), dictionary.penalty(step)]
    parts += [] if dictionary.layered else [AuxK(0.5, k=2)(step)]
    loss = torch.stack([part for part in parts if part is not None]).sum()
    named = dict(dictionary.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(named.items(), found, strict=True)
    }


@pytest.mark.parametrize("n", [2, 5])
@sparsifiers
def test_a_crosscoder_of_copies_of_a_site_is_the_autoencoder_of_the_site(kind: str, n: int) -> None:
    """With an nth of its encoder and the whole of its decoder at each: the same loss, the same gradient of every
    encoder, and an nth of that of the decoder.
    """
    one = Linear(D, D, N, SPARSIFIERS[kind](), decoder_norm="free")
    drawn(one)
    sites = [f"copy.{i}" for i in range(n)]
    copies = Crosscoder(D, D, N, SPARSIFIERS[kind](), sites, sites, decoder_norm="free").double()
    with torch.no_grad():
        copies.W_enc.copy_(one.W_enc / n)
        copies.b_enc.copy_(one.b_enc)
        copies.W_dec.copy_(one.W_dec.unsqueeze(1))
        copies.b_dec.copy_(one.b_dec)
    x = tokens(D)
    loss, expected = total(one, x, x, [5.0], DEAD)
    many = x.unsqueeze(1).expand(-1, n, -1)
    found_loss, found = total(copies, many, many, [5.0] * n, DEAD)
    torch.testing.assert_close(found_loss, loss)
    for i in range(n):
        torch.testing.assert_close(found["W_enc"][i], expected["W_enc"])
        torch.testing.assert_close(found["W_dec"][:, i], expected["W_dec"] / n)
        torch.testing.assert_close(found["b_dec"][i], expected["b_dec"] / n)
    for name in expected.keys() - {"W_enc", "W_dec", "b_dec"}:
        torch.testing.assert_close(found[name], expected[name])


def test_a_crosscoder_weighs_a_latent_by_the_mean_of_its_norms() -> None:
    sites = ["a", "b", "c"]
    made = Crosscoder(D, D, N, ReLU(0.7), sites, sites)
    drawn(made)
    step = made.step(tokens(3, D), tokens(3, D), torch.tensor([1.0, 4.0, 7.0], dtype=torch.float64))
    assert isinstance(step.latents, Tensor)
    by_hand = sum(
        f * sum(float(row.square().sum().sqrt()) for row in made.W_dec[i].detach()) / 3
        for latents in step.latents
        for i, f in enumerate(latents.tolist())
    )
    penalty = made.penalty(step)
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.7 * by_hand / N_TOKENS / 2.0)  # the variance's mean is 4


def cross_layer(kind: str, n_layers: int) -> CrossLayer:
    names = range(n_layers)
    reads, writes = [f"in.{i}" for i in names], [f"out.{i}" for i in names]
    return CrossLayer(D, D - 1, n_layers * N, SPARSIFIERS[kind](), reads, writes).double()


@sparsifiers
def test_a_copy_of_every_layer_leaves_the_balance(kind: str) -> None:
    """Two layers, and the same two again behind them, to which the first ones write nothing: the same loss, and
    half of the gradient at each copy.
    """
    two, four = cross_layer(kind, 2), cross_layer(kind, 4)
    drawn(two)
    with torch.no_grad():
        four.W_enc.copy_(torch.cat([two.W_enc, two.W_enc], dim=1))
        four.b_enc.copy_(two.b_enc.repeat(2))
        four.b_dec.copy_(two.b_dec.repeat(2, 1))
        for i in (0, 1):
            for copy in (i, i + 2):
                four.get_parameter(f"W_dec_{copy}")[:, : 2 - i] = two.get_parameter(f"W_dec_{i}")
    x, y = tokens(2, D), tokens(2, D - 1)
    dead = torch.cat([DEAD, DEAD + N])
    loss, expected = total(two, x, y, [5.0, 3.0], dead)
    found_loss, found = total(
        four, x.repeat(1, 2, 1), y.repeat(1, 2, 1), [5.0, 3.0] * 2, torch.cat([dead, dead + 2 * N])
    )
    torch.testing.assert_close(found_loss, loss)
    for copy, own in ((0, slice(2 * N)), (2, slice(2 * N, 4 * N))):
        torch.testing.assert_close(found["W_enc"][:, own], expected["W_enc"] / 2)
        torch.testing.assert_close(found["b_enc"][own], expected["b_enc"] / 2)
        torch.testing.assert_close(found["b_dec"][copy : copy + 2], expected["b_dec"] / 2)
        for i in (0, 1):
            rows = found[f"W_dec_{i + copy}"][:, : 2 - i]
            torch.testing.assert_close(rows, expected[f"W_dec_{i}"] / 2)
            name = f"sparsifier._layers.{i}.threshold"
            assert (name in expected) == isinstance(two.sparsifier.layers[0], JumpReLU)
            if name in expected:
                threshold = found[f"sparsifier._layers.{i + copy}.threshold"]
                torch.testing.assert_close(threshold, expected[name] / 2)
