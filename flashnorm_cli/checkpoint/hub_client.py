"""Limits of every request that huggingface_hub makes: none waits for ever, whatever the other side does.

huggingface_hub gives most of its requests no time limit, sleeps for as long as a `Retry-After` says, and reads JSON out
of whatever comes. Its client is therefore given two hooks, which see each request and each answer:

- Connecting, and every read and write of a file's bytes, may take `HF_HUB_DOWNLOAD_TIMEOUT` seconds (10 by default, a
  setting of huggingface_hub's own); an answer of the Hub's API three times, one to a change twelve times as long.
- A body has to bring 1 KiB a second, counted over six times that span: a server that drips is given up.
- A `Retry-After` that is not a number of seconds is dropped, and none is longer than a minute.
- HTML where the API answers in JSON is an error.

This is the one module that touches how huggingface_hub makes its client.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, MutableMapping
from email.utils import parsedate_to_datetime
from typing import Any

# In units of HF_HUB_DOWNLOAD_TIMEOUT: the API's answers, answers to what changes something, the span of a slow body.
API, CHANGES, SLOW = 3, 12, 6
SLOWEST = 1024  # bytes per second
LONGEST_WAIT = 60.0  # seconds that a Retry-After may ask for


class BadAnswer(ConnectionError):
    """The Hub, or something on the way, has answered with what was not asked for. Asking once more may help."""


def limit_requests() -> None:
    """Give the client of huggingface_hub its limits, once per process; a factory that the caller has set stays."""
    from huggingface_hub.utils import _http

    made = _http._GLOBAL_CLIENT_FACTORY
    if getattr(made, "flashnorm", False):
        return

    def limited() -> Any:
        client = made()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", ()), _set_timeout],
            "response": [*hooks.get("response", ()), _check_answer],
        }
        return client

    limited.flashnorm = True  # type: ignore[attr-defined]
    _http.set_client_factory(limited)


def timeout() -> float:
    """Seconds for a connection, or for the next bytes of a file."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _set_timeout(request: Any) -> None:
    """Limits where huggingface_hub has set none."""
    given = request.extensions.get("timeout") or {}
    step = timeout()
    read = step if "/api/" not in request.url.path else API * step
    read = read if request.method in ("GET", "HEAD") else CHANGES * step
    plain = {"connect": step, "read": read, "write": read, "pool": CHANGES * step}
    request.extensions["timeout"] = {key: plain[key] if given.get(key) is None else given[key] for key in plain}


def _check_answer(answer: Any) -> None:
    _tame(answer.headers)
    kind = answer.headers.get("Content-Type", "")
    if answer.status_code == 200 and answer.request.url.path.startswith("/api/") and "html" in kind.lower():
        raise BadAnswer("answered with a page of HTML where JSON was asked for (a proxy or a login page on the way?)")
    answer.stream = _paced(answer.stream)


def _paced(body: Any) -> Any:
    """A body that is given up where it comes too slowly; only time that is spent waiting for it counts."""
    # httpx and httpx2 take nothing but their own class of streams, and both are in use.
    stream: Any = next(cls for cls in type(body).__mro__ if cls.__name__ == "SyncByteStream")

    class Paced(stream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            waited, came, span, parts = 0.0, 0, SLOW * timeout(), iter(body)
            while True:
                started = time.monotonic()
                part = next(parts, None)
                waited += time.monotonic() - started
                if part is None:
                    return
                came += len(part)
                if waited >= span:
                    if came < SLOWEST * waited:
                        raise BadAnswer(f"sent {came:,} bytes in {waited:.0f} seconds, which is too slow to go on")
                    waited, came = 0.0, 0
                yield part

        def close(self) -> None:
            body.close()

    return Paced()


def _tame(headers: MutableMapping[str, str]) -> None:
    """Headers that huggingface_hub would sleep by: numbers of seconds, and not for ever."""
    if "Retry-After" in headers:
        seconds = seconds_of(headers["Retry-After"])
        if seconds is None:
            del headers["Retry-After"]
        else:
            headers["Retry-After"] = str(math.ceil(seconds))
    if "ratelimit" in headers:
        longest = int(LONGEST_WAIT)
        headers["ratelimit"] = re.sub(
            r"t=(\d+)", lambda m: f"t={longest if len(m[1]) > 4 else min(int(m[1]), longest)}", headers["ratelimit"]
        )


def seconds_of(retry_after: str) -> float | None:
    """The seconds that a Retry-After asks for, a minute at most; None where it is neither a number nor a date."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
        return min(max(seconds, 0.0), LONGEST_WAIT)
    return min(seconds, LONGEST_WAIT) if seconds >= 0 else None
