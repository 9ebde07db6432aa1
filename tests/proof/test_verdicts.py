"""The three verdicts, and what `verify` may not do: call equivalent what did not run, or hide a fault of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from command_line import run

import flashnorm_cli.proof.prompts as prompts_module
from flashnorm_cli import fold, verify
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.demo import HELD_OUT, MODEL
from flashnorm_cli.proof import layers, logits
from flashnorm_cli.proof.models import ModelError
from flashnorm_cli.proof.result import EQUIVALENT, NOT_EQUIVALENT, NOT_RUN, Verification, verdict_of
from flashnorm_cli.proof.scores import Score
from flashnorm_cli.record import write


@pytest.fixture(scope="module")
def folded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdicts") / "folded"
    fold(MODEL, folder)
    return folder


@pytest.fixture
def folded(folded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folded_once, tmp_path / "folded"))


def tiny(folder: Path, family: str = "llama", **settings: Any) -> Path:
    model = families.build(family, seed=7, **settings)
    families.randomize_gains(model, seed=8)
    families.save(model, folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ({"weights": "passed", "layers": "passed", "logits": "passed"}, EQUIVALENT),
        ({"weights": "passed", "logits": "skipped"}, NOT_RUN),
        ({"weights": "passed", "layers": "passed"}, NOT_RUN),
        ({"weights": "passed", "logits": "skipped", "runtime:vllm": "passed"}, EQUIVALENT),
        ({"weights": "passed", "kernels": "passed", "eval": "passed"}, NOT_RUN),
        ({"weights": "passed", "logits": "passed", "users": "skipped"}, NOT_RUN),
        ({"weights": "passed", "logits": "passed", "users": "passed"}, EQUIVALENT),
        ({"logits": "passed", "layers": "failed"}, NOT_EQUIVALENT),
        ({"weights": "failed", "logits": "skipped"}, NOT_EQUIVALENT),
        ({}, NOT_RUN),
    ],
)
def test_verdicts(statuses: dict[str, str], verdict: str) -> None:
    assert verdict_of(statuses) == verdict


def test_exit_codes_words_and_record(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folded, "--level", "weights") == 4
    assert capsys.readouterr().out.startswith(f"As planned, not run: {folded} holds what the plan asks for, but ")
    entry = json.loads((folded / "flashnorm.json").read_text())["verify"]
    assert (entry["verdict"], entry["equivalent"]) == (NOT_RUN, False)
    # --runtime comes on top of the levels, as its help says; that it is not installed is said first of all.
    assert run("verify", folded, "--runtime", "vllm", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("Not run: runtime:vllm")
    entry = json.loads((folded / "flashnorm.json").read_text())["verify"]
    assert list(entry["levels"]) == ["weights", "layers", "logits", "runtime:vllm"]
    assert (entry["verdict"], entry["equivalent"]) == (EQUIVALENT, True)
    read = Verification.from_record(json.loads((folded / "flashnorm.json").read_text()), str(folded))
    assert (read.verdict, bool(read)) == (EQUIVALENT, True)
    assert [level.level for level in read.skipped] == ["runtime:vllm"]


def test_a_level_that_cannot_run_again_takes_nothing_away(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(folded, levels=["weights", "logits"], device="cpu")

    def no_memory(*_: Any) -> Any:
        raise ModelError("no memory")

    monkeypatch.setattr("flashnorm_cli.proof.models.load", no_memory)
    again = verify(folded, device="cpu")
    assert (again.verdict, bool(again)) == (NOT_RUN, False)
    assert "cannot be run in bfloat16: no memory" in again.level("logits").reason
    entry = json.loads((folded / "flashnorm.json").read_text())["verify"]
    assert (entry["verdict"], entry["levels"]["logits"]["status"]) == (EQUIVALENT, "passed")


def test_a_failed_verification_is_false(folded: Path) -> None:
    result = verify(folded, levels=["layers"], max_ratio=0.5, device="cpu", record=False)
    assert not result
    assert result.verdict == NOT_EQUIVALENT


def test_a_fault_of_our_own_is_not_a_skipped_level(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: Any) -> None:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr(Score, "add", faulty)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        verify(folded, levels=["logits"], device="cpu", record=False)


def test_noise_does_not_keep_logits_from_running(folded: Path) -> None:
    """Every tensor is right to the bit: then what level layers says of noise is no reason not to look."""
    result = verify(folded, max_ratio=0.9, device="cpu", record=False)
    assert result.level("weights").status == "passed"
    assert result.level("layers").status == "failed"
    assert result.level("logits").status != "skipped"


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_layers_look_twice_with_another_seed(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    compare = layers._compare

    def watched(pair: Any, files: Any, reader: Any, device: str, seed: int, times: int = 1) -> Any:
        seeds.append(seed)
        found = compare(pair, files, reader, device, seed, times)
        if times == 1:
            found.folded = dict.fromkeys(found.folded, 9.0)  # an unlucky draw
        return found

    monkeypatch.setattr(layers, "_compare", watched)
    level = verify(folded, levels=["layers"], device="cpu", record=False).level("layers")
    assert level.status == "passed"
    assert level.figures["second_looks"] == len(seeds) // 2 > 0
    assert len(set(seeds)) == len(seeds) // 2 + 1


def test_logits_look_twice_at_other_tokens(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    measure = logits._measure

    def unlucky(setting: Any, prompts: Any, *rest: Any) -> Any:
        looks.append(prompts.ids)
        measured = measure(setting, prompts, *rest)
        if len(looks) in (1, 3, 4):
            errors = [[2 * error for error in row] for row in measured.floor.errors]
            measured.folded.errors[:] = errors  # twice the noise, over 1.5
        return measured

    monkeypatch.setattr(logits, "_measure", unlucky)
    level = verify(folded, levels=["logits"], device="cpu", record=False).level("logits")
    assert level.status == "passed"
    assert any("measured again on other tokens, it was within the limit" in note for note in level.notes)
    level = verify(folded, levels=["logits"], device="cpu", record=False).level("logits")
    assert level.status == "failed"  # both times
    assert len({looks[0], looks[1], looks[3]}) == 3  # other tokens each time


# ---- what a writer may not write -------------------------------------------------------------------------------------


def set_eps(value: Any) -> Any:
    value["rms_norm_eps"] = 0.5
    return value


def spoil_flag(value: Any) -> Any:
    value["flashnorm"]["folded"] = value["flashnorm"]["folded"][:-1]
    return value


def new_key(value: Any) -> Any:
    value["logit_scale"] = 4
    return value


def lose_total(value: Any) -> Any:
    value["metadata"]["total_size"] -= 2
    return value


@pytest.mark.parametrize(
    ("function", "spoil", "where"),
    [
        ("folded_config", set_eps, "rms_norm_eps is 0.5 instead of"),
        ("folded_config", spoil_flag, "flashnorm.folded does not name"),
        ("folded_config", new_key, "logit_scale is 4 instead of missing"),
        ("folded_index", lose_total, "metadata.total_size"),
    ],
)
def test_a_writer_that_errs_is_caught(
    function: str, spoil: Callable[[Any], Any], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    model = families.build("smollm3", seed=7)
    families.randomize_gains(model, seed=8)
    families.save(model, source, dtype=torch.bfloat16, max_shard_size="150KB")  # tied: the index gets a head
    real = getattr(write, function)
    monkeypatch.setattr(write, function, lambda *a: spoil(real(*a)))
    fold(source, tmp_path / "folded")
    result = verify(tmp_path / "folded", source, levels=["weights"], device="cpu", record=False)
    assert result.verdict == NOT_EQUIVALENT
    assert any(where in finding.message for finding in result.level("weights").findings), result.level("weights")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_a_large_vocabulary_does_not_shrink_the_text(tmp_path: Path) -> None:
    config = json.loads((Path(shutil.copytree(MODEL, tmp_path / "source")) / "config.json").read_text())
    small = prompts_module.read_prompts(open_checkpoint(Source(str(MODEL))), HELD_OUT, None, False)
    source = open_checkpoint(Source(str(tmp_path / "source")))
    vast = replace(source, config={**config, "vocab_size": 262_144})  # as if its tensors were that long, too
    (tmp_path / "source" / "config.json").write_text(json.dumps(vast.config))
    large = prompts_module.read_prompts(vast, HELD_OUT, None, False)
    assert sum(map(len, large.ids)) == sum(map(len, small.ids)) > 3000


def test_it_says_how_much_of_a_text_it_read(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(HELD_OUT.read_text() * 3)
    assert run("verify", folded, "--level", "logits", "--text", text, "--no-record", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert re.search(
        rf"judged at 4,096 positions of 4,096 tokens: {text}, the first of its [\d,]{{6}} tokens; cpu", out
    )
    text.write_text(HELD_OUT.read_text()[:500])  # all of a short one
    assert run("verify", folded, "--level", "logits", "--text", text, "--no-record", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert re.search(rf"judged at \d+ positions of (\d+) tokens: {text}, all of its \1 tokens; cpu", out)


# ---- models that do not fit ------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, json
import transformers
transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
from transformers import LlamaForCausalLM, LlamaConfig
from flashnorm_cli import verify
from flashnorm_cli.proof import logits, models
import torch; torch.set_num_threads(1)
verify(sys.argv[3], sys.argv[4], levels=["logits"], device="cpu", record=False)  # what is imported, once
data = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (int(data) * 1024 + int(sys.argv[5]),) * 2)
result = verify(sys.argv[1], sys.argv[2], levels=["weights", "logits"], device="cpu", record=False)
print(json.dumps(result.to_json()))
"""


def test_a_model_larger_than_the_memory_is_run_from_disk(tmp_path: Path, folded_once: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16"))
    families.randomize_gains(model, seed=8)
    # As large models are stored: each mapping of a shard counts as memory here.
    families.save(model, tmp_path / "source", dtype=torch.bfloat16, max_shard_size="20MB")
    weights = sum(p.numel() for p in model.parameters()) * 4
    fold(tmp_path / "source", tmp_path / "folded")
    room = weights * 15 // 16
    command = [sys.executable, "-c", LIMITED, tmp_path / "folded", tmp_path / "source", folded_once, MODEL, room]
    # What is freed goes back at once: the limit is for what is used, not for what the allocator keeps for later.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    level = result["levels"]["logits"]
    assert (level["status"], result["verdict"]) == ("passed", EQUIVALENT), level
    assert level["figures"]["from_disk"] is True
    assert any("the algebra was not measured" in note for note in level["notes"])
