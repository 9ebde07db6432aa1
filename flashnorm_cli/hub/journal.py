"""What a fold from Hub to Hub has uploaded already: a small file in its work folder, which a later run goes on from."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.disk import write_text

UPLOADED = "uploaded.json"
# The Hub removes uploads that no commit names, after a day or so; huggingface_hub trusts them for as long, too.
TRUSTED = 20 * 3600
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Uploaded:
    """A finished shard, as the commit will name it.

    `sha256` and `size` are the folded shard's, `source_sha256` is that of the source's, computed over the bytes that
    were folded. `downloaded` counts bytes of this run, `flushed` products by tensor. `seen` are the sha256 of tensors
    of the source's shard that were read by ranges as well; `copied` those of tensors of other shards, as ranges gave
    them. `compared` is how many tensors were compared with the source before the upload. `at` is the time of the
    upload, in seconds since 1970.
    """

    sha256: str
    size: int
    source_sha256: str
    downloaded: int
    flushed: Mapping[str, int]
    seen: Mapping[str, str]
    copied: Mapping[str, str]
    compared: int
    at: float


def read_journal(path: Path) -> dict[str, Uploaded]:
    """What an earlier run has uploaded, by shard; what cannot be read, or is too old, is uploaded again."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = {name: _entry(value) for name, value in entries.items()} if isinstance(entries, dict) else {}
    now = time.time()
    return {name: entry for name, entry in found.items() if entry is not None and 0 <= now - entry.at < TRUSTED}


def write_journal(path: Path, uploads: Mapping[str, Uploaded]) -> None:
    """Replace the journal as a whole."""
    write_text(path, json.dumps({name: dataclasses.asdict(upload) for name, upload in uploads.items()}, indent=1))


def _entry(value: Any) -> Uploaded | None:
    if not isinstance(value, dict) or value.keys() != {field.name for field in dataclasses.fields(Uploaded)}:
        return None
    hashes = [value["sha256"], value["source_sha256"]]
    for tensors in (value["seen"], value["copied"]):
        hashes += tensors.values() if isinstance(tensors, dict) else [None]
    counts = [value["size"], value["downloaded"], value["compared"]]
    counts += value["flushed"].values() if isinstance(value["flushed"], dict) else [None]
    fine = all(isinstance(h, str) and SHA256.fullmatch(h) for h in hashes)
    fine = fine and all(type(n) is int and n >= 0 for n in counts) and type(value["at"]) in (int, float)
    return Uploaded(**value) if fine else None
