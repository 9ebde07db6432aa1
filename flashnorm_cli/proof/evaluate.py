"""Benchmarks of both checkpoints by lm-evaluation-harness, as in the FlashNorm paper's table (arXiv 2407.09577)."""

from __future__ import annotations

import contextlib
import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.errors import UsageError
from flashnorm_cli.modeling.quiet import quiet_transformers
from flashnorm_cli.proof.figures import EvalFigures, TaskFigures
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.proof.tasks import task_names

# Both runs see the same items, so their errors are not independent: two combined standard errors are generous.
STANDARD_ERRORS = 2.0


def compare_eval(
    tasks: list[str],
    source: Path,
    folded: Path,
    dtype: str,
    device: str,
    limit: int | None,
    report: Progress,
) -> LevelResult:
    """Run tasks on both checkpoints, and compare every metric that has a standard error.

    Args:
        tasks: names that the harness knows, or paths of task files (YAML).
        limit: items of each task; None for all.

    figures: `EvalFigures`. A metric fails if it differs by more than two combined standard errors.

    Raises UsageError for a task that the harness does not know.
    """
    if find_spec("lm_eval") is None:
        return LevelResult(
            "eval", "skipped", reason="lm-evaluation-harness is not installed: pip install 'lm-eval[hf]'"
        )
    results = []
    for folder, what in ((source, "source"), (folded, "folded checkpoint")):
        report(0, 0, f"Evaluating the {what} on {', '.join(tasks)}")
        results.append(_evaluate(tasks, folder, dtype, device, limit))
    rows, findings = judge(*results)
    figures = EvalFigures(tuple(rows), limit)
    return LevelResult("eval", "failed" if findings else "passed", figures, tuple(findings))


def judge(
    source: dict[str, dict[str, Any]], folded: dict[str, dict[str, Any]]
) -> tuple[list[TaskFigures], list[Finding]]:
    """Compare two results of the harness: per task, `metric,filter` -> value, `metric_stderr,filter` -> its error."""
    rows: list[TaskFigures] = []
    findings = []
    for task, metrics in source.items():
        for key, value in metrics.items():
            metric, _, what = key.partition(",")
            other: Any = folded.get(task, {}).get(key)
            if not what or metric.endswith("_stderr") or not _is_number(value) or not _is_number(other):
                continue
            errors = [each.get(task, {}).get(f"{metric}_stderr,{what}") for each in (source, folded)]
            known = [error if _is_number(error) else None for error in errors]
            delta = other - value
            row = TaskFigures(task, metric if what == "none" else key, value, known[0], other, known[1], delta)
            rows.append(row)
            if known[0] is None or known[1] is None:
                continue
            allowed = STANDARD_ERRORS * math.hypot(known[0], known[1])
            if abs(delta) > allowed:
                message = f"{row.metric} changes by {delta:+.4f}; {allowed:.4f} is within the standard errors"
                findings.append(Finding(task, message, abs(delta)))
    return rows, findings


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _evaluate(tasks: list[str], folder: Path, dtype: str, device: str, limit: int | None) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    names, folders = task_names(tasks)
    manager = TaskManager(include_path=[str(folder) for folder in folders] or None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UsageError(f"lm-evaluation-harness has no task {', '.join(unknown)}")
    with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype},
            tasks=names,
            device=device,
            limit=limit,
            batch_size=1,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0 if limit == 1 else 1000,
        )
    return dict(found["results"])
