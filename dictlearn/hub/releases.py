"""Aliases of released dictionaries: `release/id`, under the names that the field uses for them.

An id is a layer, or the path of a dictionary in the release's repository. The repositories, paths and published L0
are those of the releases themselves, as SAELens' registry lists them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dictlearn.hub.places import some
from dictlearn.types import DictlearnError

CANONICAL_L0 = 100  # a canonical Gemma Scope dictionary is the one of its layer and width nearest to this L0


class Release(NamedTuple):
    """A repository and the paths in it: `{}` stands for the id, `*` for what only the file names say.

    l0: published, by id.
    """

    repo: str
    path: str = "{}"
    l0: Mapping[str, float] = {}


def _layers(*l0: float) -> dict[str, float]:
    return {str(layer): value for layer, value in enumerate(l0)}


def _gemma_scope() -> dict[str, Release]:
    widths = {"2b-pt": "16k", "9b-pt": "16k", "9b-it": "16k", "27b-pt": "131k"}
    kinds = {"2b-pt": ("res", "mlp", "att", "transcoders"), "9b-pt": ("res", "mlp", "att")}
    found = {}
    for size, width in widths.items():
        for kind in kinds.get(size, ("res",)):
            name = f"gemma-scope-{size}-{kind}"
            found[name] = Release(f"google/{name}")
            found[f"{name}-canonical"] = Release(f"google/{name}", f"layer_{{}}/width_{width}/canonical")
    return found


def _gemma_scope_2() -> dict[str, Release]:
    kinds = {"res": "resid_post", "att": "attn_out", "mlp": "mlp_out", "transcoders": "transcoder"}
    return {
        f"gemma-scope-2-{size}-{tuned}-{short}{every}": Release(
            f"google/gemma-scope-2-{size}-{tuned}", f"{folder}{'_all' if every else ''}/{{}}"
        )
        for size in ("270m", "1b", "4b", "12b", "27b")
        for tuned in ("pt", "it")
        for short, folder in kinds.items()
        for every in ("", "-all")
    }


def _openai_v5() -> dict[str, Release]:
    return {
        f"gpt2-small-{site}-v5-{width}": Release(
            f"jbloom/GPT2-Small-OAI-v5-{width}-{site}-SAEs", f"v5_{width}_layer_{{}}*", _layers(*[32.0] * 12)
        )
        for width in ("32k", "128k")
        for site in ("attn-out", "mlp-out", "resid-mid", "resid-post")
    }


def _end_to_end() -> dict[str, Release]:
    kinds = ("sce", "scefr", "scl", "sle", "slefr", "sll")
    return {
        f"gpt2-small-res_{kind}-ajt": Release(f"neuronpedia/gpt2-small__res_{kind}-ajt", f"{{}}-res_{kind}-ajt")
        for kind in kinds
    }


def _llama_scope() -> dict[str, Release]:
    return {
        f"llama_scope_lx{site}_{wide}": Release(
            f"fnlp/Llama3_1-8B-Base-LX{site.upper()}-{wide}", f"Llama3_1-8B-Base-L{{}}{site.upper()}-{wide}"
        )
        for site in "ram"
        for wide in ("8x", "32x")
    }


def _qwen3_transcoders() -> dict[str, Release]:
    low = [f"qwen3-{size}-transcoders-lowl0" for size in ("0.6b", "1.7b", "14b")]
    repos = [*low, *(f"qwen3-{size}-transcoders" for size in ("4b", "8b", "14b"))]
    return {f"mwhanna-{repo}": Release(f"mwhanna/{repo}", "layer_{}.safetensors") for repo in repos}


RELEASES: dict[str, Release] = {
    "gpt2-small-res-jb": Release(
        "jbloom/GPT2-Small-SAEs-Reformatted",
        "blocks.{}.hook_resid_pre",
        _layers(10, 10, 18, 23, 31, 41, 51, 54, 60, 70, 52, 56) | {"blocks.11.hook_resid_post": 70.0},
    ),
    "gpt2-small-res-jb-feature-splitting": Release(
        "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8", "blocks.8.hook_resid_pre_{}"
    ),
    "gpt2-small-mlp-tm": Release(
        "tommmcgrath/gpt2-small-mlp-out-saes",
        "sae_group_gpt2_blocks.{}.hook_mlp_out_24576:v*",
        _layers(15, 21, 137, 54, 74, 76, 40, 52, 36, 49, 167, 170),
    ),
    "gpt2-small-hook-z-kk": Release(
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L{}_Hcat_z_*.pt",
        _layers(3, 23, 16, 15, 14, 17, 17, 19, 23, 23, 14, 9.4),
    ),
    "mistral-7b-res-wg": Release(
        "JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_{}", {"8": 92, "16": 74, "24": 75}
    ),
    "gemma-2b-res-jb": Release(
        "jbloom/Gemma-2b-Residual-Stream-SAEs",
        "gemma_2b_blocks.{}.hook_resid_post_16384*",
        {"0": 47, "6": 56, "10": 62, "12": 62, "17": 54},
    ),
    "gemma-2b-it-res-jb": Release(
        "jbloom/Gemma-2b-IT-Residual-Stream-SAEs", "gemma_2b_it_blocks.{}.hook_resid_post_16384", {"12": 61}
    ),
    "llama-3-8b-it-res-jh": Release("Juliushanhanhan/llama-3-8b-it-res", "blocks.{}.hook_resid_post"),
    "pythia-70m-deduped-res-sm": Release("ctigges/pythia-70m-deduped__res-sm_processed", "{}-res-sm"),
    "pythia-70m-deduped-mlp-sm": Release("ctigges/pythia-70m-deduped__mlp-sm_processed", "{}-mlp-sm"),
    "pythia-70m-deduped-att-sm": Release("ctigges/pythia-70m-deduped__att-sm_processed", "{}-att-sm"),
    "gemma-2-2b-res-matryoshka-dc": Release(
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", "standard/blocks.{}.hook_resid_post"
    ),
    "gemma-2-2b-res-snap-matryoshka-dc": Release(
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", "snap/blocks.{}.hook_resid_post"
    ),
    "gemma-2-9b-res-matryoshka-dc": Release(
        "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60", "blocks.{}.hook_resid_post"
    ),
    "gemma-3-1b-res-matryoshka-dc": Release(
        "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40", "blocks.{}.hook_resid_post"
    ),
    "llama_scope_r1_distill": Release("fnlp/Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L{}R"),
    "llama-3.1-8b-instruct-andyrdt": Release("andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_{}/trainer_1"),
    "qwen2.5-7b-instruct-andyrdt": Release("andyrdt/saes-qwen2.5-7b-instruct", "resid_post_layer_{}/trainer_1"),
    "gpt-oss-20b-andyrdt": Release("andyrdt/saes-gpt-oss-20b", "resid_post_layer_{}/trainer_0"),
    "goodfire-llama-3.1-8b-instruct": Release("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "*-l{}.pth", {"19": 91}),
    "goodfire-llama-3.3-70b-instruct": Release("Goodfire/Llama-3.3-70B-Instruct-SAE-l50", "*-l{}.pt", {"50": 121}),
    "deepseek-r1-distill-llama-8b-qresearch": Release("qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "*-l{}.pt"),
    **_gemma_scope(),
    **_gemma_scope_2(),
    **_openai_v5(),
    **_end_to_end(),
    **_llama_scope(),
    **_qwen3_transcoders(),
}


def split_alias(ref: str) -> tuple[str, str] | None:
    """`release/id`, where the first part names a release; None for other references."""
    name, _, given = ref.partition("/")
    return (name, given.strip("/")) if name in RELEASES else None


def place_of(release: str, given: str, places: Sequence[str]) -> str:
    """Of the places of dictionaries in the release's repository, the one that `given` names.

    Raises DictlearnError where there is none, or more than one.
    """
    path = RELEASES[release].path
    patterns = dict.fromkeys([given, path.replace("{}", given)] if given else [path.replace("{}", "*")])
    for pattern in patterns:
        pattern, canonical = re.subn(r"(^|/)canonical$", r"\1average_l0_*", pattern)
        found = [place for place in places if place == pattern or fnmatch.fnmatchcase(place, _literal(pattern))]
        if canonical:
            found = sorted(found, key=_from_canonical)[:1]
        if len(found) == 1:
            return found[0]
        if found:
            raise DictlearnError(f"{release}/{given} may be {some(found)}: name one by its path, {release}/PATH.")
    raise DictlearnError(
        f"{release} has no {given!r}: an id is {'a layer' if '{}' in path and path != '{}' else 'a path'}, such as "
        f"those in {some(places)}."
    )


def published_l0(release: str, given: str, place: str) -> float | None:
    """The L0 that a release states for one of its dictionaries."""
    return RELEASES[release].l0.get(given, RELEASES[release].l0.get(place))


def _literal(pattern: str) -> str:
    """A pattern in which only '*' stands for something else."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def _from_canonical(place: str) -> tuple[int, int]:
    l0 = re.search(r"average_l0_(\d+)$", place)
    value = int(l0[1]) if l0 else 10**9
    return abs(value - CANONICAL_L0), -value
