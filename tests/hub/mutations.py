"""Files with something wrong in them: any bytes, and in configurations values of other types."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from numpy.random import Generator

T = TypeVar("T")


def one_of(random: Generator, choices: Sequence[T]) -> T:
    return choices[int(random.integers(len(choices)))]


def odd(random: Generator, choices: Sequence[Any]) -> Any:
    """One of these, a copy that may be changed."""
    return copy.deepcopy(one_of(random, choices))


def some(random: Generator) -> range:
    """Most often one time."""
    return range(min(int(random.geometric(0.6)), 4))


# -- bytes --


MARKS = b'{}[]",:0-9eE.x&*!'


def any_bytes(content: bytes, random: Generator) -> bytes:
    """Bytes that are replaced, cut off, missing, or there twice."""
    for _ in some(random):
        if not content:
            break
        start, n = int(random.integers(len(content))), 1 + int(random.integers(64))
        before, inside, after = content[:start], content[start : start + n], content[start + n :]
        scattered = bytearray(content)
        for place in random.integers(len(content), size=int(random.integers(1, 9))):
            scattered[place] = random.integers(256)
        flipped = bytes([inside[0] ^ 1 << int(random.integers(8))])
        mark = MARKS[start % len(MARKS) :][:1]
        changes = (
            *(before, inside + after, before + after, before + inside + inside + after, content + inside, b""),
            *(before + bytes(len(inside)) + after, before + random.bytes(len(inside)) + after),
            *(before + flipped + inside[1:] + after, before + mark + after, bytes(scattered), bytes(scattered)),
        )
        content = one_of(random, changes)
    return content


# -- trees of values --

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 20, 3.5, -0.0, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(2**31, 2**63, 10**12, 10**400, "", "x", "relu", "topk", "\x00", "\ud800", "../../x", "9", "resid_post.3"),
    *([], [1, 2], [[]], {}, {"a": 1}, {"k": 3}),
)
WRITTEN = {  # what no value is written as, by the string that stands for it
    "@digits4000@": "9" * 4000,
    "@digits5000@": "9" * 5000,
    "@nested500@": "[" * 500 + "]" * 500,
    "@nested960@": '{"a":' * 960 + "1" + "}" * 960,
    "@nested9999@": "[" * 9999 + "]" * 9999,
}
YAML = {
    "@hexadecimal@": "0x" + "f" * 5000,
    "@date@": "2020-01-31",
    "@time@": "1:30:15",
    "@loop@": "&loop [*loop]",
    "@bytes@": "!!binary aGVsbG8=",
    "@set@": "!!set {a, b}",
    "@code@": "!!python/object/apply:print [run]",
    "@key@": "{[1, 2]: 3, 4: 5, 2020-01-31: 6, null: 7}",
    "@many@": "[&a0 [x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)) + "]",
}


def children(value: Any) -> list[tuple[Any, Any]]:
    """The container and the key of everything below a value: mappings, lists, attributes of objects."""
    if isinstance(value, dict):
        own: Any = value
        keys: Sequence[Any] = list(own)
    elif isinstance(value, list):
        own, keys = value, range(len(value))
    elif type(value).__module__.startswith("sae_training"):
        own = vars(value)
        keys = list(own)
    else:
        return []
    return [(own, key) for key in keys] + [place for key in keys for place in children(own[key])]


def change_tree(tree: Any, change: Callable[[Any], Any], random: Generator) -> Any:
    """A value of another type, two that are exchanged, one that is missing or under another name."""
    for _ in some(random):
        places = children(tree)
        if not places or random.random() < 0.03:
            return change(tree)
        (own, key), (other, place) = one_of(random, places), one_of(random, places)
        match int(random.integers(8)):
            case 0:
                del own[key]
            case 1:
                own[key], other[place] = other[place], own[key]
            case 2 if isinstance(own, dict):
                own[one_of(random, ("x", "", place, f"{key}_", 3, "\ud800"))] = own.pop(key)
            case 3 if isinstance(own, dict):
                own[one_of(random, ("x", place, f"{key}_"))] = own[key]
            case 4:
                own[key] = [own[key]]
            case _:
                own[key] = change(own[key])
        if _holds_itself(tree):
            return change(tree)
    return tree


def _holds_itself(tree: Any, above: tuple[int, ...] = ()) -> bool:
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return id(tree) in above or any(_holds_itself(part, (*above, id(tree))) for part in inside)


def json_values(content: bytes, random: Generator) -> bytes:
    """A configuration with other values, also ones that JSON has not."""
    choices = (*ODD, *WRITTEN)
    tree = change_tree(json.loads(content), lambda _: odd(random, choices), random)
    return written(json.dumps(with_text_keys(tree)), WRITTEN)


def yaml_values(content: bytes, random: Generator) -> bytes:
    choices = (*ODD, "@digits4000@", "@digits5000@", "@nested500@", *YAML)  # deeper ones take a second to scan
    tree = change_tree(yaml.safe_load(content), lambda _: odd(random, choices), random)
    return written(yaml.safe_dump(tree), WRITTEN | YAML)


def with_text_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): with_text_keys(value) for key, value in tree.items()}
    return [with_text_keys(value) for value in tree] if isinstance(tree, list) else tree


def written(text: str, strings: Mapping[str, str]) -> bytes:
    return re.sub("['\"](@\\w+@)['\"]", lambda found: strings[found[1]], text).encode()
