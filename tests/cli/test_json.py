"""--json: one document on standard output in every case, as schema.json has it, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import families
import pytest
import typer
from documents import SCHEMA, check, document

import flashnorm_cli
from flashnorm_cli.cli import app, main

COMMANDS = ["plan", "fold", "demo", "verify", "fold-adapter", "push-to-hub", "bench", "doctor"]
# A model whose code prints in every way there is: when it is imported and run, through libc, from a child, at the end.
LOUD = """
import atexit, ctypes, os, subprocess, sys
from transformers import LlamaForCausalLM
print("LOUD import")
os.write(1, b"LOUD descriptor\\n")
subprocess.run(["echo", "LOUD child"])
ctypes.CDLL(None).puts(b"LOUD libc")
sys.__stdout__.write("LOUD original\\n")
atexit.register(print, "LOUD exit")
class Loud(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        print("LOUD forward")
        return super().forward(*args, **kwargs)
"""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return stopped.value.code


def process(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python as users run it."""
    path = str(Path(flashnorm_cli.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json") / "model"
    small = families.build("llama", seed=3)
    families.randomize_gains(small, seed=4)
    families.save(small, folder)
    return folder


def test_the_schema_knows_every_command() -> None:
    schema = json.loads(SCHEMA.read_text())
    names = list(typer.main.get_command(app).commands)
    known = schema["$defs"]["envelope"]["properties"]["command"]["enum"]
    assert sorted(filter(None, known)) == sorted(names) == sorted(COMMANDS)
    assert {each["if"]["properties"]["command"]["const"] for each in schema["allOf"]} == set(names)
    takes_json = [n for n, c in typer.main.get_command(app).commands.items() if "json" in {p.name for p in c.params}]
    assert takes_json == names


def test_the_schema_refuses_what_it_does_not_know(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", model, "--json") == 0
    found = document(capsys.readouterr().out)
    for change in (
        {"more": 1},
        {"plan": {**found["plan"], "more": 1}},
        {"counts": {**found["counts"], "more": 1}},
        {"stream": {**found["stream"], "more": 1}},
        {"command": "fold"},
        {"exit_code": 5},
    ):
        with pytest.raises(AssertionError):
            check({**found, **change})
    for key in found:
        with pytest.raises(AssertionError):
            check({k: v for k, v in found.items() if k != key})


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_are_documents(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same words as on standard error, with the exit code."""
    assert run(command, "--json", "--no-such-option") == 2
    shown = capsys.readouterr()
    found = document(shown.out)
    assert (found["command"], found["exit_code"], found["error"]["type"]) == (command, 2, "UsageError")
    assert shown.err == f"flashnorm: {found['error']['message']}\n" and "--no-such-option" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("--json",), 2, "UsageError"),
        (("melt", "--json"), 2, "UsageError"),
        (("plan", "--json"), 2, "UsageError"),
        (("plan", "./nowhere", "--json"), 2, "UsageError"),
        (("plan", "no/where", "--json", "--local-files-only", "--quiet"), 1, "FlashNormError"),
        (("fold", "{model}", "{model}", "--json", "--overwrite"), 2, "UsageError"),
        (("fold", "{model}", "out", "--json", "--seed", "3"), 2, "UsageError"),
        (("verify", "{model}", "--json"), 2, "UsageError"),
        (("verify", "{model}", "--source", "{model}", "--json"), 2, "UsageError"),
        (("fold-adapter", "{model}", "--base", "{model}", "--json"), 1, "CheckpointError"),
        (("push-to-hub", "{model}", "me/x", "--json"), 1, "FlashNormError"),
        (("bench", "--tune", "--json"), 2, "UsageError"),
    ],
)
def test_more_errors(
    arguments: tuple[str, ...],
    code: int,
    kind: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*(each.format(model=model) for each in arguments)) == code
    shown = capsys.readouterr()
    found = document(shown.out)
    assert (found["exit_code"], found["error"]["type"]) == (code, kind)
    assert shown.err == f"flashnorm: {found['error']['message']}\n"


def test_a_word_that_looks_like_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("--json",), ("a", "--json")):  # no such folder; one argument too many
        assert run("plan", "--", *arguments) == 2
        assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback_beside_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(flashnorm_cli.FlashNormError):
        main(["plan", str(tmp_path), "--json", "--debug"])
    assert document(capsys.readouterr().out)["exit_code"] == 1


def test_records_are_as_the_schema_says(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """flashnorm.json and config.json, before and after a verification, for both layouts and a rotation."""
    for i, options in enumerate(([], ["--layout", "dropped"], ["--rotate", "hadamard"])):
        out = tmp_path / str(i)
        assert run("fold", model, out, "--json", *options) == 0
        found = document(capsys.readouterr().out)
        assert found["next"] == [f"flashnorm verify {out}"] and found["verdict"] == "not verified"
        check(json.loads((out / "flashnorm.json").read_text()), "record")
        check(json.loads((out / "config.json").read_text())["flashnorm"], "config_record")
        assert run("verify", out, "--level", "weights", "--json") == 4
        assert document(capsys.readouterr().out)["verdict"] == "as planned, not run"
        check(json.loads((out / "flashnorm.json").read_text()), "record")
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert run("verify", out, "--level", "weights", "--json") == 3
    found = document(capsys.readouterr().out)
    assert (found["exit_code"], found["error"], found["verdict"]) == (3, None, "not equivalent")
    check(json.loads((out / "flashnorm.json").read_text()), "record")


def test_nothing_else_comes_to_standard_output(model: Path, tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    loud.mkdir()
    for path in model.iterdir():
        (loud / path.name).write_bytes(path.read_bytes())
    (loud / "modeling_loud.py").write_text(LOUD)
    config = json.loads((loud / "config.json").read_text())
    config |= {"architectures": ["Loud"], "auto_map": {"AutoModelForCausalLM": "modeling_loud.Loud"}}
    (loud / "config.json").write_text(json.dumps(config))
    told = {"import", "descriptor", "child", "libc", "original", "exit", "forward"}
    done = process("-m", "flashnorm_cli", "plan", loud, "--trust-remote-code", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert document(done.stdout)["counts"]["norms_folded"] > 0
    assert {line.split()[1] for line in done.stderr.splitlines() if line.startswith("LOUD")} == told


SAY = """
import os, subprocess, sys
from flashnorm_cli.cli import _keeping_stdout, app, main
from flashnorm_cli.cli.output import Output

@app.command()
@_keeping_stdout
def say(json: bool = False, quiet: bool = False) -> None:
    out = Output(json, quiet)
    print("LOUD import")
    os.write(1, b"LOUD descriptor\\n")
    subprocess.run(["echo", "LOUD child"])
    out.data({"a": float("inf")})
    out.text("a")
    print("LOUD again")

main()
"""


@pytest.mark.parametrize(
    ("options", "out", "loud"), [((), "a\n", 4), (("--quiet",), "", 0), (("--json",), None, 4)], ids=str
)
def test_text_has_standard_output_for_itself_too(
    options: tuple[str, ...], out: str | None, loud: int, tmp_path: Path
) -> None:
    done = process("-c", SAY, "say", *options, cwd=tmp_path)
    assert done.stderr.count("LOUD") == loud, done.stderr
    if out is None:
        assert json.loads(done.stdout)["a"] is None  # JSON has no infinity
    else:
        assert done.stdout == out


INTERRUPTED = """
import os, signal, sys
from flashnorm_cli.plan import planner
signal.signal(signal.SIGINT, signal.default_int_handler)
planner.plan_checkpoint = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)
from flashnorm_cli.cli import main
main(["plan", sys.argv[1], "--json"])
"""


def test_interrupted(model: Path, tmp_path: Path) -> None:
    """Ctrl-C ends in a document, too."""
    done = process("-c", INTERRUPTED, model, cwd=tmp_path)
    found = document(done.stdout)
    assert (done.returncode, found["exit_code"], found["error"]["type"]) == (130, 130, "Interrupted")
