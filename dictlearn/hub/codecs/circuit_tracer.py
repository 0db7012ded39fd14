"""circuit-tracer: transcoders of layers, `layer_LAYER.safetensors` beside a `config.yaml` (Hanna et al. 2025).

pre = x @ W_enc.T + b_enc, with W_enc stored as [n_latents, d_in]; latents are its ReLU, those above
`activation_function.threshold`, or the k largest, with k in the file or the configuration (ReLU of them here, which
matters where fewer than k are positive); recon = latents @ W_dec + b_dec + x @ W_skip.T. The configuration names
where activations are read and written. In old sets W_dec is stored as [d_out, n_latents]: shapes tell.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import yaml
from torch import Tensor

from dictlearn.checks import check_count
from dictlearn.dictionaries import Dictionary
from dictlearn.hub.canonical import Weights, linear
from dictlearn.hub.codecs._writing import check_held, lacks, write_tensors, write_text
from dictlearn.hub.files import Files
from dictlearn.hub.names import NORMALISED, input_norm_of
from dictlearn.hub.refs import HubRef
from dictlearn.hub.weights import check_tensors, encoder_sizes, load_tensors, read_yaml
from dictlearn.sparsifiers import Sparsifier
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

NAME, CONFIG = re.compile(r"layer_(\d+)\.safetensors"), "config.yaml"
WANDB = ("wandb-config.yaml", "wanb-config.yaml")  # of a training, where there is no configuration
THRESHOLD = "activation_function.threshold"
KIND = "transcoder_set"
HOOKS = {
    "mlp.hook_in": "mlp_in",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
}
READ, WRITE = "feature_input_hook", "feature_output_hook"
KNOWN_K = {"facebook/crv-8b-instruct-transcoders": 128}  # which its configuration does not say
PAIR = re.compile(r"(mlp_in|resid_mid)\.(\d+) mlp_out\.\2")  # sites that have names there, of one layer
READS = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}
ACTIVATIONS = ("relu", "jump_relu", "topk")
WRITTEN = ("relu", "jump_relu")  # sparsifiers
HOLDS = "circuit-tracer has ReLU and JumpReLU transcoders of MLPs, of one width"
URI = re.compile(r"hf://([^/]+/[^/]+)/([^?]+)(?:\?revision=([^&]+))?")
MOST_NAMED = 5
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".ckpt")


class CircuitTracer:
    """ReLU, JumpReLU and TopK transcoders, with and without a skip path."""

    layout: ClassVar[str] = f"layer_LAYER.safetensors with W_enc, beside {CONFIG} of a {KIND} or {WANDB[0]}"

    def find(self, names: Sequence[str]) -> list[str]:
        """Files of layers, and folders of sets whose files are in other repositories."""
        present = set(names)
        layers = [name for name in names if NAME.fullmatch(posixpath.basename(name)) and _config(name, present)]
        return layers + lists_alone(names)

    def matches(self, files: Files, place: str) -> bool:
        config = _config(place, files.names)
        if config is None:
            return bool(_listed(read_yaml(files.path(posixpath.join(place, CONFIG)))))
        return posixpath.basename(config) in WANDB or read_yaml(files.path(config)).get("model_kind", KIND) == KIND

    def read(self, files: Files, place: str) -> Dictionary:
        name = _config(place, files.names)
        if name is None:
            raise _elsewhere(files, place)
        path, config, repo = files.path(place), files.path(name), files.origin("")
        cfg = _without_config(files.origin(place)) if posixpath.basename(name) in WANDB else read_yaml(config)
        w = _oriented(path, load_tensors(path))
        layer = posixpath.basename(place).removeprefix("layer_").partition(".")[0]
        read, write = (f"{site_kind(config, cfg, key)}.{layer}" for key in (READ, WRITE))
        weights = Weights(w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], w.get(THRESHOLD), w.get("W_skip"))
        input_norm = _norm_of(cfg.get("model_name")) if cfg[READ] == NORMALISED else "none"
        sparsifier = _sparsifier(path, config, w, cfg | ({"k": KNOWN_K[repo]} if repo in KNOWN_K else {}))
        return linear(path, weights, sparsifier, read, write, input_norm=input_norm, metadata=origin(cfg))

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """As one layer of the set in `folder`, whose layers have one configuration. TopK is refused, because there
        are releases of circuit-tracer that read such a set as one of ReLU.
        """
        d, d_out, W_skip = dictionary.d_in, dictionary.d_out, dictionary.W_skip
        reasons = [
            *lacks(dictionary, WRITTEN, norms=("none", _norm_of(dictionary.metadata.get("lm_name")))),
            (dictionary.is_autoencoder, "it is an autoencoder"),
            (d != d_out, f"it reads a width of {d} and writes one of {d_out}"),
            unnamed(dictionary),
        ]
        check_held(HOLDS, dictionary, reasons)
        tensors = {"W_enc": dictionary.W_enc.T, "b_enc": dictionary.b_enc, "W_dec": dictionary.W_dec}
        tensors["b_dec"] = dictionary.b_dec
        if W_skip is not None:
            tensors["W_skip"] = W_skip
        if dictionary.sparsifier.kind == "jump_relu":
            tensors[THRESHOLD] = dictionary.get_parameter("sparsifier.threshold")
        write_config(folder / CONFIG, their_config(dictionary, KIND))
        write_tensors(folder / f"layer_{dictionary.reads[0].partition('.')[2]}.safetensors", tensors)


def unnamed(dictionary: Dictionary) -> tuple[bool, str]:
    """Whether the sites have no names there, for `check_held`."""
    reads, writes = dictionary.reads, dictionary.writes
    pairs = [PAIR.fullmatch(f"{read} {write}") for read, write in zip(reads, writes, strict=False)]
    named = all(pair and (pair[1] == "resid_mid" or dictionary.input_norm == "none") for pair in pairs)
    return not named, f"it reads {', '.join(reads)} and writes {', '.join(writes)}"


def their_config(dictionary: Dictionary, kind: str) -> dict[str, Any]:
    """What the configuration says of a set that this dictionary is in."""
    return {
        "model_name": dictionary.metadata.get("lm_name"),
        "model_kind": kind,
        READ: NORMALISED if dictionary.input_norm != "none" else READS[dictionary.reads[0].partition(".")[0]],
        WRITE: "hook_mlp_out",
    }


def write_config(path: Path, cfg: Mapping[str, Any]) -> None:
    """Raises DictlearnError where there is another one already."""
    if path.exists() and (found := read_yaml(path)) != cfg:
        differing = sorted(key for key in {*found, *cfg} if found.get(key) != cfg.get(key))
        raise DictlearnError(
            f"{path} is of a set with other values of {', '.join(differing)}: write to another folder."
        )
    write_text(path, yaml.safe_dump(dict(cfg), sort_keys=False))


def _norm_of(lm_name: object) -> str:
    """The input norm of `NORMALISED`: nearly all sets are of language models with RMS norms."""
    return input_norm_of(lm_name) or "rms_norm"


def origin(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The language model; positions of its BOS token have no latents in circuit-tracer."""
    lm = cfg.get("model_name")
    return {"lm_name": lm if isinstance(lm, str) else None, "prepend_bos": True}


def _config(place: str, names: Collection[str]) -> str | None:
    """The configuration beside a layer's file; None for the place of a set that is a configuration alone."""
    if NAME.fullmatch(posixpath.basename(place)) is None:
        return None
    beside = (posixpath.join(posixpath.dirname(place), name) for name in (CONFIG, *WANDB))
    return next((name for name in beside if name in names), None)


def _without_config(where: str) -> dict[str, Any]:
    """What the sets that have none are: of Qwen 3, of the size in the repository's name."""
    size = re.search(r"qwen3-(\d+(?:\.\d+)?)b(?![a-z])", where)
    lm = f"Qwen/Qwen3-{size[1]}B" if size else None
    return {"model_name": lm, READ: "mlp.hook_in", WRITE: "hook_mlp_out"}


def _oriented(path: Path, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, checked, with W_enc as [n_latents, d_in] and W_dec as [n_latents, d_out]: the biases tell."""
    n, d_out = (w[key].numel() if key in w else 0 for key in ("b_enc", "b_dec"))
    for key in ("W_enc", "W_dec"):
        rows, columns = encoder_sizes(path, w, key)
        if rows == columns == n:
            raise FormatError(
                f"{path}: {key} must not be square, for its axes could not be told apart; it is {n} x {n}."
            )
        if rows != n and columns == n and (key == "W_enc" or rows == d_out):
            w[key] = w[key].T
    d_in = w["W_enc"].shape[1]
    shapes = {"W_enc": (n, d_in), "b_enc": (n,), "W_dec": (n, d_out), "b_dec": (d_out,)}
    optional = {"W_skip": (d_out, d_in), THRESHOLD: (n,), "k": tuple(w["k"].shape) if "k" in w else ()}
    shapes |= {key: shape for key, shape in optional.items() if key in w}
    check_tensors(path, w, shapes, integers=("k",))
    check_thresholds(path, w, THRESHOLD)
    return w


def check_thresholds(path: Path, w: Mapping[str, Tensor], key: str) -> None:
    """Raise FormatError where there is one below 0, above which latents may be negative in circuit-tracer."""
    if key in w and (lowest := float(w[key].min())) < 0:
        raise FormatError(f"{path}: {key} below 0 is not supported because latents would be too; found {lowest:g}.")


def _sparsifier(path: Path, config: Path, w: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> Sparsifier | None:
    """None where there are thresholds. What the configuration says must be so."""
    activation = cfg.get("activation")
    if activation not in (None, *ACTIVATIONS):
        raise FormatError(f"{config}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    found = "topk" if "k" in w or activation == "topk" else "jump_relu" if THRESHOLD in w else "relu"
    if (activation or found) != found or (found == "topk" and THRESHOLD in w):
        raise FormatError(f"{path} must have the tensors of activation={activation or found}; it has {sorted(w)}.")
    if found != "topk":
        return None if THRESHOLD in w else ReLU(l1=0.0)
    k = cfg.get("k") if "k" not in w else w["k"].item() if w["k"].numel() == 1 else None
    try:
        check_count("k", k)
        sparsifier = TopK(cast(int, k))
        sparsifier.bind(len(w["b_enc"]))
    except DictlearnError as error:
        raise FormatError(f"{path if 'k' in w else config}: {error}") from None
    return sparsifier


def site_kind(config: Path, cfg: Mapping[str, Any], key: str) -> str:
    """The site of a hook, without its layer."""
    hook, hooks = cfg.get(key), HOOKS | ({NORMALISED: "resid_mid"} if key == READ else {})
    if not isinstance(hook, str) or hook not in hooks:
        raise FormatError(f"{config}: {key} must be one of {', '.join(hooks)}, got {hook!r}.")
    return hooks[hook]


def lists_alone(names: Sequence[str]) -> list[str]:
    """Folders with a configuration and no weights in or below them."""
    folders: set[str] = set()
    for name in names:
        if posixpath.splitext(name)[1] in WEIGHTS:
            folder = name
            while folder and (folder := posixpath.dirname(folder)) not in folders:
                folders.add(folder)
    return [
        folder
        for name in names
        if posixpath.basename(name) == CONFIG and (folder := posixpath.dirname(name)) not in folders
    ]


def _listed(cfg: Mapping[str, Any]) -> list[str]:
    """What a set's configuration says where its files are, layer by layer."""
    entries = cfg.get("transcoders")
    paths = [e.get("filepath") if isinstance(e, dict) else e for e in entries] if isinstance(entries, list) else []
    return [path for path in paths if isinstance(path, str)]


def _elsewhere(files: Files, place: str) -> FormatError:
    name = posixpath.join(place, CONFIG)
    refs = [_reference(path) for path in _listed(read_yaml(files.path(name)))]
    return FormatError(
        f"{files.place(name)} is not supported because the {len(refs)} files of its layers are elsewhere: load "
        f"each by itself, {', '.join(refs[:MOST_NAMED])}{' ...' if len(refs) > MOST_NAMED else ''}."
    )


def _reference(uri: str) -> str:
    """hf://user/repository/path?revision=R as we write it; of files that are not places, their folder."""
    found = URI.fullmatch(uri)
    if found is None:
        return uri
    repo, path, revision = found.groups()
    if re.fullmatch(r"params(_layer_\d+)?\.(npz|safetensors)", posixpath.basename(path)):
        path = posixpath.dirname(path)
    return str(HubRef(repo, path, revision))
