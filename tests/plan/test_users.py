"""Readers outside of the traced forward: what their users compute stays as it was, because their norms are kept.

Each user computes what users of such a checkpoint do, with transformers or sentence-transformers alone, from the source
and from its fold, in float32. `--final-norm untie` folds all the same, and the same comparison then shows it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from families import FIRST_SPECIAL_TOKEN, FIRST_TEXT_TOKEN, build, randomize_gains, save
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from flashnorm_cli import FlashNormError, fold_model_
from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.folding.fold import fold
from flashnorm_cli.plan.planner import HIDDEN_STATES, make_plan

WIDTH, VOCABULARY = 64, 128
IDS = torch.randint(FIRST_TEXT_TOKEN, FIRST_SPECIAL_TOKEN, (2, 9), generator=torch.Generator().manual_seed(7))
MAX_ERROR = 1e-5


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.2


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@torch.no_grad()
def hidden_states(folder: Path, layer: int = -1) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(IDS, output_hidden_states=True).hidden_states[layer]


# ---- users: what they put beside the model, and what they compute ----------------------------------------------------


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{n}": n for n in range(VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w1", unk_token="w0").save_pretrained(folder)


def add_pooling(folder: Path) -> None:
    """Mean pooling, a projection, and normalization, as sentence-transformers lays them out."""
    tokenizer(folder)
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for module in modules[1:]:
        (folder / module["path"]).mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    dense = {"in_features": WIDTH, "out_features": 24, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": seeded(24, WIDTH)}, folder / "2_Dense" / "model.safetensors")


SENTENCES = [" ".join(f"w{n}" for n in range(first, first + 4)) for first in (30, 41, 33, 60, 72)]


def embeddings(folder: Path) -> Tensor:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    # The projection of the source: which files travel is another test's business.
    source = folder.parent / "source"
    parts = [Transformer(str(folder)), Pooling.load(str(source / "1_Pooling")), Dense.load(str(source / "2_Dense"))]
    model = SentenceTransformer(modules=[*parts, Normalize()], device="cpu")
    return model.float().encode(SENTENCES, convert_to_tensor=True)


def add_value_head(folder: Path) -> None:
    torch.save({"v_head.summary.weight": seeded(1, WIDTH)}, folder / "value_head.bin")


def values(folder: Path) -> Tensor:
    return hidden_states(folder) @ seeded(1, WIDTH).T


MEDUSA = {"0.0.linear.weight": seeded(WIDTH, WIDTH), "0.1.weight": seeded(VOCABULARY, WIDTH)}


def add_medusa(folder: Path) -> None:
    torch.save(MEDUSA, folder / "medusa_lm_head.pt")


def drafts(folder: Path) -> Tensor:
    """Medusa: a residual block and a head of its own on the last hidden state."""
    last = hidden_states(folder)
    return (last + silu(last @ MEDUSA["0.0.linear.weight"].T)) @ MEDUSA["0.1.weight"].T


def add_mtp(folder: Path) -> None:
    save_file({"mtp.eh_proj.weight": seeded(WIDTH, 2 * WIDTH)}, folder / "mtp.safetensors")


def next_but_one(folder: Path) -> Tensor:
    """Multi-token prediction joins the last hidden state with the next token's embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embedded = model.get_input_embeddings()(IDS.roll(-1, 1)).detach()
    return torch.cat([embedded, hidden_states(folder)], -1) @ seeded(WIDTH, 2 * WIDTH).T


def add_pipeline(folder: Path) -> None:
    index = {"_class_name": "LuminaPipeline", folder.name: ["transformers", "GemmaModel"]}
    (folder.parent / "model_index.json").write_text(json.dumps(index))


def add_dola(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"dola_layers": "low"}))


@torch.no_grad()
def early_logits(folder: Path) -> Tensor:
    """DoLa: the output head on the hidden states of an early layer, without the norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.lm_head(hidden_states(folder, 1))


CODE = """
from transformers.models.granite.modeling_granite import GraniteForCausalLM as Native, GraniteModel as NativeModel


class GraniteModel(NativeModel):
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out["pooler_output"] = out.last_hidden_state.mean(1)
        return out


class GraniteForCausalLM(Native):
    def score(self, input_ids):
        return self.model(input_ids).last_hidden_state.mean(1)
"""


def add_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(CODE)
    names = {"AutoModel": "GraniteModel", "AutoModelForCausalLM": "GraniteForCausalLM"}
    edit_config(folder, auto_map={auto: f"modeling_own.{name}" for auto, name in names.items()})


@torch.no_grad()
def pooled_by_code(folder: Path) -> Tensor:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    return model(IDS).pooler_output


def add_traced_code(folder: Path) -> None:
    add_code(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.GraniteForCausalLM"})


@torch.no_grad()
def score_by_code(folder: Path) -> Tensor:
    cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval().score(IDS)


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remote code is copied to the user's cache otherwise; Python keeps the package that it was first found in."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    forget()


@dataclass
class Case:
    family: str
    add: Callable[[Path], None]
    use: Callable[[Path], Tensor]
    words: str
    trust: bool = False


CASES = {
    "sentence-transformers": Case("mistral", add_pooling, embeddings, "pools the final norm's output"),
    "value head": Case("phi3", add_value_head, values, "`v_head.summary.weight` in value_head.bin"),
    "medusa": Case("qwen2", add_medusa, drafts, "in medusa_lm_head.pt"),
    "multi-token prediction": Case("olmoe", add_mtp, next_but_one, "`mtp.eh_proj.weight` in mtp.safetensors"),
    "pipeline": Case("smollm3", add_pipeline, hidden_states, "part of a pipeline (../model_index.json)"),
    "early layers": Case("qwen3", add_dola, early_logits, "hidden states without the norm"),
    "code of its own": Case("granite", add_code, pooled_by_code, "auto_map names code of the checkpoint's own"),
    "code that was traced": Case("granite", add_traced_code, score_by_code, "score() reads `self.model(", trust=True),
}


@pytest.mark.parametrize("name", CASES)
def test_what_users_compute_stays(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = tmp_path / "source"
    model = build(case.family, seed=0)
    randomize_gains(model, seed=1)
    save(model, source)
    case.add(source)
    expected = case.use(source)

    plan = fold(source, tmp_path / "kept", trust_remote_code=case.trust).plan
    assert plan.lm_head == "kept" and plan.folded and not plan.folded_flag
    (why,) = [norm.reason for norm in plan.kept if norm.tensor == "model.norm.weight"]
    assert case.words in why and why.endswith('`final_norm="untie"` folds it all the same')
    found = case.use(tmp_path / "kept")
    assert distance(found, expected) < MAX_ERROR
    if found.ndim == 2:
        similar, was = (
            torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T for x in (found, expected)
        )
        assert torch.equal(similar.argsort(-1), was.argsort(-1))

    plan = fold(source, tmp_path / "untied", final_norm="untie", trust_remote_code=case.trust).plan
    assert plan.lm_head in ("folded", "untied")
    assert any(note.startswith('folded as `final_norm="untie"` asks') and case.words in note for note in plan.notes)
    assert distance(case.use(tmp_path / "untied"), expected) > 1e-2


# ---- a second decoder ------------------------------------------------------------------------------------------------


def csm() -> transformers.PreTrainedModel:
    body = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
    depth = {**body, "hidden_size": 24, "head_dim": 6, "backbone_hidden_size": 32, "num_codebooks": 4, "vocab_size": 67}
    small = {"hidden_size": 16, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    small |= {"num_key_value_heads": 2, "intermediate_size": 16, "codebook_size": 64, "codebook_dim": 8}
    small |= {"num_quantizers": 4, "vector_quantization_hidden_dimension": 8, "upsampling_ratios": [2, 2]}
    config = transformers.CsmConfig(
        **{
            **body,
            "hidden_size": 32,
            "head_dim": 8,
            "num_codebooks": 4,
            "vocab_size": 67,
            "text_vocab_size": VOCABULARY,
        },
        pad_token_id=3,
        bos_token_id=1,
        codebook_pad_token_id=66,
        codebook_eos_token_id=0,
        depth_decoder_config={"model_type": "csm_depth_decoder_model", "max_position_embeddings": 5, **depth},
        codec_config={"model_type": "mimi", "upsample_groups": 16, "num_semantic_quantizers": 1, **small},
        audio_token_id=120,
        audio_eos_token_id=121,
    )
    torch.manual_seed(0)
    model = transformers.CsmForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    randomize_gains(model, seed=1)
    return model


@torch.no_grad()
def test_a_second_decoder_behind_generate(tmp_path: Path) -> None:
    csm().save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "kept").plan
    (why,) = [norm.reason for norm in plan.kept if norm.tensor == "backbone_model.norm.weight"]
    assert "_sample() reads `outputs.hidden_states`" in why
    fold(tmp_path / "source", tmp_path / "untied", final_norm="untie")

    codes, logits = [], []
    for name in ("source", "kept", "untied"):
        model = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        more = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 6}
        codes.append(model.generate(input_ids=IDS[:1], **more))
        last = model(IDS, output_hidden_states=True).hidden_states[-1][:, -1]
        first = torch.tensor([[0, 7]] * 2)
        logits.append(model.depth_decoder(input_ids=first, backbone_last_hidden_state=last).logits)
    assert torch.equal(codes[1], codes[0])
    assert distance(logits[1], logits[0]) < MAX_ERROR
    assert distance(logits[2], logits[0]) > 1e-2


class Speaker(nn.Module):
    """Embeds codes of its own, which is no sign of a tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(8, width), nn.Linear(width, width)

    def forward(self, codes: Tensor, context_hidden: Tensor) -> Tensor:
        return self.out(self.embed(codes) + context_hidden)


class SpeakingLlama(transformers.LlamaForCausalLM):
    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        self.speakers = nn.ModuleList([Speaker(config.hidden_size)])
        self.post_init()


class ListeningLlama(SpeakingLlama):
    """A part of its own that takes an image's features, not hidden states."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        del self.speakers
        self.projector = nn.Linear(config.hidden_size, config.hidden_size)

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.projector(pixels)


class PooledLlama(SpeakingLlama):
    def __init__(self, config: transformers.LlamaConfig) -> None:
        super().__init__(config)
        del self.speakers
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (SpeakingLlama, "`speakers.0` was not reached by a text forward, and takes `context_hidden`"),
        (PooledLlama, "`pooler.weight` was not reached by a text forward and may read it"),
        (ListeningLlama, None),
    ],
)
def test_parts_that_the_forward_does_not_enter(cls: type, why: str | None) -> None:
    config = build("llama", seed=0).config
    model = cls(config).eval()
    randomize_gains(model, seed=1)
    model.model.norm.weight.data[0] = 1.5
    fold_model_(model)
    folded = bool((model.model.norm.weight == 1).all())
    assert folded == (why is None)


# ---- other norms -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "source"
    model = build("llama", seed=0)
    randomize_gains(model, seed=1)
    save(model, folder)
    return folder


def with_files(llama: Path, folder: Path, add: Callable[[Path], None]) -> Path:
    import shutil

    shutil.copytree(llama, folder)
    add(folder)
    return folder


def test_layers_of_the_checkpoints_own_code(llama: Path, tmp_path: Path) -> None:
    """Its layers may do anything with a norm's output: nothing is folded, unless the user says that it is not run."""

    def add(folder: Path) -> None:
        (folder / "modeling_own.py").write_text("class LlamaDecoderLayer(Module): ...\nclass LlamaForCausalLM: ...\n")
        edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"})

    source = with_files(llama, tmp_path / "source", add)
    with pytest.raises(
        FlashNormError, match=r"there is nothing to fold: .*`trust_remote_code=True` traces it"
    ) as stopped:
        fold(source, tmp_path / "out")
    assert "\n" not in str(stopped.value) and str(stopped.value).count("trust_remote_code") == 1
    plan = fold(source, tmp_path / "out", final_norm="untie").plan
    assert len(plan.folded) == 9
    assert any("`trust_remote_code=True` traces it" in note for note in plan.notes)


def test_an_adapter_keeps_the_norms_that_its_layers_read(llama: Path, tmp_path: Path) -> None:
    def add(folder: Path) -> None:
        lora = {f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.weight": seeded(2, WIDTH) for n in (0, 2)}
        save_file(lora, folder / "adapter_model.safetensors")

    plan = make_plan(open_checkpoint(Source(str(with_files(llama, tmp_path / "source", add)))))
    assert [n.tensor for n in plan.kept] == [f"model.layers.{n}.input_layernorm.weight" for n in (0, 2)]
    assert "adapts layers to the gains that they read now" in plan.kept[0].reason


def test_no_output_head_on_disk(llama: Path, tmp_path: Path) -> None:
    """Refused with a way out; where the files say that the model makes embeddings, the head is not missed."""
    from safetensors.torch import load_file

    def add(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    source = with_files(llama, tmp_path / "source", add)
    with pytest.raises(
        FlashNormError, match=r'lm_head\.weight, .* is not in the checkpoint; `final_norm="keep"` folds'
    ):
        fold(source, tmp_path / "out")
    fold(source, tmp_path / "kept", final_norm="keep")
    add_pooling(source)
    fold(source, tmp_path / "embedding")
    folders = [source, tmp_path / "kept", tmp_path / "embedding"]
    models = [transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    with torch.no_grad():
        expected, *found = (model(IDS).last_hidden_state for model in models)
    assert all(distance(each, expected) < MAX_ERROR for each in found)


def test_what_the_files_cannot_tell_is_said(llama: Path) -> None:
    checkpoint = open_checkpoint(Source(str(llama)))
    assert HIDDEN_STATES in make_plan(checkpoint).notes
    assert HIDDEN_STATES not in make_plan(checkpoint, "keep").notes
