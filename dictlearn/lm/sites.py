"""Site names: a readable name of a known family, or the path of any module.

A path means the module's output, a path with ":in" its input. Every readable name is such a path, in `FAMILIES`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dictlearn.types import DictlearnError, Site

LONGEST_NAME = 120  # of several sites; longer ones end in a hash
UNRECORDED = ("x", "y")  # what stands for read and write sites where a dictionary's files do not say them


class Refusal(NamedTuple):
    """Readable names that an architecture does not have, always or where its config says so.

    `when`: the config entry and the value that make it so; None: always. `why` completes "it does not exist here:",
    with `{}` for the layer.
    """

    kinds: tuple[str, ...]
    why: str
    when: tuple[str, object] | None = None


class Family(NamedTuple):
    """Where the readable sites of one architecture are.

    `paths`: kind -> module path below the base model, `{}` for the layer. attn_out and mlp_out are the
    contributions to the residual stream, mlp_in what the MLP reads: where norms sit between the two, the raw
    output of a module is its module path. The parent of the resid_mid module is the layer.
    """

    paths: dict[str, str]
    refusals: tuple[Refusal, ...] = ()


def _parallel(when: tuple[str, object] | None) -> Refusal:
    why = "attention and MLP both read resid_pre.{}, and the stream between them is never computed"
    return Refusal(("resid_mid",), f"{why}. Take attn_out.{{}} or resid_post.{{}}", when)


GPT2 = Family(
    {
        "embed": "wte",
        "resid_pre": "h.{}:in",
        "resid_mid": "h.{}.ln_2:in",
        "resid_post": "h.{}",
        "attn_in": "h.{}.attn:in",
        "attn_z": "h.{}.attn.c_proj:in",
        "attn_out": "h.{}.attn",
        "mlp_in": "h.{}.mlp:in",
        "mlp_hidden": "h.{}.mlp.c_proj:in",
        "mlp_out": "h.{}.mlp",
    }
)
GPT_NEOX = Family(
    {
        "embed": "embed_in",
        "resid_pre": "layers.{}:in",
        "resid_mid": "layers.{}.post_attention_layernorm:in",
        "resid_post": "layers.{}",
        "attn_in": "layers.{}.attention:in",
        "attn_z": "layers.{}.attention.dense:in",
        "attn_out": "layers.{}.attention",
        "mlp_in": "layers.{}.mlp:in",
        "mlp_hidden": "layers.{}.mlp.dense_4h_to_h:in",
        "mlp_out": "layers.{}.mlp",
    },
    refusals=(_parallel(when=("use_parallel_residual", True)),),
)
LLAMA = Family(
    {
        "embed": "embed_tokens",
        "resid_pre": "layers.{}:in",
        "resid_mid": "layers.{}.post_attention_layernorm:in",
        "resid_post": "layers.{}",
        "attn_in": "layers.{}.self_attn:in",
        "attn_z": "layers.{}.self_attn.o_proj:in",
        "attn_out": "layers.{}.self_attn",
        "mlp_in": "layers.{}.mlp:in",
        "mlp_hidden": "layers.{}.mlp.down_proj:in",
        "mlp_out": "layers.{}.mlp",
    }
)
POST_NORMS = {"attn_out": "layers.{}.post_attention_layernorm", "mlp_out": "layers.{}.post_feedforward_layernorm"}
GEMMA2 = Family(LLAMA.paths | POST_NORMS | {"resid_mid": "layers.{}.pre_feedforward_layernorm:in"})
OLMO2 = Family(LLAMA.paths | POST_NORMS | {"resid_mid": "layers.{}.mlp:in"})  # modules read the stream itself
OPT = Family(
    {
        "embed": "decoder.embed_tokens",
        "resid_pre": "decoder.layers.{}:in",
        "resid_mid": "decoder.layers.{}.final_layer_norm:in",
        "resid_post": "decoder.layers.{}",
        "attn_in": "decoder.layers.{}.self_attn:in",
        "attn_z": "decoder.layers.{}.self_attn.out_proj:in",
        "attn_out": "decoder.layers.{}.self_attn",
        "mlp_in": "decoder.layers.{}.fc1:in",
        "mlp_hidden": "decoder.layers.{}.fc2:in",
        "mlp_out": "decoder.layers.{}.fc2",
    },
    refusals=(
        Refusal(
            ("resid_mid", "attn_out", "mlp_out"),
            "norms stand on the residual stream itself, after each sum (as in OPT-350m): what attention and MLP "
            "add does not sum up to resid_post.{}. Take resid_pre.{}, resid_post.{}, or the module path of the raw "
            "output",
            when=("do_layer_norm_before", False),
        ),
    ),
)
PHI = Family(
    {kind: path for kind, path in LLAMA.paths.items() if kind != "resid_mid"}
    | {"attn_z": "layers.{}.self_attn.dense:in", "mlp_hidden": "layers.{}.mlp.fc2:in"},
    refusals=(_parallel(when=None),),
)
FAMILIES: dict[str, Family] = {  # by the text config's model_type
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "olmo2": OLMO2,
    "opt": OPT,
    "phi": PHI,
}
KINDS = tuple(GPT2.paths)


def resolve(model: PreTrainedModel, name: str) -> Site:
    """The site called `name`: readable ("resid_post.2", "embed") or a module path of `model`, output or ":in".

    Only names are looked up, so a model on the meta device will do. Raises DictlearnError, with what the model
    has, for an unknown name, a layer it does not have, a readable name of a family that is not known by readable
    names, or a readable name that its architecture does not have.
    """
    path, io = _split(name)
    if path in _module_paths(model):
        return Site(name, path, io)
    kind, _, layer = name.partition(".")
    if kind not in KINDS:
        raise _unknown(model, name)
    path, io = _split(_path_of(model, name, kind, layer))
    return Site(name, _text_prefix(model) + path, io)


def resolve_pair(model: PreTrainedModel, name: str) -> tuple[Site, Site]:
    """The sites a dictionary called `name` reads and writes: "mlp.2" is (mlp_in.2, mlp_out.2), else one site."""
    kind, _, layer = name.partition(".")
    if kind == "mlp":
        return resolve(model, f"mlp_in.{layer}"), resolve(model, f"mlp_out.{layer}")
    site = resolve(model, name)
    return site, site


def site_width(model: PreTrainedModel, site: Site) -> int | None:
    """The width d of a site without running the model, which may be on the meta device.

    Known for readable names and for the inputs and outputs of linear layers and embeddings; None elsewhere.
    """
    match model.get_submodule(site.module), site.io:
        case (nn.Linear(in_features=width), "in") | (nn.Linear(out_features=width), "out"):
            return width
        case (Conv1D(nx=width), "in") | (Conv1D(nf=width), "out") | (nn.Embedding(embedding_dim=width), "out"):
            return width
    kind = site.name.partition(".")[0]
    return model.config.get_text_config().hidden_size if kind in KINDS else None


def stream_layer(site: Site) -> str | None:
    """The path of the layer whose residual stream passes by the site's module, which reads it: resid_mid alone."""
    return site.module.rpartition(".")[0] if site.name.startswith("resid_mid.") else None


def is_attention_output(model: PreTrainedModel, site: Site) -> bool:
    """Whether attention writes the site's activations, which are of low rank: attn_out, by whichever name.

    By module path that is the attention module or its output projection as well. False in families that are not
    known by readable names.
    """
    family = FAMILIES.get(model.config.get_text_config().model_type)
    if family is None or site.io == "in":
        return False
    paths = {_split(family.paths[kind])[0] for kind in ("attn_out", "attn_in", "attn_z")}
    below = site.module.removeprefix(_text_prefix(model))
    return re.sub(r"\.\d+\.", ".{}.", below) in paths


def module_path(family: Family, name: str) -> str | None:
    """The module path, below the base model, of a readable name in models of this family; None for other names."""
    kind, _, layer = name.partition(".")
    path = family.paths.get(kind)
    return path.format(layer) if path is not None and (layer.isdigit() or kind == "embed") else None


def file_name(site_name: str) -> str:
    """`site_name` in the letters A-Z a-z 0-9 _ . - ("a.b:in" -> "a.b-in")."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", site_name)


def name_of(writes: Sequence[str]) -> str:
    """Of a dictionary that writes these sites, and of its folder: `resid_post.2`; `resid_post.0-3` for successive
    layers; else names side by side, `resid_post.0_resid_post.2-3`.
    """
    runs: list[tuple[str, int, int]] = []  # kind, first and last layer
    parts: list[str] = []
    for name in writes:
        kind, _, layer = name.rpartition(".")
        number = int(layer) if layer.isdigit() else -1
        if number > 0 and parts and runs[-1][0] == kind and runs[-1][2] == number - 1:
            runs[-1] = (kind, runs[-1][1], number)
            parts[-1] = f"{kind}.{runs[-1][1]}-{number}"
        else:
            runs.append((kind, number, number))
            parts.append(name)
    joined = file_name("_".join(parts))
    if len(joined) <= LONGEST_NAME:
        return joined
    return f"{joined[:LONGEST_NAME]}-{blake2b(joined.encode(), digest_size=4).hexdigest()}"


def _split(path: str) -> tuple[str, Literal["in", "out"]]:
    return (path.removesuffix(":in"), "in") if path.endswith(":in") else (path, "out")


def _path_of(model: PreTrainedModel, name: str, kind: str, layer: str) -> str:
    """The module path, below the base model, of a readable name."""
    config = model.config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        paths = list(_module_paths(model))
        examples = ([path for path in paths if re.search(r"\.0(\.|$)", path)] or paths)[:4]
        raise DictlearnError(
            f"Site {name!r}: readable names are known for {', '.join(FAMILIES)} models, not for "
            f"{config.model_type!r}. Give a module path, for its output, or with ':in' for its input; this model "
            f"has e.g. {', '.join(examples)}."
        )
    if kind == "embed":
        if layer:
            raise DictlearnError(f"Site {name!r}: embed has no layer, write 'embed'.")
        return family.paths[kind]
    if layer not in map(str, range(config.num_hidden_layers)):
        raise DictlearnError(
            f"Site {name!r}: the layer must be 0 to {config.num_hidden_layers - 1}, as in '{kind}.0'; this model "
            f"has {config.num_hidden_layers} layers."
        )
    for refusal in family.refusals:
        if kind in refusal.kinds and (refusal.when is None or getattr(config, refusal.when[0]) == refusal.when[1]):
            setting = "in this architecture" if refusal.when is None else "with {}={}".format(*refusal.when)
            why = refusal.why.replace("{}", layer)
            raise DictlearnError(f"Site {name!r} does not exist here: {setting} {why}.")
    return family.paths[kind].format(layer)


def _text_prefix(model: PreTrainedModel) -> str:
    """The path of the model that the paths of a family start from, up to the dot: the base model, or the language
    model in it where it reads images too."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{prefix}language_model." if hasattr(model.base_model, "language_model") else prefix


def _module_paths(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules that run, by path; lists of modules are only walked over."""
    named = model.named_modules()
    return {path: m for path, m in named if path and not isinstance(m, nn.ModuleList | nn.ModuleDict)}


def _unknown(model: PreTrainedModel, name: str) -> DictlearnError:
    if name in UNRECORDED:
        return DictlearnError(
            "The files of this dictionary do not record a site: give it one after dictlearn.load, as in "
            "d.reads = d.writes = ('resid_post.2',); dictlearn.hub.save(d, FOLDER) keeps it."
        )
    config = model.config.get_text_config()
    choices = list(_module_paths(model))
    readable = ""
    if config.model_type in FAMILIES:
        layers = range(config.num_hidden_layers)
        choices += ["embed", *(f"{kind}.{layer}" for kind in KINDS if kind != "embed" for layer in layers)]
        readable = f"embed, or {' '.join(KINDS[1:])} with a layer from 0 to {len(layers) - 1} ('resid_post.0'), or "
    close = difflib.get_close_matches(name, choices, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return DictlearnError(
        f"This {config.model_type} model has no site {name!r}.{hint} A site is {readable}any module path (like "
        f"{choices[0]}), for its output, or with ':in' for its input."
    )
