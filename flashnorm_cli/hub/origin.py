"""Where a local source came from, as far as its folder says: huggingface_hub's notes of a download, and names in files.

`hf download --local-dir` notes the commit and the content of each file, but not the repository. So names are collected
from the files, and whoever uses them asks the Hub whether one of them holds these very files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm_cli.errors import CheckpointError, UsageError
from flashnorm_cli.hub.source_card import read_card
from flashnorm_cli.record.read import FoldRecord, recorded_source

NOTES = Path(".cache") / "huggingface" / "download"
OWNER, NAME = r"(?<![\w.-])[A-Za-z0-9][\w.-]{0,95}", r"[A-Za-z0-9][\w.-]{0,95}"  # as long as the Hub takes
REPO_ID = re.compile(f"{OWNER}/{NAME}")
QUOTED = re.compile(f"[\"'`]({OWNER}/{NAME})[\"'`]")  # as code names the model that it loads
SHA256, COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
MOST_NAMES = 5  # that the Hub is asked about
LARGEST_NOTE = 1 << 12
LARGEST_CARD = 1 << 20  # characters that are looked through for names


@dataclass(frozen=True)
class Origin:
    """`commit` is what a download noted for all files, `sha256` what it noted for each shard that is the same since.

    `names` are repositories that may be the one, the likeliest first.
    """

    commit: str | None
    sha256: Mapping[str, str]
    names: tuple[str, ...]


UNKNOWN = Origin(None, {}, ())


def origin_of(folder: Path, record: dict[str, Any], config: dict[str, Any]) -> Origin:
    """What is known of the source of the fold in `folder`; its record names a folder as the source."""
    notes: dict[str, tuple[str, str]] = {}
    source = folder
    with suppress(UsageError, OSError, ValueError):  # it is not here any more: the fold holds its card and its names
        source = Path(recorded_source(FoldRecord("", record), "", folder, None, None, True).name).expanduser()
        facts = record.get("source_files")
        notes = {name: note for name in (facts if isinstance(facts, dict) else ()) if (note := _note(source, name))}
    commits = {commit for commit, _ in notes.values()}
    sha256 = {name: etag for name, (_, etag) in notes.items() if SHA256.fullmatch(etag)}
    names = dict.fromkeys(_names(folder, last=Path(str(record.get("source"))).name, config=config))
    return Origin(commits.pop() if len(commits) == 1 else None, sha256, tuple(names)[:MOST_NAMES])


def _note(folder: Path, name: str) -> tuple[str, str] | None:
    """(commit, ETag) that a download noted of a file, if the file was not written to since."""
    path = folder / NOTES / f"{name}.metadata"
    with suppress(OSError, ValueError):
        if path.stat().st_size <= LARGEST_NOTE:
            commit, etag, time = path.read_text(encoding="utf-8").split("\n")[:3]
            # As huggingface_hub itself judges: clocks of file systems are not exact.
            if COMMIT.fullmatch(commit) and (folder / name).stat().st_mtime - 1 <= float(time):
                return commit, etag
    return None


def _names(folder: Path, last: str, config: dict[str, Any]) -> Iterator[str]:
    named = config.get("_name_or_path")
    if isinstance(named, str) and REPO_ID.fullmatch(named):
        yield named
    try:
        card = read_card((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    except (OSError, CheckpointError):
        return
    text = card.text[:LARGEST_CARD]
    yield from re.findall(rf"({OWNER}/{re.escape(last)})(?![\w-])", text) if last else ()
    yield from QUOTED.findall(text)
    parents = card.data.get("base_model")
    for name in parents if isinstance(parents, list) else [parents]:
        if isinstance(name, str) and REPO_ID.fullmatch(name):
            yield name
