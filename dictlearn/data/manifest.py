"""What an activation store says of itself: manifest.json, and how it compares with what a run asks for.

The manifest holds no path: shard number i is always the file `shard_name(i)` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dictlearn.data.schedule import Position
from dictlearn.files import reason
from dictlearn.types import DictlearnError

FORMAT = 1
UNRECORDED_SCHEDULE = 2  # of the manifests that do not say it
MANIFEST, STATISTICS, LOCK = "manifest.json", "statistics.safetensors", "lock"
ABOUT = (
    "Activations of a language model in the order in which a shuffled run used them. Only tokens that count are "
    "here: special tokens, and those left out by max_norm_ratio, are not. One tensor per site [n, d], and tokens, "
    "rows and positions [n] say where each activation comes from."
)
STORE_DTYPES = ("bfloat16", "float32")
ORIGIN = {"tokens": "int32", "rows": "int64", "positions": "int32"}  # of each activation, beside the sites
ORIGIN_BYTES = 16
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


class _Setting(NamedTuple):
    label: str  # in messages
    kind: type | tuple[type | None, ...]


# What decides which activations a store holds, in which order.
DECIDING = {
    "lm": _Setting("the LM's weights", str),
    "lm_dtype": _Setting("lm.dtype", str),
    "tokenizer": _Setting("the LM's tokenizer", str),
    "text": _Setting("the text", str),
    "ctx": _Setting("data.ctx", int),
    "seed": _Setting("seed", int),
    "block_rows": _Setting("data.block_rows", int),
    "n_slices": _Setting("data.n_slices", int),
    "lm_batch_rows": _Setting("data.lm_batch_rows", int),
    "max_norm_ratio": _Setting("data.max_norm_ratio", (int, float, type(None))),
    "dtype": _Setting("data.store_dtype", str),
}
# How much the run that wrote it asked for, and the order that only the same code continues. Then the prefix that
# its site statistics are of.
WRITTEN_FOR = {
    "n_tokens": _Setting("n_tokens", int),
    "batch_size": _Setting("batch_size", int),
    "schedule": _Setting("the version of dictlearn's shuffle", int),
}
STATISTICS_OF = {"statistics_n_tokens": _Setting("statistics_n_tokens", int)}
NAMES = {"lm_name": _Setting("lm.name", str), "lm_revision": _Setting("lm.revision", (str, type(None)))}
SETTINGS = DECIDING | WRITTEN_FOR | STATISTICS_OF | NAMES


@dataclass(frozen=True)
class Shard:
    """One file: `n` activations, `sha256` of each tensor's bytes, and the stream's position after it."""

    n: int
    n_bytes: int
    sha256: dict[str, str]
    position: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """`contents` has the keys of SETTINGS and `sites`, name -> width."""

    contents: dict[str, Any]
    statistics_sha256: str
    shards: tuple[Shard, ...] = ()

    @property
    def n_stored(self) -> int:
        return sum(shard.n for shard in self.shards)

    @property
    def n_tokens(self) -> int:
        """Activations of the complete store: whole batches of the run that wrote it."""
        return n_activations(self.contents)

    @property
    def complete(self) -> bool:
        return self.n_stored == self.n_tokens

    def to_json(self) -> str:
        head = {"format": FORMAT, "about": ABOUT, "complete": self.complete, "n_stored": self.n_stored}
        return json.dumps({**head, **asdict(self)}, indent=1)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def n_activations(contents: Mapping[str, Any]) -> int:
    """Whole batches that hold n_tokens."""
    return -(-contents["n_tokens"] // contents["batch_size"]) * contents["batch_size"]


def n_bytes(contents: Mapping[str, Any], n: int) -> int:
    """Of `n` activations on disk."""
    return n * bytes_per_activation(sum(contents["sites"].values()), contents["dtype"])


def bytes_per_activation(width: int, dtype: str) -> int:
    """Of all sites together, `width` summed over them, and where it comes from."""
    return width * ITEM_BYTES[dtype] + ORIGIN_BYTES


def read_manifest(folder: Path) -> Manifest | None:
    """None where there is none; without the last shards whose files are gone, so that they are written again.

    Raises DictlearnError for one that cannot be read or is of another format.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DictlearnError(f"{path} cannot be read: {reason(error)}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise DictlearnError(f"{path} must be an activation store of format {FORMAT}, got format {found!r}")
    damaged = DictlearnError(f"{path} is damaged: let a run write the store again, into another folder")
    try:
        shards = tuple(Shard(**shard) for shard in raw["shards"])
        contents = {"schedule": UNRECORDED_SCHEDULE, **raw["contents"]}
        manifest = Manifest(contents, raw["statistics_sha256"], shards)
        if not _is_valid(manifest):
            raise damaged
    except (KeyError, TypeError, AttributeError):
        raise damaged from None
    n = len(shards)
    while n and not (folder / shard_name(n - 1)).exists():
        n -= 1
    return replace(manifest, shards=shards[:n])


def _is_valid(manifest: Manifest) -> bool:
    contents, sites = manifest.contents, manifest.contents["sites"]
    kinds = all(_is(contents[key], setting.kind) for key, setting in SETTINGS.items())
    widths = sites and all(name not in ORIGIN and _is(d, int) and d > 0 for name, d in sites.items())
    counts = all(contents[key] > 0 for key in WRITTEN_FOR)
    tensors = {*sites, *ORIGIN}
    shards = all(
        _is(s.n, int) and s.n > 0 and _is(s.n_bytes, int) and s.sha256.keys() == tensors and _is_state(s.position)
        for s in manifest.shards
    )
    known = contents["dtype"] in STORE_DTYPES and isinstance(manifest.statistics_sha256, str)
    return bool(kinds and widths and counts and shards and known and manifest.n_stored <= manifest.n_tokens)


def _is_state(state: dict[str, Any]) -> bool:
    """As Stream.state_dict gives it."""
    return (
        state.keys() == {"seed", "fingerprint", *Position._fields}
        and isinstance(state["fingerprint"], str)
        and _is(state["seed"], int)
        and all(_is(state[field], int) and state[field] >= 0 for field in Position._fields)
    )


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def differences(manifest: Manifest, asked: Mapping[str, Any]) -> list[str]:
    """What of `asked`, some or all of the keys of a manifest's contents, the store does not hold.

    A complete store is read at any batch size, and by runs of fewer tokens and sites, in its own order; one that is
    not complete is only continued, which takes the same ones.
    """
    stored = manifest.contents
    compared = DECIDING | STATISTICS_OF | ({} if manifest.complete else WRITTEN_FOR)
    keys = [key for key in compared if key in asked and asked[key] != stored[key]]
    if "text" in keys and {"ctx", "tokenizer"} & set(keys):
        keys.remove("text")  # its rows follow from these
    found = [f"{compared[key].label} is {stored[key]!r} there, {asked[key]!r} here" for key in keys]
    if "lm" in keys:
        names = [" at ".join(filter(None, (c.get("lm_name"), c.get("lm_revision")))) for c in (stored, asked)]
        found[keys.index("lm")] += f" ({names[0]} there, {names[1]} here)"
    sites = asked.get("sites", {})
    missing = [name for name in sites if name not in stored["sites"]]
    if missing or (not manifest.complete and sites and sites.keys() != stored["sites"].keys()):
        found.append(f"its sites are {', '.join(stored['sites'])}, those of the run {', '.join(sites)}")
    wrong = [name for name, d in sites.items() if d is not None and stored["sites"].get(name, d) != d]
    found += [f"{name} has {stored['sites'][name]} dimensions there, {sites[name]} here" for name in wrong]
    if manifest.complete and asked.get("n_tokens", 0) > manifest.n_tokens:
        found.append(f"it holds {manifest.n_tokens:,} activations, and n_tokens is {asked['n_tokens']:,}")
    return found
