"""Headings of Markdown that becomes a part of another page."""

from __future__ import annotations

import re

LOWEST = 6
# Characters. Cards have some ten thousand; what is longer stays as it is rather than to be parsed for minutes.
MOST = 1 << 20
HTML_TAG = re.compile(r"(</?h)([1-6])\b", re.IGNORECASE)


def below(text: str, level: int) -> str:
    """The text with its headings moved down together, so that the highest is of `level`; all else as it was."""
    from markdown_it import MarkdownIt

    if len(text) > MOST:
        return text
    text = re.sub("\r\n?", "\n", text)
    tokens = MarkdownIt("commonmark").disable("inline").parse(text)
    headings = [token for token in tokens if token.type == "heading_open" and token.map]
    blocks = [token for token in tokens if token.type == "html_block" and token.map]
    levels = [int(token.tag[1:]) for token in headings]
    levels += [int(number) for token in blocks for _, number in HTML_TAG.findall(token.content)]
    by = level - min(levels, default=level)
    if by <= 0:
        return text

    lines: list[str | None] = [*text.split("\n")]
    for token in headings:
        start, end = token.map or (0, 0)
        marks = "#" * min(int(token.tag[1:]) + by, LOWEST)
        if token.markup.startswith("#"):
            lines[start] = re.sub("#+", marks, str(lines[start]), count=1)
        elif token.level == 0:  # underlined: = and - know two levels only
            words = " ".join(str(line).strip() for line in lines[start : end - 1])
            lines[start:end] = [f"{marks} {words}", *[None] * (end - start - 1)]
    for token in blocks:
        start, end = token.map or (0, 0)
        for i in range(start, end):
            lines[i] = HTML_TAG.sub(lambda tag: f"{tag[1]}{min(int(tag[2]) + by, LOWEST)}", str(lines[i]))
    return "\n".join(line for line in lines if line is not None)
