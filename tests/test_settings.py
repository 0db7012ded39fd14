"""Every setting of a dictionary refuses a word that means nothing to it, before the LM is loaded.

`python -m tests.test_settings` is asked, as the type checker of the tests would refuse wrong types first.
"""

import itertools
import json
import re
import subprocess
import sys
from typing import Any

from omegaconf import OmegaConf

from dictlearn.config import ConfigError
from dictlearn.training.run import check
from tests.runs import ROOT, composed

ALONE = ("experiment=single", "site=resid_post.1", "stream=sequences")
WORD = "foo"


def settings(group: str) -> list[tuple[str, str]]:
    """Choice and key of the values that the choices of a group have for themselves; of one class once."""
    found = []
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        own = leaves(OmegaConf.to_container(OmegaConf.load(path), resolve=False), group)
        if any(key.endswith("_target_") for key, _ in own):
            keys = [key for key, value in own if "${" not in str(value) and not key.endswith("_")]
            found += [(f"{group}={path.stem}", key) for key in keys]
    return found


def leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(key, value)]
    return [leaf for name, node in value.items() if name != "defaults" for leaf in leaves(node, f"{key}.{name}")]


def rounds() -> list[list[tuple[str, str]]]:
    """Settings that are wrong together: a dictionary's own, or one of each of its parts."""
    parts = itertools.zip_longest(*map(settings, ("sparsifier", "objective", "optimizer", "schedule")))
    together = [[one for one in given if one is not None] for given in parts]
    return [*([one] for one in settings("dictionary")), *together]


def refusals() -> dict[str, list[str]]:
    """By choice and key, the problems of a configuration where its value is a word."""
    found = {}
    for given in rounds():
        overrides = [*ALONE, *(part for choice, key in given for part in (choice, f"{key}={WORD}"))]
        try:
            check(composed("train", overrides), overrides)
            problems = []
        except ConfigError as error:
            problems = error.problems
        found |= {f"{choice} {key}": problems for choice, key in given}
    return found


def test_no_setting_takes_any_word() -> None:
    found = json.loads(subprocess.check_output([sys.executable, "-m", "tests.test_settings"], cwd=ROOT, text=True))
    assert len(found) > 40
    for setting, problems in found.items():
        name = re.escape(setting.rpartition(".")[2])
        said = rf"\b{name}\b.* (must|gives) .*, got \W*{WORD}\b"  # the setting, the rule, the value
        assert any(re.search(said, problem) for problem in problems), f"{setting}: {problems}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(refusals()))
