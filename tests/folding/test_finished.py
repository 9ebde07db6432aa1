"""A fold again: done already where the folder holds this very fold, refused where anything of it may be another one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small import tiny_llama

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.cli import main
from flashnorm_cli.folding.finished import not_this_fold, older_fold
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.plan.planner import make_plan
from flashnorm_cli.record import write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, `model`, and its fold, `out`."""
    root = tmp_path_factory.mktemp("made")
    tiny_llama().save_pretrained(root / "model", max_shard_size="8kB")
    (root / "model" / "notes.md").write_text("# Notes\n")
    fold(root / "model", root / "out")
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_fold_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, from a link whose name the output takes: done once, then done already, with other options not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mymodel").symlink_to(made / "model")
    assert run("fold", "./mymodel") == 0
    out = tmp_path / "mymodel-FlashNorm"
    assert "Already" not in capsys.readouterr().out
    before = state(out)
    assert run("fold", made / "model", "-o", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["already_done"] is True and said["bytes_written"] == 0 and said["output"] == str(out)
    assert run("fold", "mymodel") == 0
    shown = capsys.readouterr()
    assert f"Already done: {out} holds this fold" in shown.out
    assert f"flashnorm verify {out}" in shown.out and shown.err == ""
    assert run("fold", "mymodel", "--final-norm", "keep") == 2
    assert "exists already, and it was folded in another way" in capsys.readouterr().err
    assert run("fold", "mymodel", out, "--output", out) == 2
    assert "named twice" in capsys.readouterr().err
    assert state(out) == before and {p.name for p in tmp_path.iterdir()} == {"mymodel", out.name}


def in_place(path: Path) -> None:
    """One other byte at the end, and the times that it had."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def recorded(root: Path, **changes: object) -> None:
    path = root / "out" / "flashnorm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("change", "hashed", "why"),
    [
        (lambda root: None, True, None),
        (lambda root: None, False, None),
        (lambda root: recorded(root, verify={"verdict": "equivalent"}), True, None),
        (lambda root: recorded(root, source="/elsewhere/model"), True, None),
        (lambda root: (root / "out" / "mine.txt").write_text("of the user"), True, None),
        (lambda root: recorded(root, verify={"verdict": "not equivalent"}), True, "not to be equivalent"),
        (lambda root: recorded(root, tool="flashnorm-cli 0.0.1"), True, "in another way"),
        (lambda root: in_place(shard(root / "model")), True, "from other files"),
        (lambda root: in_place(shard(root / "model")), False, "its source was touched"),
        (lambda root: append(root / "model" / "config.json", "\n"), True, "from other files"),
        (lambda root: (root / "model" / "notes.md").write_text("# notes\n"), True, "its source was touched"),
        (lambda root: (root / "model" / "more.md").write_text("# More\n"), True, "its more.md is missing"),
        (lambda root: in_place(shard(root / "out")), True, "it was touched"),
        (lambda root: os.truncate(shard(root / "out"), 100), True, "is missing or another one"),
        (lambda root: shard(root / "out").unlink(), True, "is missing or another one"),
        (lambda root: (root / "out" / "notes.md").unlink(), True, "its notes.md is missing"),
        (lambda root: append(root / "out" / "config.json", "\n"), True, "its config.json is another one"),
        (lambda root: linked(shard(root / "out")), True, "is missing or another one"),
        (lambda root: piped(root / "out" / "config.json"), True, "config.json is missing or another one"),
    ],
)
def test_what_is_doubted(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], object],
    hashed: bool,
    why: str | None,
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(made, root)
    os.utime(root / "out" / "config.json")  # the copy is finished later than all else of it was written
    time.sleep(0.05)  # clocks of file systems tick every few milliseconds
    monkeypatch.setattr(write, "HASH_UP_TO", write.HASH_UP_TO if hashed else 0)
    change(root)
    checkpoint = open_checkpoint(Source(str(root / "model")))
    record = older_fold(root / "out")
    assert record is not None
    found = not_this_fold(checkpoint, make_plan(checkpoint), "identity", root / "out", record)
    assert (found is None) if why is None else (found is not None and why in found)
