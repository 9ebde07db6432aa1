"""What is shown while the Hub is at work: no bars of huggingface_hub's, and how far an upload has come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_quiet, _quiet_lock = 0, threading.Lock()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """huggingface_hub draws no bars of its own: the command has one. Bars come back when the last job has ended."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    global _quiet
    with _quiet_lock:
        ours = _quiet > 0 or not are_progress_bars_disabled()
        if ours:
            _quiet += 1
            disable_progress_bars()
    try:
        yield
    finally:
        with _quiet_lock:
            if ours:
                _quiet -= 1
                if not _quiet:
                    enable_progress_bars()


@contextmanager
def watched(path: Path | None, size: int, report: Callable[[int], None]) -> Iterator[None]:
    """Report how far a file has been read while it is uploaded (no path: nothing to see).

    The upload runs in huggingface_hub and hf_xet, which tell nobody; but Linux knows how far each open file was read.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            if (position := _read_so_far(path)) is not None:
                report(min(position, size))

    thread = threading.Thread(target=watch, daemon=True)
    if path is not None:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _read_so_far(path: Path | None) -> int | None:
    """The position of this process in a file that it has open."""
    target = str(path.resolve()) if path else ""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()) == target:
                line = Path("/proc/self/fdinfo", link.name).read_text().splitlines()[0]
                return int(line.split()[1])
        except (OSError, ValueError, IndexError):  # closed meanwhile
            continue
    return None
