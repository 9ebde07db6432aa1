"""How results show themselves: a short line in a session of Python, a small table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from flashnorm_cli.errors import quoted, shown


class Shown:
    """A result with a few facts that say what it is; all others are attributes, and too many to print."""

    def _facts(self) -> Mapping[str, Any]:
        """What a reader wants to see first, by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={quoted(value)}" for name, value in self._facts().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        """A table for notebooks. Names come from files that anybody may have written: they are escaped."""
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name.replace("_", " "))}</th>'
            f'<td style="text-align:left">{escape(shown(value))}</td></tr>'
            for name, value in self._facts().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
