"""Training end to end: runs on a tiny LM, what is refused, and the door."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from torch import Tensor

from dictlearn.config import ConfigError
from dictlearn.data import Batch, Sequences
from dictlearn.dictionaries.linear import Linear
from dictlearn.lm import LM, activations, load_lm, reached, resolve
from dictlearn.losses.aux_k import AuxK
from dictlearn.losses.end_to_end import EndToEnd
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.training.callbacks import RandomState, periodic_checkpoint
from dictlearn.training.learner import Learner
from dictlearn.training.module import DictionaryTraining, Member
from dictlearn.training.optimizers import Adam
from dictlearn.training.plan import plan
from dictlearn.training.run import check
from dictlearn.training.schedules import WarmupDecay
from dictlearn.types import DictlearnError, Step
from tests.runs import composed, run_train
from tests.tiny_lms import tiny_lm_folder

D, ROWS, CTX = 16, 4, 8
READ = ("resid_post.1", "resid_post.2", "mlp_in.1", "mlp_out.1")
DOOR = ("experiment=single", "objective=end_to_end", "stream=sequences")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_lm(str(tiny_lm_folder(tmp_path_factory.mktemp("lm"), "llama", d_model=D)))


class RandomRows:
    """`n_steps` batches of rows of random tokens; some positions do not count."""

    def __init__(self, lm: LM, n_steps: int) -> None:
        self.lm, self.n_steps, self.position = lm, n_steps, 0
        self.tokens_per_batch = ROWS * (CTX - 1)

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[Sequences]:
        while self.position < self.n_steps:
            batch = self.batch(self.position)
            self.position += 1
            yield batch
        self.position = 0

    @torch.no_grad()
    def batch(self, index: int) -> Sequences:
        tokens = torch.randint(2, 97, (ROWS, CTX), generator=torch.Generator().manual_seed(index))
        mask = tokens % 10 != 0
        mask[:, 0] = False
        acts = activations(self.lm.model, [resolve(self.lm.model, name) for name in READ], tokens)
        copies = {name: act.clone() for name, act in acts.items()}
        return Sequences(copies, tokens, torch.arange(ROWS), mask, mask.flatten().nonzero().squeeze(-1))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def member(lm: LM, name: str, aux_k: bool = False, sparsifier: Any = None, **settings: Any) -> Member:
    reads, writes = ("mlp_in.1", "mlp_out.1") if name == "mlp" else ("resid_post.1", "resid_post.1")
    dictionary = Linear(D, D, 64, sparsifier or TopK(4), reads=[reads], writes=[writes])
    dictionary.initialise_(torch.Generator().manual_seed(0), torch.zeros(1, D), torch.zeros(1, D))
    term, written = EndToEnd(**settings), [resolve(lm.model, writes)]
    term.bind(written, dict.fromkeys(reached(lm.model, written, term.sites(lm.model)), 20.0))
    terms = {"end_to_end": term} | ({"aux_k": AuxK()} if aux_k else {})
    learner = Learner(name, dictionary, terms, torch.tensor([20.0]), 40, 1.0)
    return Member(learner, Adam(1e-2, 1.0, (0.9, 0.999), 6.25e-10, 1.0), WarmupDecay(2, 0.2))


def fit(lm: LM, members: list[Member], n_steps: int, callbacks: list[Any] | None = None, **arguments: Any) -> None:
    stream = RandomRows(lm, n_steps)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=n_steps,
        max_epochs=-1,
        logger=False,
        callbacks=callbacks or [],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DictionaryTraining(members, n_steps, stream.tokens_per_batch, lm)
    trainer.fit(module, stream, weights_only=True, **arguments)


def weights(trained: Member) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.learner.state_dict().items()}


def same(one: Member, other: Member) -> bool:
    theirs = weights(other)
    return all(torch.equal(value, theirs[name]) for name, value in weights(one).items())


def three(lm: LM) -> list[Member]:
    return [
        member(lm, "resid", aux_k=True, downstream=0.5),
        member(lm, "mlp", recon=0.1),
        member(lm, "relu", sparsifier=ReLU(0.01)),
    ]


def test_dictionaries_in_one_run_are_as_if_trained_alone_and_leave_the_lm_as_it_is(lm: LM, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    together = three(lm)
    fit(lm, together, 6, [periodic_checkpoint(tmp_path, 6)])
    for i, alone in enumerate(three(lm)):
        start = weights(alone)["dictionary.W_enc"]
        fit(lm, [alone], 6)
        assert same(alone, together[i]), alone.learner.name
        assert not torch.equal(weights(alone)["dictionary.W_enc"], start)
    assert together[0].learner.statistics.is_dead.any(), "AuxK must have run"
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in lm.model.parameters())
    module = DictionaryTraining(together, 6, 28, lm)
    own = {id(p) for made in together for p in made.learner.parameters()}
    assert {id(p) for p in module.parameters()} == own
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == module.state_dict().keys()


class Stop(L.Callback):
    """Ends the run as a killed process would."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 5:
            raise KeyError("killed")


def test_resume_is_bit_identical(lm: LM, tmp_path: Path) -> None:
    whole, resumed = three(lm), three(lm)
    fit(lm, whole, 8)
    with pytest.raises(KeyError, match="killed"):
        fit(lm, three(lm), 8, [Stop(), RandomState(), periodic_checkpoint(tmp_path, 8)])
    (checkpoint,) = tmp_path.glob("*.ckpt")
    fit(lm, resumed, 8, [RandomState(), periodic_checkpoint(tmp_path, 8)], ckpt_path=checkpoint)
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_objective_weighs_the_dictionarys_own_reconstruction() -> None:
    class Constant:
        recon_coefficient = 0.25

        def __call__(self, step: Step) -> Tensor:
            return step.recon.mean() * 0 + 3.0

    dictionary = Linear.tiny()
    x = torch.randn(8, 6)
    batch = Batch({"x": x}, *[torch.arange(8)] * 3)
    learner = Learner("x", dictionary, {"a": Constant(), "b": Constant()}, torch.tensor([2.0]), 1_000, None)
    recon = (x - dictionary(x).recon).square().sum(-1).mean() / 2.0
    torch.testing.assert_close(learner.loss(batch), 0.25 * 0.25 * recon + 6.0)


def test_chunks_of_a_batch_are_refused() -> None:
    with pytest.raises(DictlearnError, match=r"micro_batch_size=4 cuts rows .*, which objective\.e2e needs whole"):
        Learner("x", Linear.tiny(), {"e2e": EndToEnd()}, torch.ones(1), 1_000, None, micro_batch_size=4)


WRONG = [
    (
        ["stream=shuffled"],
        "objective.end_to_end runs the LM on whole rows: use stream=sequences, got stream=shuffled",
    ),
    (["data.store=folder"], "objective.end_to_end runs the LM in training: use data.store=null, got data.store="),
    (
        ["micro_batch_size=64"],
        "micro_batch_size=64 cuts rows of text apart, which objective.end_to_end needs whole",
    ),
    (["objective.end_to_end.kl=0"], "end_to_end.kl must be a positive number, got 0"),
    (["objective.end_to_end.sites=[resid_post.2]"], "end_to_end.sites has no effect without"),
    (
        ["objective.end_to_end.downstream=1", "objective.end_to_end.sites=[resid_post.7]"],
        "Site 'resid_post.7': the layer must be 0 to 3",
    ),
    (
        ["objective.end_to_end.downstream=1", "objective.end_to_end.sites=[resid_post.0,mlp_out.2]"],
        "sites must come after what the dictionary writes, resid_post.1; resid_post.0 does not depend on it",
    ),
    (["objective.end_to_end.downstream=1", "site=resid_post.3"], "No resid_post comes after resid_post.3"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_what_cannot_work_is_said_before_the_lm_loads(overrides: list[str], message: str) -> None:
    given = [*DOOR, "site=resid_post.1", *overrides]
    with pytest.raises(ConfigError) as error:
        check(composed("train", given), given)
    assert re.search(re.escape(message), str(error.value))
    assert len(error.value.problems) <= 2


def test_planted_data_predict_nothing() -> None:
    given = ["experiment=planted", "objective=end_to_end"]
    with pytest.raises(ConfigError) as error:
        check(composed("train", given), given)
    (problem,) = error.value.problems
    assert (
        problem
        == "objective.end_to_end needs the predictions of a language model, and these data have none of them"
    )


def test_a_nested_dictionary_is_refused_before_the_lm_loads() -> None:
    given = [*DOOR, "site=resid_post.1", "dictionary=matryoshka"]
    with pytest.raises(ConfigError, match="recon must be above 0 for a Matryoshka"):
        check(composed("train", given), given)


def test_the_plan_counts_the_passes_of_the_lm() -> None:
    """A forward for the clean logits, and a forward and a backward for each of two dictionaries."""
    given = ["experiment=single", "sites=[resid_post.1,resid_post.3]", "stream=sequences"]
    plain, ours = (plan(composed("train", [*given, f"objective={name}"])) for name in ("plain", "end_to_end"))
    assert ours.lm_flops > 5 * plain.lm_flops  # up to resid_post.3, without logits
    assert ours.lm_flops < 8 * plain.lm_flops
    assert ours.lm_memory - plain.lm_memory == 3 * 4 * 8 * 127 * 746  # logits of 8 rows, float32
    assert ours.dictionary_flops == plain.dictionary_flops


def test_a_run_learns_what_the_lm_predicts(tmp_path: Path) -> None:
    """The loss is the divergence in nats, which falls; a term of later sites has their activations captured."""
    small = (
        "n_tokens=6_000",
        "data.ctx=32",
        "optimizer.lr=3e-3",
        "evaluation.n_tokens=1_000",
        "~evaluation.blocks.reconstruction",
    )
    grid = "grid={objective.end_to_end.downstream:[0.0,0.3]}"
    results = run_train(tmp_path / "run", *DOOR, "site=resid_post.2", grid, *small)
    assert not results.errors
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    for name in results.reports:
        losses = table[f"{name}/loss"]
        assert losses.iloc[-1] < 0.6 * losses.iloc[0]
    final = results.reports["resid_post.2_downstream-0.0"]["behaviour"]["kl_rec"]
    assert final == pytest.approx(table["resid_post.2_downstream-0.0/loss"].iloc[-1], rel=0.3)


def test_the_last_layer_has_no_later_sites(tmp_path: Path) -> None:
    with pytest.raises(DictlearnError, match=r"No resid_post comes after resid_post\.3"):
        run_train(tmp_path / "run", *DOOR, "site=resid_post.3", "objective.end_to_end.downstream=1")
    assert not (tmp_path / "run").exists()
