"""What can go wrong between here and the Hub: which trouble passes, what is tried again, and one line for the rest."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from flashnorm_cli.checkpoint.hub_client import BadAnswer, limit_requests, seconds_of
from flashnorm_cli.errors import FlashNormError, UsageError

# Statuses of a Hub that is busy; seconds before a request is made again, and before a transfer is, after
# huggingface_hub has given up on it.
RETRY_STATUS = (429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0)
TRANSFER_WAITS = (2.0, 8.0)
AGAIN = "what is uploaded stays uploaded: run the same command again later, and it goes on"
NETWORK_OFF = "the network is off (HF_HUB_OFFLINE is set): unset it to publish"
TOKENS = "https://huggingface.co/settings/tokens"
LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "hf_xet")
INCONSISTENT = "Consistency check failed"  # of huggingface_hub, for a download of another size than the file has
SHOWN = 300  # characters of what the Hub says
T = TypeVar("T")


# ---- trouble that passes ---------------------------------------------------------------------------------------------


def with_retry(
    call: Callable[[], T], waits: Sequence[float] = WAITS, transient: Callable[[BaseException], bool] | None = None
) -> T:
    """Do it, and again where the trouble may pass; `waits` are the seconds before each further try.

    `transient` tells such trouble from other errors; by default `is_transient`. Raises the last error as it is.
    """
    limit_requests()
    for wait in waits:
        try:
            return call()
        except Exception as error:  # which errors these are, `transient` says
            if not (transient or is_transient)(error):
                raise
            time.sleep(wait_after(error, wait))
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether the Hub was busy, a connection broke, or an answer was not what was asked for."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (FlashNormError, OfflineModeIsEnabled)) or is_disk_error(error) or _unreachable(error):
        return False
    status = status_of(error)
    if status is not None:
        return status in RETRY_STATUS
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:  # the network was the first choice
        return is_transient(error.__cause__)
    # RuntimeError: of hf_xet, and of a client that was closed because another thread could not connect.
    return any(isinstance(e, (OSError, RuntimeError)) or _of_a_library(e) for e in _chain(error))


def is_bad_answer(error: BaseException) -> bool:
    """Whether the Hub did answer, with something else than what was asked for, or another number of bytes."""
    return isinstance(error, BadAnswer) or (isinstance(error, OSError) and INCONSISTENT in str(error))


def is_disk_error(error: BaseException) -> bool:
    """Whether it is the disk's: those of the network have no number, or are of their own classes."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    )


def _unreachable(error: BaseException) -> bool:
    """Nobody answers at that address: waiting for seconds is of no use."""
    return type(error).__name__ == "ConnectError"


def wait_after(error: BaseException, otherwise: float) -> float:
    """How many seconds to wait: what the Hub says, where it says so."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = seconds_of(headers["Retry-After"]) if "Retry-After" in headers else None
    return otherwise if seconds is None else seconds


def status_of(error: BaseException | None) -> int | None:
    """The status that the Hub answered with, also where huggingface_hub or hf_xet wrapped it up."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return int(response.status_code)
        xet = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(link))
        if xet:
            return int(xet[1])
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _of_a_library(error: BaseException) -> bool:
    return type(error).__module__.startswith(LIBRARIES)


# ---- one line --------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(name: str, writing: bool = False, disk: bool = True) -> Iterator[None]:
    """Turn what huggingface_hub, hf_xet and the network raise into one line that says what to do.

    Args:
        name: the repository or file, which begins the line.
        writing: whether something is being published, or an existing checkpoint is being read.
        disk: whether errors of the disk get their words here; otherwise they go on as they are.
    Raises:
        UsageError: the Hub does not take the name. FlashNormError: all else.
    """
    from huggingface_hub import errors

    limit_requests()
    try:
        yield
    except FlashNormError:
        raise
    except errors.HFValidationError as error:
        no_name = "the Hub does not take this name" if writing else "no folder here, and not a Hub id"
        raise UsageError(f"{name}: {no_name}: {first_line(error)}") from None
    except Exception as error:  # whose they are is asked one by one; those of nobody here go on as they are
        why = (_why_not_written if writing else _why_not_read)(error) if disk or not is_disk_error(error) else None
        if why is None:
            raise
        if why == NETWORK_OFF:
            raise FlashNormError(why) from None
        raise FlashNormError(f"{name}: {why}") from error


def _why_not_read(error: Exception) -> str | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is gated; accept its terms on the Hub and pass `token`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "neither a local folder nor a repository on the Hub (a private one needs `token`)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        # Not in the cache: either the network was not to be used, or it failed and the cache was the way out.
        cause = error.__cause__
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled) or not isinstance(cause, Exception):
            return "is not in the Hub cache as a whole, and the network is off"
        return _why_not_read(cause)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "is not in the Hub cache as a whole, and the network is off"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return first_line(str(error).splitlines()[-1:])
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept the token"
    if status is not None:
        words = _said(error) or getattr(getattr(error, "response", None), "reason_phrase", "")
        later = "; try again later" if status == 429 or status >= 500 else ""
        return f"the Hub answered {status}{': ' if words else ''}{first_line(words)}{later}"
    if isinstance(error, OSError) and error.filename:
        return f"the Hub cache: {error.strerror}: {error.filename}"
    return _no_answer(error, "no such folder here, and the Hub could not be reached", "try again later")


def _why_not_written(error: Exception) -> str | None:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return NETWORK_OFF
    status = status_of(error)
    if status is not None:
        return _refusal(status, first_line(_said(error)).rstrip("."))
    for link in _chain(error):
        if isinstance(link, OSError) and link.filename:
            return f"{link.strerror}: {link.filename}"
    return _no_answer(error, "the Hub could not be reached", AGAIN)


def _refusal(status: int, message: str) -> str:
    words = f": {message}" if message else ""
    if status == 401:
        return f"the Hub does not accept the token{words}; log in again with `hf auth login`, or pass another `token`"
    if status == 403:
        return (
            f"the Hub forbids it{words}. The token needs the role `write` and the right to that namespace ({TOKENS}); "
            "`create_pr=True` proposes the files to a repository of somebody else"
        )
    if status == 404:
        return f"the Hub does not find it{words}; is the name right, and may this token see it?"
    if status == 409:
        return f"the Hub reports a conflict{words}; run the same command again"
    if status == 429:
        return f"the Hub takes no more requests for now{words}; {AGAIN}"
    if status >= 500:
        return f"the Hub has trouble, it answered {status}{words}; {AGAIN}"
    return f"the Hub answered {status}{words}"


def _no_answer(error: Exception, unreachable: str, later: str) -> str | None:
    """Words for trouble without a status; None where the error is not one of the Hub's, the network's or the disk's."""
    chain = list(_chain(error))
    if bad := next((link for link in chain if isinstance(link, BadAnswer)), None):
        return f"the Hub {first_line(bad)}; {later}"
    if is_bad_answer(error):
        return f"the Hub sent another number of bytes than it lists: {first_line(error)}; {later}"
    if slow := next((link for link in chain if "Timeout" in type(link).__name__), None):
        return (
            f"the Hub did not answer in time ({type(slow).__name__}; HF_HUB_DOWNLOAD_TIMEOUT sets the seconds); {later}"
        )
    if isinstance(error, (OSError, RuntimeError)) or any(map(_of_a_library, chain)):
        why = first_line(str(chain[-1]).strip().splitlines()[:1]) or type(chain[-1]).__name__
        return f"{unreachable}: {why}" + (f"; {later}" if later == AGAIN else "")
    if _in_huggingface_hub(error):
        what = f"{type(error).__name__}: {first_line(error)}"
        return f"the Hub answered with something that cannot be read ({what}); {later}"
    return None


def _in_huggingface_hub(error: BaseException) -> bool:
    """Whether huggingface_hub stumbled over an answer: JSON that is broken, or lacks what it looks for.

    A mistake of ours in what it was given would look the same; there is no class of error to tell them apart by.
    """
    if not isinstance(error, (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError)):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((i for i, name in enumerate(files) if "flashnorm_cli" in name), default=-1)
    return any("huggingface_hub" in name for name in files[ours + 1 :])


def _said(error: BaseException) -> str:
    """The Hub's own words, from wherever they are in the chain."""
    return next((str(words) for link in _chain(error) if (words := getattr(link, "server_message", None))), "")


def first_line(text: object) -> str:
    """The first line of what somebody else has written, as far as it can be printed, and not too long."""
    if isinstance(text, list):
        text = "".join(text)
    line = next((line.strip() for line in str(text).splitlines() if line.strip()), "")
    line = "".join(c if c.isprintable() else " " for c in line)
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
