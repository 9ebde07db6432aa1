"""The command line, run in this process."""

from __future__ import annotations

import pytest

from flashnorm_cli.cli import main


def run(*arguments: object) -> int:
    """The exit code of `flashnorm ARGUMENTS`."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    code = stopped.value.code
    assert code is None or isinstance(code, int), code
    return code or 0
