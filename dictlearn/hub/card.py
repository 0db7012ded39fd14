"""The model card of published dictionaries: a table of what they are and how well they do, and how to load them.

It is rebuilt from the facts in the repository's manifest. Only the block between two marks is ours; what stands
outside of it, and what others add to the header, stays.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs.native import CONFIG, OWN, WEIGHTS
from dictlearn.hub.refs import HubRef
from dictlearn.registry import kind_of

LIBRARY = "dictlearn"
SAE_LENS = "saelens"  # a tag, where a dictionary opens there
BEGIN = "<!-- dictlearn.push writes from here ... -->"
END = "<!-- ... to here; the rest of this file is yours -->"
METRICS = {  # column -> where in report.json, format
    "L0": ("sparsity.l0.mean", ".1f"),
    "dead": ("sparsity.frac_dead", ".1%"),
    "FVU": ("reconstruction.fvu", ".4f"),
    "cosine": ("reconstruction.cosine", ".3f"),
    "delta CE": ("behaviour.delta_ce", ".4f"),
    "CE recovered": ("behaviour.ce_recovered_mean", ".4f"),
    "KL": ("behaviour.kl_rec", ".4f"),
    "tokens": ("data.n_counted", ",d"),
}
LEGEND = """\
Measured on held-out `tokens`: L0, mean number of active latents of a token; dead, share of the latents active on
none of them; FVU, squared error over the variance about the mean; cosine of activation and reconstruction. With the
reconstruction in the LM: delta CE, and KL to the LM's own predictions, in nats; CE recovered, of what mean ablation
costs. `report.json` beside the weights has every number, with standard errors, and says on which text.
`manifest.jsonl` has the sha256 of every file."""

Facts = dict[str, Any]


def facts(dictionary: Dictionary, config: Mapping[str, Any], report: Mapping[str, Any]) -> Facts:
    """What the card says of a dictionary, in JSON's types. `report` is empty where there is none."""
    lm = dictionary.metadata.get("lm_name")
    return {
        "architecture": config["architecture"],
        "kind": kind_of(dictionary),
        "sparsifier": dictionary.sparsifier.kind,
        "reads": list(dictionary.reads),
        "writes": list(dictionary.writes),
        "n_latents": dictionary.n_latents,
        "lm": lm if lm is None or _on_hub(lm) else Path(str(lm)).name,  # of a folder without its path
        "lm_on_hub": _on_hub(lm),
        "metrics": {path: _number(report, path) for path, _ in METRICS.values()},
    }


def readme(old: str | None, target: HubRef, rows: Mapping[str, Facts]) -> str | None:
    """The card of all dictionaries of a repository; None where `old` has no block to write into, or is no card.

    rows: by the dictionary's folder in the repository.
    """
    text = f"---\n{{}}\n---\n\n# {target.repo.partition('/')[2]}\n\n{BEGIN}\n{END}\n" if old is None else old
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        return None
    try:
        card = ModelCard(f"{before}{BEGIN}\n\n{_block(target, rows)}\n{END}{after}", ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return None
    known = card.data
    known["library_name"] = known.get("library_name", LIBRARY)
    tags = {LIBRARY, *map(_tag, rows.values()), *(SAE_LENS for row in rows.values() if _in_sae_lens(row))}
    known["tags"] = _union(known.get("tags"), tags)
    base = _union(known.get("base_model"), {str(row.get("lm")) for row in rows.values() if row.get("lm_on_hub")})
    known["base_model"] = base[0] if len(base) == 1 else base or None
    return str(card)


def _block(target: HubRef, rows: Mapping[str, Facts]) -> str:
    header = ["path", "LM", "reads", "writes", "kind", "latents", *METRICS, "SAELens"]
    lines = [header, ["---"] * len(header), *(_row(place, row) for place, row in sorted(rows.items()))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"Sparse dictionaries of a language model's activations.\n\n{table}\n\n{LEGEND}\n\n{_use(target, rows)}"


def _row(place: str, row: Facts) -> list[str]:
    numbers = row.get("metrics")
    measured = numbers if isinstance(numbers, Mapping) else {}
    return [
        f"`{place or '.'}`",
        _text(row.get("lm")),
        *(_text(row.get(key)) for key in ("reads", "writes")),
        f"{_text(row.get('kind'))}, {_text(row.get('sparsifier'))}",
        _cell(row.get("n_latents"), ",d"),
        *(_cell(measured.get(path), spec) for path, spec in METRICS.values()),
        "yes" if _in_sae_lens(row) else "no",
    ]


def _use(target: HubRef, rows: Mapping[str, Facts]) -> str:
    ref = target._replace(path=min(rows))
    parts = [
        "## Load",
        _python("import dictlearn\n", f'dictionary = dictlearn.load("{ref}")  # or another path; or @commit'),
    ]
    if opening := sorted(place for place, row in rows.items() if _in_sae_lens(row)):
        parts += ["In SAELens, 6.0 or newer, those with a `yes`:", _sae_lens(target, opening[0])]
    return "\n\n".join(parts)


def _sae_lens(target: HubRef, place: str) -> str:
    """SAELens' own door has no revisions and needs a folder."""
    if place and target.revision is None:
        return _python("from sae_lens import SAE\n", f'sae = SAE.from_pretrained("{target.repo}", "{place}")')
    revision = f', revision="{target.revision}"' if target.revision else ""
    inside = f'folder + "/{place}"' if place else "folder"
    files = ", ".join(f'"{posixpath.join(place, name)}"' for name in (CONFIG, WEIGHTS))
    return _python(
        "from huggingface_hub import snapshot_download",
        "from sae_lens import SAE\n",
        f'folder = snapshot_download("{target.repo}"{revision}, allow_patterns=[{files}])',
        f"sae = SAE.load_from_disk({inside})",
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _tag(row: Facts) -> str:
    if row.get("kind") == "crosscoder":
        return "crosscoder"
    return "sparse-autoencoder" if row.get("reads") == row.get("writes") else "transcoder"


def _in_sae_lens(row: Facts) -> bool:
    architecture = row.get("architecture")
    return isinstance(architecture, str) and not architecture.startswith(OWN)


def _on_hub(lm: Any) -> bool:
    """Whether an LM's name can be an id of the Hub, and is no folder and not the LM inside this package."""
    if not isinstance(lm, str) or not lm or lm == "embedded" or Path(lm).expanduser().is_dir():
        return False
    try:
        validate_repo_id(lm)
    except HFValidationError:
        return False
    return True


def _number(report: Mapping[str, Any], path: str) -> float | None:
    """None where the report has no number there."""
    found = reduce(lambda at, key: at.get(key) if isinstance(at, Mapping) else None, path.split("."), report)
    return found if isinstance(found, int | float) and math.isfinite(found) else None


def _cell(value: Any, spec: str) -> str:
    try:
        return format(value, spec)
    except (TypeError, ValueError):  # there is none, or another has written something else there
        return "-"


def _text(value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return ", ".join("-" if word is None else str(word).replace("|", r"\|") for word in words)


def _union(known: Any, more: Iterable[str]) -> list[str]:
    first = [known] if isinstance(known, str) else list(known or [])
    return first + sorted(set(more) - set(first))
