"""A checkpoint that is folded and rotated computes the same; what cannot be rotated exactly is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from command_line import run
from documents import document
from safetensors.torch import load_file, save_file

from flashnorm_cli.checkpoint.header import TensorEntry, read_header
from flashnorm_cli.errors import CheckpointError, GainOverflowError, GainUnderflowError, PlanError, UsageError
from flashnorm_cli.folding import rewrite, rotating
from flashnorm_cli.folding.edits import Rotate, Scale
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.folding.rewrite import ShardJob, rewrite_shard
from flashnorm_cli.folding.rotating import Rotating, panels
from flashnorm_cli.folding.rotation import rotation
from flashnorm_cli.plan.model import Plan

EXACT = 1e-5
EMBEDDING = "model.embed_tokens.weight"


def checkpoint(folder: Path, family: str, shards: str = "5GB", dtype: torch.dtype | None = None) -> Path:
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder, dtype, shards)
    return folder


def logits(folder: Path, family: str) -> torch.Tensor:
    model = getattr(transformers, families.families()[family]).from_pretrained(folder, dtype=torch.float32).eval()
    return families.logits(model, families.text_inputs(model, seed=2)).double()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Biases of readers; biases of writers and experts in stacks; experts merged on load; fused projections; a tied head
# that is untied; MLA; a state space and attention; several shards.
@pytest.mark.parametrize(
    ("family", "kind", "shards"),
    [
        ("qwen2", "hadamard", "100KB"),
        ("gpt_oss", "random", "5GB"),
        ("mixtral", "hadamard", "5GB"),
        ("phi3", "random", "5GB"),
        ("smollm3", "hadamard", "5GB"),
        ("deepseek_v2", "hadamard", "5GB"),
        ("jamba", "random", "5GB"),
    ],
)
def test_rotated_checkpoints_compute_the_same(tmp_path, family, kind, shards):
    source = checkpoint(tmp_path / "source", family, shards)
    result = fold(source, tmp_path / "out", rotate=kind, seed=7, workers=1)
    expected = logits(source, family)
    assert difference(logits(tmp_path / "out", family), expected) < EXACT
    record = json.loads((tmp_path / "out" / "flashnorm.json").read_text())
    assert Plan.from_json(record) == result.plan
    assert record["rotation"]["kind"] == kind and record["rotation"]["seed"] == 7
    note = json.loads((tmp_path / "out" / "config.json").read_text())["flashnorm"]["rotation"]
    assert note["size"] == record["rotation"]["size"] and EMBEDDING in note["tensors"]
    # Every member changed, and one that is forgotten shows.
    name = next(n for n in record["rotation"]["tensors"] if n.endswith(("o_proj.weight", "out_proj.weight")))
    plain = tmp_path / "plain"
    fold(source, plain, workers=1)
    shard = next(f for f in sorted((tmp_path / "out").glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(shard)
    tensors[name] = load_file(plain / shard.name)[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert difference(logits(tmp_path / "out", family), expected) > 1e-3


def test_a_plain_fold_says_nothing_of_rotations(tmp_path):
    source = checkpoint(tmp_path / "source", "llama")
    fold(source, tmp_path / "out", workers=1)
    for name in ("flashnorm.json", "config.json"):
        assert "rotation" not in (tmp_path / "out" / name).read_text()


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("gemma2", {}, "a weight that is kept"),  # norms behind the sublayers
        ("llama", {"final_norm": "keep"}, "`model.norm.weight`, a weight that is kept"),
        ("llava", {}, "was not reached"),
    ],
)
def test_refused(tmp_path, family, options, why):
    source = checkpoint(tmp_path / "source", family)
    with pytest.raises(PlanError, match="cannot be rotated") as error:
        fold(source, tmp_path / "out", rotate="hadamard", workers=1, **options)
    assert why in str(error.value) and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("rotate") / "llama", "llama")


def changed(source: Path, folder: Path, tensors: Any = None, config: dict | None = None, **files: str) -> Path:
    shutil.copytree(source, folder)
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "final_norm"),
    [("model.mtp.eh_proj.weight", "untie"), ("value_head.weight", "untie"), ("value_head.weight", "auto")],
)
def test_tensors_that_the_model_does_not_read_refuse(tmp_path, llama, name, final_norm):
    source = changed(llama, tmp_path / "source", lambda t: t.update({name: torch.ones(8, 64)}))
    with pytest.raises(PlanError, match="not read by the model; its user may read the stream"):
        fold(source, tmp_path / "out", rotate="hadamard", final_norm=final_norm, workers=1)


def test_users_of_hidden_states_refuse(tmp_path, llama):
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    source = changed(llama, tmp_path / "source", modules=json.dumps(modules))
    with pytest.raises(PlanError, match="read outside of the model"):
        fold(source, tmp_path / "out", rotate="hadamard", final_norm="untie", workers=1)


def test_inf_is_not_spread(tmp_path, llama):
    def spoil(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.inf

    source = changed(llama, tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match=r"down_proj.*inf or NaN"):
        fold(source, tmp_path / "out", rotate="hadamard", workers=1)


def one_tensor(folder: Path, values: torch.Tensor, edit: Rotate) -> tuple[torch.Tensor, dict[str, int]]:
    save_file({"x": values}, folder / "in.safetensors")
    job = ShardJob(
        folder / "in.safetensors", folder / "out.safetensors", read_header(folder / "in.safetensors"), {"x": edit}
    )
    flushed = rewrite_shard(job, 2, fsync=False)
    found = load_file(folder / "out.safetensors")["x"]
    (folder / "out.safetensors").unlink()
    return found, flushed


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dims", "gain"),
    [
        ((5, 48), (1,), 1),
        ((5, 48), (1,), 0),
        ((48, 70), (0,), 1),
        ((48, 70), (0,), 0),
        ((48,), (0,), None),
        ((3, 48, 10), (1,), 2),
        ((3, 48, 10), (1,), 0),
        ((3, 10, 48), (2,), 1),
        ((48, 48), (0, 1), 0),
        ((2, 48, 3, 48), (1, 3), 2),
        ((0, 48), (1,), None),
    ],
)
def test_every_layout(tmp_path, monkeypatch, kind, dtype, shape, dims, gain):
    """Panels of any size give the product in float64, rounded once."""
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    q = rotation(kind, 48, 3)
    matrix = q.apply(torch.eye(48, dtype=torch.float64)).T
    factor = None if gain is None else torch.rand(shape[gain]) + 0.5
    expected = values.double()
    if factor is not None:
        expected = expected * factor.double().view([-1 if d == gain else 1 for d in range(len(shape))])
    for dim in dims:
        expected = (expected.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    edit = Rotate(q, dims, None if factor is None else Scale(gain, factor))
    found = []
    for elements in (1, 48 * 7, 2**20):
        monkeypatch.setattr(rewrite, "PANEL_BYTES", 2 * elements * dtype.itemsize)
        monkeypatch.setattr(rotating, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(rotating, "BLOCK_COLUMNS", 3)
        monkeypatch.setattr(rotating, "PAGE", 16)
        found.append(one_tensor(tmp_path, values, edit)[0])
        limit = torch.finfo(dtype).eps * expected.abs() * 0.5001 + 2e-6
        assert bool(((found[-1].double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("shape", [(48, 4096), (48, 4099), (3, 48, 2048), (48, 100), (70, 48, 2)])
def test_blocks_are_the_same_however_many_workers_there_are(monkeypatch, shape):
    """BLAS may sum in another order in a block of another size: a fold by other workers would have other bytes."""
    monkeypatch.setattr(rotating, "BLOCK_ELEMENTS", 48 * 90)
    action = Rotating(
        TensorEntry("x", "F32", shape, 0, 0), Rotate(rotation("hadamard", 48, 3), (len(shape) - 2,), None)
    )

    def blocks(panel_bytes: int) -> list[tuple[int, int, int, int]]:
        return sorted(
            (p.outer[0] + o.start, p.outer[0] + o.stop, p.inner[0] + i.start, p.inner[0] + i.stop)
            for p in panels(action, None, 0, 4 * 123, panel_bytes)  # type: ignore[arg-type]
            for o, i in p.blocks()
        )

    found = [blocks(panel_bytes) for panel_bytes in (2**26, 2**19, 2**18, 2**12)]
    assert all(each == found[0] for each in found)
    covered = torch.zeros(action.outer, action.inner)
    for o, p, i, j in found[0]:
        covered[o:p, i:j] += 1
    assert bool((covered == 1).all())


def test_overflow_stops_and_flushes_are_counted(tmp_path):
    q = rotation("hadamard", 48, 0)
    with pytest.raises(GainOverflowError, match="'x'"):
        one_tensor(tmp_path, 60000 * torch.sign(q.apply(torch.eye(48))).T[:2].half().contiguous(), Rotate(q, (1,)))
    tiny = torch.zeros(200, 48).half()
    tiny[0, 0] = 6e-8
    assert one_tensor(tmp_path, tiny, Rotate(q, (1,)))[1] == {"x": 48}
    tiny[:] = tiny[0]
    save_file({"x": tiny}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors")
    job = ShardJob(tmp_path / "in.safetensors", tmp_path / "out", header, {"x": Rotate(q, (1,))}, flush_limit=0.01)
    with pytest.raises(GainUnderflowError, match="rotated"):
        rewrite_shard(job)


def test_command_line(tmp_path, llama, capsys):
    assert run("fold", str(llama), str(tmp_path / "out"), "--rotate", "hadamard", "--seed", "3", "--verify") == 0
    assert "hadamard, seed 3" in capsys.readouterr().out
    assert run("plan", str(llama), "--json") == 0
    stream = document(capsys.readouterr().out)["stream"]
    record = json.loads((tmp_path / "out" / "flashnorm.json").read_text())
    assert stream["tensors"] == record["rotation"]["tensors"] and stream["refused"] is None
    # The same seed gives the same bytes, another one others.
    fold(llama, tmp_path / "again", rotate="hadamard", seed=3, workers=2)
    fold(llama, tmp_path / "other", rotate="hadamard", seed=4, workers=2)
    first, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again", "other"))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rotate", "hadamard", "--push-to", "me/x"], "--push-to does not rotate"),
        (["--seed", "3"], "--seed needs --rotate"),
    ],
)
def test_wrong_usage(llama, capsys, arguments, words):
    assert run("fold", str(llama), *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_wrong_arguments(tmp_path, llama):
    with pytest.raises(UsageError, match="`rotate` is one of"):
        fold(llama, tmp_path / "out", rotate="walsh")
    with pytest.raises(UsageError, match="seed"):
        fold(llama, tmp_path / "out", rotate="random", seed=-1)


def test_adapters_do_not_fit_a_rotated_base(tmp_path, llama, capsys):
    model = families.build("llama", seed=0)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    fold(llama, tmp_path / "out", rotate="hadamard", workers=1)
    assert run("fold-adapter", str(adapter), str(tmp_path / "folded"), "--base", str(tmp_path / "out")) == 2
    assert "its residual stream is rotated" in capsys.readouterr().err and not (tmp_path / "folded").exists()
