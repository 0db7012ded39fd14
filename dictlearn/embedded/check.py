"""`python -m dictlearn.embedded.check [--lm FOLDER] [--n PROMPTS]`: does the LM do what its text demands?

Prints the held-out loss in nats per token (fresh documents one by one, BOS in front, the BOS that follows
predicted too), the bound of the generator on the same documents, and a score per task on fresh prompts
(`tasks.py` says what is right). Exits with 1 when a limit is missed.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from dictlearn.embedded import LM_FOLDER
from dictlearn.embedded.tasks import COMPARED, Prompt, prompts_of_all
from dictlearn.embedded.text import Document, documents
from dictlearn.embedded.tokenizer import BOS, PAD, token_ids

SEED = 1_000_003  # of the held-out text
MAX_GAP = 0.08  # nats per token above the bound
MIN_ACCURACY, MIN_LATER = 0.95, 0.8
BATCH = 100  # documents or prompts per forward pass


class Row(NamedTuple):
    """One line of the table; `passed` is None where there is no limit."""

    name: str
    value: float
    limit: str
    passed: bool | None


def batch_ids(rows: Sequence[Sequence[str]], ids: dict[str, int]) -> Tensor:
    """BOS + tokens of each row, padded on the right."""
    length = max(map(len, rows))
    padded = [[ids[BOS], *(ids[token] for token in row), *[ids[PAD]] * (length - len(row))] for row in rows]
    return torch.tensor(padded)  # [rows, 1 + length]


def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[batch, length, vocab] in float32."""
    return model(tokens, attention_mask=tokens != model.config.pad_token_id).logits.float()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, n_documents: int, seed: int = SEED) -> tuple[float, float]:
    """Loss of the model and bound of the generator, nats per predicted token."""
    ids = token_ids()
    held_out: list[Document] = list(islice(documents(seed), n_documents))
    n_tokens = sum(len(document.tokens) + 1 for document in held_out)
    loss = 0.0
    for start in range(0, n_documents, BATCH):
        rows = [(*document.tokens, BOS) for document in held_out[start : start + BATCH]]
        tokens = batch_ids(rows, ids).to(model.device)
        logits = _logits(model, tokens[:, :-1]).flatten(0, 1)
        loss += cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=ids[PAD], reduction="sum").item()
    return loss / n_tokens, sum(document.bound for document in held_out) / n_tokens


@torch.no_grad()
def score(model: PreTrainedModel, batch: Sequence[Prompt], ids: dict[str, int]) -> list[float]:
    """1 or 0 per prompt for right or wrong; the probability difference for greater_than."""
    tokens = batch_ids([prompt.tokens for prompt in batch], ids).to(model.device)
    last = torch.tensor([len(prompt.tokens) for prompt in batch])
    probs = _logits(model, tokens)[torch.arange(len(batch)), last].softmax(-1).cpu()  # [batch, vocab]
    scores = []
    for prompt, p in zip(batch, probs, strict=True):
        right, wrong = ([ids[token] for token in words] for words in (prompt.answers, prompt.wrong))
        if prompt.task == "greater_than":
            scores.append((p[right].sum() - p[wrong].sum()).item())
        elif prompt.task in COMPARED:
            scores.append(float(p[right[0]] > p[wrong[0]]))
        else:
            scores.append(float(p.argmax() == right[0]))
    return scores


def mean_score(model: PreTrainedModel, asked: Sequence[Prompt]) -> float:
    ids = token_ids()
    scores = [s for at in range(0, len(asked), BATCH) for s in score(model, asked[at : at + BATCH], ids)]
    return sum(scores) / len(scores)


def check(model: PreTrainedModel, n: int = 500) -> list[Row]:
    """The whole table; `n` prompts per task and as many documents."""
    model.eval()
    loss, bound = held_out_loss(model, n)
    rows = [
        Row("held-out loss, nats/token", loss, "", None),
        Row("bound of the generator", bound, "", None),
        Row("difference", loss - bound, f"<= {MAX_GAP}", loss - bound <= MAX_GAP),
    ]
    for task, asked in prompts_of_all(n, SEED).items():
        value, limit = mean_score(model, asked), MIN_LATER if task == "greater_than" else MIN_ACCURACY
        rows.append(Row(task, value, f">= {limit}", value >= limit))
    return rows


def table(rows: Sequence[Row]) -> str:
    verdict = {None: "", True: "ok", False: "BELOW THE LIMIT"}
    return "\n".join(f"{r.name:26} {r.value:8.4f}  {r.limit:8} {verdict[r.passed]}".rstrip() for r in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the embedded LM.")
    parser.add_argument("--lm", type=Path, default=LM_FOLDER, help="folder of the LM")
    parser.add_argument("--n", type=int, default=500, help="prompts per task, and held-out documents")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.lm, dtype=torch.float32)
    rows = check(model, args.n)
    print(table(rows))
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
