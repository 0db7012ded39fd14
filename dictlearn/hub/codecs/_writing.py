"""What codecs that write share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dictlearn.dictionaries import Dictionary
from dictlearn.registry import kind_of
from dictlearn.types import DictlearnError


def check_inference(dictionary: Dictionary) -> None:
    """Raise DictlearnError unless it is one that `for_inference()` gives back."""
    scales = torch.cat([dictionary.read_scale, dictionary.write_scale])
    folded = torch.equal(scales, torch.ones_like(scales))
    own = dictionary.sparsifier.for_inference().kind == dictionary.sparsifier.kind
    if dictionary.inference_kind is not None or not folded or not own:
        raise DictlearnError("Only inference dictionaries are written: call for_inference() first.")


def check_held(holds: str, dictionary: Dictionary, reasons: Iterable[tuple[bool, str]]) -> None:
    """Raise DictlearnError where a reason applies why a format cannot hold it; `holds` says what it has."""
    check_inference(dictionary)
    for applies, reason in reasons:
        if applies:
            raise DictlearnError(
                f"{holds}; this dictionary cannot be written so because {reason}: use format=native."
            )


def lacks(
    dictionary: Dictionary, sparsifiers: Collection[str], kind: str = "linear", norms: Collection[str] = ("none",)
) -> list[tuple[bool, str]]:
    """Reasons for `check_held`, of a format that has these."""
    sparsifier, own = dictionary.sparsifier.kind, kind_of(dictionary)
    return [
        (own != kind, f"it is a {own} one"),
        (sparsifier not in sparsifiers, f"its sparsifier is {sparsifier} and not {' or '.join(sparsifiers)}"),
        (dictionary.input_norm not in norms, f"it has input_norm={dictionary.input_norm}"),
    ]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole safetensors file, or none."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda partial: save_file(on_cpu, partial))


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole file of torch.save, or none."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(path, lambda partial: torch.save(on_cpu, partial))


def write_text(path: Path, text: str) -> None:
    """A whole text file, or none."""
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    write(partial)
    partial.replace(path)
