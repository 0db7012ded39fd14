"""The shipped LM: opens with plain Auto classes, is close to the bound, and does every task."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dictlearn.embedded import LM_FOLDER, document
from dictlearn.embedded.check import Row, check, held_out_loss, score, table
from dictlearn.embedded.tasks import TASKS, Prompt, prompts, prompts_of_all
from dictlearn.embedded.tokenizer import CONTEXT, build_tokenizer, token_ids
from dictlearn.embedded.train_lm import N_ROWS, batches, packed_rows, train

MEGABYTE = 1_000_000  # bytes


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(LM_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(lm: PreTrainedModel) -> dict[str, Row]:
    return {row.name: row for row in check(lm, n=200)}


def test_opens_with_auto_classes_in_the_stored_dtype() -> None:
    model = AutoModelForCausalLM.from_pretrained(LM_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(LM_FOLDER)
    assert model.dtype == torch.bfloat16
    assert model.config.n_layer == 4
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.bos_token_id == tokenizer.bos_token_id


def test_shipped_tokenizer_is_that_of_the_grammar() -> None:
    shipped = AutoTokenizer.from_pretrained(LM_FOLDER)
    assert shipped.get_vocab() == token_ids()
    for index in range(50):
        text = document(21, index).text
        assert shipped.decode(shipped(text).input_ids) == text
        assert shipped(text).input_ids == build_tokenizer().encode(text)


def test_is_small() -> None:
    assert sum(path.stat().st_size for path in LM_FOLDER.iterdir()) <= 4 * MEGABYTE


def test_generates_text(lm: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(LM_FOLDER)
    prompt = "When Mary and John went to the store, John gave a book to"
    ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt").input_ids
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)  # pyright: ignore[reportCallIssue]
    assert tokenizer.decode(out[0, ids.shape[1] :]) == " Mary."


def test_loss_is_just_above_the_bound(lm: PreTrainedModel) -> None:
    loss, bound = held_out_loss(lm, n_documents=320, seed=31)  # 20 k tokens
    assert bound - 0.02 < loss < bound + 0.1  # no model can be better than the text is random


@pytest.mark.parametrize("task", TASKS)
def test_does_the_task(rows: dict[str, Row], task: str) -> None:
    assert rows[task].passed, table(list(rows.values()))


def test_training_starts_to_learn_and_says_that_it_is_not_there(tmp_path: Path) -> None:
    passed = train(tmp_path / "lm", n_tokens=10 * N_ROWS * (CONTEXT - 1), seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    loss, bound = held_out_loss(model, n_documents=50)
    assert not passed
    assert bound + 1 < loss < 6.3  # ln(746) = 6.6 nats before training
    assert score(model, prompts("ioi", 20, seed=1), token_ids()).count(1.0) < 10


def test_prompts_are_prefixes_of_documents() -> None:
    texts = [document(5, index).text for index in range(100)]
    for task, asked in prompts_of_all(10, seed=5).items():
        assert len(asked) == 10
        for prompt in asked:
            assert any(text.startswith(prompt.text) for text in texts)
            if task != "greater_than":
                assert any(text.startswith(prompt.text + prompt.answers[0]) for text in texts)
            assert not set(prompt.answers) & set(prompt.wrong)
        assert asked[:5] == prompts(task, 5, seed=5)


def test_ioi_prompt_asks_for_the_name_that_did_not_give() -> None:
    for prompt in prompts("ioi", 20, seed=5):
        giver, receiver = prompt.wrong[0].strip(), prompt.answers[0].strip()
        sentence = [token.strip() for token in prompt.tokens[-24:]]
        assert sentence[::-1].index(giver) < sentence[::-1].index(receiver)


def test_unknown_task_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'nope'.*ioi, agreement"):
        prompts("nope", 1, seed=0)


def test_score_compares_what_the_docstring_says(lm: PreTrainedModel) -> None:
    asked = Prompt("ioi", prompts("ioi", 1, seed=1)[0].tokens, (" the",), ())
    assert score(lm, [asked], token_ids()) == [0.0]


def test_batches_from_the_other_process_are_the_packed_rows() -> None:
    bos, rows = token_ids()["<bos>"], packed_rows(seed=2)
    for batch in batches(seed=2, n_batches=2):
        assert batch.tolist() == [next(rows) for _ in range(N_ROWS)]
        assert batch.shape == (N_ROWS, CONTEXT)
        assert (batch[:, 0] == bos).all()
