"""dictionary_learning: states as its classes write them, against their forward rules in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import locate, save
from dictlearn.hub.files import local_files
from dictlearn.hub.places import places_at
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.jump_relu import JumpReLU
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError
from tests.hub.made import made, same

D, N, K = 6, 20, 3


def state(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layers = {"encoder.weight": random(N, D), "encoder.bias": random(N), "decoder.weight": random(D, N)}
    plain = {"W_enc": random(D, N), "b_enc": random(N), "W_dec": random(N, D), "b_dec": random(D)}
    gates = {name: 0.3 * random(N) for name in ("gate_bias", "mag_bias", "r_mag")}
    return {
        "AutoEncoder": {**layers, "bias": random(D)},
        "AutoEncoderNew": {**layers, "decoder.bias": random(D)},
        "GatedAutoEncoder": {
            "encoder.weight": layers["encoder.weight"],
            "decoder.weight": layers["decoder.weight"],
            "decoder_bias": random(D),
            **gates,
        },
        "AutoEncoderTopK": {**layers, "b_dec": random(D), "k": torch.tensor(K), "threshold": torch.tensor(0.7)},
        "BatchTopKSAE": {**layers, "b_dec": random(D), "k": torch.tensor(K), "threshold": torch.tensor(0.7)},
        "MatryoshkaBatchTopKSAE": {
            **plain,
            "k": torch.tensor(K),
            "threshold": torch.tensor(0.4),
            "group_sizes": torch.tensor([5, 15]),
        },
        "JumpReluAutoEncoder": {**plain, "threshold": 0.5 * random(N)},
    }[kind]


KINDS = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def write(folder: Path, kind: str, content: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state(kind)
    torch.save(tensors if content is None else content, folder / "ae.pt")
    cfg = {"trainer": {"dict_class": kind, "lm_name": "org/lm", "layer": 4, **trainer}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(cfg))
    return tensors


def rule(kind: str, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstructions, as the classes compute them."""
    w, x = {name: tensor.double() for name, tensor in tensors.items()}, x.double()
    if kind == "GatedAutoEncoder":
        pre = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        gate = (pre + w["gate_bias"] > 0).double()
        latents = gate * (w["r_mag"].exp() * pre + w["mag_bias"]).relu()
        return latents, latents @ w["decoder.weight"].T + w["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        pre = x @ w["W_enc"] + w["b_enc"]
        latents = (pre * (pre > w["threshold"])).relu()
        return latents, latents @ w["W_dec"] + w["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        post = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        latents = post * (post > w["threshold"])
        return latents, latents @ w["W_dec"] + w["b_dec"]
    encoder, decoder = w["encoder.weight"], w["decoder.weight"]
    if kind == "AutoEncoderNew":
        latents = (x @ encoder.T + w["encoder.bias"]).relu()
        return latents, latents @ decoder.T + w["decoder.bias"]
    if kind == "AutoEncoder":  # its from_pretrained normalises the decoder
        norms = decoder.norm(dim=0)
        latents = ((x - w["bias"]) @ (encoder * norms[:, None]).T + w["encoder.bias"] * norms).relu()
        return latents, latents @ (decoder / norms).T + w["bias"]
    post = ((x - w["b_dec"]) @ encoder.T + w["encoder.bias"]).relu()
    if kind == "AutoEncoderTopK":
        latents = torch.zeros_like(post)
        for row, values in zip(latents, post, strict=True):
            for i in sorted(range(N), key=lambda i: -float(values[i]))[:K]:
                row[i] = values[i]
    else:
        latents = post * (post > w["threshold"])
    return latents, latents @ decoder.T + w["b_dec"]


def check(folder: Path, kind: str, tensors: dict[str, Tensor]) -> Dictionary:
    loaded = dictlearn.load(folder)
    assert isinstance(loaded, Dictionary)
    x = 2 * torch.randn(50, D)
    latents, recon = rule(kind, tensors, x)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=1e-5, rtol=1e-5)
    assert 0 < float((latents > 0).double().mean()) < 0.9
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule(tmp_path: Path, kind: str) -> None:
    loaded = check(tmp_path, kind, write(tmp_path, kind))
    assert loaded.reads == ("resid_post.4",)
    assert loaded.metadata.items() >= {"lm_name": "org/lm", "ctx": 128}.items()


def trained(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A trainer's folder: the tensors at its end, and those of the checkpoint of step 500."""
    last, earlier = write(folder, kind), {name: t if name == "k" else t + 1 for name, t in state(kind).items()}
    (folder / "checkpoints").mkdir()
    torch.save(earlier, folder / "checkpoints" / "ae_500.pt")
    return last, earlier


@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "JumpReluAutoEncoder"])
def test_a_checkpoint_has_the_configuration_of_the_folder_above(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "resid_post_layer_4" / "trainer_0"
    last, earlier = trained(run, kind)
    check(run, kind, last)
    assert dictlearn.list(tmp_path) == [str(run)]
    loaded = dictlearn.load(f"{tmp_path}/resid_post_layer_4/trainer_0/checkpoints/ae_500.pt")
    assert isinstance(loaded, Dictionary)
    x = torch.randn(9, D)
    torch.testing.assert_close(loaded(x).recon.double(), rule(kind, earlier, x)[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("where", ["", "resid_post_layer_4", "resid_post_layer_4/trainer_0"])
def test_a_folder_holds_what_the_training_ended_with(tmp_path: Path, where: str) -> None:
    last, _ = trained(tmp_path / "resid_post_layer_4" / "trainer_0", "JumpReluAutoEncoder")
    check(tmp_path / where, "JumpReluAutoEncoder", last)


@pytest.mark.parametrize("pattern", ["*", "resid_post_layer_4/*", "resid_post_layer_4/trainer_*/*"])
def test_a_pattern_stands_for_what_the_trainings_ended_with(tmp_path: Path, pattern: str) -> None:
    for trainer in ("trainer_0", "trainer_1"):
        trained(tmp_path / "resid_post_layer_4" / trainer, "JumpReluAutoEncoder")
    if pattern == "resid_post_layer_4/*":
        found = locate(str(tmp_path / pattern))
        assert sorted(place.path for place in found.values()) == ["", ""]
        assert sorted(found) == ["trainer_0", "trainer_1"]
    else:  # of folders with two, and of files
        with pytest.raises(DictlearnError, match=r"holds 2 dictionaries|holds no dictionary"):
            locate(str(tmp_path / pattern))
    files = local_files(tmp_path)
    named = "resid_post_layer_4/trainer_0/checkpoints/ae_500.pt"
    assert places_at(files, named) == [named]
    below = places_at(files, "*")
    assert below == ["resid_post_layer_4/trainer_0", "resid_post_layer_4/trainer_1"]
    with pytest.raises(DictlearnError, match="has no dictionary"):
        places_at(files, "*/checkpoints/*")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_few_bits_are_folded_in_float32(tmp_path: Path, kind: str) -> None:
    stored = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state(kind).items()}
    write(tmp_path, kind, stored)
    check(tmp_path, kind, stored)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_is_put_into_raw_units(tmp_path: Path, kind: str) -> None:
    factor, tensors = 2.5, state(kind)
    biases = ("bias", "b_enc", "b_dec", "encoder.bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias")
    raw = {n: t * factor if n in (*biases, "threshold") else t for n, t in tensors.items()}
    backup = {"ae": tensors, "step": 5, "optimizer": {}, "config": {"lr": 1.0}, "norm_factor": factor}
    write(tmp_path, kind, backup)
    loaded = check(tmp_path, kind, raw)
    x = torch.randn(9, D)
    _, recon = rule(kind, tensors, x)  # of x, in normalised units
    torch.testing.assert_close(loaded(factor * x).recon.double(), factor * recon, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_a_relu(tmp_path: Path, kind: str) -> None:
    tensors = state(kind) | {"threshold": torch.tensor(-1.0)}
    write(tmp_path, kind, tensors)
    check(tmp_path, kind, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_configuration_the_tensors_tell_the_class(tmp_path: Path, kind: str) -> None:
    tensors = write(tmp_path, kind)
    (tmp_path / "config.json").unlink()
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(FormatError, match="are those of AutoEncoderTopK or BatchTopKSAE"):
            dictlearn.load(tmp_path)
    else:
        assert check(tmp_path, kind, tensors).reads == ("x",)


@pytest.mark.parametrize(
    ("name", "io", "site"),
    [
        ("resid_post_layer_8", "out", "resid_post.8"),
        ("resid_layer3", "out", "resid_post.3"),
        ("mlp_layer_2", "out", "mlp_out.2"),
        ("mlp_out_layer_2", "out", "mlp_out.2"),
        ("mlp_layer_2", "in", "mlp_in.2"),
        ("attn_layer_1", "out", "attn_out.1"),
        ("attn_layer_1", "in", "attn_in.1"),
        ("attention_layer_1", "out", "attn_out.1"),
        ("resid_post_layer_8", "in", "resid_pre.8"),
        ("mlp_layer_2", "in_and_out", "x"),
        ("embed", "out", "x"),
    ],
)
def test_the_site(tmp_path: Path, name: str, io: str, site: str) -> None:
    write(tmp_path, "AutoEncoderNew", submodule_name=name)
    cfg = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**cfg, "buffer": {"io": io}}))
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert loaded.reads == loaded.writes == (site,)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


GOOD = state("JumpReluAutoEncoder")
REFUSED: dict[str, tuple[Any, str]] = {
    "code": ({"W_enc": Code()}, "is not a torch file of tensors and plain values"),
    "a list": ([1, 2], "must hold a mapping, found list"),
    "no tensors": ({**GOOD, "cfg": "x"}, r"must hold tensors alone; \['cfg'\] are not"),
    "one missing": ({k: v for k, v in GOOD.items() if k != "b_enc"}, r"missing \['b_enc'\]"),
    "one more": ({**GOOD, "k": torch.tensor(3)}, r"unexpected \['k'\]"),
    "a wrong shape": (
        {**GOOD, "W_dec": GOOD["W_dec"].T.clone()},
        r"W_dec must have shape \[20, 6\], found \[6, 20\]",
    ),
    "NaN": ({**GOOD, "b_dec": torch.full((D,), torch.nan)}, "b_dec has values that are not finite"),
    "one axis": ({**GOOD, "W_enc": torch.ones(4)}, "must hold W_enc with two axes"),
    "sparse": ({**GOOD, "W_enc": GOOD["W_enc"].to_sparse()}, "W_enc must hold real numbers"),
    "complex": ({**GOOD, "W_enc": GOOD["W_enc"].to(torch.complex64)}, "W_enc must hold real numbers"),
    "a backup of 0": ({"ae": GOOD, "norm_factor": 0.0}, "norm_factor must be a positive number, got 0.0"),
    "a backup of text": ({"ae": GOOD, "norm_factor": "2"}, "norm_factor must be a positive number, got '2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = REFUSED[case]
    write(tmp_path, "JumpReluAutoEncoder")
    torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=f"ae.pt.*{message}"):
        dictlearn.load(tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["CrossCoder", 5, ["AutoEncoder"]])
def test_a_class_that_there_is_not(tmp_path: Path, kind: Any) -> None:
    write(tmp_path, "AutoEncoder", dict_class=kind)
    with pytest.raises(FormatError, match=r"the class must be one of AutoEncoder, .*are those of AutoEncoder"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("k", [torch.tensor(0), torch.tensor(2.5), torch.tensor(21), torch.tensor(True)])
def test_a_k_that_cannot_be(tmp_path: Path, k: Tensor) -> None:
    write(tmp_path, "AutoEncoderTopK", {**state("AutoEncoderTopK"), "k": k})
    with pytest.raises(FormatError, match=r"ae.pt: .*k must be"):
        dictlearn.load(tmp_path)


WRITTEN: dict[str, Any] = {
    "AutoEncoderNew": lambda: ReLU(0.0),
    "AutoEncoderTopK": lambda: TopK(K),
    "JumpReluAutoEncoder": lambda: JumpReLU(penalty="l0"),
}


@pytest.mark.parametrize(
    "site", ["resid_post.2", "mlp_out.11", "mlp_in.0", "attn_out.3", "resid_mid.4", "attn_z.1"]
)
@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written(tmp_path: Path, kind: str, site: str) -> None:
    """The rule of the class on the tensors gives what the dictionary does; they are read as the same dictionary."""
    dictionary = made(WRITTEN[kind](), (site, site), n_latents=N)
    save(dictionary, tmp_path, format="dictionary_learning")
    tensors = torch.load(tmp_path / "ae.pt")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state(kind).items()
    }
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["activation_dim"], trainer["dict_size"]) == (kind, D, N)
    assert trainer["k"] == (K if kind == "AutoEncoderTopK" else None)
    x = 2 * torch.randn(50, D)
    latents, recon = rule(kind, tensors, x)
    torch.testing.assert_close(dictionary.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x).recon.double(), recon, atol=1e-5, rtol=1e-5)
    loaded = dictlearn.load(tmp_path)
    same(loaded, dictionary, atol=1e-5 if kind == "AutoEncoderTopK" else 0.0)
    assert isinstance(loaded, Dictionary)
    assert loaded.metadata["ctx"] == 64


NOT_WRITTEN: dict[str, tuple[Any, str]] = {
    "group_max": (lambda: made(GroupMax(4)), "its sparsifier is group_max and not relu or top_k or jump_relu"),
    "transcoder": (lambda: made(TopK(K), ("mlp_in.2", "mlp_out.2")), "it is a transcoder"),
    "skip": (lambda: made(TopK(K), skip=True), "it has a skip path"),
    "centred": (lambda: made(TopK(K), input_norm="centre"), "it has input_norm=centre"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_what_is_not_written(tmp_path: Path, case: str) -> None:
    make, message = NOT_WRITTEN[case]
    with pytest.raises(DictlearnError, match=f"dictionary_learning has .* because {message}"):
        save(make(), tmp_path / "a", format="dictionary_learning")
    assert not (tmp_path / "a").exists()
