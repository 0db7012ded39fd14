from pathlib import Path

import lightning as L
import pytest
import torch

from dictlearn.training.callbacks import RandomState, periodic_checkpoint


@pytest.mark.parametrize(("n_steps", "every"), [(100_000, 500), (5_000, 500), (1_000, 100), (45, 4), (5, 1)])
def test_checkpoints_come_every_500_steps_or_tenth_of_the_run(tmp_path: Path, n_steps: int, every: int) -> None:
    assert periodic_checkpoint(tmp_path, n_steps)._every_n_train_steps == every


def test_the_random_state_is_restored_at_the_first_step() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    torch.manual_seed(3)
    saved = RandomState().state_dict()
    expected = torch.rand(4)
    resumed = RandomState()
    resumed.load_state_dict(saved)
    torch.manual_seed(99)  # what setting up a run does to it
    resumed.on_train_batch_start(trainer, None, None, 0)
    assert torch.equal(torch.rand(4), expected)
    again = torch.rand(4)
    resumed.on_train_batch_start(trainer, None, None, 1)
    assert not torch.equal(torch.rand(4), again)
    assert not torch.equal(torch.rand(4), expected)  # restored once, not at every step
