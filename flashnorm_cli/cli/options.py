"""Options that several commands share, so that they are named and explained once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.choices import Layout as Layout
from flashnorm_cli.errors import UsageError

ModelArg = Annotated[
    str, typer.Argument(help="A local folder, a Hub id, or the address of its page.", show_default=False)
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
TokenOpt = Annotated[str | None, typer.Option(help="Hub token; by default the one you logged in with.")]
CacheDirOpt = Annotated[Path | None, typer.Option(help="Where Hub files are cached.")]
LocalFilesOnlyOpt = Annotated[bool, typer.Option("--local-files-only", help="Use the cache, never the network.")]
TrustRemoteCodeOpt = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code to build the model.")
]
FinalNormOpt = Annotated[
    FinalNorm,
    typer.Option(
        help="The norm before the output head: fold it, untying a tied head where runtimes allow (auto); keep it; "
        "or fold and untie in any case."
    ),
]
WorkersOpt = Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="one per processor, up to 8")]
FollowLinksOpt = Annotated[
    bool, typer.Option("--follow-links", help="Follow links of a local folder also where they lead out of it.")
]
OutputOpt = Annotated[Path | None, typer.Option("--output", "-o", help="The same folder, as an option.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def one_output(argument: Path | None, option: Path | None) -> Path | None:
    """The output folder, which may be named either way. Raises UsageError where both name one."""
    if argument is not None and option is not None:
        raise UsageError(f"the output folder is named twice, as {argument} and as --output {option}")
    return option if argument is None else argument


def examples(*commands: str) -> str:
    """The examples block at the end of a command's help; `\\b` keeps its lines apart."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def command_line(arguments: Sequence[str]) -> str:
    """How to reproduce a verification, without secrets."""
    shown: list[str] = []
    hide = False
    for argument in arguments:
        if hide:
            hide = False
            continue
        if argument == "--token":
            hide = True
        elif not argument.startswith("--token="):
            shown.append(argument)
    return shlex.join(["flashnorm", *shown])
