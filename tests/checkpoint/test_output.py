"""What work folders, outputs and small files do with what is there already: links, pipes, other people's folders."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flashnorm_cli.checkpoint import disk
from flashnorm_cli.checkpoint.leftover import leftover, leftovers
from flashnorm_cli.checkpoint.output import check_output, flush, not_an_output, work_folder, write_text
from flashnorm_cli.checkpoint.work import INSIDE, JOURNAL, MARK_FILE, REPLACED, partial_folder
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError

FOLDED = '{"flashnorm_folded": true, "flashnorm": {"format": 1}}'
SHARD = "model.safetensors"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Somebody's files, in a folder and behind every name that an attack could want."""
    folder = tmp_path / "victim"
    for name in ("letter.txt", "checkpoint/letter.txt", "journal", "README", "flushed.json", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    return folder


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder, with its kind and mode, and its content or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink()).encode()
        else:
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[path.relative_to(folder).as_posix()] = (status.st_mode, content)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(target: Path, fingerprint: str = "1", finished: str = SHARD) -> Path:
    """The work folder of a fold that was killed with one finished shard."""
    with pytest.raises(KeyboardInterrupt), work_folder(target, fingerprint, [finished], source="model") as work:
        (work.inside / finished).write_text("finished")
        write_text(work.path / "flushed.json", "{}")
        raise KeyboardInterrupt
    return partial_folder(target)


def link_to_folder(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim)


def link_to_nothing(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim / "nothing")


def unrelated(partial: Path, victim: Path) -> None:
    victim.rename(partial)


def unrelated_with_a_journal(partial: Path, victim: Path) -> None:
    partial.mkdir()
    (partial / JOURNAL).write_text("f" * 64)
    (partial / "letter.txt").write_text("precious")


def unrelated_with_an_empty_journal(partial: Path, victim: Path) -> None:
    partial.mkdir()
    (partial / JOURNAL).touch()
    (partial / "letter.txt").write_text("precious")


def a_diary(partial: Path, victim: Path) -> None:
    """A folder whose only file is called journal."""
    partial.mkdir()
    (partial / JOURNAL).write_text("Dear diary")


def a_file(partial: Path, victim: Path) -> None:
    partial.write_text("precious")


def a_pipe(partial: Path, victim: Path) -> None:
    os.mkfifo(partial)


def a_socket(partial: Path, victim: Path) -> None:
    here = Path.cwd()
    os.chdir(partial.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(partial.name)
    finally:
        os.chdir(here)


def linked_inside(name: str) -> Callable[[Path, Path], None]:
    def plant(partial: Path, victim: Path) -> None:
        killed(partial.with_name(partial.name[1:].removesuffix(".partial")))
        disk_remove(partial / name)
        (partial / name).symlink_to(victim / name)

    plant.__name__ = f"link_as_{name}"
    return plant


def hard_linked(name: str) -> Callable[[Path, Path], None]:
    def plant(partial: Path, victim: Path) -> None:
        killed(partial.with_name(partial.name[1:].removesuffix(".partial")))
        disk_remove(partial / name)
        os.link(victim / name, partial / name)

    plant.__name__ = f"hard_link_as_{name}"
    return plant


def pipe_as_journal(partial: Path, victim: Path) -> None:
    killed(partial.with_name(partial.name[1:].removesuffix(".partial")))
    (partial / JOURNAL).unlink()
    os.mkfifo(partial / JOURNAL)


def disk_remove(path: Path) -> None:
    folder = disk.open_folder(path.parent)
    disk.remove(path.name, folder)
    os.close(folder)


ATTACKS = [
    link_to_folder,
    link_to_nothing,
    unrelated,
    unrelated_with_a_journal,
    unrelated_with_an_empty_journal,
    a_diary,
    a_file,
    a_pipe,
    a_socket,
    linked_inside("checkpoint"),
    linked_inside("journal"),
    linked_inside("README"),
    hard_linked("journal"),
    hard_linked("README"),
    pipe_as_journal,
]


@pytest.mark.parametrize("plant", ATTACKS, ids=lambda plant: plant.__name__)
def test_what_is_not_ours_is_not_touched(tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None]) -> None:
    """Refused in one line, before the work and, for what appears in between, when it would begin; nothing changes."""
    target = tmp_path / "out"
    partial = partial_folder(target)
    plant(partial, victim)
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"\.out\.partial: .* move or remove it$") as early:
        check_output(target, False, tmp_path / "source")
    with pytest.raises(UsageError, match=r"\.out\.partial: .* move or remove it$"), work_folder(target, "1", [SHARD]):
        pytest.fail("it began to work there")
    assert "\n" not in str(early.value)
    assert leftover(target) is None
    assert everything(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["", JOURNAL, MARK_FILE, INSIDE])
def test_what_belongs_to_another_user_is_not_touched(tmp_path: Path, what: str) -> None:
    partial = killed(tmp_path / "out")
    os.chown(partial / what, 12345, 12345)
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="move or remove it"):
        check_output(tmp_path / "out", False, tmp_path / "source")
    with pytest.raises(UsageError, match="move or remove it"), work_folder(tmp_path / "out", "1", [SHARD]):
        pass
    assert everything(tmp_path) == before


def test_links_in_our_own_folder_are_removed_and_not_followed(tmp_path: Path, victim: Path) -> None:
    partial = killed(tmp_path / "out")
    before = everything(victim)
    for name in ("flushed.json", "letter", "checkpoint/config.json"):
        disk_remove(partial / name) if (partial / name).exists() else None
        (partial / name).symlink_to(victim / "letter.txt")
    (partial / "checkpoint" / "more").symlink_to(victim)
    os.link(victim / "letter.txt", partial / "checkpoint" / "hard")
    with work_folder(tmp_path / "out", "1", [SHARD, "config.json"]) as work:
        assert [p.name for p in work.inside.iterdir()] == [SHARD]
        assert not (work.path / "flushed.json").is_symlink()
    assert everything(victim) == before
    assert not partial.exists()


def test_a_swap_between_look_and_use(tmp_path: Path, victim: Path) -> None:
    """The path leads to the victim as soon as the work has begun: it is noticed, and nothing there is removed."""
    before = everything(victim)
    target = tmp_path / "out"
    with pytest.raises(FlashNormError, match="moved or replaced"), work_folder(target, "1", [SHARD]) as work:
        work.path.rename(tmp_path / "aside")
        work.path.symlink_to(victim)
        work.check()
    assert everything(victim) == before
    with pytest.raises(FlashNormError, match="moved or replaced"), work_folder(tmp_path / "b", "1", []) as work:
        work.path.rename(tmp_path / "aside2")
        victim.rename(work.path)
        work.publish(False, not_an_output)
    assert everything(partial_folder(tmp_path / "b")) == before


def test_something_mounted_is_not_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = killed(tmp_path / "out")
    (partial / "mounted").mkdir()
    (partial / "mounted" / "letter").write_text("precious")
    inode = (partial / "mounted").stat().st_ino
    real = disk.mount_of
    monkeypatch.setattr(disk, "mount_of", lambda fd: "other" if os.fstat(fd).st_ino == inode else real(fd))
    with pytest.raises(FlashNormError, match="mounted on it"), work_folder(tmp_path / "out", "2", []):
        pass
    assert (partial / "mounted" / "letter").read_text() == "precious"


def test_half_made_work_folders_are_taken_over(tmp_path: Path) -> None:
    """Killed at any step of making it: nothing is lost by going on in it."""
    for made in ([], [JOURNAL], [JOURNAL, MARK_FILE]):
        partial = partial_folder(tmp_path / "out")
        partial.mkdir()
        for name in made:
            (partial / name).touch()
        check_output(tmp_path / "out", False, tmp_path / "source")
        with work_folder(tmp_path / "out", "1", []):
            pass
        assert not partial.exists()


# ---- the output's name -----------------------------------------------------------------------------------------------


def refused(words: str, output: Path, *sources: Path, overwrite: bool = True) -> None:
    with pytest.raises(UsageError, match=words):
        check_output(output, overwrite, *sources)


def test_source_against_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output and its work folder, through links and dots, either way round."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "config.json").write_text(FOLDED)
    (tmp_path / "way").symlink_to(tmp_path)
    for output in (
        "model",
        "model/",
        "model/.",
        "model/../model",
        "way/model",
        "model/deep/../x",
        "model/x",
        "way/model/x",
    ):
        refused("overlaps", Path(output), source)
    refused("overlaps", tmp_path, source / "deep")
    refused("overlaps", Path(".."), source)
    (tmp_path / ".out.partial").mkdir()
    for inner in (tmp_path / ".out.partial", tmp_path / "way" / ".out.partial" / "checkpoint"):
        inner.mkdir(exist_ok=True)
        refused("overlaps", Path("out"), inner)
    (tmp_path / "linked").symlink_to(source)
    refused("overlaps", Path("model"), tmp_path / "linked")
    refused("is a symbolic link", Path("linked"), tmp_path / "other")
    assert check_output(Path("a/../out2/"), False, source) == tmp_path / "out2"
    assert check_output(Path("way/out2"), False, source).resolve() == tmp_path / "out2"
    refused("cannot be an output folder|mounted", Path("/"), tmp_path / "none" / "x")
    refused("work folder of another output", Path(".out.partial/x"), source)
    refused("File name too long", Path("x" * 250), source)
    refused(".", Path("~no-such-user-here/out"), source)


def test_a_source_of_links_into_the_output(tmp_path: Path) -> None:
    """A source whose shards are links to where the output would replace them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(FOLDED)
    (out / SHARD).write_text("precious")
    source = tmp_path / "model"
    source.mkdir()
    (source / SHARD).symlink_to(out / SHARD)
    refused("overlaps", out, source)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"log.txt": "x"}, "is not a checkpoint"),
        ({"config.json": '{"architectures": ["LlamaForCausalLM"]}', SHARD: "x"}, "not one that flashnorm has folded"),
        ({"config.json": "{", "log": "x"}, "cannot be read"),
        ({"config.json": "[" * 100_000}, "cannot be read"),
        ({"config.json": "[]"}, "cannot be read"),
        ({"flashnorm.json": '{"format": 1, "tool": "flashnorm-cli", "norms": []}'}, "is not a checkpoint"),
        ({"config.json": '{"flashnorm_folded": false}'}, "not one that flashnorm has folded"),
    ],
)
def test_only_what_flashnorm_wrote_is_overwritten(tmp_path: Path, files: dict[str, str], words: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    before = everything(tmp_path)
    refused(f"{words}.* so it will not be overwritten", out, tmp_path / "model")
    assert everything(tmp_path) == before


def output(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(FOLDED)
    (folder / "text").write_text(text)
    return folder


def write_new(target: Path, overwrite: bool, before_publishing: Callable[[], None] = lambda: None) -> None:
    with work_folder(target, "1", ["text"]) as work:
        (work.inside / "config.json").write_text(FOLDED)
        (work.inside / "text").write_text("new")
        flush(work, 1)
        before_publishing()
        work.publish(overwrite, not_an_output)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_the_older_output_is_replaced_as_a_whole(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(disk, "exchange", lambda *_: False)
    out = output(tmp_path / "out", "old")
    write_new(out, overwrite=True)
    assert (out / "text").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=str)
def test_a_replacement_that_fails_leaves_the_older_output(
    tmp_path: Path, exchange: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = output(tmp_path / "out", "old")

    def fail(*_: object) -> bool:
        raise error

    real, calls = os.rename, []

    def fail_once(a: str, b: str, **more: int) -> None:
        calls.append(a)
        if len(calls) == 3:  # the first finds the older output, the second puts it aside
            raise error
        real(a, b, **more)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "exchange", fail if exchange else lambda *_: False)
        if not exchange:
            patch.setattr(os, "rename", fail_once)
        with pytest.raises((FlashNormError, KeyboardInterrupt)):
            write_new(out, overwrite=True)
    assert (out / "text").read_text() == "old"
    write_new(out, overwrite=True)
    assert (out / "text").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """Where folders cannot change places: the older output is named, and put back by the next fold."""
    partial = killed(tmp_path / "out")
    output(partial / REPLACED, "old")
    assert "is the older out" in (leftover(tmp_path / "out") or "")
    with pytest.raises(FlashNormError, match="exists already"):
        write_new(tmp_path / "out", overwrite=False)
    assert (tmp_path / "out" / "text").read_text() == "old"


def test_killed_after_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older output lies where finished shards would: it is not taken for them."""
    out = output(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        patch.setattr("flashnorm_cli.checkpoint.work.WorkFolder.remove", lambda self: None)
        write_new(out, overwrite=True)
    assert (partial_folder(out) / INSIDE / "text").read_text() == "old"
    with work_folder(out, "1", ["text"]) as work:
        assert names(work.inside) == []
    assert (out / "text").read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_appears_meanwhile_is_left_alone(tmp_path: Path, overwrite: bool, what: str, victim: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        if what == "folder":
            out.mkdir()
            (out / "letter").write_text("precious")
        elif what == "file":
            out.write_text("precious")
        else:
            out.symlink_to(victim)

    with pytest.raises(FlashNormError, match=r"appeared while|was replaced while"):
        write_new(out, overwrite, appear)
    text = {"folder": out / "letter", "file": out, "link": victim / "letter.txt"}[what].read_text()
    assert text.startswith("precious")
    assert out.is_symlink() == (what == "link")
    assert (partial_folder(out) / INSIDE / "text").read_text() == "new"  # the work is not lost
    disk_remove(out)
    write_new(out, overwrite)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert check_output(tmp_path / "out", False, tmp_path / "model") == tmp_path / "out"
    write_new(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == ["out"]


def test_three_at_once(tmp_path: Path) -> None:
    """One holds the folder, the others are told so; and the one wins."""
    barrier, results = threading.Barrier(3), []

    def run(number: int) -> None:
        barrier.wait()
        try:
            with work_folder(tmp_path / "out", str(number), []) as work:
                threading.Event().wait(1)
                (work.inside / "text").write_text(str(number))
                work.publish(False, not_an_output)
            results.append("done")
        except FlashNormError as error:
            results.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results.count("done") == 1
    assert sum("another fold is writing it right now" in said for said in results) == 2
    assert names(tmp_path) == ["out"]


def test_a_disk_that_lost_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an fsync that failed nothing counts as finished: the system has forgotten what it could not write."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        pytest.raises(FlashNormError, match="out: Input/output error"),
        work_folder(tmp_path / "out", "1", [SHARD]) as work,
    ):
        (work.inside / SHARD).write_text("x")
        monkeypatch.setattr(os, "fsync", broken)
        flush(work, 1)
    monkeypatch.undo()
    with work_folder(tmp_path / "out", "1", [SHARD]) as work:
        assert names(work.inside) == []


def test_a_cleanup_that_failed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(disk, "remove", busy)
    with work_folder(tmp_path / "out", "1", []) as work:
        pass
    assert [f"{work.path} could not be removed (Device or resource busy); remove it by hand"] == work.notes
    said = r"the reason; .*partial could not be removed"
    with pytest.raises(CheckpointError, match=said), work_folder(tmp_path / "b", "1", []):
        raise CheckpointError("the reason")


# ---- what is left is named -------------------------------------------------------------------------------------------


def test_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the output's name and by the source's, with size and what to do; what another process works in as such."""
    monkeypatch.chdir(tmp_path)
    assert leftovers(Path("out"), "model") == []
    partial = killed(tmp_path / "out")
    (partial / "checkpoint" / SHARD).write_bytes(b"x" * 123_456)
    size = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    (said,) = leftovers(Path("out"), "other")
    assert said.startswith(f"{partial} ({size:,} bytes) is what an unfinished fold of model has left: ")
    assert "run again, goes on with it" in said
    assert said.endswith(f"rm -r {partial}")
    assert leftovers(None, "model") == leftovers(Path("else"), "model") == [said]
    assert leftovers(None, "other") == []
    with work_folder(tmp_path / "out", "1", [SHARD]):
        assert "a fold that runs right now" in leftovers(Path("out"), "model")[0]


# ---- small files -----------------------------------------------------------------------------------------------------


def test_write_text_follows_no_link(tmp_path: Path) -> None:
    """Neither the one that has the file's name, nor one that waits under a name that a temporary file could have."""
    secret = tmp_path / "bashrc"
    secret.write_text("precious")
    folder = tmp_path / "folded"
    folder.mkdir()
    for name in ("flashnorm.json", "flashnorm.json.part", ".flashnorm.json.part", "flashnorm.json.tmp"):
        (folder / name).symlink_to(secret)
    write_text(folder / "flashnorm.json", "new")
    assert secret.read_text() == "precious"
    assert not (folder / "flashnorm.json").is_symlink()
    assert (folder / "flashnorm.json").read_text() == "new"
    assert (folder / "flashnorm.json.part").is_symlink()


def test_write_text_keeps_modes_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "x")
    finally:
        os.umask(old)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    write_text(tmp_path / "secret", "y")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "secret")] == [0o640, 0o600]

    for name in ("fsync", "close", "rename", "write"):
        with monkeypatch.context() as patch:
            real = getattr(os, name)

            def broken(*args: object, real: Callable[..., object] = real, **more: object) -> None:
                if real is os.close or real.__name__ == "close":
                    real(*args)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(os, name, broken)
            with pytest.raises(OSError, match="No space left"):
                write_text(tmp_path / "secret", "z")
        assert (tmp_path / "secret").read_text() == "y"
        assert names(tmp_path) == ["new", "secret"], name


@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe", "link to nothing"])
def test_write_text_replaces_only_files_and_links_to_them(tmp_path: Path, what: str) -> None:
    path = tmp_path / "path"
    if what == "folder":
        path.mkdir()
    elif what == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if what != "pipe" else (tmp_path / "pipe").rename(path)
    if what == "link to nothing":
        write_text(path, "x")
        assert names(tmp_path) == ["path"]
        return
    with pytest.raises(OSError, match="not a file"):
        write_text(path, "x")
