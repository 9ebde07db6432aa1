"""Nothing outside the source gets into an output, nothing is waited for, and what is copied is what was seen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flashnorm_cli.checkpoint import carry
from flashnorm_cli.checkpoint.carry import carry_over, check_names, find_files
from flashnorm_cli.checkpoint.model import Checkpoint, Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.cli import main
from flashnorm_cli.errors import CheckpointError, FlashNormError, FolderError, UsageError
from flashnorm_cli.proof.prompts import read_prompts

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and an index."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("carry") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=False, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.4, 1.8)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / INDEX).exists()
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("hf_token")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file.txt").write_text("theirs")
    return Path(shutil.copytree(source, "model"))


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """A pipe that is opened for reading waits for ever."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr, which is one line at most."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    return int(caught.value.code or 0), err


def opened(model: Path, follow_links: bool = False) -> Checkpoint:
    return open_checkpoint(Source(str(model), follow_links=follow_links))


def moved(model: Path, name: str) -> None:
    """A link instead of the file, to the same content outside."""
    (model / name).rename(f"moved-{name}")
    (model / name).symlink_to(Path.cwd() / f"moved-{name}")


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).symlink_to(target)

    return make


def chain(model: Path) -> None:
    (model / "vocab.txt").symlink_to("inner.txt")
    (model / "inner.txt").symlink_to("../secret")


def through_a_linked_parent(model: Path) -> None:
    """The link itself leads to a file beside it; its folder is a link out of the source."""
    (model / "sub").symlink_to("../elsewhere")


def into_a_similar_name(model: Path) -> None:
    shutil.copytree(model, "model2")
    (model / "x").symlink_to("../model2/config.json")


def into_its_own_git(model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("token")
    (model / "x").symlink_to(".git/config")


# name: what is done, the name in the message, whether --follow-links helps
LINKS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "relative": (link("vocab.txt", "../secret"), "vocab.txt", True),
    "absolute": (lambda m: link("vocab.txt", str(Path.cwd() / "secret"))(m), "vocab.txt", True),
    "in a subfolder": (link("a/vocab.txt", "../../secret"), "a/vocab.txt", True),
    "chain": (chain, "txt", True),
    "folder": (through_a_linked_parent, "sub", True),
    "the parent": (link("up", ".."), "up", True),
    "similar name": (into_a_similar_name, "x", True),
    "proc": (link("vocab.txt", "/proc/self/environ"), "vocab.txt", False),
    "stdin": (link("vocab.txt", "/dev/stdin"), "vocab.txt", False),
    "null": (link("vocab.txt", "/dev/null"), "vocab.txt", False),
    "nowhere": (link("vocab.txt", "missing"), "vocab.txt", False),
    "itself": (link("vocab.txt", "vocab.txt"), "vocab.txt", False),
    "own .git": (into_its_own_git, "x", True),
    "config": (lambda m: moved(m, "config.json"), "config.json", True),
    "index": (lambda m: moved(m, INDEX), INDEX, True),
    "shard": (lambda m: moved(m, "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors", True),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_source_is_refused(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, named, helps = LINKS[name]
    change(model)
    code, err = run(capsys, "fold", "model", "out")
    assert code == 1 and named in err and not Path("out").exists()
    assert ("--follow-links" in err) == (name not in ("nowhere", "itself"))
    if helps:
        target = Path("out")
        found = opened(model, follow_links=True)
        target.mkdir()
        carry_over(found, target)
        copied = {p.relative_to(target).as_posix(): p for p in target.rglob("*") if p.is_file()}
        assert set(copied) == set(found.others)
        assert not any(p.is_symlink() for p in target.rglob("*"))
        assert all(p.read_bytes() == (model / n).read_bytes() for n, p in copied.items())
    else:
        with pytest.raises(FlashNormError, match=named):
            carry_over(opened(model, follow_links=True), Path("out"))


def test_links_within_the_source_are_followed(model: Path) -> None:
    (model / "a").mkdir()
    (model / "a" / "real.txt").write_text("content")
    (model / "vocab.txt").symlink_to("a/real.txt")
    (model / "b").symlink_to("a")
    (model / "a" / "loop").symlink_to("..")
    Path("link to the model").symlink_to(model)
    found = opened(Path("link to the model"))
    assert found.others == ("a/real.txt", "b/real.txt", "generation_config.json", "vocab.txt")
    assert [(e.name, e.reason) for e in found.left_out] == [
        (name, "a link to a folder that it lies in") for name in ("a/loop", "b/loop")
    ]
    Path("out").mkdir()
    carry_over(found, Path("out"))
    assert Path("out/b/real.txt").read_text() == "content" == Path("out/vocab.txt").read_text()


def test_links_to_folders_do_not_multiply_without_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for a in range(8):
        (model / f"d{a}").mkdir()
        for b in range(8):
            (model / f"d{a}" / f"l{b}").symlink_to(f"../d{b}")
    monkeypatch.setattr(carry, "MOST_BEHIND_LINKS", 5_000)
    with pytest.raises(CheckpointError, match="more than 5,000 files lie behind links"):
        opened(model)


HASH = "a" * 40


def cache(place: Path, model: Path) -> Path:
    """The Hub cache's layout: a snapshot of links into its repository's blobs."""
    snapshot = place / "models--a--b" / "snapshots" / "1234"
    shutil.copytree(model, snapshot)
    blobs = place / "models--a--b" / "blobs"
    blobs.mkdir()
    (blobs / HASH).write_text("a blob")
    (snapshot / "vocab.txt").symlink_to(f"../../blobs/{HASH}")
    return snapshot


def test_blobs_of_the_hub_cache_are_followed(model: Path) -> None:
    snapshot = cache(Path("hub"), model)
    assert "vocab.txt" in opened(snapshot).others
    shared = Path("hub/blobs/bb") / ("b" * 64)  # huggingface_hub 2.4 shares blobs between repositories
    shared.parent.mkdir(parents=True)
    shared.write_text("shared")
    (snapshot / "../../blobs" / ("c" * 64)).symlink_to(f"../../blobs/bb/{'b' * 64}")
    (snapshot / "big.txt").symlink_to(f"../../blobs/{'c' * 64}")
    assert "big.txt" in opened(snapshot).others


@pytest.mark.parametrize("name", ["another repository", "no hash", "a blob that is a link", "blobs are a link"])
def test_what_only_looks_like_a_blob_is_refused(model: Path, name: str) -> None:
    snapshot = cache(Path("hub"), model)
    if name == "another repository":
        cache(Path("other"), model)
        (snapshot / "x").symlink_to(Path.cwd() / "other/models--a--b/blobs" / HASH)
    elif name == "no hash":
        (snapshot / "../../blobs/notes").write_text("x")
        (snapshot / "x").symlink_to("../../blobs/notes")
    elif name == "a blob that is a link":
        (snapshot / "../../blobs" / ("d" * 40)).symlink_to(Path.cwd() / "secret")
        (snapshot / "x").symlink_to(f"../../blobs/{'d' * 40}")
    else:
        (snapshot / "../../blobs").rename("theirs")
        (snapshot / "../../blobs").resolve().symlink_to(Path.cwd() / "theirs")
    with pytest.raises(FolderError, match="out of the folder"):
        opened(snapshot)


# ---- pipes, sockets, devices -----------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


def socket_at(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json", "a/b.bin", "flashnorm.json"]
)
def test_a_pipe_is_named_and_not_opened(model: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    pipe(model / name)
    for command in (("fold", "model", "out"), ("plan", "model"), ("verify", "model", "--source", "model")):
        code, err = run(capsys, *command)
        assert code == 1 and f"model/{name}: is a named pipe" in err, command
    assert not Path("out").exists()


def test_a_socket_and_a_device_are_named(model: Path) -> None:
    socket_at(model / "s")
    with pytest.raises(FolderError, match=r"model/s: is a socket"):
        opened(model)
    (model / "s").unlink()
    if os.geteuid() == 0:
        os.mknod(model / "zero.bin", stat.S_IFCHR | 0o600, os.makedev(1, 5))
        with pytest.raises(FolderError, match=r"zero\.bin: is a device"):
            opened(model)


def test_pipes_elsewhere_are_not_waited_for(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    pipe(adapter / "adapter_config.json")
    code, err = run(capsys, "fold-adapter", "adapter", "out", "--base", "model")
    assert code == 1 and "adapter" in err
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").write_text("{}")
    pipe(adapter / "adapter_model.safetensors")
    code, err = run(capsys, "fold-adapter", "adapter", "out", "--base", "model")
    assert code == 1 and "adapter_model.safetensors" in err


def test_a_pipe_as_text_or_ids_is_not_waited_for(model: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model)
    pipe(Path("text"))
    for text, ids in ((Path("text"), None), (None, Path("text"))):
        with pytest.raises(UsageError, match=r"text: cannot be read as .*is a named pipe"):
            read_prompts(opened(model), text, ids, False)


# ---- folders, names, modes, races ------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
from pathlib import Path
from flashnorm_cli.checkpoint.carry import find_files
if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)
try: print(sorted(find_files(Path(sys.argv[1])).files))
except Exception as error: print(type(error).__name__, error)
"""


def test_a_subfolder_that_cannot_be_listed_is_named() -> None:
    """As another user, since root lists everything."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        closed = Path(place, "model", "closed")
        closed.mkdir(parents=True)
        (closed / "vocab.txt").write_text("x")
        for folder in (Path(place), closed.parent):
            folder.chmod(0o755)
        said = {}
        for mode in (0o755, 0o644, 0o311, 0):
            closed.chmod(mode)
            command = [sys.executable, "-c", AS_NOBODY, str(closed.parent)]
            said[mode] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        closed.chmod(0o755)
    assert said[0o755] == "['closed/vocab.txt']\n"
    assert "closed/vocab.txt: cannot be read: Permission denied" in said[0o644]
    assert "closed: cannot be listed: Permission denied" in said[0] and said[0] == said[0o311]


def test_many_files_deep_folders_and_odd_names(model: Path) -> None:
    deep = model.joinpath(*["deep"] * 200)
    deep.mkdir(parents=True)
    names = [b"line\nbreak.txt", b"latin-\xe9.txt", b"escape-\x1b[31m.txt", "模型.txt".encode(), b"-rf", b"[a-z]*.txt"]
    for name in names:
        (model / os.fsdecode(name)).write_bytes(name)
    (deep / "x.txt").write_text("deep")
    many = model / "many"
    many.mkdir()
    for n in range(2_000):
        (many / str(n)).touch()
    found = opened(model)
    assert len(found.others) == 2_000 + len(names) + 2
    Path("out").mkdir()
    carry_over(found, Path("out"))
    for name in names:
        assert Path("out", os.fsdecode(name)).read_bytes() == name
    assert Path("out", *["deep"] * 200, "x.txt").read_text() == "deep"
    json.dumps(found.others).encode()  # as the record has it


def test_permissions_are_those_of_cp(model: Path) -> None:
    modes = {"a.sh": 0o755, "private.txt": 0o600, "read.txt": 0o444, "all.txt": 0o666, "setuid": 0o4755}
    for name, mode in modes.items():
        (model / name).write_text(name)
        (model / name).chmod(mode)
    Path("out").mkdir()
    old = os.umask(0o027)
    try:
        carry_over(opened(model), Path("out"))
    finally:
        os.umask(old)
    for name, mode in modes.items():
        assert stat.S_IMODE(Path("out", name).stat().st_mode) == mode & 0o777 & ~0o027, name


def test_a_file_that_ends_too_early_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A false end of file: in the kernel's copy, and in plain reads after it."""
    (model / "tokenizer.json").write_bytes(bytes(5_000_000))
    found = opened(model)
    copy, read = os.copy_file_range, os.read
    Path("out").mkdir()

    def short(a: int, b: int, n: int) -> int:
        return copy(a, b, min(n, 1000)) if os.lseek(a, 0, os.SEEK_CUR) == 0 else 0

    monkeypatch.setattr(os, "copy_file_range", short)
    carry_over(found, Path("out"))  # the rest is read
    assert Path("out/tokenizer.json").read_bytes() == bytes(5_000_000)
    monkeypatch.setattr(os, "read", lambda fd, n: read(fd, min(n, 7)) if os.lseek(fd, 0, os.SEEK_CUR) < 2_000 else b"")
    with pytest.raises(FlashNormError, match=r"tokenizer.json: only 2,\d\d\d of its 5,000,000 bytes could be read"):
        carry_over(found, Path("out"))


@pytest.mark.parametrize("change", ["another file", "a link out", "written to", "gone", "a pipe", "a linked parent"])
def test_a_file_that_is_exchanged_after_the_look_is_not_copied(model: Path, change: str) -> None:
    (model / "sub").mkdir()
    path = model / "sub" / "vocab.txt"
    path.write_text("seen")
    found = opened(model)
    if change == "another file":
        Path("other").write_text("new!")
        Path("other").rename(path)
    elif change == "a link out":
        path.unlink()
        path.symlink_to(Path.cwd() / "secret")
    elif change == "written to":
        path.write_text("changed, and longer")
    elif change == "gone":
        path.unlink()
    elif change == "a pipe":
        pipe(path)
    else:  # the very file that was seen, now reached by a link out of the source
        (model / "sub").rename("outside")
        (model / "sub").symlink_to(Path.cwd() / "outside")
    Path("out").mkdir()
    with pytest.raises(FlashNormError, match=r"sub/vocab.txt: (was changed|cannot be read|is a named pipe)"):
        carry_over(found, Path("out"))
    assert not Path("out/sub/vocab.txt").exists()


def test_a_link_in_the_output_is_not_written_through(model: Path) -> None:
    (model / "vocab.txt").write_text("new")
    Path("out").mkdir()
    Path("out/vocab.txt").symlink_to("../secret")
    carry_over(opened(model), Path("out"))
    assert Path("secret").read_text() == "hf_token" and not Path("out/vocab.txt").is_symlink()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("b" * 250, r"too long by \d+ bytes: .*\.bbbbbbbbb\.\.\.\.partial lies beside it"),
        ("模型" * 42, "too long by"),
        ("b" * 300, "too long by"),
        ("/".join(["d" * 200] * 25), "too long"),
    ],
)
def test_a_name_that_is_too_long_is_said_before_the_trace(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str, words: str
) -> None:
    monkeypatch.setattr("flashnorm_cli.folding.planning.plan_checkpoint", lambda *_: pytest.fail("it was traced"))
    code, err = run(capsys, "fold", "model", output)
    assert code == 2
    with pytest.raises(UsageError, match=words):
        check_names(Path(output), ())
    assert err == f"flashnorm: {err[len('flashnorm: ') :]}"


def test_git_and_cache_folders_stay_and_are_not_entered(model: Path) -> None:
    for name in (".git", ".cache"):
        (model / name).mkdir()
        pipe(model / name / "pipe")
    assert ".git/pipe" not in find_files(model).files
    assert opened(model).others == ("generation_config.json",)
