"""The `flashnorm` command: one file per command, shared options in `options.py`, all printing in `output.py`."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from traceback import walk_tb
from typing import Annotated, Any, NoReturn

import typer

from flashnorm_cli._version import __version__
from flashnorm_cli.cli import options, session
from flashnorm_cli.cli.bench import bench
from flashnorm_cli.cli.collector import rare_collections
from flashnorm_cli.cli.demo import demo
from flashnorm_cli.cli.doctor import doctor
from flashnorm_cli.cli.fold import fold
from flashnorm_cli.cli.fold_adapter import fold_adapter
from flashnorm_cli.cli.help import Command, Group
from flashnorm_cli.cli.output import stdout_errors
from flashnorm_cli.cli.plan import plan
from flashnorm_cli.cli.push_to_hub import push_to_hub
from flashnorm_cli.cli.text import shown_on
from flashnorm_cli.cli.verify import verify
from flashnorm_cli.cli.wording import in_flags
from flashnorm_cli.errors import EXIT_ERROR, EXIT_USAGE, MOST_OF_A_LINE, FlashNormError, cut, one_line

INTERRUPTED = 130


def _keeping_stdout(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with standard output kept for its result."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        now = session.current()
        now.command = command.__name__.replace("_", "-")
        now.keep_stdout(quiet=bool(options.get("quiet")))
        command(**options)

    return run


app = typer.Typer(
    name="flashnorm",
    cls=Group,
    help="Fold RMSNorm weights into the linear layers behind them.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, epilog=options.examples("flashnorm demo"))(_keeping_stdout(demo))
app.command(
    cls=Command,
    epilog=options.examples(
        "flashnorm plan ./Llama-3.2-1B",
        "flashnorm plan Qwen/Qwen3-30B-A3B",
        "flashnorm plan ./my-model --svg plan.svg",
        "flashnorm plan ./my-model --trust-remote-code --json",
    ),
)(_keeping_stdout(plan))
app.command(
    cls=Command,
    epilog=options.examples(
        "flashnorm fold ./Llama-3.2-1B",
        "flashnorm fold Qwen/Qwen3-8B ./qwen3-8b-folded --workers 8",
        "flashnorm fold google/gemma-3-1b-it --final-norm keep --json",
        "flashnorm fold deepseek-ai/DeepSeek-V3.1 --push-to me/DeepSeek-V3.1-FlashNorm --private",
        "flashnorm fold /nfs/Kimi-K2 /nfs/Kimi-K2-FlashNorm --dask tcp://10.0.0.1:8786",
    ),
)(_keeping_stdout(fold))
app.command(
    cls=Command,
    epilog=options.examples(
        "flashnorm verify ./Llama-3.2-1B-FlashNorm",
        "flashnorm verify ./out --level weights --level layers",
        "flashnorm verify ./out --report report.html",
        "flashnorm verify someone/gemma-3-1b-FlashNorm --source google/gemma-3-1b-it --json",
    ),
)(_keeping_stdout(verify))
app.command(
    name="fold-adapter",
    cls=Command,
    epilog=options.examples(
        "flashnorm fold-adapter ./my-lora --base ./Llama-3.2-1B-FlashNorm",
        "flashnorm fold-adapter someone/qwen3-lora --base ./qwen3-8b-folded --source Qwen/Qwen3-8B ./qwen3-lora-folded",
        "flashnorm fold-adapter ./my-lora --base ./Llama-3.2-1B-FlashNorm --overwrite --json",
    ),
)(_keeping_stdout(fold_adapter))
app.command(
    cls=Command,
    name="push-to-hub",
    epilog=options.examples(
        "flashnorm push-to-hub ./Llama-3.2-1B-FlashNorm me/Llama-3.2-1B-FlashNorm --dry-run",
        "flashnorm push-to-hub ./out me/my-model-FlashNorm --private",
        "flashnorm push-to-hub ./out me/my-model-FlashNorm --base-model me/my-model",
        "flashnorm push-to-hub ./out team/model-FlashNorm --create-pr --json",
    ),
)(_keeping_stdout(push_to_hub))
app.command(
    cls=Command,
    epilog=options.examples(
        "flashnorm bench --quick",
        "flashnorm bench --save results.json",
        "flashnorm bench --from results.json --plot norms.svg",
        "flashnorm bench --hidden 4096 --tokens 1 --tokens 4096 --plot norms.svg",
        "flashnorm bench llama-3.2-1b",
        "flashnorm bench ./my-model --config-only --batch 8 --json",
    ),
)(_keeping_stdout(bench))
app.command(cls=Command, epilog=options.examples("flashnorm doctor", "flashnorm doctor --json"))(
    _keeping_stdout(doctor)
)


def _print_version(value: bool) -> None:
    if value:
        with stdout_errors():
            print(f"flashnorm {__version__}", flush=True)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. Exit codes: 0 done, 1 error, 2 usage, 3 not equivalent, 4 not run, 130 interrupted."""
    whole_process = arguments is None
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # Retries of huggingface_hub are none of the user's business until they have failed.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    now = session.begin(arguments)
    try:
        try:
            code = _run(arguments)
        finally:
            if whole_process:  # from here on Ctrl-C ends the process at once, and not in a traceback of its last steps
                signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:  # a second one, while the first was being dealt with
        code = INTERRUPTED
    except Exception as error:  # --debug: the document is printed all the same, and the traceback follows
        _print_document(now, _words(error)[1])
        raise
    else:
        code = _print_document(now, code)
    finally:
        if not whole_process:
            now.give_stdout_back()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code of a command. Whatever goes wrong ends in one line, but under --debug."""
    try:
        with rare_collections():
            result = typer.main.get_command(app).main(arguments, prog_name="flashnorm", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # typer has caught Ctrl-C already
            raise KeyboardInterrupt
        with stdout_errors():
            print(end="", file=session.current().stream, flush=True)
    except (KeyboardInterrupt, typer.Abort):
        goes_on = "; the same command goes on where it stopped" if {"fold", "push-to-hub"} & {*arguments} else ""
        return _fail("Interrupted", f"interrupted{goes_on}", INTERRUPTED)
    except Exception as error:
        words, code = _words(error)
        strange = isinstance(error, typer.TyperException)  # an option or a command that is not there
        if strange and session.current().command is None and (context := getattr(error, "ctx", None)) is not None:
            session.current().command = context.info_name if context.parent is not None else None
        if "--debug" in arguments and not strange:
            session.current().error = {"type": type(error).__name__, "message": words}
            raise
        return _fail("UsageError" if strange else type(error).__name__, words, code)
    return code


def _print_document(now: session.Session, code: int) -> int:
    """Under --json, the one thing on standard output. Returns the exit code, another one where that fails."""
    if not now.as_json or (now.body is None and now.error is None):  # the second: --help, --version
        return code
    try:
        with stdout_errors():
            print(now.document(code), file=now.stream, flush=True)
    except FlashNormError as error:
        return _fail(type(error).__name__, str(error), error.exit_code)
    return code


def _words(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if isinstance(error, FlashNormError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):  # an unknown option, a missing argument
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "flashnorm"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = " ".join(message.split()).rstrip(".")
        return f"{message}{'' if message.endswith('?') else '.'} See: {where} --help", EXIT_USAGE
    if isinstance(error, OSError) and error.errno:  # of the disk, where no better words were found
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", EXIT_ERROR
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", words):  # torch's words
        return "not enough memory", EXIT_ERROR
    if isinstance(error, RuntimeError) and "home directory" in words:  # pathlib's, of `~nobody/model`
        return "a path begins with ~, and there is no such user's home directory", EXIT_USAGE
    if (broken := _failed_import(error)) is not None:
        what = cut(f"{type(broken).__name__}: {' '.join(str(broken).split())}", MOST_OF_A_LINE // 2)
        return (
            f"a package that flashnorm needs cannot be imported ({what}): install flashnorm in a new environment",
            EXIT_ERROR,
        )
    bug = "(a bug in flashnorm: please report it with the output of --debug)"
    return f"{type(error).__name__}: {cut(words, MOST_OF_A_LINE // 2)} {bug}", EXIT_ERROR


def _failed_import(error: BaseException) -> BaseException | None:
    """The error that kept another package from being imported: packages of different builds side by side, say."""
    while (cause := error.__cause__ or error.__context__) is not None:  # transformers hides it behind one of its own
        error = cause
    modules = [
        f.f_globals.get("__name__", "") for f, _ in walk_tb(error.__traceback__) if f.f_code.co_name == "<module>"
    ]
    others = [
        name for name in modules if name.split(".")[0] not in ("__main__", "flashnorm_cli", "transformers_modules")
    ]
    missing = isinstance(error, ImportError) and not (error.name or "").startswith("flashnorm_cli")
    return error if others or missing else None


def _fail(kind: str, message: str, code: int) -> int:
    """Say what went wrong: a line on standard error, and in the document. Returns the code."""
    session.current().error = {"type": kind, "message": one_line(message)}
    with contextlib.suppress(OSError):  # nobody is listening
        print(shown_on(sys.stderr, f"flashnorm: {one_line(in_flags(message))}"), file=sys.stderr, flush=True)
    return code
