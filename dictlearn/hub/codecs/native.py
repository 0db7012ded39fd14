"""The native format: the SAELens v6 inference layout, `cfg.json` beside `sae_weights.safetensors`.

An architecture that SAELens has is written under its name and opens there unchanged. One that it lacks (a TopK
transcoder, a crosscoder) uses the same two files under a name of our own, `dictlearn_<kind>`, which SAELens refuses
rather than misreads. What SAELens has no field for is in `metadata.dictlearn`.

A site is named by TransformerLens' hook, where there is one, and in SAELens activations have the hook's shape: an
autoencoder of `attn_z` takes and gives [..., n_heads, d_head] there.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dictlearn import __version__
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.codecs._sae_lens import CONFIG, NAMES, NORMS, WEIGHTS, is_before_6, read_sae_lens
from dictlearn.hub.codecs._writing import check_inference, write_tensors, write_text
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.names import is_hook_name, to_hook_name
from dictlearn.hub.weights import load_tensors, read_json, read_shapes, read_tensors
from dictlearn.registry import kind_of, lookup
from dictlearn.types import DictlearnError, FormatError

OWN = "dictlearn_"  # prefix of architectures that SAELens does not have
SAE_LENS_VERSION = "6.0.0"  # the oldest version with this layout; older files are read there by other rules
UNCOMPARED = ("metadata", "dtype", "device", "reshape_activations")  # they do not say what is computed


class Native:
    """SAELens v6 inference files, and our own architectures in the same layout."""

    layout: ClassVar[str] = f"{CONFIG} with an `architecture`, beside {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS, CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        cfg = read_json(files.path(posixpath.join(place, CONFIG)))
        return "architecture" in cfg and not is_before_6(cfg)

    def read(self, files: Files, place: str) -> Dictionary:
        config, weights = (files.path(posixpath.join(place, name)) for name in (CONFIG, WEIGHTS))
        cfg = read_json(config)
        stored = read_shapes(weights)
        try:
            own = cfg.get("metadata", {}).get("dictlearn")
            _check_widths(cfg if own is None else own, stored)
            if own is None:
                return read_sae_lens(cfg, weights, load_tensors(weights))
            with torch.device("meta"):  # what is allocated is never larger than the file
                empty = _build(own)
            _check_agreement(cfg, empty)
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise FormatError(f"{config}: missing or wrong field: {error!r}.") from None
        except DictlearnError as error:
            raise FormatError(f"{config}: {error}") from None
        shapes = {name: tuple(parameter.shape) for name, parameter in _parameters(empty).items()}
        tensors = read_tensors(weights, shapes)
        dictionary = _build(own)
        with torch.no_grad():
            for name, parameter in _parameters(dictionary).items():
                parameter.copy_(tensors[name])
        return dictionary.requires_grad_(False).eval()

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        check_inference(dictionary)
        write_tensors(folder / WEIGHTS, _parameters(dictionary))
        write_text(folder / CONFIG, json.dumps(_config(dictionary), indent=2) + "\n")


def _parameters(dictionary: Dictionary) -> dict[str, nn.Parameter]:
    """By name in the file, where what the sparsifier has learnt is beside the rest: `threshold`."""
    return {name.removeprefix("sparsifier."): p for name, p in dictionary.named_parameters()}


def _check_widths(declared: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DictlearnError where the declared widths are not those of the weights."""
    n_latents = declared.get("n_latents", declared.get("d_sae"))
    for key, width in {"W_enc": declared["d_in"], "W_dec": declared.get("d_out", declared["d_in"])}.items():
        if key in stored and not {n_latents, width} <= set(stored[key]):
            raise DictlearnError(f"{key} is {list(stored[key])}, but the widths are {width} and {n_latents}.")


def _check_agreement(cfg: Mapping[str, Any], dictionary: Dictionary) -> None:
    """What SAELens reads from the file and what we read are the same dictionary."""
    ours = {key: value for key, value in _config(dictionary).items() if key not in UNCOMPARED}
    if differing := {key: (cfg.get(key), value) for key, value in ours.items() if cfg.get(key) != value}:
        raise DictlearnError(f"fields contradict metadata.dictlearn (found, expected): {differing}.")


def _config(dictionary: Dictionary) -> dict[str, Any]:
    sparsifier = {"kind": dictionary.sparsifier.kind, **dictionary.sparsifier.config()}
    own = {"version": __version__, "kind": kind_of(dictionary), **dictionary.config(), "sparsifier": sparsifier}
    metadata, record = dictionary.metadata, dictionary.metadata.get("data")
    hooks = {"hook_name": to_hook_name(dictionary.reads[0])}
    if not dictionary.is_autoencoder:
        hooks["hook_name_out"] = to_hook_name(dictionary.writes[0])
    by_head = dictionary.is_autoencoder and hooks["hook_name"].endswith("attn.hook_z")  # [n_heads, d_head] there
    cfg: dict[str, Any] = {
        "architecture": _architecture(dictionary),
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": dictionary.input_norm,
        "reshape_activations": "hook_z" if by_head else "none",
    }
    if not dictionary.is_autoencoder:
        cfg["d_out"] = dictionary.d_out
    if cfg["architecture"] in ("topk", "abstopk"):
        cfg |= {"k": sparsifier["k"], "rescale_acts_by_decoder_norm": False}
    cfg["metadata"] = {
        "sae_lens_version": SAE_LENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": metadata.get("lm_name"),
        "model_class_name": "HookedTransformer" if is_hook_name(hooks["hook_name"]) else "AutoModelForCausalLM",
        **hooks,
        "context_size": metadata.get("ctx"),
        "prepend_bos": metadata.get("prepend_bos"),
        "dataset_path": record.get("name") if isinstance(record, Mapping) else None,
        "dictlearn": {**own, "metadata": metadata},
    }
    return cfg


def _architecture(dictionary: Dictionary) -> str:
    kind = kind_of(dictionary)
    key = (dictionary.sparsifier.kind, dictionary.is_autoencoder, dictionary.W_skip is not None)
    theirs = kind == "linear" and key in NAMES and dictionary.input_norm in NORMS
    return NAMES[key] if theirs else f"{OWN}{kind}"


def _build(own: Mapping[str, Any]) -> Dictionary:
    """The dictionary with empty weights."""
    for key in ("reads", "writes"):
        if not isinstance(own[key], list) or not all(isinstance(site, str) for site in own[key]):
            raise DictlearnError(f"{key} must be a list of names of sites, got {own[key]!r}.")
    sparsifier = dict(own["sparsifier"])
    built = lookup("dictlearn.sparsifiers", sparsifier.pop("kind"))(**sparsifier)
    skip = {"version", "kind", "sparsifier", "metadata"}
    arguments = {key: value for key, value in own.items() if key not in skip}
    dictionary = lookup("dictlearn.dictionaries", own["kind"])(sparsifier=built, **arguments)
    dictionary.metadata = dict(own["metadata"])
    return dictionary
