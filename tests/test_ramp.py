import inspect
import re
from typing import Any

import pytest

from dictlearn.ramp import check_ramp, ramp_factor
from dictlearn.types import DictlearnError

CASES = [(None, 1), (1, 1), (7, 7), (40, 40), (41, 40), ("run", 40), (0.25, 10), (0.99, 40), (0.01, 1)]


@pytest.mark.parametrize(("ramp", "length"), CASES)
def test_a_ramp_rises_in_equal_steps_and_stays(ramp: float | str | None, length: int) -> None:
    found = [ramp_factor(ramp, step, 40) for step in range(40)]
    assert found == pytest.approx([(step + 1) / length if step < length else 1.0 for step in range(40)])
    assert found[-1] == 1.0


@pytest.mark.parametrize("ramp", [0, -1, 2.0, 1.0, 0.0, -0.5, float("nan"), "all", True, [3]])
def test_what_is_no_ramp(ramp: Any) -> None:
    rule = "sparsifier.ramp must be null, a whole number of steps from 1, a share of the run between 0 and 1, "
    rule += f"or run, got {ramp!r}."
    with pytest.raises(DictlearnError, match=re.escape(rule)):
        inspect.unwrap(check_ramp)("sparsifier.ramp", ramp)
