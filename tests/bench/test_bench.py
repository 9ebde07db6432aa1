"""`flashnorm bench` without a GPU, and what a benchmark does with a wrong contender."""

import json

import families
import pytest
import torch
from command_line import run
from documents import document

from flashnorm_cli.bench import kernels, models, ways

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
def test_kernels_on_a_cpu(tmp_path, capsys):
    save = tmp_path / "out.json"
    assert run("bench", "--hidden", 64, "--tokens", 3, "--trials", 2, "--json", "--save", save) == 0
    data = document(capsys.readouterr().out)["benchmark"]
    assert data == json.loads(save.read_text())
    assert data["device"] == "cpu" and data["norms"]["path"] == "torch"
    contenders = {r["contender"]: r for r in data["results"]}
    # Ours is torch's there: it is not timed beside itself.
    assert set(contenders) == {"F.rms_norm(None)", "F.rms_norm(weight)", "notebook swap", "transformers"}
    assert all(r["us"] > 0 and r["error"] is None for r in contenders.values())
    assert run("bench", "--hidden", 64, "--tokens", 3, "--trials", 2) == 0
    assert "CPU" in capsys.readouterr().out


@no_gpu
def test_a_model_on_a_cpu(tmp_path, capsys):
    model = families.build("llama", seed=1)
    families.randomize_gains(model, seed=2)
    families.save(model, tmp_path / "model")
    more = ("--trials", 1, "--new-tokens", 2, "--tokens", 2, "--dtype", "float32", "--json")
    for config_only in ((), ("--config-only",)):
        assert run("bench", tmp_path / "model", *config_only, *more) == 0
        data = document(capsys.readouterr().out)["benchmark"]
        timed = {(r["mode"], r["way"]) for r in data["models"] if "error" not in r}
        eager = [way for way in models.WAYS if way != models.TUNED_INDUCTOR]  # the search is the compiler's
        assert timed == {(mode, way) for mode in ("decode", "prefill") for way in eager}
        assert {r["hidden"] for r in data["results"]} == {model.config.hidden_size}


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    model = families.build("llama", seed=1).eval()
    families.randomize_gains(model, seed=2)
    assert models.check(model, "flashnorm") is None and models.check(model, "flashnorm fused") is None
    monkeypatch.setattr(ways, "on_kernel", lambda module, norm: lambda x: x * 1.5)
    assert "wrong" in models.check(model, "flashnorm")
    rows = models.bench(model, 1, 2, modes=("decode",), ways=("stock", "flashnorm"))
    assert [("error" in r, r["way"]) for r in rows] == [(True, "flashnorm"), (False, "stock")]


def test_a_wrong_contender_is_shown_and_not_timed(monkeypatch):
    wrong = ("transformers", True, lambda b: lambda i: b.x[i] * 0.999)
    monkeypatch.setattr(kernels, "NORMS", [n for n in kernels.NORMS if n[0] != "transformers"] + [wrong])
    found = {r.contender: r for r in kernels.measure_cpu(64, 5, torch.float32, 2)}
    assert found["transformers"].us is None and "wrong" in found["transformers"].error
    assert found["F.rms_norm(None)"].us > 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--save", "no/such/folder/x.json"), 2, "no such folder"),
        (("--plot", "no/such/folder/x.svg"), 2, "no such folder"),
        (("--plot", "x.gif"), 2, ".svg"),
        pytest.param(("--plot", "x.svg"), 2, "this is a CPU", marks=no_gpu),
        (("./no-such-model",), 1, "no-such-model"),
        (("--dtype", "int8"), 2, "int8"),
        (("--hidden", "0"), 2, "hidden"),
        (("--tokes", "3"), 2, "--tokens"),
        pytest.param(("--device", "cuda"), 2, "no CUDA device", marks=no_gpu),
    ],
)
def test_bad_input_is_one_line(arguments, code, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("bench", *arguments) == code
    error = capsys.readouterr().err
    assert says in error and error.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())
