"""Folds on a real dask scheduler with worker processes, and on other executors: the same bytes as the local fold.

Scheduler and workers are forked from this process, where everything is imported already; they speak TCP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from documents import document
from hub_folds import SOURCE, TARGET, TOKEN, assert_published, downloaded, files_of, save, shards_of
from hub_server import HubServer

import flashnorm_cli
from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import CheckpointError, FlashNormError, GainOverflowError
from flashnorm_cli.folding import engine, jobs
from flashnorm_cli.folding.fold import fold, read_gains
from flashnorm_cli.folding.jobs import FolderJob, ShardEdits, do_folder_job, shard_edits
from flashnorm_cli.hub.shard_job import HubJob
from flashnorm_cli.plan.planner import make_plan

distributed = pytest.importorskip("distributed", reason="needs dask: pip install 'flashnorm-cli[cluster]'")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(fold(model, tmp_path_factory.mktemp("local") / "out").output)


# ---- processes -------------------------------------------------------------------------------------------------------


class Cluster:
    """A scheduler and its workers; `before` runs in each worker first and may make it a special one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids = folder, list[int]()
        file = folder / "address"
        self.scheduler = self._fork(lambda: _scheduler(file))
        while not file.exists():
            time.sleep(0.01)
        self.address = file.read_text()

    def add_worker(self, before: Callable[[], None] = lambda: None) -> int:
        def work() -> None:
            before()
            _worker(self.address, self.folder)

        return self._fork(work)

    def remove_worker(self, pid: int) -> None:
        """Gone for the scheduler, too."""
        self.pids.remove(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with distributed.Client(self.address, set_as_default=False) as client:
            while client.nthreads():
                time.sleep(0.02)

    def _fork(self, run: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                logging.disable()
                torch.set_num_threads(1)
                run()
            finally:
                os._exit(0)
        self.pids.append(pid)
        return pid

    def stop(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _scheduler(file: Path) -> None:
    async def run() -> None:
        async with distributed.Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
            file.with_suffix(".new").write_text(scheduler.address)
            file.with_suffix(".new").rename(file)
            await scheduler.finished()

    asyncio.run(run())


def _worker(address: str, folder: Path) -> None:
    async def run() -> None:
        async with distributed.Worker(address, nthreads=1, local_directory=str(folder), dashboard=False) as worker:
            await worker.finished()

    asyncio.run(run())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: ThreadPoolExecutor(3), lambda: ProcessPoolExecutor(2, mp_context=get_context("fork"))],
    ids=["threads", "processes"],
)
def test_any_executor(model: Path, expected: dict[str, bytes], tmp_path: Path, make: Callable) -> None:
    with make() as executor:
        fold(model, tmp_path / "out", executor=executor)
    assert files_of(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_worker_is_killed(model: Path, expected: dict[str, bytes], cluster: Cluster, tmp_path: Path) -> None:
    """In the middle of a shard, by SIGKILL: only that shard is folded again, and progress comes shard by shard."""
    log, died = tmp_path / "log", tmp_path / "died"
    inside = tmp_path / ".out.partial" / "checkpoint"

    def watch() -> None:
        """Note each shard; whoever comes first to the middle of the third one dies there."""
        rewrite, mine = jobs.fold_shard, list[str]()

        def noted(edits: ShardEdits, source: Path, target: Path, *more: object, **options: object) -> dict[str, int]:
            with log.open("a") as file:
                file.write(f"{edits.name}\n")
            if "00003" in edits.name and not died.exists():
                died.touch()
                until(lambda: all((inside / name).exists() for name in mine))  # results are lost with their worker
                target.write_bytes(b"half a shard")
                os.kill(os.getpid(), signal.SIGKILL)
            mine.append(edits.name)
            return rewrite(edits, source, target, *more, **options)

        jobs.fold_shard = noted

    for _ in range(3):
        cluster.add_worker(watch)
    said: list[tuple[int, int, str]] = []
    result = fold(model, tmp_path / "out", dask=cluster.address, on_progress=lambda *what: said.append(what))
    assert died.exists()
    assert files_of(tmp_path / "out") == expected
    assert sorted(tmp_path.iterdir()) == sorted([log, died, tmp_path / "out", cluster.folder])
    names = sorted(shards_of(expected))
    assert sorted(log.read_text().split()) == sorted([*names, names[2]])
    done = [n for n, _, what in said if what.endswith(f"of {len(names)} done")]
    assert (len(done), done[-1]) == (len(names), result.bytes_written)


def test_command_is_killed(model: Path, expected: dict[str, bytes], cluster: Cluster, tmp_path: Path) -> None:
    """The coordinator dies between shards; the next one goes on, with the workers that were there all the time."""

    def slow() -> None:
        rewrite = jobs.fold_shard

        def waits(*arguments: object, **options: object) -> dict[str, int]:
            time.sleep(0.3)
            return rewrite(*arguments, **options)

        jobs.fold_shard = waits

    cluster.add_worker(slow)
    pid = os.fork()
    if pid == 0:
        try:
            fold(model, tmp_path / "out", dask=cluster.address)
        finally:
            os._exit(0)
    inside = tmp_path / ".out.partial" / "checkpoint"
    while len(list(inside.glob("*.safetensors"))) < 2:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    finished = {path.name: path.stat().st_ino for path in inside.iterdir()}
    result = fold(model, tmp_path / "out", dask=cluster.address)
    assert set(result.resumed) == set(finished)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished
    assert files_of(tmp_path / "out") == expected
    assert not (tmp_path / ".out.partial").exists()


def test_jobs_are_small(model: Path) -> None:
    """A job holds the gains that its shard needs, and no reader of another one; nothing of it needs torch."""
    checkpoint = open_checkpoint(Source(str(model)))
    plan = make_plan(checkpoint)
    gains = read_gains(checkpoint, plan)
    edits = shard_edits(checkpoint, plan, gains, "identity")
    assert sorted(r.tensor for e in edits for r in e.readers) == sorted(r.tensor for r in plan.readers)
    assert sum(map(len, (edit.readers for edit in edits))) == len(plan.readers)
    for edit in edits:
        assert set(edit.gains) == {run.norm for reader in edit.readers for run in reader.runs}
        assert len(pickle.dumps(edit)) < 2000 + 200 * len(edit.readers) + sum(g.nbytes for g in edit.gains.values())
    load = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()); sys.exit('torch' in sys.modules)"
    path = {"PYTHONPATH": str(Path(flashnorm_cli.__file__).parents[1]), "PATH": os.environ["PATH"]}
    assert subprocess.run([sys.executable, "-c", load], input=pickle.dumps(edits), env=path).returncode == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


def fails(model: Path, output: Path, address: str, error: type[Exception] = FlashNormError) -> str:
    with pytest.raises(error) as caught:
        fold(model, output, dask=address)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scheduler(model: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None there, no address, no workers."""
    monkeypatch.setattr(engine, "CONNECT", 1)
    monkeypatch.setattr(engine, "JOIN", 0.5)
    words = "no dask scheduler could be reached there"
    for address in ("tcp://127.0.0.1:9", "somewhere"):
        assert f"{address}: {words}" in fails(model, tmp_path / "out", address)
    words = f"{cluster.address}: no worker has joined this scheduler; start some: dask worker {cluster.address}"
    assert fails(model, tmp_path / "out", cluster.address) == words
    assert [path.name for path in tmp_path.iterdir()] == ["cluster"]


def test_workers_that_cannot(model: Path, cluster: Cluster, tmp_path: Path) -> None:
    """No package, another version (there or later), another file system: one after the other."""

    def no_package() -> None:
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

        metadata.version = version

    def another_version() -> None:
        metadata.version = lambda name: "0.0.1"

    def another_version_later() -> None:
        jobs.__version__ = "0.0.2"

    def no_shared_output() -> None:
        jobs.JOURNAL = "nosuch"

    expected = {
        no_package: "does not have flashnorm-cli: install version 0.1.0 on every worker",
        another_version: "has flashnorm-cli 0.0.1: install version 0.1.0 on every worker",
        another_version_later: "has flashnorm-cli 0.0.2, not 0.1.0: install the same version everywhere",
        no_shared_output: "does not see the folder that is being written: it has to be on a file system that all",
    }
    for before, words in expected.items():
        pid = cluster.add_worker(before)
        assert words in fails(model, tmp_path / "out", cluster.address)
        cluster.remove_worker(pid)


def test_errors_of_a_shard(cluster: Cluster, tmp_path: Path) -> None:
    """What a worker finds out arrives here as what it is, with the tensor or the file."""
    cluster.add_worker()
    model = save(tmp_path / "model", tie_word_embeddings=False)
    path = sorted(model.glob("model-*.safetensors"))[2]
    header = read_header(path)
    name = next(name for name in header.tensors if name.endswith(("gate_proj.weight", "up_proj.weight")))
    with path.open("r+b") as file:
        file.seek(header.data_start + header.tensors[name].start)
        file.write(b"\x7f\x7f" * 1000)  # the largest bf16 value
    words = fails(model, tmp_path / "out", cluster.address, GainOverflowError)
    assert words.startswith(f"tensor {name!r}: a weight of ")
    assert not (tmp_path / ".out.partial").exists()


def test_source_that_is_another_one(model: Path, tmp_path: Path) -> None:
    """A worker whose file of that name has another size or time does not fold it."""
    checkpoint = open_checkpoint(Source(str(model)))
    plan = make_plan(checkpoint)
    edits = shard_edits(checkpoint, plan, read_gains(checkpoint, plan), "identity")[-1]
    (tmp_path / "journal").write_text("mine")
    names = {edits.name, *(origin.shard for origin in edits.origins.values())}
    assert len(names) == 2  # the head's values come from the first shard
    files = {name: ((model / name).stat().st_size, (model / name).stat().st_mtime_ns) for name in names}
    job = FolderJob(edits, model, files, tmp_path, "mine", threads=1, fsync=False)
    assert (tmp_path / do_folder_job(job).part).exists()
    for name in names:
        other = {**files, name: (files[name][0], files[name][1] + 1)}
        with pytest.raises(CheckpointError, match=f"{name}: the worker on .* sees another file"):
            do_folder_job(dataclasses.replace(job, files=other))
    with pytest.raises(FlashNormError, match=r"cannot read it .* on a file system that all workers share"):
        do_folder_job(dataclasses.replace(job, folder=tmp_path))


# ---- from Hub to Hub -------------------------------------------------------------------------------------------------


def test_hub_to_hub(model: Path, expected: dict[str, bytes], cluster: Cluster, tmp_path: Path) -> None:
    """Workers know nothing of the Hub but what a job says. One of them is killed after its shard was uploaded.

    By Xet: in chunks that hf_xet deduplicates.
    """
    died = tmp_path / "died"

    def dies_after_an_upload() -> None:
        from flashnorm_cli.hub import shard_job as stream

        upload, mine = stream._upload, list[str]()
        journal = tmp_path / "cwd" / ".me--folded.partial" / "uploaded.json"

        def noted(job: HubJob, *arguments: object) -> str:
            assert TOKEN not in repr(job)
            sha256 = upload(job, *arguments)
            if "00003" in job.edits.name and not died.exists():
                died.touch()
                until(lambda: not mine or set(mine) <= set(json.loads(journal.read_text())))
                os.kill(os.getpid(), signal.SIGKILL)
            mine.append(job.edits.name)
            return sha256

        stream._upload = noted

    for _ in range(2):
        cluster.add_worker(dies_after_an_upload)
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("me", TOKEN)
        hub.add_repo(SOURCE, model)
        path = str(Path(flashnorm_cli.__file__).parents[1])
        env = hub.client_env(tmp_path / "home", PYTHONPATH=path, HF_TOKEN=TOKEN, OMP_NUM_THREADS="1")
        (tmp_path / "cwd").mkdir()
        arguments = [SOURCE, "--push-to", TARGET, "--dask", cluster.address, "--json"]
        command = [sys.executable, *"-m flashnorm_cli fold".split(), *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path / "cwd", capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert died.exists()
        assert_published(hub, expected)
        blobs = hub.repos[TARGET].commits[hub.repos[TARGET].refs["main"]]
        assert all(blob.xet for name, blob in blobs.items() if name.endswith(".safetensors"))
        assert hub.received("PUT /lfs/") == 0
        assert list((tmp_path / "cwd").iterdir()) == []
        sizes = {path.name: path.stat().st_size for path in model.glob("model-*.safetensors")}
        names = sorted(sizes)
        assert downloaded(hub) == {**sizes, names[2]: 2 * sizes[names[2]]}
        assert document(done.stdout)["bytes_uploaded"] == sum(map(len, shards_of(expected).values()))
        # What the dead one has left is in a folder that dask clears when it starts another one there.
        assert len(list(cluster.folder.rglob("*.safetensors"))) == 1
