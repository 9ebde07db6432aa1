"""Checkpoints on the Hub: their headers by ranged requests, and the Hub's errors in one line."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from flashnorm_cli.checkpoint.header import LENGTH_BYTES, Header, header_size, parse_header
from flashnorm_cli.checkpoint.model import Progress, Source
from flashnorm_cli.errors import FlashNormError, UsageError

# Enough for most headers, so that a Hub shard costs one request.
FIRST_BYTES = 1 << 18


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise FlashNormError(f"{name}: is gated; accept its terms on the Hub and pass --token") from None
    except errors.RevisionNotFoundError:
        raise FlashNormError(f"{name}: has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise FlashNormError(
            f"{name}: neither a local folder nor a repository on the Hub (a private one needs --token)"
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: no folder here, and not a Hub id: {error}") from None
    except errors.LocalEntryNotFoundError as error:
        # Not in the cache: either the network was not to be used, or it failed and the cache was the way out.
        if error.__cause__ is None or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise FlashNormError(f"{name}: is not in the Hub cache as a whole, and the network is off") from None
        raise FlashNormError(f"{name}: {_why(error.__cause__)}") from None
    except errors.RemoteEntryNotFoundError as error:
        raise FlashNormError(f"{name}: {str(error).splitlines()[-1]}") from None
    except OSError as error:  # of the Hub, of the network, or of the disk that the cache is on
        raise FlashNormError(f"{name}: {_why(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise FlashNormError(f"{name}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """What went wrong between here and the Hub, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token"
        said = (error.server_message or error.response.reason_phrase).splitlines()[0]
        return f"the Hub answered {status}: {said}" + ("; try again later" if status == 429 or status >= 500 else "")
    if isinstance(error, OSError) and error.filename:
        return f"the Hub cache: {error.strerror}: {error.filename}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"no such folder here, and the Hub could not be reached: {lines[0] if lines else type(error).__name__}"


def progress_bar(what: str, report: Progress | None) -> type[Any]:
    """A progress bar class for huggingface_hub that hands bytes on to `report` and draws nothing."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"  # the other ones count files
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if report and self.counts_bytes:
                report(int(self.n), int(self.total or 0), what)

    return Bar


def hub_reader(
    repo_id: str, commit: str, token: str | bool | None, endpoint: str | None = None
) -> Callable[[str, int, int], bytes]:
    """A function that reads the bytes [start, end) of a file in a Hub repository."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    # Not HfFileSystem: it lists the repository again in each thread, and knows no ids without a user ("gpt2").
    headers = build_hf_headers(token=token)

    def read(name: str, start: int, end: int) -> bytes:
        url = hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint)
        wanted = {**headers, "Range": f"bytes={start}-{end - 1}"}
        answer = http_backoff("GET", url, headers=wanted, timeout=HF_HUB_DOWNLOAD_TIMEOUT, max_retries=3)
        hf_raise_for_status(answer)
        return answer.content[: end - start]

    return read


class RemoteFile(io.RawIOBase):
    """A file on the Hub for a parser that reads its beginning or its end: in blocks, and a few at most."""

    BLOCK, MOST = 1 << 18, 64

    def __init__(self, read: Callable[[str, int, int], bytes], name: str, size: int) -> None:
        self._read, self._path, self._size = read, name, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes. Raises ValueError beyond the most blocks: such a file tells nothing cheaply."""
        end = self._size if n < 0 else min(self._position + n, self._size)
        data = b""
        while self._position < end:
            number, start = divmod(self._position, self.BLOCK)
            if number not in self._blocks:
                if len(self._blocks) == self.MOST:
                    raise ValueError(f"{self._path}: takes more than {self.MOST} requests to look into")
                first = number * self.BLOCK
                self._blocks[number] = self._read(self._path, first, min(first + self.BLOCK, self._size))
            piece = self._blocks[number][start : start + end - self._position]
            if not piece:
                break
            data += piece
            self._position += len(piece)
        return data


def hub_headers(source: Source, commit: str, sizes: dict[str, int]) -> dict[str, Header]:
    """The shards' headers, by ranged requests: one for each shard, or two where its header is long."""
    read = hub_reader(source.name, commit, source.token)

    def header(name: str) -> Header:
        where, size = f"{source.name}/{name}", sizes[name]
        start = read(name, 0, min(FIRST_BYTES, size)) if size else b""
        need = header_size(start[:LENGTH_BYTES], size, where)
        if need > len(start):
            start += read(name, len(start), need)
        return parse_header(start[:need], size, where)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(sizes, pool.map(header, sizes), strict=True))
