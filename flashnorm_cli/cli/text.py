"""Text as a stream takes it: in its encoding, in lines as wide as its terminal, in colours where it shows some."""

from __future__ import annotations

import os
import textwrap
from typing import Any


class Coloured(str):
    """A line of which `part` is coloured where colours are shown."""

    part: str
    colour: str

    def __new__(cls, line: str, part: str, colour: str) -> Coloured:
        made = super().__new__(cls, line)
        made.part, made.colour = part, colour
        return made


def printable(text: str, stream: Any) -> str:
    """Text in what the stream can encode: under LANG=C, everything beyond ASCII is escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def shown_on(stream: Any, line: str) -> str:
    """A line in the stream's encoding, and in its terminal's width."""
    return fitted(printable(line, stream), columns(stream))


def columns(stream: Any) -> int | None:
    """How wide the terminal behind a stream is; None where there is none."""
    try:
        if not stream.isatty():
            return None
        setting = os.environ.get("COLUMNS", "")
        if setting.isdecimal() and int(setting):
            return int(setting)
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return None


def fitted(line: str, width: int | None) -> str:
    """A line that is too long for a terminal, broken between words; what follows lies below its beginning."""
    if width is None or len(line) <= width or not line.strip():
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.lstrip(),
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent if 2 * len(indent) < width else "",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )


def coloured(text: str, line: str, stream: Any) -> str:
    """`text`, which is `line` made fit for the stream, with the colour of the line where the stream shows colours."""
    if not isinstance(line, Coloured) or not _shows_colours(stream) or line.part not in text:
        return text
    import typer

    return text.replace(line.part, typer.style(line.part, fg=line.colour), 1)


def _shows_colours(stream: Any) -> bool:
    """See https://no-color.org."""
    try:
        return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and bool(stream.isatty())
    except (ValueError, AttributeError):
        return False
