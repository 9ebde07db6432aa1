"""`weightless`, `from_pretrained` and `fold_model_`: models in transformers whose folded norms read no weight."""

import copy
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
import transformers
from alike import copies_of
from hub_server import HubServer
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import flashnorm_cli
from flashnorm_cli import fold, fold_model_, from_pretrained, verify, weighted, weightless, weightless_norms
from flashnorm_cli.errors import CheckpointError, FlashNormError, GainOverflowError, PlanError, UsageError
from flashnorm_cli.runtimes.transformers.swap import is_weightless

Folds = dict[tuple[str, str], Path]


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    model = families.build(family, seed)
    families.randomize_gains(model, seed + 1)
    return model


@pytest.fixture(scope="session")
def folds(tmp_path_factory: pytest.TempPathFactory) -> "callable":
    """Folded tiny checkpoints in bfloat16, each made once."""
    made: Folds = {}

    def folded(family: str, layout: str = "identity", dtype: torch.dtype = torch.bfloat16) -> Path:
        key = (family, f"{layout} {dtype}")
        if key not in made:
            made[key] = tmp_path_factory.mktemp("fold") / "folded"
            families.save(model_of(family), made[key].parent / "source", dtype)
            fold(made[key].parent / "source", made[key], layout=layout, workers=1)
        return made[key]

    return folded


def load(folder: Path, **more: object) -> PreTrainedModel:
    """What transformers alone makes of a checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, **more).eval()


def swapped(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if is_weightless(module)}


def recorded(folder: Path) -> int:
    return sum(norm["folded"] for norm in json.loads((folder / "flashnorm.json").read_text())["norms"])


def spoil(model: nn.Module) -> None:
    """Make every weight of a weightless norm NaN: whoever still reads one computes NaN."""
    for module in model.modules():
        if is_weightless(module):
            module.weight.data.fill_(torch.nan)


# The last ones: names on disk differ from those of the parameters; `1 + w`; gated norms; a nested config.
@pytest.mark.parametrize(
    ("family", "gated"),
    [("llama", 0), ("qwen3_moe", 0), ("t5", 0), ("gemma3_text", 0), ("mamba2", 4), ("qwen3_next", 2), ("gemma3", 0)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_the_same_bits_without_the_weights(family, gated, dtype, folds):
    folder = folds(family)
    model = load(folder, dtype=dtype)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    assert weightless(model) is model
    states = weightless_norms(model)
    assert len(states) == recorded(folder)
    assert swapped(model) == {name for name, why in states.items() if why is None}
    left = {name: why for name, why in states.items() if why}
    assert len(left) == gated and all("Gated computes more than a plain RMSNorm" in why for why in left.values())
    assert torch.equal(families.logits(model, inputs), want)
    spoil(model)
    assert torch.equal(families.logits(model, inputs), want), "a swapped norm reads its weight"


def test_only_norms_of_the_record(folds):
    model = weightless(load(folds("gemma3_text")))
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    own = {"q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm"}
    for name, module in families.norms(model).items():
        if name.rpartition(".")[2] in own:
            assert type(module).__name__ == "Gemma3RMSNorm"
            kept = module.weight.data.clone()
            module.weight.data.add_(0.5)
            assert not torch.equal(families.logits(model, inputs), want), f"{name} escapes the fold, and is not read"
            module.weight.data.copy_(kept)
        else:
            assert is_weightless(module)


def test_an_unfolded_model_in_the_process_is_untouched(folds):
    source = folds("llama").parent / "source"
    before = load(source)
    inputs = families.text_inputs(before, seed=3)
    want = families.logits(before, inputs)
    code = type(before.model.norm).forward
    weightless(load(folds("llama")))
    after = load(source)
    assert torch.equal(families.logits(before, inputs), want) and torch.equal(families.logits(after, inputs), want)
    assert type(after.model.norm) is type(before.model.norm) and type(after.model.norm).forward is code
    after.model.norm.weight.data.mul_(2)
    assert not torch.equal(families.logits(after, inputs), want)


def test_again_and_back(folds):
    model = load(folds("llama"))
    inputs = families.text_inputs(model, seed=3)
    want, classes = families.logits(model, inputs), [type(m) for m in model.modules()]
    kind = type(model.model.norm)
    model.model.norm.weight.requires_grad_(False)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    first = swapped(weightless(model))
    assert swapped(weightless(model)) == first and len(first) == 9
    assert "weightless" in repr(model.model.norm) and isinstance(model.model.norm, kind)
    assert weighted(weighted(model)) is model
    assert [type(m) for m in model.modules()] == classes and not swapped(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert all(why == "weightless() has not been called" for why in weightless_norms(model).values())
    assert torch.equal(families.logits(model, inputs), want)
    assert not any("_plain_norm" in vars(m) for m in model.modules())


def test_calls_that_are_not_the_plain_one(folds):
    """Norms kept in float32 over bfloat16, a residual stream in float32, a keyword, autocast, float64."""
    stock, model = load(folds("llama")), weightless(load(folds("llama")))
    for x in (torch.randn(2, 3, 64), torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 0, 64).bfloat16()):
        a, b = stock.model.norm(x), model.model.norm(x)
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(model.model.norm(hidden_states=x), stock.model.norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        inputs = families.text_inputs(model, seed=3)
        assert torch.equal(families.logits(model, inputs), families.logits(stock, inputs))
    for dtype in (torch.float16, torch.float64):
        assert torch.equal(families.logits(model.to(dtype), inputs), families.logits(stock.to(dtype), inputs))
    for each in (stock.bfloat16(), model.bfloat16()):
        for norm in families.norms(each).values():
            norm.float()
    x = torch.randn(2, 3, 64).bfloat16()
    a, b = stock.model.norm(x), model.model.norm(x)
    assert a.dtype == b.dtype and torch.equal(a, b)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_an_edited_norm_is_named(folds):
    for family, name, disk in (
        ("llama", "model.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        ("gemma3", "model.language_model.layers.1.input_layernorm.weight", "language_model.model.layers.1."),
        ("mamba2", "backbone.layers.0.mixer.norm.weight", "backbone.layers.0.mixer.norm.weight"),
    ):
        model = load(folds(family))
        model.get_parameter(name).data[3] += 0.25
        with pytest.raises(FlashNormError, match="trained or edited") as error:
            weightless(model)
        assert str(error.value).startswith(disk) and not swapped(model)


@pytest.mark.parametrize(
    ("flags", "error", "says"),
    [
        ({}, FlashNormError, "fold_model_"),
        ({"flashnorm_folded": True}, FlashNormError, "adopt=True"),
        ({"flashnorm": "yes"}, CheckpointError, "no list of folded norms"),
        ({"flashnorm": {"format": 1, "folded": "model.norm.weight"}}, CheckpointError, "no list of folded norms"),
        ({"flashnorm": {"format": 99, "folded": ["model.norm.weight"]}}, CheckpointError, "upgrade"),
        ({"flashnorm": {"format": 1, "folded": ["encoder.norm.weight"]}}, FlashNormError, "another class"),
    ],
)
def test_records_that_do_not_serve(flags, error, says, tmp_path):
    model = model_of("llama")
    for key, value in flags.items():
        setattr(model.config, key, value)
    with pytest.raises(error, match=says):
        weightless(model)
    assert not swapped(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=says):
        from_pretrained(tmp_path)


def test_what_is_no_transformers_model():
    for call in (weightless, weightless_norms, fold_model_):
        with pytest.raises(UsageError, match="not a transformers model"):
            call(nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"config\.json"):
        from_pretrained("./no-such-folder")


def test_weights_that_are_loaded_later_cannot_slip_by(folds):
    model, source = weightless(load(folds("llama"))), load(folds("llama").parent / "source")
    with pytest.raises(RuntimeError, match="would not read it"):
        model.load_state_dict(source.state_dict())
    weightless(load(folds("llama"))).load_state_dict(load(folds("llama")).state_dict())
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(FlashNormError, match="not in memory"):
        weightless(empty)


# ---- both steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "gemma4_text"])
def test_from_pretrained_reads_both_layouts_without_a_report(family, folds, caplog, tmp_path, monkeypatch):
    stock = load(folds(family))
    inputs = families.text_inputs(stock, seed=3)
    want = families.logits(stock, inputs)
    for layout in ("identity", "dropped"):
        folder = folds(family, layout)
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with caplog.at_level(logging.WARNING):
            transformers.logging.set_verbosity_warning()
            model, info = from_pretrained(folder, output_loading_info=True)
            transformers.logging.set_verbosity_error()
        assert not caplog.records and not any(info.values())
        assert type(model) is type(stock) and model.dtype == torch.bfloat16 and not model.training
        assert swapped(model) and torch.equal(families.logits(model, inputs), want)
        # Saved, it is the checkpoint of layout identity, record and all.
        model.save_pretrained(tmp_path / layout)
        saved, wanted = (
            load_file(tmp_path / layout / "model.safetensors"),
            load_file(folds(family) / "model.safetensors"),
        )
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[n], wanted[n]) and saved[n].dtype == wanted[n].dtype for n in wanted)
        config, ours = (json.loads((f / "config.json").read_text()) for f in (tmp_path / layout, folds(family)))
        for key in ("flashnorm", "flashnorm_folded"):
            assert config[key] == ours[key] and config.get("text_config", ours)[key] == ours[key]
        assert torch.equal(families.logits(from_pretrained(tmp_path / layout), inputs), want)


def test_only_folded_norms_are_filled_in(folds, tmp_path, caplog, monkeypatch):
    """A norm that is missing although it was kept is reported as ever; one of unknown identity is refused."""
    shutil.copytree(folds("qwen3", "dropped"), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        transformers.logging.set_verbosity_warning()
        _, info = from_pretrained(tmp_path / "a", output_loading_info=True)
        transformers.logging.set_verbosity_error()
    assert info["missing_keys"] == {"model.layers.1.self_attn.q_norm.weight"} and "MISSING" in caplog.text
    shutil.copytree(folds("gemma4_text", "dropped"), tmp_path / "b")
    (tmp_path / "b" / "flashnorm.json").unlink()
    with pytest.raises(CheckpointError, match=r"router\.scale was left out"):
        from_pretrained(tmp_path / "b")


HUB = """
import sys, torch, flashnorm_cli
model = flashnorm_cli.from_pretrained("user/folded", revision="main")
assert all(why is None for why in flashnorm_cli.weightless_norms(model).values())
with torch.no_grad():
    torch.save(model(torch.arange(30, 40)[None]).logits, sys.argv[1])
"""


def test_a_hub_id(folds, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        hub.add_repo("user/folded", folds("llama", "dropped"))
        run = [sys.executable, "-c", HUB, str(tmp_path / "logits")]
        done = subprocess.run(run, env=hub.client_env(tmp_path / "home"), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "MISSING" not in done.stderr + done.stdout, done.stderr
    with torch.no_grad():
        want = load(folds("llama"))(torch.arange(30, 40)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits"), want)


# ---- life of a model -------------------------------------------------------------------------------------------------


def test_compiled_without_breaks_or_recompilation():
    model = AutoModelForCausalLM.from_config(transformers.Qwen3Config(**LLAMA, head_dim=16)).eval()
    families.randomize_gains(model, 1)
    fold_model_(model)
    inputs = {"input_ids": torch.arange(30, 41)[None], "use_cache": False}
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        want = model(**inputs).logits
        compiled = torch.compile(weightless(model), fullgraph=True, backend=backend, dynamic=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                assert torch.equal(compiled(**inputs).logits, want)
        assert len(graphs) == 1 and graphs[0].count(torch.rms_norm) == 5, "the folded norms, not those of heads"
        weighted(model)  # the guards see the classes: it is compiled again, not run as it was
        model.model.norm.weight.data.mul_(2)
        assert not torch.equal(compiled(**inputs).logits, want) and len(graphs) == 2
    torch._dynamo.reset()


def test_generate_and_static_cache(folds):
    stock, model = load(folds("llama")), from_pretrained(folds("llama"))
    ids = torch.arange(30, 38)[None]
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = stock.generate(ids, **more)
    assert torch.equal(model.generate(ids, **more), want)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, past_key_values=cache, **more), want)


def test_copies_and_pickles(folds):
    model = weightless(load(folds("gemma3_text")))
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    for other in copies_of(model):
        assert swapped(other) == swapped(model) and type(other.model.norm) is type(model.model.norm)
        spoil(other)
        assert torch.equal(families.logits(other, inputs), want)
        assert not swapped(weighted(other))
    assert torch.equal(families.logits(model, inputs), want)


def test_training(folds):
    """The frozen identity gets no gradient, the others get the same as ever."""
    stock, model = load(folds("llama"), dtype=torch.float32), weightless(load(folds("llama"), dtype=torch.float32))
    ids = torch.arange(30, 41)[None]
    for each in (stock, model):
        each.train()
        each(ids, labels=ids).loss.backward()
    frozen = swapped(model)
    for (name, a), (_, b) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert b.requires_grad == (name not in frozen) and a.grad is not None
        if name in frozen:
            assert b.grad is None
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    weightless(weighted(model))  # still the identity


@pytest.mark.parametrize("first", ["weightless", "offload"])
def test_offloaded(first, folds, tmp_path):
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import remove_hook_from_submodules

    for how in (
        lambda m: cpu_offload(m, execution_device=torch.device("cpu")),
        lambda m: disk_offload(m, tmp_path, execution_device=torch.device("cpu")),
    ):
        model = load(folds("llama"))
        inputs = families.text_inputs(model, seed=3)
        want = families.logits(model, inputs)
        if first == "weightless":
            how(weightless(model))
        else:
            how(model)
            weightless(model)
        assert model.model.norm.weight.is_meta and len(swapped(model)) == 9
        assert torch.equal(families.logits(model, inputs), want)
        weighted(model)
        assert torch.equal(families.logits(model, inputs), want)
        weightless(model)
        remove_hook_from_submodules(model)
        spoil(model)
        assert torch.equal(families.logits(model, inputs), want)


def test_device_map_with_a_part_on_disk(folds, tmp_path):
    stock = load(folds("llama"))
    inputs = families.text_inputs(stock, seed=3)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n > 1 else "cpu" for n in range(4)}
    for layout in ("identity", "dropped"):
        model = from_pretrained(folds("llama", layout), device_map=places, offload_folder=tmp_path / layout)
        assert len(swapped(model)) == 9
        assert torch.equal(families.logits(model, inputs), families.logits(stock, inputs))


# ---- folding in memory -----------------------------------------------------------------------------------------------

# Tied and untied heads, experts, latent attention, gated and per-head norms, `1 + w`, encoders and decoders, towers.
SURVEY = Path(__file__).parents[2] / "docs" / "weightless_families.json"
STALE = "docs/weightless_families.json is stale: run `python tests/runtimes/test_weightless.py`"
IN_MEMORY = (
    "llama mixtral mllama gemma2 gemma3 gemma3n_text cohere2_moe deepseek_v3 falcon_h1 janus minimax qwen3_next xlstm"
).split()


def survey_is_newer() -> bool:
    """Whether the survey was made with a newer transformers than is installed, which may plan otherwise."""
    return Version(json.loads(SURVEY.read_text())["transformers"]) > Version(transformers.__version__)


def test_the_survey_lists_these_families():
    if survey_is_newer():
        pytest.skip("docs/weightless_families.json was written with a newer transformers")
    assert list(json.loads(SURVEY.read_text())["families"]) == list(families.families()), STALE


@pytest.mark.parametrize("family", IN_MEMORY)
def test_folded_in_memory(family):
    model = model_of(family)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    before = copy.deepcopy(model)
    assert fold_model_(model) is model
    error = (families.logits(model, inputs) - want).norm() / want.norm()
    assert error < 1e-5
    assert not hasattr(before.config, "flashnorm") and torch.equal(families.logits(before, inputs), want)
    folded_logits = families.logits(model, inputs)
    states = weightless_norms(weightless(model))
    assert states and not any(states[n] for n in swapped(model))
    assert (families.logits(model, inputs) - want).norm() / want.norm() < 1e-5
    if not survey_is_newer():
        listed = json.loads(SURVEY.read_text())["families"][family]
        assert listed | surveyed(model, states, inputs, folded_logits) == listed, STALE
    with pytest.raises(FlashNormError, match="folded already"):
        fold_model_(model)
    changed = [n for n, p in model.named_parameters() if n not in dict(before.named_parameters())]
    assert changed == ([] if model.config.flashnorm["lm_head"] != "untied" else ["lm_head.weight"])


def test_patterns_name_no_other_norm():
    """A layer of another kind, which a text forward does not reach, has a norm of the same name."""
    record = fold_model_(model_of("mllama")).config.flashnorm
    names = [name for name in record["folded"] if "layers" in name]
    assert len(names) == 6 and not any("*" in name or ".3." in name for name in names)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3"])
def test_saved_after_a_fold_in_memory_it_is_the_folded_checkpoint(family, tmp_path):
    """The same bits and the same flags as `flashnorm fold` writes, from the checkpoint and from its loaded model."""
    families.save(model_of(family), tmp_path / "source", torch.bfloat16)
    fold(tmp_path / "source", tmp_path / "folded", workers=1)
    fold_model_(load(tmp_path / "source")).save_pretrained(tmp_path / "mine")
    mine, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("mine", "folded"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in theirs)
    config, wanted = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("mine", "folded"))
    for ours, theirs in ((config, wanted), (config.get("text_config"), wanted.get("text_config"))):
        assert ours is None or ours["flashnorm"].pop("in_memory")
        for key in ("flashnorm", "flashnorm_folded", "tie_word_embeddings"):
            assert ours is None or ours.get(key) == theirs.get(key)
    result = verify(tmp_path / "mine", tmp_path / "source", levels=("weights",), workers=1, adopt=True)
    assert result.verdict == "as planned, not run" and result.level("weights").figures["rounded_otherwise"] == 0
    assert verify(tmp_path / "mine", levels=("weights",), workers=1).verdict == "as planned, not run"
    model = from_pretrained(tmp_path / "mine")
    inputs = families.text_inputs(model, seed=3)
    assert torch.equal(families.logits(model, inputs), families.logits(load(tmp_path / "folded"), inputs))


@pytest.mark.parametrize("choice", ["auto", "keep", "untie"])
def test_a_tied_head(choice, tmp_path):
    model = model_of("gemma3_text")
    if choice == "untie":
        model.model.norm.weight.data.zero_()  # the identity: the head is a copy
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    embedding = model.get_input_embeddings().weight.clone()
    fold_model_(model, choice)
    kept = choice == "keep"
    assert model.config.flashnorm["lm_head"] == ("kept" if kept else "untied")
    assert (
        model.config.tie_word_embeddings is kept and (model.lm_head.weight is model.model.embed_tokens.weight) is kept
    )
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert ("lm_head.weight" in model.all_tied_weights_keys) is kept
    model.tie_weights()
    assert (families.logits(model, inputs) - want).norm() / want.norm() < 1e-5
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not kept
    assert (families.logits(from_pretrained(tmp_path), inputs) - want).norm() / want.norm() < 1e-5


def test_gemma_keeps_its_tie_unless_told():
    assert fold_model_(model_of("gemma2")).config.flashnorm["lm_head"] == "kept"
    assert fold_model_(model_of("gemma2"), "untie").config.flashnorm["lm_head"] == "untied"


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def with_more(model):
    model.model.extra = nn.Linear(2, 2)


def another_shape(model):
    model.lm_head = nn.Linear(64, 60, bias=False)


def quantized(model):
    model.config.quantization_config = {"quant_method": "gptq"}


def broken(model):
    model.model.norm.weight.data[1] = torch.nan


def nothing_left(model):
    for module in families.norms(model).values():
        module.weight.data.fill_(1.0)


def overflowing(model):
    model.half().model.layers[2].mlp.up_proj.weight.data[4, 5] = 6e4
    model.model.layers[2].post_attention_layernorm.weight.data[5] = 1.5


def half_on_meta(model):
    model.model.layers[1].mlp.to("meta")


def with_adapters(model):
    model._hf_peft_config_loaded = True


def one_memory(model):
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (tied_by_hand, FlashNormError, "tie_word_embeddings"),
        (with_more, FlashNormError, "model.extra.weight is .2, 2., but the config"),
        (another_shape, FlashNormError, "lm_head.weight"),
        (quantized, FlashNormError, "fold first, then quantize"),
        (broken, FlashNormError, "model.norm.weight: holds inf or NaN"),
        (nothing_left, FlashNormError, "nothing to fold"),
        (overflowing, GainOverflowError, "model.layers.2.mlp.up_proj.weight"),
        (half_on_meta, FlashNormError, "model.layers.1.mlp"),
        (with_adapters, FlashNormError, "adapters"),
        (one_memory, FlashNormError, "one place of memory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_half_folded(change, error, says):
    model = model_of("llama")
    change(model)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(error, match=says):
        fold_model_(model)
    after = model.state_dict()
    assert all(p.is_meta or torch.equal(p.nan_to_num(), after[n].nan_to_num()) for n, p in before.items())
    assert model.config.to_dict() == config


def test_refusals_of_the_plan():
    with pytest.raises(UsageError, match="`final_norm` is one of"):
        fold_model_(model_of("llama"), "twice")
    with pytest.raises(FlashNormError, match="nothing to fold"):
        fold_model_(families.build("nanochat", 0))
    with pytest.raises(PlanError, match="cannot be traced"):
        fold_model_(families.build("idefics", 0))


def test_another_model_of_the_same_config_is_not_called_folded():
    config = LlamaConfig(**LLAMA)
    first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)
    families.randomize_gains(first, 1)
    fold_model_(first)
    assert not hasattr(second.config, "flashnorm") and not hasattr(config, "flashnorm")
    assert all(getattr(m, "config", first.config) is first.config for m in first.modules())
    assert second.config is config
    families.randomize_gains(second, 2)
    fold_model_(second)


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def test_from_auto_classes_and_names():
    config = LlamaConfig(**LLAMA)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    families.randomize_gains(model, 1)
    assert len(swapped(weightless(fold_model_(model)))) == 5
    assert set(flashnorm_cli.__all__) <= set(dir(flashnorm_cli)) | set(flashnorm_cli._HOME)


def surveyed(model, states, inputs, folded_logits) -> dict[str, object]:
    """How a folded model runs without the weights: the norms, what is left to its own code, whether bits differ."""
    left = sorted({why.split()[0] for why in states.values() if why})
    return {
        "folded": len(states),
        "same_bits": torch.equal(families.logits(model, inputs), folded_logits),
        "left": left,
    }


def survey() -> None:
    """Write docs/weightless_families.json: every family folded in memory, then run without the weights."""
    found: dict[str, dict[str, object]] = {}
    for family in families.families():
        try:
            model = model_of(family)
            inputs = families.text_inputs(model, seed=3)
            want = families.logits(model, inputs)
            folded_logits = families.logits(fold_model_(model), inputs)
        except (FlashNormError, AttributeError) as error:  # refused, or a family that transformers itself cannot run
            found[family] = {"refused": str(error)[:120]}
            continue
        states = weightless_norms(weightless(model))
        error = ((folded_logits - want).norm() / want.norm()).item()
        found[family] = {"error": float(f"{error:.1e}"), **surveyed(model, states, inputs, folded_logits)}
        print(family, found[family], flush=True)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "dtype": "float32",
    }
    rows = ",\n".join(f"  {json.dumps(family)}: {json.dumps(row)}" for family, row in found.items())
    text = f'{json.dumps(versions)[:-1]}, "families": {{\n{rows}\n}}}}\n'
    SURVEY.write_text(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    survey()
