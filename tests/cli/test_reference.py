"""docs/cli.md is what the commands say of themselves. `python tests/cli/test_reference.py` writes it."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import typer

from flashnorm_cli.cli import app

DOC = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Commands

What `flashnorm COMMAND --help` prints, as a page. All commands share their [exit codes](../README.md#exit-codes).

"""


def reference() -> str:
    """The page, from the tree of commands: no terminal, width or colour has a part in it."""
    group = typer.main.get_command(app)
    root = group.make_context("flashnorm", [], resilient_parsing=True)
    pages = [_section(name, group.get_command(root, name), root) for name in group.list_commands(root)]
    shared = _table("Option", [r for p in group.get_params(root) if (r := p.get_help_record(root))])
    summary = _table("Command", [(f"[{name}](#{name})", first) for name, first, _ in pages], code=False)
    return HEAD + summary + "\n" + shared + "\n" + "\n".join(page for *_, page in pages)


def _section(name: str, command, root) -> tuple[str, str, str]:
    """A command's name, the first sentence of its help, and its section."""
    context = command.make_context(name, [], parent=root, resilient_parsing=True)
    paragraphs = [" ".join(p.split()) for p in (command.help or "").split("\n\n")]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    text = f"## {name}\n\n" + "".join(f"{_plain(p)}\n\n" for p in paragraphs) + f"    {usage}\n\n"
    records = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        if record := parameter.get_help_record(context):
            records[parameter.param_type_name].append(record)
    text += "\n".join(_table(kind.capitalize(), rows) for kind, rows in records.items() if rows)
    lines = (command.epilog or "").replace("\b\n", "").splitlines()
    if lines:
        text += f"\n{lines[0]}\n\n" + "".join(f"    {line.strip()}\n" for line in lines[1:])
    return name, paragraphs[0], text


def _table(head: str, rows: list[tuple[str, str]], code: bool = True) -> str:
    lines = [f"| {head} | |", "|--|--|"]
    for name, words in rows:
        # A bar in a cell is read alike everywhere only as an entity, and that only outside backticks.
        shown = f"<code>{html.escape(name, quote=False).replace('|', '&#124;')}</code>" if code else name
        lines.append(f"| {shown} | {_plain(' '.join(words.split()))} |")
    return "\n".join(lines) + "\n"


def _plain(words: str) -> str:
    """Words of a help text as Markdown that shows them as they are; what is in backticks stays code."""
    parts = words.split("`")
    return "`".join(part if i % 2 else re.sub(r"([<>*|\\])", r"\\\1", part) for i, part in enumerate(parts))


def test_the_page_is_what_the_commands_say():
    assert DOC.read_text() == reference(), (
        f"python {Path(__file__).relative_to(DOC.parents[1])} writes {DOC.name} again"
    )


def test_no_terminal_has_a_part_in_it():
    terminal = {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    code = f"import runpy; print(runpy.run_path({__file__!r})['reference'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | terminal, capture_output=True, text=True)
    assert done.stdout == DOC.read_text(), done.stderr


if __name__ == "__main__":
    DOC.write_text(reference())
