"""One run of the command line: standard output kept for its result, and the one JSON document of --json.

Under --json, standard output holds that document and nothing else, whatever becomes of the command: results, verdicts
and errors are told in the same words (schema.json, docs/json.md). What others print there (a checkpoint's own code,
libraries, child processes) goes to standard error; under --quiet, nowhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TextIO

from flashnorm_cli._version import __version__
from flashnorm_cli.cli.wording import in_flags

VERBATIM = ("plan", "card")  # what a file holds, word for word
SCHEMA = 1  # raised when a field goes away or means something else; new fields do not raise it


@dataclass
class Session:
    """What a command has said so far. `body` is what it found, None where it ended before that."""

    as_json: bool = False
    command: str | None = None
    body: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    started: float = field(default_factory=time.monotonic)
    _stream: TextIO | None = None  # of the result, while standard output is kept for it
    _before: TextIO | None = None  # what sys.stdout was

    @property
    def stream(self) -> TextIO | None:
        """Where the result is printed; None where standard output is closed."""
        return self._stream or sys.stdout

    def document(self, exit_code: int) -> str:
        """The result, or the error, or both: a result that could not be saved as well."""
        body = dict(self.body or {})
        notes = [*body.pop("notes", ()), *self.notes]
        content = {
            "schema": SCHEMA,
            "command": self.command,
            "flashnorm": __version__,
            "exit_code": exit_code,
            "error": self.error,
            **body,
            "notes": notes,
            "next": self.next,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        document = {key: plain(value, word=key not in VERBATIM) for key, value in content.items()}
        return json.dumps(document, indent=2, allow_nan=False)

    def keep_stdout(self, quiet: bool) -> None:
        """From here on, only `stream` leads to standard output."""
        if self._before is not None or sys.stdout is None:
            return
        self._before = sys.stdout
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if _descriptor(sys.stdout) != 1:  # a program that has put another stream in its place
            self._stream = self._before
            sys.stdout = sys.stderr if sys.stderr is not None and not quiet else open(os.devnull, "w")  # noqa: PTH123, SIM115
            return
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        self._stream = os.fdopen(os.dup(1), "w", encoding=encoding, errors=errors)
        elsewhere = None if quiet else _descriptor(sys.stderr)
        if elsewhere is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
        else:
            os.dup2(elsewhere, 1)

    def give_stdout_back(self) -> None:
        """For a program that goes on after this command. A process of ours ends: what prints at its exit is foreign."""
        if self._before is None or self._stream is None:
            return
        if self._stream is self._before:
            sys.stdout = self._before
        else:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            import ctypes

            ctypes.CDLL(None).fflush(None)  # what C code has printed and not written yet
            os.dup2(self._stream.fileno(), 1)
            self._stream.close()
        self._stream = self._before = None


_current = Session()


def begin(arguments: Sequence[str]) -> Session:
    """A new run. Until its command is known, --json counts wherever it stands among the options."""
    global _current
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    _current = Session(as_json="--json" in options)
    return _current


def current() -> Session:
    """The run that goes on."""
    return _current


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError, AttributeError):  # closed, or no file at all: a notebook's, a test's
        return None


def plain(value: Any, word: bool = True) -> Any:
    """As JSON has it, which knows neither inf nor NaN: they become null. `word`: arguments are named as options."""
    if isinstance(value, str):
        return in_flags(value) if word else value
    if isinstance(value, Mapping):
        return {str(key): plain(inner, word) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, word) for inner in value]
    if isinstance(value, PurePath):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
