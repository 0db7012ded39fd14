import sys
from pathlib import Path

import pytest

from dictlearn.registry import kind_of, kinds, lookup
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError


def test_kinds_are_the_files() -> None:
    expected = ["abs_top_k", "batch_top_k", "group_max", "jump_relu", "relu", "top_k"]
    assert kinds("dictlearn.sparsifiers") == expected


def test_lookup_returns_the_class_a_file_defines_not_one_it_imports() -> None:
    assert lookup("dictlearn.sparsifiers", "top_k") is TopK
    assert kind_of(TopK(3)) == "top_k"


def test_unknown_kind_lists_choices_and_the_nearest() -> None:
    with pytest.raises(DictlearnError, match=r"relu, top_k.*Did you mean 'top_k'"):
        lookup("dictlearn.sparsifiers", "topk")


@pytest.mark.parametrize("kind", ["base", "..types", "os", "top_k.TopK", ""])
def test_only_files_of_the_folder_can_be_named(kind: str) -> None:
    with pytest.raises(DictlearnError):
        lookup("dictlearn.sparsifiers", kind)


def test_a_new_file_is_a_new_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "things_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    source = "from decimal import Decimal\nclass Zero: ...\nclass First: ...\nclass _Hidden: ...\n"
    (package / "first.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert kinds("things_of_a_test") == ["first"]
    assert lookup("things_of_a_test", "first").__name__ == "First"
    sys.modules.pop("things_of_a_test")
