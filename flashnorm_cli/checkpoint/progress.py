"""How long work says how far it is, and the bar that a notebook shows of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from flashnorm_cli.checkpoint.model import Progress

P = ParamSpec("P")
R = TypeVar("R")


class Steps(str):
    """What is going on, where steps are counted and not bytes."""


def shard_of(i: int, count: int, verb: str) -> str:
    """What is done to shard `i`, which counts from 0."""
    return f"{verb} shard {i + 1} of {count}" if count > 1 else f"{verb} the only shard"


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


@contextmanager
def bar_of_tqdm() -> Iterator[Progress]:
    """A bar of tqdm's, gone at the end: a widget in a notebook that has ipywidgets, else a line of text."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bar: Any = None
    kind: tuple[int, bool] | None = None

    def report(done: int, total: int, what: str) -> None:
        nonlocal bar, kind
        steps = isinstance(what, Steps)
        if kind != (total, steps):
            if bar is not None:
                bar.close()
            kind = total, steps
            shape = {"unit": "" if steps else "B", "unit_scale": not steps} if total else {"bar_format": "{desc}"}
            bar = tqdm(total=total or None, leave=False, mininterval=0.5, dynamic_ncols=True, **shape)
        if bar.desc != f"{what}: ":
            bar.set_description(what)
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def with_notebook_bar(function: Callable[P, R]) -> Callable[P, R]:
    """In a notebook, a bar for every call of a function that brings no `on_progress` of its own."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("on_progress") is not None or not in_notebook():
            return function(*args, **kwargs)
        with bar_of_tqdm() as report:
            kwargs["on_progress"] = report
            return function(*args, **kwargs)

    return run
