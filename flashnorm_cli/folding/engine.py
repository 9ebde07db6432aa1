"""What the jobs of a fold run on: this process, its threads, a dask cluster, or any concurrent.futures executor."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.errors import FlashNormError

DISTRIBUTION = "flashnorm-cli"
Job = TypeVar("Job")
Result = TypeVar("Result")

# Seconds: for the scheduler to answer, for the first worker to join, for lost workers to come back; between looks.
CONNECT, JOIN, COME_BACK, LOOK = 15, 60, 120, 2.0


class Stopped(Exception):
    """A job gave up because another one has failed."""


@dataclass(frozen=True)
class Engine:
    """An executor, and what it can take.

    Attributes:
        executor: runs the jobs.
        threads: per job, if the user does not say.
        at_once: how many jobs it takes now; None if it keeps a queue by itself.
        in_process: whether jobs see this process's memory, so that they can report and be stopped.
        check: called now and then while nothing finishes; raises FlashNormError if nothing ever will.
    """

    executor: Executor
    threads: int
    at_once: Callable[[], int] | None = None
    in_process: bool = False
    check: Callable[[], None] = lambda: None


class _InTurn(Executor):
    """Runs each job at once, in the calling thread: one shard after another, all threads on the ranges of one."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Threads(Executor):
    """A thread per job. They do not keep the process alive after Ctrl-C, as those of ThreadPoolExecutor would."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def processors() -> int:
    return min(os.cpu_count() or 1, 8)


def in_turn() -> Engine:
    """One job after another in this process."""
    return Engine(_InTurn(), processors(), lambda: 1, in_process=True)


def overlapping(at_once: int) -> Engine:
    """So many jobs at a time in threads of this process, for those that mostly wait."""
    return Engine(_Threads(), processors(), lambda: at_once, in_process=True)


def any_executor(executor: Executor) -> Engine:
    """An executor of the caller's, whose workers share the file system."""
    return Engine(executor, threads=1)


def results(
    engine: Engine,
    do: Callable[..., Result],
    jobs: Iterable[Job],
    arguments: Callable[[Job], tuple[Any, ...]],
    on_error: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Job, Result]]:
    """Run `do(job, *arguments(job))` for all jobs; yields each job with its result as it finishes.

    After an error, `on_error` is called and no further job is begun. Those that run already are still waited for and
    yielded, so that their work is not lost; then the first error is raised, in words that a user can act on where
    that is possible.
    """
    waiting, running = deque(jobs), dict[Future[Any], Job]()
    error: BaseException | None = None
    try:
        while running or (waiting and error is None):
            while waiting and error is None and (engine.at_once is None or len(running) < engine.at_once()):
                job = waiting.popleft()
                running[engine.executor.submit(do, job, *arguments(job))] = job
            done, _ = wait(running, LOOK, FIRST_COMPLETED)
            if not done:
                engine.check()
            while done:
                future = done.pop()
                job = running.pop(future)
                failure = CancelledError() if future.cancelled() else future.exception()
                if failure is None:
                    result = future.result()
                    del future
                    if not engine.in_process:
                        # dask's futures are in reference cycles; while they live, the scheduler would compute the
                        # results of a worker that dies once more, though they have been fetched.
                        gc.collect()
                    yield job, result
                elif error is None and not isinstance(failure, Stopped):
                    error = _explained(failure)
                    on_error()
                    for other in running if engine.at_once is None else ():
                        other.cancel()
    finally:
        for future in running:
            future.cancel()
    if error is not None:
        raise error


def _explained(error: BaseException) -> BaseException:
    """What a user can do about a job that did not come back; other errors as they are."""
    if isinstance(error, FlashNormError):
        return error
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, ModuleNotFoundError):
            return FlashNormError(
                f"a worker or the scheduler cannot import {link.name}: all of them need the same Python packages as "
                "this command, flashnorm-cli among them"
            )
        link = link.__cause__ or link.__context__
    if type(error).__name__ == "KilledWorker" or isinstance(error, BrokenExecutor):
        return FlashNormError(
            "worker processes died again and again while they folded a shard (killed for their memory?); run the same "
            "command again to go on"
        )
    if isinstance(error, OSError):
        return FlashNormError(
            f"a worker could not be reached: {_first_line(error)}; run the same command again to go on"
        )
    if isinstance(error, CancelledError):
        return FlashNormError("the executor gave its jobs up; run the same command again to go on")
    return error


# ---- dask ------------------------------------------------------------------------------------------------------------


@contextmanager
def dask_engine(address: str, report: Progress) -> Iterator[Engine]:
    """The workers of a running dask scheduler, as many jobs at a time as they have threads, one thread per job.

    A job whose worker dies is given to another one by dask. Raises FlashNormError if the scheduler cannot be reached
    or has no workers, or if either is lost for good.
    """
    try:
        import distributed
    except ImportError:
        raise FlashNormError("`dask` needs dask: pip install 'flashnorm-cli[cluster]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its errors arrive here as exceptions
    report(0, 0, f"Connecting to {address}")
    try:
        client = distributed.Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise FlashNormError(f"{address}: no dask scheduler could be reached there: {_first_line(error)}") from None
    threads, looked, seen = 0, 0.0, time.monotonic()

    def at_once() -> int:
        """The cluster's threads; workers may come and go."""
        nonlocal threads, looked, seen
        if time.monotonic() - looked > LOOK or not threads:
            threads, looked = sum(client.nthreads().values()), time.monotonic()
        if threads:
            seen = time.monotonic()
        return threads

    def check() -> None:
        try:
            alive = client.status == "running" and (at_once() or time.monotonic() - seen < COME_BACK)
        except OSError:
            alive = False
        if not alive:
            raise FlashNormError(f"{address}: the scheduler or all of its workers are gone; run the same command again")

    try:
        report(0, 0, "Waiting for dask workers")
        try:
            client.wait_for_workers(1, timeout=JOIN)
        except (OSError, TimeoutError):
            raise FlashNormError(
                f"{address}: no worker has joined this scheduler; start some: dask worker {address}"
            ) from None
        try:
            _check_workers(client.run(metadata.version, DISTRIBUTION, on_error="return"))
        except (OSError, TimeoutError) as error:
            raise FlashNormError(f"{address}: its workers do not answer: {_first_line(error)}") from None
        yield Engine(client.get_executor(pure=False), 1, at_once, check=check)
    finally:
        with suppress(OSError, TimeoutError):
            client.close(timeout=LOOK)


def _check_workers(versions: dict[str, Any]) -> None:
    """Raises FlashNormError unless all workers have this very version: one without would die of its first job."""
    for worker, version in versions.items():
        if isinstance(version, OSError):  # it does not answer now; each job looks at the version, too
            continue
        if version != __version__:
            has = f"has {DISTRIBUTION} {version}" if isinstance(version, str) else f"does not have {DISTRIBUTION}"
            raise FlashNormError(f"the worker {worker} {has}: install version {__version__} on every worker")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
