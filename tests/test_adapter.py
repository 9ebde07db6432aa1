"""`flashnorm fold-adapter`: folded base with folded adapter computes what source with adapter computes, in real peft."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flashnorm_cli import fold, fold_adapter
from flashnorm_cli.cli import main

peft = pytest.importorskip("peft", reason="peft is not installed")

# The error of the logits that the fold of the adapter may add, and one that nobody could overlook.
EXACT, WRONG = 1e-5, 1e-2
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
INVOKES = 40  # a token of every test text
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a family's source and folded checkpoint once; returns the folder that holds both."""
    made: dict[str, Path] = {}

    def make(family: str, tied: bool = False) -> Path:
        name = f"{family}-tied" if tied else family
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            model = small_llama() if family == "llama" else families.build(family, seed=0)
            if tied:
                model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
                model.tie_weights()
            families.randomize_gains(model, seed=1)
            families.save(model, folder / "source")
            fold(folder / "source", folder / "folded")
        return made[name]

    return make


def small_llama() -> Any:
    """Two layers are enough for all that is not about families."""
    config = families.small_config("llama")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).float().eval()
    families._randomize_weights(model)
    return model


def load(folder: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)  # a head for classification is not in the files
    return auto.from_pretrained(folder, dtype=torch.float32, **more).eval()


@torch.no_grad()
def train(folder: Path, config: Any, out: Path, auto: Any = AutoModelForCausalLM, **more: Any) -> Path:
    """An adapter of the source with random weights, as peft saves it."""
    model = peft.get_peft_model(load(folder / "source", auto, **more), config)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name or "norm" in name:
            parameter.mul_(1 + 0.3 * noise.tanh())
        else:
            parameter.add_(0.4 * noise / max(parameter.shape[-1], 1) ** 0.5 if parameter.ndim > 1 else 0.3 * noise)
    model.save_pretrained(out)
    return out


def text(model: Any) -> dict[str, torch.Tensor]:
    inputs = families.text_inputs(model, seed=3)
    inputs["input_ids"][:, 4] = INVOKES
    return inputs


def outputs(model: Any, adapter: Path) -> torch.Tensor:
    inputs = text(model)
    return families.logits(peft.PeftModel.from_pretrained(model, adapter).eval(), inputs)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check(folder: Path, adapter: Path, auto: Any = AutoModelForCausalLM, unfolded: str = "wrong", **more: Any) -> Any:
    """Fold an adapter and compare. `unfolded` says what the original is on the folded base: wrong or right."""
    result = fold_adapter(adapter, folder / "folded", adapter.with_name("out"), overwrite=True)
    source = load(folder / "source", auto, **more)
    without = families.logits(source, text(source))
    expected = outputs(source, adapter)
    assert difference(expected[:, -without.shape[1] :], without) > WRONG, "the adapter does nothing"
    assert difference(outputs(load(folder / "folded", auto, **more), result.output), expected) < EXACT
    error = difference(outputs(load(folder / "folded", auto, **more), adapter), expected)
    assert error > WRONG if unfolded == "wrong" else error < EXACT
    return result


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": LINEARS, **more})


# ---- families: where the gain comes from, and how the readers lie ----------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied", "targets"),
    [
        ("llama", False, "all-linear"),
        ("llama", True, "all-linear"),
        ("qwen3", False, LINEARS),
        ("gemma3_text", True, [*LINEARS, "lm_head"]),  # 1 + w, a tied head that becomes untied
        ("gemma2", True, [*LINEARS, "lm_head"]),  # the final norm is kept
        ("phi3", False, ["qkv_proj", "o_proj", "gate_up_proj"]),  # fused readers
        ("deepseek_v2", False, "all-linear"),  # latent attention: norms inside of it, read in part
        ("qwen3_next", False, ["in_proj_qkvz", "out_proj", "q_proj", "o_proj", "shared_expert_gate"]),  # tiled gain
    ],
)
def test_lora(base: Callable[..., Path], family: str, tied: bool, targets: Any, tmp_path: Path) -> None:
    folder = base(family, tied)
    check(folder, train(folder, lora(target_modules=targets), tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("qwen3_moe", ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]),
        ("gpt_oss", ["experts.gate_up_proj", "experts.down_proj"]),  # (experts, in, out), and the module says so
        ("llama4_text", ["experts.gate_up_proj", "experts.down_proj"]),  # so as well, but peft takes it for (out, in)
    ],
)
def test_lora_on_experts(base: Callable[..., Path], family: str, parameters: list[str], tmp_path: Path) -> None:
    config = lora(target_modules=ATTENTION, target_parameters=parameters)
    check(base(family), train(base(family), config, tmp_path / "adapter"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_by_their_old_names(base: Callable[..., Path], family: str, tmp_path: Path) -> None:
    """Adapters from before transformers 5 have a module for each expert; peft joins them while it loads."""
    names = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "down_proj", "up_proj"]
    folder = base(family)
    adapter = train(folder, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in load_file(folder / "source" / "model.safetensors").items():
        if ".experts." in name and name.split(".")[-2] in names:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1]) / 8
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4) / 2
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    change_config(adapter, target_modules=["q_proj", *names])
    check(folder, adapter)


def change_config(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_conv1d(tmp_path: Path) -> None:
    """ImageGPT stores its linears as (in, out), behind norms without a mean."""
    config = transformers.ImageGPTConfig(
        vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=112, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = transformers.ImageGPTForCausalImageModeling(config).float().eval()
    families._randomize_weights(model)
    families.randomize_gains(model, seed=1)
    families.save(model, tmp_path / "source")
    fold(tmp_path / "source", tmp_path / "folded")
    auto = transformers.ImageGPTForCausalImageModeling
    for dora in (False, True):
        targets = lora(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, use_dora=dora)
        check(tmp_path, train(tmp_path, targets, tmp_path / "adapter", auto), auto)


def test_a_head_for_classification(base: Callable[..., Path], tmp_path: Path) -> None:
    """It reads the final norm, and is part of the adapter only."""
    folder, auto = base("llama"), AutoModelForSequenceClassification
    config = lora(task_type="SEQ_CLS")
    more = {"num_labels": 5, "pad_token_id": 0}
    check(folder, train(folder, config, tmp_path / "adapter", auto, **more), auto, **more)


CASES: dict[str, tuple[Any, bool, str]] = {
    "rslora, ranks and alphas of their own": (
        lora(use_rslora=True, rank_pattern={"q_proj": 8, r".*\.1\.mlp\.up_proj": 2}, alpha_pattern={"v_proj": 24}),
        False,
        "wrong",
    ),
    "a regular expression": (lora(target_modules=r".*layers\.[01]\.(self_attn|mlp)\.(v|up|down)_proj"), False, "wrong"),
    "dora": (lora(use_dora=True, use_rslora=True, alpha_pattern={"v_proj": 24}), False, "wrong"),
    "dora, tied head": (lora(use_dora=True, target_modules=[*LINEARS, "lm_head", "embed_tokens"]), True, "wrong"),
    "bias": (lora(lora_bias=True), False, "wrong"),
    "norms of its own": (lora(modules_to_save=["input_layernorm", "norm"]), False, "wrong"),
    "a head of its own": (lora(modules_to_save=["lm_head"]), False, "wrong"),
    "a head of its own, tied": (lora(modules_to_save=["lm_head"]), True, "wrong"),
    "a whole MLP": (lora(target_modules=ATTENTION, modules_to_save=["mlp"]), False, "wrong"),
    "a whole layer": (lora(target_modules=["o_proj"], modules_to_save=["layers.1"], exclude_modules=["layers.1"], layers_to_transform=[0]), False, "right"),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), False, "wrong"),
    "embedding, tied": (lora(target_modules=["embed_tokens", "q_proj"]), True, "wrong"),
    "embedding and head, tied": (lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), True, "wrong"),
    "embedding and head, tied, regular expression": (
        lora(target_modules=r".*(embed_tokens|q_proj)", ensure_weight_tying=True), True, "wrong"
    ),
    "an embedding of its own, tied": (lora(modules_to_save=["embed_tokens"]), True, "wrong"),
    "embedding and head of its own, tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True, "wrong"),
    "tokens": (lora(trainable_token_indices=[35, 40, 77]), False, "wrong"),
    "tokens, tied": (lora(trainable_token_indices=[35, 40, 77]), True, "wrong"),
    "tokens of both, tied": (
        lora(trainable_token_indices={"embed_tokens": [35, 40], "lm_head": [40, 50, 60]}), True, "wrong"
    ),
    "layers used twice": (lora(layer_replication=[[0, 2], [0, 2]]), False, "wrong"),
    "alora": (lora(alora_invocation_tokens=[INVOKES]), False, "wrong"),
    "gaussian": (lora(init_lora_weights="gaussian"), False, "wrong"),
    "mica": (lora(init_lora_weights="mica"), False, "wrong"),
    "adalora": (peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, total_step=10), False, "wrong"),
    "loha": (peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS), False, "wrong"),
    "ia3": (peft.IA3Config(task_type="CAUSAL_LM", target_modules=LINEARS, feedforward_modules=["q_proj", "up_proj", "down_proj"]), False, "right"),
    "ln tuning": (peft.LNTuningConfig(task_type="CAUSAL_LM"), False, "wrong"),
    "prompt tuning": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, "right"),
    "prefix tuning": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, "right"),
    "p tuning": (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16), False, "right"),
    "trainable tokens": (peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[35, 40, 77]), False, "right"),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(base: Callable[..., Path], name: str, tmp_path: Path) -> None:
    config, tied, unfolded = CASES[name]
    folder = base("llama", tied)
    check(folder, train(folder, config, tmp_path / "adapter"), unfolded=unfolded)
