"""Help pages as wide as the terminal, without a word that is cut and without a summary that ends in dots."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

LEAST = 30  # columns; in fewer nothing can be read


class _Page(typer.Context.formatter_class):  # type: ignore[valid-type, misc]
    """What click lays out, but that words stay whole, and that narrow terminals get one column instead of two."""

    def __init__(self) -> None:
        super().__init__(width=max(shutil.get_terminal_size().columns, LEAST))

    def write_text(self, text: str) -> None:
        at = " " * self.current_indent
        for i, paragraph in enumerate(re.split(r"\n\s*\n", text.strip("\n"))):
            self.write("\n" if i else "")
            if paragraph.startswith("\b"):  # lines that stay apart: examples
                lines = paragraph.splitlines()[1:]
            else:
                lines = self._wrapped(paragraph, self.width - len(at))
            self.write("".join(f"{at}{line}\n" for line in lines))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        lines = self._wrapped(f"{prefix or 'Usage: '}{prog} {args}", self.width)
        self.write("".join(f"{'       ' if i else ''}{line}\n" for i, line in enumerate(lines)))

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 32, col_spacing: int = 2) -> None:
        at = " " * self.current_indent
        first = min(max((len(name) for name, _ in rows), default=0), col_max) + col_spacing
        below = self.width - first - len(at) < 30
        for name, text in rows:
            lines = self._wrapped(text, self.width - len(at) - (6 if below else first))
            if below or len(name) > first - col_spacing:
                self.write(f"{at}{name}\n")
            else:
                self.write(f"{at}{name:{first}}{lines.pop(0) if lines else ''}".rstrip() + "\n")
            self.write("".join(f"{at}{' ' * (6 if below else first)}{line}\n" for line in lines))

    @staticmethod
    def _wrapped(text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, max(width, 10), break_long_words=False, break_on_hyphens=False)


class _Pages:
    """What a command and the group have in common."""

    def get_help(self, ctx: Any) -> str:
        page = _Page()
        self.format_help(ctx, page)  # type: ignore[attr-defined]
        return str(page.getvalue()).rstrip("\n")

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole."""
        first = " ".join((getattr(self, "help", None) or "").split("\n\n")[0].split())
        return re.split(r"(?<=[.?!]) ", first)[0]


class Command(_Pages, TyperCommand):
    """A command with such a page."""


class Group(_Pages, TyperGroup):
    """The commands, with such a page."""
