"""Folds whose files are changed under them, and folds that meet what others have left: nothing is lost or mixed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from command_line import run
from families import build, randomize_gains, save

from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.work import partial_folder
from flashnorm_cli.errors import CheckpointError, FlashNormError
from flashnorm_cli.folding.fold import fold


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A source of several shards, and the files of its fold."""
    folder = tmp_path_factory.mktemp("made")
    model = build("llama", seed=0)
    randomize_gains(model, seed=1)
    save(model, folder / "model", torch.bfloat16, "20KB")
    return folder / "model", files_of(fold(folder / "model", folder / "out").output)


@pytest.fixture
def source(made: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "model")


@pytest.fixture
def expected(made: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    return made[1]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def during(share: float, act: Callable[[], None]) -> Callable[[int, int, str], None]:
    """For on_progress: act once, when so much of the shards is written."""
    done = []

    def report(written: int, total: int, what: str) -> None:
        if total and written >= share * total and not done:
            done.append(True)
            act()

    return report


def stop() -> None:
    raise KeyboardInterrupt


def interrupted(source: Path, out: Path, share: float = 0.6) -> list[str]:
    """A fold that was stopped; returns its finished shards."""
    with pytest.raises(KeyboardInterrupt):
        fold(source, out, on_progress=during(share, stop))
    found = sorted(p.name for p in (partial_folder(out) / "checkpoint").iterdir())
    assert len(found) > 1
    return found


# ---- the source changes under the fold -------------------------------------------------------------------------------


def rewrite(path: Path, place: int | None = None) -> None:
    """Other values in place, the header, size and time as they were."""
    status, header = path.stat(), read_header(path)
    with path.open("r+b") as file:
        file.seek(header.data_start if place is None else place)
        file.write(b"\x01\x3f" * 8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file with the same header, size and time under the name."""
    status = path.stat()
    shutil.copyfile(path, path.with_name("other"))
    rewrite(path.with_name("other"))
    path.with_name("other").replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_header(path: Path) -> None:
    status = path.stat()
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"format":"pt"', b'"format":"tp"', 1))
    assert path.read_bytes() != raw
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "which", "share"),
    [
        *((rewrite, which, share) for which in (0, -1) for share in (0.0, 0.5, 1.0)),
        *((change, which, 0.5) for which in (0, -1) for change in (replace, change_header)),
        (Path.unlink, -1, 0.5),
        (os.truncate, -1, 0.5),
    ],
)
def test_a_shard_that_changes_is_no_mixed_fold(
    source: Path, tmp_path: Path, change: Callable[..., object], which: int, share: float
) -> None:
    """Before it is read, while others are written, and after it was: refused with its name, and no output."""
    path = shards(source)[which]
    act = (lambda: os.truncate(path, 100)) if change is os.truncate else (lambda: change(path))
    with pytest.raises((CheckpointError, FlashNormError), match=r"model"):
        fold(source, tmp_path / "out", on_progress=during(share, act))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_is_left_alone(source: Path, tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "letter").write_text("precious")

    with pytest.raises(FlashNormError, match=r"appeared while|was replaced while"):
        fold(source, out, overwrite=overwrite, on_progress=during(0.5, appear))
    assert files_of(out) == {"letter": b"precious"}
    shutil.rmtree(out)
    assert len(fold(source, out).resumed) == len(shards(source))  # the work was not lost


def test_three_folds_at_once(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """One wins, the others say so."""

    def one(_: int) -> str:
        try:
            done = fold(source, tmp_path / "out", workers=1)
        except FlashNormError as error:
            return str(error)
        return "already done" if done.already_done else "done"

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(one, range(3)))
    assert said.count("done") == 1
    late = ("another fold", "exists already", "already done")
    assert sum(any(words in each for words in late) for each in said) == 2
    assert {n: d for n, d in files_of(tmp_path / "out").items() if n != "flashnorm.json"} == {
        n: d for n, d in expected.items() if n != "flashnorm.json"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


# ---- going on --------------------------------------------------------------------------------------------------------


def cut(partial: Path, first: Path) -> None:
    os.truncate(first, first.stat().st_size - 1)


def zeros(partial: Path, first: Path) -> None:
    """As a power loss leaves files: the size is right."""
    first.write_bytes(bytes(first.stat().st_size))


def another_header(partial: Path, first: Path) -> None:
    change_header(first)


def as_a_link(partial: Path, first: Path) -> None:
    first.rename(partial.with_name("elsewhere"))
    first.symlink_to(partial.with_name("elsewhere"))


def as_a_folder(partial: Path, first: Path) -> None:
    first.unlink()
    first.mkdir()
    (first / "x").touch()


def list_of_finished(text: str) -> Callable[[Path, Path], None]:
    def write(partial: Path, first: Path) -> None:
        (partial / "flushed.json").write_text(text)

    return write


def no_list_of_finished(partial: Path, first: Path) -> None:
    (partial / "flushed.json").unlink()


TAMPERED = {
    "cut": cut,
    "zeros": zeros,
    "another header": another_header,
    "a link": as_a_link,
    "a folder": as_a_folder,
    "no list": no_list_of_finished,
    "list cut": list_of_finished('{"model-00001'),
    "list deep": list_of_finished("[" * 100_000),
    "list of other things": list_of_finished('{"model-00001-of-00005.safetensors": {"x": "y"}}'),
    "list a list": list_of_finished("[1]"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_finished_shard_is_not_believed_by_its_name(
    source: Path, expected: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    finished = interrupted(source, tmp_path / "out")
    partial = partial_folder(tmp_path / "out")
    TAMPERED[how](partial, partial / "checkpoint" / finished[0])
    result = fold(source, tmp_path / "out")
    assert finished[0] not in result.resumed
    found = {name: data for name, data in files_of(tmp_path / "out").items() if name != "flashnorm.json"}
    assert found == {name: data for name, data in expected.items() if name != "flashnorm.json"}


def test_a_source_that_was_changed_with_its_old_time(source: Path, tmp_path: Path) -> None:
    """Between two runs; the finished shard holds the old values."""
    interrupted(source, tmp_path / "out")
    rewrite(shards(source)[0])
    assert fold(source, tmp_path / "out").resumed == ()
    fold(source, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


# ---- the command line ------------------------------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("what", ["an unfolded model", "a log folder", "the shards of a model"])
def test_overwrite_replaces_only_folds(
    source: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if what == "a log folder":
        out.mkdir()
        (out / "run.log").write_text("precious")
        (out / "flashnorm.json").write_text(json.dumps({"tool": "flashnorm-cli", "norms": []}))
    else:
        shutil.copytree(source, out)
    if what == "the shards of a model":
        (out / "config.json").unlink()
    before = files_of(out)
    assert run("fold", source, out, "--overwrite", "--quiet") == 2
    assert "will not be overwritten" in one_line(capsys)
    assert files_of(out) == before


def test_the_source_by_a_name_of_the_work(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(source)
    for name in (".out.partial", ".out.old"):
        inner = source.rename(tmp_path / name)
        code = run("fold", inner, tmp_path / "out", "--quiet")
        assert code == (2 if name == ".out.partial" else 0)
        capsys.readouterr()
        assert files_of(inner) == before
        inner.rename(source)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_an_unrelated_old_folder_stays(source: Path, tmp_path: Path) -> None:
    """What other versions called their older outputs."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "letter").write_text("precious")
    for _ in range(2):
        assert run("fold", source, tmp_path / "out", "--overwrite", "--quiet") == 0
    assert files_of(tmp_path / ".out.old") == {"letter": b"precious"}


def test_what_is_left_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plan and verify of the source and of the output, with its size and what to do; not by others, nor --quiet."""
    monkeypatch.chdir(tmp_path)
    out, folded = tmp_path / "out", tmp_path / "folded"
    fold(source, folded)
    interrupted(source, out)
    partial = partial_folder(out)
    capsys.readouterr()
    assert run("plan", source) == 0
    assert f"note: {partial} (" in (said := one_line(capsys))
    assert "rm -r" in said
    assert run("plan", source, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("verify", out, "--source", source, "--level", "weights") == 1
    assert "its fold is not finished" in one_line(capsys)
    assert run("verify", folded, "--source", source, "--level", "weights") in (0, 4)
    assert f"note: {partial} (" in one_line(capsys)
    assert run("push-to-hub", out, "me/x", "--dry-run") == 1
    assert "its fold is not finished" in one_line(capsys)
    # A leftover beside a whole fold does not make that unfinished.
    partial.rename(tmp_path / ".folded.partial")
    assert run("push-to-hub", folded, "me/x", "--dry-run", "--unverified") == 0  # level weights runs nothing
    assert f"note: {tmp_path / '.folded.partial'} (" in one_line(capsys)
