"""Loading: what comes out, and the reason when it cannot be loaded as it is."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dictlearn.lm import lm_config, load_lm, resolve, skeleton, widths
from dictlearn.types import DictlearnError
from tests.tiny_lms import CONFIGS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy_of_gpt2(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder("gpt2"), tmp_path / "lm"))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_loads_frozen_with_its_tokenizer(folder, input_ids, family):
    lm = load_lm(str(folder(family)))
    direct = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(lm.model(input_ids).logits, direct(input_ids).logits)
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert {p.dtype for p in lm.model.parameters()} == {torch.float32}
    eager = family in ("gemma2", "gptj")  # capped scores; not written for SDPA
    assert lm.model.config._attn_implementation == ("eager" if eager else "sdpa")
    assert (lm.name, lm.revision, lm.dtype) == (str(folder(family)), None, "float32")
    assert (lm.vocab_size, lm.n_positions, lm.d_model, lm.device.type) == (97, 64, 16, "cpu")
    assert lm.tokenizer("w2 w96 w10")["input_ids"] == [2, 96, 10]
    assert lm.tokenizer.bos_token_id == 0


def test_dtypes(folder):
    lm = load_lm(str(folder("llama")), dtype="bfloat16")
    assert lm.dtype == "bfloat16"
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_the_embedded_lm():
    lm = load_lm("embedded")
    assert (lm.name, lm.revision, lm.model.config.model_type, lm.d_model) == ("embedded", None, "gpt2", 128)
    assert widths(lm.model, [resolve(lm.model, "resid_post.2")]) == {"resid_post.2": 128}


def test_the_embedded_lm_is_a_folder_of_the_package(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("dictlearn.lm.load.LM_FOLDER", folder("gpt2"))
    lm = load_lm("embedded")
    assert lm.name == "embedded"
    assert lm.vocab_size == lm_config("embedded").vocab_size == 97
    monkeypatch.setattr("dictlearn.lm.load.LM_FOLDER", tmp_path / "none")
    with pytest.raises(DictlearnError, match=r"there is no folder .*none"):
        load_lm("embedded")


def test_a_hub_id_loads_from_the_cache_and_names_its_commit(folder, monkeypatch, tmp_path):
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(folder("gpt2"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "refs" / "step3").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "step3", COMMIT):
        lm = load_lm("someone/tiny", revision)
        assert (lm.name, lm.revision) == ("someone/tiny", COMMIT)
    with pytest.raises(DictlearnError, match=r"'someone/tiny' at revision 'step4' is not in the download cache"):
        load_lm("someone/tiny", "step4")


def test_a_skeleton_has_no_weights_and_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    model = skeleton(str(folder("gpt_neox")))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_loads_quietly_and_leaves_progress_bars_as_they_were(folder, capfd):
    shown = transformers_logging.is_progress_bar_enabled()
    load_lm(str(folder("gpt2")))
    assert "Loading" not in capfd.readouterr().err
    assert transformers_logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float61"}, r"lm.dtype must be one of float32, bfloat16, float16, got 'float61'"),
        ({"device": "cuda:64"}, r"device 'cuda:64' needs a GPU; torch sees \d+"),
        ({"device": "gpu"}, r"like cpu, cuda or cuda:0, got 'gpu'"),
        ({"revision": "main"}, r"lm.revision=main is for Hub ids, but .* is a folder"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(DictlearnError, match=message):
        load_lm(str(folder("gpt2")), **arguments)


@pytest.mark.parametrize("load", [load_lm, lm_config, skeleton])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing-9", r"'nobody/nothing-9' is not in the download cache \(.*HF_HUB_OFFLINE is set"),
        ("/no/such/folder", r"no folder /no/such/folder"),
        ("./nothing", r"no folder nothing"),
        ("a b", r"'a b' is neither a folder nor a Hub id: Repo id must.*lm.name takes 'embedded', a folder or"),
    ],
)
def test_unknown_names(load, name, message):
    with pytest.raises(DictlearnError, match=message):
        load(name)


def test_a_folder_without_config(copy_of_gpt2):
    (copy_of_gpt2 / "config.json").unlink()
    for load in (load_lm, lm_config, skeleton):
        with pytest.raises(DictlearnError, match=r"has no config.json; it has .*model.safetensors, tokenizer.json"):
            load(str(copy_of_gpt2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"Cannot read the config.*not a valid JSON"),
        ('{"model_type": "gpt22"}', r"Cannot read the config.*model type `gpt22`"),
        (
            '{"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}',
            r"custom code.*without running the repository's own",
        ),
        ('{"model_type": "t5"}', r"Cannot (build|load the weights of) .*AutoModelForCausalLM"),
        ('{"model_type": "gpt2", "n_head": "two"}', r"Cannot read the config.*n_head"),
    ],
)
def test_configs_that_are_no_causal_lm(copy_of_gpt2, config, message):
    (copy_of_gpt2 / "config.json").write_text(config)
    for load in (load_lm, skeleton):
        with pytest.raises(DictlearnError, match=message):
            load(str(copy_of_gpt2))


def test_missing_and_broken_weights(copy_of_gpt2):
    weights = copy_of_gpt2 / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(DictlearnError, match=r"Cannot load the weights of .*deserializing"):
        load_lm(str(copy_of_gpt2))
    weights.unlink()
    with pytest.raises(DictlearnError, match=r"Cannot load the weights of .*no file named model.safetensors"):
        load_lm(str(copy_of_gpt2))


def test_no_weight_is_ever_made_up(copy_of_gpt2):
    weights = copy_of_gpt2 / "model.safetensors"
    tensors = load_file(weights)
    lost = "transformer.h.1.mlp.c_fc.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(DictlearnError, match=rf"do not fit its config.json: 1 tensors .*{lost} is missing"):
        load_lm(str(copy_of_gpt2))
    save_file(tensors | {lost: torch.zeros(16, 8)}, weights, metadata={"format": "pt"})
    with pytest.raises(DictlearnError, match=rf"{lost} is \[16, 8\], not \[16, 64\]"):
        load_lm(str(copy_of_gpt2))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickled_weights_load_but_never_run_code(copy_of_gpt2, tmp_path, folder):
    tensors = load_file(copy_of_gpt2 / "model.safetensors")
    (copy_of_gpt2 / "model.safetensors").unlink()
    torch.save(tensors, copy_of_gpt2 / "pytorch_model.bin")
    state, expected = load_lm(str(copy_of_gpt2)).model.state_dict(), load_lm(str(folder("gpt2"))).model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    for save in (torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))):
        save({**tensors, "transformer.wte.weight": Payload(tmp_path / "ran")}, copy_of_gpt2 / "pytorch_model.bin")
        with pytest.raises(DictlearnError, match=r"Cannot load the weights of"):
            load_lm(str(copy_of_gpt2))
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_a_missing_tokenizer_is_an_error(folder, tmp_path, family):
    path = Path(shutil.copytree(folder(family), tmp_path / family))
    (path / "tokenizer.json").unlink()
    with pytest.raises(DictlearnError, match=r"tokenizer"):
        load_lm(str(path))
    (path / "tokenizer_config.json").unlink()  # transformers makes one without words for gpt2, gpt_neox, qwen3
    with pytest.raises(DictlearnError, match=r"comes without a tokenizer|Cannot load the tokenizer of"):
        load_lm(str(path))


def test_a_broken_tokenizer_is_an_error(copy_of_gpt2):
    (copy_of_gpt2 / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DictlearnError, match=r"Cannot load the tokenizer of"):
        load_lm(str(copy_of_gpt2))
