"""What a graph is of: a prompt, and logits of the likeliest next tokens or chosen ones. Needs no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dictlearn.circuits.graphs.graph import Logit
from dictlearn.dictionaries import Dictionary
from dictlearn.types import DictlearnError, TokenIds

LIKELIER = 10  # times, for a word with another spacing to be what was probably meant
Choice: TypeAlias = int | str | Sequence[int | str]  # a token, or two: the logit of the first above the second's


def prompt_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dictionaries: Mapping[str, Dictionary],
    prompt: str | Tensor,
) -> TokenIds:
    """The ids of a prompt, see `attribution_graph`; `name` is that of the LM.

    Raises DictlearnError for an empty prompt, one longer than the LM takes, and ids that it does not have.
    """
    ids = prompt if isinstance(prompt, Tensor) else _ids_of_text(tokenizer, name, dictionaries, prompt)
    if isinstance(prompt, Tensor) and not prompt.numel():
        raise DictlearnError(f"A graph needs a prompt, got an empty one: ids {list(ids.shape)}.")
    vocab = len(model.get_input_embeddings().get_parameter("weight"))
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or not is_whole or not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise DictlearnError(
            f"A prompt as token ids must be whole numbers [1, ctx] from 0 to {vocab - 1}, got {ids.dtype} "
            f"{list(ids.shape)}."
        )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] > most:
        raise DictlearnError(f"The prompt has {ids.shape[1]} tokens, and {name} takes {most} at most.")
    return ids


def _ids_of_text(
    tokenizer: PreTrainedTokenizerBase, name: str, dictionaries: Mapping[str, Dictionary], prompt: str
) -> TokenIds:
    if not isinstance(prompt, str):
        raise DictlearnError(f"A prompt is a text or a tensor of token ids [1, ctx], got {type(prompt).__name__}.")
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DictlearnError("A graph needs a prompt, got an empty one.")
    if any(d.metadata.get("prepend_bos") for d in dictionaries.values()) and ids[0] != tokenizer.bos_token_id:
        if tokenizer.bos_token_id is None:
            raise DictlearnError(f"The dictionaries need a beginning-of-sequence token, {name} has none.")
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor([ids])


def n_logits_of(model: PreTrainedModel) -> int:
    """The number of logits of a token."""
    head = model.get_output_embeddings()
    assert head is not None
    return len(head.get_parameter("weight"))


def likeliest(
    logits: Float[Tensor, " vocab"], max_logits: int, share: float
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The likeliest tokens that together have this probability, at most so many, and their probabilities."""
    found = logits.float().softmax(-1).topk(min(max_logits, len(logits)))
    before = found.values.cumsum(0) - found.values
    n = int((before < share).sum())
    return found.indices[:n], found.values[:n]


def check_choices(choices: Any) -> None:
    """Raise DictlearnError unless `choices` is a list of tokens (text or id) and pairs of them."""

    def is_token(one: Any) -> bool:
        return isinstance(one, str | int) and not isinstance(one, bool)

    def is_choice(one: Any) -> bool:
        is_pair = isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 2
        return is_token(one) or (is_pair and all(is_token(token) for token in one))

    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise DictlearnError(f"targets must be a list of tokens, or null, got {choices!r}.")
    if wrong := [one for one in choices if not is_choice(one)]:
        raise DictlearnError(
            "A target is a token, as text or id, or a pair of them for the difference of their logits, got "
            f"{wrong[0]!r}."
        )


def chosen(tokenizer: PreTrainedTokenizerBase, vocab: int, choices: Sequence[Choice]) -> list[Logit]:
    """The logits of `choices`, without probabilities, in a vocabulary of so many.

    Raises DictlearnError for a text that is not one token, an id that there is not, the difference of a token with
    itself, and one that is there twice.
    """
    check_choices(choices)
    found = []
    for choice in choices:
        pair = [choice] if isinstance(choice, str | int) else choice
        token, *others = [_token(tokenizer, vocab, one) for one in pair]
        texts = [str(tokenizer.decode([one])) for one in (token, *others)]
        if token in others:
            raise DictlearnError(f"The difference of {texts[0]!r} with itself is zero.")
        text = " - ".join(own.replace(" ", "␣") for own in texts) if others else texts[0]
        logit = Logit(text, token, *others)
        if logit in found:
            raise DictlearnError(f"Each target is named once, {logit.text!r} is there twice.")
        found.append(logit)
    return found


def with_probabilities(chosen: Sequence[Logit], logits: Float[Tensor, " vocab"]) -> list[Logit]:
    """The same with the probabilities of their tokens."""
    found = logits.float().softmax(-1)
    return [
        one._replace(
            probability=float(found[one.token]),
            minus_probability=None if one.minus is None else float(found[one.minus]),
        )
        for one in chosen
    ]


def doubtful(
    tokenizer: PreTrainedTokenizerBase, chosen: Sequence[Logit], logits: Float[Tensor, " vocab"]
) -> list[str]:
    """Of chosen tokens that are far likelier with a space before them, or without it: which is meant?"""
    probabilities, found = logits.float().softmax(-1), {}
    for token in (token for one in chosen for token in (one.token, one.minus) if token is not None):
        text = str(tokenizer.decode([token]))
        other = text[1:] if text.startswith(" ") else f" {text}"
        ids = torch.tensor(tokenizer(other, add_special_tokens=False)["input_ids"]).tolist()
        if len(ids) != 1 or ids[0] in (token, tokenizer.unk_token_id):
            continue
        p, p_other = float(probabilities[token]), float(probabilities[ids[0]])
        if p_other > LIKELIER * p:
            found[token] = f"{text!r} has probability {p:.2g}, {other!r} {p_other:.3g}: did you mean it?"
    return [*found.values()]


def _token(tokenizer: PreTrainedTokenizerBase, vocab: int, given: int | str) -> int:
    if isinstance(given, int):
        if not 0 <= given < vocab:
            raise DictlearnError(f"A target as token id must be from 0 to {vocab - 1}, got {given}.")
        return given
    ids = torch.tensor(tokenizer(given, add_special_tokens=False)["input_ids"]).tolist()
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([token])) for token in ids) or "nothing"
        raise DictlearnError(
            f"A target is one token, {given!r} is {len(ids)}: {pieces}. A space before a word matters."
        )
    if ids[0] == tokenizer.unk_token_id and given != tokenizer.unk_token:
        raise DictlearnError(f"The tokenizer does not know the target {given!r}.")
    return ids[0]
