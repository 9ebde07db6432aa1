"""How often Python looks for garbage in a process that imports three thousand modules, works, and ends."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Objects made between two searches, and young searches between two of the middle generation (Python's own: 700 and 10).
# What an import makes stays: with Python's own numbers a quarter of a command's CPU time goes into looking through the
# modules of torch and transformers again and again. Memory is given back by reference counts; what waits for a search
# are cycles of 20,000 objects at most.
YOUNG, MIDDLE = 20_000, 20


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let the collector search rarely, and not at all once the process ends: the system takes everything back then.

    What is to happen at the end is registered with `atexit` or by `with`, never left to the collector.
    """
    before = gc.get_threshold()
    gc.set_threshold(YOUNG, MIDDLE, before[2])
    atexit.unregister(_leave_to_the_system)  # one is enough, however many commands this process runs
    atexit.register(_leave_to_the_system)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _leave_to_the_system() -> None:
    """Extensions made with nanobind (triton's, which torch imports) would print a hundred lines of what is left."""
    if not any(kind.__module__ == "nanobind" for kind in type.__subclasses__(type)):
        gc.freeze()
