"""What a command imports and how often it looks for garbage: structure, not time."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import small

from flashnorm_cli.cli import main
from flashnorm_cli.folding.fold import fold


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `source`, its fold in `folded`."""
    folder = tmp_path_factory.mktemp("startup")
    small.tiny_llama().save_pretrained(folder / "source")
    fold(folder / "source", folder / "folded")
    return folder


def in_a_process(*arguments: object, first: str = "") -> tuple[dict[str, list[str]], str]:
    """Run a command; the modules that `first` had imported and those that are there at its end, and its stderr."""
    code = (
        f"import json, sys\n{first}\nbefore = [*sys.modules]\n"
        "from flashnorm_cli.cli import main\n"
        f"try: main({[str(a) for a in arguments]!r})\n"
        "finally: print(json.dumps({'before': before, 'after': [*sys.modules]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "folded"], "is folded already"),
        (["fold", "folded", "again"], "is folded already"),
        (["fold", "nowhere/at/all"], "no such folder"),
        (["fold", "source", "source"], "overlaps with the source"),
    ],
)
def test_what_the_files_tell_needs_no_torch(
    arguments: list[str], words: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    modules, err = in_a_process(*arguments)
    assert words in err
    assert not {"torch", "transformers"} & {*modules["after"]}


def test_help_imports_little() -> None:
    """What commands alone need is imported in them: together these were a third of the time that help takes."""
    modules, _ = in_a_process("--help")
    heavy = {"importlib.metadata", "concurrent.futures", "hashlib", "ctypes", "tempfile", "logging", "torch", "rich"}
    assert not heavy & {*modules["after"]}


def test_a_plan_imports_what_the_model_class_needs(folders: Path) -> None:
    """Beyond the class's own module: the command line and this package, and of it no folding, proof or publishing."""
    first = "import torch, transformers.models.llama.modeling_llama"
    modules, _ = in_a_process("plan", folders / "source", "--quiet", first=first)
    more = {name for name in {*modules["after"]} - {*modules["before"]} if not name.startswith("flashnorm_cli")}
    ours = {name.split(".")[1] for name in modules["after"] if name.startswith("flashnorm_cli.")}
    assert not {"folding", "proof", "hub", "report", "adapters", "runtimes", "bench", "record"} & ours
    assert not [
        name for name in more if name.split(".")[0] in ("torch", "transformers", "scipy", "sympy", "accelerate")
    ]


def test_garbage_is_looked_for_rarely(folders: Path) -> None:
    searches: list[int] = []
    before = gc.get_threshold()

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            searches.append(info["generation"])

    gc.callbacks.append(count)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(folders / "source"), "--quiet"])
    finally:
        gc.callbacks.remove(count)
    assert stopped.value.code == 0
    assert gc.get_threshold() == before
    assert len(searches) <= 10


@pytest.mark.parametrize(("extension", "frozen"), [("", True), ("class nb_meta(type): __module__ = 'nanobind'", False)])
def test_nothing_is_searched_when_the_process_ends(extension: str, frozen: bool) -> None:
    """But where extensions made with nanobind would print what is left, and triton 3.9 in torch 2.15 is one."""
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print('FROZEN', gc.get_freeze_count()))\n"  # the first that is registered runs last
        f"{extension}\n"
        "from flashnorm_cli.cli import main\n"
        "main(['plan', 'nowhere/at/all'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (int(done.stdout.split("FROZEN")[1]) > 0) == frozen
