"""What a command shows of long work on stderr: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.checkpoint.progress import Steps, bar_of_tqdm
from flashnorm_cli.cli.text import printable
from flashnorm_cli.errors import MOST_OF_A_NAME, one_line
from flashnorm_cli.plan.wording import size

EVERY = 30.0  # seconds between two lines where there is no terminal
EVERY_SETTING = "FLASHNORM_PROGRESS_SECONDS"  # other ones; 0 for no lines
WIDE, MEDIUM = 90, 60  # columns from which there is room for bytes and rate, and for a bar
NARROW = 40  # below, nothing is shown


class _Fitted(bars.Progress):
    """One task; its columns are those that the terminal has room for, and what is going on gets what they leave."""

    def make_tasks_table(self, tasks: Any) -> Table:
        if not tasks or (width := self.console.width) < NARROW:
            return Table.grid()
        counting, steps = tasks[0].total is not None, tasks[0].fields["steps"]
        behind: list[tuple[bars.ProgressColumn, int]] = [(bars.TimeElapsedColumn(), 8)]
        if counting:
            length = 20 if width >= WIDE else 10
            bar, left = (bars.BarColumn(length), length), (bars.TimeRemainingColumn(compact=True), 8)
            count = (bars.MofNCompleteColumn(), 11) if steps else (bars.DownloadColumn(), 15)
            share, rate = (bars.TaskProgressColumn(), 4), (bars.TransferSpeedColumn(), 11)
            behind = [share]
            if width >= WIDE:
                behind = [bar, count, left] if steps else [bar, count, rate, left]
            elif width >= MEDIUM:
                behind = [bar, count if steps else share, left]
        room = width - 2 - sum(1 + wide for _, wide in behind)
        column = Column(no_wrap=True, overflow="ellipsis", max_width=room)
        what = bars.TextColumn("{task.description}", markup=False, table_column=column)
        self.columns = (bars.SpinnerColumn(), what, *(column for column, _ in behind))
        return super().make_tasks_table(tasks)


@contextmanager
def shown(quiet: bool = False) -> Iterator[Progress]:
    """A function of (done, all, what is going on), as long work calls it."""
    console = Console(stderr=True)
    every = _every()
    if quiet or (every == 0 and not console.is_terminal):
        yield lambda done, total, what: None
    elif "JPY_PARENT_PID" in os.environ and console.is_terminal:
        with bar_of_tqdm() as report:  # `!flashnorm` in a notebook, which keeps all that an animation writes
            yield report
    elif console.is_terminal and not console.is_dumb_terminal:
        with _Fitted(console=console, transient=True) as bar:
            yield _told_to(bar)
    else:
        with _lines(every or EVERY) as report:
            yield report


def _every() -> float:
    setting = os.environ.get(EVERY_SETTING, "")
    return float(setting) if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", setting) else EVERY


def _told_to(bar: _Fitted) -> Progress:
    task = bar.add_task("Starting", total=None, steps=False)
    kind: tuple[int, bool] = 0, False

    def report(done: int, total: int, what: str) -> None:
        nonlocal kind
        now = total, isinstance(what, Steps)
        if now != kind:  # a rate is that of one piece of work
            kind = now
            bar.reset(task, total=total or None, steps=now[1])
            bar.tasks[0].total = total or None
        bar.update(task, completed=done, description=one_line(what, MOST_OF_A_NAME))

    return report


@contextmanager
def _lines(every: float) -> Iterator[Progress]:
    """A thread writes the lines, so that work which says nothing for a while is not silent either."""
    state: tuple[int, int, str] = 0, 0, "Starting"
    over, began = threading.Event(), time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        nonlocal state
        state = done, total, what

    def write() -> None:
        while not over.wait(every):
            line = f"flashnorm: {one_line(in_words(*state), MOST_OF_A_NAME)} ({time.monotonic() - began:.0f} s)"
            with suppress(OSError, ValueError):  # nobody is listening
                print(printable(line, sys.stderr), file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        over.set()
        thread.join()


def in_words(done: int, total: int, what: str) -> str:
    """Folding shard 3 of 163: 12 %, 1.2 GB of 30.1 GB."""
    if not total:
        return what
    amount = f"step {done + 1} of {total}" if isinstance(what, Steps) else f"{size(done)} of {size(total)}"
    return f"{what}: {amount}" if isinstance(what, Steps) else f"{what}: {100 * done // total} %, {amount}"
