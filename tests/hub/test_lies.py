"""A Hub, or a proxy on the way, that answers with something else than what was asked for: not published, not recorded.

Each lie is told once, and then the run ends as if nothing had been; and for ever, and then it ends in one line.
"""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from hub_folds import SOURCE, TARGET, TOKEN, assert_published, files_of, save
from hub_server import HubServer
from zygote import Zygote

import flashnorm_cli
from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.folding.fold import fold

Headers = dict[str, str | None]
Lie = Callable[[int, Headers, bytes], tuple[int, Headers, bytes]]

HTML = b"<html><body>Please log in to the <b>network</b></body></html>"
HEADER, GAIN, SHARD = r"GET /blobs/.* bytes=0-", r"GET /blobs/.* bytes=[1-9]", r"^GET /blobs/.* whole"

SLOW = pytest.mark.slow  # up to minutes of waiting


@pytest.fixture(scope="module")
def zygote(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    more = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    more |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": TOKEN}
    path = str(Path(flashnorm_cli.__file__).parents[1])
    with Zygote(server.client_env(tmp_path_factory.mktemp("home"), PYTHONPATH=path, **more)) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def hub(server: HubServer, model: Path) -> HubServer:
    server.log.clear()
    server.faults.clear()
    server.repos.clear()
    server.add_user("me", TOKEN)
    server.add_repo(SOURCE, model)
    return server


@pytest.fixture
def run(zygote: Zygote, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """A command in an empty folder with an empty cache."""
    (tmp_path / "cwd").mkdir()

    def run(*arguments: object) -> tuple[int, str, str]:
        return zygote.run(*arguments, "--cache-dir", tmp_path / "cache", cwd=tmp_path / "cwd")

    return run


def blob_of(model: Path, name: str) -> bytes:
    return (model / name).read_bytes()


# ---- lies ------------------------------------------------------------------------------------------------------------


def head(status: int | None = None, **more: str | None) -> Lie:
    """Another status, and other headers (`_` for `-`)."""
    new = {name.replace("_", "-"): value for name, value in more.items()}
    return lambda was, headers, body: (status or was, {**headers, **new}, body)


def shifted(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    """An honest answer to another question: the range eight bytes further on."""
    first, rest = str(headers["Content-Range"]).removeprefix("bytes ").split("-")
    last, size = rest.split("/")
    return status, {**headers, "Content-Range": f"bytes {int(first) + 8}-{int(last) + 8}/{size}"}, body


def flipped(at: int) -> Lie:
    def lie(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        changed = bytearray(body)
        if changed:  # a HEAD has none
            changed[at] ^= 1
        return status, headers, bytes(changed)

    return lie


def zipped(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, {**headers, "Content-Encoding": "gzip"}, gzip.compress(body)


def page(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return 200, {"Content-Type": "text/html; charset=utf-8"}, HTML


def total(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, {**headers, "Content-Range": f"{str(headers['Content-Range']).split('/')[0]}/99999999"}, body


def cut(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, headers, body[:-2]


def longer(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    return status, headers, body + b"\0\0"


def bad_header(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
    """Still a header that holds together: two names have changed places with others of their length."""
    return status, headers, body.replace(b"q_proj", b"Q_proj")


RANGES = {
    "the whole file's status": head(200, Content_Range=None),
    "another range": shifted,
    "another total": total,
    "no Content-Range": head(Content_Range=None),
    "a Content-Range in other words": head(Content_Range="bytes */5"),
    "a shorter body": cut,
    "a longer body": longer,
    "gzip": zipped,
    "a page of HTML": page,
    "no content": lambda status, headers, body: (204, {}, b""),
}


@pytest.mark.parametrize("kind", [HEADER, GAIN])
def test_ranges_once(hub: HubServer, run: Callable, expected: dict[str, bytes], kind: str) -> None:
    """Each lie to another request of a run: asked again, and all is well."""
    lies = [hub.fail(kind, lie=lie, times=1) for lie in [*RANGES.values()][:: 1 if kind == GAIN else 3]]
    code, _, err = run("fold", SOURCE, "--push-to", TARGET, "--leave-grid")  # no ranges but headers and gains
    assert (code, err) == (0, "")
    assert [fault.times for fault in lies] == [0] * len(lies)
    assert_published(hub, expected)


@pytest.mark.parametrize("name", ["another range", "a longer body", "a page of HTML"])
def test_ranges_for_ever(hub: HubServer, run: Callable, tmp_path: Path, name: str) -> None:
    hub.fail(GAIN, lie=RANGES[name])
    code, out, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"flashnorm: {SOURCE}: the Hub ") and "bug" not in err
    assert TARGET not in hub.repos
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_whole_file_where_a_part_was_asked_for(hub: HubServer, run: Callable, model: Path) -> None:
    """As a proxy that does not know ranges answers: for a header it would even look right."""
    whole = {path.stat().st_size: path.read_bytes() for path in model.glob("*.safetensors")}

    def proxy(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        size = int(str(headers["Content-Range"]).rsplit("/", 1)[-1])
        return 200, {**headers, "Content-Range": None}, whole[size]

    hub.fail("GET /blobs/.* bytes=", lie=proxy)
    code, out, err = run("plan", SOURCE)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "answered 200 to a request for a part of model-0000" in err


BYTES = {
    "a gain": (GAIN, flipped(3)),
    "a header": (HEADER, bad_header),
    "a shard": (SHARD, flipped(500_001)),
    "a shard's header": (SHARD, flipped(300)),
}


@pytest.mark.parametrize("what", BYTES)
def test_bytes_that_change_on_the_way(
    hub: HubServer, run: Callable, expected: dict[str, bytes], tmp_path: Path, what: str
) -> None:
    pattern, lie = BYTES[what]
    fault = hub.fail(pattern, lie=lie, times=1)
    code, _, err = run("fold", SOURCE, "--push-to", TARGET, "--leave-grid")  # no ranges but headers and gains
    assert fault.times == 0
    if pattern == SHARD:  # its hash is known, so it is downloaded again
        assert (code, err) == (0, "")
    else:
        assert (code, err.count("\n")) == (1, 1) and "bug" not in err
        assert TARGET not in hub.repos or set(hub.files(TARGET)) == {".gitattributes"}
        assert run("fold", SOURCE, "--push-to", TARGET, "--leave-grid")[0] == 0
    assert_published(hub, expected)


def test_a_shard_that_never_comes_right(hub: HubServer, run: Callable) -> None:
    hub.fail(SHARD, lie=flipped(-1))
    code, out, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "what came is not the file that the Hub lists" in err
    assert set(hub.files(TARGET)) == {".gitattributes"}


def test_another_file_behind_the_redirect(hub: HubServer, run: Callable, model: Path) -> None:
    """Of the same size, with a header that holds together."""
    name = sorted(path.name for path in model.glob("*.safetensors"))[1]
    data = bytearray(blob_of(model, name))
    data[-2:] = b"\x12\x34"
    other = hub.store(name, bytes(data))

    def elsewhere(status: int, headers: Headers, body: bytes) -> tuple[int, Headers, bytes]:
        where = f"http://localhost:{hub.port}/blobs/{other.sha256}?filename={name}"
        return 302, {**headers, "Location": where}, b""

    hub.fail(f"(GET|HEAD) /{SOURCE}/resolve/.*/{name}", lie=elsewhere)
    code, out, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not the file that the Hub lists" in err or "is not what the Hub has sent of it before" in err
    code, out, err = run("fold", SOURCE, "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{name} is not the file that the Hub lists" in err
    assert {request.token for request in hub.log if request.host == "cdn"} == {None}


def test_another_commit(hub: HubServer, run: Callable) -> None:
    hub.fail(f"GET /{SOURCE}/resolve/.*safetensors bytes", lie=head(X_Repo_Commit="0" * 40))
    code, out, err = run("plan", SOURCE)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "of another commit" in err


def test_the_heads_copy_of_the_embedding(hub: HubServer, run: Callable, tmp_path: Path) -> None:
    """It comes by ranges, and is the same as in its own shard: else nothing is committed."""
    tied = save(tmp_path / "tied", tie_word_embeddings=True)
    shutil.rmtree(tied / "more")
    hub.add_repo(SOURCE, tied)
    local = files_of(fold(tied, tmp_path / "local").output)
    entry = next(
        (read_header(path), e)
        for path in sorted(tied.glob("*.safetensors"))
        for n, e in read_header(path).tensors.items()
        if n.endswith("embed_tokens.weight")
    )
    first = entry[0].data_start + entry[1].start
    fault = hub.fail(rf"GET /blobs/.* bytes={first}-", lie=flipped(1000), times=1)
    code, _, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, err.count("\n"), fault.times) == (1, 1, 0)
    assert "came with other bytes by ranges than in its shard" in err
    assert set(hub.files(TARGET)) == {".gitattributes"}
    code, _, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, err) == (0, "")
    shards = {name: data for name, data in local.items() if name.endswith(".safetensors")}
    assert {name: hub.files(TARGET)[name] for name in shards} == shards


# ---- small files, and files in the cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "more/notes.md", "README.md"])
def test_small_files(hub: HubServer, run: Callable, expected: dict[str, bytes], name: str) -> None:
    """A byte that flips in a config changes the model as surely as one in a shard."""
    pattern = rf"GET /{SOURCE}/resolve/.*{name.replace('/', '(/|%2F)')} whole"
    fault = hub.fail(pattern, lie=flipped(-3), times=1)
    code, _, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, err, fault.times) == (0, "", 0)
    assert_published(hub, expected)


def test_small_files_for_ever(hub: HubServer, run: Callable) -> None:
    hub.fail(rf"GET /{SOURCE}/resolve/.*/config.json", lie=flipped(10))
    code, out, err = run("plan", SOURCE)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "config.json is not the file that the Hub lists" in err


def test_a_page_instead_of_a_file(hub: HubServer, run: Callable) -> None:
    hub.fail(rf"GET /{SOURCE}/resolve/.*/config.json", lie=page)
    code, out, err = run("plan", SOURCE)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "bug" not in err


def test_what_is_recorded_was_read(hub: HubServer, run: Callable, tmp_path: Path, model: Path) -> None:
    """A fold into a folder: shards go through the cache, which names them by the hash that was meant."""
    fault = hub.fail(SHARD, lie=flipped(400_000), times=1)
    code, _, err = run("fold", SOURCE, "out")
    assert (code, err, fault.times) == (0, "", 0)
    source = json.loads((tmp_path / "cwd/out/flashnorm.json").read_text())["source_files"]
    local = json.loads(files_of(fold(model, tmp_path / "local").output)["flashnorm.json"])["source_files"]
    assert source == local
    # A cache that has gone bad since, without a network to mend it.
    path = next((tmp_path / "cache").glob("models--*/snapshots/*/model-00002*")).resolve()
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    code, _, err = run("fold", SOURCE, "again", "--local-files-only")
    assert (code, err.count("\n")) == (1, 1)
    assert "model-00002-of-00005.safetensors is not the file that the Hub lists" in err
    code, _, err = run("verify", "out", "--level", "weights", "--local-files-only")
    assert code != 0 and "is not the file that the Hub lists" in err
    code, _, err = run("fold", SOURCE, "again")  # it is downloaded once more
    assert (code, err) == (0, "")
    assert (tmp_path / "cwd/again/model-00002-of-00005.safetensors").read_bytes() == (
        tmp_path / "cwd/out/model-00002-of-00005.safetensors"
    ).read_bytes()


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["never", "-1", "nan", pytest.param("inf", marks=SLOW), "\u00b2", "1e-3", "date"])
def test_retry_after(hub: HubServer, run: Callable, value: str) -> None:
    value = formatdate(time.time() - 5, usegmt=True) if value == "date" else value
    again = {"Retry-After": value}
    faults = [hub.fail(p, status=503, times=1, headers=again) for p in (GAIN, "/tree/", "/paths-info/")]
    started = time.monotonic()
    code, _, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, err, [fault.times for fault in faults]) == (0, "", [0, 0, 0])
    assert time.monotonic() - started < (60 if value != "inf" else 250)


SILENT = {
    "whoami": "GET /api/whoami",
    "listing": "/tree/",
    "a small file": "resolve/.*/config.json",
    "a range": HEADER,
    "a shard": SHARD,
    "the commit": "POST .*/commit/",
}
SILENT_LONG = ("listing", "a small file", "a shard", "the commit")  # huggingface_hub asks for these again and again


@pytest.mark.parametrize("what", ["whoami", "a range", *(pytest.param(w, marks=SLOW) for w in SILENT_LONG)])
def test_a_server_that_never_answers(hub: HubServer, zygote: Zygote, tmp_path: Path, what: str) -> None:
    fault = hub.fail(SILENT[what], hold=True)
    started = time.monotonic()
    run = zygote.start("fold", SOURCE, "--push-to", TARGET, "--cache-dir", tmp_path / "cache", cwd=tmp_path)
    code = run.wait()
    fault.release.set()
    assert (code, run.err.count("\n")) == (1, 1)
    assert "did not answer in time" in run.err and "HF_HUB_DOWNLOAD_TIMEOUT" in run.err
    assert time.monotonic() - started < 90


@pytest.mark.parametrize("what", [pytest.param("listing", marks=SLOW), "a range", pytest.param("a shard", marks=SLOW)])
def test_a_server_that_drips(hub: HubServer, run: Callable, what: str) -> None:
    """Each byte within the time for a read, all of them in hours."""
    hub.fail(SILENT[what], piece=20, delay=0.5)
    started = time.monotonic()
    code, _, err = run("fold", SOURCE, "--push-to", TARGET)
    assert (code, err.count("\n")) == (1, 1)
    assert "too slow" in err
    assert time.monotonic() - started < 90


# ---- answers that are no JSON ----------------------------------------------------------------------------------------

API = {
    "the source": "GET /api/models/them",
    "listing": "/tree/",
    "hashes": "/paths-info/",
    "whoami": "GET /api/whoami",
    "the target": "GET /api/models/me",
    "creating": "POST /api/repos/create",
    "the card": "POST /api/validate-yaml",
    "the mode": "POST .*/preupload/",
    "the commit": "POST .*/commit/",
}
NO_JSON = {
    "page": page,
    "page with 502": lambda status, headers, body: (502, {"Content-Type": "text/html"}, HTML),
    "page as JSON": lambda status, headers, body: (200, headers, HTML),
    "cut": lambda status, headers, body: (200, headers, body[: len(body) // 2]),
    "null": lambda status, headers, body: (200, headers, b"null"),
    "a list": lambda status, headers, body: (200, headers, b"[1]"),
    "empty": lambda status, headers, body: (200, headers, b""),
    "an object": lambda status, headers, body: (200, headers, b'{"error": "\\u001b[31mno"}'),
}


@pytest.mark.parametrize("lie", [pytest.param("page", marks=SLOW), *[lie for lie in NO_JSON if lie != "page"]])
def test_no_json(hub: HubServer, run: Callable, expected: dict[str, bytes], tmp_path: Path, lie: str) -> None:
    """One line, whatever a page, a proxy or half an answer stands for; what is not needed is not missed."""
    asked = API if lie in ("page", "an object") else dict([*API.items()][:: 2 if lie == "cut" else 4])
    for what, pattern in asked.items():
        hub.faults.clear()
        hub.fail(pattern, lie=NO_JSON[lie])
        code, _, err = run("fold", SOURCE, "--push-to", TARGET)
        if code == 0:
            assert_published(hub, expected)
        else:
            assert (what, code, err.count("\n")) == (what, 1, 1), (what, err)
            assert "bug" not in err and "\x1b" not in err, (what, err)
            assert TARGET not in hub.repos or set(hub.files(TARGET)) == {".gitattributes"}
        hub.repos.pop(TARGET, None)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
