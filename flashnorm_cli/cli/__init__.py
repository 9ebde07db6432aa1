"""The `flashnorm` command: one file per command, shared options in `options.py`, all printing in `output.py`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import Annotated, NoReturn

import typer

from flashnorm_cli._version import __version__
from flashnorm_cli.cli import options
from flashnorm_cli.cli.bench import bench
from flashnorm_cli.cli.collector import rare_collections
from flashnorm_cli.cli.demo import demo
from flashnorm_cli.cli.doctor import doctor
from flashnorm_cli.cli.fold import fold
from flashnorm_cli.cli.fold_adapter import fold_adapter
from flashnorm_cli.cli.output import printable, stdout_errors
from flashnorm_cli.cli.plan import plan
from flashnorm_cli.cli.push_to_hub import push_to_hub
from flashnorm_cli.cli.verify import verify
from flashnorm_cli.errors import EXIT_ERROR, EXIT_USAGE, MOST_OF_A_LINE, FlashNormError, cut, one_line

INTERRUPTED = 130

app = typer.Typer(
    name="flashnorm",
    help="Fold RMSNorm weights into the linear layers behind them.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=options.examples("flashnorm demo"))(demo)
app.command(
    epilog=options.examples(
        "flashnorm plan ./Llama-3.2-1B",
        "flashnorm plan Qwen/Qwen3-30B-A3B",
        "flashnorm plan ./my-model --trust-remote-code --json",
    )
)(plan)
app.command(
    epilog=options.examples(
        "flashnorm fold ./Llama-3.2-1B",
        "flashnorm fold Qwen/Qwen3-8B ./qwen3-8b-folded --workers 8",
        "flashnorm fold google/gemma-3-1b-it --final-norm keep --json",
        "flashnorm fold deepseek-ai/DeepSeek-V3.1 --push-to me/DeepSeek-V3.1-FlashNorm --private",
        "flashnorm fold /nfs/Kimi-K2 /nfs/Kimi-K2-FlashNorm --dask tcp://10.0.0.1:8786",
    )
)(fold)
app.command(
    epilog=options.examples(
        "flashnorm verify ./Llama-3.2-1B-FlashNorm",
        "flashnorm verify ./out --level weights --level layers",
        "flashnorm verify ./out --report report.html",
        "flashnorm verify someone/gemma-3-1b-FlashNorm --source google/gemma-3-1b-it --json",
    )
)(verify)
app.command(
    "fold-adapter",
    epilog=options.examples(
        "flashnorm fold-adapter ./my-lora --base ./Llama-3.2-1B-FlashNorm",
        "flashnorm fold-adapter someone/qwen3-lora --base ./qwen3-8b-folded --source Qwen/Qwen3-8B ./qwen3-lora-folded",
        "flashnorm fold-adapter ./my-lora --base ./Llama-3.2-1B-FlashNorm --overwrite --json",
    ),
)(fold_adapter)
app.command(
    name="push-to-hub",
    epilog=options.examples(
        "flashnorm push-to-hub ./Llama-3.2-1B-FlashNorm me/Llama-3.2-1B-FlashNorm --dry-run",
        "flashnorm push-to-hub ./out me/my-model-FlashNorm --private",
        "flashnorm push-to-hub ./out me/my-model-FlashNorm --base-model me/my-model",
        "flashnorm push-to-hub ./out team/model-FlashNorm --create-pr --json",
    ),
)(push_to_hub)
app.command(
    epilog=options.examples(
        "flashnorm bench",
        "flashnorm bench --hidden 4096 --tokens 1 --tokens 4096 --plot norms.svg",
        "flashnorm bench llama-3.2-1b",
        "flashnorm bench ./my-model --config-only --batch 8 --json",
    )
)(bench)
app.command(epilog=options.examples("flashnorm doctor", "flashnorm doctor --json"))(doctor)


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
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # Retries of huggingface_hub are none of the user's business until they have failed.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        with rare_collections():
            result = typer.main.get_command(app).main(arguments, prog_name="flashnorm", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:  # typer has caught Ctrl-C already
            raise KeyboardInterrupt
        with stdout_errors():
            print(end="", flush=True)
    except (KeyboardInterrupt, typer.Abort):
        goes_on = "; the same command goes on where it stopped" if {"fold", "push-to-hub"} & {*arguments} else ""
        code = _fail(f"interrupted{goes_on}", INTERRUPTED)
    except Exception as error:  # whatever it is, it ends in one line; --debug shows the rest
        if "--debug" in arguments and not isinstance(error, typer.TyperException):
            raise
        code = _fail(*_words(error))
    sys.exit(code)


def _words(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if isinstance(error, FlashNormError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):  # an unknown option, a missing argument
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "flashnorm"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return f"{' '.join(message.split()).rstrip('.')}. See: {where} --help", EXIT_USAGE
    if isinstance(error, OSError) and error.errno:  # of the disk, where no better words were found
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", EXIT_ERROR
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", words):  # torch's words
        return "not enough memory", EXIT_ERROR
    if isinstance(error, RuntimeError) and "home directory" in words:  # pathlib's, of `~nobody/model`
        return "a path begins with ~, and there is no such user's home directory", EXIT_USAGE
    bug = "(a bug in flashnorm: please report it with the output of --debug)"
    return f"{type(error).__name__}: {cut(words, MOST_OF_A_LINE // 2)} {bug}", EXIT_ERROR


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody is listening
        print(f"flashnorm: {printable(one_line(message), sys.stderr)}", file=sys.stderr, flush=True)
    return code
