"""Import this before dictlearn, to run it from this checkout beside torch, lightning and transformers only.

There dictlearn may not be installed, nor the one further package that its library needs: jaxtyping, whose
annotations nothing looks at while training.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

if find_spec("dictlearn") is None:
    sys.path.insert(0, str(Path(__file__).parents[1]))


class _Annotation:
    def __class_getitem__(cls, _: object) -> Any:
        return Any


if find_spec("jaxtyping") is None:
    stand_in = ModuleType("jaxtyping")
    for name in ("Bool", "Float", "Int"):
        setattr(stand_in, name, _Annotation)
    sys.modules["jaxtyping"] = stand_in
