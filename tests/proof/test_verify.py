"""`flashnorm verify` besides what it catches (test_mutations.py): its figures, its record, its prompts, its errors."""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from command_line import run
from documents import document
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flashnorm_cli.demo import HELD_OUT, MODEL
from flashnorm_cli.norms import info

NORM, READER = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.v_proj.weight"


def result_of(capsys: pytest.CaptureFixture[str], *arguments: object, code: int | None = None) -> dict[str, Any]:
    """The JSON result; by default it passes: with 4 where no level that runs the models was asked for."""
    if code is None:
        code = 4 if "--level" in arguments and "logits" not in arguments else 0
    assert run("verify", *arguments, "--json") == code
    return document(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as `source`, and folded as `folded`."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(MODEL, folder / "source")
    assert run("fold", folder / "source", folder / "folded", "--quiet") == 0
    return folder


@pytest.fixture
def folded(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folded checkpoint, to be changed; its record names the source by an absolute path."""
    return Path(shutil.copytree(folder / "folded", tmp_path / "folded"))


def record_of(folded: Path) -> dict[str, Any]:
    return json.loads((folded / "flashnorm.json").read_text())


def change_a_weight(folded: Path, name: str = READER) -> str:
    """Make one value of a tensor another one; returns the shard."""
    index = json.loads((folded / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][name]
    tensors = load_file(folded / shard)
    tensors[name].view(-1)[7] += 1.0
    save_file(tensors, folded / shard, metadata={"format": "pt"})
    return shard


# ---- figures, against references of our own --------------------------------------------------------------------------


def test_layers_have_the_error_of_real_modules(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = result_of(capsys, folded, "--level", "layers")["levels"]["layers"]["figures"]["norms"]
    row = next(r for r in rows if r["norm"] == NORM)
    assert row["readers"] == 3
    shard = json.loads((MODEL / "model.safetensors.index.json").read_text())["weight_map"][READER]
    weight, gain = load_file(MODEL / shard)[READER], load_file(MODEL / shard)[NORM]
    x = torch.randn(4000, len(gain)).bfloat16()
    norm = LlamaRMSNorm(len(gain), eps=1e-5).bfloat16()
    norm.weight.data = gain
    reference = (x.double() / x.double().square().mean(-1, True).add(1e-5).sqrt() * gain.double()) @ weight.double().T
    errors = []
    for w, g in ((weight, gain), ((weight.float() * gain.float()).bfloat16(), torch.ones_like(gain))):
        norm.weight.data = g
        out = torch.nn.functional.linear(norm(x), w)
        errors.append(((out.double() - reference).norm() / reference.norm()).item())
    # Rows of the figures hold the largest error of three readers, so only the size can be compared.
    assert row["error_source"] == pytest.approx(errors[0], rel=0.35)
    assert row["error_folded"] == pytest.approx(errors[1], rel=0.35)


def test_logits_have_the_error_of_real_models(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = torch.randint(0, 256, (5, 40)).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    ids = tmp_path / "ids.json"
    figures = result_of(capsys, folded, "--level", "logits", "--token-ids", ids)["levels"]["logits"]["figures"]
    assert (figures["prompts"], figures["tokens"], figures["text"]) == (5, 200, str(ids))

    def logits(where: Path, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode():
            return AutoModelForCausalLM.from_pretrained(where, dtype=dtype)(torch.tensor(rows)).logits.double()

    reference = logits(MODEL, torch.float32)
    noisy, mine = logits(MODEL, torch.bfloat16), logits(folded, torch.bfloat16)

    def error(x: torch.Tensor) -> float:
        return statistics.median(((x - reference).norm(dim=-1) / reference.norm(dim=-1)).flatten().tolist())

    def perplexity(x: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), torch.tensor(rows)[:, 1:].flatten()).exp()

    assert figures["noise_floor"] == pytest.approx(error(noisy), rel=0.1)
    assert figures["rounding_error"] == pytest.approx(error(mine), rel=0.1)
    assert figures["ratio"] == pytest.approx(figures["rounding_error"] / figures["noise_floor"])
    assert figures["folded"]["perplexity"] == pytest.approx(perplexity(mine).item(), rel=1e-2)
    assert figures["reference_perplexity"] == pytest.approx(perplexity(reference).item(), rel=1e-4)
    top = (mine.argmax(-1) == reference.argmax(-1)).float().mean().item()
    assert figures["folded"]["top1"] == pytest.approx(top, abs=0.02)
    assert 0 < figures["algebra_error"] < 1e-5


def test_a_trained_model_predicts_as_well_as_before(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = result_of(capsys, folded, "--level", "logits", "--text", HELD_OUT)["levels"]["logits"]["figures"]
    before, after, floor = (figures[k] for k in ("reference_perplexity", "folded", "source"))
    assert before < 3  # it is trained: 256 would be guessing
    assert abs(after["perplexity"] - before) < 0.01 * before
    assert figures["tokens"] > 3000
    assert abs(floor["perplexity"] - before) < 0.01 * before
    assert figures["greedy"][0]["source"] == figures["greedy"][0]["folded"]


def test_limits_can_be_set(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = result_of(capsys, folded, "--level", "logits", "--max-algebra", "1e-12", code=3)
    (finding,) = strict["levels"]["logits"]["findings"]
    assert "does not compute the same function" in finding["message"]
    strict = result_of(capsys, folded, "--level", "layers", "--max-ratio", "0.5", code=3)
    assert len(strict["levels"]["layers"]["findings"]) > 10
    assert strict["thresholds"] == {"max_algebra_error": 1e-5, "max_noise_ratio": 0.5}


def test_float32_is_measured_against_float64(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = families.build("llama", seed=3)
    families.randomize_gains(model, seed=4)
    families.save(model, tmp_path / "source")
    assert run("fold", tmp_path / "source", tmp_path / "folded", "--quiet") == 0
    logits = result_of(capsys, tmp_path / "folded", "--level", "logits")["levels"]["logits"]["figures"]
    assert (logits["reference"], logits["dtype"]) == ("float64", "float32")
    assert 1e-8 < logits["noise_floor"] < 1e-5
    assert "no tokenizer" in logits["text"]


# ---- the record ------------------------------------------------------------------------------------------------------


def test_record(folded: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folded / "flashnorm.json").read_text()
    assert run("verify", folded, "--level", "weights", "--no-record", "--quiet") == 4
    assert (folded / "flashnorm.json").read_text() == before
    result = result_of(capsys, folded, "--level", "weights", "--token", "hf_secret")
    assert result["recorded"] == str(folded / "flashnorm.json")
    text = (folded / "flashnorm.json").read_text()
    record = json.loads(text)
    assert {**record, "verify": None} == json.loads(before)
    entry = record["verify"]
    assert (entry["verdict"], entry["equivalent"]) == ("as planned, not run", False)
    assert list(entry["levels"]) == ["weights"]
    assert entry["source"]["name"] == str(folder / "source")
    assert "hf_secret" not in text
    assert {"flashnorm", "transformers", "torch", "device", "date", "command"} <= set(entry["environment"])
    files = {
        path.relative_to(folded).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folded.rglob("*")
        if path.name not in ("flashnorm.json", "README.md")
    }
    assert entry["files"] == files

    # Another level is added, as long as the files are the same.
    result_of(capsys, folded, "--level", "layers")
    assert list(record_of(folded)["verify"]["levels"]) == ["weights", "layers"]
    (folded / "README.md").write_text("papers may change\n")
    assert result_of(capsys, folded, "--level", "layers")["notes"] == []


def test_an_edit_voids_the_record(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folded, "--level", "weights", "--level", "layers", "--quiet") == 4
    shard = change_a_weight(folded)
    result = result_of(capsys, folded, "--level", "weights", code=3)
    (note,) = result["notes"]
    assert "is void" in note
    assert shard in note
    (finding,) = result["levels"]["weights"]["findings"]
    assert finding["what"] == READER
    assert "1 of " in finding["message"]
    entry = record_of(folded)["verify"]
    assert entry["equivalent"] is False
    assert list(entry["levels"]) == ["weights"]  # what was found out about other files counts no more


def test_readable_and_whole_after_a_kill(folded: Path) -> None:
    """The record is replaced, never written over."""
    inode = (folded / "flashnorm.json").stat().st_ino
    assert run("verify", folded, "--level", "weights", "--quiet") == 4
    assert (folded / "flashnorm.json").stat().st_ino != inode
    assert not [path.name for path in folded.iterdir() if path.name.endswith(".part")]


def test_a_moved_source_is_named(
    folded: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "source", tmp_path / "elsewhere")
    record = record_of(folded)
    (folded / "flashnorm.json").write_text(json.dumps({**record, "source": "gone"}))
    assert run("verify", folded) == 2
    assert "was made from gone, which is not here; say where it is with --source" in capsys.readouterr().err
    assert run("verify", folded, "--source", tmp_path / "elsewhere", "--level", "weights", "-q") == 4
    # Another checkpoint of the same shape is not its source.
    shard = change_a_weight(tmp_path / "elsewhere", "model.embed_tokens.weight")
    result = result_of(capsys, folded, "--source", tmp_path / "elsewhere", "--level", "weights", code=3)
    findings = result["levels"]["weights"]["findings"]
    assert "model.embed_tokens.weight" in {finding["what"] for finding in findings}
    assert any(f"another {shard}" in finding["message"] for finding in findings)


# ---- what is printed and returned ------------------------------------------------------------------------------------


def test_for_people(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folded) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Equivalent: {folded} computes the same as ")
    for words in ("39 of 39 tensors", "times the noise floor", "perplexity", "Recorded in"):
        assert words in shown.out
    assert shown.err == ""
    change_a_weight(folded)
    assert run("verify", folded) == 3
    out = capsys.readouterr().out
    assert out.startswith("NOT equivalent")
    assert f"{READER}: " in out
    assert "logits        skipped" in out


def test_report_and_fold_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fold", folder / "source", tmp_path / "out", "--verify", "--json") == 0
    verification = document(capsys.readouterr().out)["verification"]
    assert verification["verdict"] == "equivalent"
    assert list(verification["levels"]) == ["weights", "layers", "logits"]  # as `verify` does by itself
    assert run("verify", tmp_path / "out", "--level", "weights", "--report", tmp_path / "report.html") == 4
    page = (tmp_path / "report.html").read_text()
    assert "As planned, not run" in page
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "bits"], "level is one of weights, layers, logits, not 'bits'"),
        (["--runtime", "onnx"], "runtime is one of vllm, gguf, not 'onnx'"),
        (["--device", "abacus"], "'abacus' is not a device; try cpu, cuda or cuda:1"),
        (["--text", "missing.txt", "--level", "logits"], "missing.txt: cannot be read as text"),
        (["--token-ids", "bad.json", "--level", "logits"], "bad.json: holds no lists of token ids below "),
        (["--token-ids", "few.json", "--level", "logits"], "few.json: holds 3 tokens; at least 64 are needed to tell"),
        (["--text", "a", "--token-ids", "b"], "--text and --token-ids exclude each other"),
        (["--eval-limit", "3"], "--eval-limit needs --eval"),
        (["--report", "no/such/report.html"], "no/such/report.html: there is no folder"),
        (["--source-revision", "main"], "--source-revision needs --source"),
        (["--max-ratio", "0"], "have to be greater than 0"),
        (["--source", "./nowhere"], "./nowhere: no such folder"),
        (["--levels", "weights"], "No such option: --levels"),
    ],
)
def test_wrong_calls(
    folded: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("[[1, 2, 99999]]")
    Path("few.json").write_text("[[1, 2, 3]]")
    before = (folded / "flashnorm.json").read_bytes()
    assert run("verify", folded, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert (folded / "flashnorm.json").read_bytes() == before


def test_no_source_no_folder_no_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder / "source") == 2
    assert "has no flashnorm.json that names its source; add --source" in capsys.readouterr().err
    assert run("verify", folder / "source", "--source", folder / "source") == 2
    assert "is the source itself" in capsys.readouterr().err
    assert run("verify", tmp_path / "missing") == 2
    (tmp_path / "empty").mkdir()
    assert run("verify", tmp_path / "empty") == 1
    assert "is this a transformers checkpoint?" in capsys.readouterr().err
    assert run("verify", folder / "folded", "--source", folder / "folded") == 2
    shutil.copytree(folder / "folded", tmp_path / "twin")
    assert run("verify", folder / "folded", "--source", tmp_path / "twin") == 1
    assert "is folded already" in capsys.readouterr().err


def test_a_lost_file_is_not_equivalent(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folded / "config.json").unlink()
    result = result_of(capsys, folded, code=3)
    assert "config.json" in result["levels"]["weights"]["findings"][0]["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["norms"][0].update(tensor=[1]), "is not recorded as the source's forward says"),
        (lambda r: r.update(verify={"files": 3, "environment": 3, "levels": 3}), None),
        (lambda r: r.update(source_files={}), "does not name the files of the source"),
        (lambda r: r["norms"][0].update(folded=False), "is not recorded as"),
    ],
)
def test_records_of_any_content(
    folded: Path, change: Callable[[dict[str, Any]], Any], words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(folded)
    change(record)
    (folded / "flashnorm.json").write_text(json.dumps(record))
    result = result_of(capsys, folded, "--level", "weights", "--no-record", code=3 if words else 4)
    if words:
        assert any(words in finding["message"] for finding in result["levels"]["weights"]["findings"])


def test_a_broken_or_lost_record(folded: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folded / "flashnorm.json").write_text("{")
    result = result_of(capsys, folded, "--source", folder / "source", code=3)
    assert "cannot be read as JSON" in result["levels"]["weights"]["findings"][0]["message"]
    (folded / "flashnorm.json").unlink()
    result = result_of(capsys, folded, "--source", folder / "source", "--level", "weights", code=3)
    assert [f["what"] for f in result["levels"]["weights"]["findings"]] == ["flashnorm.json"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but false in the source"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "auto_map"),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1"),
        ({"model_type": "junk"}, "cannot read config.json"),
    ],
)
def test_configs_of_foreign_folds(
    folded: Path, folder: Path, config: dict[str, Any], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folded / "flashnorm.json").unlink()
    mine = json.loads((folded / "config.json").read_text())
    del mine["flashnorm"], mine["flashnorm_folded"]
    (folded / "config.json").write_text(json.dumps(mine))
    arguments = (folded, "--source", folder / "source", "--level", "weights")
    assert result_of(capsys, *arguments)["foreign"]
    (folded / "config.json").write_text(json.dumps({**mine, **config}))
    findings = result_of(capsys, *arguments, code=3)["levels"]["weights"]["findings"]
    assert any(f["what"] == "config.json" and key in f["message"] for f in findings), findings


def test_a_foreign_fold_may_round_products_only(folded: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folded / "flashnorm.json").unlink()
    mine = json.loads((folded / "config.json").read_text())
    del mine["flashnorm"]
    (folded / "config.json").write_text(json.dumps(mine))

    def one_unit(name: str) -> None:
        path = folded / json.loads((folded / "model.safetensors.index.json").read_text())["weight_map"][name]
        tensors = load_file(path)
        tensors[name] = (tensors[name].view(torch.int16) + 1).view(torch.bfloat16)
        save_file(tensors, path, metadata={"format": "pt"})

    one_unit(READER)
    arguments = (folded, "--source", folder / "source", "--level", "weights")
    assert result_of(capsys, *arguments)["levels"]["weights"]["figures"]["rounded_otherwise"] == 1
    one_unit("model.embed_tokens.weight")
    (finding,) = result_of(capsys, *arguments, code=3)["levels"]["weights"]["findings"]
    assert finding["what"] == "model.embed_tokens.weight"


# ---- from the Hub ----------------------------------------------------------------------------------------------------


def test_from_the_hub(folder: Path, tmp_path: Path) -> None:
    """Both checkpoints by their ids, in a process of its own with an empty cache."""
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("team/source", folder / "source")
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = hub.client_env(tmp_path / "home", PYTHONPATH=path, OMP_NUM_THREADS="1")
        flashnorm = [sys.executable, "-m", "flashnorm_cli"]

        def call(*arguments: object) -> subprocess.CompletedProcess[str]:
            command = [*flashnorm, *map(str, arguments)]
            return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

        done = call("fold", "team/source", tmp_path / "folded", "--quiet")
        assert done.returncode == 0, done.stderr
        hub.add_repo("team/folded", tmp_path / "folded")
        done = call("verify", "team/folded", "--level", "weights", "--json")
        assert done.returncode == 4, done.stderr
        result = document(done.stdout)
        assert (result["source"]["name"], len(result["source"]["commit"])) == ("team/source", 40)
        assert result["recorded"] is None  # the cache is not ours to write into
        # Another repository with another weight is not the source.
        later = Path(shutil.copytree(folder / "source", tmp_path / "later"))
        change_a_weight(later)
        hub.add_repo("team/source2", later)
        done = call("verify", "team/folded", "--source", "team/source2", "--level", "weights", "--json")
        assert done.returncode == 3, done.stderr
        assert READER in {f["what"] for f in document(done.stdout)["levels"]["weights"]["findings"]}


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_moe", "deepseek_v3"])
def test_on_a_gpu(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = families.build(family, seed=5)
    families.randomize_gains(model, seed=6)
    families.save(model, tmp_path / "source", dtype=torch.bfloat16)
    assert run("fold", tmp_path / "source", tmp_path / "folded", "--quiet") == 0
    result = result_of(capsys, tmp_path / "folded", "--device", "cuda")
    assert {level["status"] for level in result["levels"].values()} == {"passed"}
    assert result["environment"]["device"].startswith("cuda (")
    assert result["levels"]["logits"]["figures"]["device"] == "cuda"
    if info()["path"] != "torch":
        assert result["levels"]["logits"]["figures"]["norms_on_kernels"] > 0
        assert result["levels"]["kernels"]["figures"]["error"] <= 0.51


@pytest.mark.gpu
def test_a_model_of_the_size_of_llama_1b_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from flashnorm_cli.bench.models import SHAPES

    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["llama-3.2-1b"], dtype="bfloat16"))
    families.randomize_gains(model.cpu(), seed=6)
    families.save(model, tmp_path / "source", dtype=torch.bfloat16)
    assert run("fold", tmp_path / "source", tmp_path / "folded", "--quiet") == 0
    result = result_of(capsys, tmp_path / "folded", "--device", "cuda")
    assert {level["status"] for level in result["levels"].values()} == {"passed"}
    assert result["levels"]["logits"]["figures"]["norms_on_kernels"] == 33
    assert result["levels"]["kernels"]["figures"]["sizes"] == [2048]
