"""Errors that a user can act on: one line each, with the exit code that the command line returns for it."""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_EQUIVALENT = 3
EXIT_NOT_RUN = 4  # `verify`: as planned, but no forward of both models was compared


class FlashNormError(Exception):
    """Something that the user, not the program, has to mend. The message is one line that says what to do."""

    exit_code = EXIT_ERROR


class UsageError(FlashNormError):
    """The call itself is wrong: options that exclude each other, a path that cannot be what it is said to be."""

    exit_code = EXIT_USAGE


class CheckpointError(FlashNormError):
    """The checkpoint's files do not hold together: a truncated shard, an index that names a missing file."""


class PlanError(FlashNormError):
    """The architecture cannot be planned: it cannot be built, traced, or matched with the tensors on disk."""


class GainOverflowError(FlashNormError):
    """A finite weight times its gain is beyond the largest finite value of the tensor's dtype."""
