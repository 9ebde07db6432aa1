"""What a folded checkpoint's files hold, byte for byte: nothing but what the fold is for may differ from the source.

Shards are read here by a few lines of this file's own, not by the tool's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from documents import document
from families import build, logits, randomize_gains, save, small_config, text_inputs

from flashnorm_cli.cli import main
from flashnorm_cli.folding.fold import fold

FAMILIES = ("llama", "smollm3", "gemma3_text", "gemma3")  # untied; tied; 1 + w; multimodal with 1 + w
UNTIED = ("smollm3", "gemma3_text", "gemma3")
ADDS_ONE = ("gemma3_text", "gemma3")
NORM = r"(model\.layers\.\d+\.{}|model\.norm)\.weight$"
# What feeds linear layers: the second norm of a Gemma layer is called otherwise.
FOLDED = {
    "llama": NORM.format("(input_layernorm|post_attention_layernorm)"),
    "smollm3": NORM.format("(input_layernorm|post_attention_layernorm)"),
    "gemma3_text": NORM.format("(input_layernorm|pre_feedforward_layernorm)"),
    "gemma3": NORM.format("(input_layernorm|pre_feedforward_layernorm)"),
}
KEPT_AS_THEY_ARE = {
    "tokenizer.json": b'{"a":  1}',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "LICENSE": b"do what you like\n",
    "README.md": "# ü\n".encode(),
    "modeling_own.py": b"raise SystemExit\n",
    "nested/deeper/notes.txt": b"",
    "tokenizer.model": bytes(range(256)),
    ".gitattributes": b"*.safetensors filter=lfs\n",
}
LEFT_OUT = (
    "consolidated.safetensors",
    "model.gguf",
    "nested/model.onnx",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)


# ---- an independent reader -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def header_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of one shard, in the order of its header."""
    header, raw = header_of(path), path.read_bytes()
    return {
        name: Tensor(
            entry["dtype"],
            tuple(entry["shape"]),
            raw[len(header) + entry["data_offsets"][0] : len(header) + entry["data_offsets"][1]],
        )
        for name, entry in json.loads(header[8:]).items()
        if name != "__metadata__"
    }


def shards_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: tensors_of(path) for path in sorted(folder.glob("model*.safetensors"))}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in shards_of(folder).values() for name, tensor in shard.items()}


def wide(tensor: Tensor) -> np.ndarray:
    """In float64."""
    if tensor.dtype == "BF16":
        values = (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(tensor.data, {"F16": "<f2", "F32": "<f4"}[tensor.dtype])
    return values.astype(np.float64).reshape(tensor.shape)


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """To float32 and then to `dtype`, to nearest even; a product of two 16 bit values is exact in float32."""
    single = values.astype(np.float32)
    if dtype == "BF16":
        bits = single.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return single.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def folded_llama(source: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """What a fold of a Llama makes of each tensor, by the names of Llama."""
    new = dict(source)

    def put(norm: str, *readers: str, values_from: str | None = None) -> None:
        gain = wide(source[norm])
        for reader in readers:
            old = source[values_from or reader]
            new[reader] = Tensor(old.dtype, old.shape, rounded(wide(old) * gain, old.dtype))
        ones = np.ones(source[norm].shape)
        new[norm] = Tensor(source[norm].dtype, source[norm].shape, rounded(ones, source[norm].dtype))

    layers = {name.rsplit(".", 2)[0] for name in source if name.endswith("input_layernorm.weight")}
    for layer in layers:
        put(f"{layer}.input_layernorm.weight", *(f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"))
        put(f"{layer}.post_attention_layernorm.weight", *(f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up")))
    put("model.norm.weight", "lm_head.weight", values_from="model.embed_tokens.weight" if tied else None)
    return new


# ---- checkpoints ---------------------------------------------------------------------------------------------


def make(folder: Path, family: str, dtype: torch.dtype, max_shard_size: str = "100KB") -> Path:
    """A checkpoint with norms far from the identity, and with files of every kind around it."""
    model = build(family, seed=0)
    randomize_gains(model, seed=1)
    save(model, folder, dtype, max_shard_size)
    for name, content in [*KEPT_AS_THEY_ARE.items(), *((name, b"weights") for name in LEFT_OUT)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sources in bf16, by family; the folds of `folds` lie beside them."""
    folder = tmp_path_factory.mktemp("contract")
    return {family: make(folder / family, family, torch.bfloat16) for family in FAMILIES}


@pytest.fixture(scope="module")
def folds(made: dict[str, Path]) -> dict[tuple[str, str], Path]:
    """Folded checkpoints by family and layout."""
    found = {}
    for family, source in made.items():
        before = files_of(source)
        for layout in ("identity", "dropped"):
            target = source.with_name(f"{family}-{layout}")
            found[family, layout] = fold(source, target, layout=layout).output
        assert files_of(source) == before
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


def is_folded(family: str, name: str) -> bool:
    return re.search(FOLDED[family], name) is not None


# ---- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_keeps_names_shapes_dtypes_order_and_shards(
    made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str
) -> None:
    source, folded = made[family], folds[family, "identity"]
    before, after = shards_of(source), shards_of(folded)
    assert list(after) == list(before)
    for shard, tensors in before.items():
        if shard == max(before) and family in UNTIED:
            assert after[shard].popitem()[0].endswith("lm_head.weight")  # at the end of the last shard
        else:
            assert header_of(folded / shard) == header_of(source / shard)
        assert list(after[shard]) == list(tensors)
        assert [(t.dtype, t.shape) for t in after[shard].values()] == [(t.dtype, t.shape) for t in tensors.values()]


def test_added_head_has_the_name_that_transformers_gives_it(folds: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    config = small_config("gemma3")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert set(all_tensors(folds["gemma3", "identity"])) == set(all_tensors(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_norms_and_their_readers_change(
    made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str
) -> None:
    before, after = all_tensors(made[family]), all_tensors(folds[family, "identity"])
    changed = {name for name in before if before[name] != after[name]}
    readers = r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)\.weight$"
    expected = {n for n in before if is_folded(family, n) or re.search(readers, n)}
    expected = {n for n in expected if "vision" not in n}
    expected |= set() if family in UNTIED else {"lm_head.weight"}
    assert changed == expected
    for name in filter(lambda name: is_folded(family, name), before):
        assert set(wide(after[name]).flat) == {0.0 if family in ADDS_ONE else 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_leaves_out_the_folded_norms(
    made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str
) -> None:
    whole, dropped = shards_of(folds[family, "identity"]), shards_of(folds[family, "dropped"])
    kept = {s: {n: t for n, t in tensors.items() if not is_folded(family, n)} for s, tensors in whole.items()}
    assert dropped == kept
    assert [list(tensors) for tensors in dropped.values()] == [list(tensors) for tensors in kept.values()]
    assert sum(map(len, whole.values())) - sum(map(len, kept.values())) == 9


@pytest.mark.parametrize("layout", ["identity", "dropped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same(tmp_path: Path, family: str, layout: str) -> None:
    """In float32, where the rounding of the products is far below the difference that a mistake makes."""
    source = make(tmp_path / "model", family, torch.float32)
    folded = fold(source, tmp_path / "out", layout=layout).output
    cls = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    expected, got = (cls.from_pretrained(folder, dtype=torch.float32).eval() for folder in (source, folded))
    inputs = text_inputs(expected, seed=2)
    reference = logits(expected, inputs)
    assert (logits(got, inputs) - reference).abs().max() < 2e-5 * reference.abs().max()


@pytest.mark.parametrize("max_shard_size", ["100KB", "5GB"])
@pytest.mark.parametrize("family", ["llama", "smollm3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_bits(tmp_path: Path, family: str, dtype: torch.dtype, max_shard_size: str) -> None:
    """Each folded tensor holds the rounded product, each other one the bytes that it had."""
    source = make(tmp_path / "model", family, dtype, max_shard_size)
    expected = folded_llama(all_tensors(source), tied=family in UNTIED)
    assert all_tensors(fold(source, tmp_path / "out").output) == expected


def test_bits_of_norms_in_another_dtype(tmp_path: Path) -> None:
    """Norms in float32 over weights in bf16: the gain's own precision counts."""
    model = build("llama", seed=0)
    randomize_gains(model, seed=1)
    state = {n: p if p.ndim == 1 else p.to(torch.bfloat16) for n, p in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    before = all_tensors(tmp_path / "model")
    assert {t.dtype for t in before.values()} == {"BF16", "F32"}
    folded = all_tensors(fold(tmp_path / "model", tmp_path / "out").output)
    assert folded == folded_llama(before, tied=False)


# ---- config, record, index -----------------------------------------------------------------------------------


def assert_same_but(new: dict[str, Any], old: dict[str, Any], untied: bool) -> None:
    """The old keys in their order, `tie_word_embeddings` false where that is new, the flags at the end."""
    tie = ["tie_word_embeddings"] if untied and "tie_word_embeddings" not in old else []
    assert list(new) == [*old, *tie, "flashnorm_folded", "flashnorm"]
    for key, value in old.items():
        if key != "text_config":
            assert new[key] == (False if untied and key == "tie_word_embeddings" else value), key


@pytest.mark.parametrize("layout", ["identity", "dropped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_config(made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str, layout: str) -> None:
    text = (folds[family, layout] / "config.json").read_text()
    old, new = json.loads((made[family] / "config.json").read_text()), json.loads(text)
    assert_same_but(new, old, family in UNTIED)
    if family == "gemma3":
        assert_same_but(new["text_config"], old["text_config"], untied=True)
        assert new["text_config"]["flashnorm"] == new["flashnorm"]
        assert new["text_config"]["flashnorm_folded"] == new["flashnorm_folded"]
    assert text == json.dumps(new, indent=2) + "\n"
    # Gemma 3 calls a norm post_attention_layernorm that feeds no linear layer: readers of the flag would drop it.
    assert new["flashnorm_folded"] is (family not in ADDS_ONE)
    record = new["flashnorm"]
    assert list(record) == ["format", "tool", "layout", "folded", "kept", "lm_head"]
    assert (record["format"], record["layout"]) == (1, layout)
    assert record["lm_head"] == ("untied" if family in UNTIED else "folded")
    assert all("*" in pattern or is_folded(family, pattern) for pattern in record["folded"])
    assert len(record["folded"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_record(made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str) -> None:
    source, folded = made[family], folds[family, "identity"]
    record = json.loads((folded / "flashnorm.json").read_text())
    names = {n for n in all_tensors(source) if is_folded(family, n)}
    assert {norm["tensor"] for norm in record["norms"] if norm["folded"]} == names
    assert all(norm["reason"] for norm in record["norms"] if not norm["folded"])
    before, after = all_tensors(source), all_tensors(folded)
    changed = {n for n in after if before.get(n) != after[n]}
    assert {reader["tensor"] for reader in record["readers"]} == changed - names
    assert {norm for reader in record["readers"] for norm, *_ in reader["runs"]} == names
    assert record["source"] == str(source)
    assert (record["commit"], record["verify"], record["flushed_to_zero"]) == (None, None, {})
    assert [each["name"] for each in record["left_out"]] == list(LEFT_OUT)
    assert all(each["reason"] and each["bytes"] == len(b"weights") for each in record["left_out"])
    for name, facts in record["source_files"].items():
        raw = (source / name).read_bytes()
        assert (facts["size"], facts["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert {n for n in record["source_files"] if n.endswith("tensors")} == set(shards_of(source))


@pytest.mark.parametrize("layout", ["identity", "dropped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_index(made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str, layout: str) -> None:
    name, folded = "model.safetensors.index.json", folds[family, layout]
    shards, index = shards_of(folded), json.loads((folded / name).read_text())
    tensors = all_tensors(folded)
    assert index["weight_map"] == {tensor: shard for shard in shards for tensor in shards[shard]}
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(int(np.prod(t.shape)) for t in tensors.values())
    if layout == "identity" and family not in UNTIED:
        assert (folded / name).read_bytes() == (made[family] / name).read_bytes()


# ---- the other files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_other_files(made: dict[str, Path], folds: dict[tuple[str, str], Path], family: str) -> None:
    before, after = files_of(made[family]), files_of(folds[family, "identity"])
    assert set(after) == set(before) - set(LEFT_OUT) | {"flashnorm.json"}
    same = {n for n in after if before.get(n) == after[n]}
    assert {*KEPT_AS_THEY_ARE, "generation_config.json"} <= same


@pytest.mark.parametrize(("umask", "of_shards"), [(0o022, 0o600), (0o022, 0o664), (0o077, 0o644)])
def test_modes_are_the_source_s_less_the_umask(
    made: dict[str, Path], tmp_path: Path, umask: int, of_shards: int
) -> None:
    """As cp gives them: what only its owner may read does not become everybody's."""
    source = shutil.copytree(made["llama"], tmp_path / "model")
    modes = {path.name: of_shards for path in source.glob("model*.safetensors")}
    modes |= {"tokenizer.json": 0o600, "LICENSE": 0o644, "chat_template.jinja": 0o755}
    for name, mode in modes.items():
        (source / name).chmod(mode)
    old = os.umask(umask)
    try:
        folded = fold(source, tmp_path / "out").output
    finally:
        os.umask(old)
    for name, mode in {**modes, "config.json": 0o666, "flashnorm.json": 0o666}.items():
        assert stat.S_IMODE((folded / name).stat().st_mode) == mode & ~umask, name
    for path in [folded, *(p for p in folded.rglob("*") if p.is_dir())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask, path


def test_a_shard_behind_a_link_is_read_and_not_written(made: dict[str, Path], tmp_path: Path) -> None:
    """As the Hub's cache keeps them: snapshots of links to blobs that are named by their hash."""
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    shutil.copytree(made["llama"], snapshot)
    blobs.mkdir()
    for path in [p for p in snapshot.rglob("*") if p.is_file()]:
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        path.symlink_to(blob)
    before = files_of(tmp_path), {p: p.stat().st_mtime_ns for p in blobs.iterdir()}
    folded = fold(snapshot, tmp_path.parent / f"{tmp_path.name}-out").output
    assert (files_of(tmp_path), {p: p.stat().st_mtime_ns for p in blobs.iterdir()}) == before
    assert not any(path.is_symlink() for path in folded.rglob("*"))
    direct = files_of(fold(made["llama"], tmp_path / "out").output)
    got = files_of(folded)
    del direct["flashnorm.json"], got["flashnorm.json"]  # they name the source
    assert got == direct
    shutil.rmtree(folded)


# ---- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["identity", "dropped"])
def test_keep(made: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """The final norm, the head and the tie stay what they are, and the flag is false."""
    folded = fold(made["smollm3"], tmp_path / "out", final_norm="keep", layout=layout).output
    before, after = all_tensors(made["smollm3"]), all_tensors(folded)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        assert after[name] == before[name]
    assert "lm_head.weight" not in after
    config = json.loads((folded / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["flashnorm_folded"]) == (True, False)
    assert config["flashnorm"]["lm_head"] == "kept"
    assert config["flashnorm"]["kept"]["model.norm.weight"] == '`final_norm="keep"`'


def test_untie_is_what_auto_does(made: dict[str, Path], folds: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    folded = fold(made["smollm3"], tmp_path / "out", final_norm="untie").output
    assert files_of(folded) == files_of(folds["smollm3", "identity"])


def test_auto_keeps_where_runtimes_tie_anyway(tmp_path: Path) -> None:
    source = make(tmp_path / "gemma", "gemma", torch.bfloat16)
    for final_norm in ("auto", "keep", "untie"):
        folded = fold(source, tmp_path / final_norm, final_norm=final_norm).output
        config = json.loads((folded / "config.json").read_text())
        untied = final_norm == "untie"
        assert ("lm_head.weight" in all_tensors(folded)) == untied
        assert (config["tie_word_embeddings"], config["flashnorm_folded"]) == (not untied, untied)
        reason = config["flashnorm"]["kept"].get("model.norm.weight", "")
        assert ("runtimes tie it for gemma" in reason) == (final_norm == "auto")


@pytest.mark.parametrize("workers", [1, 5])
def test_same_bytes_from_the_command_and_with_any_workers(
    made: dict[str, Path],
    folds: dict[tuple[str, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    for family in ("llama", "gemma3"):
        out = tmp_path / family
        assert run(capsys, "fold", made[family], out, "--workers", workers, "--quiet") == (0, "", "")
        assert files_of(out) == files_of(folds[family, "identity"])


def test_default_output(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = fold(made["llama"])
    assert result.output == tmp_path / "llama-FlashNorm"
    (tmp_path / "here").mkdir()
    shutil.copytree(made["llama"], tmp_path / "here" / "model.v1")
    monkeypatch.chdir(tmp_path / "here" / "model.v1")
    monkeypatch.chdir(tmp_path / "here")
    assert fold("model.v1/").output == tmp_path / "here" / "model.v1-FlashNorm"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "llama-FlashNorm"]


def test_overwrite(
    made: dict[str, Path], folds: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the older output is left, and an empty folder needs no --overwrite."""
    out = tmp_path / "out"
    out.mkdir()
    assert run(capsys, "fold", made["smollm3"], out, "--quiet") == (0, "", "")
    (out / "nested" / "more.txt").write_text("of the user's")
    assert run(capsys, "fold", made["llama"], out, "--quiet")[0] == 2
    assert run(capsys, "fold", made["llama"], out, "--quiet", "--overwrite") == (0, "", "")
    assert files_of(out) == files_of(folds["llama", "identity"])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_json(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fold", made["smollm3"], tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    value = document(out)
    assert value["output"] == str(tmp_path / "out")
    assert value["lm_head"] == "untied"
    assert value["counts"] == {"norms_folded": 9, "norms_kept": 0, "norms_not_traced": 0, "readers": 21}
    embedding = all_tensors(made["smollm3"])["model.embed_tokens.weight"]
    assert value["bytes_added"] == len(embedding.data)
    assert value["bytes_written"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert value["left_out"] == json.loads((tmp_path / "out" / "flashnorm.json").read_text())["left_out"]
    assert value["resumed_shards"] == []


def test_text(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was left out, what dropped means, what was added, and where it is."""
    code, out, err = run(capsys, "fold", made["smollm3"], tmp_path / "out", "--layout", "dropped")
    assert (code, err) == (0, "")
    assert "9 of 9 norms are folded into 21 tensors" in out
    assert "16.4 kB are added" in out
    assert all(name in out for name in LEFT_OUT)
    assert "Stock vLLM does not load this." in out
    assert "llama.cpp's converter takes it without a word, and then the GGUF does not load." in out
    where = tmp_path / "out"
    assert out.endswith(f" s more:\n{where}\nNext: flashnorm verify {where}\n")


def test_flushed(tmp_path: Path) -> None:
    """Products that became zero are counted by tensor, in the result and in the record."""
    source = make(tmp_path / "model", "llama", torch.float16)
    path = next(p for p in source.glob("model*.safetensors") if "lm_head.weight" in tensors_of(p))
    raw = bytearray(path.read_bytes())
    place = raw.index(tensors_of(path)["lm_head.weight"].data)
    hidden = tensors_of(path)["lm_head.weight"].shape[1]
    gain = wide(all_tensors(source)["model.norm.weight"])
    raw[place : place + 2 * hidden] = np.full(hidden, 2.0**-24, "<f2").tobytes()  # the smallest number of all
    path.write_bytes(raw)
    result = fold(source, tmp_path / "out")
    assert result.flushed == {"lm_head.weight": int((gain <= 0.5).sum())}
    assert json.loads((tmp_path / "out" / "flashnorm.json").read_text())["flushed_to_zero"] == result.flushed
