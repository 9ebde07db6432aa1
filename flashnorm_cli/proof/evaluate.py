"""Benchmarks of both checkpoints by lm-evaluation-harness, as in the FlashNorm paper's table (arXiv 2407.09577).

python -m flashnorm_cli.proof.evaluate JOB RESULT    # the harness's process: tasks bring code, and the harness prints
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.errors import UsageError
from flashnorm_cli.modeling.quiet import first_line
from flashnorm_cli.proof.figures import EvalFigures, TaskFigures
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.proof.tasks import named_tasks
from flashnorm_cli.runtimes.process import EngineError, in_a_process

# Both runs see the same items, so their errors are not independent: two combined standard errors are generous.
STANDARD_ERRORS = 2.0


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise UsageError for tasks that the harness does not know, and files that hold none: before hours of work.

    Where the harness does not start, nothing is known; the level says why.
    """
    job = _job(tasks)
    if find_spec("lm_eval") is None or not job["defaults"]:
        return
    try:
        wrong = in_a_process(__name__, job)["wrong"]
    except EngineError:
        return
    if wrong:
        raise UsageError("; ".join(wrong))


def compare_eval(
    tasks: Sequence[str],
    source: Path,
    folded: Path,
    dtype: str,
    device: str,
    limit: int | None,
    report: Progress,
    trust_remote_code: bool = False,
) -> LevelResult:
    """Run tasks on both checkpoints, and compare every metric that has a standard error.

    Args:
        tasks: names that the harness knows, or paths of task files (YAML).
        limit: items of each task; None for all.

    figures: `EvalFigures`. A metric fails if it differs by more than two combined standard errors.
    """
    if find_spec("lm_eval") is None:
        return LevelResult(
            "eval", "skipped", reason="lm-evaluation-harness is not installed: pip install 'lm-eval[hf]'"
        )
    asked = _job(tasks)

    def run(folder: Path, what: str) -> dict[str, dict[str, Any]]:
        report(0, 0, f"Evaluating the {what} on {', '.join(tasks)}")
        model = {"pretrained": str(folder.resolve()), "dtype": dtype, "trust_remote_code": trust_remote_code}
        found = in_a_process(__name__, asked | {"model": model, "device": device, "limit": limit}, seconds=None)
        if error := found.get("error"):
            raise EngineError(error)
        return dict(found["results"])

    try:
        before = run(source, "source")
    except EngineError as error:
        return LevelResult("eval", "skipped", reason=f"lm-evaluation-harness does not run the source: {error}")
    try:
        after = run(folded, "folded checkpoint")
    except EngineError as error:
        finding = Finding("lm-evaluation-harness", f"does not run the folded checkpoint: {error}")
        return LevelResult("eval", "failed", EvalFigures((), limit), (finding,))
    rows, findings = judge(before, after)
    figures = EvalFigures(tuple(rows), limit)
    return LevelResult("eval", "failed" if findings else "passed", figures, tuple(findings))


def _job(tasks: Sequence[str]) -> dict[str, Any]:
    """Tasks as the harness's process is asked for them."""
    named = named_tasks(tasks)
    return {
        "tasks": [task.spec for task in named],
        # Its own thousands of files take it ten seconds to read.
        "defaults": any(task.file is None or task.is_group for task in named),
        "groups": {task.name: str(task.file) for task in named if task.is_group},
        "folders": sorted({str(task.file.parent) for task in named if task.file}),
    }


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


# ---- the harness's process -------------------------------------------------------------------------------------------


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    """In the process: which tasks cannot be had; of a job with a model, its results."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    manager = TaskManager(include_path=job["folders"] or None, include_defaults=job["defaults"])
    if "model" not in job:
        return {"wrong": _wrong_tasks(manager, job["tasks"], job["groups"])}
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]

    try:
        found = simple_evaluate(
            model="hf",
            model_args=job["model"],
            tasks=job["tasks"],
            device=job["device"],
            limit=job["limit"],
            batch_size=1,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0 if job["limit"] == 1 else 1000,
        )
    except Exception as error:  # of a task's own code, of its data, of the model
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    return {"results": found["results"]}


def _wrong_tasks(manager: Any, specs: list[str], groups: dict[str, str]) -> list[str]:
    """What is asked for and cannot be had: names that the harness does not know, files of groups that it does not take.

    It finds a group by its name only, and takes the first file of a folder that has it.
    """
    wrong = []
    for spec in specs:
        entry = manager.task_index.get(spec)
        if spec in groups:
            file = groups[spec]
            if entry is None or entry.yaml_path is None:
                wrong.append(
                    f"{file}: lm-evaluation-harness does not find the group {spec} there: the file's name has to end "
                    "in .yaml, and what it includes has to be there"
                )
            elif Path(entry.yaml_path).resolve() != Path(file):
                wrong.append(
                    f"{file}: lm-evaluation-harness takes {entry.yaml_path} for the group {spec}: rename one of them"
                )
        elif entry is None and not Path(spec).is_file():
            wrong.append(f"lm-evaluation-harness has no task {spec}")
    return wrong


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_answer(json.loads(Path(sys.argv[1]).read_text())), default=str))
