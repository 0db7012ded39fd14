"""What a model on the meta device says of its activations is what it has when it is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dictlearn.lm import activations, reached, resolve, skeleton
from dictlearn.lm.dry_run import aliases, dry, dry_activations
from dictlearn.types import Site
from tests.lm.test_sites import FAMILIES, N_LAYERS, names
from tests.tiny_lms import CONFIGS


def layers_of(lm: PreTrainedModel) -> list[str]:
    paths = [path for path, _ in lm.named_modules() if "vision" not in path]
    return [path for path in paths if path.rpartition(".")[2] in map(str, range(N_LAYERS))]


def sites_of(lm: PreTrainedModel, family: str) -> list[Site]:
    """All readable names, layers, and what the linear maps of one layer read and write."""
    readable = names(family) if lm.config.get_text_config().model_type in FAMILIES else []
    maps = [path for path, m in lm.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    paths = [*layers_of(lm), *(path for path in maps if path.startswith(f"{layers_of(lm)[1]}."))]
    return [resolve(lm, name) for name in (*readable, *paths, *(f"{path}:in" for path in paths))]


@pytest.mark.parametrize("family", CONFIGS)
def test_shapes_and_shared_tensors_are_those_of_the_loaded_model(model, folder, family):
    lm, tokens = model(family), torch.randint(2, 97, (3, 2), generator=torch.Generator().manual_seed(3))
    sites = sites_of(lm, family)
    real, dry = activations(lm, sites, tokens), dry_activations(skeleton(str(folder(family))), sites)
    assert {name: act.shape for name, act in dry.items()} == {name: act.shape for name, act in real.items()}
    equal: dict[tuple, list[str]] = {}
    for name, act in real.items():
        equal.setdefault((act.shape, act.numpy().tobytes()), []).append(name)
    expected = [group for group in equal.values() if len(group) > 1]
    assert [[site.name for site in group] for group in aliases(dry, sites)] == expected
    layers = layers_of(lm)
    assert any({layers[0], f"{layers[1]}:in"} <= set(group) for group in expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_depends_on_what_is_that_of_the_loaded_model(model, folder, family):
    lm, made = model(family), skeleton(str(folder(family))).requires_grad_(False)
    sites = [resolve(lm, path) for path in layers_of(lm)]
    for write in (sites[0], sites[2]):
        assert reached(made, [write], sites) == reached(lm, [write], sites)
    assert reached(lm, [sites[1]], sites) == sites[2:] != []


def test_what_never_runs_depends_on_nothing(model):
    lm = model("gemma3")
    layer, vision = (resolve(lm, name) for name in ("resid_post.1", "model.vision_tower.encoder"))
    assert reached(lm, [layer], [vision]) == []


def test_one_place_is_one_tensor_where_nothing_has_run():
    one, other = Site("a", "layers.1", "out"), Site("b", "layers.1", "in")
    again = one._replace(name="c")
    assert aliases({}, [one, other, again, one]) == [(one, again)]


def test_a_model_that_looks_at_values_does_not_run():
    lost = torch.zeros(3, device="meta")
    assert dry(lambda: lost.sum().item()) is None
    assert dry(lambda: 3) == 3
