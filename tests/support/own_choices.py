"""Tests of norm_linear choose kernels by themselves: nothing measured before, nothing kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashnorm_cli.cuda import choices, linear


def start_without_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test on a GPU that the kernels cannot run on."""
    if torch.cuda.is_available() and (reason := linear.why_not(0)):
        pytest.skip(reason)
    monkeypatch.setenv("FLASHNORM_CACHE", str(tmp_path))
    monkeypatch.setenv("FLASHNORM_TUNE", "0")
    monkeypatch.setattr(choices, "_known", {})
