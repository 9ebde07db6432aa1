"""Which files a verification speaks of, and which of them are other ones now. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint

# Written for readers and for git, not for the model.
PAPERS = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY")
PAPER_SUFFIXES = (".md", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp")
# Scores of the source that the Hub shows as the repository's own: whoever publishes a fold leaves them out.
CLAIMS = ".eval_results/"


def is_paper(name: str) -> bool:
    """Whether a file is written for readers: it may change without voiding a verification."""
    return Path(name).name in PAPERS or name.lower().endswith(PAPER_SUFFIXES) or name.startswith(CLAIMS)


def hashed_files(folded: Checkpoint) -> list[str]:
    """The files that a verification speaks of; papers may change without voiding it."""
    small = [name for name in folded.others if name != RECORD and not is_paper(name)]
    return [CONFIG, *([folded.index_name] if folded.index else []), *folded.shards, *small]


def changed_files(entry: dict[str, Any], hashes: dict[str, str]) -> list[str]:
    """Files that are not those which a recorded verification speaks of: changed, lost or new."""
    said = entry.get("files")
    said = said if isinstance(said, dict) else {}
    return [name for name in dict.fromkeys([*said, *hashes]) if said.get(name) != hashes.get(name)]
