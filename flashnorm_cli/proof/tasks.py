"""Tasks of lm-evaluation-harness by their names, or by the files that they are in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashnorm_cli.errors import UsageError, shown


def task_names(tasks: Iterable[str]) -> tuple[list[str], list[Path]]:
    """The names of some tasks, and the folders of those that were given as files.

    Raises UsageError for a file that is not there, or that holds no task.
    """
    names, folders = [], dict[Path, None]()
    for task in tasks:
        path = Path(task).expanduser()
        if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
            names.append(_task_in(path))
            folders[path.resolve().parent] = None
        else:
            names.append(task)
    return names, list(folders)


def _task_in(path: Path) -> str:
    """What a task file calls its task, which need not be what the file is called."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """`!function module.name` and the like are code of the task, and are not looked at."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        content: Any = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())[:200]}") from error
    said = content if isinstance(content, dict) else {}
    for key in ("task", "group"):
        if isinstance(said.get(key), str) and said[key]:
            return str(said[key])
    raise UsageError(f"{shown(path)}: holds no task of lm-evaluation-harness (a line `task: NAME`)")
