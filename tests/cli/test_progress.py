"""What is shown of long work: on a terminal of any width, without one, in a notebook."""

from __future__ import annotations

import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flashnorm_cli.checkpoint import progress as work
from flashnorm_cli.checkpoint.progress import Steps, shard_of, with_notebook_bar
from flashnorm_cli.cli import progress

BYTES = (1_200_000_000, 30_000_000_000, shard_of(2, 163, "Folding"))
STEPS = (2, 25, Steps("Comparing model.layers.12.post_attention_layernorm"))


def screen(width: int, *said: tuple[int, int, str]) -> str:
    """The bar's line on a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    bar = progress._Fitted(console=console)
    report = progress._told_to(bar)
    for each in said:
        report(*each)
    plain = Console(file=io.StringIO(), width=width)
    plain.print(bar.get_renderable(), end="")
    return plain.file.getvalue().rstrip()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 50, 60, 80, 90, 120])
def test_a_bar_fits_its_terminal(width: int) -> None:
    for said in (BYTES, STEPS, (0, 0, "Tracing LlamaForCausalLM")):
        line = screen(width, said)
        assert "\n" not in line and len(line) <= width
        assert said[2][:25] in line


def test_bytes_and_steps_are_told_apart() -> None:
    line = screen(100, BYTES)
    assert "Folding shard 3 of 163" in line and "1.2/30.0 GB" in line
    for width in (60, 80, 100):
        line = screen(width, BYTES, STEPS)
        assert " 2/25" in line and "B" not in line.split("layers")[1], line
    assert "4%" in screen(60, BYTES) and "4%" in screen(40, BYTES)


def test_a_terminal_too_narrow_shows_nothing() -> None:
    assert screen(39, BYTES) == ""


def test_without_a_terminal_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv(progress.EVERY_SETTING, "0.05")
    with progress.shown() as report:
        report(*BYTES)
        deadline = time.monotonic() + 20
        while err.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = err.getvalue().splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("flashnorm: Folding shard 3 of 163: 4 %, 1.2 GB of 30.0 GB (") for line in lines)
    with progress.shown(quiet=True) as report:
        report(*BYTES)
        time.sleep(0.2)
    monkeypatch.setenv(progress.EVERY_SETTING, "0")
    with progress.shown() as report:
        report(*BYTES)
        time.sleep(0.1)
    assert err.getvalue().splitlines() == lines
    monkeypatch.delenv(progress.EVERY_SETTING)
    assert progress._every() == 30.0
    assert progress.in_words(*STEPS).endswith("post_attention_layernorm: step 3 of 25")
    assert progress.in_words(0, 0, "Tracing Llama") == "Tracing Llama"


def test_a_notebook_has_a_bar_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Bar:
        def __init__(self, total: int | None, leave: bool, **shape: Any) -> None:
            self.n, self.desc = 0, ""
            drawn.append(f"open {total} {shape.get('unit')}")

        def set_description(self, text: str) -> None:
            self.desc = f"{text}: "

        def update(self, n: int) -> None:
            self.n += n
            drawn.append(f"{self.desc}{self.n}")

        def close(self) -> None:
            drawn.append("closed")

    @with_notebook_bar
    def job(on_progress: Any = None) -> str:
        if on_progress:
            on_progress(0, 0, "Reading headers")
            on_progress(5, 10, "Folding")
            on_progress(1, 2, Steps("Comparing"))
        return "done"

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    assert job() == "done" and drawn == []  # no notebook
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert work.in_notebook()
    told: list[Any] = []
    assert job(on_progress=lambda *said: told.append(said)) == "done" and drawn == [] and len(told) == 3
    assert job() == "done"
    assert drawn == [
        "open None None", "Reading headers: 0", "closed",
        "open 10 B", "Folding: 5", "closed",
        "open 2 ", "Comparing: 1", "closed",
    ]  # fmt: skip
