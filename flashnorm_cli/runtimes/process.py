"""Engines in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flashnorm_cli.errors import FlashNormError

POSITIONS, PROMPT_TOKENS, TOP = 256, 32, 20  # that are compared; of one prompt; most likely tokens at each
SECONDS = 3600.0  # for one model


# After each prefix, the most likely next tokens with their log-probabilities.
Tops = list[dict[int, float]]


class EngineError(FlashNormError):
    """The engine did not run a model; the message is its own last word."""


def in_a_process(module: str, job: dict[str, Any], seconds: float | None = SECONDS) -> dict[str, Any]:
    """What `python -m MODULE JOB RESULT` writes into the file RESULT; JOB is a file that holds the job as JSON.

    A crash of an engine is a message then, its memory is given back, and what it prints is nobody's answer.
    Raises EngineError where it fails, or takes longer than `seconds`.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with TemporaryDirectory() as scratch:
        paths = Path(scratch, "job.json"), Path(scratch, "result.json")
        paths[0].write_text(json.dumps(job))
        call([sys.executable, "-m", module, *map(str, paths)], environment, seconds)
        if not paths[1].is_file():
            raise EngineError("it left no result")
        result: dict[str, Any] = json.loads(paths[1].read_text())
        return result


def call(command: list[str], environment: dict[str, str], seconds: float | None = SECONDS) -> None:
    """Run a command; EngineError with its last words, in one line, if it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment or None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"it took longer than {seconds:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # The engines' own words come before the traceback's last line, which only says that it failed.
        words = next((line for line in lines if "error" in line.lower() and "Error(" not in line), "")
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise EngineError(last if not words or words == last else f"{words}; {last}")
