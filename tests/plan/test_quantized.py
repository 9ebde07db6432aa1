"""`fold --for` does what the raw results show, and nothing that they show to be worse than the source left alone."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import families
import numpy as np
import pytest
import torch

from flashnorm_cli.cli import main
from flashnorm_cli.cli.wording import in_flags
from flashnorm_cli.plan import quantized

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("t", ROOT / "docs" / "experiments" / "quantization_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_shipped_and_documented_is_what_was_measured(table: ModuleType) -> None:
    assert json.loads(table.FIGURES.read_text()) == table.figures()
    assert table.PAGE.read_text() == table.page()


def test_figures_of_the_readme_are_those_of_the_raw_results() -> None:
    """Each "NAME: 0.43 times the source's error" of an int8 model with int8 activations, by sums of this test's own."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"([\w.-]+): (\d+\.\d+) times the\s+source's\s+error", readme)
    assert quoted
    measured = {}
    for path in BENCHMARKS.glob("quantization_*.json"):
        raw = json.loads(path.read_text())
        kl = {v: np.mean(raw["rows"].get(v, {}).get("w8a8-int8", {}).get("kl", np.nan)) for v in ("source", "rotated")}
        if np.isfinite([*kl.values()]).all():
            measured[raw["model"]] = kl["rotated"] / kl["source"]
    for name, figure in quoted:
        (ratio,) = (r for model, r in measured.items() if model.startswith(name))
        assert f"{ratio:.2f}" == figure, (name, ratio)


def test_the_page_types_no_ratio_by_hand(table: ModuleType) -> None:
    """What the page says in "times" stands where the script writes it."""
    text = table.PAGE.read_text(encoding="utf-8")
    for begin, end in ((table.SUMMARY, table.END_OF_SUMMARY), (table.BEGIN, table.END)):
        text = text[: text.index(begin)] + text[text.index(end) :]
    assert not re.findall(r"[\d.]+ times", text)


def test_no_choice_is_worse_than_the_source_left_alone() -> None:
    """On any text, from the raw results."""
    chosen = set()
    for name, form in quantized.formats().items():
        for rotatable in (True, False):
            choice = form.best(rotatable)
            chosen.add(choice)
            if choice == "keep":
                continue
            assert rotatable or choice == "fold"
            variant = {"fold": "fold", "rotate": "rotated"}[choice]
            seen = 0
            for path in BENCHMARKS.glob("quantization_*.json"):
                rows = json.loads(path.read_text())["rows"]
                here, source = rows.get(variant, {}).get(name, {}), rows["source"].get(name, {})
                if "kl" in here and "kl" in source:
                    seen += 1
                    assert len(here["kl"]) > 3 and (np.divide(here["kl"], source["kl"]) <= 1.0005).all(), (name, path)
            assert seen >= 2, name
    assert {"keep", "rotate"} <= chosen


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def of(choice: str) -> str:
    return next(name for name, form in quantized.formats().items() if form.best() == choice)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model = families.build("llama", 0)
    families.randomize_gains(model, 1)
    families.save(model, folder, torch.bfloat16)
    return folder


def test_left_alone(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fold", llama, tmp_path / "out", "--for", "Q4_K_M")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "keep the norms" in err and "q4_k_m" in err and "docs/quantization.md" in err
    assert [*tmp_path.iterdir()] == []


def test_rotated(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = of("rotate")
    code, out, err = run(capsys, "fold", llama, tmp_path / "out", "--for", name, "--seed", 4)
    assert (code, err) == (0, "")
    assert f"--for {name}: folded and rotated: KL divergence was " in out and in_flags(quantized.CAUTION) not in out
    record = json.loads((tmp_path / "out" / "flashnorm.json").read_text())
    assert (record["rotation"]["kind"], record["rotation"]["seed"]) == ("hadamard", 4)


def test_one_that_cannot_be_rotated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = families.build("gemma2", 0)
    families.randomize_gains(model, 1)
    families.save(model, tmp_path / "in", torch.bfloat16)
    name = next(n for n, f in quantized.formats().items() if f.best() == "rotate" and f.best(False) == "keep")
    code, _, err = run(capsys, "fold", tmp_path / "in", tmp_path / "out", "--for", name)
    assert code == 1 and "keep the norms" in err and "cannot be rotated" in err
    assert not (tmp_path / "out").exists()


def test_bad_calls(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for more, words in (
        (["--for", "q3_k_x"], "w8a8-int8"),
        (["--for", "w8a8-int8", "--rotate", "random"], "leave --rotate out"),
        (["--seed", "3"], "--seed needs"),
    ):
        code, _, err = run(capsys, "fold", llama, out, *more)
        assert (code, len(err.splitlines())) == (2, 1) and words in err
    code, _, err = run(capsys, "fold", "a/b", "--push-to", "c/d", "--for", of("rotate"))
    assert code == 2 and "a fold from Hub to Hub does not rotate" in err


def test_a_plain_fold_warns_where_gains_matter(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "fold", llama, tmp_path / "out")
    assert code == 0 and in_flags(quantized.CAUTION) in out
    flat = families.build("llama", 0)
    with torch.no_grad():
        for name, parameter in flat.named_parameters():
            if "norm" in name:
                parameter.fill_(0.5).mul_(1 + 0.05 * torch.randn(parameter.shape))
    families.save(flat, tmp_path / "flat", torch.bfloat16)
    code, out, _ = run(capsys, "fold", tmp_path / "flat", tmp_path / "flat-out")
    assert code == 0 and in_flags(quantized.CAUTION) not in out
