"""Files of every format with something wrong in them give a FormatError, or a whole dictionary; nothing else.

Of more of them `python benchmarks/fuzz.py` does the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.registry import kinds
from dictlearn.types import FormatError
from tests.hub.fuzzing import Fuzz, check
from tests.hub.samples import SAMPLES, write

N_FILES = 100  # of each codec

pytestmark = pytest.mark.filterwarnings("ignore")  # of what writes and reads such files


def test_every_codec_has_a_sample() -> None:
    assert sorted(SAMPLES) == kinds("dictlearn.hub.codecs")
    assert all(SAMPLES.values())


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_read_by_the_codec_of_their_kind(tmp_path: Path, kind: str) -> None:
    for i, sample in enumerate(SAMPLES[kind]):
        ref = write(sample, tmp_path / str(i))
        if sample.refused:
            with pytest.raises(FormatError, match="is not supported because"):
                dictlearn.load(ref)
            continue
        loaded = dictlearn.load(ref)
        assert isinstance(loaded, Dictionary)
        check(loaded)
        assert loaded.metadata.get("source", {"format": "native"})["format"] == kind


@pytest.mark.parametrize("kind", SAMPLES)
def test_files_with_something_wrong(tmp_path: Path, kind: str) -> None:
    fuzz, n_loaded = Fuzz(kind, tmp_path), 0
    for seed in range(N_FILES):
        try:
            n_loaded += fuzz.loads(seed)
        except Exception as error:
            raise AssertionError(f"python benchmarks/fuzz.py --codecs {kind} --seed {seed} --n 1") from error
    assert n_loaded < 0.75 * N_FILES
    assert n_loaded or all(sample.refused for sample in SAMPLES[kind])


def test_files_are_put_back(tmp_path: Path) -> None:
    fuzz = Fuzz("sparsify", tmp_path)
    for seed in range(9):
        fuzz.loads(seed)
    assert all(target.path.read_bytes() == target.content for target in fuzz.targets)
