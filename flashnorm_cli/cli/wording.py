"""Messages name arguments and calls as Python writes them, in backticks; here they become options and commands.

    exists already; `overwrite=True` replaces it    ->  exists already; --overwrite replaces it
    `text` and `token_ids` exclude each other       ->  --text and --token-ids exclude each other
    run it: `verify("out", source="<its source>")`  ->  run it: flashnorm verify out --source <its source>

So a message is right for those who called a function, and for those who typed a command.
"""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

# The arguments of the public functions that commands have options for.
OPTIONS = frozenset(
    "adopt base base_model base_revision cache_dir commit_message create_pr dask device dry_run dtype final_norm "
    "follow_links layout limit local_files_only max_algebra max_ratio output overwrite private publish record "
    "leave_grid revision rotate seed source source_revision text token token_ids trust_remote_code unverified "
    "target workers levels runtimes tasks verify".split()
)
OTHER_NAMES = {"target": "for", "levels": "level", "runtimes": "runtime", "tasks": "eval", "limit": "eval-limit"}
COMMANDS = {
    "fold": "fold",
    "fold_adapter": "fold-adapter",
    "make_plan": "plan",
    "push_to_hub": "push-to-hub",
    "verify": "verify",
}
_CODE = re.compile(r"(: )?`([^`\n]{1,2000})`")


def in_flags(text: str) -> str:
    """A message for the command line. What is no argument of ours stays as it is."""
    return _CODE.sub(_worded, text) if "`" in text else text


def _worded(found: re.Match[str]) -> str:
    lead, code = found[1] or "", found[2]
    if code in COMMANDS:
        return f"{lead}`flashnorm {COMMANDS[code]}`"
    if code in OPTIONS:
        return lead + _flag(code)
    call = _call(code) or _call(f"argument({code})")
    try:
        if call is None or not isinstance(call.func, ast.Name):
            return found[0]
        if call.func.id in COMMANDS:
            words = [*(_value(ast.literal_eval(each)) for each in call.args), *_options(call)]
            line = " ".join(["flashnorm", COMMANDS[call.func.id], *words])
            return f"{lead}{line}" if lead else f"`{line}`"
        if call.func.id == "argument" and call.keywords and not call.args:
            return lead + " ".join(_options(call))
    except (ValueError, KeyError):  # a value that is no literal, an argument that no command has
        pass
    return found[0]


def _call(code: str) -> ast.Call | None:
    if not code.endswith(")"):
        return None
    try:
        parsed = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return parsed if isinstance(parsed, ast.Call) else None


def _options(call: ast.Call) -> list[str]:
    """Keywords as options. Raises KeyError for one that no command has, ValueError for what is no literal."""
    words = []
    for keyword in call.keywords:
        name, value = str(keyword.arg), ast.literal_eval(keyword.value)
        if name not in OPTIONS:
            raise KeyError(name)
        if isinstance(value, bool):
            words.append(_flag(name, value))
        elif name == "tasks":
            words += [_flag(name), _value(",".join(value))]
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                words += [_flag(name), _value(each)]
    return words


def _flag(name: str, on: bool = True) -> str:
    return f"--{'' if on else 'no-'}{OTHER_NAMES.get(name, name).replace('_', '-')}"


def _value(value: Any) -> str:
    """As a shell takes it; <what stands for something> as it is."""
    text = str(value)
    return text if re.fullmatch("<.*>", text) else shlex.quote(text)
