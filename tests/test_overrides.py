"""What the command line names and the configuration does not have."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from omegaconf import DictConfig

from dictlearn.config import ConfigError
from dictlearn.overrides import check, refuse_mistakes
from tests.runs import ROOT, command

CONF = ROOT / "conf"


@pytest.fixture
def hydra_conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


WRONG = [
    ("optimzer.lr=1", "no key 'optimzer.lr': did you mean optimizer.lr?"),
    ("n_token=3", "did you mean n_tokens?"),
    ("k=4", "did you mean sparsifier.k or objective.aux_k.k?"),
    ("lm=gpt3", "lm=gpt3: the choices are .*embedded.*did you mean gpt2?"),
    ("sparsifier=null", "sparsifier=null: the choices are .*relu, .*top_k"),
    ("experiment=sngle", "did you mean single?"),
    ("sparsifier=top_k,rleu", "sparsifier=rleu: the choices are .*relu, .*top_k: did you mean relu?"),
    ("lm.nme=1", "did you mean lm.name"),
    ("+foo=1", "foo is read by nothing"),
    ("+lm.device=cpu", "lm.device is read by nothing"),
    ("~evaluation.blocks.behavior", "did you mean evaluation.blocks.behaviour"),
    ("trainer.max_steps=3", "no key 'trainer.max_steps'"),
    ("+trainer.max_steps=3", "trainer.max_steps is read by nothing"),
    ("data.strea=true", r"there is no key 'data.strea' in EmbeddedText: did you mean store\?$"),
    ("dictionaries.resid.set.sparsifier.k=3", r"write 'dictionaries.resid.set=\{sparsifier.k:...\}'"),
    ("dictionaries.resid.optimizer.lr=3", r"write 'dictionaries.resid.set=\{optimizer.lr:...\}'"),
    ("~n_tokens", "n_tokens cannot be left out"),
    ("~lm", "lm cannot be left out: the choices are"),
    ("~optimizer.lr", "optimizer.lr cannot be left out"),
    ("+n_tokens=5", r"\+n_tokens adds a key, and there is one already: write n_tokens="),
    ("optimizer.lr", "'optimizer.lr' is no override, which is written key=value, in quotes where"),
    ("sites=resid_post.[01]", "is no override"),
]


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_mistake_says_what_was_meant(override: str, message: str) -> None:
    import re

    (problem,), right = check(CONF, "train", [override, "seed=3"])
    assert re.search(message, problem)
    assert right == ["seed=3"]


RIGHT = [
    "n_tokens=5",
    "sparsifier=relu",
    "dictionaries.resid.module.skip=true",
    "dictionaries.resid.set={sparsifier.k:3}",
    "~evaluation.blocks.behaviour",
    "+evaluation.blocks.mine._target_=a.b",
    "+optimizer.other=1",
    "++optimizer.lr=1",
    "objective=[aux_k,plain]",
    "grid={sparsifier.k:[1,2]}",
    "sites=resid_post.*",
    "hydra.job.chdir=true",
    "hydra/launcher=submitit_local",
]


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("override", RIGHT)
def test_what_is_right_passes(override: str) -> None:
    assert check(CONF, "train", [override]) == ([], [override])


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("override", ["sparsifier=top_k,relu", "sparsifier.k=8,16", "seed=range(1,4)"])
def test_several_values_are_a_sweep(override: str) -> None:
    assert check(CONF, "train", [override], multirun=True) == ([], [override])
    (problem,), _ = check(CONF, "train", [override])
    assert "is several values: add -m" in problem


@pytest.mark.usefixtures("hydra_conf")
def test_keys_of_a_chosen_group_are_known() -> None:
    assert check(CONF, "train", ["sparsifier=relu", "sparsifier.l1=1"])[0] == []
    (problem,) = check(CONF, "train", ["sparsifier.l1=1"])[0]
    assert problem.endswith(
        "there is no key 'sparsifier.l1' in TopK: it has k, k_start, anneal"
    )  # and takes no other
    (problem,) = check(CONF, "train", ["logger=tensorboard", "logger.tensorboard.prefix=a"])[0]
    assert problem.endswith("(to add an argument: +logger.tensorboard.prefix=...)")


def further(cfg: DictConfig, overrides: list[str], job: int | None) -> None:
    """Does not like a seed of 2, nor a first job."""
    found = [f"seed {cfg.seed} is bad"] if cfg.seed == 2 else []
    found += ["never the first"] if job == 0 else []
    if "name=x" in overrides:
        found.append("no x")
    if found:
        raise ConfigError(found)


def test_further_problems_join_the_list() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_mistakes(CONF, "train", ["sed=1", "seed=2", "n_tokens=${nothing}"], further)
    assert len(error.value.problems) == 2  # what cannot be resolved hides the rest
    with pytest.raises(ConfigError) as error:
        refuse_mistakes(CONF, "train", ["sed=1", "seed=2"], further)
    assert error.value.problems[1:] == ["seed 2 is bad"]
    refuse_mistakes(CONF, "train", ["seed=2"], further)  # the run itself says it
    refuse_mistakes(CONF, "train", ["--config-dir=elsewhere", "sed=1"], further)


def test_what_hydra_refuses_is_listed_too() -> None:
    for arguments in (["hydra/launcher=slrm"], ["-m", "hydra/launcher=slrm", "seed=1,2"]):
        with pytest.raises(ConfigError, match="hydra/launcher/slrm"):
            refuse_mistakes(CONF, "train", arguments, further)


def test_every_job_of_a_sweep_is_looked_at_first() -> None:
    with pytest.raises(ConfigError) as error:
        refuse_mistakes(CONF, "train", ["-m", "seed=1,2", "n_tokens=5,6", "name=x"], further)
    assert error.value.problems == [
        "seed=1 n_tokens=5: never the first",
        "no x",
        "seed=2 n_tokens=5: seed 2 is bad",
    ]
    refuse_mistakes(CONF, "train", ["-m", "seed=3,4", "hydra.sweeper.max_batch_size=1"], further)  # another order


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_the_doors_list_everything_without_a_traceback(script: str, tmp_path: Path) -> None:
    arguments = {
        "train.py": ["n_token=3", "expansion=0", "lm=gpt3", "site=x", f"run_dir={tmp_path / 'run'}"],
        "evaluate.py": ["n_token=3", "lm=gpt3", "load=5", f"out={tmp_path / 'file' / 'x'}"],
    }
    (tmp_path / "file").touch()
    process = command(script, *arguments[script])
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "has 4 problem(s)" in out
    assert "did you mean n_tokens?" in out
    assert "did you mean gpt2?" in out
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()
