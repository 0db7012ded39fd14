from pathlib import Path

import pandas as pd

from dictlearn.training.loggers import CsvLogger


def test_rows_are_appended(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path)
    for step in (50, 100):
        logger.log_metrics({"n_tokens": step * 4.0, "a/fvu": 1 / step}, step=step)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table.step.tolist() == [50, 100]
    assert table["a/fvu"].tolist() == [1 / 50, 1 / 100]


def test_a_resumed_run_keeps_what_came_before_and_writes_the_rest_again(tmp_path: Path) -> None:
    first = CsvLogger(tmp_path)
    for step in (50, 100, 150):
        first.log_metrics({"loss": 1.0}, step=step)
    resumed = CsvLogger(tmp_path)
    for step in (100, 150):
        resumed.log_metrics({"loss": 2.0}, step=step)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table.step.tolist() == [50, 100, 150]
    assert table.loss.tolist() == [1.0, 2.0, 2.0]
