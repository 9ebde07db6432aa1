"""Tables for people, laid out by rich: plain text, nothing is cut; only a terminal folds what it is too narrow for."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from io import StringIO
from itertools import pairwise

from flashnorm_cli.cli import session
from flashnorm_cli.cli.text import columns
from flashnorm_cli.cli.wording import in_flags
from flashnorm_cli.errors import one_line

WIDTH = 100
NO_END = 1 << 20  # wider than any table: a file, a pipe and a pager get whole lines


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = (), least: Sequence[int] = ()) -> list[str]:
    """Rows as lines, their cells below one another.

    Args:
        rows: cells of one line each, as many in every row.
        right: the columns that are set to the right.
        least: how wide the first columns are at least.
    Returns:
        A line a row; more of them, within the column, for the longest cells where stdout is a narrower terminal.
    """
    width = columns(session.current().stream) or NO_END
    return _laid_out([[one_line(in_flags(cell)) for cell in row] for row in rows], right, least, width)


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], width: int = WIDTH, keys: int = 2) -> list[str]:
    """A table for a terminal; one that is too wide gets heads of several lines, then goes on below.

    Lines that begin alike stand together, with an empty one behind them.

    Args:
        head: names of the columns.
        lines: cells.
        width: characters in a line.
        keys: how many columns, from the left, say what a line is about: they are repeated in each part.
    Returns:
        Lines, with an empty one between parts.
    """
    if not head:
        return []
    cells = [max((len(line[i]) for line in lines), default=0) for i in range(len(head))]
    right = [i for i, is_number in enumerate(_numeric(head, lines)) if is_number]
    heads = [[name] for name in head]
    if sum(max(len(n), c) + 2 for n, c in zip(head, cells, strict=True)) - 2 > width:
        heads = [_wrapped(name, cell) for name, cell in zip(head, cells, strict=True)]
    widths = [max(cell, *map(len, h)) for h, cell in zip(heads, cells, strict=True)]
    parts = [list(range(min(keys, len(head))))]
    for i in range(keys, len(head)):
        if len(parts[-1]) > keys and sum(widths[j] + 2 for j in (*parts[-1], i)) - 2 > width:
            parts.append(list(range(keys)))
        parts[-1].append(i)

    rows = [["\n".join(h) for h in heads], ["-" * w for w in widths]]
    apart = any(a[0] == b[0] for a, b in pairwise(lines))
    for n, line in enumerate(lines):
        if apart and n and line[0] != lines[n - 1][0]:
            rows.append([""] * len(head))
        rows.append(list(line))
    text: list[str] = []
    for part in parts:
        shown = [[row[i] for i in part] for row in rows]
        text += [""] if text else []
        text += _laid_out(shown, [at for at, i in enumerate(part) if i in right], (), NO_END)
    return text


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table for Markdown, numbers to the right."""
    if not head:
        return []
    rule = ["--:" if numeric else ":--" for numeric in _numeric(head, lines)]
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    return [f"| {' | '.join(line)} |" for line in (rows[0], rule, *rows[1:])]


def _laid_out(rows: Sequence[Sequence[str]], right: Collection[int], least: Sequence[int], width: int) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return []
    grid = Table.grid(padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        grid.add_column(
            justify="right" if i in right else "left",
            vertical="bottom" if width == NO_END else "top",  # heads of several lines stand on the rule
            min_width=least[i] if i < len(least) else None,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*map(Text, row))
    # Rich tells a terminal's colours and width from the environment: here nothing depends on it.
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False, _environ={})
    with console.capture() as captured:
        console.print(grid, crop=False)
    return [line.rstrip() for line in captured.get().split("\n")[:-1]]


def _numeric(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, and so are set to the right."""
    return [any(re.match(r"[-+]?\d", line[i]) for line in lines) for i in range(len(head))]


def _wrapped(name: str, width: int) -> list[str]:
    """A head in lines, broken at spaces and before brackets, no wider than its longest piece or `width`."""
    pieces = re.findall(r" ?[^ (]+| ?\([^)]*\)?", name) or [""]
    width = max(width, *(len(piece.strip()) for piece in pieces))
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1] + piece) <= width:
            lines[-1] += piece
        else:
            lines.append(piece.strip())
    return lines
