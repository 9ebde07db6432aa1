"""A rotated checkpoint is verified by arithmetic of the proof's own, and each way to spoil one is caught."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashnorm_cli.folding.fold import fold
from flashnorm_cli.folding.rotation import orders, rotation
from flashnorm_cli.plan.model import PlannedRotation
from flashnorm_cli.proof import rotated as proof_rotated
from flashnorm_cli.proof.result import EQUIVALENT, NOT_EQUIVALENT
from flashnorm_cli.proof.rotation import rotated
from flashnorm_cli.proof.verify import verify

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN, UP, OUT = (f"model.layers.1.{name}.weight" for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj"))
NORM, BIAS = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.o_proj.bias"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A source with a tied head and biases, and its rotated fold, which has a head of its own."""
    folder = tmp_path_factory.mktemp("rotated")
    model = families.build("smollm3", seed=0)
    model.config.attention_bias = model.config.mlp_bias = True
    model = type(model)(model.config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    families.randomize_gains(model, seed=1)
    families.save(model, folder / "source", torch.bfloat16)
    fold(folder / "source", folder / "out", rotate="hadamard", seed=5, workers=1)
    fold(folder / "source", folder / "plain", workers=1)
    return folder / "source", folder / "out"


def test_a_right_one_passes(pair):
    source, out = pair
    found = verify(out, source, record=False)
    assert found.verdict == EQUIVALENT, found
    assert found.level("layers").status == "skipped" and "rotated" in found.level("layers").reason
    assert any("rotated" in note for note in found.level("weights").notes)


def edit(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path, Path], None]:
    def apply(source: Path, out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        tensors[name] = change(tensors[name].clone()).contiguous()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return apply


def set_one(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[7, 3] = value(tensor[7, 3])
        return tensor

    return change


def next_up(x: torch.Tensor) -> torch.Tensor:
    """Some units more: what no order of sums explains."""
    return x * (1 + 8 * torch.finfo(x.dtype).eps) + 2e-5


def plain(name: str) -> Callable[[Path, Path], None]:
    """The tensor of a fold that was not rotated."""

    def apply(source: Path, out: Path) -> None:
        edit(name, lambda _: load_file(source.parent / "plain" / "model.safetensors")[name])(source, out)

    return apply


def other_seed(source: Path, out: Path) -> None:
    fold(source, out.parent / "other", rotate="hadamard", seed=6, workers=1)
    shutil.copy(out.parent / "other" / "model.safetensors", out / "model.safetensors")


def say(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], None]:
    def apply(source: Path, out: Path) -> None:
        value = json.loads((out / file).read_text())
        change(value)
        (out / file).write_text(json.dumps(value, indent=2))

    return apply


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, 11] *= -1
    return tensor


MUTATIONS = {
    "one value": (edit(DOWN, set_one(lambda x: x + 0.05)), DOWN, "1 of"),
    "some units": (edit(UP, set_one(next_up)), UP, "1 of"),
    "one value is NaN": (edit(OUT, set_one(lambda x: x * torch.nan)), OUT, "1 of"),
    "a reader is not rotated": (plain(UP), UP, "it is not rotated"),
    "a writer is not rotated": (plain(OUT), OUT, "it is not rotated"),
    "a bias is not rotated": (plain(BIAS), BIAS, "it is not rotated"),
    "a bias is left out": (edit(BIAS, torch.zeros_like), BIAS, "differ"),
    "a sign is swapped": (edit(EMBEDDING, flipped), EMBEDDING, "differ"),
    "the new head is the embedding": (edit(HEAD, lambda x: x.flip(0)), HEAD, "differ"),
    "rotated twice": (edit(DOWN, lambda x: (rotation("hadamard", 64, 5).apply(x.float().T).T).to(x.dtype)), DOWN, ""),
    "transposed": (edit(OUT, lambda x: x.T), OUT, "differ"),
    "another seed": (other_seed, EMBEDDING, "differ"),
    "the record says another seed": (say("flashnorm.json", lambda r: r["rotation"].update(seed=6)), EMBEDDING, ""),
    "the record says another kind": (say("flashnorm.json", lambda r: r["rotation"].update(kind="random")), UP, ""),
    "the record says nothing": (say("flashnorm.json", lambda r: r.pop("rotation")), UP, ""),
    "the record forgets a tensor": (
        say("flashnorm.json", lambda r: r["rotation"]["tensors"].pop(UP)),
        "flashnorm.json",
        "rotation",
    ),
    "the config says nothing": (
        say("config.json", lambda c: c["flashnorm"].pop("rotation")),
        "config.json",
        "rotation",
    ),
    "the config says another size": (
        say("config.json", lambda c: c["flashnorm"]["rotation"].update(size=32)),
        "config.json",
        "rotation",
    ),
    "a norm that is folded is rotated": (edit(NORM, lambda x: x + 1), NORM, ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(tmp_path, pair, name):
    source, out = pair
    apply, what, words = MUTATIONS[name]
    shutil.copytree(out, tmp_path / "out")
    apply(source, tmp_path / "out")
    found = verify(tmp_path / "out", source, levels=["weights"], record=False)
    assert found.verdict == NOT_EQUIVALENT
    assert any(f.what == what and words in f.message for f in found.level("weights").findings), found


def test_a_tensor_is_read_in_parts(tmp_path, pair, monkeypatch):
    """Panels that are a part of each row, and blocks that are a part of each panel: as of a tensor of gigabytes."""
    source, out = pair
    monkeypatch.setattr(proof_rotated, "PANEL_BYTES", 64 * 2 * 10)
    monkeypatch.setattr(proof_rotated, "ROW_BYTES", 16)
    monkeypatch.setattr(proof_rotated, "BLOCK_ELEMENTS", 64 * 3)
    monkeypatch.setattr(proof_rotated, "BLOCK_COLUMNS", 3)
    assert verify(out, source, levels=["weights"], record=False).level("weights").status == "passed"
    shutil.copytree(out, tmp_path / "out")

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[41, 29] += 0.5
        return tensor

    edit(DOWN, change)(source, tmp_path / "out")
    found = verify(tmp_path / "out", source, levels=["weights"], record=False).level("weights").findings
    assert [f.what for f in found] == [DOWN] and "1 of 7,168 values differ, the first at [41, 29]" in found[0].message


TWICE = [1, 2, 12, 20, 24, 28, 36, 48, 60, 76, 576, 896]


@pytest.mark.parametrize(
    ("kind", "size"), [*product(["hadamard", "random"], TWICE), *product(["hadamard"], [2048, 3584, 5120, 8192])]
)
def test_two_definitions_agree(kind, size):
    assert orders(size) is not None
    values = torch.randn(3, size, dtype=torch.float64)
    there = rotated(PlannedRotation(kind, size, 9, {}), values, (1,))
    assert torch.allclose(there, rotation(kind, size, 9).apply(values), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_a_tied_head_that_has_its_tensor_on_disk_already(tmp_path, pair, rotate):
    """Nothing is added then, and config.json unties it all the same."""
    shutil.copytree(pair[0], tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].flip(0)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    plan = fold(tmp_path / "source", tmp_path / "out", rotate=rotate, workers=1).plan
    assert plan.untie and not plan.added
    found = verify(tmp_path / "out", tmp_path / "source", record=False)
    assert found.verdict == EQUIVALENT and found.level("logits").status == "passed", found
    say("config.json", lambda c: c.update(tie_word_embeddings=True))(tmp_path / "source", tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "source", levels=["weights"], record=False).verdict == NOT_EQUIVALENT
