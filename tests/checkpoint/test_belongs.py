"""Which files travel with a checkpoint: everything but its own tensors once more, and what was computed for them.

The files are written by the libraries that users have (torch, safetensors, gguf), into the folder of one tiny Llama.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flashnorm_cli.checkpoint.formats import look
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import CheckpointError

HIDDEN, VOCABULARY = 32, 96
NONE: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("belongs") / "model"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def sorted_out(model: Path) -> tuple[set[str], dict[str, str]]:
    """The names that travel, and the reasons of those that do not, whose bytes are right."""
    found = open_checkpoint(Source(str(model)))
    for each in found.left_out:
        assert each.bytes == (model / each.name).stat().st_size
    return set(found.others), {each.name: each.reason for each in found.left_out}


def own(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


# ---- the checkpoint's own tensors, by what the file holds ------------------------------------------------------------


def as_torch(model: Path, path: Path) -> None:
    torch.save(own(model), path)


def as_old_torch(model: Path, path: Path) -> None:
    torch.save(own(model), path, _use_new_zipfile_serialization=False)


def as_parameters(model: Path, path: Path) -> None:
    """A whole training checkpoint: parameters below other keys, beside objects of classes."""
    state = {f"module.{k}": torch.nn.Parameter(v.half()) for k, v in own(model).items()}
    torch.save({"module": state, "epoch": 3, "args": LlamaConfig(), "path": path.parent}, path)


def as_safetensors(model: Path, path: Path) -> None:
    save_file({k: v.half() for k, v in own(model).items()}, path)


def under_other_names(model: Path, path: Path) -> None:
    """As a model's authors name them, without the order of transformers' dimensions."""
    save_file({f"w{i}.kernel": v.T.contiguous() if v.ndim == 2 else v for i, v in enumerate(own(model).values())}, path)


def as_npz(model: Path, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{k: v.numpy() for k, v in own(model).items()})


def as_gguf(model: Path, path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(2)
    for i, value in enumerate(own(model).values()):
        if value.ndim == 2:
            quantized = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{i}.w.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"blk.{i}.n.weight", value.float().numpy())
    finish(writer)


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def message(*fields: tuple[int, bytes | int]) -> bytes:
    """A protocol buffer."""

    def varint(n: int) -> bytes:
        head = b""
        while n > 127:
            head, n = head + bytes([n & 127 | 128]), n >> 7
        return head + bytes([n])

    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(varint(number << 3) + varint(value))
        else:
            parts.append(varint(number << 3 | 2) + varint(len(value)) + value)
    return b"".join(parts)


def as_onnx(tensors: dict[str, torch.Tensor]) -> bytes:
    """ModelProto of onnx.proto: ir_version 1, graph 7; GraphProto: node 1, name 2, initializer 5; TensorProto: dims 1,
    data_type 2, name 8, raw_data 9."""
    initializers = [
        message(*((1, n) for n in v.shape), (2, 1), (8, k.encode()), (9, v.float().numpy().tobytes()))
        for k, v in tensors.items()
    ]
    node = message((1, b"x"), (4, b"MatMul"))
    graph = message((1, node), (2, b"main"), *((5, each) for each in initializers))
    return message((1, 8), (2, b"pytorch"), (7, graph), (8, message((2, 17))))


def exported_to_onnx(model: Path, path: Path) -> None:
    """Weights of MatMul nodes lose their names and are turned around."""
    tensors = {(f"onnx::MatMul_{i}" if v.ndim == 2 else k): v.t() for i, (k, v) in enumerate(own(model).items())}
    path.write_bytes(as_onnx(tensors))


def quantized_onnx(model: Path, path: Path) -> None:
    """4 bits: blocks of other shapes, and the norms under their names."""
    tensors = {k: v if v.ndim == 1 else torch.zeros(v.shape[0], 1, 17) for k, v in own(model).items()}
    path.write_bytes(as_onnx(tensors))


def opaque(start: bytes) -> Callable[[Path, Path], None]:
    return lambda model, path: path.write_bytes(start + bytes(40_000)) and None


COPIES: dict[str, Callable[[Path, Path], None]] = {
    "pytorch_model.bin": as_torch,
    "weights.dat": as_torch,
    "old/consolidated.00.pth": as_old_torch,
    "last.ckpt": as_parameters,
    "model.fp16.safetensors": as_safetensors,
    "model.safetensors.bak": as_safetensors,
    "consolidated.safetensors": under_other_names,
    "checkpoint-50/model.safetensors": as_safetensors,
    "weights.npz": as_npz,
    "a-q8_0.gguf": as_gguf,
    "onnx/model.onnx": exported_to_onnx,
    "onnx/decoder_int4.onnx": quantized_onnx,
    "tf_model.h5": opaque(b"\x89HDF\r\n\x1a\n"),
    "keras/weights.h5": opaque(b"\x89HDF\r\n\x1a\n"),
    "flax_model.msgpack": opaque(b"\x81\xa6params"),
    "phone.tflite": opaque(b"\x1c\0\0\0TFL3"),
    "lm.mlpackage/Data/com.apple.CoreML/weights/weight.bin": opaque(b""),
}


@pytest.mark.parametrize("name", COPIES)
def test_the_own_tensors_stay(model: Path, name: str) -> None:
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    COPIES[name](model, model / name)
    others, left = sorted_out(model)
    assert name in left and name not in others
    assert others == {"generation_config.json"}


def test_parts_of_an_export_are_one(model: Path) -> None:
    """No part holds a good share of the model; together they do. Their index goes with them."""
    tensors = list(own(model).items())
    for n in range(4):
        torch.save(dict(tensors[n::4]), model / f"pytorch_model-{n + 1:05d}-of-00004.bin")
        torch.save({f"x.{k}": v for k, v in tensors[n::4]}, model / f"consolidated.{n:02d}.pth")
    index = {"weight_map": {k: f"pytorch_model-{n % 4 + 1:05d}-of-00004.bin" for n, (k, _) in enumerate(tensors)}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (model / "openvino_model.xml").write_text("<net/>")
    (model / "openvino_model.bin").write_bytes(bytes(40_000))
    others, left = sorted_out(model)
    assert others == {"generation_config.json"}
    assert len(left) == 11 and left["pytorch_model.bin.index.json"] == "an index of files that are left out"


def test_what_an_export_holds_besides_is_said(model: Path) -> None:
    """trl's AutoModelForCausalLMWithValueHead writes its head into the same file."""
    torch.save({**own(model), "v_head.summary.weight": torch.ones(1, HIDDEN)}, model / "pytorch_model.bin")
    assert "(and summary.weight)" in sorted_out(model)[1]["pytorch_model.bin"]


# ---- everything else travels -----------------------------------------------------------------------------------------


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape)


def test_what_is_not_a_copy_travels(model: Path) -> None:
    """Under names and in formats that a suffix would lose."""
    layer = {k.removeprefix("model."): rand(*v.shape) for k, v in own(model).items() if ".layers.0." in k}
    safetensors = {
        "2_Dense/model.safetensors": {"linear.weight": rand(HIDDEN, HIDDEN)},
        "value_head.safetensors": {"v_head.summary.weight": rand(1, HIDDEN)},
        "mtp.safetensors": {"model.layers.2.eh_proj.weight": rand(HIDDEN, 2 * HIDDEN)},
        "medusa_lm_head.safetensors": {f"{i}.1.weight": rand(VOCABULARY, HIDDEN) for i in range(4)},
        "vae/diffusion_pytorch_model.safetensors": {"encoder.conv_in.weight": rand(8, 3, 3, 3)},
        "eagle/model.safetensors": {**layer, "fc.weight": rand(HIDDEN, 2 * HIDDEN)},  # its own layer 0
    }
    pickled = {
        "3_Dense/pytorch_model.bin": {"linear.weight": rand(64, HIDDEN), "linear.bias": rand(64)},
        "spk_dict.pt": {"Chelsie": {"cond": rand(1, 4), "ref_mel": rand(1, 30, 80)}},
        "v_head.bin": {"v_head.summary.weight": rand(1, HIDDEN)},
        "mm_projector.bin": {"model.mm_projector.0.weight": rand(HIDDEN, 48)},
        "vocoder.pth": {"generator": {"conv_pre.weight_v": rand(16, 80, 7)}},
        "scaler.pt": {"scale": 65536.0, "growth_factor": 2.0},
        "rng_state.pth": {"cpu": torch.get_rng_state(), "python": (3, tuple(range(600)), None)},
        "scheduler.pt": {"base_lrs": [5e-5], "last_epoch": 10},
        "training_args.bin": LlamaConfig(),
        "head.pt": torch.nn.Linear(HIDDEN, 2),
    }
    for name, tensors in safetensors.items():
        (model / name).parent.mkdir(exist_ok=True)
        save_file(tensors, model / name)
    for name, value in pickled.items():
        (model / name).parent.mkdir(exist_ok=True)
        torch.save(value, model / name)
    torch.jit.save(torch.jit.script(torch.nn.Linear(HIDDEN, 3)), model / "score.jit.pt")
    (model / "campplus.onnx").write_bytes(as_onnx({"head.conv1.weight": rand(32, 1, 3, 3)}))
    (model / "small.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (model / "notes.bin").write_bytes(b"not a format")
    (model / "empty.pt").write_bytes(b"")
    (model / "model.safetensors.index.x.json").write_text("{")
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    others, left = sorted_out(model)
    assert left == {}
    assert others == names - {"config.json", "model.safetensors"}


def gguf_of(path: Path, kind: str, architecture: str, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    finish(writer)


def test_what_was_computed_for_the_unfolded_weights_stays(model: Path) -> None:
    """Moments of an optimizer, sums of inputs' squares, an adapter. A control vector adds to the residual stream, which
    a fold leaves as it is, and a GGUF of another part is no copy: they travel."""
    torch_model = LlamaForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(torch_model.parameters())
    torch_model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), model / "optimizer.pt")
    sums = np.ones((1, HIDDEN), np.float32)
    gguf_of(model / "imatrix.gguf", "imatrix", "llama", {"blk.0.attn_q.weight.in_sum2": sums})
    gguf_of(model / "lora.gguf", "adapter", "llama", {"blk.0.attn_q.weight.lora_a": sums})
    gguf_of(model / "control.gguf", "model", "controlvector", {"direction.1": sums[0]})
    gguf_of(model / "mmproj.gguf", "mmproj", "clip", {"v.blk.0.attn_q.weight": np.ones((16, 16), np.float32)})
    name = b"blk.0.attn_q.weight"
    (model / "imatrix.dat").write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 1.0))
    others, left = sorted_out(model)
    assert others == {"generation_config.json", "control.gguf", "mmproj.gguf"}
    assert left["optimizer.pt"] == "the state of an optimizer for the unfolded weights"
    assert "compute them again" in left["imatrix.gguf"] == left["imatrix.dat"]
    assert left["lora.gguf"] == "an adapter for the unfolded weights"


def test_an_adapter_below_stays_as_a_whole(model: Path) -> None:
    """Its config without its weights would not load, and both together would not fit."""
    folder = model / "adapters" / "french"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": rand(4, HIDDEN)}, folder / "adapter_model.safetensors")
    left = sorted_out(model)[1]
    assert {*left} == {f"adapters/french/adapter_{n}" for n in ("config.json", "model.safetensors")}
    assert "flashnorm fold-adapter" in left["adapters/french/adapter_config.json"]
    (model / "flashnorm.json").write_text("{}")  # a folded checkpoint's adapters are judged by verify
    assert sorted_out(model)[1] == {}


# ---- the way in which a config names its weights ---------------------------------------------------------------------


def config(model: Path, **changes: object) -> None:
    value = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**value, **changes}))


def test_transformers_weights_are_followed(model: Path) -> None:
    """As transformers 5 loads them, which is asked itself: the other file is the copy."""
    tensors = own(model)
    save_file({k: v * 2 for k, v in tensors.items()}, model / "better.safetensors", {"format": "pt"})
    config(model, transformers_weights="./better.safetensors")
    found = open_checkpoint(Source(str(model)))
    loaded = LlamaForCausalLM.from_pretrained(model)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"] * 2)
    assert list(found.shards) == ["better.safetensors"] and found.index is None
    assert [each.name for each in found.left_out] == ["model.safetensors"]


def test_transformers_weights_may_be_an_index(model: Path) -> None:
    names = sorted(own(model))
    save_file({k: own(model)[k] for k in names}, model / "part.safetensors", {"format": "pt"})
    (model / "model.safetensors").unlink()
    (model / "mine.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")})
    )
    config(model, transformers_weights="mine.safetensors.index.json")
    found = open_checkpoint(Source(str(model)))
    assert (found.index_name, list(found.shards)) == ("mine.safetensors.index.json", ["part.safetensors"])
    assert found.others == ("generation_config.json",) and not found.left_out
    assert LlamaForCausalLM.from_pretrained(model).lm_head.weight.shape == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("adapter_model.bin", "neither a safetensors file nor the index"),
        (7, "neither a safetensors file nor the index"),
        ("../other/model.safetensors", "only a file beside config.json"),
        ("fp16/model.safetensors", "only a file beside config.json"),
        ("absent.safetensors", "which is not there"),
    ],
)
def test_transformers_weights_that_cannot_be_followed(model: Path, chosen: object, words: str) -> None:
    config(model, transformers_weights=chosen)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(Source(str(model)))
    assert "transformers_weights" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.fp16.safetensors", "a variant, .* variant='fp16'"),
        ("model.bf16-00001-of-00002.safetensors", "the index is missing"),
        ("model-00001-of-00002.safetensors", "the index is missing"),
        ("consolidated.safetensors", "the model's own authors"),
        ("unet/model.safetensors", "unet holds some: name that folder"),
    ],
)
def test_other_names_of_the_weights(model: Path, name: str, words: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(Source(str(model)))


def test_the_advice_keeps_the_class(model: Path) -> None:
    as_torch(model, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for names, advised in (
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification as M"),
        (["FSDPLlamaForCausalLM"], "AutoModelForCausalLM as M"),
        (None, "AutoModelForCausalLM as M"),
    ):
        config(model, architectures=names)
        with pytest.raises(CheckpointError, match=advised):
            open_checkpoint(Source(str(model)))


def test_a_pointer_of_git_lfs_is_named(model: Path) -> None:
    (model / "value_head.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"value_head.safetensors: is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(Source(str(model)))


# ---- crafted files ---------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_a_pickle_is_never_executed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil(), **own(model)}, model / "evil.pt")
    torch.save({"a": Evil()}, model / "evil.bin", _use_new_zipfile_serialization=False)
    (model / "evil.pkl").write_bytes(pickle.dumps(Evil(), protocol=2))
    others, left = sorted_out(model)
    assert not Path("executed").exists()
    assert "evil.pt" in left and {"evil.bin", "evil.pkl"} <= others
    pickle.loads((model / "evil.pkl").read_bytes())  # it would
    assert Path("executed").exists()


def bomb(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", data)


CRAFTED = {
    "memo of 2**31": lambda path: bomb(path, b"\x80\x02K\x01r\xff\xff\xff\x7f."),
    "deep": lambda path: bomb(path, b"\x80\x02" + b"(" * 1_000_000),
    "zip bomb": lambda path: bomb(path, b"\x80\x02" + b"N0" * 50_000_000),
    "endless list": lambda path: bomb(path, b"\x80\x02]q\x00h\x00a."),
    "cut zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(50)),
    "GGUF of 2**63 tensors": lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16),
    "GGUF, deep arrays": lambda path: path.write_bytes(
        b"GGUF\x03\0\0\0" + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999
    ),
    "safetensors of lists": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "negative shape": lambda path: torch.save({"a": (torch.Size, -1)}, path),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_carried_or_left_without_a_word(tmp_path: Path, name: str) -> None:
    path = tmp_path / "crafted"
    CRAFTED[name](path)
    with path.open("rb") as file:
        found = look(file, path.stat().st_size, "crafted.onnx")
    assert found is None or not found.entries
