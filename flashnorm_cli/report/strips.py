"""A plan as strips, for people: layers that are treated alike become one, and so do experts. What is drawn, not how."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from flashnorm_cli.checkpoint.names import any_number, layer_of, pattern_of
from flashnorm_cli.plan.model import Norm, Plan, Reader

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name that is nothing but a number
MOST_RANGES = 3  # of numbers that are written out: 0-2, 4-6, 8-10, ...


@dataclass(frozen=True)
class Target:
    """Tensors that take a gain: `leaf` is what they are called in their module, `tensors` are their full names.

    `dims` are the dimensions along which they are scaled; `added` says that the source does not have them.
    """

    leaf: str
    tensors: tuple[str, ...]
    dims: tuple[int, ...]
    added: bool


@dataclass(frozen=True)
class Row:
    """One norm of each layer of a strip. `name` and the modules in `into` are relative to the layer.

    `gain` is its formula, "w" or "1 + w". Where the norms are kept, `reason` says why and `into` is empty.
    """

    name: str
    gain: str
    norms: tuple[Norm, ...]
    into: tuple[tuple[str, tuple[Target, ...]], ...]
    reason: str | None

    @property
    def look(self) -> tuple[object, ...]:
        """What two layers have to share in order to be drawn as one."""
        into = [(module, *((t.leaf, t.dims, t.added) for t in targets)) for module, targets in self.into]
        return (self.name, self.gain, tuple(into), self.reason)


@dataclass(frozen=True)
class Strip:
    """Layers that are treated alike: `numbers` of the list `name`, whose layers are `every`.

    A norm that belongs to no layer is a strip of one row, without name and numbers.
    """

    rows: tuple[Row, ...]
    name: str = ""
    numbers: tuple[int, ...] = ()
    every: tuple[int, ...] = ()


def strips(plan: Plan) -> list[Strip]:
    """The whole plan: the lists of layers as they come, each followed by the single norms beside it."""
    readers = {reader.tensor: reader for reader in plan.readers}
    lists: dict[str, dict[int, list[Norm]]] = {}
    single: dict[str, list[Norm]] = {}
    for norm in plan.norms:
        layer = layer_of(norm.tensor)
        if layer is None:
            single.setdefault(_parent(_parent(norm.tensor)), []).append(norm)
        else:
            lists.setdefault(_parent(layer), {}).setdefault(int(layer.rpartition(".")[2]), []).append(norm)
    found: list[Strip] = []
    for name, layers in lists.items():
        found += _equal_layers(name, layers, readers, plan.added)
        found += _singles(single.pop(_parent(name), []), readers, plan.added)
    return found + [strip for norms in single.values() for strip in _singles(norms, readers, plan.added)]


def ranges(numbers: Iterable[int], most: int | None = MOST_RANGES) -> str:
    """0-2, 4, 7-9 (with en dashes); with `most`, an ellipsis for what lies between the first few and the last."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}\u2013{last}" for first, last in runs]
    if most is not None and len(words) > most + 1:
        words = [*words[:most], "…", words[-1]]
    return ", ".join(words)


def _equal_layers(
    name: str, layers: Mapping[int, list[Norm]], readers: Mapping[str, Reader], added: Collection[str]
) -> list[Strip]:
    """One strip for the layers that look alike, wherever they are, in the order of their first numbers."""
    every = tuple(sorted(layers))
    kinds: dict[tuple[object, ...], list[tuple[int, list[Row]]]] = {}
    for number in every:
        rows = _rows(f"{name}.{number}." if name else f"{number}.", layers[number], readers, added)
        kinds.setdefault(tuple(row.look for row in rows), []).append((number, rows))
    return [
        Strip(
            rows=tuple(_joined(same) for same in zip(*(rows for _, rows in alike), strict=True)),
            name=name,
            numbers=tuple(number for number, _ in alike),
            every=every,
        )
        for alike in kinds.values()
    ]


def _singles(norms: Iterable[Norm], readers: Mapping[str, Reader], added: Collection[str]) -> list[Strip]:
    return [Strip(tuple(_rows("", [norm], readers, added))) for norm in norms]


def _rows(layer: str, norms: Iterable[Norm], readers: Mapping[str, Reader], added: Collection[str]) -> list[Row]:
    """The norms of one layer; those that differ by inner numbers alone, as of experts, are one row."""
    kinds: dict[tuple[object, ...], list[Norm]] = {}
    for norm in norms:
        into = tuple(pattern_of(_within(layer, reader)) for reader in norm.readers if norm.folded)
        name = pattern_of(_within(layer, norm.tensor))
        kinds.setdefault((name, _gain(norm), into, any_number(norm.reason or "")), []).append(norm)
    rows = []
    for alike in kinds.values():
        names = [reader for norm in alike if norm.folded for reader in norm.readers]
        rows.append(
            Row(
                name=_compact([_within(layer, norm.tensor) for norm in alike]),
                gain=_gain(alike[0]),
                norms=tuple(alike),
                into=_modules(layer, list(dict.fromkeys(names)), readers, added),
                reason=None if alike[0].folded else any_number(alike[0].reason or ""),
            )
        )
    return rows


def _modules(
    layer: str, names: Iterable[str], readers: Mapping[str, Reader], added: Collection[str]
) -> tuple[tuple[str, tuple[Target, ...]], ...]:
    """Tensors by the module that they are in, as the plan orders them."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(pattern_of(_within(layer, name)), []).append(name)
    modules: dict[str, list[Target]] = {}
    for same in alike.values():
        module, _, leaf = _compact([_within(layer, name) for name in same]).rpartition(".")
        dims = dict.fromkeys(readers[name].dim for name in same if name in readers)
        target = Target(leaf, tuple(same), tuple(dims), any(name in added for name in same))
        modules.setdefault(module, []).append(target)
    return tuple((module, tuple(targets)) for module, targets in modules.items())


def _joined(rows: tuple[Row, ...]) -> Row:
    """The same row of several layers as one."""
    into = []
    for module, _ in rows[0].into:
        same = zip(*(dict(row.into)[module] for row in rows), strict=True)
        into.append((module, tuple(_all_of(targets) for targets in same)))
    return Row(rows[0].name, rows[0].gain, tuple(n for row in rows for n in row.norms), tuple(into), rows[0].reason)


def _all_of(targets: tuple[Target, ...]) -> Target:
    tensors = dict.fromkeys(name for target in targets for name in target.tensors)
    return Target(targets[0].leaf, tuple(tensors), targets[0].dims, targets[0].added)


def _within(layer: str, tensor: str) -> str:
    """A tensor's name in its layer, without `.weight`; that of a tensor elsewhere is a pattern over layers."""
    name = tensor.removesuffix(".weight")
    return name.removeprefix(layer) if name.startswith(layer) else pattern_of(name)


def _compact(names: list[str]) -> str:
    """Names of one pattern as one: experts.0-255.up_proj."""
    columns = zip(*(NUMBER.findall(name) for name in names), strict=True)
    return NUMBER.sub(lambda _: ranges(map(int, next(columns))), names[0])


def _gain(norm: Norm) -> str:
    weight = "w" if norm.scale == 1 else f"{norm.scale:g} w"
    return weight if norm.offset == 0 else f"{norm.offset:g} + {weight}"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
