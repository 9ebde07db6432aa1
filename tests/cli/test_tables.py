"""Tables: aligned whatever stands in them, never cut, and the same in every environment."""

import os
import subprocess
import sys

import pytest
from terminal import on_a_terminal

from flashnorm_cli.cli.tables import aligned

LONG = "model." + "very_long_module_name." * 12 + "weight"
SHOW = "import sys; from flashnorm_cli.cli.tables import aligned; print(*aligned([('a', sys.argv[1])] * 2), sep='\\n')"


def test_cells_stand_below_one_another() -> None:
    assert aligned(
        [("folded", "a", "12 x", "into q, k"), ("kept", "longer", "1 x", "")], right=[2], least=[6, 0, 6]
    ) == [
        "folded  a         12 x  into q, k",
        "kept    longer     1 x",
    ]
    assert aligned([]) == []


def test_what_files_say_is_text() -> None:
    """No markup of rich's, no escape sequence, no emoji code, no highlighting; wide letters are counted as wide."""
    lines = aligned(
        [("[bold red]x[/]", ":smile: \x1b[31mred"), ("漢字", "1234 'text' http://a.b"), ("tab\tbell\a", "-")]
    )
    assert lines == [
        "[bold red]x[/]  :smile: \\x1b[31mred",
        "漢字            1234 'text' http://a.b",
        "tab\\tbell\\x07   -",
    ]


@pytest.mark.parametrize(
    "environment", [{}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"TTY_COMPATIBLE": "1"}]
)
def test_a_pipe_gets_whole_lines(environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SHOW, LONG], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [f"a  {LONG}"] * 2


def test_a_narrow_terminal_folds_the_last_column() -> None:
    """Nothing of it is lost, and it stays in its column."""
    lines = on_a_terminal(["-c", SHOW, LONG], COLUMNS="40").splitlines()
    assert len(lines) > 2 and all(len(line) <= 40 and line[1:3] == "  " for line in lines)
    assert "".join(line[3:] for line in lines) == LONG * 2
