"""Engines in processes of their own."""

from __future__ import annotations

import subprocess

from flashnorm_cli.errors import FlashNormError

POSITIONS, PROMPT_TOKENS, TOP = 256, 32, 20  # that are compared; of one prompt; most likely tokens at each


SECONDS = 3600.0  # for one model


# After each prefix, the most likely next tokens with their log-probabilities.
Tops = list[dict[int, float]]


class EngineError(FlashNormError):
    """The engine did not run a model; the message is its own last word."""


def call(command: list[str], environment: dict[str, str]) -> None:
    """Run a command; EngineError with its last words, in one line, if it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment or None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"it took longer than {SECONDS:.0f} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # The engines' own words come before the traceback's last line, which only says that it failed.
        words = next((line for line in lines if "error" in line.lower() and "Error(" not in line), "")
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise EngineError(last if not words or words == last else f"{words}; {last}")
