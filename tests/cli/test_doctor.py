"""`flashnorm doctor`: what a bug report needs, what runs where, and what would help."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import run
from documents import document

doctor: Any = import_module("flashnorm_cli.cli.doctor")  # the package has the command under this name
NOTHING: dict[str, Any] = {"gpu": None, "cupy": None, "torch_cuda": None}


def test_lines_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    said = document(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__ == said["runs_on"]["torch"]
    assert said["versions"]["transformers"] == transformers.__version__
    assert said["runs_on"]["path"].startswith("cuda") or said["runs_on"]["reason"]
    assert said["runs_on"]["norm_linear_reason"] or said["runs_on"]["norm_linear_choices"] is not None
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    names = "flashnorm Python OS torch transformers huggingface_hub NVIDIA CuPy GPU Norms".split()
    assert [name for name in names if not any(line.startswith(f"{name} ") for line in lines)] == []
    assert any(line.startswith("Norm in the linear runs on") for line in lines)
    assert [line for line in lines if line.startswith("- ")] == [f"- {line}" for line in said["advice"]]
    assert run("doctor", "-q") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("driver", "found", "says"),
    [
        (None, NOTHING, "no NVIDIA GPU is here"),
        ("580.1", NOTHING, "this torch is built without CUDA"),
        ("580.1", NOTHING | {"torch_cuda": "13.0"}, "torch sees no GPU"),
        ("580.1", NOTHING | {"torch_cuda": "12.8", "gpu": "H100"}, "pip install 'flashnorm-cli[cuda12]'"),
        ("580.1", NOTHING | {"torch_cuda": "13.0", "gpu": "H100"}, "pip install 'flashnorm-cli[cuda13]'"),
        ("580.1", {"torch_cuda": "13.0", "gpu": "H100", "cupy": "14.2"}, None),
    ],
)
def test_advice_for_a_gpu(
    driver: str | None, found: dict[str, Any], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ())
    lines = doctor._advice({**dict.fromkeys(doctor.PACKAGES, "1"), "NVIDIA driver": driver}, found, None)
    assert lines == [] if says is None else len(lines) == 1 and says in lines[0]


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    versions = dict.fromkeys((*doctor.PACKAGES, "NVIDIA driver"))
    text = "\n".join(doctor._advice(versions, NOTHING, None))
    assert "torch, transformers, huggingface_hub, safetensors cannot be found" in text
    for option in ("--eval", "--runtime vllm", "--runtime gguf", "--plot", "--dask"):
        assert f"{option}: pip install " in text


def test_a_torch_that_cannot_be_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("flashnorm_cli.norms.info", broken)
    assert run("doctor", "--json") == 0
    said = document(capsys.readouterr().out)
    assert said["runs_on"] is None and "libcudart.so.13" in "\n".join(said["advice"])
    assert run("doctor") == 0
    assert "torch cannot be used" in capsys.readouterr().out


def test_the_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(doctor, "DRIVER", file)
    assert doctor._driver() is None
    for kind in ("x86_64 ", "for x86_64  "):
        file.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module {kind} 580.95.05  Release Build\n")
        assert doctor._driver() == "580.95.05"
    file.write_text("?")
    assert doctor._driver() == "of an unknown version"
