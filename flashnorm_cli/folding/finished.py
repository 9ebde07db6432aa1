"""Whether a folder holds the very fold that is asked for, so that nothing is left to do."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.header import Header
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint
from flashnorm_cli.errors import FlashNormError, shown
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.record import write
from flashnorm_cli.record.read import FoldRecord

# What two records of the same fold may differ in: how the source was named, who planned, what came of it afterwards.
# `source_files` are compared one by one.
NOT_OF_THE_FOLD = {"source", "transformers", "verify", "card_sha256", "flushed_to_zero", "source_files", "notes"}


def older_fold(folder: Path) -> FoldRecord | None:
    """The record of a fold in a folder, None where there is none that could be read."""
    try:
        return FoldRecord.read(folder.expanduser() / RECORD)
    except (FlashNormError, OSError, RuntimeError):
        return None


def is_shard(path: Path, header: Header) -> bool:
    """Whether a file has the size and the header that a shard is to have."""
    try:
        with path.open("rb") as file:
            return (
                file.seek(0, 2) == header.file_size and file.seek(0) == 0 and file.read(len(header.raw)) == header.raw
            )
    except OSError:
        return False


def not_this_fold(checkpoint: Checkpoint, plan: Plan, layout: str, target: Path, record: FoldRecord) -> str | None:
    """Why the folder `target` cannot be taken for this fold; None where it holds what would be written.

    Names, sizes, headers and texts are compared, and all hashes that the record has. That the weights themselves are as
    they were is told from times: whatever source or fold was touched since the fold was finished is doubted.
    """
    why = _other_record(checkpoint, plan, layout, record)
    if why is None:
        try:
            why = _other_files(checkpoint, plan, layout, target) or _touched(checkpoint, target)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
    return why


def _other_record(checkpoint: Checkpoint, plan: Plan, layout: str, record: FoldRecord) -> str | None:
    found = record.content
    wanted: dict[str, Any] = json.loads(json.dumps(write.full_record(checkpoint, plan, layout, {})))
    files, facts = record.source_files or {}, wanted["source_files"]
    if files.keys() != facts.keys() or any(files[n].get(k, v) != v for n in facts for k, v in facts[n].items()):
        return "it was folded from other files"
    for key in ("rotation", *wanted, *found):  # which other keys follow
        if key not in NOT_OF_THE_FOLD and found.get(key) != wanted.get(key):
            return f"it was folded in another way ({shown(key)} differs)"
    verified = found.get("verify")
    if isinstance(verified, dict) and verified.get("verdict") == "not equivalent":
        return "it was found not to be equivalent"
    return None


def _other_files(checkpoint: Checkpoint, plan: Plan, layout: str, target: Path) -> str | None:
    from flashnorm_cli.folding.rewrite import changed_header  # torch, which a refused fold does not wait for

    for name in _names(checkpoint):
        if not (target / name).exists() or not stat.S_ISREG((target / name).lstat().st_mode):  # no link, no pipe
            return f"its {shown(name)} is missing or another one"
    for name, text in write.texts(checkpoint, plan, layout, {}).items():
        if name != RECORD and (target / name).read_bytes() != text.encode("utf-8", "surrogateescape"):
            return f"its {shown(name)} is another one"
    dropped = {norm.tensor for norm in plan.folded} if layout == "dropped" else set()
    last = list(checkpoint.shards)[-1]
    for name, header in checkpoint.shards.items():
        header = changed_header(header, dropped & header.tensors.keys(), plan.added if name == last else {})
        if not is_shard(target / name, header):
            return f"its {shown(name)} is missing or another one"
    for name in checkpoint.others:  # those of a Hub repository need not be here
        size = checkpoint.seen[name].size if name in checkpoint.seen else None
        if size not in (None, (target / name).stat().st_size):
            return f"its {shown(name)} is missing or another one"
    return None


def _touched(checkpoint: Checkpoint, target: Path) -> str | None:
    """config.json is what a fold writes last. What a commit of the Hub holds never changes."""
    end = _newest(target, [CONFIG])
    if _newest(target, _names(checkpoint)) > end:
        return "it was touched after it was finished"
    if checkpoint.commit is None and _newest(checkpoint.folder, _names(checkpoint)) >= end:
        return "its source was touched after it was finished"
    return None


def _names(checkpoint: Checkpoint) -> list[str]:
    """The files that a checkpoint and its fold have in common."""
    index = [checkpoint.index_name] if checkpoint.index else []
    return [CONFIG, *index, *checkpoint.shards, *checkpoint.others]


def _newest(folder: Path, names: Iterable[str]) -> int:
    """When the last of some files was changed, in nanoseconds: its bytes, or its name, owner or mode."""
    found = ((folder / name).stat() for name in names)
    return max((max(status.st_mtime_ns, status.st_ctime_ns) for status in found), default=0)
