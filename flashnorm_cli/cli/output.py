"""Everything that commands print: text for people on stdout, or one JSON object; progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Output:
    """Commands hand over a result twice, as data and as text; the options decide which one is shown."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        from rich.console import Console

        self.as_json, self.quiet = as_json, quiet
        self._err = Console(stderr=True)

    def text(self, *lines: str) -> None:
        """Print for people; nothing under --json or --quiet."""
        if not self.as_json and not self.quiet:
            print("\n".join(lines))

    def remark(self, *lines: str) -> None:
        """Print beside the result, on stderr, what a user should know that is no part of it; nothing under --quiet."""
        if not self.quiet:
            for line in lines:
                print(f"flashnorm: note: {line}", file=sys.stderr)

    def data(self, value: dict[str, Any]) -> None:
        """Print for scripts, under --json only."""
        if self.as_json:
            print(json.dumps(value, indent=2))

    @contextmanager
    def progress(self) -> Iterator[Callable[[int, int, str], None]]:
        """A bar with bytes and rate while shards are written, a line with a spinner before that.

        Yields a function of (bytes done, bytes in all, what is going on). Shown on a terminal only.
        """
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.text import Text

        class WhileCounting(ProgressColumn):
            """Another column, shown only while bytes are counted."""

            def __init__(self, inner: ProgressColumn) -> None:
                super().__init__()
                self.inner = inner

            def render(self, task: Task) -> Any:
                return self.inner(task) if task.fields.get("counting") else Text()

        counters = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), *map(WhileCounting, counters))
        hidden = self.quiet or not self._err.is_terminal
        with Progress(*columns, console=self._err, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=None)

            def update(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total or None, description=what, counting=bool(total))

            yield update


def size(n: float) -> str:
    """Bytes for people: 1.2 GB, decimal as disks are sold and `ls --si` prints."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""
