"""The language model that a released dictionary was made for: its id on the Hub, and where its sites are in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dictlearn.choices import is_number
from dictlearn.lm.sites import FAMILIES, module_path

# Names of TransformerLens, which many files have, and what they are on the Hub.
HF_IDS = {
    "gpt2-small": "gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "pythia-160m-deduped": "EleutherAI/pythia-160m-deduped",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
}
MODEL_TYPES = {  # by name; the first that is found
    r"(^|/)gpt2": "gpt2",
    r"pythia": "gpt_neox",
    r"gemma-2-": "gemma2",
    r"gemma-3-": "gemma3_text",
    r"gemma-2b|gemma-7b": "gemma",
    r"[Ll]lama-?3": "llama",
    r"Distill-Llama": "llama",
    r"Mistral-7B": "mistral",
    r"Qwen3-[\d.]+B(-Base)?$": "qwen3",
    r"Qwen2\.5-": "qwen2",
}

SEEING = r"gemma-3-(4b|12b|27b)-"  # they read images as well: the language model is a part of the base model


def hf_id(name: object) -> str | None:
    """The language model's id on the Hub, where another name for it is known; None for what is no name."""
    return HF_IDS.get(name, name) if isinstance(name, str) and name else None


def stated_l0(where: str, configs: Mapping[str, Any]) -> float | None:
    """The L0 in the name of a repository or path (`average_l0_82`, `W32K-L0_50`), or in a configuration."""
    if named := re.findall(r"(?:^|[_-])[lL]0_(\d+)", where):
        return float(named[-1])
    places = [part for config in configs.values() for part in (config, config.get("metadata"))]
    found: list[Any] = [part.get("l0") for part in places if isinstance(part, Mapping)]
    return next((float(value) for value in found if is_number(value) and value > 0), None)


def modules_of(lm_name: str | None, sites: Sequence[str]) -> dict[str, str]:
    """Module paths in the Hugging Face base model, by readable site; empty where the family is not known by name.

    A path means the module's output, one with ":in" its input.
    """
    kind = next((kind for name, kind in MODEL_TYPES.items() if re.search(name, lm_name or "")), None)
    paths = {site: module_path(FAMILIES[kind], site) for site in sites} if kind else {}
    above = "language_model." if re.search(SEEING, lm_name or "") else ""
    return {site: f"{above}{path}" for site, path in paths.items() if path is not None}
