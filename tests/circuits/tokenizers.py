"""Tokenizers of the kinds that language models have, made from a list of words without training or downloads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from string import digits, printable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dictlearn.circuits.tasks.base import Task

SPACE, META = "Ġ", "▁"  # how byte-level and sentencepiece tokens begin where a blank was
PAIRS = ["".join(pair) for pair in product(digits, repeat=2)]
TRIPLES = ["".join(triple) for triple in product(digits, repeat=3)]


def words_of(tasks: Sequence[Task]) -> list[str]:
    """All words of the tasks, each with and without a leading space, but for numbers."""
    texts = [
        text for task in tasks for text in (*task.templates, *(w for pool in task.pools.values() for w in pool))
    ]
    words = dict.fromkeys(w for text in texts for w in re.findall("[A-Za-z]+", text))
    return [f" {word}" for word in words] + list(words)


def gpt2_like(words: Sequence[str], numbers: str = r"\p{N}+") -> PreTrainedTokenizerFast:
    """Byte-level BPE, with GPT-2's way to cut text into words; `numbers` is what of a number is one word."""
    spelled = [word.replace(" ", SPACE) for word in words]
    vocab, merges = _merged(spelled, sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    cut = Regex(rf"'t| ?\p{{L}}+| ?{numbers}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+")
    parts = [
        pre_tokenizers.Split(cut, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def llama_like(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """BPE over whole texts with a blank put in front, digits one by one, line breaks as bytes, and <s> first."""
    spelled = [word.replace(" ", META) for word in words]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab, merges = _merged(spelled, [*special, META, *(c for c in printable if not c.isspace())])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = [normalizers.Prepend(META), normalizers.Replace(" ", META)]
    tokenizer.normalizer = normalizers.Sequence(blanks)  # pyright: ignore[reportAttributeAccessIssue]
    back = [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)  # pyright: ignore[reportAttributeAccessIssue]
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = template  # pyright: ignore[reportAttributeAccessIssue]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _merged(words: Sequence[str], alphabet: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges by which each word is put together from its left end; earlier words win.

    "17|76" is put together from 17 and 76, which must be among the words.
    """
    whole = [tuple(word.split("|")) for word in words if "|" in word]
    letters = [(word[:end], word[end]) for word in words if "|" not in word for end in range(1, len(word))]
    merges = dict.fromkeys([*letters, *((left, right) for left, right in whole)])
    tokens = dict.fromkeys([*alphabet, *(left + right for left, right in merges)])
    return {token: index for index, token in enumerate(tokens)}, list(merges)
