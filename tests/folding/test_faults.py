"""File calls that fail: at any call of a fold, a fold that overwrites, a verify and a push, in several ways.

tests/support/faults.c is compiled and preloaded into the process that all runs are forked from. A run is disturbed at
one call on a watched path: killed before or after it, given an error once or from then on, or half of what it asked
for. Afterwards the source and everything else that is not the run's own must be as it was, the output's name must hold
nothing, the older output or the new one, the message must be one line, and a second run must give the bytes of an
undisturbed one.

A sample is run; FLASHNORM_FAULTS=all runs every fault, FLASHNORM_FAULTS=500 so many per command, and
FLASHNORM_FAULTS_SEED chooses others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from transformers import LlamaConfig, LlamaForCausalLM
from zygote import Zygote

import flashnorm_cli

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc"),
]

SHIM = Path(__file__).parents[1] / "support" / "faults.c"
SAMPLE = os.environ.get("FLASHNORM_FAULTS", "4")  # runs per command
SEED = os.environ.get("FLASHNORM_FAULTS_SEED")
TOKEN = "hf_writer"
AS_PLANNED = 4  # level weights alone has run no model
COUNT, KILL, ERROR_ONCE, ERROR_FOR_GOOD, SHORT, KILL_AFTER = range(6)
WAYS = [
    (KILL, 0),
    (KILL_AFTER, 0),
    (ERROR_ONCE, errno.EIO),
    (ERROR_ONCE, errno.ENOSPC),
    (ERROR_ONCE, errno.EACCES),
    (ERROR_FOR_GOOD, errno.EIO),
    (ERROR_FOR_GOOD, errno.ENOSPC),
    (SHORT, 0),
]


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with its kind, mode and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        found[path.relative_to(folder).as_posix()] = f"{status.st_mode:o} {content}"
    return found


@dataclass
class Figures:
    """What docs/reliability.md tells."""

    runs: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    bytes_compared: int = 0


class World:
    """A source, folds of it, and somebody's files; the runs' own folder is made afresh for each."""

    def __init__(self, base: Path, zygote: Zygote, hub: HubServer) -> None:
        self.base, self.zygote, self.hub, self.figures = base, zygote, hub, Figures()
        self.source, self.bystander, self.place = base / "model", base / "bystander", base / "place"
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, tie_word_embeddings=False, **sizes))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.4, 1.8)
        model.to(torch.bfloat16).save_pretrained(self.source, max_shard_size="20KB")
        (self.source / "more").mkdir()
        (self.source / "more" / "notes.md").write_text("notes")
        self.bystander.mkdir()
        (self.bystander / "letter").write_text("precious")
        self.old, self.new = self.folded("old", "--layout", "dropped"), self.folded("new")
        self.untouched = self.around()

    def folded(self, name: str, *options: str) -> Path:
        code, _, err = self.zygote.run("fold", self.source, self.base / name, *options, cwd=self.base)
        assert (code, err) == (0, "")
        return self.base / name

    def around(self) -> dict[str, str]:
        """Everything but the runs' own folder."""
        found = tree(self.base)
        return {name: what for name, what in found.items() if not name.startswith("place")}

    def run(self, arguments: list[object], at: int = -1, action: int = COUNT, error: int = 0) -> tuple[int, str]:
        """Exit code and stderr of a run that is disturbed at a call; `calls` then tells what it did."""
        roots = f"{self.place}:{self.source}:"
        faults = json.dumps([roots, at, action, error, str(self.base.with_name("calls"))])
        code, _, err = self.zygote.run(*arguments, cwd=self.base, FAULTS=faults)
        return code, err

    @property
    def calls(self) -> list[str]:
        return [line.split()[0] for line in self.base.with_name("calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, SHIM, "-ldl"], check=True)
    return path


@pytest.fixture(scope="module")
def world(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("world").resolve() / "base"
    base.mkdir()
    more = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "error", "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}
    path = str(Path(flashnorm_cli.__file__).parents[1])
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_user("me", TOKEN)
        home = tmp_path_factory.mktemp("home")
        with Zygote(hub.client_env(home, PYTHONPATH=path, LD_PRELOAD=str(shim), **more)) as zygote:
            world = World(base, zygote, hub)
            yield world
    print(f"\n{world.figures}")


# ---- what is run, what must be there before and after ----------------------------------------------------------------


class Command:
    """A command: how its folder is set up, its arguments, and what may be there after a disturbed run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.out = world.place / "out"
        self.expected = tree(world.new)

    def set_up(self) -> None:
        pass

    def arguments(self) -> list[object]:
        return ["fold", self.world.source, self.out]

    def allowed(self) -> list[dict[str, str]]:
        """What the output's name may hold after any fault; {} is nothing."""
        return [{}, self.expected]

    def check(self, code: int) -> None:
        found = tree(self.out)
        assert found in self.allowed()
        assert code != 0 or found == self.expected
        self.world.figures.bytes_compared += sum(p.stat().st_size for p in self.out.rglob("*") if p.is_file())
        names = {path.name for path in self.world.place.iterdir()}
        assert names <= {"out", ".out.partial"}, names

    def again(self) -> None:
        """A second, undisturbed run."""
        if tree(self.out) == self.expected and "--overwrite" not in self.arguments():
            return
        code, err = self.world.run(self.arguments())
        assert code == 0, err
        self.check(0)


class Overwrite(Command):
    def set_up(self) -> None:
        shutil.copytree(self.world.old, self.out)

    def arguments(self) -> list[object]:
        return [*super().arguments(), "--overwrite"]

    def allowed(self) -> list[dict[str, str]]:
        return [tree(self.world.old), self.expected]


class Verify(Command):
    """Of every file but the record nothing may change; the record is the old one or a whole new one."""

    def set_up(self) -> None:
        shutil.copytree(self.world.new, self.out)

    def arguments(self) -> list[object]:
        return ["verify", self.out, "--source", self.world.source, "--level", "weights"]

    def check(self, code: int) -> None:
        found = tree(self.out)
        leftover = [name for name in found if name.endswith(".part")]
        assert code in (0, 1, 2, AS_PLANNED, -signal.SIGKILL), f"exit {code}: what cannot be read proves nothing"
        assert len(leftover) <= (code == -signal.SIGKILL)
        record = json.loads((self.out / "flashnorm.json").read_text())
        same = {name: what for name, what in found.items() if name not in ("flashnorm.json", *leftover)}
        assert same == {name: what for name, what in self.expected.items() if name != "flashnorm.json"}
        assert record["verify"] is None or record["verify"]["levels"]["weights"]["status"] == "passed"
        self.world.figures.bytes_compared += sum(p.stat().st_size for p in self.out.rglob("*") if p.is_file())

    def again(self) -> None:
        for path in self.out.glob(".*.part"):
            path.unlink()
        code, err = self.world.run(self.arguments())
        assert code in (0, AS_PLANNED), err
        levels = json.loads((self.out / "flashnorm.json").read_text())["verify"]["levels"]
        assert levels["weights"]["status"] == "passed"


class Push(Command):
    """The repository holds nothing, or the very files; a fault on this side never publishes anything else."""

    def set_up(self) -> None:
        shutil.copytree(self.world.new, self.out)
        self.world.hub.repos.pop("me/folded", None)

    def arguments(self) -> list[object]:
        return ["push-to-hub", self.out, "me/folded", "--unverified"]

    def check(self, code: int) -> None:
        assert tree(self.out) == self.expected
        repo = self.world.hub.repos.get("me/folded")
        published = self.world.hub.files("me/folded") if repo is not None else {}
        papers = {"README.md", "flashnorm.json", "flashnorm-plan.svg", ".gitattributes"}
        mine = {p.relative_to(self.out).as_posix(): p.read_bytes() for p in self.out.rglob("*") if p.is_file()}
        there = {name: data for name, data in published.items() if name not in papers}
        assert not there or there == {name: data for name, data in mine.items() if name not in papers}
        assert code != 0 or there
        self.world.figures.bytes_compared += sum(map(len, there.values()))

    def again(self) -> None:
        code, err = self.world.run(self.arguments())
        assert code == 0, err
        self.check(0)


COMMANDS: dict[str, Callable[[World], Command]] = {
    "fold": Command,
    "fold --overwrite": Overwrite,
    "verify": Verify,
    "push": Push,
}


def disturb(world: World, command: Command, at: int, action: int, error: int) -> None:
    shutil.rmtree(world.place, ignore_errors=True)
    world.place.mkdir()
    command.set_up()
    code, err = world.run(command.arguments(), at, action, error)
    world.figures.runs += 1
    if action in (KILL, KILL_AFTER):
        assert code in (-signal.SIGKILL, 0)
    else:
        assert code >= 0
    said = [line for line in err.splitlines() if not line.startswith("flashnorm: note: ")]
    if code in (0, AS_PLANNED):
        assert said == [], err
    elif code > 0:
        assert len(said) == 1, f"exit {code}, {err!r}"
        assert said[0].startswith("flashnorm: "), err
        assert "a bug in flashnorm" not in err, err
    assert world.around() == world.untouched
    command.check(code)
    command.again()
    assert world.around() == world.untouched
    kind = world.calls[at] if at < len(world.calls) else "?"
    world.figures.kinds[kind] = world.figures.kinds.get(kind, 0) + 1


def _sample(every: list[tuple[int, int, int]], seed: int) -> list[tuple[int, int, int]]:
    """The seed moves on with the code's own calls: another sample for every change of them."""
    return random.Random(SEED or seed).sample(every, min(int(SAMPLE), len(every)))


@pytest.mark.parametrize("name", COMMANDS)
def test_any_call_may_fail(world: World, name: str) -> None:
    command = COMMANDS[name](world)
    shutil.rmtree(world.place, ignore_errors=True)
    world.place.mkdir()
    command.set_up()
    code, err = world.run(command.arguments())
    assert code in (0, AS_PLANNED), err
    assert err == ""
    calls = world.calls
    assert len(calls) > 40
    every = [(at, *way) for at in range(len(calls)) for way in WAYS]
    print(f"\n{name}: {len(calls)} calls, {len(every)} faults")
    chosen = every if SAMPLE == "all" else _sample(every, len(calls))
    failed = []
    for at, action, error in sorted(chosen):
        try:
            disturb(world, command, at, action, error)
        except AssertionError as failure:
            what = ("count", "kill", "error once", "error for good", "short", "kill after")[action]
            failed.append(f"call {at} ({calls[at]}), {what} {errno.errorcode.get(error, '')}: {failure}")
    assert not failed, f"{len(failed)} of {len(chosen)}:\n" + "\n\n".join(failed[:20])
