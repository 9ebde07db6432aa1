"""Everything that commands print: text for people on stdout, or one JSON object; progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.cli import session
from flashnorm_cli.cli.text import coloured, columns, fitted, printable, shown_on
from flashnorm_cli.cli.wording import in_flags
from flashnorm_cli.errors import FlashNormError, UsageError, one_line

if TYPE_CHECKING:
    from flashnorm_cli.checkpoint.model import Progress


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Raise FlashNormError where stdout cannot be written: a full disk behind `> file`, a reader that went away."""
    try:
        yield
    except OSError as error:
        for stream in (session.current().stream, sys.stdout):  # what is left in a buffer would fail again at the exit
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]
        raise FlashNormError(f"standard output: {error.strerror or error}") from error


class Output:
    """Commands hand over a result twice, as data and as text; the options decide which one is shown."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._session = session.current()
        self._session.as_json = as_json

    def text(self, *lines: str, verbatim: bool = False) -> None:
        """Print for people, whatever files say fit for a terminal; nothing under --json or --quiet.

        Arguments are named as options, but where a file is shown (`verbatim`).
        """
        if not self.as_json and not self.quiet:
            stream = self._session.stream
            width = columns(stream)
            each = [line for text in lines for line in (text.split("\n") if "\n" in text else [text])]
            safe = [printable(fitted(one_line(line if verbatim else in_flags(line)), width), stream) for line in each]
            shown = [coloured(text, line, stream) for text, line in zip(safe, each, strict=True)]
            with stdout_errors():
                print("\n".join(shown), file=stream, flush=True)

    def keep_stdout(self) -> None:
        """From here on, nothing but what this object prints comes to stdout."""
        self._session.keep_stdout(self.quiet)

    def verbatim(self, text: str) -> None:
        """Print a document for another program, under --quiet too."""
        with stdout_errors():
            print(text, file=self._session.stream, end="", flush=True)

    def remark(self, *lines: str) -> None:
        """Say beside the result, on stderr, what a user should know that is no part of it; nothing under --quiet."""
        self._session.notes += lines
        if not self.quiet:
            for line in lines:
                print(shown_on(sys.stderr, f"flashnorm: note: {one_line(in_flags(line))}"), file=sys.stderr)

    def meanwhile(self, line: str) -> None:
        """Say on stderr, above the bar where there is one, what is known before the result; nothing under --quiet."""
        if not self.quiet:
            with suppress(OSError, ValueError):  # nobody is listening
                print(shown_on(sys.stderr, one_line(in_flags(line))), file=sys.stderr, flush=True)

    def width(self, most: int) -> int:
        """How wide a table may be: as the terminal is, at most `most`."""
        return min(columns(self._session.stream) or most, most)

    def next(self, *commands: str) -> None:
        """Print which commands go on from here, one a line."""
        self._session.next += commands
        if not self.as_json and not self.quiet:
            with stdout_errors():  # in one piece, however long, so that it can be copied
                for command in commands:
                    line = printable(f"Next: {one_line(in_flags(command))}", self._session.stream)
                    print(line, file=self._session.stream, flush=True)

    def data(self, value: dict[str, Any]) -> None:
        """Keep for scripts: `main` prints it under --json when the command has ended. `notes` in it come first."""
        self._session.body = value

    def progress(self) -> AbstractContextManager[Progress]:
        """Shows on stderr, of what long work says to the function that this gives, what there is room for."""
        from flashnorm_cli.cli.progress import shown

        return shown(self.quiet)


def check_writable(path: Path) -> None:
    """Before long work: a file can be written at `path` when it is done.

    Raises UsageError for a path that cannot be a file's, FlashNormError where the disk says no.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is not a regular file")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
        # As long as the name that it will be written under.
        probe = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise FlashNormError(f"{path}: cannot be written: {error.strerror}") from error


def written(path: Path, write: Callable[[], object], problems: list[str]) -> bool:
    """Whether `write` has written `path` after long work. If not, `problems` says why, and the result is not lost."""
    try:
        write()
    except (OSError, FlashNormError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.append(reason if str(path) in reason else f"{path}: cannot be written: {reason}")
        return False
    return True
