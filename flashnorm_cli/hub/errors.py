"""What can go wrong while publishing, in one line each that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from flashnorm_cli.errors import FlashNormError, UsageError

AGAIN = "what is uploaded stays uploaded: run the same command again later, and it goes on"
TOKENS = "https://huggingface.co/settings/tokens"


def status_of(error: BaseException | None) -> int | None:
    """The status that the Hub answered with, also where huggingface_hub or hf_xet wrapped it up."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        xet = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(error))
        if xet:
            return int(xet[1])
        error = error.__cause__
    return None


@contextmanager
def push_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub, hf_xet and the network raise into one line."""
    from huggingface_hub import errors

    try:
        yield
    except FlashNormError:
        raise
    except errors.OfflineModeIsEnabled:
        raise FlashNormError("the network is off (HF_HUB_OFFLINE is set): unset it to publish") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id}: the Hub does not take this name ({' '.join(str(error).split())})") from None
    except Exception as error:
        status = status_of(error)
        if status is not None:
            raise FlashNormError(f"{repo_id}: {_answer(status, error)}") from None
        if not isinstance(error, (OSError, RuntimeError)) and not _network(error):
            raise
        raise FlashNormError(f"{repo_id}: {_no_answer(error)}") from None


def _network(error: BaseException) -> bool:
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "hf_xet"))


def _answer(status: int, error: BaseException) -> str:
    said = _said(error)
    words = f": {said}" if said else ""
    if status == 401:
        return f"the Hub does not accept the token{words}; log in again with `hf auth login`, or pass another --token"
    if status == 403:
        return (
            f"the Hub forbids it{words}. The token needs the role `write` and the right to that namespace ({TOKENS}); "
            "--create-pr proposes the files to a repository of somebody else"
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


def _said(error: BaseException | None) -> str:
    """The Hub's own words, from wherever they are in the chain."""
    while error is not None:
        if message := getattr(error, "server_message", None):
            return str(message).splitlines()[0].rstrip(".")
        error = error.__cause__
    return ""


def _no_answer(error: BaseException) -> str:
    while error.__cause__ is not None and not (isinstance(error, OSError) and error.filename):
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the Hub could not be reached: {lines[0] if lines else type(error).__name__}; {AGAIN}"
