"""What a folded checkpoint says of itself: flags in config.json, the whole plan in flashnorm.json, the index."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.files import read_text
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.plan.model import FORMAT, Plan, PlannedRotation
from flashnorm_cli.record.read import LAYOUTS as LAYOUTS

# Small files are hashed whole. A larger shard's sha256 is written where its bytes were hashed already, as those of the
# Hub are when they come in: hashing gigabytes costs as much as folding them.
HASH_UP_TO = 64 << 20


def config_record(plan: Plan, layout: str) -> dict[str, Any]:
    """The `flashnorm` object of config.json: what a runtime needs to know, by patterns of tensor names."""
    kept: dict[str, str] = {}
    for norm in plan.kept:
        kept.setdefault(pattern_of(norm.tensor), re.sub(r"\.\d+\b", ".*", norm.reason or ""))
    folded: dict[str, None] = {}
    others = {*kept, *map(pattern_of, plan.not_traced)}
    for norm in plan.folded:  # a pattern that would also name another norm is spelt out
        pattern = pattern_of(norm.tensor)
        folded.setdefault(norm.tensor if pattern in others else pattern)
    return {
        "format": FORMAT,
        "tool": f"flashnorm-cli {__version__}",
        "layout": layout,
        "folded": list(folded),
        "kept": kept,
        "lm_head": plan.lm_head,
        **({"rotation": _rotation(plan.rotation)} if plan.rotation else {}),
    }


def _rotation(rotation: PlannedRotation) -> dict[str, Any]:
    return {**rotation.to_json(), "tensors": sorted(set(map(pattern_of, rotation.tensors)))}


def folded_config(config: dict[str, Any], plan: Plan, layout: str) -> dict[str, Any]:
    """config.json of the folded checkpoint: the source's keys in their order, then the flags."""
    new = json.loads(json.dumps(config))
    nested = new
    for key in plan.text_config:
        nested = nested.get(key) if isinstance(nested, dict) else None
    levels = [new] if nested is new or not isinstance(nested, dict) else [new, nested]
    for level in levels:
        level.update(config_keys(plan, layout))
    return new


def config_keys(plan: Plan, layout: str, in_memory: bool = False) -> dict[str, Any]:
    """What a fold adds to a config, at its top and in its nested text config. In memory there is no flashnorm.json."""
    tie = {"tie_word_embeddings": False} if plan.untie else {}
    record = {**config_record(plan, layout), **({"in_memory": True} if in_memory else {})}
    return {**tie, "flashnorm_folded": plan.folded_flag, "flashnorm": record}


def folded_index(
    index: dict[str, Any], plan: Plan, dropped: frozenset[str], shard: str, checkpoint: Checkpoint
) -> dict[str, Any]:
    """The index with dropped tensors taken out and added ones put into `shard`; totals follow."""
    new = json.loads(json.dumps(index))
    new["weight_map"] = {n: s for n, s in new["weight_map"].items() if n not in dropped}
    new["weight_map"].update(dict.fromkeys(plan.added, shard))
    metadata = new.get("metadata")
    if isinstance(metadata, dict):
        left_out = [checkpoint.tensors[n] for n in dropped]
        if isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += plan.bytes_added - sum(e.nbytes for e in left_out)
        if isinstance(metadata.get("total_parameters"), int):
            metadata["total_parameters"] += sum(math.prod(s) for _, s in plan.added.values())
            metadata["total_parameters"] -= sum(math.prod(e.shape) for e in left_out)
    return new


def dump_like(value: dict[str, Any], original: str) -> str:
    """JSON in the style of the original text: its indent, its escapes, its last newline."""
    indent = re.search(r"\n([ \t]+)\S", original)
    text = json.dumps(
        value,
        indent=indent.group(1) if indent else None,
        ensure_ascii=original.isascii() or "\\u" in original,
    )
    return text + ("\n" if original.endswith("\n") else "")


def file_facts(path: Path, header: bytes | None = None, sha256: str | None = None) -> dict[str, Any]:
    """Size and hash of a file: of the whole where it is cheap or `sha256` was computed already, of a shard's header."""
    facts: dict[str, Any] = {"size": path.stat().st_size}
    if sha256 is not None:
        facts["sha256"] = sha256
    elif facts["size"] <= HASH_UP_TO:
        facts["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if header is not None:
        facts["header_sha256"] = hashlib.sha256(header).hexdigest()
    return facts


def source_facts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Size and hashes of config, index and shards; where only a shard's header is here, what the Hub says of it."""
    small = (CONFIG, *([checkpoint.index_name] if checkpoint.index else []))
    facts = {name: file_facts(checkpoint.folder / name) for name in small}
    for name, header in checkpoint.shards.items():
        if (checkpoint.folder / name).exists():
            facts[name] = file_facts(checkpoint.folder / name, header.raw, checkpoint.sha256.get(name))
        else:
            sha256 = {"sha256": checkpoint.sha256[name]} if name in checkpoint.sha256 else {}
            header_sha256 = hashlib.sha256(header.raw).hexdigest()
            facts[name] = {"size": header.file_size, **sha256, "header_sha256": header_sha256}
    return facts


def full_record(checkpoint: Checkpoint, plan: Plan, layout: str, flushed: dict[str, int]) -> dict[str, Any]:
    """The content of flashnorm.json. No date in it: the same fold gives the same bytes."""
    return {
        **plan.to_json(),
        "layout": layout,
        "source_files": source_facts(checkpoint),
        "left_out": [asdict(each) for each in checkpoint.left_out],
        "flushed_to_zero": {name: flushed[name] for name in (*checkpoint.tensors, *plan.added) if flushed.get(name)},
        "verify": None,
    }


def texts(checkpoint: Checkpoint, plan: Plan, layout: str, flushed: dict[str, int]) -> dict[str, str]:
    """The index, flashnorm.json and config.json of the folded checkpoint, in the order in which they are written."""
    found = {}
    if checkpoint.index is not None:
        dropped = frozenset(norm.tensor for norm in plan.folded) if layout == "dropped" else frozenset[str]()
        original = read_text(checkpoint.folder / checkpoint.index_name)
        if dropped or plan.added:
            index = folded_index(checkpoint.index, plan, dropped, list(checkpoint.shards)[-1], checkpoint)
            original = dump_like(index, original)
        found[checkpoint.index_name] = original
    found[RECORD] = json.dumps(full_record(checkpoint, plan, layout, flushed), indent=2) + "\n"
    original = read_text(checkpoint.folder / CONFIG)
    found[CONFIG] = dump_like(folded_config(checkpoint.config, plan, layout), original)
    return found
