"""Contenders: processes of their own that train in turns, a number of steps each, so that noise is shared."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from environments import PACKAGES, Unavailable, python_of

WORKER = Path(__file__).parent / "fit_worker.py"
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin are in the way of the next one's
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
OURS = {  # as train.py has it; torch reads it once, before any of our code runs
    "THP_MEM_ALLOC_ENABLE": "1",
}


class Contender:
    """A program that trains when asked, as `worker` lets it. Raises Unavailable where it cannot."""

    def __init__(self, program: str, spec: Mapping[str, Any], worker: Path = WORKER) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python_of(program), str(worker), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **ENVIRONMENT, **({} if program in PACKAGES else OURS)},
        )
        answer = self._ask(json.dumps(spec))
        if answer != "ready":
            self.close()
            raise Unavailable(answer)

    def turn(self, n_steps: int) -> Any:
        """Train `n_steps`; what the worker answers (fit_worker.py, worker.py)."""
        return json.loads(self._ask(str(n_steps)))

    def close(self) -> None:
        """End the process; nothing happens where it has ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            raise Unavailable((self.errors.read().strip().splitlines() or ["it ended"])[-1])
        return answer


def in_turns(
    programs: Mapping[str, tuple[str, Mapping[str, Any]]], n_rounds: int, n_steps: int
) -> dict[str, dict[str, Any]]:
    """Name -> {"turns": [one answer per round], "warmup": ...} or {"unavailable": why}.

    `programs`: name -> program and specification, with its "n_warmup" steps.
    """
    results: dict[str, dict[str, Any]] = {}
    running: dict[str, Contender] = {}
    for name, (program, spec) in programs.items():
        try:
            running[name] = Contender(program, spec)
            results[name] = {"warmup": running[name].turn(spec["n_warmup"]), "turns": []}
        except Unavailable as error:
            results[name] = {"unavailable": str(error)}
    for _ in range(n_rounds):
        for name in list(running):
            if "turns" not in results[name]:
                continue
            try:
                results[name]["turns"].append(running[name].turn(n_steps))
            except Unavailable as error:
                results[name] = {"unavailable": str(error)}
    for contender in running.values():
        contender.close()
    return results
