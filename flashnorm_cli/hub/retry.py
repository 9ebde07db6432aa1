"""Waiting for the Hub: requests that are asked again, and how far an upload has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.engine import Stopped
from flashnorm_cli.hub.errors import push_errors, status_of

# A request that the Hub could not answer is asked again; the waits are seconds.
RETRY_STATUS = (429, 500, 502, 503, 504)
WAITS = (1, 2, 4)
LONGEST_WAIT = 60
T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """Ask again where the Hub was busy, or the connection broke; huggingface_hub does so for some requests only."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            status = status_of(error)
            broken = status is None and type(error).__module__.startswith(("httpx", "httpcore"))
            if wait is None or not (status in RETRY_STATUS or broken) or _unreachable(error):
                raise
            time.sleep(wait_after(error, wait))
    raise AssertionError  # the last turn returns or raises


def _unreachable(error: BaseException) -> bool:
    """Nobody answers at that address: waiting for seconds is of no use."""
    return type(error).__name__ == "ConnectError"


def wait_after(error: BaseException, otherwise: float) -> float:
    """How many seconds to wait: what the Hub says, where it says so."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return min(float(headers["Retry-After"]), LONGEST_WAIT)
    except (KeyError, ValueError):
        return otherwise


@contextmanager
def quiet_hub() -> Iterator[None]:
    """huggingface_hub draws no bars of its own: the command has one."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def watched(path: Path | None, size: int, report: Callable[[int], None]) -> Iterator[None]:
    """Report how far a file has been read while it is uploaded (no path: nothing to see).

    The upload runs in huggingface_hub and hf_xet, which tell nobody; but Linux knows how far each open file was read.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            if (position := _read_so_far(path)) is not None:
                report(min(position, size))

    thread = threading.Thread(target=watch, daemon=True)
    if path is not None:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _read_so_far(path: Path | None) -> int | None:
    """The position of this process in a file that it has open."""
    target = str(path.resolve()) if path else ""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()) == target:
                line = Path("/proc/self/fdinfo", link.name).read_text().splitlines()[0]
                return int(line.split()[1])
        except (OSError, ValueError, IndexError):  # closed meanwhile
            continue
    return None


# Seconds before a transfer is tried again, after huggingface_hub has given up on it.
LASTING_WAITS = (2.0, 8.0)


def persistently(what: str, transfer: Callable[[], T]) -> T:
    """Do it, and again if the trouble may pass. Raises FlashNormError; errors of the disk as they are."""
    for wait in (*LASTING_WAITS, None):
        try:
            return transfer()
        except (FlashNormError, Stopped):
            raise
        except Exception as error:
            if wait is None or not _may_pass(error):
                if _of_the_disk(error):
                    raise
                with push_errors(what):
                    raise
            time.sleep(wait_after(error, wait))
    raise AssertionError  # the last turn returns or raises


def _may_pass(error: Exception) -> bool:
    """Whether the Hub was busy, or the connection broke; whatever hf_xet raises is one of them."""
    status = status_of(error)
    if status is not None:
        return status in RETRY_STATUS
    if _of_the_disk(error):
        return False
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # RuntimeError: of hf_xet, and of a client that was closed because another thread could not connect.
    return any(isinstance(e, (OSError, RuntimeError)) or type(e).__module__.startswith("http") for e in chain)


def _of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
