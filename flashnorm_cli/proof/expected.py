"""What config.json and the index of a fold may say, apart from the functions that wrote them.

A fold changes a handful of keys. Here is the list of them, with the values that they may take; everything else has to
be the source's, key by key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, Checkpoint
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.checkpoint.places import PLACE_KEYS
from flashnorm_cli.plan.model import FORMAT
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.result import Finding

MISSING = object()
FLAG, NOTE, TIE = "flashnorm_folded", "flashnorm", "tie_word_embeddings"
# The object `flashnorm`: these keys, no others; "rotation" where the residual stream is rotated.
NOTE_KEYS = {"format", "tool", "layout", "folded", "kept", "lm_head"}


def json_equal(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 and true are equal in Python, and not there."""
    if a is MISSING or b is MISSING:
        return a is b
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def unequal(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place where two JSON values differ, as (path, found, wanted)."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *found]):
            below = f"{path}.{key}" if path else key
            yield from unequal(found.get(key, MISSING), wanted.get(key, MISSING), below)
    elif not json_equal(found, wanted):
        yield path, found, wanted


def short(value: Any) -> str:
    if value is MISSING:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _instead(file: str, key: str, found: Any, wanted: Any) -> Finding:
    return Finding(file, f"{key} is {short(found)} instead of {short(wanted)}")


def levels(config: dict[str, Any], path: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The config and its nested text config, with a prefix for messages."""
    found = [("", config)]
    nested: Any = config
    for key in path:
        nested = nested.get(key) if isinstance(nested, dict) else None
    if path and isinstance(nested, dict):
        found.append((".".join(path) + ".", nested))
    return found


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_findings(pair: Pair) -> list[Finding]:
    """What config.json of a fold of ours says and may not say, or lacks."""
    text = pair.plan.text_config
    places = {prefix for prefix, _ in levels(pair.source.config, text)}
    ours = {f"{prefix}{key}" for prefix in places for key in (FLAG, NOTE)}
    untied = {f"{prefix}{TIE}" for prefix in places} if pair.untied else set()
    findings = []
    for key, found, wanted in unequal(pair.folded.config, pair.source.config):
        if key.rsplit(".", 1)[-1] in PLACE_KEYS:  # where it came from, which push-to-hub shortens
            continue
        if key in ours or any(key.startswith(f"{each}.") for each in ours) or (key in untied and found is False):
            continue
        findings.append(_instead(CONFIG, key, found, False if key in untied else wanted))
    configs = dict(levels(pair.folded.config, text))
    for prefix in sorted(places):
        config = configs.get(prefix, {})
        if not json_equal(config.get(FLAG, MISSING), pair.plan.folded_flag):
            findings.append(_instead(CONFIG, f"{prefix}{FLAG}", config.get(FLAG, MISSING), pair.plan.folded_flag))
        if f"{prefix}{TIE}" in untied and config.get(TIE) is not False and pair.source.config.get(TIE) is not False:
            finding = _instead(CONFIG, f"{prefix}{TIE}", config.get(TIE, MISSING), False)
            findings += [] if finding in findings else [finding]
        findings += _note_findings(pair, f"{prefix}{NOTE}", config.get(NOTE, MISSING))
    return findings


def _note_findings(pair: Pair, where: str, note: Any) -> list[Finding]:
    """The object `flashnorm`: what a runtime is told of the fold has to be what the files hold."""
    if not isinstance(note, dict):
        return [_instead(CONFIG, where, note, {"format": FORMAT})]
    layout = pair.record.layout if pair.record else None
    wanted = {
        "format": FORMAT,
        "layout": layout if layout in ("identity", "dropped") else pair.layout,
        "lm_head": pair.plan.lm_head,
    }
    if (rotation := pair.plan.rotation) is not None:
        patterns = {pattern_of(name) for name in rotation.tensors}
        wanted["rotation"] = {**rotation.to_json(), "tensors": sorted(patterns)}
        said = note.get("rotation")
        if isinstance(said, dict) and (names := _names(said.get("tensors"))) is not None:  # in any order
            note = {**note, "rotation": {**said, "tensors": sorted(names)}}
    findings = [
        _instead(CONFIG, f"{where}.{key}", note.get(key, MISSING), value)
        for key, value in wanted.items()
        if not json_equal(note.get(key, MISSING), value)
    ]
    findings += [
        Finding(CONFIG, f"{where}.{key} is not a key that a fold writes")
        for key in note.keys() - NOTE_KEYS - wanted.keys()
    ]
    folded = _names(note.get("folded"))
    kept = _names(list(note["kept"]) if isinstance(note.get("kept"), dict) else None)
    if folded is None or kept is None:
        return [*findings, Finding(CONFIG, f"{where} does not list which norms are folded and which are kept")]
    for what, listed, norms, others in (
        ("folded", folded, pair.plan.folded, [*pair.plan.kept]),
        ("kept", kept, pair.plan.kept, []),
    ):
        names = {norm.tensor for norm in norms}
        missing = sorted(name for name in names if not {name, pattern_of(name)} & listed)
        findings += [Finding(CONFIG, f"{where}.{what} does not name {name}") for name in missing[:1]]
        known = names | {pattern_of(name) for name in names}
        findings += [Finding(CONFIG, f"{where}.{what} names {name}, which is not {what}") for name in listed - known]
        wrong = [norm.tensor for norm in others if norm.tensor in listed or pattern_of(norm.tensor) in listed]
        findings += [Finding(CONFIG, f"{where}.{what} names {name}, which is kept") for name in wrong[:1]]
    return findings


def _names(value: Any) -> set[str] | None:
    return set(value) if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


# ---- the index -------------------------------------------------------------------------------------------------------


def index_findings(pair: Pair) -> list[Finding]:
    """The index lists the tensors that the shards hold, where the source has them; totals follow the files."""
    name = pair.folded.index_name or pair.source.index_name
    if (pair.source.index is None) != (pair.folded.index is None):
        return [Finding(name, "is missing" if pair.folded.index is None else "is not in the source")]
    if pair.source.index is None or pair.folded.index is None:
        return []
    wanted = {key: value for key, value in pair.source.index.items() if key not in ("weight_map", "metadata")}
    last = list(pair.source.shards)[-1]
    places = pair.source.index["weight_map"]
    dropped = {name for name in pair.gains if name not in pair.folded.tensors}
    stay = {n: s for n, s in places.items() if n not in dropped}
    wanted["weight_map"] = stay | dict.fromkeys(pair.expected_added, last)
    totals = pair.source.index.get("metadata", MISSING)
    if isinstance(totals, dict):
        totals = dict(totals)
        for key, count in (("total_size", _bytes), ("total_parameters", _elements)):
            if type(totals.get(key)) is int:
                totals[key] += count(pair.folded) - count(pair.source)
    if totals is not MISSING:
        wanted["metadata"] = totals
    return [_instead(name, *difference) for difference in unequal(pair.folded.index, wanted)]


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(entry.nbytes for entry in checkpoint.tensors.values())


def _elements(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
