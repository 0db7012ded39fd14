"""EleutherAI's sparsify: `cfg.json` beside `sae.safetensors`, in a folder named by a module of the LM's base model.

An autoencoder takes b_dec off its input, always; a transcoder never. pre = x @ encoder.weight.T + encoder.bias, and
ReLU of the k largest (`groupmax`: the largest of each of k groups; `signed`: the k largest absolute values, with
their signs); recon = latents @ W_dec + b_dec + x @ W_skip.T, with the untouched x in the last term.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from dictlearn.choices import is_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.codecs._writing import check_held, lacks, write_tensors, write_text
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.origin import modules_of
from dictlearn.hub.weights import read_json, read_shapes, read_tensors
from dictlearn.lm.sites import UNRECORDED
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.abs_top_k import AbsTopK
from dictlearn.sparsifiers.group_max import GroupMax
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
RUN = "config.json"  # of the run, in the outermost folder
ACTIVATIONS: dict[str, Callable[[int], Sparsifier]] = {"topk": TopK, "groupmax": GroupMax}
WRITTEN = {"top_k": "topk", "group_max": "groupmax"}  # sparsifier -> activation there
HOLDS = "sparsify has TopK and group-max autoencoders and transcoders, of one width"
FLAGS = ("transcode", "skip_connection", "signed")
ATTENTION = ("self_attn", "attention", "attn")
ENDS = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".self_attn"}  # of a module's path, by what it writes
log = logging.getLogger(__name__)


class Sparsify:
    """TopK, signed and group-max autoencoders and transcoders, with or without a skip path."""

    layout: ClassVar[str] = f"{CONFIG} with `k` and `d_in`, beside {WEIGHTS}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS, CONFIG)

    def matches(self, files: Files, place: str) -> bool:
        return {"k", "d_in"} <= set(read_json(files.path(posixpath.join(place, CONFIG))))

    def read(self, files: Files, place: str) -> Dictionary:
        config, path = (files.path(posixpath.join(place, name)) for name in (CONFIG, WEIGHTS))
        cfg = read_json(config)
        try:
            transcode, skip, signed = (_flag(cfg, key) for key in FLAGS)
            d, n, k = _counts(cfg)
            sparsifier = AbsTopK(k) if signed else _activation(cfg)(k)
            sparsifier.bind(n)
        except DictlearnError as error:
            raise FormatError(f"{config}: {error}") from None
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
        if skip:
            shapes["W_skip"] = (d, d)
        if transcode:  # what it writes may be of another width
            stored = read_shapes(path)
            width = stored.get("b_dec", (d,))[-1:]
            shapes |= {"W_dec": (n, *width), "b_dec": width} | ({"W_skip": (*width, d)} if skip else {})
        w = read_tensors(path, shapes)
        weights = Weights(w["encoder.weight"].T, w["encoder.bias"], w["W_dec"], w["b_dec"], W_skip=w.get("W_skip"))
        module, lm = posixpath.basename(files.origin(place)), _lm_name(files)
        read, write = (_itself(site, module, lm) for site in _sites(module, transcode))
        return linear(
            path,
            weights,
            sparsifier,
            read,
            write,
            b_dec_on_input=not transcode,
            metadata={"lm_name": lm},
        )

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """The folder's name is that of the module there: `layers.3.mlp` has mlp_out.3, and mlp_in.3 in transcoders.

        Warns where it is not, since the files themselves have no site. Signed latents are not written, as current
        releases would take them for TopK's.
        """
        d, d_out, W_skip = dictionary.d_in, dictionary.d_out, dictionary.W_skip
        one_width = (d != d_out, f"it reads a width of {d} and writes one of {d_out}")
        check_held(HOLDS, dictionary, [*lacks(dictionary, WRITTEN), one_width])
        transcode, bias = not dictionary.is_autoencoder, dictionary.b_enc
        if not transcode:
            bias = bias + dictionary.b_dec @ dictionary.W_enc
        if problem := _name_problem(dictionary, folder.absolute().name):
            log.warning(problem)
        tensors = {"encoder.weight": dictionary.W_enc.T, "encoder.bias": bias}
        tensors |= {"W_dec": dictionary.W_dec, "b_dec": dictionary.b_dec}
        write_tensors(folder / WEIGHTS, tensors if W_skip is None else tensors | {"W_skip": W_skip})
        cfg = {
            "activation": WRITTEN[dictionary.sparsifier.kind],
            "expansion_factor": max(dictionary.n_latents // d, 1),  # not used where there is `num_latents`
            "normalize_decoder": dictionary.decoder_norm == "unit",  # of training
            "num_latents": dictionary.n_latents,
            "k": dictionary.sparsifier.config()["k"],
            "multi_topk": False,
            "skip_connection": W_skip is not None,
            "transcode": transcode,
            "d_in": d,
        }
        write_text(folder / CONFIG, json.dumps(cfg))


def _flag(cfg: Mapping[str, Any], key: str) -> bool:
    value = cfg.get(key, False)
    if not isinstance(value, bool):
        raise DictlearnError(f"{key} must be true or false, got {value!r}.")
    return value


def _counts(cfg: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width, number of latents and k; `num_latents` 0 stands for d_in x expansion_factor."""
    for key in ("d_in", "k", *([] if cfg.get("num_latents") else ["expansion_factor"])):
        if not is_count(cfg.get(key), 1):
            raise DictlearnError(f"{key} must be a whole number from 1, got {cfg.get(key)!r}.")
    n = cfg.get("num_latents") or cfg["d_in"] * cfg["expansion_factor"]
    if not is_count(n, 1):
        raise DictlearnError(f"num_latents must be a whole number from 0, got {n!r}.")
    return cfg["d_in"], n, cfg["k"]


def _activation(cfg: Mapping[str, Any]) -> Callable[[int], Sparsifier]:
    name = cfg.get("activation", "topk")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise DictlearnError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]


def _sites(module: str, transcode: bool) -> tuple[str, str]:
    """Read and write site of the module of this path in the base model; "x" of one that has no readable name."""
    layer = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(\w+))?", module)
    if module in ("embed_tokens", "embed_in", "wte"):
        write = "embed"
    elif layer is None or (layer[2] not in (None, "mlp", *ATTENTION)):
        write = "x"
    else:
        kind = "resid_post" if layer[2] is None else "mlp_out" if layer[2] == "mlp" else "attn_out"
        write = f"{kind}.{layer[1]}"
    if not transcode:
        return write, write
    kind, _, number = write.partition(".")
    reads = {"mlp_out": "mlp_in", "attn_out": "attn_in", "resid_post": "resid_pre"}
    return (f"{reads[kind]}.{number}" if kind in reads else "x"), (write if kind in reads else "y")


def _name_problem(dictionary: Dictionary, name: str) -> str | None:
    """What is lost in a folder of this name, and which one to take."""
    transcode = not dictionary.is_autoencoder
    sites = (*dictionary.reads, *dictionary.writes)
    if _sites(name, transcode) == sites or sites[1] in UNRECORDED:
        return None
    kind, _, layer = sites[1].partition(".")
    ours = modules_of(dictionary.metadata.get("lm_name"), sites[1:]).values()
    names = (*ours, f"layers.{layer}{ENDS.get(kind, '')}", "embed_tokens")
    named = next((n for n in names if _sites(n, transcode) == sites), None)
    lost = f"sparsify's files record no site, and a folder named {name!r} does not stand for {sites[1]}"
    return f"{lost}: " + (f"save it in one named {named!r}" if named else "no name does, so the site is lost") + "."


def _itself(site: str, module: str, lm: str | None) -> str:
    """The module's path where the site of its output is another: behind a norm in Gemma 2 and 3."""
    where = modules_of(lm, [site]).get(site, module)
    return site if where.endswith((module, ":in")) else f"model.{module}"


def _lm_name(files: Files) -> str | None:
    """Of the run's configuration, where there is one."""
    name = read_json(files.path(RUN)).get("model") if RUN in files.names else None
    return name if isinstance(name, str) else None
