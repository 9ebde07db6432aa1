"""Time on the GPU and on the host, so that contenders compare: same buffers, same minute, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

Call = Callable[[int], object]  # runs a contender once, on the buffers of that number


def spread(values: list[float], digits: int) -> tuple[float, float]:
    """10th and 90th percentile, never outside what was measured (`statistics.quantiles` extrapolates by default)."""
    if len(values) < 2:
        return round(values[0], digits), round(values[0], digits)
    tenths = quantiles(values, n=10, method="inclusive")
    return round(tenths[0], digits), round(tenths[-1], digits)


def graph_times(
    contenders: dict[str, Call], sets: int, launches: int, trials: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Device time per call, from replays of CUDA graphs that hold `launches` calls each.

    A graph leaves out what a call costs on the host. Contenders take turns, a replay each, so that clocks and
    neighbours trouble all alike. A graph goes through the buffer sets in order.

    Args:
        contenders: by name.
        sets: how many buffer sets there are.
        launches: calls in a graph.
        trials: replays of each graph that are timed.
    Returns:
        Microseconds per call, one per trial, by name; and for contenders that cannot be captured, the error.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    failed: dict[str, str] = {}
    for name, call in contenders.items():
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles what has to be compiled
                for i in range(3):
                    call(i % sets)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(launches):
                    call(i % sets)
            graph.replay()
            torch.cuda.synchronize()
            graphs[name] = graph
        except Exception as error:  # contenders are other people's code
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    marks = {
        name: [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(trials)]
        for name in graphs
    }
    order = list(graphs)
    for trial in range(trials):
        for name in order[trial % len(order) :] + order[: trial % len(order)]:  # nobody always follows the same one
            start, end = marks[name][trial]
            start.record()
            graphs[name].replay()
            end.record()
        torch.cuda.synchronize()
    for name, pairs in marks.items():
        times[name] = [start.elapsed_time(end) * 1000 / launches for start, end in pairs]
    return times, failed


def host_times(
    contenders: dict[str, Call], calls: int = 200, trials: int = 15, seconds: float | None = None
) -> dict[str, float]:
    """Microseconds of host time per call: the median over turns of the mean of `calls` calls, none of which waits.

    After `seconds` no turn is begun, but the first that counts.
    """
    over = time.perf_counter() + (seconds or float("inf"))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders.items())
    for trial in range(-1, trials):  # the first turn warms up
        if trial > 0 and time.perf_counter() > over:
            break
        for name, call in order[trial % len(order) :] + order[: trial % len(order)]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call(0)
            if trial >= 0:
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: median(each) for name, each in times.items()}
