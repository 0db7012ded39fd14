"""The dictionaries of a run: those of the experiment, at every site of `sites`, at every point of `grid`."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from dictlearn.checks import check_flag
from dictlearn.config import ConfigError, collect, plain, values_at
from dictlearn.lm import file_name, name_of, resolve_pair
from dictlearn.lm.sites import FAMILIES, KINDS
from dictlearn.types import DictlearnError, Site

OF_ONE_DICTIONARY = (  # what the points of a grid, and the `set` of a dictionary, may change
    "dictionaries",
    "dictionary",
    "sparsifier",
    "objective",
    "optimizer",
    "schedule",
    "expansion",
    "normalise",
    "init_subspace",
    "dead_after_tokens",
    "grid",
)
OF_A_NODE = (
    "site",
    "transcodes",
    "expansion",
    "normalise",
    "init_subspace",
    "module",
    "objective",
    "optimizer",
    "schedule",
)
GROUPS_OF_A_NODE = {  # and the folder of their choices
    "module": "dictionary",
    "module.sparsifier": "sparsifier",
    "objective": "objective",
    "optimizer": "optimizer",
    "schedule": "schedule",
}


class Point(NamedTuple):
    """One point of the grid: its values, and the run's configuration with them."""

    values: dict[str, Any]
    config: DictConfig


class Entry(NamedTuple):
    """One dictionary of a run.

    `name` is its folder; `base` the name without the point's values, so that a point starts from the same weights
    as the run that has its values alone. `values` are those of the grid point. Of several sites, those at the same
    place in `reads` and `writes` belong together; they are in the order of the model's modules.
    """

    name: str
    base: str
    config: DictConfig
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    values: dict[str, Any]

    @property
    def site(self) -> str:
        """Where it writes, several sites joined by "+"."""
        return "+".join(site.name for site in self.writes)


def points(cfg: DictConfig) -> list[Point]:
    """Every combination of the values of `grid`; without a grid, the one configuration.

    Raises ConfigError for keys that do not exist, that the dictionaries of one pass share, or that change nothing.
    """
    if cfg.grid is None:
        return [Point({}, cfg)]
    grid = plain(cfg.grid)
    if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
        raise ConfigError(
            [f"grid gives lists of values by key, such as 'grid={{sparsifier.k:[16,32]}}', got {cfg.grid!r}"]
        )
    if problems := _grid_problems(cfg, grid):
        raise ConfigError(problems)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Point(values, values_at(cfg, values, "grid")) for values in combinations]


def _grid_problems(cfg: DictConfig, grid: Mapping[str, list[Any]]) -> list[str]:
    problems = []
    for key, values in grid.items():
        if any(values.count(value) > 1 for value in values):
            problems.append(f"grid: the values of {key} must differ, got {values}")
        try:
            varied = [values_at(cfg, {key: value}, "grid") for value in values]
        except ConfigError as error:
            problems += error.problems
            continue
        if shared := sorted({part for config in varied for part in _shared_changes(cfg, config)}):
            problems.append(
                f"grid: {key} changes {', '.join(shared)}, which all dictionaries of one pass share (LM, data, "
                f"stream): {_instead(key, values)}"
            )
        elif same := _unmoved(varied):
            problems.append(
                f"grid: {key} has no effect on the dictionaries {', '.join(same)}: leave it out of the grid, or "
                "remove the value of their own that they have for it"
            )
    return problems


def _unmoved(varied: Sequence[DictConfig]) -> list[str]:
    """The dictionaries that are the same for two of these configurations."""
    found = [{name: plain(node) for name, node in nodes(config).items()} for config in varied]
    pairs = list(itertools.combinations(found, 2))
    return [name for name in found[0] if any(a[name] == b[name] for a, b in pairs)]


def _instead(key: str, values: Iterable[Any]) -> str:
    if key == "site":
        return f"give sites=[{','.join(map(str, values))}]"
    return f"sweep it by separate runs, 'train.py -m {key}={','.join(map(str, values))}'"


def _shared_changes(cfg: DictConfig, changed: DictConfig) -> list[str]:
    """The settings outside single dictionaries that differ."""
    before, after = OmegaConf.to_container(cfg, resolve=False), OmegaConf.to_container(changed, resolve=False)
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    return [str(key) for key in before if key not in OF_ONE_DICTIONARY and before[key] != after[key]]


def nodes(cfg: DictConfig) -> dict[str, DictConfig]:
    """The settings of each dictionary of the experiment, its `set` applied. Raises ConfigError."""
    found = {}
    for name in map(str, cfg.dictionaries):
        node = cfg.dictionaries[name]
        if not isinstance(node, DictConfig) or not set(OF_A_NODE) <= set(node):
            raise ConfigError(
                [f"dictionaries.{name} must be a choice of conf/dictionary: +dictionary@dictionaries.{name}=sae"]
            )
        if problems := _node_problems(name, node):
            raise ConfigError(problems)
        own = {} if node.get("set") is None else plain(node.set)
        if not isinstance(own, dict):
            raise ConfigError([f"dictionaries.{name}.set gives values by key, {{sparsifier.k:32}}, got {own!r}"])
        changed = values_at(cfg, own, f"dictionaries.{name}.set")
        if shared := _shared_changes(cfg, changed):
            raise ConfigError([f"dictionaries.{name}.set changes {', '.join(shared)}, which the whole run shares"])
        found[name] = OmegaConf.create(plain(changed.dictionaries[name]))
    return found


def _node_problems(name: str, node: DictConfig) -> list[str]:
    """What is wrong with the settings of a dictionary as a whole."""
    may_have = (*OF_A_NODE, "dead_after_tokens", "set")
    problems = [
        f"dictionaries.{name} has no setting {key!r}; it has {', '.join(may_have)}"
        for key in node
        if key not in may_have
    ]
    return problems + [
        f"dictionaries.{name}.{key} must be a group of settings, such as the choices in conf/{folder}, "
        f"got {value!r}"
        for key, folder in GROUPS_OF_A_NODE.items()
        if not isinstance(value := OmegaConf.select(node, key), DictConfig)
    ]


def entries(cfg: DictConfig, model: PreTrainedModel) -> list[Entry]:
    """The run's dictionaries, each named by its write sites, its key where two write the same, and its point.

    Raises ConfigError with all problems of their sites.
    """
    found: list[Entry] = []
    for point in points(cfg):
        sited = _sited(nodes(point.config), cfg.sites, model)
        names = [name_of([write.name for write in writes]) for *_, writes in sited]
        for (key, node, reads, writes), site in zip(sited, names, strict=True):
            base = site if names.count(site) == 1 else file_name(f"{site}_{key}")
            found.append(Entry(base + _suffix(point.values), base, node, reads, writes, point.values))
    names = [entry.name for entry in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError([f"Two dictionaries of the run would have the same name: {', '.join(twice)}"])
    return found


def _sited(
    found: Mapping[str, DictConfig], sites: Any, model: PreTrainedModel
) -> list[tuple[str, DictConfig, tuple[Site, ...], tuple[Site, ...]]]:
    """Key, settings, read and write sites of every dictionary."""
    placed = []
    problems: list[str] = []
    for key, node in found.items():
        groups = collect(problems, lambda k=key, n=node: _site_groups(k, n, sites, model)) or []
        for names in groups:
            try:
                pairs = [_site_pair(model, key, name, node) for name in names]
            except DictlearnError as error:
                problems.append(str(error))
                continue
            order = {path: place for place, (path, _) in enumerate(model.named_modules())}
            pairs.sort(key=lambda pair: (order[pair[0].module], pair[0].io == "out"))
            own = OmegaConf.merge(node, {"site": names if takes_several(node) else names[0]})
            assert isinstance(own, DictConfig)
            placed.append((key, own, tuple(read for read, _ in pairs), tuple(write for _, write in pairs)))
    if problems:
        raise ConfigError(problems)
    return placed


def takes_several(node: DictConfig) -> bool:
    """Whether the architecture of a dictionary reads and writes lists of sites."""
    try:
        return bool(getattr(get_class(str(OmegaConf.select(node, "module._target_"))), "site_axis", False))
    except (ImportError, ValueError):
        return False  # said where it is built


def _site_groups(key: str, node: DictConfig, sites: Any, model: PreTrainedModel) -> list[list[str]]:
    """The site names of every dictionary of a node. Raises DictlearnError."""
    site = plain(node.site)
    if site is None and sites is None:
        raise DictlearnError(
            "site is required: give site=..., such as resid_post.2, mlp.2 for a transcoder, or 'resid_post.*' for "
            "a dictionary over several sites"
        )
    if not takes_several(node):
        if sites is None and (not isinstance(site, str) or _is_glob(site)):
            raise DictlearnError(
                f"dictionaries.{key}: site must be a name such as resid_post.2, got {site!r}: sites=... trains a "
                "dictionary at each of several sites, dictionary=crosscoder or cross_layer one over all of them"
            )
        return [[name] for name in ([str(site)] if sites is None else expand_sites(sites, model))]
    if sites is not None:
        raise DictlearnError(
            f"dictionaries.{key} is one dictionary over several sites, and sites={sites!r} asks for one at each: "
            "give site, a list or a glob such as site='resid_post.*'"
        )
    return [expand_sites(site, model, "site")]


def _site_pair(model: PreTrainedModel, key: str, name: str, node: DictConfig) -> tuple[Site, Site]:
    check_flag(f"dictionaries.{key}.transcodes", node.transcodes)
    read, write = resolve_pair(model, name)
    if node.transcodes and read == write:
        raise DictlearnError(
            f"dictionaries.{key}: a transcoder needs a site that reads and writes, such as mlp.2, got {name}"
        )
    if not node.transcodes and read != write:
        several = takes_several(node)
        rule = "a crosscoder writes what it reads" if several else "a sparse autoencoder reads and writes one site"
        raise DictlearnError(
            f"dictionaries.{key}: {rule}, but {name} reads {read.name} and writes {write.name}: use one of them, "
            f"or dictionary={'cross_layer' if several else 'transcoder'}"
        )
    return read, write


def expand_sites(sites: Any, model: PreTrainedModel, key: str = "sites") -> list[str]:
    """Site names of a list of names and globs ("resid_post.*", "mlp.[0-5]"), or of one; each once.

    A glob stands for readable names, or for module paths where no readable name matches. Raises DictlearnError,
    about the setting `key`, where it matches nothing.
    """
    patterns = [sites] if isinstance(sites, str) else plain(sites)
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise DictlearnError(f"{key} is a list of site names or a glob, such as 'resid_post.*', got {sites!r}")
    names: dict[str, None] = {}
    readable = _readable(model)
    for pattern in patterns:
        if not _is_glob(pattern):
            names[pattern] = None
            continue
        paths = [path for path, _ in model.named_modules() if path]
        matches = fnmatch.filter(readable, pattern) or fnmatch.filter(paths, pattern)
        if not matches:
            choices = f"readable names such as {', '.join(readable[:3])}" if readable else "module paths"
            raise DictlearnError(f"{key}: {pattern!r} matches no site of this model, which has {choices}")
        names |= dict.fromkeys(matches)
    return list(names)


def _is_glob(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _readable(model: PreTrainedModel) -> list[str]:
    """The readable names that this model has, and the pairs `mlp.L`."""
    config = model.config.get_text_config()
    if config.model_type not in FAMILIES:
        return []
    layers = range(config.num_hidden_layers)
    kinds = [kind for kind in (*KINDS, "mlp") if kind != "embed"]
    names = ["embed", *(f"{kind}.{layer}" for kind in kinds for layer in layers)]
    return [name for name in names if _exists(model, name)]


def _exists(model: PreTrainedModel, name: str) -> bool:
    try:
        resolve_pair(model, name)
    except DictlearnError:
        return False
    return True


def _suffix(values: Mapping[str, Any]) -> str:
    """`{"sparsifier.k": 16, "optimizer.lr": 1e-4}` -> `_k-16_lr-1e-4`; longer keys where short ones are equal."""
    shorts = [key.rpartition(".")[2] for key in values]
    keys = [short if shorts.count(short) == 1 else key for short, key in zip(shorts, values, strict=True)]
    return "".join(
        f"_{file_name(f'{key}-{_short(value)}')}" for key, value in zip(keys, values.values(), strict=True)
    )


def _short(value: Any) -> str:
    """Numbers as one writes them: 1e-4, 0.05, 16; two different ones are never the same text."""
    if not isinstance(value, float) or value == 0:
        return str(value)
    mantissa, exponent = f"{value:e}".split("e")
    scientific = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if float(scientific) != value:
        return repr(value)
    return scientific if abs(int(exponent)) > 2 else repr(value)


def sites_of(found: Iterable[Entry]) -> list[Site]:
    """Every site to capture, once."""
    return list(dict.fromkeys(site for entry in found for site in (*entry.reads, *entry.writes)))
