"""Imports point only downwards, and nothing heavy is imported by `import dictlearn`."""

import ast
import subprocess
import sys
from pathlib import Path

import dictlearn

PACKAGE = Path(dictlearn.__file__).parent
LAYER = {
    "types": 0,
    "registry": 0,
    "choices": 0,
    "checks": 0,
    "ramp": 0,
    "config": 0,
    "files": 0,
    "overrides": 0,
    "kernels": 0,
    "sparsifiers": 1,
    "lm": 1,
    "embedded": 0,
    "metrics": 1,
    "losses": 2,
    "dictionaries": 3,
    "data": 3,
    "hub": 4,
    "splice": 4,
    "evaluation": 5,
    "circuits": 7,
    "training": 6,
}


def imported(tree: ast.AST) -> set[str]:
    """Parts of dictlearn that a module imports at run time (not under TYPE_CHECKING)."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = (name.split(".") for name in names)
    return {part[1] for part in parts if part[0] == "dictlearn" and len(part) > 1}


def test_every_module_has_a_layer() -> None:
    found = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert {name for name in found if not name.startswith(("_", "."))} == set(LAYER)


def test_imports_point_downwards() -> None:
    upwards = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue  # the lazy public doors
        for other in imported(ast.parse(path.read_text())) - {own}:
            same_package = LAYER[other] == LAYER[own] and LAYER[own] == 0
            if LAYER[other] >= LAYER[own] and not same_package:
                upwards.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not upwards


def test_the_layer_test_sees_imports() -> None:
    tree = ast.parse(
        "from dictlearn.hub import load\nimport dictlearn.lm.load\nif TYPE_CHECKING:\n  import dictlearn.data"
    )
    assert imported(tree) == {"hub", "lm"}


def test_the_doors_are_listed() -> None:
    code = "import dictlearn; print(dir(dictlearn))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"attach", "list", "load", "push"} <= set(ast.literal_eval(out.stdout))


def test_import_dictlearn_is_light() -> None:
    code = "import sys, dictlearn; print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
