"""The levels of `verify`, one after the other."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.proof.options import DTYPES, VerifyOptions
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.result import LevelResult

WRONG_WEIGHTS = 'level weights found tensors or files that are not right; `levels=["logits"]` runs it all the same'


@dataclass(frozen=True)
class LevelsRun:
    """What the levels found, and the sha256 of each folded shard that one of them read whole."""

    results: tuple[LevelResult, ...]
    hashes: dict[str, str]


def run_levels(pair: Pair, options: VerifyOptions, report: Progress) -> LevelsRun:
    """Run the levels that the options ask for.

    Only wrong weights keep level logits from running: what level layers says of noise is no reason to look less.
    """
    if options.tasks:
        from flashnorm_cli.proof.evaluate import check_tasks

        check_tasks(options.tasks)
    results: list[LevelResult] = []
    hashes: dict[str, str] = {}

    def run(level: str, check: Callable[[], LevelResult | None]) -> None:
        started = time.monotonic()
        if (result := check()) is None:
            return
        results.append(dataclasses.replace(result, level=level, seconds=round(time.monotonic() - started, 2)))

    def weights() -> LevelResult:
        from flashnorm_cli.proof.weights import check_weights

        result, found = check_weights(pair, threads(options), report)
        hashes.update(found)
        return result

    if "weights" in options.levels:
        run("weights", weights)
    wrong = any(result.status == "failed" for result in results)
    if "layers" in options.levels:
        run("layers", lambda: _layers(pair, options, report))
    if "logits" in options.levels:
        if wrong and not options.insist:
            results.append(LevelResult("logits", "skipped", reason=WRONG_WEIGHTS))
        else:
            run("logits", lambda: _logits(pair, options, report))
            run("users", lambda: _users(pair, options, report))
            if options.device.startswith("cuda"):
                run("kernels", lambda: _kernels(pair, options))
    for name in options.runtimes:
        run(f"runtime:{name}", lambda name=name: _runtime(name, pair, options, report))  # type: ignore[misc]
    if options.tasks:
        run("eval", lambda: _eval(pair, options, report))
    return LevelsRun(tuple(results), hashes)


def threads(options: VerifyOptions) -> int:
    return options.workers or min(os.cpu_count() or 1, 8)


def _layers(pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult:
    from flashnorm_cli.proof.layers import check_layers

    return check_layers(pair, options.max_ratio, options.device, report)


def _logits(pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult:
    from flashnorm_cli.proof.logits import check_logits
    from flashnorm_cli.proof.prompts import read_prompts

    prompts = read_prompts(pair.source, options.text, options.token_ids, options.trust_remote_code)
    return check_logits(pair, prompts, options, report)


def _users(pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult | None:
    from flashnorm_cli.proof.users import check_users

    return check_users(pair, options, report)


def _kernels(pair: Pair, options: VerifyOptions) -> LevelResult:
    from flashnorm_cli.proof.kernels import check_kernels
    from flashnorm_cli.proof.models import own_dtype

    return check_kernels(pair, DTYPES[options.dtype] if options.dtype else own_dtype(pair.source), options.device)


def _runtime(name: str, pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult:
    from flashnorm_cli.proof.engines import compare_runtime
    from flashnorm_cli.proof.prompts import read_prompts

    prompts = read_prompts(pair.source, options.text, options.token_ids, options.trust_remote_code)
    ids = [list(prompt) for prompt in prompts.ids]
    folders = pair.source.folder, pair.folded.folder
    return compare_runtime(name, *folders, ids, _dtype_name(pair, options), report, options.trust_remote_code)


def _eval(pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult:
    from flashnorm_cli.proof.evaluate import compare_eval

    folders = pair.source.folder, pair.folded.folder
    dtype = _dtype_name(pair, options)
    trusted = options.trust_remote_code
    return compare_eval(options.tasks, *folders, dtype, options.device, options.limit, report, trusted)


def _dtype_name(pair: Pair, options: VerifyOptions) -> str:
    from flashnorm_cli.proof.models import own_dtype

    return options.dtype or str(own_dtype(pair.source)).removeprefix("torch.")
