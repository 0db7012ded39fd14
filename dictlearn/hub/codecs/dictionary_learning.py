"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt`, a torch state, beside the `config.json` of its training.

The class is in the configuration, and its tensors must be those of the file; without one they tell the class, but
for TopK and BatchTopK, whose tensors have the same names. `nn.Linear` weights are [out, in]. The rules:

    AutoEncoder              relu; x - b_dec; its loader gives decoder rows unit norm, and so do we
    AutoEncoderNew           relu; x
    GatedAutoEncoder         a magnitude where its gate is open; x - b_dec
    AutoEncoderTopK          relu, then the k largest; x - b_dec; its threshold is not used
    BatchTopKSAE, Matryoshka...   relu above one threshold, which below 0 has never been set; x - b_dec
    JumpReluAutoEncoder      relu above thresholds; x

The `ae.pt` of an interrupted training is a backup, in the units of normalised activations: biases and thresholds
are multiplied by its norm_factor. What was saved in between, `checkpoints/ae_STEP.pt`, is as `ae.pt`; it is loaded
by its own path alone.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dictlearn.checks import LARGEST
from dictlearn.choices import is_count
from dictlearn.dictionaries import Dictionary
from dictlearn.dictionaries.linear import Linear
from dictlearn.hub.canonical import Weights, check_finite, gate, linear
from dictlearn.hub.codecs._writing import check_held, lacks, write_text, write_torch
from dictlearn.hub.codecs.base import folders_with
from dictlearn.hub.files import Files
from dictlearn.hub.names import HOOKS
from dictlearn.hub.weights import check_tensors, encoder_sizes, number_in, read_json, read_torch
from dictlearn.sparsifiers.relu import ReLU
from dictlearn.sparsifiers.top_k import TopK
from dictlearn.types import DictlearnError, FormatError

WEIGHTS, CONFIG = "ae.pt", "config.json"
CHECKPOINT = re.compile(r"(?:(.+)/)?checkpoints/ae_\d+\.pt")
LINEAR = {"encoder.weight": "nd", "encoder.bias": "n", "decoder.weight": "dn"}
PLAIN = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d"}
SHAPES = {  # class -> tensor -> axes: d the width, n the latents, g the groups
    "AutoEncoder": {**LINEAR, "bias": "d"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "d"},
    "GatedAutoEncoder": {
        "encoder.weight": "nd",
        "decoder.weight": "dn",
        **{"decoder_bias": "d", "gate_bias": "n", "mag_bias": "n", "r_mag": "n"},
    },
    "AutoEncoderTopK": {**LINEAR, "b_dec": "d", "k": "", "threshold": ""},
    "BatchTopKSAE": {**LINEAR, "b_dec": "d", "k": "", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**PLAIN, "k": "", "threshold": "", "group_sizes": "g"},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "n"},
}
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")
NORMALISED = ("bias", "b_enc", "b_dec", "encoder.bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias")
CLASSES = {"relu": "AutoEncoderNew", "top_k": "AutoEncoderTopK", "jump_relu": "JumpReluAutoEncoder"}  # written
HOLDS = "dictionary_learning has ReLU, TopK and JumpReLU autoencoders"
SITES = {  # of the submodules, by the end of them that is meant
    "in": {"resid": "resid_pre", "att": "attn_in", "mlp": "mlp_in"},
    "out": {"resid": "resid_post", "att": "attn_out", "mlp": "mlp_out"},
}


class State(NamedTuple):
    """The tensors of a class of this name."""

    kind: str
    tensors: dict[str, Tensor]


class DictionaryLearning:
    """All seven classes, and backups of interrupted trainings."""

    layout: ClassVar[str] = f"{WEIGHTS} or checkpoints/ae_STEP.pt with the tensors of one of {', '.join(SHAPES)}"

    def find(self, names: Sequence[str]) -> list[str]:
        return folders_with(names, WEIGHTS)

    def named(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if CHECKPOINT.fullmatch(name)]

    def matches(self, files: Files, place: str) -> bool:
        return True  # no other format has a file of this name

    def read(self, files: Files, place: str) -> Dictionary:
        earlier = CHECKPOINT.fullmatch(place)
        folder, name = (earlier[1] or "", place) if earlier else (place, posixpath.join(place, WEIGHTS))
        path, config = files.path(name), posixpath.join(folder, CONFIG)
        cfg = read_json(files.path(config)) if config in files.names else {}
        trainer, buffer = (part if isinstance(part := cfg.get(key), dict) else {} for key in ("trainer", "buffer"))
        state = _state(path, trainer.get("dict_class"))
        read, write = _sites(trainer, buffer)
        metadata = {"lm_name": trainer.get("lm_name"), "ctx": buffer.get("ctx_len")}
        try:
            return _canonical(path, state, read, write, metadata)
        except FormatError:
            raise
        except DictlearnError as error:
            raise FormatError(f"{path}: {error}") from None

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path) -> None:
        """ReLU as AutoEncoderNew, TopK as AutoEncoderTopK, JumpReLU as JumpReluAutoEncoder."""
        reasons = [
            *lacks(dictionary, CLASSES),
            (not dictionary.is_autoencoder, "it is a transcoder"),
            (dictionary.W_skip is not None, "it has a skip path"),
        ]
        check_held(HOLDS, dictionary, reasons)
        write_torch(folder / WEIGHTS, _their_tensors(dictionary))
        write_text(folder / CONFIG, json.dumps(_their_config(dictionary), indent=4))


def _their_tensors(dictionary: Dictionary) -> Mapping[str, Tensor]:
    W_enc, b_enc, W_dec, b_dec = dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.b_dec
    match CLASSES[dictionary.sparsifier.kind]:
        case "JumpReluAutoEncoder":
            plain = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
            return plain | {"threshold": dictionary.get_parameter("sparsifier.threshold")}
        case "AutoEncoderTopK":
            k = torch.tensor(dictionary.sparsifier.config()["k"], dtype=torch.int)
            bias = {"encoder.bias": b_enc + b_dec @ W_enc, "b_dec": b_dec, "k": k, "threshold": torch.tensor(-1.0)}
        case _:
            bias = {"encoder.bias": b_enc, "decoder.bias": b_dec}
    return {"encoder.weight": W_enc.T, "decoder.weight": W_dec.T, **bias}


def _their_config(dictionary: Dictionary) -> dict[str, Any]:
    site, layer = dictionary.reads[0], dictionary.reads[0].rpartition(".")[2]
    kind = site.partition(".")[0]
    names = {"mlp_in": "mlp_layer_", "mlp_out": "mlp_out_layer_", "attn_out": "attn_out_layer_"}
    names["resid_post"] = "resid_post_layer_"
    trainer = {
        "dict_class": CLASSES[dictionary.sparsifier.kind],
        "activation_dim": dictionary.d_in,
        "dict_size": dictionary.n_latents,
        "k": dictionary.sparsifier.config().get("k"),
        "layer": int(layer) if layer.isdigit() else None,
        "lm_name": dictionary.metadata.get("lm_name"),
        "submodule_name": f"{names[kind]}{layer}" if kind in names else site,
    }
    buffer = {
        "d_submodule": dictionary.d_in,
        "io": "in" if kind == "mlp_in" else "out",
        "ctx_len": dictionary.metadata.get("ctx"),
    }
    return {"trainer": trainer, "buffer": buffer}


def _state(path: Path, kind: object) -> State:
    """The tensors in raw units, checked against the class, which is found out if `kind` is None."""
    content, factor = read_torch(path), 1.0
    if isinstance(content.get("ae"), dict):  # a backup
        norm = content.get("norm_factor", 1.0)
        number = number_in(norm)
        if number is None or not 0 < number <= LARGEST:
            raise FormatError(f"{path}: norm_factor must be a positive number, got {norm!r}.")
        content, factor = content["ae"], float(number)
    if odd := sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor)):
        raise FormatError(f"{path} must hold tensors alone; {odd} are not.")
    fitting = [name for name, shapes in SHAPES.items() if set(shapes) == set(content)]
    if kind is None and len(fitting) == 1:
        (kind,) = fitting
    if not isinstance(kind, str) or kind not in SHAPES:
        raise FormatError(
            f"{path}: the class must be one of {', '.join(SHAPES)}, got {kind!r} as {CONFIG}'s dict_class; "
            f"the tensors {sorted(map(str, content))} are those of {' or '.join(fitting) or 'none of them'}."
        )
    check_tensors(path, content, _shapes(path, kind, content), integers=("k", "group_sizes"))
    scaled = {name: content[name].float() * factor for name in {*NORMALISED, "threshold"} & set(content)}
    return State(kind, content | scaled)


def _shapes(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What the shapes of this class are with the widths of its encoder."""
    key = "W_enc" if "W_enc" in SHAPES[kind] else "encoder.weight"
    sizes = dict(zip(SHAPES[kind][key], encoder_sizes(path, tensors, key), strict=True))
    sizes["g"] = tensors["group_sizes"].numel() if "group_sizes" in tensors else 0
    return {name: tuple(sizes[axis] for axis in axes) for name, axes in SHAPES[kind].items()}


def _canonical(path: Path, state: State, read: str, write: str, metadata: Mapping[str, Any]) -> Dictionary:
    kind, w = state
    linear_layers = "encoder.weight" in w
    W_enc, W_dec = (w["encoder.weight"].T, w["decoder.weight"].T) if linear_layers else (w["W_enc"], w["W_dec"])
    b_enc = next(w[name] for name in ("encoder.bias", "b_enc", "mag_bias") if name in w)
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in w)
    sparsifier, threshold = None, None
    match kind:
        case "AutoEncoder" | "AutoEncoderNew":
            sparsifier = ReLU(l1=0.0)
        case "AutoEncoderTopK":
            sparsifier = TopK(_k(w["k"]))
            sparsifier.bind(len(b_enc))
        case "GatedAutoEncoder":
            growth, b_enc, threshold = gate(w["gate_bias"], w["r_mag"], w["mag_bias"])
            W_enc = W_enc * growth
        case _:
            threshold = w["threshold"].expand(len(b_enc))
    weights = Weights(W_enc, b_enc, W_dec, b_dec, threshold)
    centred = kind not in UNCENTRED
    made = linear(path, weights, sparsifier, read, write, b_dec_on_input=centred, metadata=metadata)
    if kind == "AutoEncoder":
        _unit_rows(made)
        check_finite(path, made)
    return made


@torch.no_grad()
def _unit_rows(made: Linear) -> None:
    """What decoder rows are longer than 1 goes to the latents, in place."""
    norms = made.decoder_norms()
    norms = torch.where(norms > 0, norms, 1.0)
    made.W_dec.div_(norms.unsqueeze(-1))
    made.scale_latents_(norms)


def _k(k: Tensor) -> int:
    if not is_count(value := k.item(), 1):
        raise DictlearnError(f"k must be a whole number from 1, got {value!r}.")
    return int(value)


def _sites(trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> tuple[str, str]:
    """Read and write site, by the name of the submodule; without one the residual stream after the layer."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    if not isinstance(name, str):
        site = f"resid_post.{layer}" if is_count(layer, 0) else "x"
        return site, site
    if name.partition(".")[0] in HOOKS and re.fullmatch(r"\w+\.\d+", name):
        return name, name  # as we write those that have no name there
    found = re.fullmatch(r"(resid|att|mlp)(?:_post|n|ention)?(?:_out)?_(?:layer_?)?(\d+)", name)
    ends = SITES.get(str(buffer.get("io") or "out"))
    if found is None or ends is None:
        return "x", "x"
    return f"{ends[found[1]]}.{found[2]}", f"{ends[found[1]]}.{found[2]}"
