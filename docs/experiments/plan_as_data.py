"""Run the own fuse-and-rotate of llm-compressor, AutoRound or AMD Quark with `flashnorm plan --emit`, and without it.

    python docs/experiments/plan_as_data.py llm-compressor --json docs/benchmarks/plan_as_data_llm_compressor.json

Each tool wants an environment of its own: `pip install llmcompressor==0.14.0.1`, or `auto-round==0.16.1`, or
`amd-quark==0.13 transformers accelerate`; and `pip install --no-deps -e .` of this repository. Models are tiny and
random, their gains far from one; nothing is downloaded. The error is that of the float32 logits, |after - before| /
|before|, over 3 x 11 random tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from flashnorm_cli.cli import main as flashnorm

EXACT = 1e-5
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 22,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
# What each model is here for.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},  # known to all three
    "granite": {"tie_word_embeddings": False},  # numbers beside the weights
    "smollm3": {"tie_word_embeddings": True},  # a tied head
    "arcee": {},  # two linears in the MLP
    "apertus": {},  # its own names of norms
    "phi3": {},  # q, k and v in one linear, gate and up in another
    "glm": {"attention_bias": False},  # gate and up in one
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},  # biases of readers and of writers
    "minicpm3": LATENT,  # latent attention: four linears read the first norm
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},  # layers that differ
    "gemma": {},  # 1 + w, a tied head, --final-norm untie
    "qwen3_5_text": {  # 1 + w, linear attention
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 16,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},  # experts and routers
}
ONE_PLUS = ("gemma", "qwen3_5_text")
OPTIONS = {"gemma": ["--final-norm", "untie"]}
PACKAGES = {
    "llm-compressor": ("llmcompressor", "compressed-tensors"),
    "auto-round": ("auto-round",),
    "quark": ("amd-quark",),
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **MODELS[family]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                one = 0.0 if family in ONE_PLUS and "linear_attn" not in name else 1.0
                parameter.copy_(one + 1.4 * (torch.rand_like(parameter) - 0.5))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (3, 11))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


# ---- the tools -------------------------------------------------------------------------------------------------------


def llm_compressor(model: Any, settings: dict[str, Any] | None) -> Any:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform import SpinQuantModifier

    modifier = SpinQuantModifier(**settings["SpinQuantModifier"]) if settings else SpinQuantModifier(rotations=["R1"])
    oneshot(model=model, recipe=[modifier], pipeline="datafree")
    return model


def auto_round(model: Any, settings: dict[str, Any] | None) -> Any:
    from auto_round.algorithms.transforms.hadamard.dispatcher import apply_hadamard_rotation
    from auto_round.algorithms.transforms.hadamard.inplace.model_config import RotationMapping, register_mapping

    if settings:
        register_mapping(settings["register_as"], RotationMapping(**settings["RotationMapping"]))
    options = {"backend": "inplace", "fuse_online_to_weight": True, "hadamard_type": "inplace_hadamard"}
    return apply_hadamard_rotation(model, options, data_type="int")[0]


def quark(model: Any, settings: dict[str, Any] | None) -> Any:
    from quark.torch.algorithm.rotation.rotation import RotationProcessor
    from quark.torch.quantization.config.config import RotationConfig

    if settings:
        config = RotationConfig(**settings["RotationConfig"])
    else:  # what its documentation gives for Llama: it has no other default
        config = RotationConfig(scaling_layers=LLAMA_LAYERS, model_decoder_layers="model.layers")
    processor = RotationProcessor(model, config, None)
    processor.apply()
    return processor.model


def _group(writer: str, norm: str, *readers: str) -> dict[str, Any]:
    return {"prev_modules": [writer], "norm_module": norm, "next_modules": [*readers]}


_L = "model.layers.layer_id"
_ATTENTION = f"{_L}.input_layernorm", *(f"{_L}.self_attn.{x}_proj" for x in "qkv")
_MLP = _group(f"{_L}.self_attn.o_proj", f"{_L}.post_attention_layernorm", f"{_L}.mlp.up_proj", f"{_L}.mlp.gate_proj")
LLAMA_LAYERS = {
    "first_layer": [_group("model.embed_tokens", *_ATTENTION), _MLP],
    "middle_layers": [_group("model.layers.pre_layer_id.mlp.down_proj", *_ATTENTION), _MLP],
    "last_layer": [_group(f"{_L}.mlp.down_proj", "model.norm", "lm_head")],
}
TOOLS = {"llm-compressor": llm_compressor, "auto-round": auto_round, "quark": quark}


# ---- one model -------------------------------------------------------------------------------------------------------


def plan(tool: str, folder: Path, family: str) -> tuple[dict[str, Any] | None, str]:
    """What `flashnorm plan FOLDER --emit TOOL` prints, or why it does not."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            flashnorm(["plan", str(folder), "--emit", tool, *OPTIONS.get(family, [])])
        except SystemExit as end:
            code = end.code
    return (json.loads(out.getvalue()), "") if code == 0 else (None, err.getvalue().strip().splitlines()[-1])


def tried(tool: str, family: str, folder: Path, settings: dict[str, Any] | None) -> dict[str, Any]:
    """The error of the logits after the tool has rotated the model, or what it said instead."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, weights = logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            model = TOOLS[tool](model, settings)
        error = float((logits(model) - before).norm() / before.norm())
    except Exception as problem:
        return {"refused": f"{type(problem).__name__}: {problem}"[:300]}
    now = dict(model.named_parameters())
    changed = sum(n in now and not torch.equal(now[n].detach(), w) for n, w in weights.items())
    return {"error": error, "changed": changed, "exact": error < EXACT and changed > 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--json", type=Path, help="write the raw results here")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = []
    for family in arguments.families or MODELS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / family
            build(family).save_pretrained(folder)
            settings, refused = plan(arguments.tool, folder, family)
            theirs = tried(arguments.tool, family, folder, None)  # first: AutoRound keeps what was registered
            ours = tried(arguments.tool, family, folder, settings) if settings else {"not emitted": refused}
            row = {"model": family, "with the plan": ours, "without": theirs}
        results.append(row)
        print(json.dumps(row), flush=True)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[arguments.tool]}
    record = {
        "tool": arguments.tool,
        "versions": {**versions, "torch": torch.__version__, "transformers": transformers.__version__},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "exact": EXACT,
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    wrong = [r["model"] for r in results if not r["with the plan"].get("exact", "not emitted" in r["with the plan"])]
    print(f"wrong: {', '.join(wrong) or 'none'}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
