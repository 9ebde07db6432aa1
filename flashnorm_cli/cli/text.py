"""Text and figures as people read them."""

from __future__ import annotations

from typing import Any


def printable(text: str, stream: Any) -> str:
    """Text in what the stream can encode: under LANG=C, everything beyond ASCII is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def size(n: float) -> str:
    """Bytes for people: 1.2 GB, decimal as disks are sold and `ls --si` prints."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""
