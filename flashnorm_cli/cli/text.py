"""Text as a stream can take it."""

from __future__ import annotations

from typing import Any


def printable(text: str, stream: Any) -> str:
    """Text in what the stream can encode: under LANG=C, everything beyond ASCII is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
