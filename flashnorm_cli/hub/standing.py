"""What a record proves about the very files that are to be published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashnorm_cli.proof.files import changed_files, is_documentation

SHOWN_FILES = 3
# The verdicts of `verify`, as flashnorm.json holds them.
EQUIVALENT, NOT_RUN = "equivalent", "as planned, not run"
NOT_VERIFIED = "not verified"


@dataclass(frozen=True)
class Standing:
    """`verdict` is EQUIVALENT, NOT_RUN or NOT_VERIFIED; `why` says in a sentence's end why it is not the first."""

    verdict: str
    why: str | None = None

    @property
    def verified(self) -> bool:
        return self.verdict == EQUIVALENT

    @property
    def has_proof(self) -> bool:
        """Whether the record holds a verification of these files that did not fail."""
        return self.verdict != NOT_VERIFIED


def standing_of(record: Mapping[str, Any], hashes: Mapping[str, tuple[str, str]]) -> Standing:
    """What the record of a checkpoint proves, whose files have these (sha256, id in git)."""
    entry = record.get("verify")
    if not isinstance(entry, dict) or not isinstance(entry.get("levels"), dict):
        return Standing(NOT_VERIFIED, "has not been verified")
    levels = {name: level.get("status") for name, level in entry["levels"].items() if isinstance(level, dict)}
    failed = [name for name, status in levels.items() if status == "failed"]
    # Records that were written before there were verdicts have a flag only.
    verdict = entry.get("verdict", EQUIVALENT if entry.get("equivalent") is True else None)
    if failed or verdict not in (EQUIVALENT, NOT_RUN):
        return Standing(NOT_VERIFIED, f"its verification failed (level {', '.join(failed) or 'unknown'})")
    if levels.get("weights") != "passed":
        return Standing(NOT_VERIFIED, "its verification left out level weights, the one that compares every tensor")
    changed = changed_files(entry, {name: sha256 for name, (sha256, _) in hashes.items() if not is_documentation(name)})
    if changed:
        more = f" and {len(changed) - SHOWN_FILES} more" if len(changed) > SHOWN_FILES else ""
        return Standing(
            NOT_VERIFIED, f"its verification is void: {', '.join(changed[:SHOWN_FILES])}{more} changed since"
        )
    if verdict == NOT_RUN:
        return Standing(NOT_RUN, "its files are as planned, but neither model was run")
    return Standing(EQUIVALENT)
