"""Frozen language models from a folder, the Hugging Face Hub or the package itself.

No code and no arbitrary pickle of a downloaded repository is ever run: remote code is refused, weights come from
safetensors where there are any, and from `pytorch_model.bin` with torch's weights-only unpickler otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from dictlearn.choices import DTYPES
from dictlearn.embedded import LM_FOLDER
from dictlearn.lm.download import CHOICES, commit_of
from dictlearn.lm.fingerprint import fingerprint
from dictlearn.types import DictlearnError

UNREADABLE = (OSError, ValueError, StrictDataclassError, SafetensorError, UnpicklingError)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json")
GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # transformers 5 and 4


class LM(NamedTuple):
    """A frozen language model in eval mode.

    `name` is what the user wrote; `revision` the commit loaded from the Hub, None for a folder; `dtype` the type
    of the weights and activations ("float32", "bfloat16" or "float16").
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    dtype: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Number of logits of a token."""
        return self.model.config.get_text_config().vocab_size

    @property
    def n_positions(self) -> int | None:
        """The longest context the model was made for, in tokens; None if its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the weights, whatever their name and device; a second per 2 GB."""
        return fingerprint(self.model)


def load_lm(name: str, revision: str | None = None, dtype: str | None = None, device: str = "cpu") -> LM:
    """Load a causal LM and its tokenizer, frozen.

    Attention is transformers' default: SDPA, and eager for the few architectures without it.

    Args:
        name: "embedded" for the LM that ships with the package, a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.
        dtype: float32, bfloat16 or float16; None means bfloat16 on CUDA and float32 elsewhere.

    Raises DictlearnError with the reason for whatever cannot be loaded as it is: a missing folder, file, weight
    tensor or tokenizer, weights of another shape, an unknown dtype or device.
    """
    target = find_device(device)
    dtype = dtype or ("bfloat16" if target.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise DictlearnError(f"lm.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    source, commit = _source(name, revision)
    _config(name, source, commit)
    with nullcontext() if commit else _no_bars():
        model = _weights(name, source, commit, getattr(torch, dtype)).eval().requires_grad_(False)
    tokenizer = _tokenizer(name, source, commit)
    nn.Module.to(model, target)
    return LM(model, tokenizer, name, commit, dtype)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model, without its weights. Raises DictlearnError when it cannot be read."""
    return _tokenizer(name, *_source(name, revision))


def lm_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The config of a language model, without its weights. Raises DictlearnError when it cannot be read."""
    return _config(name, *_source(name, revision))


def skeleton(name: str, revision: str | None = None) -> PreTrainedModel:
    """The modules of a language model on the meta device: resolves sites without loading or drawing weights.

    Raises DictlearnError when the config cannot be read or is not that of a causal LM.
    """
    config = lm_config(name, revision)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except UNREADABLE as error:
        raise _cannot("build", name, revision, error) from error


def _source(name: str, revision: str | None) -> tuple[str, str | None]:
    """The folder that `name` stands for, and None, or the Hub id and its commit at `revision`."""
    path = LM_FOLDER if name == "embedded" else Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise DictlearnError(f"lm.revision={revision} is for Hub ids, but {name} is a folder.")
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.iterdir())[:8]
            raise DictlearnError(
                f"A folder with a language model holds config.json, weights and a tokenizer, but {path} has no "
                f"config.json; it has {', '.join(files) or 'no files'}."
            )
        return str(path), None
    if name == "embedded" or name.startswith(("/", "./", "../", "~")):
        raise DictlearnError(f"lm.name must be a folder or a Hub id, but there is no folder {path}.")
    return name, commit_of(name, revision)


def model_of(lm: LM | PreTrainedModel) -> PreTrainedModel:
    """The model itself, where either may be given."""
    return lm.model if isinstance(lm, LM) else lm


def find_device(name: Any) -> torch.device:
    """The device of a name. Raises DictlearnError for a malformed name, and for a GPU that torch does not see."""
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DictlearnError(f"device must be like cpu, cuda or cuda:0, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DictlearnError(f"device {name!r} needs a GPU; torch sees {torch.cuda.device_count()} here.")
    return device


def _config(name: str, source: str, commit: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
    except UNREADABLE as error:
        raise _cannot("read the config of", name, commit, error) from error


def _weights(name: str, source: str, commit: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """transformers fills tensors that it does not find with random numbers; here that is an error."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=commit,
            dtype=dtype,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise _cannot("load the weights of", name, commit, error) from error
    model, info = loaded
    wrong = {key: f"is {list(found)}, not {list(expected)}" for key, found, expected in info["mismatched_keys"]}
    wrong |= dict.fromkeys(info["missing_keys"], "is missing")
    if wrong:
        first = ", ".join(f"{key} {what}" for key, what in sorted(wrong.items())[:4])
        raise DictlearnError(
            f"The weights of language model {name!r} do not fit its config.json: {len(wrong)} tensors are "
            f"missing or of another shape ({first})."
        )
    return model


def _tokenizer(name: str, source: str, commit: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as its files describe it.

    A tokenizer saved under a generic class is its tokenizer.json and nothing else, but AutoTokenizer replaces it
    for some model types (a Llama-style tokenizer of a `qwen2` model gets Qwen's word splitting), so it is opened
    directly. Where all files are missing, transformers makes a tokenizer without words; here that is an error.
    """
    try:
        local = commit is None or _tokenizer_is_cached(source, commit)
        saved_as = get_tokenizer_config(source, revision=commit, local_files_only=local).get("tokenizer_class")
        opener = PreTrainedTokenizerFast if saved_as in GENERIC_TOKENIZERS else AutoTokenizer
        tokenizer = opener.from_pretrained(
            source, revision=commit or "main", local_files_only=local, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise _cannot("load the tokenizer of", name, commit, error) from error
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise DictlearnError(
            f"Language model {name!r} comes without a tokenizer: it has neither tokenizer.json nor another "
            "vocabulary file."
        )
    return tokenizer


def _tokenizer_is_cached(source: str, commit: str) -> bool:
    """Whether of each file it is known what the repository has: else transformers asks the Hub, at length."""
    return all(try_to_load_from_cache(source, file, revision=commit) is not None for file in TOKENIZER_FILES)


def _cannot(what: str, name: str, revision: str | None, error: Exception) -> DictlearnError:
    at = f" at revision {revision!r}" if revision else ""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DictlearnError(f"Cannot {what} language model {name!r}{at}: {reason} {CHOICES}")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Reading a folder takes moments: progress bars are for downloads."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
