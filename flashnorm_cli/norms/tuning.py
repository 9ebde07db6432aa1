"""Measure which variant of norm_linear is the fastest for a shape on this GPU, or that the library is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flashnorm_cli.checkpoint.progress import Steps
from flashnorm_cli.cuda import choices, driver, linear
from flashnorm_cli.cuda.choices import Choice
from flashnorm_cli.cuda.linear import DTYPES, Problem
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, MEASURED_ROWS, Variant, candidates
from flashnorm_cli.norms.linear_torch import torch_norm_linear

TURNS = 5  # replays of each
_COLD = 160 << 20  # bytes of weights that calls go through in turn, so that none is found in L2
_BETTER = 0.99  # of the library's time: what a variant must reach to be chosen


def measuring_allowed() -> bool:
    """Whether a choice may be measured now: not while a graph is captured, nor where FLASHNORM_TUNE=0 forbids it."""
    return os.environ.get("FLASHNORM_TUNE") != "0" and not torch.cuda.is_current_stream_capturing()


def tune(
    problems: Sequence[Problem],
    index: int,
    rows: Sequence[int] = MEASURED_ROWS,
    again: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[tuple[Problem, int], Choice]:
    """Choose for each problem and number of rows, and keep the choices on disk. What is known is not measured again.

    Takes seconds per shape the first time (NVRTC compiles on all cores), and waits for the GPU.

    Args:
        problems: shapes; index: the GPU; rows: of MEASURED_ROWS; again: measure also what is known.
    """
    found: dict[tuple[Problem, int], Choice] = {}
    todo = []
    for problem in dict.fromkeys(problems):
        for count in rows:
            known = None if again else choices.choice_of(problem, count, index)
            if known is not None:
                found[problem, count] = known
            else:
                todo.append((problem, count))
    if not todo or linear.why_not(index):
        return found
    device = driver.device(index)
    wanted = {
        (problem, count): candidates(problem.k, problem.activation, count, device.arch) for problem, count in todo
    }
    on_progress(0, len(todo), Steps("Compiling kernels"))
    compile_all([(variant, problem) for (problem, _), each in wanted.items() for variant in each], index)
    with torch.cuda.device(index), torch.no_grad():
        for done, (problem, count) in enumerate(todo):
            on_progress(done, len(todo), Steps(f"Measuring {problem.k} x {problem.n}, {count} rows"))
            found[problem, count] = choice = _fastest(problem, count, wanted[problem, count], index)
            choices.remember(problem, count, index, choice, save=False)
    choices.save_choices(choices.gpu_name(index))
    return found


def compile_all(wanted: Sequence[tuple[Variant, Problem]], index: int) -> float:
    """Compile variants on all cores. Returns the seconds it took."""
    start = time.perf_counter()
    unique = {(v, p.k, p.dtype, p.norm, p.activation): (v, p) for v, p in wanted}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda each: linear.compiled(each[0], each[1], index), unique.values()))
    return time.perf_counter() - start


def measure(
    problem: Problem, rows: int, variants: Sequence[Variant | None], index: int, turns: int = TURNS
) -> dict[Variant | None, float]:
    """Microseconds on the device per call, of variants and, for None, of the library; medians of graph replays.

    Calls follow one another with weights that are not in L2. A model mixes kernels, so it sees a part of the
    differences. Variants that cannot run, or compute something else, are left out.
    """
    calls = Calls(problem, rows, index)
    graphs: dict[Variant | None, torch.cuda.CUDAGraph] = {}
    want = calls.library(0).float()
    side = torch.cuda.Stream(index)
    side.wait_stream(torch.cuda.current_stream(index))
    with torch.cuda.stream(side):
        for variant in variants:
            call = calls.library if variant is None else calls.kernel(variant)
            if call is None:
                continue
            try:
                got = call(0).float()
                call(1)
            except RuntimeError:  # the driver refused it
                continue
            if not (got - want).norm() <= 0.02 * want.norm():
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                for i in range(calls.launches):
                    call(i)
            graphs[variant] = graph
    times: dict[Variant | None, list[float]] = {variant: [] for variant in graphs}
    for turn in range(turns + 1):
        for variant, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize(index)
            if turn:
                times[variant].append(start.elapsed_time(end) * 1000 / calls.launches)
    return {variant: sorted(each)[len(each) // 2] for variant, each in times.items()}


def _fastest(problem: Problem, rows: int, variants: Sequence[Variant], index: int) -> Choice:
    times = measure(problem, rows, [None, *variants], index)
    library = times.pop(None)
    if not times:
        return Choice(None, None, library)
    # The best three once more and longer: the fastest of many short measurements is partly luck.
    best = sorted(times, key=lambda v: times[v])[:3]
    times = measure(problem, rows, [None, *best], index, turns=4 * TURNS)
    library = times.pop(None)
    variant = min(times, key=lambda v: times[v])
    chosen = variant if times[variant] <= _BETTER * library else None
    return Choice(chosen, round(times[variant], 3), round(library, 3))


class Calls:
    """Random inputs of a problem, and calls on them in turn."""

    def __init__(self, problem: Problem, rows: int, index: int) -> None:
        self.problem, self.rows, self.index = problem, rows, index
        lines = problem.n * (2 if problem.activation else 1)
        more: dict[str, Any] = {"dtype": DTYPES[problem.dtype], "device": f"cuda:{index}"}
        sets = max(1, min(64, _COLD // (2 * problem.k * lines)))
        generator = torch.Generator(more["device"]).manual_seed(0)
        first = torch.randn(lines, problem.k, generator=generator, **more) * problem.k**-0.5
        self.weights = [first, *(first.clone() for _ in range(sets - 1))]
        self.x = [torch.randn(rows, problem.k, generator=generator, **more) for _ in range(2)]
        self.residual = torch.randn(rows, problem.n, generator=generator, **more) if problem.residual else None
        # Enough that what a graph's start costs does not show.
        self.launches = max(2 * sets, 2000 * 2**20 // (2 * problem.k * lines))
        self.launches = max(16, min(128, self.launches))
        self.eps = 1e-5 if problem.norm else None
        # Of all kernels: a graph knows its address and would not keep it alive.
        self.y = torch.empty(rows, problem.n, **more)

    def library(self, i: int) -> Tensor:
        weight = self.weights[i % len(self.weights)]
        name = ACTIVATIONS[self.problem.activation]
        return torch_norm_linear(self.x[0], weight, self.eps, None, self.residual, None if name == "none" else name)

    def kernel(self, variant: Variant) -> Callable[[int], Tensor] | None:
        function = linear.compiled(variant, self.problem, self.index)
        if function is None:
            return None
        k, n = self.problem.k, self.problem.n
        launch = linear.Launch(variant, self.problem, self.rows, (2 * k, 2 * k, 2 * n), self.eps or 0.0)
        start = launch.start(function, self.index)
        call = linear.Ready(None, None, [0], launch, start, self.index, False, ())
        call.seen[0] = 0

        def run(i: int) -> Tensor:
            weight = self.weights[i % len(self.weights)]
            call.seen[0] = linear.version_of(weight)  # nobody writes these weights
            linear.go(call, self.x[0], weight, self.y, None, self.residual)
            return self.y

        return run
