"""`flashnorm fold-adapter`: folded base with folded adapter computes what source with adapter does, in real peft."""

import contextlib
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from command_line import run
from documents import document
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from flashnorm_cli import FlashNormError, fold, fold_adapter, weightless
from flashnorm_cli.adapters.files import WEIGHTS, adapter_warnings
from flashnorm_cli.checkpoint.header import read_header

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


def outputs(model: Any, adapter: Path, switched_off: bool = False) -> torch.Tensor:
    inputs = text(model)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with model.disable_adapter() if switched_off else contextlib.nullcontext():
        return families.logits(model, inputs)


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
    ("family", "tied", "targets", "saved"),
    [
        ("llama", False, "all-linear", None),
        ("llama", True, "all-linear", None),
        ("qwen3", False, LINEARS, ["q_norm", "post_attention_layernorm"]),  # one kept, one folded
        # 1 + w, and a tied head that becomes untied
        ("gemma3_text", True, [*LINEARS, "lm_head"], ["input_layernorm", "model.norm"]),
        ("gemma2", True, [*LINEARS, "lm_head"], ["model.norm"]),  # the final norm is kept
        ("phi3", False, ["qkv_proj", "o_proj", "gate_up_proj"], None),  # fused readers
        ("deepseek_v2", False, "all-linear", ["kv_a_layernorm"]),  # latent attention: norms inside of it
        # A gain per head, tiled over the output projection.
        ("qwen3_next", False, ["in_proj_qkvz", "out_proj", "q_proj", "o_proj", "shared_expert_gate"], None),
    ],
)
def test_lora(
    base: Callable[..., Path], family: str, tied: bool, targets: Any, saved: list[str] | None, tmp_path: Path
) -> None:
    folder = base(family, tied)
    check(folder, train(folder, lora(target_modules=targets, modules_to_save=saved), tmp_path / "adapter"))


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
    "a whole layer": (
        lora(
            target_modules=["o_proj"],
            modules_to_save=["layers.1"],
            exclude_modules=["layers.1"],
            layers_to_transform=[0],
        ),
        False,
        "right",
    ),
    "embedding": (lora(target_modules=["embed_tokens", "q_proj"]), False, "wrong"),
    "embedding, tied": (lora(target_modules=["embed_tokens", "q_proj"]), True, "wrong"),
    "embedding and head, tied": (
        lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        True,
        "wrong",
    ),
    "embedding and head, tied, regular expression": (
        lora(target_modules=r".*(embed_tokens|q_proj)", ensure_weight_tying=True),
        True,
        "wrong",
    ),
    "an embedding of its own, tied": (lora(modules_to_save=["embed_tokens"]), True, "wrong"),
    "embedding and head of its own, tied": (
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
        "wrong",
    ),
    "tokens": (lora(trainable_token_indices=[35, 40, 77]), False, "wrong"),
    "tokens, tied": (lora(trainable_token_indices=[35, 40, 77]), True, "wrong"),
    "tokens of both, tied": (
        lora(trainable_token_indices={"embed_tokens": [35, 40], "lm_head": [40, 50, 60]}),
        True,
        "wrong",
    ),
    "layers used twice": (lora(layer_replication=[[0, 2], [0, 2]]), False, "wrong"),
    "alora": (lora(alora_invocation_tokens=[INVOKES]), False, "wrong"),
    "gaussian": (lora(init_lora_weights="gaussian"), False, "wrong"),
    "mica": (lora(init_lora_weights="mica"), False, "wrong"),
    "adalora": (peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=LINEARS, total_step=10), False, "wrong"),
    "loha": (peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS), False, "wrong"),
    "ia3": (
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=LINEARS, feedforward_modules=["q_proj", "up_proj", "down_proj"]
        ),
        False,
        "right",
    ),
    "ln tuning": (peft.LNTuningConfig(task_type="CAUSAL_LM"), False, "wrong"),
    "prompt tuning": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, "right"),
    "prefix tuning": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False, "right"),
    "p tuning": (
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
        False,
        "right",
    ),
    "cpt": (
        peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[31, 32, 33, 34],
            cpt_mask=[1, 1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3, 4],
        ),
        False,
        "right",
    ),
    "trainable tokens": (peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[35, 40, 77]), False, "right"),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(base: Callable[..., Path], name: str, tmp_path: Path) -> None:
    config, tied, unfolded = CASES[name]
    folder = base("llama", tied)
    adapter = train(folder, config, tmp_path / "adapter")
    result = check(folder, adapter, unfolded=unfolded)
    if tied:  # what was untied has to be the adapter's, not a change of the base
        expected = outputs(load(folder / "source"), adapter, switched_off=True)
        assert difference(outputs(load(folder / "folded"), result.output, switched_off=True), expected) < EXACT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["embed_tokens", "up_proj"]])
def test_new_tokens(base: Callable[..., Path], tied: bool, targets: list[str], tmp_path: Path) -> None:
    """The vocabulary has grown before the training, and peft saves embedding and head with the adapter."""
    folder = base("llama", tied)

    def grown(which: str) -> Any:
        model = load(folder / which)
        model.resize_token_embeddings(131, mean_resizing=False)
        return model

    model = peft.get_peft_model(grown("source"), lora(target_modules=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    out = fold_adapter(tmp_path / "adapter", folder / "folded", tmp_path / "out").output
    # Where peft saves the embedding alone, the new rows of a head of its own are random after each load.
    known = 128 if "embed_tokens" in targets and not tied else 131
    expected = outputs(grown("source"), tmp_path / "adapter")[..., :known]
    assert difference(outputs(grown("folded"), out)[..., :known], expected) < EXACT
    assert difference(outputs(grown("folded"), tmp_path / "adapter")[..., :known], expected) > WRONG


def test_pissa_converted_to_plain_lora(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base("llama")
    model = peft.get_peft_model(load(folder / "source"), lora(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    check(folder, tmp_path / "adapter")


# ---- layouts and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(base: Callable[..., Path], dtype: torch.dtype, tmp_path: Path) -> None:
    folder = base("llama")
    adapter = train(folder, lora(use_dora=True, modules_to_save=["norm"]), tmp_path / "adapter")
    before = {name: t.to(dtype) for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(before, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    fold_adapter(adapter, folder / "folded", tmp_path / "out")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    gains = load_file(folder / "source" / "model.safetensors")
    stem = "base_model.model.model.layers.1."
    for norm, name in (("input_layernorm", "self_attn.k_proj"), ("post_attention_layernorm", "mlp.up_proj")):
        gain, key = gains[f"model.layers.1.{norm}.weight"], f"{stem}{name}.lora_A.weight"
        assert torch.equal(after[key], (before[key].float() * gain).to(dtype))
    key = "base_model.model.model.norm.weight"
    assert torch.equal(after[key], (before[key].double() / gains["model.norm.weight"].double()).to(dtype))
    for key in before:
        assert after[key].dtype == dtype
        if "o_proj" in key or "down_proj" in key or "lora_B" in key:
            assert torch.equal(after[key], before[key])


def test_norms_left_out_and_kept(base: Callable[..., Path], tmp_path: Path) -> None:
    """Layout dropped, and a base that kept its final norm."""
    source = base("llama") / "source"
    (tmp_path / "source").symlink_to(source)
    fold(source, tmp_path / "folded", layout="dropped", final_norm="keep")
    config = lora(target_modules=[*LINEARS, "lm_head"], modules_to_save=["norm"])
    result = check(tmp_path, train(tmp_path, config, tmp_path / "adapter"))
    changed = load_file(result.output / "adapter_model.safetensors")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key in ("base_model.model.lm_head.lora_A.weight", "base_model.model.model.norm.weight"):
        assert torch.equal(changed[key], before[key])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(base: Callable[..., Path], tmp_path: Path) -> Path:
    return train(base("llama"), lora(), tmp_path / "adapter")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, "peft would derive that afresh from the folded ones"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "qalora": ({"use_qalora": True}, "QALoRA averages"),
    "kasa": ({"kasa_config": {"beta": 1}}, "KaSA changes the base's weights"),
    "lokr": ({"peft_type": "LOKR"}, "is a Kronecker product"),
    "oft": ({"peft_type": "OFT"}, "rotates what the layer reads"),
    "vera": ({"peft_type": "VERA"}, "shared by layers that read different norms"),
    "unknown": ({"peft_type": "NEWEST"}, "peft type NEWEST cannot be folded"),
    "no type": ({"peft_type": None}, "merge_and_unload"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused(
    base: Callable[..., Path], adapter: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = REFUSED[kind]
    change_config(adapter, **changes)
    out = adapter.with_name("out")
    assert run("fold-adapter", adapter, out, "--base", base("llama") / "folded") == 1
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


def test_what_cannot_be_exact_on_this_base(base: Callable[..., Path], adapter: Path) -> None:
    tokens = peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[35])
    tokens_of_both = train(base("llama", tied=True), tokens, adapter.with_name("tokens"))
    with pytest.raises(FlashNormError, match="the source ties its output head to the embedding"):
        fold_adapter(tokens_of_both, base("llama", tied=True) / "folded", adapter.with_name("out"))
    change_config(adapter, peft_type="PREFIX_TUNING")
    with pytest.raises(FlashNormError, match=r"kv_a_layernorm\.weight, which is folded, may stand between"):
        fold_adapter(adapter, base("deepseek_v2") / "folded", adapter.with_name("out"))


def change(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "other model's": (lambda t: t.update({Q_A.replace("q_proj", "query"): t.pop(Q_A)}), "other half is missing"),
    "another width": (lambda t: t.update({Q_A: torch.zeros(4, 65)}), "the base reads 64 channels"),
    "another layer": (
        lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in list(t) if "layers.0" in k}),
        "has no model.layers.9",
    ),
    "no prefix": (lambda t: t.update({"lora_A.weight": t.pop(Q_A)}), "does not begin with 'base_model.model.'"),
    "unknown part": (lambda t: t.update({Q_A.replace("lora_A.weight", "lora_diag"): torch.zeros(4)}), "lora_diag: the"),
    "overflow": (lambda t: t.update({Q_A: torch.full((4, 64), 60000.0).half()}), "beyond the largest torch.float16"),
    "nan": (lambda t: t.update({Q_A: torch.full((4, 64), torch.nan)}), "holds inf or NaN"),
    "fp8": (lambda t: t.update({Q_A: t[Q_A].to(torch.float8_e4m3fn)}), "is stored as F8_E4M3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_do_not_fit_are_named(
    base: Callable[..., Path], adapter: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, words = BROKEN[kind]
    change(adapter, edit)
    assert run("fold-adapter", adapter, adapter.with_name("out"), "--base", base("llama") / "folded") == 1
    errors = capsys.readouterr().err
    assert words in errors and errors.count("\n") == 1
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


def test_a_norm_of_its_own_where_the_source_has_zero(tmp_path: Path) -> None:
    """What the folded base no longer lets through cannot come back."""
    model = small_llama()
    families.randomize_gains(model, seed=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0.0
    families.save(model, tmp_path / "source")
    fold(tmp_path / "source", tmp_path / "folded")
    own = train(tmp_path, lora(modules_to_save=["input_layernorm"]), tmp_path / "adapter")
    check(tmp_path, own)  # still zero
    key = "base_model.model.model.layers.0.input_layernorm.weight"
    change(own, lambda tensors: tensors[key].__setitem__(5, 0.1))
    with pytest.raises(FlashNormError, match=r"layers.0.input_layernorm.weight: .*lost the channel"):
        fold_adapter(own, tmp_path / "folded", tmp_path / "other")


def test_another_source_is_noticed(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """Same headers, other weights."""
    source, folded = base("llama") / "source", base("llama") / "folded"
    twin = Path(shutil.copytree(source, tmp_path / "twin"))
    tensors = load_file(twin / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] *= 1.01
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FlashNormError, match=r"does not hold what .* times .*layers.1.post_attention_layernorm"):
        fold_adapter(adapter, folded, tmp_path / "out", source=twin)
    with pytest.raises(FlashNormError, match=r"folded from another model.safetensors"):
        fold_adapter(adapter, folded, tmp_path / "out", source=base("qwen3") / "source")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_folder(base: Callable[..., Path], adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folded, out = base("llama") / "folded", adapter.with_name("out")
    (adapter / "README.md").write_text("---\nbase_model: the/source\ntags:\n- lora\n---\n# Mine\n")
    (adapter / "tokenizer").mkdir()
    (adapter / "tokenizer" / "vocab.txt").write_text("a\n")
    (adapter / "optimizer.pt").write_bytes(b"x")
    shutil.copytree(adapter, adapter / "checkpoint-5")
    assert run("fold-adapter", adapter, out, "--base", folded, "--json") == 0
    said = document(capsys.readouterr().out)
    assert [each["name"] for each in said["left_out"]] == ["checkpoint-5/", "optimizer.pt"]
    assert said["counts"] == {"tensors": 28, "gain": 10, "ratio": 0, "magnitude": 0} and said["check"]["modules"] == 10
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "flashnorm.json", "tokenizer",
    ]  # fmt: skip
    card = (out / "README.md").read_text()
    assert f'base_model: "{folded}"\ntags:\n- lora\n---\n\n> `flashnorm fold-adapter`' in card
    assert card.endswith("wrong.\n\n# Mine\n")
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (adapter, out))
    assert after.pop("base_model_name_or_path") == str(folded)
    before.pop("base_model_name_or_path")
    assert after == before
    assert list(read_header(out / WEIGHTS).tensors) == list(read_header(adapter / WEIGHTS).tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    assert not [w for w in caught if "nexpected" in str(w.message)]
    expected = outputs(load(base("llama") / "source"), adapter)
    assert difference(families.logits(auto, text(auto.get_base_model())), expected) < EXACT
    assert (out / WEIGHTS).stat().st_mode & 0o777 == (out / "README.md").stat().st_mode & 0o777
    # Once is enough.
    assert run("fold-adapter", out, adapter.with_name("twice"), "--base", folded) == 1
    assert "is folded already (flashnorm.json says so)" in capsys.readouterr().err
    (out / "flashnorm.json").unlink()
    assert run("fold-adapter", out, adapter.with_name("twice"), "--base", folded) == 1
    assert "which is the folded base itself: it fits as it is" in capsys.readouterr().err
    # And nothing is lost by a second run.
    assert run("fold-adapter", adapter, out, "--base", folded) == 2
    assert "exists already; add --overwrite" in capsys.readouterr().err
    assert run("fold-adapter", adapter, out, "--base", folded, "--overwrite", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert not list(out.parent.glob(".*"))


def test_wrong_calls(base: Callable[..., Path], adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folded = base("llama") / "source", base("llama") / "folded"
    (adapter.parent / "link").symlink_to(adapter.parent / "elsewhere")
    (adapter.parent / "full").mkdir()
    (adapter.parent / "full" / "thesis.txt").write_text("")
    for arguments, code, words in [
        ((adapter, "--base", source), 2, "is not a folded checkpoint (no flashnorm.json)"),
        ((source, "--base", folded), 1, "there is no adapter_config.json: is this a PEFT adapter?"),
        ((adapter.parent, "--base", folded), 1, "it holds adapters in adapter: name one of them"),
        ((adapter, adapter / "inside", "--base", folded), 2, "overlaps with the source"),
        ((adapter, folded, "--base", folded, "--overwrite"), 2, "is not an adapter"),
        ((adapter, adapter.parent / "link", "--base", folded), 2, "is a symbolic link"),
        ((adapter, adapter.parent / "full", "--base", folded, "--overwrite"), 2, "is not an adapter"),
        (("./nowhere", "--base", folded), 2, "no such folder"),
        ((adapter, "--base", folded, "--source-revision", "main"), 2, "--source-revision needs --source"),
    ]:
        assert run("fold-adapter", *arguments) == code, words
        assert words in capsys.readouterr().err
    assert run("verify", adapter) == 2
    assert "is an adapter; name the folded checkpoint" in capsys.readouterr().err


def test_pickles_come_with_a_command_that_works(
    base: Callable[..., Path], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    arguments = ("fold-adapter", adapter, adapter.with_name("out"), "--base", base("llama") / "folded")
    assert run(*arguments) == 1
    command = capsys.readouterr().err.split("convert it yourself: python ")[1]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert torch.equal(load_file(adapter / WEIGHTS)[Q_A], tensors[Q_A])
    assert run(*arguments) == 0
    assert "made for the unfolded base: adapter_model.bin (" in capsys.readouterr().out


def test_the_hub_is_asked_for_headers_norms_and_rows(base: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    """Source, base and adapter on the Hub: no shard is downloaded."""
    folder = base("llama")
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("some/source", folder / "source").resolve("main")
        hub.add_repo("some/folded", folder / "folded")
        hub.add_repo("some/lora", adapter)
        command = [sys.executable, "-m", "flashnorm_cli", "fold-adapter", "some/lora", "out", "--base", "some/folded"]
        run = subprocess.run(
            [*command, "--source", "some/source", "--source-revision", commit, "--json"],
            env=hub.client_env(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        shards = [r for r in hub.log if "model.safetensors" in r.path and "adapter" not in r.path]
        assert len(shards) > 20 and all(r.range is not None for r in shards if r.host == "hub" and r.sent)
        downloaded = [r for r in hub.log if r.host == "cdn" and r.range is None]
        assert len(downloaded) == 1, downloaded  # the adapter's own weights
    fold_adapter(adapter, folder / "folded", tmp_path / "local")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "local" / WEIGHTS).read_bytes()
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/folded"
    )


# ---- warnings --------------------------------------------------------------------------------------------------------


def test_weightless_runs_with_the_folded_adapter_and_warns_of_the_original(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = base("llama")
    original = train(folder, lora(modules_to_save=["model.norm"]), tmp_path / "adapter")
    out = fold_adapter(original, folder / "folded", tmp_path / "out").output
    expected = outputs(load(folder / "source"), original)
    for adapter, words in ((original, '`fold_adapter("<the adapter>", base='), (out, None)):
        model = peft.PeftModel.from_pretrained(load(folder / "folded"), adapter).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weightless(model)
        said = [str(w.message) for w in caught if "was made for" in str(w.message)]
        assert len(said) == (1 if words else 0) and all(words in text for text in said)
        error = difference(families.logits(model, text(model.get_base_model())), expected)
        assert error > WRONG if words else error < EXACT
    found = []
    for model_folder, adapter in ((folder / "source", original), (folder / "folded", out)):
        native = load(model_folder)  # transformers' own way
        native.load_adapter(str(adapter))
        assert adapter_warnings(native) == []
        found.append(families.logits(native.eval(), text(native)))
    assert difference(found[1], found[0]) < EXACT
    native = load(folder / "folded")
    native.load_adapter(str(original))
    assert "was made for" in adapter_warnings(native)[0]


def test_verify_speaks_of_an_adapter_beside_the_weights(
    base: Callable[..., Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base("llama")
    folded = Path(shutil.copytree(folder / "folded", tmp_path / "folded"))
    fold_adapter(adapter, folded, folded / "adapters" / "mine")
    arguments = ("verify", folded, "--source", folder / "source", "--level", "weights", "--no-record")
    assert run(*arguments) == 4  # as planned; level weights runs no model
    assert "fold-adapter" not in capsys.readouterr().out
    shutil.copytree(adapter, folded / "adapters" / "other")
    assert run(*arguments) == 4
    assert "adapters/other/adapter_config.json is an adapter" in capsys.readouterr().out
