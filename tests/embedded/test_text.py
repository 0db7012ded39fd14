"""The generator: the same everywhere, exact probabilities, enough copying, one token per word."""

import hashlib
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice

import pytest

from dictlearn.embedded import Document, document, documents
from dictlearn.embedded.grammar import COPYING, WEIGHTS, vocabulary
from dictlearn.embedded.lexicon import GIFTS, NAMES, SPAN_WORDS, TOPICS
from dictlearn.embedded.text import P_END, write
from dictlearn.embedded.tokenizer import CONTEXT, build_tokenizer, token_ids
from dictlearn.embedded.writer import Writer

N = 500


@pytest.fixture(scope="module")
def held_out() -> list[Document]:
    return list(islice(documents(seed=11), N))


@pytest.fixture(scope="module")
def writers() -> list[Writer]:
    return [write(12, index) for index in range(8 * N)]


DIGEST = (
    "import hashlib; from dictlearn.embedded.text import document;"
    "print(hashlib.sha256(repr([document(7, i) for i in range(50)]).encode()).hexdigest())"
)


def test_text_is_the_same_in_another_process() -> None:
    here = hashlib.sha256(repr([document(7, index) for index in range(50)]).encode()).hexdigest()
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_text_is_what_the_shipped_lm_was_trained_on() -> None:
    """Changed on purpose? Then train the LM again (`python -m dictlearn.embedded.train_lm`)."""
    texts = "\x00".join((*vocabulary(), *(document(7, index).text for index in range(200))))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "990c4e0a5d6709cc"


def test_documents_are_addressed_by_index() -> None:
    assert next(documents(3, start=40)) == document(3, 40) == list(islice(documents(3), 41))[40]
    assert document(3, 40) != document(4, 40)


def test_tokens_join_to_the_text_and_fit_the_context(held_out: list[Document]) -> None:
    for doc in held_out:
        assert "".join(doc.tokens) == doc.text
        assert len(doc.tokens) == len(doc.log_probs) < CONTEXT
        assert max(doc.log_probs) <= 0
    assert 50 < sum(len(doc.tokens) for doc in held_out) / N < 80


def test_tokenizer_round_trip(held_out: list[Document]) -> None:
    tokenizer, ids = build_tokenizer(), token_ids()
    for doc in held_out:
        encoded = tokenizer.encode(doc.text)
        assert encoded == [ids[token] for token in doc.tokens]
        assert tokenizer.decode(encoded) == doc.text
    assert tokenizer.unk_token_id not in {i for doc in held_out for i in tokenizer.encode(doc.text)}


def test_names_years_and_verbs_are_one_token() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("Mary saw Mary.") == ["Mary", " saw", " Mary", "."]
    assert tokenizer.tokenize("The war lasted from 1732 to 1758.")[-6:] == [
        " 17",
        "32",
        " to",
        " 17",
        "58",
        ".",
    ]


def test_vocabulary_is_what_is_said(writers: list[Writer]) -> None:
    said = {token for w in writers for token in w.tokens}
    assert said <= set(vocabulary())
    assert len(set(vocabulary()) - said) < 5  # nothing is listed that is never said
    assert 600 <= len(token_ids()) <= 1000


def test_topics_share_no_word() -> None:
    """So the topic, a hidden choice, can be read off the text, and the probabilities are exact."""
    words = Counter(
        word
        for topic in TOPICS
        for word in {
            *(noun.token for noun in (*topic.people, *topic.things)),
            *topic.adjectives,
            *topic.places,
            *(form for verb in topic.verbs for form in verb[:3]),
        }
    )
    assert max(words.values()) == 1
    for words_drawn_anew in (NAMES, GIFTS, SPAN_WORDS):
        assert len(set(words_drawn_anew)) == len(words_drawn_anew)


def test_a_document_keeps_its_topic(writers: list[Writer]) -> None:
    topic_of = {noun.token: topic for topic in TOPICS for noun in topic.people}
    for w in writers:
        assert len({id(topic_of[token]) for token in w.tokens if token in topic_of}) <= 1


def test_kinds_have_their_shares(writers: list[Writer]) -> None:
    kinds = Counter(kind for w in writers for kind in w.kinds)
    total = sum(kinds.values())
    for kind, share in WEIGHTS.items():
        assert abs(kinds[kind] / total - share) < 5 * math.sqrt(share / total)
    assert sum(kinds[kind] for kind in COPYING) / total >= 0.15


# Places where the next token has the same distribution whatever came before, or given the tokens named.
NUMBER_OF = {noun.token: noun.plural for topic in TOPICS for noun in topic.things}
SAME_DISTRIBUTION: dict[str, Callable[[list[str], int], bool]] = {
    "first token": lambda _, i: i == 0,
    "first word after The": lambda t, i: i == 1 and t[0] == "The",
    "noun after its adjective": lambda t, i: t[i - 1] == " hungry" and t[i - 2] in {" The", "The", ":"},
    "what follows a singular subject": lambda t, i: i == 2 and t[0] == "The" and NUMBER_OF.get(t[1]) is False,
    "gift": lambda t, i: t[i - 2 : i] == [" lost", " the"],
    "first parameter": lambda t, i: t[i - 2 : i] == ["self", ","],
    "random word": lambda t, i: t[i - 1] == " Repeat",
    "list goes on": lambda t, i: i > 4 and t[i - 5 : i - 3] == [" met", " on"],
    "century": lambda t, i: t[i - 2 : i] == [" lasted", " from"],
}


@pytest.mark.parametrize("place", SAME_DISTRIBUTION)
def test_probabilities_match_frequencies(writers: list[Writer], place: str) -> None:
    counts, claimed = Counter[str](), dict[str, float]()
    for w in writers:
        for i, token in enumerate(w.tokens):
            if SAME_DISTRIBUTION[place](w.tokens, i):
                counts[token] += 1
                assert claimed.setdefault(token, w.log_probs[i]) == pytest.approx(w.log_probs[i])
    n = counts.total()
    probs = {token: math.exp(log_prob) for token, log_prob in claimed.items()}
    assert n > 40
    assert 0.75 < sum(probs.values()) < 1 + 1e-9  # less than 1 by what happened not to be seen
    for token, p in probs.items():
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1, (token, counts[token], n * p)


def test_probability_of_the_end(writers: list[Writer]) -> None:
    """After the fourth sentence a document ends with P_END, unless it has to."""
    chosen = [w for w in writers if w.pending != 0]
    assert {round(math.exp(w.pending), 9) for w in chosen} == {P_END}
    n_choices = sum(len(w.kinds) - 3 for w in chosen) + sum(len(w.kinds) - 4 for w in writers if w.pending == 0)
    assert abs(len(chosen) - P_END * n_choices) < 5 * math.sqrt(n_choices * P_END)
