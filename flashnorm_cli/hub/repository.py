"""A repository on the Hub as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SHOWN_FILES = 3


@dataclass(frozen=True)
class Upload:
    """A file to publish: its path in the repository, where its bytes are, and their hashes.

    `oid` is the file's id in git, which the Hub tells for files that are no LFS files.
    """

    path: str
    content: Path | bytes
    size: int
    sha256: str
    oid: str


@dataclass
class _Remote:
    """What the repository holds at the revision that will be written: sha256 or git id of each file by path."""

    exists: bool = False
    branch: bool = False
    head: str | None = None
    private: bool = False
    gated: str | bool = False
    files: dict[str, str] = field(default_factory=dict)
