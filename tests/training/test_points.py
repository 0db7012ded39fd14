"""The dictionaries of a run: grid, sites, settings of one dictionary alone."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dictlearn.config import ConfigError
from dictlearn.lm import skeleton
from dictlearn.lm.sites import LONGEST_NAME, name_of
from dictlearn.training.points import entries, expand_sites, points
from dictlearn.types import DictlearnError
from tests.runs import composed
from tests.tiny_lms import tiny_lm_folder


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return skeleton("embedded")


def test_a_grid_is_every_combination(model: PreTrainedModel) -> None:
    cfg = composed("train", ["grid={sparsifier.k:[16,32],optimizer.lr:[1e-4,3e-4,0.05]}"])
    found = entries(cfg, model)
    assert len(found) == 3 * 6
    names = [entry.name for entry in found if entry.base == "mlp_out.2"]
    lrs = ("1e-4", "3e-4", "0.05")
    assert names == [f"mlp_out.2_k-{k}_lr-{lr}" for k in (16, 32) for lr in lrs]
    values = {(e.config.module.sparsifier.k, e.config.optimizer.lr) for e in found if e.base == "mlp_out.2"}
    assert values == {(k, lr) for k in (16, 32) for lr in (1e-4, 3e-4, 0.05)}
    assert all(
        e.values == {"sparsifier.k": e.config.module.sparsifier.k, "optimizer.lr": e.config.optimizer.lr}
        for e in found
    )


def test_values_that_print_alike_have_names_that_differ(model: PreTrainedModel) -> None:
    cfg = composed("train", ["grid={optimizer.lr:[0.00012345678,0.000123456781]}"])
    assert len({entry.name for entry in entries(cfg, model)}) == 6


@pytest.mark.parametrize(
    "key", ["expansion", "normalise", "dead_after_tokens", "schedule.decay", "objective.aux_k.k"]
)
def test_what_belongs_to_one_dictionary_may_vary(key: str) -> None:
    values = {"normalise": "none,mean_norm"}.get(key, "1,0")
    assert len(points(composed("train", [f"grid={{{key}:[{values}]}}"]))) == 2


WRONG = [
    (
        "grid={data.ctx:[64,128]}",
        "data.ctx changes data, which all dictionaries of one pass share.*-m data.ctx=64,128",
    ),
    ("grid={lm.name:[a,b]}", "changes lm"),
    ("grid={seed:[0,1]}", "changes seed.*-m seed=0,1"),
    ("grid={batch_size:[64,128]}", "changes batch_size"),
    ("grid={n_tokens:[64,128]}", "changes n_tokens"),
    ("grid={stream:[shuffled,sequences]}", "changes stream"),
    ("grid={site:[resid_post.0,resid_post.1]}", r"give sites=\[resid_post.0,resid_post.1\]"),
    ("grid={sparsifer.k:[1,2]}", "there is no key 'sparsifer.k': did you mean sparsifier.k"),
    ("grid={sparsifier:[relu,top_k]}", "sparsifier is a group.*-m sparsifier=A,B"),
    ("grid={sparsifier.k:[4,4]}", "must differ"),
    ("grid={sparsifier.k:4}", "gives lists of values"),
    ("grid={}", "gives lists of values"),
    ("grid=[1]", "gives lists of values"),
    ("grid={dictionary.module.skip:[true,false]}", "has no effect on the dictionaries resid, attn, mlp"),
    ("grid={dictionaries.resid.optimizer.lr:[1,2]}", "belongs to optimizer.lr, which several dictionaries share"),
    ("grid={dictionaries.resid.expansion:[1,2]}", "has no effect on the dictionaries attn, mlp"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_grid_that_cannot_be_one_pass_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        points(composed("train", [override]))


def test_a_value_of_its_own_beats_no_grid() -> None:
    own = "dictionaries.resid.set={sparsifier.k:3}"
    with pytest.raises(ConfigError, match=r"sparsifier\.k has no effect on the dictionaries resid"):
        points(composed("train", [own, "grid={sparsifier.k:[1,2]}"]))
    assert len(points(composed("train", [own, "grid={optimizer.lr:[1,2]}"]))) == 2


def test_all_problems_of_a_grid_are_said() -> None:
    with pytest.raises(ConfigError) as error:
        points(composed("train", ["grid={seed:[0,1],data.ctx:[1,2],nothing:[1]}"]))
    assert len(error.value.problems) == 3


def test_sites_are_names_and_globs(model: PreTrainedModel) -> None:
    def names(*overrides: str) -> list[str]:
        return [e.name for e in entries(composed("train", ["experiment=single", *overrides]), model)]

    assert names("sites=[resid_post.0,resid_post.3]") == ["resid_post.0", "resid_post.3"]
    assert names("sites=resid_post.*") == [f"resid_post.{layer}" for layer in range(4)]
    assert names("sites=[resid_post.0,resid_p*.0]") == ["resid_post.0", "resid_pre.0"]
    assert names("sites=mlp.*", "dictionary=transcoder") == [f"mlp_out.{layer}" for layer in range(4)]
    assert names("sites=transformer.h.*.mlp.act") == [f"transformer.h.{layer}.mlp.act" for layer in range(4)]
    assert names("sites=resid_post.*", "grid={sparsifier.k:[4,8]}")[4] == "resid_post.0_k-8"


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("sites=resid_pots.*", "matches no site of this model, which has readable names such as embed"),
        ("sites=[]", "sites is a list"),
        ("sites=[1]", "sites is a list"),
        ("sites=[resid_post.7]", "layer must be 0 to 3"),
        ("sites=mlp.*", "reads and writes one site, but mlp.0"),
    ],
)
def test_wrong_sites_are_refused(model: PreTrainedModel, sites: str, message: str) -> None:
    with pytest.raises(DictlearnError, match=message):
        entries(composed("train", ["experiment=single", sites]), model)


def test_a_glob_of_a_parallel_model_leaves_out_what_it_lacks(tmp_path: Path) -> None:
    parallel = skeleton(str(tiny_lm_folder(tmp_path / "neox", "gpt_neox", n_layers=2)))
    assert expand_sites("resid_*.0", parallel) == ["resid_pre.0", "resid_post.0"]


def sites_of_single(model: PreTrainedModel, *overrides: str) -> tuple[str, list[str], list[str]]:
    """Name, reads and writes of the one dictionary of a run."""
    (entry,) = entries(composed("train", ["experiment=single", *overrides]), model)
    return entry.name, [site.name for site in entry.reads], [site.name for site in entry.writes]


def test_one_dictionary_over_several_sites(model: PreTrainedModel) -> None:
    stream = [f"resid_post.{layer}" for layer in range(4)]
    assert sites_of_single(model, "dictionary=crosscoder", "site=resid_post.*") == (
        "resid_post.0-3",
        stream,
        stream,
    )
    some = ["resid_pre.0", "attn_out.2"]  # in the order of the modules, however they are listed
    expected = ("resid_pre.0_attn_out.2", some, some)
    assert sites_of_single(model, "dictionary=crosscoder", "site=[attn_out.2,resid_pre.0]") == expected
    one = sites_of_single(model, "dictionary=crosscoder", "site=resid_post.1")
    assert one == ("resid_post.1", ["resid_post.1"], ["resid_post.1"])
    reads, writes = ([f"{kind}.{layer}" for layer in range(4)] for kind in ("mlp_in", "mlp_out"))
    assert sites_of_single(model, "dictionary=cross_layer", "site=mlp.*") == ("mlp_out.0-3", reads, writes)
    backwards = sites_of_single(model, "dictionary=cross_layer", "site=[mlp.3,mlp.1,mlp.2]")
    assert backwards == ("mlp_out.1-3", reads[1:], writes[1:])
    acausal = sites_of_single(model, "dictionary=crosscoder", "dictionary.transcodes=true", "site=mlp.*")
    assert acausal == ("mlp_out.0-3", reads, writes)


@pytest.mark.parametrize(
    ("writes", "name"),
    [
        (["resid_post.2"], "resid_post.2"),
        (["a.8", "a.9", "a.10"], "a.8-10"),
        (["a.0", "a.2", "a.3", "b.4"], "a.0_a.2-3_b.4"),
        (["embed", "resid_post.0"], "embed_resid_post.0"),
        (["h.0.mlp:in", "h.1.mlp:in"], "h.0.mlp-in_h.1.mlp-in"),
    ],
)
def test_names_of_several_sites(writes: list[str], name: str) -> None:
    assert name_of(writes) == name


def test_long_names_end_in_a_hash() -> None:
    sites = [f"transformer.h.{layer}.mlp" for layer in range(40)]
    names = {name_of(sites), name_of(sites[:-1]), name_of(sites[:-2])}
    assert len(names) == 3
    assert all(LONGEST_NAME < len(name) <= LONGEST_NAME + 9 for name in names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["site=resid_post.*"],
            r"site must be a name .*got 'resid_post\.\*': sites=\.\.\. trains a dictionary at each",
        ),
        (
            ["site=[resid_post.0,resid_post.1]"],
            r"site must be a name .*got \['resid_post.0', .*sites=\.\.\. trains",
        ),
        (["site=3"], "site must be a name such as resid_post.2, got 3"),
        (["dictionary=crosscoder"], "site is required: .*or 'resid_post.*' for a dictionary over several sites"),
        (
            ["dictionary=crosscoder", "sites=resid_post.*"],
            "is one dictionary over several sites, and sites='resid_post.*' asks for one at each: give site",
        ),
        (["dictionary=crosscoder", "site=resid_pots.*"], "site: 'resid_pots.*' matches no site of this model"),
        (["dictionary=crosscoder", "site=[]"], "site is a list of site names or a glob"),
        (["dictionary=crosscoder", "site=mlp.*"], "a crosscoder writes what it reads.*or dictionary=cross_layer"),
        (["dictionary=cross_layer", "site=resid_post.*"], "a transcoder needs a site that reads and writes"),
        (["dictionary=crosscoder", "site=[resid_post.0,resid_post.9]"], "layer must be 0 to 3"),
    ],
)
def test_wrong_sites_of_one_dictionary_are_refused(
    model: PreTrainedModel, overrides: list[str], message: str
) -> None:
    with pytest.raises(DictlearnError, match=message):
        entries(composed("train", ["experiment=single", *overrides]), model)


def test_one_dictionary_can_have_values_of_its_own(model: PreTrainedModel) -> None:
    cfg = composed("train", ["dictionaries.attn.set={sparsifier.k:3,optimizer.lr:0.5,normalise:none}"])
    found = {entry.name: entry.config for entry in entries(cfg, model)}
    assert [found[name].module.sparsifier.k for name in ("resid_post.2", "attn_out.2", "mlp_out.2")] == [16, 3, 16]
    assert [found[name].optimizer.lr for name in ("resid_post.2", "attn_out.2", "mlp_out.2")] == [None, 0.5, None]
    assert found["attn_out.2"].normalise == "none"
    with pytest.raises(ConfigError, match=r"dictionaries.attn.set changes seed"):
        entries(composed("train", ["dictionaries.attn.set={seed:3}"]), model)
    with pytest.raises(ConfigError, match="there is no key 'sparsifer\\.k'"):
        entries(composed("train", ["dictionaries.attn.set={sparsifer.k:3}"]), model)
    with pytest.raises(ConfigError, match=r"dictionaries\.attn\.set gives values by key, .*got 3"):
        entries(composed("train", ["dictionaries.attn.set=3"]), model)


def test_a_further_dictionary_is_a_choice_of_its_group(model: PreTrainedModel) -> None:
    more = ["+dictionary@dictionaries.early=sae", "dictionaries.early.site=resid_post.0"]
    assert [e.name for e in entries(composed("train", more), model)][-1] == "resid_post.0"
    with pytest.raises(
        ConfigError, match=r"must be a choice of conf/dictionary: \+dictionary@dictionaries.early=sae"
    ):
        entries(composed("train", ["+dictionaries.early.site=resid_post.0"]), model)
