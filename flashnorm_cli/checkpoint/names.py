"""Names of tensors for people: patterns over layers, and lists of them grouped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

Named = TypeVar("Named")


def pattern_of(name: str) -> str:
    """A name with its layer and expert numbers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def any_number(text: str) -> str:
    """Words about a layer, as a norm's reason, without its number."""
    return re.sub(r"\.\d+\b", ".*", text)


def grouped(names: Iterable[str]) -> list[tuple[str, int]]:
    """Patterns of names with how many each stands for, in order of first appearance."""
    return list(Counter(pattern_of(name) for name in names).items())


def layer_of(name: str) -> str | None:
    """The outermost numbered module that a parameter belongs to: `model.layers.3` of `model.layers.3.mlp.up.weight`."""
    found = re.match(r"(.*?(?:^|\.)\d+)\.", name)
    return found.group(1) if found else None


def by_layer(things: Iterable[Named], name: Callable[[Named], str]) -> list[Named]:
    """Things that belong to parameters, layers by their numbers; files hold layer 10 before layer 2.

    Lists of layers, what is in no layer, and what is in one layer stay in their order.
    """
    found = list(things)
    lists: dict[str, int] = {}

    def place(thing: Named) -> tuple[int, int]:
        layer = layer_of(name(thing))
        of, _, number = (layer or name(thing)).rpartition(".")
        return lists.setdefault(of if layer else name(thing), len(lists)), int(number) if layer else 0

    return sorted(found, key=place)


def any_layer(name: str) -> str:
    """A name with the number of its layer, but not of its expert, replaced."""
    return re.sub(r"(?:^|(?<=\.))\d+(?=\.)", "*", name, count=1)


def list_of(name: str) -> str | None:
    """The innermost numbered list that a parameter belongs to: `mlp.experts` of `mlp.experts.3.up.weight`."""
    found = re.match(r"(.*(?:^|\.))\d+\.", name)
    return found.group(1) if found else None


def layer_numbers(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"(?:^|(?<=\.))\d+(?=\.)", name))
