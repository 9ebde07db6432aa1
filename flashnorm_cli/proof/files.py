"""Which files a verification speaks of, and which of them are other ones now. Needs neither torch nor transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.hub import content_id
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint

# Written for readers and for git, not for the model.
DOC_FILES = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY")
DOC_SUFFIXES = (".md", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")
CARD = "README.md"
# Scores of the source that the Hub shows as the repository's own: whoever publishes a fold leaves them out.
EVAL_RESULTS_DIR = ".eval_results/"


def is_documentation(name: str) -> bool:
    """Whether a file is written for readers: it may change without voiding a verification."""
    return Path(name).name in DOC_FILES or name.lower().endswith(DOC_SUFFIXES) or name.startswith(EVAL_RESULTS_DIR)


def hashed_files(folded: Checkpoint) -> list[str]:
    """The files that a verification speaks of; documentation may change without voiding it."""
    small = [name for name in folded.others if name != RECORD and not is_documentation(name)]
    return [CONFIG, *([folded.index_name] if folded.index else []), *folded.shards, *small]


def changed_files(entry: dict[str, Any], hashes: dict[str, str]) -> list[str]:
    """Files that are not those which a recorded verification speaks of: changed, lost or new."""
    recorded = entry.get("files")
    recorded = recorded if isinstance(recorded, dict) else {}
    return [name for name in dict.fromkeys([*recorded, *hashes]) if recorded.get(name) != hashes.get(name)]


# Small files are hashed whole; of a larger one the name that the Hub cache gives it, where it lies there.
HASH_UP_TO = 64 << 20


def file_facts(path: Path, header: bytes | None = None, sha256: str | None = None) -> dict[str, Any]:
    """What a record says of a file, found out afresh: size, the sha256 of a shard's header, and that of the whole file
    where it is cheap, or where `sha256` was computed over its bytes already.
    """
    facts: dict[str, Any] = {"size": path.stat().st_size}
    if sha256 is not None:
        facts["sha256"] = sha256
    elif facts["size"] <= HASH_UP_TO:
        facts["sha256"] = sha256_of(path)
    if header is not None:
        facts["header_sha256"] = hashlib.sha256(header).hexdigest()
    return facts


def sha256_of(path: Path) -> str:
    return content_id(path).sha256
