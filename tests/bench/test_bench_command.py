"""`flashnorm bench` as somebody meets it: results as they come, after an interruption, from a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from documents import document

from flashnorm_cli.bench import kernels, models, timing
from flashnorm_cli.bench.kernels import Measurement

ROOT = Path(__file__).parents[2]
ON_H200 = ROOT / "docs" / "benchmarks" / "kernels.json"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
SHAPES = ("--hidden", 64, "--hidden", 128, "--tokens", 3, "--trials", 2)


def times(hidden: int, tokens: int, *_: Any) -> list[Measurement]:
    names = {"F.rms_norm(None)": 2.0, "transformers": 5.0}
    return [Measurement("rms_norm", hidden, tokens, "bfloat16", name, us) for name, us in names.items()]


@no_gpu
def test_results_appear_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tmp_path / "out.json"
    known: list[tuple[str, int]] = []

    def measure(hidden: int, tokens: int, *more: Any) -> list[Measurement]:
        held = len(json.loads(save.read_text())["results"]) if save.exists() else 0
        known.append((capsys.readouterr().err, held))
        return times(hidden, tokens)

    monkeypatch.setattr(kernels, "measure_cpu", measure)
    assert run("bench", *SHAPES, "--save", save) == 0
    assert known == [("", 0), ("rms_norm 64 x 3: F.rms_norm(None) 2.00 us; transformers 2.50x\n", 2)]
    shown = capsys.readouterr()
    assert shown.err == "rms_norm 128 x 3: F.rms_norm(None) 2.00 us; transformers 2.50x\n"
    assert "is not timed apart. Time of F.rms_norm(None); the others" in shown.out
    assert "flashnorm's norms are torch's" not in shown.out
    assert run("bench", *SHAPES, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@no_gpu
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (torch.OutOfMemoryError("out of memory"), 1)])
def test_what_was_measured_survives(
    as_json: bool,
    error: BaseException,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(hidden: int, tokens: int, *more: Any) -> list[Measurement]:
        if hidden == 128:
            raise error
        return times(hidden, tokens)

    monkeypatch.setattr(kernels, "measure_cpu", measure)
    save = tmp_path / "out.json"
    assert run("bench", *SHAPES, "--save", save, *(["--json"] if as_json else [])) == code
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("flashnorm: interrupted" if code == 130 else "flashnorm: not enough")
    assert {r["hidden"] for r in json.loads(save.read_text())["results"]} == {64}
    if as_json:
        said = document(shown.out)
        assert said["exit_code"] == code and len(said["benchmark"]["results"]) == 2
    else:
        assert "    64       3  2.00" in shown.out and "128" not in shown.out
    # Before the first result there is nothing to show.
    assert run("bench", "--hidden", 128, "--tokens", 3) == code
    assert capsys.readouterr().out == ""


def test_turns_of_a_model_that_are_cut_short_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from small import tiny_llama

    calls = {"stock": 0, "flashnorm": 0}

    def timer(model: Any, mode: str, way: str, *more: Any) -> Any:
        def once() -> float:
            calls[way] += 1
            if way == "flashnorm" and calls[way] == 3:  # its warm-up, one turn, and the second
                raise KeyboardInterrupt
            return 110.0 if way == "flashnorm" else 100.0

        return once

    monkeypatch.setattr(models, "_timer", timer)
    monkeypatch.setattr(models, "check", lambda model, way: None)
    rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        models.bench(tiny_llama(), 9, 2, modes=("decode",), ways=("stock", "flashnorm"), on_row=rows.append)
    assert {row["way"]: len(row["trials"]) for row in rows} == {"stock": 1, "flashnorm": 1}
    assert rows[1]["gain_percent"] == 10.0


@no_gpu
def test_a_cpu_is_given_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes that a CPU can take, and a limit for each of them, unless somebody says how many turns."""
    asked: list[tuple[int, int, int, float | None]] = []

    def measure(hidden: int, tokens: int, dtype: Any, trials: int, seconds: float | None) -> list[Measurement]:
        asked.append((hidden, tokens, trials, seconds))
        return times(hidden, tokens)

    monkeypatch.setattr(kernels, "measure_cpu", measure)
    assert run("bench") == 0
    assert max(h * t for h, t, _, _ in asked) <= 8192 * 4096
    assert sum(seconds or 1e9 for _, _, _, seconds in asked) <= 150
    shapes = len(asked)
    asked.clear()
    assert run("bench", "--quick") == 0
    assert len(asked) < shapes / 2 and {trials for _, _, trials, _ in asked} == {3}
    asked.clear()
    assert run("bench", "--trials", 7, "--hidden", 64, "--tokens", 1) == 0
    assert asked == [(64, 1, 7, None)]
    capsys.readouterr()


def test_a_limit_of_time_ends_the_turns() -> None:
    calls: list[int] = []

    def slow(i: int) -> None:
        calls.append(i)
        time.sleep(0.02)

    assert timing.host_times({"slow": slow}, calls=1, trials=1000, seconds=0.1)["slow"] > 0
    assert 2 <= len(calls) < 20


def test_a_turn_is_as_short_as_its_calls_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    many: list[int] = []
    slow = (
        "F.rms_norm(None)",
        False,
        lambda b: lambda i: (time.sleep(0.01), torch.rms_norm(b.x[0], (64,), None, 1e-5))[1],
    )
    monkeypatch.setattr(kernels, "NORMS", [slow])
    monkeypatch.setattr(kernels, "host_times", lambda calls, n, *more: many.append(n) or dict.fromkeys(calls, 1.0))
    kernels.measure_cpu(64, 3, torch.float32, 11, seconds=1.0)
    kernels.measure_cpu(64, 3, torch.float32, 11)
    assert 1 <= many[0] <= 10 and many[1] == 2_000_000 // 192


def test_pictures_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed results give the committed tables' figures, and a picture that names GPU and dtype."""
    pytest.importorskip("matplotlib")
    assert run("bench", "--from", ON_H200, "--plot", tmp_path / "a.svg") == 0
    shown = capsys.readouterr()
    assert "rms_norm, device time on the GPU. Time of flashnorm" in shown.out and shown.err == ""
    assert "rms_norm in bfloat16 on NVIDIA H200" in (tmp_path / "a.svg").read_text()
    committed = (ROOT / "docs" / "benchmarks" / "kernels.svg").read_text()
    assert "fused_add_rms_norm in bfloat16 on NVIDIA H200" in committed
    assert run("bench", "--from", ON_H200, "--json") == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.json"
    again.write_text(printed)
    assert document(printed)["benchmark"]["results"] == json.loads(ON_H200.read_text())["results"]
    assert run("bench", "--from", again, "--markdown") == 0
    assert "| 4096 | 64 | 1.62 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "out.json"),
        ("{}", "holds no results of flashnorm bench"),
        ('{"results": [1]}', "holds 1, which is no measurement"),
        ('{"results": [{"operation": "x", "hidden": 1, "tokens": 1, "dtype": "", "contender": ""}]}', "no measurement"),
        ('{"results": [{"operation": "rms_norm", "hidden": 1, "tokens": 0, "dtype": "", "contender": ""}]}', "no meas"),
        ('{"results": [], "models": [{"mode": "decode", "way": "stock"}]}', "no row of a model"),
        (None, "out.json"),
    ],
)
def test_a_file_that_holds_none(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    if content is not None:
        file.write_text(content)
    assert run("bench", "--from", file) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert run("bench", "--from", file, "some-model", "--quick") == 2
    assert "--from measures nothing, so it excludes a model, --quick" in capsys.readouterr().err
