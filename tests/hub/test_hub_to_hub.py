"""From Hub to Hub over real HTTP (tests/support/hub_server.py): the same bytes as a local fold, whatever goes wrong.

All runs are forked from one process that has imported everything (tests/support/zygote.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documents import document
from hub_folds import SOURCE, TARGET, TOKEN, assert_published, downloaded, files_of, save, shards_of
from hub_server import Fault, HubServer
from transformers import LlamaConfig, LlamaForCausalLM
from zygote import Run, Zygote

import flashnorm_cli
from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.hub import FIRST_BYTES
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.tensors import read_tensors
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.hub.shard_job import _bytes_in
from flashnorm_cli.plan.grid import KINDS, ROWS
from flashnorm_cli.plan.planner import make_plan
from flashnorm_cli.proof.shards import check_shard, shard_plan


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("server")) as server:
        server.add_user("me", TOKEN)
        server.add_user("other", "hf_other")
        server.add_repo(SOURCE, model)
        yield server


@pytest.fixture(scope="module")
def zygote(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    more = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    path = str(Path(flashnorm_cli.__file__).parents[1])
    with Zygote(server.client_env(tmp_path_factory.mktemp("home"), PYTHONPATH=path, **more)) as zygote:
        yield zygote


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The server as if it were new, but for the source."""
    yield server
    server.log.clear()
    server.faults.clear()
    for repo_id in set(server.repos) - {SOURCE}:
        del server.repos[repo_id]
    source = server.repos[SOURCE]
    kept = {blob.sha256 for blob in source.commits[source.refs["main"]].values()}
    for path in (server.root / "blobs").iterdir():
        if path.name not in kept:
            path.unlink()
    shutil.rmtree(server.root / "xet", ignore_errors=True)


class Client:
    """Runs the command in an empty folder with an empty cache; after each, no token may have been shown or kept."""

    def __init__(self, zygote: Zygote, tmp_path: Path) -> None:
        self.zygote, self.cwd, self.cache = zygote, tmp_path / "cwd", tmp_path / "cache"
        self.cwd.mkdir()

    def start(self, *arguments: object, source: str = SOURCE, target: str = TARGET, token: str = TOKEN) -> Run:
        more = ("--cache-dir", self.cache, *(("--token", token) if token else ()))
        return self.zygote.start("fold", source, "--push-to", target, *more, *arguments, cwd=self.cwd)

    def finish(self, run: Run) -> tuple[int, str, str]:
        code = run.wait()
        for path in [path for path in self.cwd.rglob("*") if path.is_file() and path.suffix != ".safetensors"]:
            assert b"hf_" not in path.read_bytes().replace(b"hf_quantizer", b"")
        assert TOKEN not in run.out + run.err
        return code, run.out, run.err

    def __call__(self, *arguments: object, **more: str) -> tuple[int, str, str]:
        return self.finish(self.start(*arguments, **more))

    def succeeds(self, *arguments: object, **more: str) -> dict[str, object]:
        code, out, err = self(*arguments, "--json", **more)
        assert (code, err) == (0, "")
        assert list(self.cwd.iterdir()) == []
        return document(out)

    def fails(self, words: str, *arguments: object, code: int = 1, **more: str) -> None:
        """One line on stderr."""
        result = self(*arguments, **more)
        assert result == (code, "", f"flashnorm: {words}\n")


@pytest.fixture
def client(zygote: Zygote, tmp_path: Path) -> Client:
    return Client(zygote, tmp_path)


def assert_nothing_visible(hub: HubServer) -> None:
    if TARGET in hub.repos:
        assert set(hub.files(TARGET)) == {".gitattributes"}


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_same_bytes_as_the_local_fold(
    hub: HubServer, client: Client, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    result = client.succeeds("--private", "--commit-message", "Folded")
    assert_published(hub, expected)
    repo = hub.repos[TARGET]
    assert (repo.private, len(repo.history), repo.history[-1][2]) == (True, 2, "Folded")  # the first one made it
    # Each byte once; headers and norms by ranges; nothing that is no part of the model.
    sizes = {path.name: path.stat().st_size for path in model.glob("model-*.safetensors")}
    assert len(sizes) == 5
    assert downloaded(hub) == sizes
    ranges = [request for request in hub.log if request.host == "cdn" and request.range]
    gains = sum(
        e.nbytes for path in model.glob("*.safetensors") for n, e in read_header(path).tensors.items() if "norm" in n
    )
    samples = sum(request.sent for request in ranges) - len(sizes) * FIRST_BYTES - gains
    assert 0 < samples <= KINDS * ROWS * 1024  # of each kind of reader, in search of a quantizer's grid
    assert hub.received("PUT /lfs/") == sum(map(len, shards_of(expected).values()))
    assert (result["bytes_downloaded"], result["bytes_uploaded"]) == (sum(sizes.values()), hub.received("PUT /lfs/"))
    assert not list(client.cache.rglob("*.safetensors"))
    assert {request.token for request in hub.log if request.host == "cdn"} == {None}
    # The repository holds this fold now: the same command has nothing to do, another one is refused.
    assert "nothing was committed" in str(client.succeeds()["notes"])
    assert len(repo.history) == 2
    hub.log.clear()
    code, out, err = client("--layout", "dropped")
    assert (code, out) == (1, "")
    assert f"{TARGET} holds another fold (README.md, config.json, flashnorm-plan.svg, ...); --overwrite" in err
    assert downloaded(hub) == {}


def test_a_head_from_another_shard(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """A tied head gets its own values: those of the embedding, which is in the first shard, at the end of the last."""
    tied = save(tmp_path / "tied", tie_word_embeddings=True)
    hub.add_repo("them/tied", tied)
    shutil.rmtree(tied / "more")
    for layout in ("identity", "dropped"):
        local = files_of(fold(tied, tmp_path / layout, layout=layout).output)
        hub.log.clear()
        result = client.succeeds("--layout", layout, "--overwrite", source="them/tied")
        assert result["lm_head"] == "untied"
        files = hub.files(TARGET)
        assert shards_of(files) == shards_of(local)
        assert files["model.safetensors.index.json"] == local["model.safetensors.index.json"]
        assert "old.txt" not in files
        # The embedding comes twice: once as a part of its shard, once for the head.
        whole = sum(path.stat().st_size for path in tied.glob("model-*.safetensors"))
        assert sum(downloaded(hub).values()) == whole
        ranges = [r.sent for r in hub.log if r.host == "cdn" and r.range and not r.range.startswith("bytes=0-")]
        assert max(ranges) == 2 * 1600 * 192
        assert result["bytes_downloaded"] == whole + max(ranges)
        repo = hub.repos[TARGET]
        repo.commit({**repo.commits[repo.refs["main"]], "old.txt": hub.store("old.txt", b"x")})


def test_pull_request(hub: HubServer, client: Client, model: Path, expected: dict[str, bytes]) -> None:
    """To a repository of somebody else."""
    hub.add_repo(TARGET).commit({".gitattributes": hub.store(".gitattributes", hub.gitattributes)})
    result = client.succeeds("--create-pr", token="hf_other")
    assert str(result["published"]["pull_request"]).endswith(f"/{TARGET}/discussions/1")
    assert_nothing_visible(hub)
    assert_published(hub, expected, "refs/pr/1")


# ---- trouble that passes ---------------------------------------------------------------------------------------------

SHARD = r"GET /blobs/\w+\?filename=model-\S+ whole"
PASSING = {
    "a busy Hub": [
        {"pattern": SHARD, "status": 500},
        {"pattern": "PUT /lfs/", "status": 503, "headers": {"Retry-After": "0"}},
        {"pattern": "POST .*/preupload/", "status": 429, "headers": {"Retry-After": "0"}},
        {"pattern": "POST .*/commit/", "status": 503},
    ],
    "a bad line": [
        {"pattern": SHARD, "after": 300_000, "delay": 0.02},
        {"pattern": "PUT /lfs/", "received": 300_000, "delay": 0.02},
        {"pattern": "GET /blobs/.*bytes=", "after": 100},
        {"pattern": "POST .*/commit/", "after": 0},
    ],
}


@pytest.mark.parametrize("faults", PASSING)
def test_trouble_that_passes(hub: HubServer, client: Client, expected: dict[str, bytes], faults: str) -> None:
    """Once each, in a single run; the last one loses the answer to a commit that took effect."""
    set_up = [hub.fail(**{"times": 1, **fault}) for fault in PASSING[faults]]
    client.succeeds()
    assert [fault.times for fault in set_up] == [0] * len(set_up)
    assert_published(hub, expected)
    assert len(hub.repos[TARGET].history) == 2
    assert list(hub.root.glob("put-*")) == []


# ---- with a proof ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["identity", "dropped"])
def test_verified_shard_by_shard(hub: HubServer, client: Client, tmp_path: Path, layout: str, tied: bool) -> None:
    """Every tensor is compared before it goes out; the page says that, and that nothing was run."""
    source = save(tmp_path / "source", tie_word_embeddings=tied)
    hub.add_repo("them/other", source)
    code, out, err = client("--verify", "--layout", layout, "--json", source="them/other")
    assert (code, err) == (4, "")
    assert document(out)["verdict"] == "as planned, not run"
    files = hub.files(TARGET)
    assert shards_of(files) == shards_of(files_of(fold(source, tmp_path / "local", layout=layout).output))
    entry = json.loads(files["flashnorm.json"])["verify"]
    assert (entry["verdict"], entry["equivalent"]) == ("as planned, not run", False)
    figures = entry["levels"]["weights"]["figures"]
    tensors = sum(len(read_header(path).tensors) for path in source.glob("*.safetensors"))
    norms = 7 if layout == "dropped" else 0
    assert figures["tensors"] == figures["identical"] == tensors + tied - norms
    card = files["README.md"].decode()
    assert "As planned, not run" in card and "is meant to compute the same function" in card
    assert "computes the same function" not in card and "is the same model" not in card
    # Once more: the same proof of the same files, so there is nothing to commit. Without one, it is not taken away.
    commits = len(hub.repos[TARGET].history)
    code, out, _ = client("--verify", "--layout", layout, "--json", source="them/other")
    assert (code, "nothing was committed" in out, len(hub.repos[TARGET].history)) == (4, True, commits)
    code, _, err = client("--layout", layout, source="them/other")
    assert (code, "holds this fold with its verification" in err) == (1, True)


def test_a_fold_that_goes_wrong_is_not_published(model: Path, tmp_path: Path) -> None:
    """The comparison is not the fold's own: each way to spoil a shard is seen, with the tensor."""
    checkpoint = open_checkpoint(Source(str(model)))
    plan = make_plan(checkpoint)
    raw = read_tensors(checkpoint, [norm.tensor for norm in plan.folded])
    gains = {name: (bytes(data), checkpoint.tensors[name].dtype) for name, data in raw.items()}
    folded = fold(model, tmp_path / "out").output
    for name, header in checkpoint.shards.items():
        wanted = shard_plan(plan, header.tensors, name == list(checkpoint.shards)[-1], gains, dropped=False)
        compared, findings = check_shard(wanted, model / name, folded / name, [])
        assert (compared, findings) == (len(header.tensors), ())
        for tensor, entry in header.tensors.items():
            data = bytearray((folded / name).read_bytes())
            data[header.data_start + entry.start + 1] ^= 1  # of the first value
            (tmp_path / "spoilt").write_bytes(data)
            _, findings = check_shard(wanted, model / name, tmp_path / "spoilt", [])
            assert [finding.what for finding in findings] == [tensor]
        shutil.copy(model / name, tmp_path / "unfolded")
        changed = {*header.tensors} & {*raw, *(reader.tensor for reader in plan.readers)}
        _, findings = check_shard(wanted, model / name, tmp_path / "unfolded", [])
        assert {finding.what for finding in findings} == changed


# ---- trouble that stays ----------------------------------------------------------------------------------------------

STAYS = [
    ({"pattern": "POST .*/preupload/", "status": 401}, "does not accept the token"),  # it was revoked
    ({"pattern": SHARD, "status": 403}, "the Hub forbids it"),  # the source was closed
    ({"pattern": "POST .*/commit/", "status": 409}, "the Hub reports a conflict"),
    ({"pattern": "POST .*/commit/", "status": 412}, "somebody else committed to it"),
]


def test_trouble_that_stays(hub: HubServer, client: Client, expected: dict[str, bytes]) -> None:
    """Until it is mended; one after the other, each in a run that goes on where the one before has failed."""
    total = sum(map(len, shards_of(expected).values()))
    for fault, words in STAYS:
        hub.faults = [Fault(**fault)]
        code, out, err = client()
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert words in err
        assert_nothing_visible(hub)
        assert hub.received("PUT /lfs/") == (total if "commit" in str(fault["pattern"]) else 0)
    hub.faults.clear()
    result = client.succeeds()
    assert len(result["resumed_shards"]) == 5
    assert_published(hub, expected)
    assert hub.received("PUT /lfs/") == total


def test_uploads_that_the_hub_has_removed(hub: HubServer, client: Client, expected: dict[str, bytes]) -> None:
    """Contents that no commit names do not live for ever: those that are gone are sent again."""
    hub.fail("POST .*/commit/", status=409)
    client()
    hub.faults.clear()
    name, data = next(iter(shards_of(expected).items()))
    hub.blob_path(hub.store(name, data).sha256).unlink()
    hub.log.clear()
    result = client.succeeds()
    assert (len(result["resumed_shards"]), set(downloaded(hub))) == (4, {name})
    assert hub.received("PUT /lfs/") == len(data)
    assert_published(hub, expected)


JOURNALS = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "no entries": lambda text: json.dumps(dict.fromkeys(json.loads(text))),
    "half an entry": lambda text: text.replace('"source_sha256"', '"other"', 1),
    "another hash": lambda text: re.sub('"sha256": "..', '"sha256": "zz', text, count=1),
    "a time to come": lambda text: re.sub('"at": [0-9.]+', '"at": 1e18', text, count=1),
    "no text": lambda text: "\udcff",
    "deep": lambda text: "[" * 100_000,
}


def test_a_journal_that_is_broken(hub: HubServer, client: Client, expected: dict[str, bytes]) -> None:
    """As a disk that was full, or lost its power, leaves it: what cannot be read is done again."""
    hub.fail("POST .*/commit/", status=409)
    client()
    journal = client.cwd / f".{TARGET.replace('/', '--')}.partial" / "uploaded.json"
    whole = journal.read_text()
    for what, broken in JOURNALS.items():
        journal.write_bytes(broken(whole).encode("utf-8", "surrogateescape"))
        hub.log.clear()
        code, _, err = client()
        assert (what, code, "reports a conflict" in err) == (what, 1, True)
        assert len(downloaded(hub)) == (1 if what in ("half an entry", "another hash", "a time to come") else 5)
    hub.faults.clear()
    journal.write_text(whole[:-1])
    assert client.succeeds()["resumed_shards"] == []
    assert_published(hub, expected)


def test_many_tiny_shards(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Jobs that begin and end all the time do not get in each other's way."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=8, vocab_size=64, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 0.4, 1.8)
    model.save_pretrained(tmp_path / "tiny", max_shard_size="1KB")
    (tmp_path / "tiny" / "README.md").write_text("---\nlanguage: de\n---\n")
    hub.add_repo("them/tiny", tmp_path / "tiny")
    local = files_of(fold(tmp_path / "tiny", tmp_path / "local").output)
    assert len(shards_of(local)) == 60
    for _ in range(4):
        client.succeeds(source="them/tiny")
        assert shards_of(hub.files(TARGET)) == shards_of(local)
        del hub.repos[TARGET]
        for name, data in shards_of(local).items():
            if data != (tmp_path / "tiny" / name).read_bytes():  # those are the source's, too
                hub.blob_path(hub.store(name, data).sha256).unlink()


def test_a_neighbours_files_come_and_go(tmp_path: Path) -> None:
    """What the other job holds is counted while it is being written, moved and cleared."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for inner in ("a/b", "a/c/d"):
                (tmp_path / inner).mkdir(parents=True, exist_ok=True)
                (tmp_path / inner / "model-00001.safetensors.incomplete").write_bytes(b"x" * 10)
            shutil.rmtree(tmp_path / "a")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(2000):
            assert _bytes_in(tmp_path) in (0, 10, 20)
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk(hub: HubServer, client: Client, expected: dict[str, bytes]) -> None:
    """Not enough for a shard and its fold. With room for three shards at most, it goes on."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(client.cwd)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, out, err = client()
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "a shard needs" in err and "free some space" in err
        assert_nothing_visible(hub)
        largest = max(map(len, shards_of(expected).values()))
        small_files = sum(map(len, expected.values())) - sum(map(len, shards_of(expected).values()))
        room = 3 * largest + small_files + 200_000
        subprocess.run(["mount", "-o", f"remount,size={room}", str(client.cwd)], check=True)
        client.succeeds()
        assert_published(hub, expected)
    finally:
        subprocess.run(["umount", "-l", str(client.cwd)], check=True)


# ---- kills -----------------------------------------------------------------------------------------------------------

PHASES = {
    "headers": {"pattern": "GET /blobs/.*bytes=0-", "after": 1000},
    "norms": {"pattern": r"GET /blobs/.*bytes=[1-9]", "after": 100},
    "creating": {"pattern": "POST /api/repos/create", "after": 0},
    "first download": {"pattern": SHARD, "after": 500_000},
    "first upload": {"pattern": "PUT /lfs/", "received": 500_000},
    "later download": {"pattern": SHARD, "after": 500_000, "skip": 3},
    "later upload": {"pattern": "PUT /lfs/", "received": 500_000, "skip": 4},
    "committing": {"pattern": "POST .*/commit/"},
    "committed": {"pattern": "POST .*/commit/", "after": 0},
}
CHAINS = [
    "headers, norms, creating, first download",
    "first upload, later download",
    "later upload, committing, committed",
]


@pytest.mark.parametrize("chain", CHAINS)
def test_killed(hub: HubServer, client: Client, expected: dict[str, bytes], chain: str) -> None:
    """By SIGKILL, while the server holds a request; each run goes on where the one before was killed."""
    journal = client.cwd / f".{TARGET.replace('/', '--')}.partial" / "uploaded.json"
    done: set[str] = set()
    for phase in chain.split(", "):
        what = dict(PHASES[phase])
        # Faults that do nothing let the first requests pass.
        hub.faults = [Fault(what["pattern"], times=what.pop("skip", 0))]
        fault = hub.fail(**what, hold=True, times=1)
        hub.log.clear()
        run = client.start()
        assert fault.reached.wait(60), phase
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        if phase == "committing":  # the request is there already; it breaks now, as if it had never been
            fault.status = 503
        fault.release.set()
        if phase != "committed":
            assert_nothing_visible(hub)
        assert not done & set(downloaded(hub)), phase
        before, done = done, set(json.loads(journal.read_text())) if journal.exists() else set()
        assert done >= before, phase
        assert len(done) >= {"later download": 2, "later upload": 3, "committing": 5, "committed": 5}.get(phase, 0)
    hub.log.clear()
    result = client.succeeds()
    assert set(result["resumed_shards"]) == done
    assert set(downloaded(hub)) == set(shards_of(expected)) - done
    assert_published(hub, expected)
    assert len(hub.repos[TARGET].history) == 2


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input(hub: HubServer, client: Client, model: Path) -> None:
    local = f"{model}: is no Hub id; a local checkpoint is published in steps: "
    local += "`flashnorm fold`, `flashnorm verify`, `flashnorm push-to-hub`"
    client.fails(local, source=str(model), code=2)
    code, _, err = client(token="")
    assert (code, "there is no Hub token" in err, err.count("\n")) == (1, True, 1)
    for arguments in (["out"], ["--local-files-only"]):
        client.fails("--push-to excludes an output folder and --local-files-only", *arguments, code=2)
    code, _, err = client(target="me/bad..name")
    assert (code, "does not take this name" in err, err.count("\n")) == (2, True, 1)
    code, _, err = client(target="nobody/model")
    assert (code, "the Hub forbids it" in err, err.count("\n")) == (1, True, 1)
    assert set(hub.repos) == {SOURCE}
    assert downloaded(hub) == {}
    run = client.zygote.start("fold", SOURCE, "--private", cwd=client.cwd)
    assert (run.wait(), run.err) == (2, "flashnorm: --private, --commit-message and --create-pr need --push-to\n")
    assert list(client.cwd.iterdir()) == []
