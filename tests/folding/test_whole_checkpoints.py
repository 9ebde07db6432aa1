"""A folded checkpoint does what the source's users have it do: with every file that they load beside the weights.

Source and output are loaded in float32 by the libraries that users have (sentence-transformers, peft, transformers).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from flashnorm_cli.adapters.fold import fold_adapter
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.fold import fold

EXACT = 1e-5
SENTENCES = ["one two three", "four five six seven", "eight nine", "two two one nine five"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def save(model: Any, folder: Path) -> Path:
    """Gains far from one, as the module has them, and a tokenizer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 1.4 + 0.4)
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    words = "one two three four five six seven eight nine".split()
    table = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(folder)
    return folder


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).double().norm() / expected.double().norm())


def modules(folder: Path, *dense: tuple[str, int, int]) -> None:
    """Mean pooling and Dense layers, each in a format of its own."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *((name, "Dense") for name, _, _ in dense)]
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": dense[0][1], "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, n_in, n_out in dense:
        (folder / name).mkdir()
        config = {"in_features": n_in, "out_features": n_out, "bias": True}
        config["activation_function"] = "torch.nn.modules.activation.Tanh"
        (folder / name / "config.json").write_text(json.dumps(config))
        linear = torch.nn.Linear(n_in, n_out)
        state = {f"linear.{k}": v.detach().clone() for k, v in linear.state_dict().items()}
        if n_in > n_out:
            torch.save(state, folder / name / "pytorch_model.bin")
        else:
            save_file(state, folder / name / "model.safetensors", {"format": "pt"})


def embeddings(folder: Path) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, convert_to_tensor=True)


def phi3(folder: Path) -> Path:
    return save(transformers.Phi3Model(transformers.Phi3Config(**SIZES, **HEADS, pad_token_id=0)), folder)


def t5(folder: Path) -> Path:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return save(transformers.T5EncoderModel(config), folder)


@pytest.mark.parametrize("family", [phi3, t5], ids=["phi3", "t5 encoder"])
def test_embeddings_through_dense_layers_in_files_of_their_own(family: Any, tmp_path: Path) -> None:
    """32 to 32 has the shape of the model's own projections."""
    torch.manual_seed(2)
    source = family(tmp_path / "source")
    modules(source, ("2_Dense", 32, 32), ("3_Dense", 32, 16))
    expected = embeddings(source)
    result = fold(source, tmp_path / "out")
    assert result.plan.folded and result.left_out == ()
    got = embeddings(tmp_path / "out")
    assert difference(got, expected) < EXACT
    assert torch.equal((got @ got.T).argsort(), (expected @ expected.T).argsort())


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


def test_the_weights_that_config_names_and_nothing_stale_beside(tmp_path: Path) -> None:
    """A Mistral whose averaged weights count, beside those of the last step, its authors' file and a calibration."""
    source = save(transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **HEADS)), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    average = {k: v * 1.1 + 0.01 for k, v in tensors.items()}
    save_file(average, source / "average.safetensors", {"format": "pt"})
    names = {"self_attn": "attention", "embed_tokens": "tok_embeddings", "mlp": "feed_forward"}

    def theirs(name: str) -> str:
        for mine, other in names.items():
            name = name.replace(mine, other)
        return name.removeprefix("model.").replace("_proj", "")

    save_file({theirs(k): v for k, v in tensors.items()}, source / "consolidated.safetensors")
    torch.save({"temperature": torch.tensor(1.7)}, source / "calibration.pt")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "average.safetensors"}))
    expected = logits(source) / torch.load(source / "calibration.pt")["temperature"]
    result = fold(source, tmp_path / "out")
    out = tmp_path / "out"
    assert {each.name for each in result.left_out} == {"model.safetensors", "consolidated.safetensors"}
    assert difference(logits(out) / torch.load(out / "calibration.pt")["temperature"], expected) < EXACT
    assert difference(tensors["lm_head.weight"], average["lm_head.weight"]) > 1e-2  # the other file would show


def test_an_adapter_beside_the_model_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    """transformers applies it with the model, and would apply the unfolded one to the folded weights."""
    import peft

    source = save(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **HEADS, head_dim=8)), tmp_path / "source"
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(source)
    lora = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    lora.save_pretrained(tmp_path / "adapter")
    beside = Path(shutil.copytree(source, tmp_path / "beside"))
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, beside)
    expected = logits(beside)  # transformers applies it
    assert difference(expected, logits(source)) > 1e-2
    with pytest.raises(FlashNormError, match=r"adapter.* beside the model.*`fold_adapter") as caught:
        fold(beside, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    fold(source, tmp_path / "out")
    fold_adapter(tmp_path / "adapter", tmp_path / "out", tmp_path / "folded adapter")
    assert difference(logits(tmp_path / "out", tmp_path / "folded adapter"), expected) < EXACT
    assert difference(logits(tmp_path / "out", tmp_path / "adapter"), expected) > 1e-2
