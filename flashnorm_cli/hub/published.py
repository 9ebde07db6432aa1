"""flashnorm.json as it is published: the same plan and the same proof, without what this machine is called.

The record names folders and holds the command as it was typed. Neither is anybody's business on the Hub, and neither
would work there. Nothing that a verification speaks of changes, so that it stays valid.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashnorm_cli.checkpoint.places import LOCAL_PATH, last_part
from flashnorm_cli.report.formats import dicts_in

# Options of `verify` that are a part of what was checked; all others are about the machine or the output.
KEPT_OPTIONS = (
    "--level --runtime --eval --eval-limit --dtype --device --max-algebra --max-ratio --text --token-ids".split()
)
KEPT_SWITCHES = ("--trust-remote-code",)
BUILT_IN_TEXT = "the text that comes with flashnorm"


@dataclass(frozen=True)
class Base:
    """The source on the Hub: its id, and the commit that the fold was made from or verified against."""

    repo_id: str
    commit: str


def published_record(
    record: dict[str, Any], repo_id: str, base: Base | None, verified: bool, cleaned: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A record to publish.

    Args:
        record: the content of flashnorm.json.
        repo_id: where it will be published; the verification's command names it.
        base: the source on the Hub; without, the source is called by the last part of its folder's name.
        verified: whether the verification is passed and still valid; otherwise it is left out.
        cleaned: sha256 of files that are published without folders of this machine, which say where they came from
            and have no part in what was verified.
    """
    typed = _local_sources(record)
    source = base.repo_id if base else last_part(str(record.get("source", "")))
    new: dict[str, Any] = json.loads(json.dumps(record))
    new["source"], new["commit"] = source, base.commit if base else None
    entry = new.get("verify") if verified else None
    if isinstance(entry, dict):
        levels = entry.get("levels", {})
        environment = entry.setdefault("environment", {})
        environment["command"] = published_command(str(environment.get("command", "")), repo_id, base, list(levels))
        entry["source"] = {**entry.get("source", {}), "name": source, "commit": new["commit"]}
        entry["files"] = {**entry.get("files", {}), **(cleaned or {})}
        logits = levels.get("logits", {}).get("figures", {})
        if logits.get("text", BUILT_IN_TEXT) != BUILT_IN_TEXT:  # a text of the user's may be a private one
            logits["text"] = last_part(str(logits["text"]))
            hidden = dict.fromkeys(("prompt", "source", "folded"), "")
            logits["greedy"] = [row | hidden for row in dicts_in(logits.get("greedy"))]
    new["verify"] = entry
    return {key: without_paths(value, typed) for key, value in new.items()}


def published_command(command: str, repo_id: str, base: Base | None, levels: Sequence[str]) -> str:
    """How a reader reproduces the verification: of what was typed, the options that decide what is checked."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    if words[:2] != ["flashnorm", "verify"]:  # through Python, or by another command
        plain = [level for level in levels if level in ("weights", "layers", "logits")]
        words = ["", "", *(word for level in plain for word in ("--level", level))] if len(plain) < 3 else []
    kept = ["flashnorm", "verify", repo_id]
    if base is None:
        kept += ["--source", "<the model it was made from>"]
    rest = iter(words[2:])
    for word in rest:
        name, equals, value = word.partition("=")
        if name in KEPT_SWITCHES:
            kept.append(name)
        elif name in KEPT_OPTIONS:
            value = value if equals else next(rest, "")
            kept += [name, ",".join(last_part(part) for part in value.split(","))]
    return shlex.join(kept)


def without_paths(value: Any, names: Sequence[str] = ()) -> Any:
    """A JSON value whose strings name files and folders by their last part only; `names` are folders as typed."""
    if isinstance(value, dict):
        return {key: without_paths(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, names) for inner in value]
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    for name in names:
        value = value.replace(name, last_part(name))
    return LOCAL_PATH.sub(lambda match: last_part(match.group()), value)


def same_fold(ours: dict[str, Any], theirs: Any) -> bool:
    """Whether two records are of the same fold: the same source files, in the same layout."""
    return isinstance(theirs, dict) and all(
        isinstance(ours.get(key), (dict, str)) and ours.get(key) == theirs.get(key)
        for key in ("source_files", "layout", "lm_head")
    )


def _local_sources(record: dict[str, Any]) -> list[str]:
    """The folders that a record names as the source, as they were typed."""
    entry = record.get("verify")
    recorded = [(record.get("source"), record.get("commit"))]
    if isinstance(entry, dict) and isinstance(entry.get("source"), dict):
        recorded.append((entry["source"].get("name"), entry["source"].get("commit")))
    return [name for name, commit in recorded if isinstance(name, str) and re.search(r"[\\/]", name) and commit is None]


def dump(record: dict[str, Any]) -> bytes:
    """The bytes of a published flashnorm.json."""
    return (json.dumps(record, indent=2) + "\n").encode()
