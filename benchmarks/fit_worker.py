"""A trainer in a process of its own: `python benchmarks/fit_worker.py PROGRAM`, driven over a pipe.

Reads a JSON line with the specification and starts the trainer of peers/fit_PROGRAM.py as its users do. The Gate
stands where it fetches its next batch: at the first one it says "ready", then lets through as many steps as each
line says and answers with a JSON object: "seconds" of these steps, "setup_seconds" from the loaded LM to the first
fetch, "busy_seconds" and "n_steps" since then, waiting left out. Needs the program's own packages alone.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

T = TypeVar("T")


class Finished(Exception):
    """There are no further turns."""


class Gate:
    """Lets a trainer pass in turns.

    `after_turn(n_steps)`, where it is set, is measured beside: it runs when the clock stands, and what it returns
    joins the answer.
    """

    def __init__(self, answers: TextIO, on_gpu: bool) -> None:
        self.answers, self.on_gpu = answers, on_gpu
        self.after_turn: Callable[[int], dict[str, Any]] | None = None
        self.setup_seconds: float | None = None
        self.busy_seconds, self.n_steps = 0.0, 0
        self._asked = self._left = 0
        self._since = time.perf_counter()

    def loaded(self) -> None:
        """The LM is there: what comes now is part of a run."""
        self._since = self.now()

    def step(self) -> None:
        """Before each step, and before its batch is made. Raises Finished when there are no further turns."""
        if self._left == 0:
            self._answer()
            line = sys.stdin.readline()
            if not line:
                raise Finished
            self._asked = self._left = int(line)
            self._since = self.now()
        self._left -= 1

    def batches(self, source: Iterable[T]) -> Iterator[T]:
        """The batches of `source`, each made after its gate."""
        iterator = iter(source)
        while True:
            self.step()
            yield next(iterator)

    def _answer(self) -> None:
        seconds = self.now() - self._since
        if self.setup_seconds is None:
            self.setup_seconds = seconds
            print("ready", file=self.answers, flush=True)
            return
        self.busy_seconds += seconds
        self.n_steps += self._asked
        answer = {"seconds": seconds, "busy_seconds": self.busy_seconds, "n_steps": self.n_steps}
        answer["setup_seconds"] = self.setup_seconds
        if self.after_turn is not None:
            answer |= self.after_turn(self._asked)
        print(json.dumps(answer), file=self.answers, flush=True)

    def now(self) -> float:
        """Seconds, once the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what packages print is not an answer
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    spec = json.loads(sys.stdin.readline())
    torch.set_num_threads(spec["n_threads"])
    torch.manual_seed(0)
    gate = Gate(answers, spec["device"] == "cuda")
    try:
        importlib.import_module(f"fit_{sys.argv[1]}").fit(spec, gate)
    except NotImplementedError as error:
        print(error, file=answers, flush=True)
    except Finished:
        return


if __name__ == "__main__":
    main()
