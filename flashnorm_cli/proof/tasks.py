"""Tasks of lm-evaluation-harness by their names, or by the files that they are in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashnorm_cli.errors import UsageError, shown


@dataclass(frozen=True)
class Task:
    """A task or a group of tasks, by its name; `file` is the YAML file that it was given as."""

    name: str
    file: Path | None = None
    is_group: bool = False

    @property
    def spec(self) -> str:
        """What the harness is asked for. A file's path is that very file, whatever else has the task's name."""
        return self.name if self.file is None or self.is_group else str(self.file)


def named_tasks(tasks: Iterable[str]) -> tuple[Task, ...]:
    """Tasks as they are asked for: names, and paths of files.

    Raises UsageError for a file that is not there, or that holds no task.
    """
    found = []
    for task in tasks:
        path = Path(task).expanduser()
        is_file = path.suffix.lower() in (".yaml", ".yml") or path.is_file()
        found.append(_task_in(path) if is_file else Task(task))
    return tuple(found)


def _task_in(path: Path) -> Task:
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
    fields = content if isinstance(content, dict) else {}
    for key in ("group", "task"):
        if isinstance(fields.get(key), str) and fields[key]:
            return Task(fields[key], path.resolve(), key == "group")
    raise UsageError(f"{shown(path)}: holds no task of lm-evaluation-harness (a line `task: NAME`)")
