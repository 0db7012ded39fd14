"""Reading files that others have written: what is declared and not there, types without values, configurations."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dictlearn
from dictlearn.dictionaries import Dictionary
from dictlearn.hub import save
from dictlearn.hub.weights import check_tensors, encoder_sizes, number_in, read_json, read_npz, read_yaml
from dictlearn.types import FormatError
from tests.hub import test_circuit_tracer, test_gemma_scope, test_native, test_saelens_legacy
from tests.hub.test_native_cross_layer import change_own

ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, dtype=np.float32)}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_of_any_order_and_type(tmp_path: Path, write: Callable[..., None]) -> None:
    arrays = {
        **ARRAYS,
        "columns first": np.asfortranarray(ARRAYS["a"]),
        "half": ARRAYS["a"].astype(np.float16),
        "double, big-endian": ARRAYS["a"].astype(">f8"),
        "one": np.array(2.5),
        "none": np.zeros((0, 3)),
    }
    write(tmp_path / "a.npz", **arrays)
    read = read_npz(tmp_path / "a.npz", arrays)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name].numpy(), array)
        assert read[name].shape == array.shape


def npy(shape: str, dtype: str = "<f4", n_bytes: int = 48) -> bytes:
    """The header of an array of this shape, and this many bytes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(n_bytes)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", ["(1000000000000,)", "(13,)", "(11,)", "(4294967296, 4294967296)", "(-3, -4)"])
def test_an_array_has_the_values_that_its_header_declares(tmp_path: Path, shape: str, compression: int) -> None:
    """Nothing is allocated for more, and the members behind it are none of its values."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as file:
        file.writestr("a.npy", npy(shape))
        file.writestr("b.npy", npy("(12,)"))
    with pytest.raises(
        FormatError,
        match=r"a\.npz is not a whole npz file of arrays: (a\.npy has 48 bytes|.*negative|.*unknown dimension)",
    ):
        read_npz(tmp_path / "a.npz", ("a", "b"))


def test_a_compressed_array_is_no_larger_than_compression_can_make_it(tmp_path: Path) -> None:
    """Its size in the directory is what its header says, and far from what is there."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", npy("(1000000000,)"))
        info = file.infolist()[0]
    n_header = len(npy("(1000000000,)", n_bytes=0))
    true, declared = (size.to_bytes(4, "little") for size in (info.file_size, n_header + 4_000_000_000))
    (tmp_path / "a.npz").write_bytes(content.getvalue().replace(true, declared))
    with pytest.raises(FormatError, match=r"a\.npy has 4000000000 bytes"):
        read_npz(tmp_path / "a.npz", ("a", "b"))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("b.npy", npy("(3,)", "<f16")), "must hold arrays of real numbers; b are not"),
        (("b.npy", npy("(6,)", "<c8")), "must hold arrays of real numbers; b are not"),
        (("b.npy", npy("(6,)", "|O")), "it holds Python objects"),
        (("b.txt", b"hello"), r"has unexpected \['b.txt'\]"),
        (("b.npy", b""), "is not a whole npz file"),
    ],
)
def test_members_that_are_no_arrays_of_numbers(tmp_path: Path, member: tuple[str, bytes], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", npy("(12,)"))
        file.writestr(*member)
    with pytest.raises(FormatError, match=rf"a\.npz.*{message}"):
        read_npz(tmp_path / "a.npz", ("a", "b"))


def test_other_members_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", allow_pickle=True, **ARRAYS, more=np.zeros(10**6))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("a member was opened"))
    with pytest.raises(FormatError, match=r"a\.npz has unexpected \['more'\]; it may hold \['a', 'b'\]"):
        read_npz(tmp_path / "a.npz", ("a", "b"))


def test_json_of_more_than_any_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"a": "x" * 9_999_000}))
    assert len(read_json(tmp_path / "a.json")["a"]) == 9_999_000
    with (tmp_path / "b.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(FormatError, match=r"b\.json is not valid JSON: it has more than 10,000,000 bytes"):
        read_json(tmp_path / "b.json")


WITHOUT_VALUES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(3, 4, device="meta"), "must hold values, found 0 bytes"),
    "one value many times": (
        lambda: torch.ones(1, 1).expand(10**6, 10**6),
        r"must hold values, found 4 bytes for shape \[1000000, 1000000\]",
    ),
    "empty": (lambda: torch.ones(0, 10**12), "must hold values, found 0 bytes"),
    "float8": (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), "must hold real numbers, found torch.float8"),
    "unsigned": (lambda: torch.ones(3, 4, dtype=torch.uint64), "must hold real numbers, found torch.uint64"),
    "whole numbers": (lambda: torch.ones(3, 4, dtype=torch.int32), "must hold real numbers, found torch.int32"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(4)] * 3), "must hold real numbers"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
        "must hold real numbers, found torch.qint8",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_VALUES)
def test_tensors_without_values_of_their_own(case: str) -> None:
    make, message = WITHOUT_VALUES[case]
    tensor = make()
    shape = (3, 4) if tensor.is_nested else tuple(tensor.shape)
    with pytest.raises(FormatError, match=f"file.pt: a {message}"):
        check_tensors(Path("file.pt"), {"a": tensor}, {"a": shape})


def test_the_sizes_of_an_encoder_without_axes_of_its_own() -> None:
    nested = torch.nested.nested_tensor([torch.ones(4)] * 3)
    with pytest.raises(FormatError, match=r"file\.pt must hold W_enc with two axes"):
        encoder_sizes(Path("file.pt"), {"W_enc": nested}, "W_enc")


def test_whole_numbers_where_they_are_expected() -> None:
    tensors = {"k": torch.tensor(3), "b": torch.ones(2)}
    check_tensors(Path("file.pt"), tensors, {"k": (), "b": (2,)}, integers=("k",))
    with pytest.raises(FormatError, match=r"k must hold real numbers, found torch\.int64"):
        check_tensors(Path("file.pt"), tensors, {"k": (), "b": (2,)}, integers=("b",))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (2.5, 2.5),
        (torch.tensor(3), 3),
        (torch.tensor([2.5]), 2.5),
        (torch.ones(2), None),
        (torch.ones(()).to(torch.complex64), None),
        (torch.ones((), device="meta"), None),
        (torch.tensor(True), None),
        *((value, None) for value in (True, None, "3", [3])),
    ],
)
def test_the_number_in_a_value(value: Any, number: float | None) -> None:
    assert number_in(value) == number


MANY = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
MERGED = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a: [&a0 [x], {MANY}]", "it has more than 100,000 values"),
        ("a: &a [*a]", "it has more than 100,000 values"),
        (f"a0: &a0 {{x: 1}}\n{MERGED}", "(?s:.*)merge keys"),
        ("a: 0x" + "f" * 5000, "Exceeds the limit"),
        ("a: !!timestamp 5", "is not valid YAML"),
        ("a: !!int ''", "is not valid YAML"),
        ("? [1, 2]\n: 3", "is not valid YAML"),
        ("a: " + "[" * 9999, "is not valid YAML"),
        (r'a: "\ud800"', "surrogates not allowed"),
        ("a: " + "x" * 1_000_000, "it has more than 1,000,000 bytes"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    start = time.process_time()
    with pytest.raises(FormatError, match=rf"a\.yaml is not valid YAML: .*{message}|a\.yaml {message}"):
        read_yaml(tmp_path / "a.yaml")
    assert time.process_time() - start < 10


def test_other_values_of_yaml_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 2020-01-31\nb: &b [1, x]\nc: [*b, *b]\n4: null")
    assert read_yaml(tmp_path / "a.yaml") == {"a": "2020-01-31", "b": [1, "x"], "c": [[1, "x"]] * 2, "4": None}


def test_a_configuration_that_is_only_kept(tmp_path: Path) -> None:
    test_circuit_tracer.write(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "wandb-config.yaml").write_bytes(b"a: \xff")
    with pytest.raises(FormatError, match=r"wandb-config\.yaml is not valid YAML: 'utf-8' codec"):
        dictlearn.load(tmp_path)


def test_values_that_are_too_large_are_those_of_a_file(tmp_path: Path) -> None:
    test_gemma_scope.write(tmp_path, W_enc=1e300 * test_gemma_scope.arrays()["W_enc"].astype(np.float64))
    with pytest.raises(FormatError, match=r"params\.npz: the values are too large: W_enc would not be finite"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize("reads", ["xy", ["x", 5], None])
def test_sites_are_named_by_text(tmp_path: Path, reads: Any) -> None:
    save(test_native.CASES["dictlearn_crosscoder"](), tmp_path)
    change_own(tmp_path, reads=reads)
    with pytest.raises(FormatError, match=r"cfg\.json: reads must be a list of names of sites"):
        dictlearn.load(tmp_path)


@pytest.mark.parametrize(
    ("stated", "known"), [({}, (64, False)), ({"context_size": "64", "prepend_bos": 1}, (None,) * 2)]
)
def test_contexts_that_are_no_numbers_are_not_known(tmp_path: Path, stated: dict[str, Any], known: Any) -> None:
    test_saelens_legacy.write(tmp_path, test_saelens_legacy.FLAT | stated)
    loaded = dictlearn.load(tmp_path)
    assert isinstance(loaded, Dictionary)
    assert (loaded.metadata["ctx"], loaded.metadata["prepend_bos"]) == known
