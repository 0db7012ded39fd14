"""transcoder_circuits: files as it writes them, a Python object within, against its rule in float64."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.types import FormatError

D, N = 6, 20
NAME = "final_sparse_autoencoder_gpt2-small_blocks.8.ln2.hook_normalized_24576.pt"
CONFIG: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.ln2.hook_normalized",
    "hook_point_layer": 8,
    "hook_point_head_index": None,
    "context_size": 128,
    "d_in": D,
    "d_out": D,
    "d_sae": N,
    "is_transcoder": True,
    "out_hook_point": "blocks.8.hook_mlp_out",
    "out_hook_point_layer": 8,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "lr": 4e-4,
    "use_ghost_grads": (False,),
}


def tensors(d_out: int = D) -> OrderedDict[str, Tensor]:
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, d_out), "b_dec": (D,), "b_dec_out": (d_out,)}
    return OrderedDict((name, torch.randn(shape)) for name, shape in shapes.items())


class Save:
    """torch.save with a class that is gone when the file is read."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder = patch, folder

    def config(self, name: str = "sae_training.config.LanguageModelSAERunnerConfig", **attributes: Any) -> Any:
        module, _, cls = name.rpartition(".")
        made: Any = type(cls, (), {"__module__": module})
        parent = ModuleType(module.partition(".")[0])
        child = ModuleType(module)
        setattr(child, cls, made)
        self.patch.setitem(sys.modules, parent.__name__, parent)
        self.patch.setitem(sys.modules, module, child)
        config = made()
        vars(config).update(CONFIG | attributes)
        return config

    def __call__(self, content: Any, name: str = NAME) -> Path:
        torch.save(content, self.folder / name)
        self.patch.undo()
        assert "sae_training" not in sys.modules
        return self.folder / name


@pytest.fixture
def save(tmp_path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield Save(patch, tmp_path)


def load(path: Path) -> Dictionary:
    loaded = dictlearn.load(path)
    assert isinstance(loaded, Dictionary)
    return loaded


@pytest.mark.parametrize("d_out", [D, 4])
def test_the_rule(save: Save, d_out: int) -> None:
    w = tensors(d_out)
    path = save({"cfg": save.config(), "state_dict": w})
    loaded = load(path)
    x = 2 * torch.randn(50, D) + 1
    w64 = {name: tensor.double() for name, tensor in w.items()}
    rows, recons = [], []
    for token in x.double():  # the layer norm of GPT-2 without gain and bias: the biased variance, plus 1e-5
        mean = sum(token.tolist()) / D
        variance = sum((value - mean) ** 2 for value in token.tolist()) / D
        normed = (token - mean) / (variance + 1e-5) ** 0.5
        latents = ((normed - w64["b_dec"]) @ w64["W_enc"] + w64["b_enc"]).clamp(min=0)
        rows.append(latents)
        recons.append(latents @ w64["W_dec"] + w64["b_dec_out"])
    latents, recon = torch.stack(rows), torch.stack(recons)
    torch.testing.assert_close(loaded.encode(x).double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.encode_sparse(x).to_dense().double(), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded(x).recon.double(), recon, atol=2e-5, rtol=1e-5)
    assert (loaded.reads, loaded.writes) == (("resid_mid.8",), ("mlp_out.8",))
    assert loaded.metadata.items() >= {"lm_name": "gpt2", "ctx": 128, "prepend_bos": True}.items()
    assert torch.equal(load(path.parent).W_enc, loaded.W_enc)  # the only one in there


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


OTHER = "sae_training.config.Other"
ELSEWHERE = "other.config.LanguageModelSAERunnerConfig"
CODE: dict[str, Callable[[Save], Any]] = {
    "in place of the configuration": lambda _: {"cfg": Code(), "state_dict": tensors()},
    "in the configuration": lambda save: {"cfg": save.config(lr=Code()), "state_dict": tensors()},
    "in the weights": lambda save: {"cfg": save.config(), "state_dict": {**tensors(), "b_enc": Code()}},
    "of another class": lambda save: {"cfg": save.config(OTHER), "state_dict": tensors()},
    "of another module": lambda save: {"cfg": save.config(ELSEWHERE), "state_dict": tensors()},
}


@pytest.mark.parametrize("where", CODE)
def test_code_is_refused(save: Save, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(CODE[where](save))
    with pytest.raises(FormatError, match=f"{NAME} is not a torch file of tensors and plain values"):
        dictlearn.load(path)
    assert "run" not in capsys.readouterr().out.split()


class Reduced:
    """An object of the configuration's class that is made in another way than by its attributes."""

    def __init__(self, cls: type, args: tuple[Any, ...], state: Any) -> None:
        self.reduced = (cls, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("args", [(), (1, "two")])
@pytest.mark.parametrize("state", [None, 5, ["a"], (1, {"__class__": "int"})])
def test_the_class_that_stands_in_only_keeps_values(save: Save, args: tuple[Any, ...], state: Any) -> None:
    cls = type(save.config())
    path = save({"cfg": Reduced(cls, args, state), "state_dict": tensors()})
    with pytest.raises(FormatError, match="cfg must have attributes"):
        dictlearn.load(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"is_transcoder": False}, "cfg.is_transcoder=False is not supported because"),
        ({"hook_point": "blocks.8.hook_resid_mid"}, "cfg.hook_point='blocks.8.hook_resid_mid' is not supported"),
        ({"hook_point": None}, "cfg.hook_point=None is not supported"),
        ({"out_hook_point": "blocks.9.hook_mlp_out"}, "cfg.out_hook_point must be blocks.8.hook_mlp_out, got"),
    ],
)
def test_configurations_that_are_refused(save: Save, attributes: dict[str, Any], message: str) -> None:
    path = save({"cfg": save.config(**attributes), "state_dict": tensors()})
    with pytest.raises(FormatError, match=f"{NAME}: {message}"):
        dictlearn.load(path)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop("b_dec_out"), r"missing \['b_dec_out'\]"),
    "extra": (lambda w: w.update(more=torch.ones(1)), r"unexpected \['more'\]"),
    "shape": (lambda w: w.update(b_dec=torch.ones(3)), r"b_dec must have shape \[6\], found \[3\]"),
    "axes": (lambda w: w.update(W_dec=torch.ones(3)), r"W_dec must have shape \[20, 6\], found \[3\]"),
    "encoder": (lambda w: w.update(W_enc=torch.ones(3)), "must hold W_enc with two axes"),
    "nan": (lambda w: w["W_enc"].fill_(torch.nan), "W_enc has values that are not finite"),
    "overflow": (
        lambda w: [w[name].fill_(1e30) for name in ("W_enc", "b_dec")],
        "values are too large: b_enc would not",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(save: Save, damage: str) -> None:
    w = tensors()
    change, message = DAMAGES[damage]
    change(w)
    path = save({"cfg": save.config(), "state_dict": w})
    with pytest.raises(FormatError, match=f"{NAME}.*{message}"):
        dictlearn.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cfg": {}}, "must be of exactly one known format; it is none"),
        ({"cfg": {}, "state_dict": 3}, "state_dict must be a mapping, found int"),
        ({"cfg": 3, "state_dict": {}}, "cfg must have attributes, found int"),
        ([], "must hold a mapping, found list"),
    ],
)
def test_other_contents(save: Save, content: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dictlearn.load(save(content))


def test_a_truncated_file(save: Save) -> None:
    path = save({"cfg": save.config(), "state_dict": tensors()})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=f"{NAME} is not a torch file"):
        dictlearn.load(path)
