"""Checkpoints whose files are not what the model's class would write: quantized, renamed, incomplete, oddly typed.

Each case starts from a tiny real model of transformers and rewrites its safetensors. Either the fold is right (the
loaded models agree, or, where loading needs a GPU, every tensor does), or the norm is kept, or the fold refused, and
the reason names the tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.fold import FoldResult, fold

MAX_ERROR = 1e-5
Tensors = dict[str, torch.Tensor]

INPUT, POST, FINAL = (
    "model.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight",
    "model.norm.weight",
)
Q0, UP0 = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"


def source(
    folder: Path, family: str, change: Callable[[Tensors], Any] = len, dtype: torch.dtype | None = None, **config: Any
) -> Path:
    """A tiny checkpoint of a family, its tensors changed by `change`, its config updated with `config`."""
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder, dtype)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return folder


def load(folder: Path) -> tuple[Any, dict]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), {key: value for key, value in info.items() if value}


def folds_right(folder: Path, output: Path, **options: Any) -> FoldResult:
    """Fold, load both, compare the logits."""
    result = fold(folder, output, workers=1, **options)
    (original, info), (folded, info_folded) = load(folder), load(output)
    assert not info.get("missing_keys"), "the source itself does not load"
    assert not info_folded.get("missing_keys")
    inputs = families.text_inputs(original, seed=2)
    expected, got = families.logits(original, inputs).double(), families.logits(folded, inputs).double()
    assert ((got - expected).norm() / expected.norm()).item() < MAX_ERROR
    return result


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def patterns(result: FoldResult) -> set[str]:
    return {pattern_of(norm.tensor) for norm in result.plan.folded}


def reason(result: FoldResult, norm: str) -> str:
    return next(n.reason or "" for n in result.plan.kept if n.tensor == norm)


def read(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def only_changed(folder: Path, output: Path) -> set[str]:
    """Patterns of the tensors that differ in any bit."""
    before, after = read(folder), read(output)
    assert list(before) == list(after)
    return {
        pattern_of(name)
        for name in before
        if before[name].dtype != after[name].dtype
        or not torch.equal(before[name].flatten().view(torch.uint8), after[name].flatten().view(torch.uint8))
    }


# ---- quantized and packed ----------------------------------------------------------------------------------------


def linears(tensors: Tensors) -> list[str]:
    return [n for n in tensors if n.endswith("_proj.weight")]


def fp8(tensors: Tensors) -> None:
    for name in linears(tensors):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)


def fp8_static(tensors: Tensors) -> None:
    for name in linears(tensors):
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = torch.ones(())
        tensors[name.replace("weight", "input_scale")] = torch.ones(())


def gptq(tensors: Tensors) -> None:
    for name in linears(tensors):
        out, into = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        tensors[stem + "qweight"] = torch.zeros(into // 8, out, dtype=torch.int32)
        tensors[stem + "qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
        tensors[stem + "scales"] = torch.ones(1, out, dtype=torch.float16)
        tensors[stem + "g_idx"] = torch.zeros(into, dtype=torch.int32)


def awq(tensors: Tensors) -> None:
    for name in linears(tensors):
        out, into = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        tensors[stem + "qweight"] = torch.zeros(into, out // 8, dtype=torch.int32)
        tensors[stem + "qzeros"] = torch.zeros(1, out // 8, dtype=torch.int32)
        tensors[stem + "scales"] = torch.ones(1, out, dtype=torch.float16)


def bnb_4bit(tensors: Tensors) -> None:
    for name in linears(tensors):
        size = tensors[name].numel()
        tensors[name] = torch.zeros(size // 2, 1, dtype=torch.uint8)
        tensors[name + ".absmax"] = torch.ones(size // 64 + 1)
        tensors[name + ".quant_map"] = torch.ones(16)
        tensors[name + ".quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


def bnb_8bit(tensors: Tensors) -> None:
    for name in linears(tensors):
        tensors[name] = tensors[name].to(torch.int8)
        tensors[name.replace("weight", "SCB")] = torch.ones(len(tensors[name]))
        tensors[name.replace("weight", "weight_format")] = torch.zeros((), dtype=torch.uint8)


def compressed(tensors: Tensors) -> None:
    for name in linears(tensors):
        out, into = tensors.pop(name).shape
        tensors[name + "_packed"] = torch.zeros(out, into // 8, dtype=torch.int32)
        tensors[name + "_scale"] = torch.ones(out, 1)
        tensors[name + "_shape"] = torch.tensor([out, into])


def bitnet(tensors: Tensors) -> None:
    for name in linears(tensors):
        out, into = tensors[name].shape
        tensors[name] = torch.zeros(out // 4, into, dtype=torch.uint8)
        tensors[name + "_scale"] = torch.ones(1)


def nvfp4(tensors: Tensors) -> None:
    for name in linears(tensors):
        out, into = tensors[name].shape
        tensors[name] = torch.zeros(out, into // 2, dtype=torch.uint8)
        tensors[name + "_scale"] = torch.ones(out, into // 16).to(torch.float8_e4m3fn)
        tensors[name + "_scale_2"] = torch.ones(())


@pytest.mark.parametrize(
    ("pack", "method"),
    [
        (fp8, "fp8"),
        (fp8_static, "compressed-tensors"),
        (gptq, "gptq"),
        (awq, "awq"),
        (bnb_4bit, "bitsandbytes"),
        (bnb_8bit, "bitsandbytes"),
        (compressed, "compressed-tensors"),
        (bitnet, "bitnet"),
        (nvfp4, "modelopt"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_quantized_linears_keep_their_norms(pack: Callable, method: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", pack, torch.bfloat16, quantization_config={"quant_method": method})
    result = fold(folder, tmp_path / "out", workers=1)
    assert patterns(result) == {FINAL}  # its reader, the head, is not quantized
    assert re.search(
        r"`model\.layers\.\*\..*_proj\.\w*weight`.*(quantized|packed) on disk",
        reason(result, "model.layers.0.input_layernorm.weight"),
    )
    assert not result.plan.folded_flag
    assert only_changed(folder, tmp_path / "out") == {FINAL, "lm_head.weight"}
    before, after = read(folder), read(tmp_path / "out")
    gain = before[FINAL].float()
    assert torch.equal(after["lm_head.weight"], (before["lm_head.weight"].float() * gain).bfloat16())


def test_one_quantized_linear_keeps_only_its_norm(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[UP0] = tensors[UP0].to(torch.float8_e4m3fn)
        tensors[UP0 + "_scale_inv"] = torch.ones(1, 1)

    folder = source(tmp_path / "in", "llama", change, torch.bfloat16, quantization_config={"quant_method": "fp8"})
    result = fold(folder, tmp_path / "out", workers=1)
    assert [n.tensor for n in result.plan.kept] == ["model.layers.0.post_attention_layernorm.weight"]
    assert "up_proj.weight" in result.plan.kept[0].reason
    before, after = read(folder), read(tmp_path / "out")
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = UP0.replace("up_proj", part)
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))


def test_quantized_linears_that_read_no_norm_do_not_matter(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("o_proj.weight", "down_proj.weight"))]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.ones(2, 2)

    folder = source(tmp_path / "in", "llama", change, torch.bfloat16, quantization_config={"quant_method": "fp8"})
    result = fold(folder, tmp_path / "out", workers=1)
    assert patterns(result) == {INPUT, POST, FINAL}
    assert result.plan.folded_flag


def test_adapter_beside_a_linear(tmp_path: Path) -> None:
    """A low-rank adapter in the same file reads the norm, but no class of transformers reads the adapter."""

    def change(tensors: Tensors) -> None:
        tensors[Q0.replace("weight", "lora_A.weight")] = torch.randn(4, 64)
        tensors[Q0.replace("weight", "lora_B.weight")] = torch.randn(96, 4)

    result = fold(source(tmp_path / "in", "llama", change), tmp_path / "out", workers=1)
    assert "lora_A" in reason(result, INPUT.replace("*", "0"))
    assert not result.plan.folded_flag


def test_quantized_head(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale"] = torch.ones(())

    folder = source(tmp_path / "in", "llama", change, torch.bfloat16, quantization_config={"quant_method": "fp8"})
    result = fold(folder, tmp_path / "out", workers=1)
    assert patterns(result) == {INPUT, POST}
    assert "`lm_head.weight`" in reason(result, FINAL)
    assert result.plan.lm_head == "kept"


def test_mxfp4_experts(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "mlp.experts.down_proj"))]:
            experts, into, out = tensors.pop(name).shape
            tensors[name + "_blocks"] = torch.zeros(experts, out, -(-into // 32), 16, dtype=torch.uint8)
            tensors[name + "_scales"] = torch.zeros(experts, out, -(-into // 32), dtype=torch.uint8)

    folder = source(tmp_path / "in", "gpt_oss", change, torch.bfloat16, quantization_config={"quant_method": "mxfp4"})
    result = fold(folder, tmp_path / "out", workers=1)
    assert patterns(result) == {INPUT, FINAL}
    assert "gate_up_proj" in reason(result, "model.layers.0.post_attention_layernorm.weight")
    assert not any("router" in name or "experts" in name for name in only_changed(folder, tmp_path / "out"))


def test_fp8_experts(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.ones(1, 1)

    folder = source(tmp_path / "in", "qwen3_moe", change, torch.bfloat16, quantization_config={"quant_method": "fp8"})
    result = fold(folder, tmp_path / "out", workers=1)
    kept = {n.tensor for n in result.plan.kept if "post_attention" in n.tensor}
    assert kept  # the sparse layers
    assert all("experts" in reason(result, norm) for norm in kept)
    assert INPUT in patterns(result)


def test_one_quantized_expert(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = [n for n in tensors if ".experts.3.up_proj" in n][-1]
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)

    folder = source(tmp_path / "in", "qwen3_moe", change, torch.bfloat16, quantization_config={"quant_method": "fp8"})
    result = fold(folder, tmp_path / "out", workers=1)
    kept = [n for n in result.plan.kept if "post_attention" in n.tensor]
    assert len(kept) == 1
    assert "experts.*.up_proj.weight" in kept[0].reason


# ---- names ---------------------------------------------------------------------------------------------------------


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def test_without_the_base_models_prefix(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", renamed(r"^model\.", ""))
    result = folds_right(folder, tmp_path / "out")
    assert patterns(result) == {INPUT.removeprefix("model."), POST.removeprefix("model."), "norm.weight"}


def test_doubled_prefix(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", renamed(r"^model\.", "model.model."))
    folds_right(folder, tmp_path / "out")  # transformers loads it


def test_base_model_keeps_what_it_returns(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", renamed(r"^model\.", ""), architectures=["LlamaModel"])
    result = fold(folder, tmp_path / "out", workers=1)
    assert "returns" in reason(result, "norm.weight")
    assert not result.plan.folded_flag


def test_base_model_files_with_a_tied_head(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        return renamed(r"^model\.", "")(tensors)

    folder = source(tmp_path / "in", "llama", change, tie_word_embeddings=True)
    result = folds_right(folder, tmp_path / "out")
    assert result.plan.lm_head == "untied"


def test_no_head_at_all(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", without("lm_head.weight"))
    with pytest.raises(FlashNormError, match=r"lm_head\.weight.*not in the checkpoint"):
        fold(folder, tmp_path / "out", workers=1)


@pytest.mark.parametrize("different", [False, True], ids=["equal", "different"])
@pytest.mark.parametrize("final_norm", ["auto", "keep", "untie"])
def test_tied_head_that_is_on_disk_all_the_same(different: bool, final_norm: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1.5 if different else 1)

    folder = source(tmp_path / "in", "llama", change, tie_word_embeddings=True)
    result = folds_right(folder, tmp_path / "out", final_norm=final_norm)
    assert (FINAL in patterns(result)) == (final_norm != "keep")


def test_old_names_of_experts(tmp_path: Path) -> None:
    assert "block_sparse_moe" in " ".join(read(source(tmp_path / "in", "mixtral")))  # as transformers writes them
    folds_right(tmp_path / "in", tmp_path / "out")


def stacked(tensors: Tensors) -> Tensors:
    """Experts as the model holds them in memory: two 3-D parameters for each layer."""
    new = {n: t for n, t in tensors.items() if ".experts." not in n}
    for layer in {n.split(".experts.")[0] for n in tensors if ".experts." in n}:
        experts = range(sum(n.startswith(f"{layer}.experts.") and "down_proj" in n for n in tensors))
        one = [{p: tensors[f"{layer}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in experts]
        new[f"{layer}.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in one])
        new[f"{layer}.experts.down_proj"] = torch.stack([e["down"] for e in one])
    return new


def test_stacked_experts_on_disk(tmp_path: Path) -> None:
    result = folds_right(source(tmp_path / "in", "qwen3_moe", stacked), tmp_path / "out")
    assert POST in patterns(result)
    assert any(pattern_of(r.tensor) == "model.layers.*.mlp.experts.gate_up_proj" for r in result.plan.readers)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "qwen3_moe", without("model.layers.3.mlp.experts.2.up_proj.weight"))
    with pytest.raises(FlashNormError, match=r"experts\.2\.up_proj\.weight.*not in the checkpoint"):
        fold(folder, tmp_path / "out", workers=1)


@pytest.mark.parametrize("name", [FINAL, INPUT.replace("*", "1"), Q0, "model.layers.0.self_attn.o_proj.weight"])
@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_a_tensor_under_two_names(prefix: str, name: str, tmp_path: Path) -> None:
    """Whichever of the two is loaded, the fold has to be right, or refused."""
    twice = name.replace("model.", prefix, 1)
    folder = source(tmp_path / "in", "llama", lambda t: t.update({twice: t[name] * 2}))
    try:
        folds_right(folder, tmp_path / "out")
    except FlashNormError as error:
        assert twice in str(error)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "cohere", "cohere2"])
def test_ties_that_runtimes_hard_wire(family: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", family)
    result = folds_right(folder, tmp_path / "out")
    assert result.plan.lm_head == "kept"
    assert "whatever the files say" in next(n.reason for n in result.plan.kept if n.tensor == FINAL)
    assert not result.plan.folded_flag
    result = folds_right(folder, tmp_path / "untied", final_norm="untie")
    assert result.plan.lm_head == "untied"
    assert any("llama.cpp" in note for note in result.plan.notes)


# ---- tensors that are too many, missing, or of another shape -------------------------------------------------------


def test_rotary_buffers(tmp_path: Path) -> None:
    folder = source(
        tmp_path / "in",
        "llama",
        lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(12) for i in range(4)}),
    )
    result = folds_right(folder, tmp_path / "out")
    assert patterns(result) == {INPUT, POST, FINAL}
    assert result.plan.folded_flag


@pytest.mark.parametrize("final_norm", ["auto", "untie"])
def test_multi_token_prediction_layer(final_norm: str, tmp_path: Path) -> None:
    """DeepSeek-V3's: a layer more than the config counts."""

    def change(tensors: Tensors) -> None:
        layer = {n.replace("layers.3.", "layers.4."): t.clone() for n, t in tensors.items() if "layers.3." in n}
        tensors.update(layer)
        tensors["model.layers.4.eh_proj.weight"] = torch.randn(64, 128)
        tensors["model.layers.4.shared_head.head.weight"] = torch.randn(128, 64)
        tensors["model.layers.4.hnorm.weight"] = torch.ones(64)

    folder = source(tmp_path / "in", "deepseek_v3", change)
    result = folds_right(folder, tmp_path / "out", final_norm=final_norm)
    assert (FINAL in patterns(result)) == (final_norm == "untie")
    if final_norm == "auto":
        assert "not read by DeepseekV3ForCausalLM" in reason(result, FINAL)
        assert not result.plan.folded_flag
    assert not any("layers.4." in n.tensor for n in result.plan.folded)
    assert not any("layers.4." in r.tensor for r in result.plan.readers)


def test_empty_and_scalar_tensors_are_carried(tmp_path: Path) -> None:
    extra = {"model.step": torch.tensor(3), "model.nothing": torch.empty(0), "model.flat": torch.empty(0, 7)}
    folder = source(tmp_path / "in", "llama", lambda t: t.update(extra))
    folds_right(folder, tmp_path / "out", final_norm="untie")
    after = read(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("name", [INPUT.replace("*", "1"), FINAL, Q0, UP0, "lm_head.weight"])
def test_missing_tensor(name: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", without(name))
    with pytest.raises(FlashNormError, match=re.escape(name) + ".*not in the checkpoint"):
        fold(folder, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [INPUT.replace("*", "1"), FINAL, Q0, UP0, "lm_head.weight"])
@pytest.mark.parametrize("how", ["shorter", "longer", "transposed", "extra dimension"])
def test_wrong_shape(name: str, how: str, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        t = tensors[name]
        tensors[name] = {
            "shorter": lambda: t[..., :-1],
            "longer": lambda: torch.cat([t, t], -1),
            "transposed": lambda: t.T if t.ndim > 1 else t[None].T,
            "extra dimension": lambda: t[None],
        }[how]()

    folder = source(tmp_path / "in", "llama", change)
    with pytest.raises(FlashNormError, match=re.escape(name) + ".*shape"):
        fold(folder, tmp_path / "out", workers=1)


# ---- dtypes ---------------------------------------------------------------------------------------------------------


def cast(*rules: tuple[str, torch.dtype]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for pattern, dtype in rules:
            tensors.update({n: t.to(dtype) for n, t in tensors.items() if re.search(pattern, n)})
        return tensors

    return change


@pytest.mark.parametrize(
    "rules",
    [
        [("", torch.bfloat16), ("norm", torch.float32)],
        [("", torch.bfloat16), ("norm", torch.float16)],
        [("norm", torch.bfloat16)],
        [("", torch.float64)],
        [
            ("", torch.bfloat16),
            (r"layers\.0\.", torch.float16),
            (r"layers\.1\.", torch.float32),
            (r"layers\.2\.", torch.float64),
        ],
        [("norm", torch.float64)],
    ],
    ids=["norms F32", "norms F16 among BF16", "norms BF16 among F32", "all F64", "mixed", "norms F64 among F32"],
)
def test_dtypes(rules: list, tmp_path: Path) -> None:
    """Each tensor keeps its dtype; the product of two exact float32 values is rounded once."""
    folder = source(tmp_path / "in", "llama", cast(*rules))
    fold(folder, tmp_path / "out", workers=1)
    before, after = read(folder), read(tmp_path / "out")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    for layer in range(4):
        gain = before[f"model.layers.{layer}.input_layernorm.weight"].double()
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(after[f"model.layers.{layer}.input_layernorm.weight"].double(), torch.ones(64).double())
        exact = before[name].double() * gain
        if before[name].dtype == torch.float64:
            torch.testing.assert_close(after[name], exact, rtol=1e-7, atol=0)
        else:
            expected = (before[name].float() * gain.float()).to(before[name].dtype)
            assert torch.equal(after[name], expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_norm_of_a_strange_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = source(tmp_path / "in", "llama", cast((r"^model\.norm", dtype)))
    result = fold(folder, tmp_path / "out", workers=1)
    assert "stored as" in reason(result, FINAL)


def test_infinite_gain(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[FINAL][3] = torch.inf

    with pytest.raises(FlashNormError, match=r"model\.norm\.weight.*inf"):
        fold(source(tmp_path / "in", "llama", change), tmp_path / "out", workers=1)


def test_gain_with_zeros(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[FINAL][3] = 0.0
        tensors[INPUT.replace("*", "0")][:] = 0.0

    folds_right(source(tmp_path / "in", "llama", change), tmp_path / "out")


# ---- order and shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "deepseek_v3"])
def test_any_order_and_number_of_files(family: str, shards: int, tmp_path: Path) -> None:
    """Tensors in an order that no model has, norms and readers in different files."""
    folder = source(tmp_path / "in", family)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, key=lambda name: name[::-1])
    if shards > 1:
        (folder / "model.safetensors").unlink()
        files = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({n: tensors[n] for n in names}, folder / "model.safetensors", metadata={"format": "pt", "of": "mine"})
    folds_right(folder, tmp_path / "out")
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(tmp_path / "out" / file.name, "pt") as other:
            assert set(one.keys()) <= set(other.keys())
            assert one.metadata() == other.metadata()
