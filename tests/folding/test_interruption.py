"""A fold that is stopped at any moment leaves nothing that looks finished, and the next one goes on to the same bytes.

Folds run in children that are forked from this process, where transformers is imported already. A child counts its
steps (every write, sync, rename, unlink, ...) and stops itself with a signal right before one of them: any moment
can be hit, and hit again.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from documents import document
from transformers import LlamaConfig, LlamaForCausalLM

from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.cli import main
from flashnorm_cli.plan.planner import make_plan

KILLS = 20
LARGE = {"hidden_size": 512, "intermediate_size": 2816, "num_hidden_layers": 3, "vocab_size": 5120}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
COUNTED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile"}


def save(folder: Path, max_shard_size: str, **sizes: int) -> Path:
    """A checkpoint with a few other files."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, tie_word_embeddings=False, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.4, 1.8)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "notes.md").write_text("notes")
    return folder


@pytest.fixture(scope="module", autouse=True)
def ready_to_fork(small_source: Path) -> Iterator[None]:
    """Children find imported what a plan imports, and do not copy this process's memory for the garbage collector."""
    make_plan(open_checkpoint(Source(str(small_source))))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 MB in 7 shards."""
    return save(tmp_path_factory.mktemp("source") / "model", "8MB", **LARGE)


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 kB in 2 shards, where only the steps at the end matter."""
    return save(tmp_path_factory.mktemp("source") / "model", "20KB", **SMALL)


# ---- running folds -------------------------------------------------------------------------------------------


class Child:
    """A `flashnorm fold` in a process of its own, which sends itself `sig` right before step number `at`."""

    running: ClassVar[set[int]] = set()

    def __init__(self, log: Path, *arguments: object, at: int = -1, sig: int = signal.SIGKILL) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            _child(log, [str(a) for a in arguments], at, sig)
        self.running.add(self.pid)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it, as in subprocess."""
        status = os.waitpid(self.pid, os.WUNTRACED)[1]
        while os.WIFSTOPPED(status):  # another thread had counted the same step, and stops it once more
            os.kill(self.pid, signal.SIGCONT)
            status = os.waitpid(self.pid, os.WUNTRACED)[1]
        self.running.remove(self.pid)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def wait_until_stopped(self) -> bool:
        """Whether it has stopped itself, and not ended."""
        stopped = os.WIFSTOPPED(os.waitpid(self.pid, os.WUNTRACED)[1])
        if not stopped:
            self.running.remove(self.pid)
        return stopped

    @property
    def out(self) -> str:
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_suffix(".err").read_text()

    @property
    def steps(self) -> list[str]:
        """What it did, if it came to its end."""
        return self.log.with_suffix(".steps").read_text().split()


@pytest.fixture(autouse=True)
def no_child_survives() -> Iterator[None]:
    """A test that fails may leave one that stands still."""
    yield
    while Child.running:
        pid = Child.running.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _child(log: Path, arguments: list[str], at: int, sig: int) -> None:
    code = 99
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
        steps = _count_steps(at, sig)
        try:
            main(["fold", *arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        log.with_suffix(".steps").write_text(" ".join(steps))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count_steps(at: int, sig: int) -> list[str]:
    """The names of this process's steps from now on; a list that grows."""
    steps: list[str] = []

    def step(name: str) -> None:
        if len(steps) == at:
            os.kill(os.getpid(), sig)
        steps.append(name)

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            step(name)
            return function(*args, **kwargs)

        return wrapper

    def audit(event: str, args: tuple[object, ...]) -> None:
        if event in COUNTED or (event == "open" and ".partial" in str(args[0])):
            step(event)

    for name in ("pwrite", "copy_file_range", "fsync"):  # these raise no audit events
        setattr(os, name, counted(name, getattr(os, name)))
    sys.addaudithook(audit)
    return steps


def fold(folder: Path, *arguments: object, at: int = -1, sig: int = signal.SIGKILL) -> tuple[int, Child]:
    child = Child(folder / "log", *arguments, at=at, sig=sig)
    return child.wait(), child


def finish(folder: Path, *arguments: object) -> list[str]:
    """Run to the end; returns the shards that were finished before."""
    code, child = fold(folder, *arguments, "--json")
    assert (code, child.err) == (0, "")
    return list(document(child.out)["resumed_shards"])


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Shards below the folder, with what changes when they are written again."""
    found = {path.name: path.stat() for path in sorted(folder.rglob("*.safetensors"))}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def left_overs(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("log."))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """The files of an uninterrupted fold, and how many steps it took."""
    folder = tmp_path_factory.mktemp("whole")
    before = hashes(source)
    code, child = fold(folder, source, folder / "out")
    assert (code, child.err) == (0, "")
    assert left_overs(folder) == ["out"]
    assert hashes(source) == before
    assert len(child.steps) > 60
    return hashes(folder / "out"), len(child.steps)


# ---- kills ---------------------------------------------------------------------------------------------------


def test_kills(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """At random moments, and at each of the last ones, when the folder gets its name."""
    expected, steps = whole
    before = hashes(source)
    moments = random.Random(0).sample(range(steps - 8), KILLS - 8) + list(range(steps - 8, steps))
    resumed_somewhere = set()
    for at in sorted(moments):
        folder = tmp_path / str(at)
        folder.mkdir()
        out = folder / "out"
        code, _ = fold(folder, source, out, at=at)
        assert code == -signal.SIGKILL, at
        assert hashes(source) == before, at
        if out.exists():  # it has got its name already: then all of it is there
            assert hashes(out) == expected, at
            shutil.rmtree(out)
        finished = finished_shards(folder)
        assert finish(folder, source, out) == list(finished), at
        assert hashes(out) == expected, at
        again = finished_shards(out)
        assert {name: again[name] for name in finished} == finished, at
        assert left_overs(folder) == ["out"], at
        resumed_somewhere.add(len(finished))
        shutil.rmtree(folder)
    assert len(resumed_somewhere) > 4  # the moments were spread


def test_killed_twice(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """The second run goes on from the first one's shards, the third from both."""
    expected, steps = whole
    done = []
    for _ in range(2):
        code, _ = fold(tmp_path, source, tmp_path / "out", at=steps // 3)
        assert code == -signal.SIGKILL
        done.append(finished_shards(tmp_path))
    assert 0 < len(done[0]) < len(done[1])
    assert done[0].items() <= done[1].items()
    assert finish(tmp_path, source, tmp_path / "out") == list(done[1])
    assert hashes(tmp_path / "out") == expected


def test_kills_while_overwriting(small_source: Path, tmp_path: Path) -> None:
    """At the end of a fold over an older one: the old or the new folder is there, or another run brings it back."""
    source, fresh = small_source, tmp_path / "old"
    finish(tmp_path, source, tmp_path / "new")
    expected = hashes(tmp_path / "new")
    finish(tmp_path, source, fresh, "--layout", "dropped")
    old = hashes(fresh)
    arguments = (source, tmp_path / "out", "--overwrite")
    shutil.copytree(fresh, tmp_path / "out")
    code, child = fold(tmp_path, *arguments)
    assert (code, hashes(tmp_path / "out")) == (0, expected)
    renames = [at for at, step in enumerate(child.steps) if step == "os.rename"][-2:]  # out to .out.old, new to out
    for at in sorted({*renames, renames[1] + 1, renames[1] + 5, len(child.steps) - 2, len(child.steps) - 1}):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(fresh, tmp_path / "out")
        code, _ = fold(tmp_path, *arguments, at=at)
        assert code == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert hashes(tmp_path / "out") in (old, expected), at
        overwrite = ["--overwrite"] if (tmp_path / "out").exists() else []
        finish(tmp_path, *arguments[:2], *overwrite)
        assert hashes(tmp_path / "out") == expected, at
        assert left_overs(tmp_path) == ["new", "old", "out"], at


# ---- Ctrl-C --------------------------------------------------------------------------------------------------


def assert_interrupted(code: int, out: str, err: str) -> None:
    assert (code, out) == (130, "")
    assert err == "flashnorm: interrupted; the same command goes on where it stopped\n"


def test_interrupted(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    expected, steps = whole
    code, child = fold(tmp_path, source, tmp_path / "out", at=steps // 2, sig=signal.SIGINT)
    assert_interrupted(code, child.out, child.err)
    finished = finished_shards(tmp_path)
    assert len(finished) > 1
    assert left_overs(tmp_path) == [".out.partial"]
    assert not list(tmp_path.rglob("*.safetensors.part"))  # only a kill leaves half a shard
    assert finish(tmp_path, source, tmp_path / "out") == list(finished)
    assert hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_real_process(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path, sig: int) -> None:
    """Not forked and not stopped by itself."""
    expected, _ = whole
    command = [sys.executable, "-m", "flashnorm_cli", "fold", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not finished_shards(tmp_path):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # so that it does not finish while this process looks
    os.waitpid(process.pid, os.WUNTRACED)
    if (tmp_path / "out").exists():
        process.kill()
        pytest.skip("too fast")
    process.send_signal(sig)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    if sig == signal.SIGINT:
        assert_interrupted(process.returncode, out, err)
    else:
        assert (process.returncode, out, err) == (-sig, "", "")
    finished = finished_shards(tmp_path)
    assert left_overs(tmp_path) == [".out.partial"]
    assert finish(tmp_path, source, tmp_path / "out") == list(finished)
    assert hashes(tmp_path / "out") == expected


# ---- other things between two runs ---------------------------------------------------------------------------


@pytest.fixture
def half(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> Path:
    """A folder with a copy of the source as `model`, and a fold of it that was killed half way."""
    shutil.copytree(source, tmp_path / "model")
    code, _ = fold(tmp_path, tmp_path / "model", tmp_path / "out", at=whole[1] // 2)
    assert code == -signal.SIGKILL
    assert len(finished_shards(tmp_path / ".out.partial")) > 1
    return tmp_path


def change_a_weight(model: Path) -> None:
    path = min(model.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(read_header(path).data_start)
        file.write(b"\1\2\3\4")


def new_time(model: Path) -> None:
    os.utime(min(model.glob("*.safetensors")))


def change_a_norm(model: Path) -> None:
    """In the last shard, and with the old time: the first ones hold the old gain's products."""
    for path in model.glob("*.safetensors"):
        header, status = read_header(path), path.stat()
        if "model.norm.weight" in header.tensors:
            with path.open("r+b") as file:
                file.seek(header.data_start + header.tensors["model.norm.weight"].start)
                file.write(b"\1\2\3\4")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_a_weight, new_time, change_a_norm])
def test_source_changed(half: Path, change: Callable[[Path], None]) -> None:
    change(half / "model")
    assert finish(half, half / "model", half / "out") == []
    finish(half, half / "model", half / "fresh")
    assert hashes(half / "out") == hashes(half / "fresh")


@pytest.mark.parametrize("options", ["--layout dropped", "--final-norm keep"])
def test_other_options(half: Path, options: str) -> None:
    assert finish(half, half / "model", half / "out", *options.split()) == []
    finish(half, half / "model", half / "fresh", *options.split())
    assert hashes(half / "out") == hashes(half / "fresh")


def test_options_that_do_not_matter(half: Path) -> None:
    finished = finished_shards(half / ".out.partial")
    assert finish(half, half / "model", half / "out", "--workers", 1) == list(finished)


def test_other_files_changed(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """Killed when nearly all is written: then what was copied is copied anew, and what is gone is gone."""
    shutil.copytree(source, tmp_path / "model")
    child = fold(tmp_path, tmp_path / "model", tmp_path / "out", at=whole[1] - 12)[1]
    assert child.log and list((tmp_path / ".out.partial").rglob("notes.md"))
    (tmp_path / "model" / "tokenizer.json").write_text('{"other": 1}')
    shutil.rmtree(tmp_path / "model" / "more")
    assert len(finish(tmp_path, tmp_path / "model", tmp_path / "out")) == 7
    finish(tmp_path, tmp_path / "model", tmp_path / "fresh")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_rubbish_in_the_partial_folder(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """A finished shard's name is no proof: only the journal's word counts."""
    partial = tmp_path / ".out.partial"
    code, _ = fold(tmp_path, source, tmp_path / "out", at=whole[1] // 2)
    assert code == -signal.SIGKILL
    journal = next(path for path in partial.rglob("*") if path.is_file() and "journal" in path.name)
    journal.write_text("x")
    (partial / "rubbish").write_text("x")
    assert finish(tmp_path, source, tmp_path / "out") == []
    assert hashes(tmp_path / "out") == whole[0]


# ---- two at once ---------------------------------------------------------------------------------------------


def test_two_at_once(source: Path, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """The second is refused while the first stands still in the middle, and the first is not disturbed."""
    expected, steps = whole
    (tmp_path / "first").mkdir()
    first = Child(tmp_path / "first" / "log", source, tmp_path / "out", at=steps // 2, sig=signal.SIGSTOP)
    assert first.wait_until_stopped()
    code, second = fold(tmp_path, source, tmp_path / "out")
    assert (code, second.out) == (1, "")
    assert second.err == f"flashnorm: {tmp_path / 'out'}: another fold is writing it right now\n"
    os.kill(first.pid, signal.SIGCONT)
    assert (first.wait(), first.err) == (0, "")
    assert hashes(tmp_path / "out") == expected


def test_two_at_the_end(small_source: Path, tmp_path: Path) -> None:
    """The first stands still at each of its last steps: the second is refused, and the first's output is whole."""
    source = small_source
    steps = len(fold(tmp_path, source, tmp_path / "out")[1].steps)
    expected = hashes(tmp_path / "out")
    for at in range(steps - 6, steps):
        folder = tmp_path / str(at)
        (folder / "first").mkdir(parents=True)
        first = Child(folder / "first" / "log", source, folder / "out", at=at, sig=signal.SIGSTOP)
        assert first.wait_until_stopped()
        code, second = fold(folder, source, folder / "out")
        if code == 0:  # it has its name already, and all that it holds
            assert "Already done" in second.out and second.err == "", at
        else:
            assert code in (1, 2), at
            assert second.err.count("\n") == 1, at
            assert "another fold" in second.err or "exists already" in second.err, at
        os.kill(first.pid, signal.SIGCONT)
        assert (first.wait(), first.err) == (0, ""), at
        assert hashes(folder / "out") == expected, at
        assert left_overs(folder) == ["first", "out"], at
        shutil.rmtree(folder)
