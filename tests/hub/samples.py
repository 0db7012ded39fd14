"""Small valid files of every format that is read, as the tests of each codec write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.hub import save
from tests.hub import (
    test_circuit_tracer,
    test_circuit_tracer_clt,
    test_dictionary_learning,
    test_gemma_scope,
    test_gemma_scope_2,
    test_llama_scope,
    test_mats_sae_training,
    test_native,
    test_openmoss,
    test_saelens_legacy,
    test_sparsify,
    test_temporal,
    test_torch_files,
    test_transcoder_circuits,
)


class Sample(NamedTuple):
    """What writes files into a folder, and the reference to them below it; one that is refused is never read."""

    write: Callable[[Path], object]
    ref: str = ""
    refused: bool = False


def circuit_tracer() -> Iterator[Sample]:
    write = test_circuit_tracer.write
    for case in ("jump_relu, skip", "top_k", "bfloat16"):
        yield Sample(partial(write, more=test_circuit_tracer.CASES[case]))
    yield Sample(partial(write, activation="topk", k=3, feature_input_hook="ln2.hook_normalized"))
    yield Sample(_without_a_configuration)
    yield Sample(_of_a_list, refused=True)


def _without_a_configuration(folder: Path) -> None:
    test_circuit_tracer.write(folder)
    (folder / "config.yaml").rename(folder / "wandb-config.yaml")


def _of_a_list(folder: Path) -> None:
    listed = {**test_circuit_tracer.CONFIG, "transcoders": test_circuit_tracer.LISTS["files"][0]}
    (folder / "config.yaml").write_text(yaml.safe_dump(listed))


def circuit_tracer_clt() -> Iterator[Sample]:
    for case in ("jump_relu", "skip"):
        yield Sample(partial(test_circuit_tracer_clt.write, **test_circuit_tracer_clt.CASES[case]))


def dictionary_learning() -> Iterator[Sample]:
    write = test_dictionary_learning.write
    for kind in test_dictionary_learning.KINDS:
        yield Sample(partial(write, kind=kind))
    state = test_dictionary_learning.state("AutoEncoder")
    backup = {"ae": state, "step": 5, "optimizer": {}, "config": {"lr": 1.0}, "norm_factor": 2.5}
    yield Sample(partial(write, kind="AutoEncoder", content=backup))


def gemma_scope() -> Iterator[Sample]:
    yield Sample(test_gemma_scope.write)
    yield Sample(_compressed)


def _compressed(folder: Path) -> None:
    np.savez_compressed(folder / "params.npz", allow_pickle=False, **test_gemma_scope.arrays())


def gemma_scope_2() -> Iterator[Sample]:
    write, point = test_gemma_scope_2.write, f"{test_gemma_scope_2.LAYER}.output"
    cfg = {"hf_hook_point_in": point, "hf_hook_point_out": point}
    yield Sample(lambda folder: write(folder, test_gemma_scope_2.tensors(), cfg))
    yield Sample(lambda folder: write(folder, test_gemma_scope_2.tensors(d_out=4, skip=True)))
    yield Sample(partial(test_gemma_scope_2.write_layers, n_layers=2, d_out=4, skip=True))


def torch_files(*names: str) -> Iterator[Sample]:
    for name in names:
        release = test_torch_files.RELEASES[name]
        yield Sample(partial(test_torch_files.write, release=release), release.file)


def llama_scope() -> Iterator[Sample]:
    for settings in test_llama_scope.CASES.values():
        yield Sample(partial(test_llama_scope.write, **settings))


def mats_sae_training() -> Iterator[Sample]:
    for name in ("old.pkl.gz", "deep/old.pkl", "old.pt"):
        write = partial(test_mats_sae_training.write, name=name)
        yield Sample(write, name, refused=True)
        yield Sample(write, refused=True)


def native() -> Iterator[Sample]:
    for case in ("topk, layer_norm", "jumprelu_skip_transcoder", "dictlearn_linear", "dictlearn_crosscoder"):
        yield Sample(lambda folder, case=case: save(test_native.CASES[case](), folder))
    yield Sample(lambda folder: save(CrossLayer.tiny().for_inference(), folder))
    yield Sample(test_native.foreign)
    yield Sample(_gated)


def _gated(folder: Path) -> None:
    test_native.foreign(folder, architecture="gated", rescale_acts_by_decoder_norm=False)
    gates = {name: torch.randn(16) for name in ("b_gate", "r_mag", "b_mag")}
    test_native.change_weights(folder, b_enc=None, **gates)


def openmoss() -> Iterator[Sample]:
    for old, case in ((False, "jumprelu"), (True, "topk transcoder"), (False, "relu"), (True, "folded")):
        yield Sample(partial(test_openmoss.write, old=old, **test_openmoss.CASES[case]))


def saelens_legacy() -> Iterator[Sample]:
    for case in ("runner", "jumprelu", "gated", "topk by its architecture", "scaling_factor"):
        cfg, shapes, _ = test_saelens_legacy.CASES[case]
        yield Sample(partial(test_saelens_legacy.write, cfg=cfg, shapes=shapes))


def sparsify() -> Iterator[Sample]:
    for settings in test_sparsify.CASES.values():
        yield Sample(partial(test_sparsify.write, **settings))


def temporal() -> Iterator[Sample]:
    yield Sample(lambda folder: test_temporal.write(folder / "temporal"), refused=True)


def transcoder_circuits() -> Iterator[Sample]:
    yield Sample(_with_their_class)


def _with_their_class(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        file = test_transcoder_circuits.Save(patch, folder)
        file({"cfg": file.config(), "state_dict": test_transcoder_circuits.tensors()})


@contextmanager
def their_classes() -> Iterator[None]:
    """In here there are the classes of which the files hold objects."""
    with pytest.MonkeyPatch.context() as patch:
        test_transcoder_circuits.Save(patch, Path()).config()
        yield


SAMPLES = {
    "circuit_tracer": list(circuit_tracer()),
    "circuit_tracer_clt": list(circuit_tracer_clt()),
    "dictionary_learning": list(dictionary_learning()),
    "gemma_scope": list(gemma_scope()),
    "gemma_scope_2": list(gemma_scope_2()),
    "goodfire": list(torch_files("goodfire")),
    "kissane": list(torch_files("kissane")),
    "llama_scope": list(llama_scope()),
    "mats_sae_training": list(mats_sae_training()),
    "native": list(native()),
    "openai": list(torch_files("openai", "openai v5")),
    "openmoss": list(openmoss()),
    "qresearch": list(torch_files("qresearch")),
    "qwen_scope": list(torch_files("qwen")),
    "saelens_legacy": list(saelens_legacy()),
    "sparsify": list(sparsify()),
    "temporal": list(temporal()),
    "transcoder_circuits": list(transcoder_circuits()),
}


def write(sample: Sample, folder: Path) -> Path:
    """The files of a sample, always the same, in a new folder; the reference to them."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sample.write(folder)
    return folder / sample.ref
