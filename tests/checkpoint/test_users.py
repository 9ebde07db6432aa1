"""What files and config announce: who reads more of a checkpoint than its logits.

Each announcement is written into a plain checkpoint, which announces nobody. That the norms are then kept, and that
what these users compute stays, is in tests/plan/test_py.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.users import (
    ADAPTER,
    ANY,
    CLASSES,
    CODE,
    DECODER,
    DRAFT,
    EMBEDDING,
    GENERATION,
    HEAD,
    INPUTS,
    LAST,
    PIPELINE,
    User,
    announced_users,
)

WIDTH = 8
PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "v_head_dim": 4,
    "linear_num_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "mtp_loss_scaling_factor": 0.3,
}
TENSORS = {
    "model.embed_tokens.weight": torch.zeros(20, WIDTH),
    "model.layers.0.input_layernorm.weight": torch.ones(WIDTH),
    "model.layers.0.self_attn.q_proj.weight": torch.zeros(12, WIDTH),
    "model.layers.0.mlp.down_proj.weight": torch.zeros(WIDTH, 16),
    "model.norm.weight": torch.ones(WIDTH),
    "lm_head.weight": torch.zeros(20, WIDTH),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline" / "model"
    folder.mkdir(parents=True)
    save_file(TENSORS, folder / "model.safetensors")
    config(folder)
    return folder


def config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(PLAIN | changes))


def announced(folder: Path, own_code: bool = False) -> tuple[User, ...]:
    found = announced_users(open_checkpoint(Source(str(folder))), own_code)
    for user in found:
        said = json.loads(json.dumps(user.to_json()))
        assert User(**{**said, "modules": tuple(said["modules"])}) == user
        assert "\n" not in user.line and not user.line.endswith(".")
    return found


def write(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))

    return change


def pooling(name: str, **found: object) -> Callable[[Path], None]:
    return write(f"{name}/config.json", found)


def settings(**changes: object) -> Callable[[Path], None]:
    return lambda folder: config(folder, **changes)


def generation(**found: object) -> Callable[[Path], None]:
    return write("generation_config.json", found)


def torch_file(name: str, value: object, zipped: bool = True) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(value, folder / name, _use_new_zipfile_serialization=zipped)

    return change


def tensors(name: str, **found: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({key.replace("__", "."): value for key, value in found.items()}, folder / name)

    return change


def module(kind: str) -> dict[str, str]:
    return {"path": f"1_{kind}", "type": f"sentence_transformers.models.{kind}"}


FIRST = {"path": "", "type": "sentence_transformers.models.Transformer"}
VALUE_HEAD = {"summary.weight": torch.zeros(1, WIDTH), "summary.bias": torch.zeros(1)}
V_HEAD = {"v_head.weight": torch.zeros(1, WIDTH)}
MEDUSA = {"0.0.linear.weight": torch.zeros(WIDTH, WIDTH), "0.1.weight": torch.zeros(20, WIDTH)}
CARD = "---\nlicense: mit\ntags:\n- {}\n---\n# A model\n"

ANNOUNCED = {
    "pooling": (write("modules.json", [FIRST, module("Pooling")]), EMBEDDING, "Transformer, Pooling"),
    "pooling without modules.json": (pooling("1_Pooling", pooling_mode_lasttoken=True), EMBEDDING, "1_Pooling"),
    "a projection alone": (pooling("1_Dense", in_features=8, out_features=4), EMBEDDING, "1_Dense"),
    "another config": (write("config_sentence_transformers.json", {}), EMBEDDING, "pools"),
    "colbert": (write("artifact.metadata", {"dim": 4}), EMBEDDING, "ColBERT"),
    "card": (write("README.md", CARD.format("sentence-similarity")), EMBEDDING, "sentence-similarity"),
    "pooling in config": (settings(pooling_mode="mean"), EMBEDDING, "pooling_mode"),
    "both ways": (settings(is_causal=False), EMBEDDING, "is_causal"),
    "value head": (tensors("value_head.safetensors", **VALUE_HEAD), HEAD, "`summary.weight` in value_head.safetensors"),
    "a shard by itself": (tensors("mtp.safetensors", eh_proj__weight=torch.zeros(WIDTH, 2 * WIDTH)), HEAD, "eh_proj"),
    "medusa": (torch_file("medusa_lm_head.pt", MEDUSA), HEAD, "medusa_lm_head.pt"),
    "an old pickle": (torch_file("value_head.bin", OrderedDict(VALUE_HEAD), zipped=False), HEAD, "value_head.bin"),
    "a head within a state": (torch_file("last.ckpt", {"state_dict": TENSORS | V_HEAD}), HEAD, "v_head.weight"),
    "a draft head's layer 0": (
        tensors("draft.safetensors", layers__0__mlp__down_proj__weight=torch.zeros(WIDTH, 16)), HEAD, "down_proj"
    ),
    "a head among a copy": (torch_file("pytorch_model.bin", TENSORS | V_HEAD), HEAD, "v_head.weight"),
    "a vector": (tensors("reward.safetensors", direction=torch.zeros(WIDTH)), HEAD, "direction"),
    "nextn": (settings(num_nextn_predict_layers=1), DRAFT, "num_nextn_predict_layers"),
    "mtp": (settings(text_config={"mtp_num_hidden_layers": 1}), DRAFT, "mtp_num"),
    "medusa in config": (settings(medusa_num_heads=4), DRAFT, "medusa_num_heads"),
    "eagle in config": (settings(eagle_config={"eagle_head_type": "llama"}), DRAFT, "eagle_config"),
    "speculators": (settings(speculators_config={"algorithm": "eagle3"}), DRAFT, "speculators_config"),
    "a draft": (pooling("draft", speculators_model_type="eagle"), DRAFT, "draft/config.json"),
    "value head in config": (settings(value_head_config={"layers": 2}), HEAD, "value_head_config"),
    "dola": (generation(dola_layers="high"), GENERATION, "without the norm"),
    "contrastive search": (generation(penalty_alpha=0.6), GENERATION, "contrastive"),
    "mtp in generation": (generation(use_mtp=True), DRAFT, "use_mtp"),
    "code that generates": (write("custom_generate/generate.py", "...\n"), GENERATION, "custom_generate"),
    "speech tokenizer": (write("speech_tokenizer/config.json", {}), DECODER, "speech_tokenizer"),
    "processor": (write("processor_config.json", {"audio_tokenizer": {"x": 1}}), DECODER, "audio_tokenizer"),
    "talker": (settings(talker_config={"hidden_size": 8}), DECODER, "talker_config"),
    "drafter": (settings(draft_vocab_size=32000), DRAFT, "draft_vocab_size"),
    "two classes": (settings(architectures=["LlamaForCausalLM", "LlamaModel"]), CLASSES, "several"),
    "pipeline above": (write("../model_index.json", {}), PIPELINE, "../model_index.json"),
    "pipeline two above": (write("../../model_index.json", {}), PIPELINE, "../../model_index.json"),
    "pipeline beside": (write("../vae/config.json", {"_diffusers_version": "0.36"}), PIPELINE, "../vae"),
}  # fmt: skip


@pytest.mark.parametrize("what", ANNOUNCED)
def test_announced(what: str, folder: Path) -> None:
    assert announced(folder) == ()
    change, kind, words = ANNOUNCED[what]
    change(folder)
    found = announced(folder)
    assert [user.kind for user in found] == [kind]
    assert found[0].reads == LAST
    assert words in found[0].line


QUIET = {
    "reranker": lambda f: (
        write("modules.json", [FIRST, module("LogitScore")])(f),
        write("sentence_bert_config.json", {"transformer_task": "text-generation"})(f),
    ),
    "cross encoder": write("config_sentence_transformers.json", {"model_type": "CrossEncoder"}),
    "card of a chat model": write("README.md", CARD.format("text-generation")),
    "a copy": torch_file("pytorch_model.bin", TENSORS),
    "a copy of a trainer": torch_file("checkpoint-5/model.pt", TENSORS),
    "a copy under other names": torch_file("original/a.00.pth", dict(zip("abcdef", TENSORS.values(), strict=True))),
    "a copy of the authors": torch_file(
        "original/consolidated.00.pth",
        dict(zip(("tok_embeddings.weight", "layers.0.a.weight", "layers.0.attention.wq.weight",
                  "layers.0.feed_forward.w2.weight", "norm.weight", "output.weight"), TENSORS.values(), strict=True)),
    ),
    "a copy within a state": torch_file("last.ckpt", {"epoch": 1, "state_dict": TENSORS}),
    "a copy that wraps": torch_file("pytorch_model.bin", {f"module.{k}": v for k, v in TENSORS.items()}),
    "optimizer": torch_file("optimizer.pt", {"state": {0: {"exp_avg": torch.zeros(20, WIDTH)}}}),
    "arguments": torch_file("training_args.bin", {"lr": 1.0}),
    "tensors of other widths": torch_file("spk_dict.pt", {"voice": {"cond": torch.zeros(1, 5)}}),
    "tokenizer": write("tokenizer_config.json", {"eagle": True}),
}  # fmt: skip


@pytest.mark.parametrize("what", QUIET)
def test_no_sign_of_a_user(what: str, folder: Path) -> None:
    QUIET[what](folder)
    assert announced(folder) == ()


def test_weights_that_cannot_be_looked_into(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"no pickle")
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"no header")
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "optimizer.pt"):
        (folder / name).write_bytes(b"no pickle")
    lines = [user.line for user in announced(folder)]
    names = ["extra.bin", "model-00003-of-00003.safetensors"]
    assert lines == [f"{n} holds weights that were not seen, and may read the final norm's output" for n in names]


def test_an_adapter_names_the_modules_that_it_adapts(folder: Path) -> None:
    name = "base_model__model__model__layers__0__self_attn__q_proj__lora_{}__weight"
    lora = {name.format("A"): torch.zeros(2, WIDTH), name.format("B"): torch.zeros(12, 2)}
    tensors("adapter_model.safetensors", **lora)(folder)
    (user,) = announced(folder)
    assert (user.kind, user.reads, user.modules) == (ADAPTER, INPUTS, ("model.layers.0.self_attn.q_proj",))


def test_an_adapter_of_modules_that_are_not_known(folder: Path) -> None:
    tensors("adapter_model.safetensors", base_model__model__else__lora_A__weight=torch.zeros(2, WIDTH))(folder)
    (user,) = announced(folder)
    assert (user.kind, user.reads) == (ADAPTER, ANY)


WRAPS = """
from transformers import LlamaForCausalLM as Native

class LlamaForCausalLM(Native):
    def forward(self, *args, **kwargs): ...
"""
OWN = """
from torch import nn
from transformers import PreTrainedModel

class Layer(nn.Module): ...

class LlamaForCausalLM(PreTrainedModel): ...
"""


REACHES = WRAPS.replace("...", "return self.model.layers[0].input_layernorm(1)")
CHANGES = WRAPS + "Native.forward = None\n"


@pytest.mark.parametrize(
    ("code", "reads"),
    [(WRAPS, LAST), (REACHES, ANY), (CHANGES, ANY), (OWN, ANY), ("class LlamaForCausalLM(", ANY), (None, ANY)],
)
def test_code_of_the_name_of_a_native_class(code: str | None, reads: str, folder: Path) -> None:
    """Read, never run: who builds on the native class may read its output, who has layers of its own anything."""
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"})
    if code is not None:
        (folder / "modeling_x.py").write_text(code)
    (user,) = announced(folder)
    assert (user.kind, user.reads) == (CODE, reads)
    assert "`trust_remote_code=True` traces it" in user.line
    assert announced(folder, own_code=True) == ()

    names = {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM", "AutoModel": "modeling_x.LlamaModel"}
    config(folder, auto_map=names)
    (user,) = announced(folder, own_code=True)
    assert (user.kind, user.reads) == (CODE, LAST)  # of the file that was traced
    assert "it stands beside the class that was traced" in user.line
