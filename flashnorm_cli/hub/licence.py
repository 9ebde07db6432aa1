"""Whether a card keeps the terms under which its source may be passed on."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from flashnorm_cli.errors import FlashNormError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

FIELDS = ("license", "license_name", "license_link")
NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research", re.IGNORECASE)


def check_licence(
    ours: dict[str, Any], theirs: dict[str, Any], files: Collection[str], info: ModelInfo | None, folder: str
) -> None:
    """Refuse a card that would lose the source's licence or its gate.

    Args:
        ours: metadata of the README.md in the folded folder, which the card is made from.
        theirs: metadata of the source's own card, as far as they are known.
        files: what the folded folder holds; a licence that is a file has to be among it.
        info: what the Hub says of the source.
        folder: the folder's name, for the message.
    Raises:
        FlashNormError: with the term that would be lost, and how to put it back.
    """
    remedy = f"put the source's README.md into {folder} again"
    if info is not None:
        remedy += f": hf download {info.id} README.md --revision {info.sha} --local-dir {folder}"
    for key in FIELDS:
        if theirs.get(key) and ours.get(key) != theirs[key]:
            says = f"says {ours[key]!r}" if ours.get(key) else "says nothing"
            raise FlashNormError(f"the source's {key} is {theirs[key]!r}, and README.md in {folder} {says}: {remedy}")
    lost = [key for key in theirs if key.startswith("extra_gated_") and ours.get(key) != theirs[key]]
    if lost:
        raise FlashNormError(f"the source is gated, and README.md in {folder} has lost its {lost[0]}: {remedy}")
    gated = gate_of(ours, info)
    if not ours.get("license") and (gated or NON_COMMERCIAL.search(str(ours.get("license_name")))):
        raise FlashNormError(
            f"the source is gated, but README.md in {folder} names no licence: add `license:` to the block at its top"
        )
    link = str(ours.get("license_link") or "")
    if link and "://" not in link and link not in files:
        raise FlashNormError(
            f"the licence is said to be in the file {link}, which {folder} does not hold: put it there, or mend "
            "`license_link` in its README.md"
        )


def gate_of(data: dict[str, Any], info: ModelInfo | None) -> str | bool:
    """The source's gate: "auto", "manual" or False; where only its card is known, its gating fields tell."""
    if info is not None:
        return info.gated or False
    return "auto" if any(key.startswith("extra_gated_") for key in data) else False


def terms(data: dict[str, Any]) -> str:
    """The licence in a few words, for people who look at what they have published."""
    licence = data.get("license")
    if not licence:
        return "none named"
    words = ", ".join(map(str, licence)) if isinstance(licence, list) else str(data.get("license_name") or licence)
    return f"{words} (non-commercial)" if NON_COMMERCIAL.search(words) else words
