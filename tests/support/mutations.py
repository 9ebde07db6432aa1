"""A user's files, broken by structure: a value of another type, a key gone, twice or deep, bytes that are not text.

Random bytes hardly ever get past a parser. These start from a valid file and change one to three places of it, so that
most of the content is right and the code behind the parser is reached.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NASTY_TEXT = [
    "", " ", "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "[bold red]x[/]", "a\nb\r\nc", "\x00", "\ud800",
    "../../etc/passwd", "~nobody-at-all/x", "/dev/zero", "x" * 5000, "\u0130" * 300, "model.layers.*.norm.weight",
    "{0}", "%s%n", "(a+)+$", "(", "auto", "true", "1", "nan", "LlamaForCausalLM", "AutoConfig", "no/such",
]  # fmt: skip
NASTY_NUMBERS = [
    0, 1, -1, 2, 3, 7, 127, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63),
    0.0, -0.0, 0.5, 1e-320, 1e308, -1.5, 32.0, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
DEPTHS = (30, 200, 5000)


def nested(depth: int, of: str = "list") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if of == "list" else {"a": value}
    return value


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NASTY_NUMBERS),
    st.sampled_from(NASTY_TEXT),
    st.integers(),
    st.text(max_size=6),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.one_of(st.sampled_from(NASTY_TEXT[:12]), st.text(max_size=4)), scalars, max_size=3),
    st.builds(nested, st.just(DEPTHS[0]), st.sampled_from(["list", "object"])),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value inside of a JSON value, its own left out."""
    found = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        found += [(*path, key), *places(each, (*path, key))]
    return found


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


@st.composite
def mutated(draw: st.DrawFn, original: Any, most: int = 3) -> Any:
    """A JSON value with one to `most` places changed."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, most))):
        there = places(value)
        if not there or draw(st.integers(0, 40)) == 0:
            return draw(values)
        path = draw(st.sampled_from(there))
        parent, key = parent_of(value, path), path[-1]
        what = draw(st.sampled_from(["replace"] * 5 + ["remove", "wrap", "object", "rename", "swap", "more"]))
        if what == "replace":
            parent[key] = draw(values)
        elif what == "remove":
            del parent[key]
        elif what == "wrap":
            parent[key] = [parent[key]]
        elif what == "object":
            parent[key] = {"x": parent[key]}
        elif what == "swap":
            parent[key] = copy.deepcopy(draw(st.sampled_from([parent_of(value, p)[p[-1]] for p in there])))
        elif isinstance(parent, list):
            parent.insert(key, draw(values))
        elif what == "rename":
            parent[draw(st.sampled_from(NASTY_TEXT))] = parent.pop(key)
        else:
            parent[draw(st.one_of(st.sampled_from(NASTY_TEXT), st.text(max_size=8)))] = draw(values)
    return value


@st.composite
def as_bytes(draw: st.DrawFn, value: st.SearchStrategy[Any]) -> bytes:
    """JSON text of a drawn value; now and then one that is not quite JSON."""
    data = json.dumps(draw(value)).encode()
    how = draw(st.sampled_from(["plain"] * 12 + ["cut", "byte", "bom", "twice", "deep", "digits", "latin", "empty"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "cut":
        return data[:at]
    if how == "byte":
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if how == "bom":
        return b"\xef\xbb\xbf" + data
    if how == "twice" and data.startswith(b'{"'):
        key = data[1 : data.index(b":")]
        return b"{" + key + b": 3, " + data[1:]
    if how == "deep":
        depth = draw(st.sampled_from(DEPTHS))
        return b'{"a": ' * depth + b"1" + b"}" * depth if draw(st.booleans()) else b"[" * depth + b"]" * depth
    if how == "digits" and data.startswith(b"{"):
        return b'{"n": ' + b"9" * 5000 + (b", " if len(data) > 2 else b"") + data[1:]
    if how == "latin":
        return data.replace(b"a", b"\xe4", 1)
    return b"" if how == "empty" else data
