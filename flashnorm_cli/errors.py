"""Errors that a user can act on: one line each, with the exit code that the command line returns for it.

What a message quotes comes from files that anybody may have written: `escaped` is the one place that makes such text
fit for a terminal, and `cut` keeps it short. Every FlashNormError passes through both.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from pathlib import PurePath
from typing import Any

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_EQUIVALENT = 3
EXIT_NOT_RUN = 4  # `verify`: as planned, but no forward of both models was compared

MOST_OF_A_NAME = 200
MOST_OF_A_WORD = 400  # longer than most paths
MOST_OF_A_LINE = 2000
_WORD = re.compile(rf"\S{{{MOST_OF_A_WORD + 1},}}")

_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 80


def escaped(text: str) -> str:
    """Text that a terminal shows as it is and never obeys.

    Line breaks, controls (C0, C1, ESC), marks that nobody sees or that turn the direction of text, half surrogate pairs
    and what has no glyph become `\\x1b`, `\\u202e`, ...; letters of all scripts and spaces of any width stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


def cut(text: str, most: int) -> str:
    """Text of at most `most` characters; of a longer one the middle is left out."""
    if len(text) <= most:
        return text
    keep = most - 3
    return f"{text[: keep - keep // 3]}...{text[len(text) - keep // 3 :]}"


def one_line(text: str, most: int = MOST_OF_A_LINE) -> str:
    """A line for a terminal: no word and no line is endless, and nothing in it is obeyed."""
    short = _WORD.sub(lambda found: cut(found[0], MOST_OF_A_WORD), cut(text, 8 * most))
    return cut(escaped(short), most)


def shown(value: object) -> str:
    """A value of a file, short and safe, for a message: names and paths as they are, all else as Python writes it."""
    if isinstance(value, PurePath):
        return escaped(cut(str(value), MOST_OF_A_WORD))
    if isinstance(value, str):
        return escaped(cut(value, MOST_OF_A_NAME))
    return cut(_values.repr(value), MOST_OF_A_NAME)


def quoted(value: object) -> str:
    """As `shown`, with quotes around a text."""
    return repr(cut(value, MOST_OF_A_NAME)) if isinstance(value, str) else shown(value)


class FlashNormError(Exception):
    """Something that the user, not the program, has to mend. The message is one line that says what to do."""

    exit_code = EXIT_ERROR

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UsageError(FlashNormError):
    """The call itself is wrong: options that exclude each other, a path that cannot be what it is said to be."""

    exit_code = EXIT_USAGE


class VerificationError(FlashNormError):
    """A verification that did not end in "equivalent", raised by its `raise_for_failure`; `verification` is it."""

    exit_code = EXIT_NOT_EQUIVALENT

    def __init__(self, message: object = "", verification: Any = None) -> None:
        super().__init__(message)
        self.verification = verification


class NotRunError(VerificationError):
    """The files hold what the plan asks for, and no run of both models was compared."""

    exit_code = EXIT_NOT_RUN


class CheckpointError(FlashNormError):
    """The checkpoint's files do not hold together: a truncated shard, an index that names a missing file."""


class FolderError(CheckpointError):
    """A folder holds what is not to be read: a link that leads out, a pipe, a subfolder that cannot be listed."""


class PlanError(FlashNormError):
    """The architecture cannot be planned: it cannot be built, traced, or matched with the tensors on disk."""


class GainOverflowError(FlashNormError):
    """A finite weight times its gain is beyond the largest finite value of the tensor's dtype."""


class GainUnderflowError(FlashNormError):
    """So many weights times their gain are too small for the tensor's dtype that the matrix would be another one."""
