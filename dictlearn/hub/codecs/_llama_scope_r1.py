"""Llama Scope R1: by what the activations of each release are multiplied, for files without their average norms.

sqrt(d) / average norm at the residual stream after layers 0, 1, ... of DeepSeek-R1-Distill-Llama-8B, on the mix of
texts that the folder's name says; as SAELens' registry lists them.
"""

from __future__ import annotations

import re

REPOSITORY = "Llama-Scope-R1-Distill"
SCALES = {  # by folder: of layers 0 to 31
    "800M-Slimpajama-0-OpenR1-Math-220k": (
        *(53.529954, 37.074572, 26.801272, 20.258786, 16.356203, 13.772731, 11.802643, 10.345622),
        *(9.5271122, 8.7228026, 8.1873746, 7.6814094, 7.011471, 6.5078518, 6.0758308, 5.5293295),
        *(5.0412577, 4.5430603, 4.1360738, 3.8186778, 3.4997662, 3.1148752, 2.8586776, 2.614362),
        *(2.4065933, 2.2185541, 2.0386288, 1.8664055, 1.6914743, 1.5303891, 1.3378642, 1.0963026),
    ),
    "400M-Slimpajama-400M-OpenR1-Math-220k": (
        *(53.97673, 36.769958, 26.863295, 20.473522, 16.491434, 13.902529, 11.959186, 10.454685),
        *(9.6258498, 8.7054431, 8.0884989, 7.4495784, 6.8014491, 6.3317112, 5.7028423, 5.3180414),
        *(4.7963935, 4.3335541, 3.9386839, 3.5840451, 3.412285, 2.9930188, 2.7548718, 2.5281943),
        *(2.3268512, 2.1010687, 1.9361189, 1.778466, 1.663505, 1.4488532, 1.1570088, 1.041978),
    ),
    "0-Slimpajama-800M-OpenR1-Math-220k": (
        *(54.308791, 36.49473, 26.961264, 20.522102, 16.677335, 14.067505, 12.034339, 10.495663),
        *(9.6830042, 8.6797305, 7.988384, 7.2375311, 6.6944489, 6.0489858, 5.493593, 4.9708605),
        *(4.5418879, 4.1112929, 3.7319009, 3.4464218, 3.1614163, 2.8600261, 2.6361572, 2.4287398),
        *(2.2405979, 2.0346591, 1.8430055, 1.6554423, 1.4770704, 1.3361543, 1.1387454, 0.92639575),
    ),
}


def scale_of(where: str, hook: object) -> float | None:
    """Of the dictionary at a place, which reads and writes at `hook`; None where it is in none of the releases."""
    found = re.search(rf"(?:^|/|--){REPOSITORY}/(?:.*/)?([^/]+)/L(\d\d?)R$", where)
    if found is None or found[1] not in SCALES or hook != f"blocks.{found[2]}.hook_resid_post":
        return None
    scales = SCALES[found[1]]
    return scales[int(found[2])] if int(found[2]) < len(scales) else None
