"""What a user is told: wrappers' names, classes that transformers does not know, other tools' flags, classifiers.

Real models of transformers, saved as other tools save them.
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
import transformers
from safetensors.torch import load_file, save_file

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.cli import main
from flashnorm_cli.errors import FlashNormError, PlanError
from flashnorm_cli.folding.fold import FoldResult, fold
from flashnorm_cli.folding.in_memory import fold_model_
from flashnorm_cli.plan.planner import make_plan
from flashnorm_cli.trace.words import model_words

MAX_ERROR = 1e-5
FINAL = "model.norm.weight"
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def edit(folder: Path, **config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config, indent=2))
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> Path:
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def llama(folder: Path, family: str = "llama") -> Path:
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder)
    return folder


def folded_right(folder: Path, cls: Any, rows: int = 2, **options: Any) -> FoldResult:
    """Fold and compare the logits with what `cls` makes of source and fold, in float32."""
    result = fold(folder, folder.with_name("out"), workers=1, **options)
    ids = torch.randint(5, 90, (rows, 9), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 1  # T5's end token
    got = []
    for path in (folder, result.output):
        model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        with torch.no_grad():
            got.append(model.eval()(input_ids=ids).logits.double())
    assert ((got[1] - got[0]).norm() / got[0].norm()).item() < MAX_ERROR
    return result


# ---- names of wrappers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", lambda n: f"module.{n}", "`module.` (torch's DataParallel"),
        ("qwen3", lambda n: f"_orig_mod.{n}", "`_orig_mod.` (torch.compile)"),
        ("mistral", lambda n: f"base_model.model.{n}", "`base_model.model.` (PEFT)"),
        ("llama", lambda n: f"module._orig_mod.{n}", "`module.`, `_orig_mod.`"),
        ("llama", lambda n: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", n), "activation checkpointing"),
        ("t5", lambda n: f"student.net.{n}", "`student.net.`"),
    ],
)
def test_wrappers_are_named(family: str, change: Callable[[str], str], words: str, tmp_path: Path) -> None:
    folder = rename(llama(tmp_path / "in", family), change)
    with pytest.raises(PlanError) as caught:
        make_plan(open_checkpoint(Source(str(folder))))
    said = str(caught.value)
    assert words in said
    assert "folded already" not in said
    assert "rename them" in said


def test_another_tools_names_are_not_called_folded(tmp_path: Path) -> None:
    """As the authors of Llama name their tensors."""
    theirs = {
        "self_attn.q_proj": "attention.wq",
        "mlp.gate_proj": "feed_forward.w1",
        "input_layernorm": "attention_norm",
    }

    def change(name: str) -> str:
        for ours, other in theirs.items():
            name = name.replace(ours, other)
        return (
            re.sub(r"^model\.|_proj|_layernorm", "", name)
            .replace("mlp", "feed_forward")
            .replace("self_attn", "attention")
        )

    folder = rename(llama(tmp_path / "in"), change)
    with pytest.raises(
        PlanError, match=r"names that LlamaForCausalLM does not load .*convert it to transformers' first"
    ):
        make_plan(open_checkpoint(Source(str(folder))))


# ---- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "FSDPLlamaForCausalLM"), ("mistral", "MISTRALForCausalLM"), ("qwen3", "DDPQwen3ForCausalLM")],
)
def test_other_spellings_are_what_auto_classes_take(family: str, name: str, tmp_path: Path) -> None:
    folder = edit(llama(tmp_path / "in", family), architectures=[name])
    result = folded_right(folder, transformers.AutoModelForCausalLM)
    assert FINAL in {norm.tensor for norm in result.plan.folded}
    assert any(name in note for note in result.plan.notes)


def test_a_class_that_may_be_more_keeps_the_final_norm(tmp_path: Path) -> None:
    folder = edit(llama(tmp_path / "in"), architectures=["LlamaBiEncoderForCausalLM"])
    result = folded_right(folder, transformers.AutoModelForCausalLM)
    assert [norm.tensor for norm in result.plan.kept] == [FINAL]
    assert "LlamaBiEncoderForCausalLM" in (result.plan.kept[0].reason or "")
    assert not make_plan(open_checkpoint(Source(str(folder))), "untie").kept


# ---- classifiers -----------------------------------------------------------------------------------------------------


def classifier(folder: Path, name: str, **config: Any) -> Path:
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    torch.manual_seed(0)
    model = cls(getattr(transformers, f"{name}Config")(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    families.randomize_gains(model, seed=1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
def test_a_classifier_without_a_pad_token(name: str, tmp_path: Path) -> None:
    folder = classifier(tmp_path / "in", name, **TINY, num_key_value_heads=2, num_labels=3, pad_token_id=None)
    result = folded_right(folder, transformers.AutoModelForSequenceClassification, rows=1)
    assert not result.plan.kept


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_a_classifier_that_reads_the_end_token(name: str, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    folder = classifier(tmp_path / "in", name, **sizes, num_labels=3, decoder_start_token_id=0)
    result = folded_right(folder, transformers.AutoModelForSequenceClassification)
    assert any("decoder" in norm.tensor for norm in result.plan.folded)


# ---- errors from within torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ones(2, device="meta").tolist(),
        lambda: torch.ones(2, device="meta").numpy(),
        lambda: torch.nn.Linear(-1, 2),
        lambda: torch.ops.aten.cudnn_convolution(1),
        lambda: torch.ones(2, device="meta").to("cpu"),
    ],
)
def test_torchs_insides_are_not_shown(call: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as caught:  # whatever torch raises
        call()
    assert model_words(caught.value) is None


def test_what_a_model_says_is_shown() -> None:
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY))
    with pytest.raises(ValueError) as caught:
        model(input_ids=torch.ones(2, 3, dtype=torch.int64))
    assert "padding token" in (model_words(caught.value) or "")


# ---- other tools' folds ----------------------------------------------------------------------------------------------


def folded_elsewhere(source: Path, folder: Path, strict: bool, final: bool = True, **config: Any) -> Path:
    """As early FlashNorm tools do it: float32 matrices, ones or no norms at all, and flags of their own."""
    tensors = load_file(source / "model.safetensors")
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    folded = {f"{n.rsplit('.', 2)[0]}.{r}.weight": n for n in tensors for r in readers.get(n.split(".")[-2], ())}
    if final:
        folded["lm_head.weight"] = FINAL
    for reader, norm in folded.items():
        tensors[reader] = tensors[reader].float() * tensors[norm].float()
    for norm in set(folded.values()):
        if strict:
            del tensors[norm]
        else:
            tensors[norm] = torch.ones(len(tensors[norm]))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return edit(folder, **config)


@pytest.mark.parametrize(
    ("strict", "final", "flags"),
    [
        (False, True, {"flashnorm": True, "flashnorm_mode": "compat", "flashnorm_version": "0.1"}),
        (True, True, {"architectures": ["LlamaFlashNorm"], "flashnorm": True, "flashnorm_mode": "strict"}),
        (False, False, {"flash_norm": True}),
    ],
)
def test_other_tools_folds_are_adopted(
    strict: bool, final: bool, flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = families.build("llama", seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, tmp_path / "in", torch.bfloat16)
    theirs = folded_elsewhere(tmp_path / "in", tmp_path / "theirs", strict, final, **flags)
    with pytest.raises(FlashNormError, match=r"folded already, by another tool .*adopt=True"):
        fold(theirs, tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(theirs), "--source", str(tmp_path / "in"), "--adopt", "--level", "weights"])
    assert ended.value.code == 4, capsys.readouterr().out  # right as planned; level weights runs nothing
    config = json.loads((theirs / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert isinstance(config["flashnorm"], dict)
    assert not {"flash_norm", "flashnorm_mode", "flashnorm_version"} & config.keys()
    assert config["flashnorm_folded"] is final


def test_a_loaded_model_that_another_tool_has_folded(tmp_path: Path) -> None:
    model = families.build("llama", seed=0)
    model.config.flash_norm = True
    with pytest.raises(FlashNormError, match="folded already"):
        fold_model_(model)
