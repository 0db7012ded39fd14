"""Shape annotations are checked in every test: jaxtyping with beartype over the whole package."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors, and workers share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (so that the hook finds it by name)

PACKAGE = Path(__file__).parents[1] / "dictlearn"
HOOKED = [  # all but the functions that Triton compiles from their source
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "triton" not in path.parts and path.stem != "__init__"
]
install_import_hook(HOOKED, "tests.typecheck.checked")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache; one cache for the whole test session."""
    monkeypatch.setenv("DICTLEARN_CACHE", str(tmp_path_factory.getbasetemp() / "dictlearn_cache"))
