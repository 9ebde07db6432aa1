"""transformers, quiet and one thread at a time: what it prints is for other users, what it patches is everybody's."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from types import ModuleType

# While it loads a model, transformers replaces `PreTrainedModel.tie_weights` and more for the whole process, and each
# load puts back what it found (transformers/initialization.py). Two loads that overlap in two threads leave it replaced
# for good: every model made after that has its head untied. The same holds for its verbosity.
transformers_alone = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, no load reports, no other thread in here: there is nothing to load, and much that is global."""
    from transformers.utils import logging

    with transformers_alone, _quiet(logging):
        yield


@contextmanager
def _quiet(logging: ModuleType) -> Iterator[None]:
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)  # what it logs of a strange config is raised as well
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    if isinstance(error, KeyError):  # its text is the key alone
        return f"unknown value {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__
