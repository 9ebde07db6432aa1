"""What a terminal shows: lines broken between words, colours on verdicts, help in the width that there is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from terminal import on_a_terminal

from flashnorm_cli.cli import app
from flashnorm_cli.cli.text import Coloured, coloured, fitted

SHOW = """
import sys
from flashnorm_cli.cli.output import Output
from flashnorm_cli.cli.summary import summary
from flashnorm_cli.proof.result import LevelResult, Verification
levels = (LevelResult("weights", "passed", reason="all of them"), LevelResult("logits", "failed", reason="off"),
          LevelResult("eval", "skipped", reason="it is not installed, and that takes many words to say " * 3))
out = Output()
out.text(*summary(Verification("out", "model", None, False, None, levels, {}, {})))
out.next("flashnorm verify " + "very-long-name/" * 12)
"""
GREEN, RED, YELLOW = "\x1b[32m", "\x1b[31m", "\x1b[33m"


def test_verdicts_have_colours_on_a_terminal_only() -> None:
    shown = on_a_terminal(["-c", SHOW], COLUMNS="60")
    assert f"{RED}NOT equivalent\x1b[0m: " in shown
    assert f"weights       {GREEN}passed\x1b[0m" in shown
    assert f"logits        {RED}failed\x1b[0m" in shown
    assert f"eval          {YELLOW}skipped\x1b[0m" in shown
    plain = shown
    for code in (GREEN, RED, YELLOW, "\x1b[0m"):
        plain = plain.replace(code, "")
    for quiet in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert on_a_terminal(["-c", SHOW], COLUMNS="60", **quiet) == plain
    lines = [line for line in plain.splitlines() if not line.startswith("Next: ")]
    assert max(map(len, lines)) <= 60
    assert " ".join(plain.split()).count("that takes many words to say") == 3  # whole words, all of them
    assert f"Next: flashnorm verify {'very-long-name/' * 12}\n" in shown  # in one piece, to be copied
    piped = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in piped and piped.splitlines()[0].startswith("NOT equivalent: ")


def test_lines_break_between_words() -> None:
    line = "Note: where something else reads them (a draft model of another repository): --final-norm keep."
    for width in range(20, 120):
        lines = fitted(line, width).split("\n")
        assert " ".join(lines) == line and max(map(len, lines)) <= width
    assert fitted(line, None) == line
    assert fitted("/a/path/of/many/letters/" * 5, 40) == "/a/path/of/many/letters/" * 5
    assert all(part.startswith("    ") for part in fitted("    " + line, 40).split("\n"))


def test_a_colour_needs_its_word() -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    line = Coloured("Equivalent: out", "Equivalent", "green")
    assert coloured("other", line, Terminal()) == "other"
    assert coloured(line, str(line), Terminal()) == line  # no colour was asked for


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_help_fills_the_width_with_whole_words(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashnorm_cli.cli import main

    monkeypatch.setenv("COLUMNS", str(width))
    for page in ([], ["fold"], ["verify"], ["bench"], ["push-to-hub"]):
        with pytest.raises(SystemExit):
            main([*page, "--help"])
        shown = capsys.readouterr().out
        text = shown.split("Examples:")[0]
        assert "..." not in text.replace("[ARGS]...", "")
        wide = max(map(len, text.splitlines()))
        assert wide <= width or wide <= max(map(len, text.split())) + 8  # a name that is longer than the terminal
        assert wide > width * 0.8 or not page
        for words in ("compare it with its source.",) if not page else ("Print one JSON object instead of text.",):
            assert words in " ".join(text.split())


def test_completion_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    env = os.environ | {
        "_FLASHNORM_COMPLETE": "complete_bash", "COMP_WORDS": "flashnorm fold --final", "COMP_CWORD": "2",
        "_TYPER_COMPLETE_ARGS": "flashnorm fold --final",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "flashnorm_cli"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "--final-norm", done.stderr
    assert app._add_completion
