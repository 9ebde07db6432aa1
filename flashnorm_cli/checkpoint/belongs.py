"""Which files beside the shards travel with a folded checkpoint, told by what they hold (a table: docs/checkpoint.md).

Everything travels but three things: the checkpoint's own tensors once more (in whatever format: they would be an
unfolded copy), what was computed for the unfolded weights, and an index of nothing but such files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from flashnorm_cli.checkpoint.formats import ADAPTER, IMATRIX, OPTIMIZER, Contents, look
from flashnorm_cli.checkpoint.header import Header
from flashnorm_cli.checkpoint.model import ADAPTER_CONFIG, OTHER_WEIGHTS, RECORD, LeftOut
from flashnorm_cli.errors import CheckpointError, shown

# The share of a file, and of the checkpoint, that has to be the same for one to be a copy of the other.
SAME = 0.75
# Bits that the smallest quantization leaves of a weight: a whole-model export is not smaller.
FEWEST_BITS = 2
# Names that transformers, exporters and authors give to a whole model: they count where the content tells nothing.
_WHOLE_MODEL = re.compile(
    r"(pytorch_model|tf_model|flax_model|rust_model|openvino_model|(encoder_|decoder_)?model|consolidated)"
    r"([-._].*)?\.(" + "|".join(suffix[1:].replace(".", r"\.") for suffix in OTHER_WEIGHTS) + ")"
)
_PART = re.compile(r"([-_.])\d+(-of-\d+)?(?=\.[^/]+$)")
_LFS_POINTER = b"version https://git-lfs"
_LARGEST_INDEX = 64 << 20
_STALE = {
    OPTIMIZER: "the state of an optimizer for the unfolded weights",
    IMATRIX: "importances of the unfolded weights' inputs; compute them again for the folded ones",
    ADAPTER: "an adapter for the unfolded weights",
}


class Closed(Exception):
    """A file that is not to be looked into, because it is not on this disk."""


# Opens a file of the source for `look`, by its relative path.
Opener = Callable[[str], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class _Own:
    """The checkpoint's tensors, as other formats would show them."""

    keys: Counter[tuple[str, tuple[int, ...]]]
    shapes: Counter[tuple[int, ...]]
    small: frozenset[str]
    elements: int

    @classmethod
    def of(cls, shards: Mapping[str, Header]) -> _Own:
        entries = [(entry.name, entry.shape) for header in shards.values() for entry in header.tensors.values()]
        small = frozenset(_key(name) for name, shape in entries if len(shape) == 1)
        return cls(_keys(entries), _matrices(entries), small, sum(math.prod(shape) for _, shape in entries))


def sort_files(
    shards: Mapping[str, Header], files: Mapping[str, int], open_file: Opener, folded: bool
) -> tuple[list[str], list[LeftOut]]:
    """The files that travel, and those that do not with their reasons.

    Args:
        shards: headers of the checkpoint's shards.
        files: bytes of every other file by relative path; config and index are not among them.
        open_file: may raise PermissionError or `Closed`: then only the name of the file tells what it is.
        folded: whether the checkpoint is a folded one, whose adapters may fit it.
    Raises:
        CheckpointError: a file of weights is a pointer of Git LFS.
    """
    own = _Own.of(shards)
    reasons = {} if folded else _adapters(files)
    contents = {
        name: _look(name, size, open_file)
        for name, size in files.items()
        if name not in reasons and not name.endswith(".json")
    }
    for group in _groups(contents).values():
        reason = _reason(group, files, contents, own)
        if reason is not None:
            reasons |= dict.fromkeys(group, reason)
    for name in files:
        if name not in reasons and name.endswith(".json") and "index" in name:
            reason = _index_of(name, files[name], {*shards, *files} - reasons.keys(), open_file)
            if reason is not None:
                reasons[name] = reason
    others = [name for name in sorted(files) if name not in reasons]
    return others, [LeftOut(name, files[name], reasons[name]) for name in sorted(reasons)]


def _look(name: str, size: int, open_file: Opener) -> Contents | None:
    try:
        with open_file(name) as file:
            start = file.read(len(_LFS_POINTER))
            file.seek(0)
            if start == _LFS_POINTER and name.endswith(tuple(OTHER_WEIGHTS)) and not is_whole_model(name):
                raise CheckpointError(f"{shown(name)}: is a Git LFS pointer, not the file itself; run: git lfs pull")
            return look(file, size, name)
    except (PermissionError, Closed):
        return None


# ---- one file, or the parts of one -----------------------------------------------------------------------------------


def _groups(contents: Mapping[str, Contents | None]) -> dict[tuple[str, str], list[str]]:
    """Files that are one export: numbered parts, a Core ML package, a model with its data in a file of its own."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in contents:
        parts = PurePosixPath(name).parts
        package = next((n for n, part in enumerate(parts) if part.endswith((".mlpackage", ".mlmodelc"))), None)
        if package is not None:
            groups["/".join(parts[: package + 1]), ""].append(name)
            continue
        plain = re.sub(r"(\.onnx)[._]data(_\d+)?$", r"\1", name)
        if f"{name.removesuffix('.bin')}.xml" in contents or f"{name.removesuffix('.xml')}.bin" in contents:
            plain = name.removesuffix(".bin").removesuffix(".xml") + ".openvino"
        groups[_PART.sub("", plain), PurePosixPath(plain).suffix].append(name)
    return groups


def _reason(
    group: list[str], files: Mapping[str, int], contents: Mapping[str, Contents | None], own: _Own
) -> str | None:
    """Why the files of a group stay behind, or None if they travel."""
    known = [content for name in group if (content := contents[name]) is not None]
    for content in known:
        if content.made_for is not None:
            return _STALE[content.made_for]
    entries = [entry for content in known for entry in content.entries or ()]
    if entries:
        reason = _same_tensors(entries, own, all("/" not in name and is_whole_model(name) for name in group))
        if reason is None and known[0].format == "ONNX" and len({_key(n) for n, _ in entries} & own.small) > 1:
            found = len({_key(n) for n, _ in entries} & own.small) / len(own.small)
            reason = "the whole model, quantized" if found > SAME else None
        if reason is None and known[0].format == "GGUF":
            ratio = sum(math.prod(shape) for _, shape in entries) / own.elements
            reason = "the whole model" if SAME < ratio < 1 / SAME else None
        return f"{reason}, as {known[0].format}" if reason else None
    large = sum(files[name] for name in group) * 8 >= own.elements * FEWEST_BITS
    if large and (opaque := [content.format for content in known if content.entries is None]):
        return f"an export of the whole model, as {opaque[0]}"
    if large and any(name.endswith(".xml") for name in group):
        return "an export of the whole model, as OpenVINO"
    if large and re.search(r"\.(mlpackage|mlmodelc)/", group[0]):
        return "an export of the whole model, as Core ML"
    if all(is_whole_model(name) for name in group):
        return "named like an export of the whole model"
    return None


def _same_tensors(entries: list[tuple[str, tuple[int, ...]]], own: _Own, whole_model: bool) -> str | None:
    """Whether a file holds the checkpoint's tensors: by their names, or, all of them, by their shapes."""
    total = sum(math.prod(shape) for _, shape in entries)
    keys = _keys(entries)
    named = sum(math.prod(shape) * n for (_, shape), n in (keys & own.keys).items())
    if named >= SAME * total and (whole_model or named >= SAME * own.elements):
        more = sorted(key for key, _ in keys - own.keys if not key.endswith(("inv_freq", "lm_head.weight")))
        besides = f" (and {', '.join(map(shown, more[:3]))}{', ...' if more[3:] else ''})" if more else ""
        return f"the checkpoint's own tensors{besides}"
    shaped = sum(math.prod(shape) * n for shape, n in (_matrices(entries) & own.shapes).items())
    if shaped >= SAME * max(total, own.elements):
        return "the checkpoint's own tensors under other names"
    return None


def _key(name: str) -> str:
    """A tensor's name from its first numbered list on, or its last two parts: prefixes differ between formats."""
    found = re.search(r"(?:^|\.)([^.]+\.\d+\..+)$", name)
    return found.group(1) if found else ".".join(name.rsplit(".", 2)[-2:])


def _keys(entries: Iterable[tuple[str, tuple[int, ...]]]) -> Counter[tuple[str, tuple[int, ...]]]:
    return Counter((_key(name), tuple(sorted(shape))) for name, shape in entries)


def _matrices(entries: Iterable[tuple[str, tuple[int, ...]]]) -> Counter[tuple[int, ...]]:
    """Shapes without the order of their dimensions, which other frameworks turn around."""
    return Counter(tuple(sorted(shape)) for _, shape in entries if len(shape) > 1)


def is_whole_model(name: str) -> bool:
    """Whether a file is named like a model, and does not lie in a module's folder of sentence-transformers."""
    path = PurePosixPath(name)
    inside_module = any(re.fullmatch(r"\d+_\w+", part) for part in path.parts[:-1])
    return bool(_WHOLE_MODEL.fullmatch(path.name)) and not inside_module


# ---- adapters, indexes -----------------------------------------------------------------------------------------------


def _adapters(files: Mapping[str, int]) -> dict[str, str]:
    """The configs and weights of adapters in subfolders: one without the other would not load."""
    found = {}
    for name in files:
        folder, file = os.path.split(name)
        if file != ADAPTER_CONFIG or not folder or f"{folder}/{RECORD}" in files:
            continue
        why = f"an adapter for the unfolded weights; make it fit: flashnorm fold-adapter <source>/{shown(folder)}"
        for other in files:
            there, name_there = os.path.split(other)
            if there == folder and (name_there == ADAPTER_CONFIG or name_there.endswith(tuple(OTHER_WEIGHTS))):
                found[other] = why
    return found


def _index_of(name: str, size: int, there: Set[str], open_file: Opener) -> str | None:
    """An index that names only files which are left out, or not there, is of no use any more."""
    if size > _LARGEST_INDEX:
        return None
    try:
        with open_file(name) as file:
            shards = set(json.loads(file.read())["weight_map"].values())
        here = {(PurePosixPath(name).parent / shard).as_posix() for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, PermissionError, Closed):
        return "named like the index of such an export" if re.search(r"_model\.bin\.index\.json$", name) else None
    return "an index of files that are left out" if here and not here & there else None
