"""`flashnorm demo`."""
from __future__ import annotations

from flashnorm_cli.cli import options


def demo(debug: options.DebugOpt = False) -> None:
    """TODO"""
