"""Loading files with something wrong in them: a FormatError that names the file, or a whole dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.registry import lookup
from dictlearn.types import FormatError
from tests.hub.mutated_weights import mutated
from tests.hub.samples import SAMPLES, write


class Target(NamedTuple):
    """A file of a sample, what is in it, and the reference by which the sample is loaded."""

    folder: Path
    ref: Path
    path: Path
    content: bytes


class Fuzz:
    """The samples of a codec in `folder`, of whose files one at a time is changed."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.number = crc32(kind.encode())
        self.targets: list[Target] = []
        for i, sample in enumerate(SAMPLES[kind]):
            own = folder / f"{kind}_{i}"
            ref = write(sample, own)
            for path in sorted(path for path in own.rglob("*") if path.is_file()):
                self.targets.append(Target(own, ref, path, path.read_bytes()))

    def loads(self, seed: int) -> bool:
        """Whether the file of number `seed`, modulo the files, changed in the way of this seed, is loaded.

        Raises whatever loading does but for FormatError, and AssertionError where what is loaded is no dictionary.
        """
        target = self.targets[seed % len(self.targets)]
        content = mutated(target.path.name, target.content, np.random.default_rng([seed, self.number]))
        loaded, refusal = None, None
        try:
            _replace(target.path, content)
            loaded = dictlearn.load(target.ref)
        except FormatError as error:
            refusal = error
        finally:
            _replace(target.path, target.content)
        if refusal is not None:
            check_refusal(refusal, target.folder)
            return False
        assert isinstance(loaded, Dictionary)
        check(loaded)
        return True


def _replace(path: Path, content: bytes) -> None:
    """By another file: what has been read before may be a view of the old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def check(loaded: Dictionary) -> None:
    """All values are finite, shapes are those of the configuration, and so is what it does with random activations.

    That is in float64, as values that are finite in float32 may have products that are not.
    """
    for name, parameter in loaded.named_parameters():
        assert bool(parameter.isfinite().all()), f"{name} is not finite"
    assert all(isinstance(site, str) for site in (*loaded.reads, *loaded.writes))
    if "source" in loaded.metadata:
        assert isinstance(loaded.metadata["lm_name"], str | None)
        assert isinstance(loaded.metadata["ctx"], int | None)
        assert isinstance(loaded.metadata["prepend_bos"], bool | None)
    sparsifier = lookup("dictlearn.sparsifiers", loaded.sparsifier.kind)(**loaded.sparsifier.config())
    declared = type(loaded)(sparsifier=sparsifier, **loaded.config())
    assert {name: p.shape for name, p in declared.named_parameters()} == {
        name: p.shape for name, p in loaded.named_parameters()
    }
    double = loaded.double()
    x = torch.randn(3, *([len(loaded.reads)] if loaded.site_axis else []), loaded.d_in, dtype=torch.float64)
    recon = double(x).recon
    assert recon.shape == (3, *([len(loaded.writes)] if loaded.site_axis else []), loaded.d_out)
    assert bool(recon.isfinite().all()), "reconstructions are not finite"


def check_refusal(error: FormatError, folder: Path) -> None:
    """It names a file of the folder in text that can be printed, and what is declared was not allocated first."""
    assert folder.name in str(error), f"names no file: {error}"
    str(error).encode()
    cause: BaseException | None = error
    while (cause := cause.__cause__ or cause.__context__) is not None:
        assert "allocate" not in str(cause), f"allocated what a file declares: {cause}"
