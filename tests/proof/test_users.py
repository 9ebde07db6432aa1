"""Level users: embeddings, heads and second decoders are compared, or the verdict says that they were not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flashnorm_cli.proof.users as users_level
from flashnorm_cli import fold, verify
from flashnorm_cli.proof.result import EQUIVALENT, NOT_EQUIVALENT, NOT_RUN, Verification

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def save(model: Any, folder: Path) -> Path:
    """A model with gains far from one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 1.4 + 0.4)
    model.save_pretrained(folder)
    return folder


def qwen3(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=96, tie_word_embeddings=False, **SIZES)
    return save(transformers.Qwen3ForCausalLM(config), folder)


def csm(folder: Path) -> Path:
    """A speech model: `generate()` hands the last hidden state to a second decoder, which makes the audio codes."""
    torch.manual_seed(0)
    depth = {**SIZES, "hidden_size": 24, "head_dim": 6, "max_position_embeddings": 5}
    codec = {
        "model_type": "mimi", "hidden_size": 16, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "codebook_size": 64, "codebook_dim": 8, "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 8, "upsampling_ratios": [2, 2], "upsample_groups": 16,
        "num_semantic_quantizers": 1, "head_dim": 8,
    }  # fmt: skip
    config = transformers.CsmConfig(
        num_codebooks=4,
        vocab_size=67,
        text_vocab_size=96,
        depth_decoder_config={
            "model_type": "csm_depth_decoder_model",
            "num_codebooks": 4,
            "backbone_hidden_size": 32,
            "vocab_size": 67,
            **depth,
        },
        codec_config=codec,
        pad_token_id=3,
        codebook_pad_token_id=66,
        codebook_eos_token_id=0,
        bos_token_id=1,
        audio_token_id=90,
        audio_eos_token_id=91,
        **SIZES,
    )
    return save(transformers.CsmForConditionalGeneration(config), folder)


def verified(source: Path, out: Path, final_norm: str = "auto") -> Verification:
    fold(source, out, final_norm=final_norm)
    return verify(out, source, device="cpu")


def test_hidden_states_of_announced_users_are_compared(tmp_path: Path) -> None:
    source = qwen3(tmp_path / "source")
    plain = verified(source, tmp_path / "plain")
    assert (plain.verdict, plain.level("users")) == (EQUIVALENT, None)  # nobody but readers of logits
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "medusa_num_heads": 3}))
    kept = verified(source, tmp_path / "kept")
    assert kept.verdict == EQUIVALENT
    (row,) = kept.level("users").figures["users"]
    assert row["compared"] == "the last hidden state"
    assert row["error"] < 1e-6
    # The user insisted: logits are the same, and what a draft head reads is not.
    wrong = verified(source, tmp_path / "wrong", "untie")
    assert wrong.level("logits").status == "passed"
    assert (wrong.verdict, wrong.level("users").status) == (NOT_EQUIVALENT, "failed")
    (finding,) = wrong.level("users").findings
    assert "medusa_num_heads" in finding.message
    assert finding.error > 0.1


def test_what_a_second_decoder_says_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = csm(tmp_path / "source")
    right = verified(source, tmp_path / "right")
    rows = {row["compared"]: row for row in right.level("users").figures["users"]}
    assert rows["greedy output in the reference dtype"]["error"] == 0.0
    # A plan that does not know of the second decoder, and files that hold what it says: something has to run.
    monkeypatch.setattr("flashnorm_cli.plan.readers.code_users", lambda model, trace: [])
    monkeypatch.setattr("flashnorm_cli.plan.unseen.kept_beside_unreached", lambda model, trace: {})
    monkeypatch.setattr(users_level, "announced_users", lambda *_, **__: ())
    wrong = verified(source, tmp_path / "wrong", "untie")
    assert wrong.level("weights").status == "passed"
    assert [level.level for level in wrong.levels if level.status == "failed"] == ["users"]
    assert "CsmForConditionalGeneration.generate() gives" in wrong.level("users").findings[0].message


def test_what_cannot_be_run_leaves_the_verdict_open(tmp_path: Path) -> None:
    source = qwen3(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_own.Qwen3ForCausalLM"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (source / "modeling_own.py").write_text("import torch\nclass Qwen3ForCausalLM(torch.nn.Module):\n    pass\n")
    result = verified(source, tmp_path / "out", "untie")
    if not any(norm.folded for norm in result.plan.norms):
        pytest.skip("the plan keeps every norm")
    assert (result.verdict, bool(result)) == (NOT_RUN, False)
    assert "modeling_own" in result.level("users").reason or "auto_map" in result.level("users").reason


def test_embeddings_of_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    source = qwen3(tmp_path / "source")
    letters = Tokenizer(WordLevel({chr(i + 31): i for i in range(96)}, unk_token=" "))
    letters.pre_tokenizer = Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="~").save_pretrained(source)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (source / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                for i, (path, name) in enumerate(modules)
            ]
        )
    )
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    right = verified(source, tmp_path / "right")
    rows = {row["user"]: row["error"] for row in right.level("users").figures["users"]}
    assert rows["modules.json"] < 1e-5
    assert right.verdict == EQUIVALENT
    wrong = verified(source, tmp_path / "wrong", "untie")
    assert wrong.verdict == NOT_EQUIVALENT
    assert any("embeddings are off by" in finding.message for finding in wrong.level("users").findings)
