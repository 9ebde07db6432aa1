"""Weights that are not multiplied as they lie on disk: kept or refused by name, and right where they are folded.

Each case is a tiny real model of transformers whose config, files or tensors say that something happens at run time.
What can run here (BitNet's online quantization) is loaded as its users load it and compared in float32; for the rest
the plan has to name the method.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import PlanError
from flashnorm_cli.folding.fold import FoldResult, fold
from flashnorm_cli.folding.in_memory import fold_model_
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.plan.planner import make_plan

MAX_ERROR = 1e-5
Tensors = dict[str, torch.Tensor]
LAYER0 = "model.layers.0."
FINAL = "model.norm.weight"


def source(
    folder: Path,
    family: str = "llama",
    change: Callable[[Tensors], Any] = len,
    metadata: dict[str, str] | None = None,
    files: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A tiny checkpoint with tensors, header metadata, JSON files and config.json as asked for."""
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata or {"format": "pt"}
    )
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config, indent=2))
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def plan_of(folder: Path) -> Plan:
    return make_plan(open_checkpoint(Source(str(folder))))


def kept(plan: Plan) -> dict[str, str]:
    return {pattern_of(norm.tensor): norm.reason or "" for norm in plan.kept}


def logits_agree(folder: Path, output: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, output)]
    inputs = families.text_inputs(models[0], seed=2)
    want, got = (families.logits(model, inputs).double() for model in models)
    assert ((got - want).norm() / want.norm()).item() < MAX_ERROR


def folded_right(folder: Path) -> FoldResult:
    output = folder.with_name("out")
    result = fold(folder, output, workers=1)
    logits_agree(folder, output)
    return result


# ---- quantized as a whole at load ------------------------------------------------------------------------------------

ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.mark.parametrize("family", ["bitnet", "llama", "qwen3"])  # qwen3: with norms on queries and keys
def test_ternary_at_load_keeps_the_norms(family: str, tmp_path: Path) -> None:
    """The head is the one matrix that AutoBitLinear leaves alone: only its norm is folded."""
    result = folded_right(source(tmp_path / "in", family, quantization_config=ONLINE))
    assert {n.tensor for n in result.plan.folded} == {FINAL}
    assert "to -1, 0 and 1" in kept(result.plan)["model.layers.*.input_layernorm.weight"]
    assert any("remove the key" in note for note in result.plan.notes)


def test_a_norm_of_unquantized_linears_is_folded(tmp_path: Path) -> None:
    """Attention is on the list of what stays as it is, the MLP is not."""
    listed = ["lm_head", r"model\.layers\.\d+\.self_attn"]
    folder = source(tmp_path / "in", quantization_config={**ONLINE, "modules_to_not_convert": listed})
    result = folded_right(folder)
    assert {pattern_of(n.tensor) for n in result.plan.folded} == {FINAL, "model.layers.*.input_layernorm.weight"}


def test_a_list_without_the_head_quantizes_the_head(tmp_path: Path) -> None:
    folder = source(tmp_path / "in", quantization_config={**ONLINE, "modules_to_not_convert": ["mlp.gate"]})
    assert set(kept(plan_of(folder))) >= {FINAL, "model.layers.*.post_attention_layernorm.weight"}  # not `gate_proj`


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None},
        {"load_in_8bit": True},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
        {"quant_method": "quanto", "weights": "int8"},
        {"quant_method": "hqq", "skip_modules": ["lm_head"]},
        {"quant_method": "fp_quant", "hadamard_group_size": 32},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},  # says quantized, and nothing is
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"targets": ["Linear"], "weights": None, "input_activations": {"num_bits": 8}}}, "ignore": ["lm_head"]},  # noqa: E501
    ],
    ids=lambda config: str(config.get("quant_method", "load_in_8bit")),
)  # fmt: skip
def test_methods_that_quantize_floats(config: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "in", quantization_config=config))
    assert set(kept(plan)) == {
        "model.layers.*.input_layernorm.weight",
        "model.layers.*.post_attention_layernorm.weight",
    }
    name = config.get("quant_method", "bitsandbytes").replace("_", "-")
    assert all(name in reason for reason in kept(plan).values())


def test_a_cache_in_8_bits_changes_nothing(tmp_path: Path) -> None:
    def scales(tensors: Tensors) -> None:
        for name in ("k_scale", "v_scale"):
            tensors[f"{LAYER0}self_attn.{name}"] = torch.tensor(0.1)

    scheme = {"num_bits": 8, "type": "float"}
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    plan = plan_of(source(tmp_path / "in", change=scales, quantization_config=config))
    assert plan.folded_flag
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert plan_of(source(tmp_path / "other", files={"hf_quant_config.json": modelopt})).folded_flag


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"quantization_config": {"quant_method": "exl3", "bits": 4.0}}, {}, "'exl3'"),
        ({"quantization_config": {"bits": 4}}, {}, "no quant_method"),
        ({"text_config": {"quantization_config": {"quant_method": "new"}}}, {}, "text_config.quantization_config"),
        ({"quantization": {"group_size": 64, "bits": 4}}, {}, "MLX"),
        ({}, {"hf_quant_config.json": {"quantization": {"quant_method": "secret"}}}, "hf_quant_config.json"),
        ({"quip_params": {"codebook": "E8P12"}}, {}, "quip_params"),
        ({"transform_config": {"config_groups": {"R3": {"type": "hadamard"}}}}, {}, "transform_config"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]}}}}}, {}, "transform_config"),  # noqa: E501
        ({"quantization_config": {"quant_method": "quark", "algo_config": [{"name": "rotation"}]}}, {}, "rotat"),
        ({"use_fake_quant": True, "w_bits": 4}, {}, "use_fake_quant"),
        ({"torch_dtype": "float8_e4m3fn", "dtype": "float8_e4m3fn"}, {}, "float8_e4m3fn"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(config: dict, files: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(source(tmp_path / "in", files=files, **config))


@pytest.mark.parametrize("metadata", [{"format": "mlx"}, {"format": "tf"}, {"format": "pt", "quantization": "q4"}])
def test_other_libraries_files(metadata: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"mlx|'tf'|'quantization'"):
        plan_of(source(tmp_path / "in", metadata=metadata))


def test_empty_configs_say_nothing(tmp_path: Path) -> None:
    config: dict[str, Any] = {"quantization_config": None, "transform_config": {"config_groups": {}}, "w_bits": 0}
    assert plan_of(source(tmp_path / "in", **config)).folded_flag


def test_a_rotation_in_a_file(tmp_path: Path) -> None:
    folder = source(tmp_path / "in")
    torch.save(torch.eye(4), folder / "R.bin")
    with pytest.raises(PlanError, match=r"R\.bin looks like a rotation"):
        plan_of(folder)


def test_a_model_in_memory(tmp_path: Path) -> None:
    model = families.build("llama", seed=0)
    families.randomize_gains(model, seed=1)
    model.config.online_rotation = "hadamard"
    with pytest.raises(PlanError, match="online_rotation"):
        fold_model_(model)


# ---- what lies beside the readers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_a_scale_of_activations_keeps_its_module(family: str, tmp_path: Path) -> None:
    """Calibrated for the unfolded activations, and by no name of the linear that it stands before."""

    def scale(tensors: Tensors) -> None:
        tensors[LAYER0 + "mlp.input_scale"] = torch.tensor(0.02)

    plan = plan_of(source(tmp_path / "in", family, scale))
    reasons = {norm.tensor: norm.reason for norm in plan.kept}
    norm = LAYER0 + ("post_attention_layernorm.weight" if family != "olmo2" else "post_feedforward_layernorm.weight")
    if family != "olmo2":  # whose layers norm what they return: no norm is before the MLP
        assert "mlp.input_scale" in (reasons[norm] or "")
        assert norm.replace(".0.", ".1.") not in reasons
    else:
        assert "mlp.input_scale" not in str(reasons)


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "R1"), ("mistral", LAYER0 + "self_attn.R2.weight"), ("qwen2", LAYER0 + "mlp.down_proj.SU")],
)
def test_a_rotation_among_the_tensors(family: str, name: str, tmp_path: Path) -> None:
    def rotate(tensors: Tensors) -> None:
        tensors[name] = torch.eye(8)

    with pytest.raises(PlanError, match=f"{name} looks like a rotation"):
        plan_of(source(tmp_path / "in", family, rotate))


def test_a_scale_beside_a_norm_keeps_it(tmp_path: Path) -> None:
    def scale(tensors: Tensors) -> None:
        tensors[LAYER0 + "input_layernorm.weight_scale"] = torch.ones(1)

    plan = plan_of(source(tmp_path / "in", change=scale))
    assert [norm.tensor for norm in plan.kept] == [LAYER0 + "input_layernorm.weight"]


def test_old_buffers_are_no_readers(tmp_path: Path) -> None:
    def buffers(tensors: Tensors) -> None:
        tensors[LAYER0 + "self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    assert plan_of(source(tmp_path / "in", change=buffers)).folded_flag


# ---- shapes, lost tensors, dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),  # neither a gain nor a reader
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3_next", "model.layers.0.linear_attn.conv1d.weight"),
        ("llama", "model.embed_tokens.weight"),
    ],
)
def test_shapes_that_would_not_load(family: str, name: str, tmp_path: Path) -> None:
    def longer(tensors: Tensors) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    with pytest.raises(PlanError, match=f"{name} has shape .* on disk, but the config asks for"):
        plan_of(source(tmp_path / "in", family, longer))


def test_lost_tensors_are_said(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.down_proj.weight"]

    plan = plan_of(source(tmp_path / "in", change=lose))
    assert any("lack `model.layers.*.mlp.down_proj.weight` (1" in note for note in plan.notes)


def test_another_dtype_than_the_config_asks_for(tmp_path: Path) -> None:
    plan = plan_of(source(tmp_path / "in", dtype="bfloat16"))
    assert any("asks for BF16" in note and "F32" in note for note in plan.notes)
    assert not any("asks for" in note for note in plan_of(source(tmp_path / "other", dtype="float32")).notes)


def test_weights_on_a_grid_of_4_bits(tmp_path: Path) -> None:
    def grid(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "_proj.weight" in name and tensor.shape[1] % 32 == 0:
                blocks = tensor.reshape(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True) / 7
                tensors[name] = ((blocks / scale).round() * scale).view(tensor.shape)

    assert any("made for 4 bits" in note for note in plan_of(source(tmp_path / "in", change=grid)).notes)
    assert not any("4 bits" in note for note in plan_of(source(tmp_path / "other")).notes)
