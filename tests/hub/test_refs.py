"""References to places on the Hub."""

import pytest

from dictlearn.hub.refs import HubRef, parse
from dictlearn.types import DictlearnError

GOOD = {
    "google/gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82": HubRef(
        "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"
    ),
    "a/b": HubRef("a/b"),
    "a/b@v1": HubRef("a/b", "", "v1"),
    "a/b:c/d@refs/pr/3": HubRef("a/b", "c/d", "refs/pr/3"),
    "a/b@refs/pr/3:c/d": HubRef("a/b", "c/d", "refs/pr/3"),
    "a/b:c/": HubRef("a/b", "c"),
    "t/gpt2-mlp:sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0": HubRef(
        "t/gpt2-mlp", "sae_group_gpt2_blocks.1.hook_mlp_out_24576:v0"
    ),
    "t/gpt2-mlp:group:v0@main": HubRef("t/gpt2-mlp", "group:v0", "main"),
}


@pytest.mark.parametrize("text", GOOD)
def test_the_parts_of_a_reference(text: str) -> None:
    assert parse(text) == GOOD[text]
    assert parse(str(parse(text))) == GOOD[text]


@pytest.mark.parametrize(
    "text", ["", "a", "a/b/c", "a/b:", "a/b@", "a/b:c@", "/a/b", "-a/b", "a b/c", "a/b@x y", "@v"]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(DictlearnError, match="A dictionary is named by"):
        parse(text)


@pytest.mark.parametrize("path", ["../c", "c/../../d", "c//d", "./c", "c/.."])
def test_paths_stay_in_the_repository(path: str) -> None:
    with pytest.raises(DictlearnError, match="no empty parts"):
        parse(f"a/b:{path}")
