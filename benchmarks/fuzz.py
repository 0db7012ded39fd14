"""Files of every format with something wrong in them: `python benchmarks/fuzz.py [--n 2000] [--codecs a,b]`.

The files are those of tests/hub/test_fuzz.py, `n` for each codec: each must give a FormatError that names it, or a
dictionary of the declared shapes with finite values; another exception, a crash, more than 20 s for one file, or
2 GiB more than before is a failure. Prints a table, and for all codecs writes benchmarks/results/fuzz.json; exits
with 1 where anything failed. `--codecs NAME --seed SEED --n 1` repeats one file.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from hardware import hardware
from table import table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.hub.fuzzing import Fuzz  # noqa: E402
from tests.hub.samples import SAMPLES  # noqa: E402

MOST_SECONDS, MOST_BYTES = 20, 2 * 2**30  # for one file, and beyond what the process has before
MOST_SHOWN = 20  # failures of a codec
LOADED, REFUSED = "loaded", "FormatError"
WORKER = "--worker"


def work(kind: str, seeds: range) -> None:
    """Prints the outcome of each seed as a line; in a process of its own, which ends where a file takes long."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, used + MOST_BYTES))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(kind, Path(folder))
        for seed in seeds:
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
            try:
                outcome = LOADED if fuzz.loads(seed) else REFUSED
            except Exception as error:  # noqa: BLE001  (which one is the result)
                outcome = "".join(traceback.format_exception_only(error)).strip()
            print(json.dumps(outcome), flush=True)
        faulthandler.cancel_dump_traceback_later()


def outcomes(kind: str, seeds: range) -> dict[int, str]:
    """The outcome of every seed; after one that ends the process there is a new one."""
    found: dict[int, str] = {}
    while rest := seeds[len(found) :]:
        command = [sys.executable, __file__, WORKER, kind, str(rest.start), str(rest.stop)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        found |= dict(zip(rest, map(json.loads, lines), strict=False))
        if len(lines) < len(rest):
            found[rest[len(lines)]] = f"ended with {done.returncode}: {done.stderr[-500:]}"
    return found


def judge(kind: str, seeds: range) -> dict[str, Any]:
    start = time.perf_counter()
    found = outcomes(kind, seeds)
    counts = Counter(found.values())
    failures = {seed: outcome for seed, outcome in found.items() if outcome not in (LOADED, REFUSED)}
    return {
        "files": len(found),
        "loaded": counts[LOADED],
        "format_errors": counts[REFUSED],
        "failures": len(failures),
        "first_failures": dict(list(failures.items())[:MOST_SHOWN]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="files of each codec")
    parser.add_argument("--codecs", default=",".join(SAMPLES), help="of these alone, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the first file")
    arguments = parser.parse_args()
    kinds = arguments.codecs.split(",")
    if unknown := sorted(set(kinds) - set(SAMPLES)):
        parser.error(f"no codec {', '.join(unknown)}: there are {', '.join(SAMPLES)}")
    seeds = range(arguments.seed, arguments.seed + arguments.n)
    results: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        results[kind] = judge(kind, seeds)
        for seed, outcome in results[kind]["first_failures"].items():
            print(f"{kind}, --seed {seed}: {outcome}")
    columns = ["files", "loaded", "format_errors", "failures", "seconds"]
    rows = [[kind, *(str(result[column]) for column in columns)] for kind, result in results.items()]
    print(table("Files with something wrong in them", ["codec", *columns], rows))
    if kinds == list(SAMPLES):
        content = {"hardware": hardware(), "seed": arguments.seed, "codecs": results}
        (ROOT / "benchmarks" / "results" / "fuzz.json").write_text(json.dumps(content, indent=2) + "\n")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2], range(int(sys.argv[3]), int(sys.argv[4])))
    else:
        sys.exit(main())
