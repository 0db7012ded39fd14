import pytest

from dictlearn.training.schedules import WarmupDecay, settled
from dictlearn.types import DictlearnError


def test_warms_up_stays_and_decays() -> None:
    schedule = WarmupDecay(warmup_steps=10, decay=0.2)
    factors = [schedule.factor(step, 1000) for step in range(1000)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10:800] == [1.0] * 790
    assert factors[800:] == pytest.approx([(1000 - i) / 201 for i in range(800, 1000)])
    assert min(factors) > 0


def test_warm_up_is_at_most_a_twentieth_of_the_run() -> None:
    schedule = WarmupDecay(warmup_steps=1000, decay=0.0)
    assert [schedule.factor(step, 100) for step in range(6)] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]
    )
    assert schedule.factor(99, 100) == 1.0


@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_the_shortest_runs_learn(n_steps: int) -> None:
    schedule = WarmupDecay(warmup_steps=1000, decay=0.2)
    assert all(0 < schedule.factor(step, n_steps) <= 1 for step in range(n_steps))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(DictlearnError, match=r"schedule.decay must be null or a number in \[0, 1\], got 1.2"):
        WarmupDecay(5, 1.2)


def test_a_decay_that_is_left_open_is_the_optimizer_s() -> None:
    assert settled(WarmupDecay(10, None), 0.3) == WarmupDecay(10, 0.3)
    assert settled(WarmupDecay(10, 0.0), 0.3) == WarmupDecay(10, 0.0)
