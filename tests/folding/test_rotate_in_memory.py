"""A model rotated in memory holds what the rotated checkpoint holds, computes the same, or is left as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import accelerate
import families
import numpy
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from flashnorm_cli import fold, fold_model_, verify, weightless
from flashnorm_cli.errors import FlashNormError, GainOverflowError, GainUnderflowError, PlanError, UsageError
from flashnorm_cli.folding import parameters
from flashnorm_cli.folding.rotation import Rotation

SURVEY = Path(__file__).parents[2] / "docs" / "rotated_families.json"
STALE = "docs/rotated_families.json is stale: run tests/folding/test_rotate_in_memory.py with PYTHONPATH=tests/support"
EXACT = 1e-5  # of float32 logits, relative


def model_of(family: str) -> Any:
    model = families.build(family, seed=0)
    families.randomize_gains(model, seed=1)
    return model.eval()


# A head of its own, with biases of readers; a tied one that becomes one; experts that are stacked with their biases,
# and a shared one; fused projections, half precision.
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [
        ("qwen2", "hadamard", torch.bfloat16),
        ("smollm3", "random", torch.bfloat16),
        ("gpt_oss", "hadamard", torch.float32),
        ("mixtral", "hadamard", torch.bfloat16),
        ("phi3", "random", torch.float16),
    ],
)
def test_the_same_as_the_rotated_checkpoint(tmp_path, monkeypatch, family, kind, dtype):
    monkeypatch.setattr(parameters, "CHUNK_ELEMENTS", 5000)  # several parts of each parameter
    families.save(model_of(family), tmp_path / "source", dtype)
    fold(tmp_path / "source", tmp_path / "folded", rotate=kind, seed=7, workers=1)
    cls = getattr(transformers, families.families()[family])
    model = cls.from_pretrained(tmp_path / "source", dtype="auto").eval()
    assert fold_model_(model, rotate=kind, seed=7) is model
    model.save_pretrained(tmp_path / "mine")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("mine", "folded"))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():  # another order of float32 sums may round to the neighbour
        assert mine[name].dtype == tensor.dtype
        assert (mine[name] == tensor).float().mean() > (0 if dtype == torch.float32 else 0.999)
        assert torch.allclose(mine[name].double(), tensor.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    config, wanted = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("mine", "folded"))
    assert config["flashnorm"].pop("in_memory") is True
    assert all(config.get(k) == wanted.get(k) for k in ("flashnorm", "flashnorm_folded", "tie_word_embeddings"))
    if family != "smollm3":
        return
    # It has no flashnorm.json: config.json says which matrix it was.
    found = verify(tmp_path / "mine", tmp_path / "source", levels=("weights",), workers=1, adopt=True)
    assert found.level("weights").status == "passed", found
    record = json.loads((tmp_path / "mine" / "flashnorm.json").read_text())["rotation"]
    assert (record["kind"], record["seed"]) == (kind, 7)
    assert verify(tmp_path / "mine", levels=("weights",), workers=1).level("weights").status == "passed"


@pytest.mark.parametrize("family", ["llama", "smollm3", "olmoe"])
def test_it_computes_the_same(family):
    model = model_of(family)
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    embedding = model.get_input_embeddings().weight.clone()
    with torch.autocast("cpu"):  # which is of no use to a fold
        fold_model_(model, rotate="hadamard", seed=2)
    assert not torch.allclose(model.get_input_embeddings().weight, embedding, atol=1e-2)
    assert (families.logits(weightless(model), inputs) - want).norm() / want.norm() < 1e-5
    with pytest.raises(FlashNormError, match="folded already"):
        fold_model_(model, rotate="hadamard")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    [("qwen2", "hadamard", torch.bfloat16), ("gpt_oss", "hadamard", torch.float32), ("phi3", "random", torch.float16)],
)
def test_a_model_on_a_gpu(monkeypatch, family, kind, dtype):
    """The same values as on a processor, give or take the order of float32 sums, also where TF32 is on."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    ours, theirs = model_of(family).to(dtype), model_of(family).to("cuda", dtype)
    fold_model_(ours, rotate=kind, seed=7)
    fold_model_(theirs, rotate=kind, seed=7)
    mine = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert tensor.device.type == "cuda", name
        assert torch.allclose(mine[name].double(), tensor.double().cpu(), rtol=torch.finfo(dtype).eps, atol=1e-6), name
        assert (mine[name] == tensor.cpu()).float().mean() > (0 if dtype == torch.float32 else 0.999), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "smollm3", "olmoe"])
def test_it_computes_the_same_on_a_gpu(family):
    model = model_of(family).cuda()
    inputs = families.text_inputs(model, seed=3)
    inputs |= {key: value.cuda() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    want = families.logits(model, inputs)
    fold_model_(model, rotate="hadamard", seed=2)
    assert (families.logits(weightless(model), inputs) - want).norm() / want.norm() < EXACT


class LayerNorms(transformers.LlamaForCausalLM):
    """LayerNorm subtracts a mean over the channels."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.input_layernorm = nn.LayerNorm(config.hidden_size, bias=False)


def small_llama(cls=transformers.LlamaForCausalLM, **changes):
    settings = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128} | changes
    model = cls(transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **settings))
    families.randomize_gains(model, seed=1)
    return model


def spread(model):
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.inf
    return model


def overflowing(model):
    model.half().model.layers[1].mlp.up_proj.weight.data[0] = 6e4
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(0.9)
    return model


def tiny(model):
    model.half().model.layers[1].mlp.down_proj.weight.data.fill_(6e-8)
    return model


def with_norm(norm):
    model = small_llama()
    norm.weight = model.model.norm.weight
    model.model.norm = norm
    return model


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, out: out + torch.arange(48.0))
    return model


def patched(model):
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **more: forward(x, **more) * torch.arange(48.0)
    return model


def inferred(model):
    with torch.inference_mode():
        model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.rand(48, 64), requires_grad=False)
    return model


def expanded(model):
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.rand(1, 48).expand(64, 48))
    return model


def overlapping(model):
    memory, layers = torch.rand(96 * 48), model.model.layers
    layers[0].mlp.up_proj.weight = nn.Parameter(memory[: 64 * 48].view(64, 48))
    layers[1].mlp.up_proj.weight = nn.Parameter(memory[32 * 48 :].view(64, 48))
    return model


REFUSED = {
    "another norm with that weight": (lambda: with_norm(nn.LayerNorm(48, bias=False)), {}, FlashNormError, "LayerNorm"),
    "one by 1 + w": (lambda: with_norm(GemmaRMSNorm(48)), {"rotate": None}, FlashNormError, "makes a LlamaRMSNorm"),
    "a hook": (lambda: hooked(small_llama()), {}, FlashNormError, "layers.1 has a hook"),
    "a forward": (lambda: patched(small_llama()), {}, FlashNormError, "layers.0 has a forward of its own"),
    "inference mode": (lambda: inferred(small_llama()), {}, FlashNormError, "down_proj.*inference_mode"),
    "one row for all": (lambda: expanded(small_llama()), {"rotate": None}, FlashNormError, "up_proj.* is expanded"),
    "memory of another": (lambda: overlapping(small_llama()), {}, FlashNormError, "two parameters in one place"),
    "seed by a text": (small_llama, {"seed": "3"}, UsageError, "a whole number"),
    "seed by a float": (small_llama, {"seed": 3.0}, UsageError, "a whole number"),
    "post norms": (lambda: model_of("gemma2"), {}, PlanError, "a weight that is kept"),
    "post norms, untied": (
        lambda: model_of("gemma3_text"),
        {"final_norm": "untie"},
        PlanError,
        "a weight that is kept",
    ),
    "LayerNorm everywhere": (lambda: model_of("cohere"), {}, PlanError, "cannot be rotated"),
    "LayerNorm in a Llama": (lambda: small_llama(LayerNorms), {}, PlanError, "layer_norm|mean"),
    "a final norm that is kept": (small_llama, {"final_norm": "keep"}, PlanError, "model.norm.weight"),
    "no such matrix": (small_llama, {"rotate": "walsh"}, UsageError, "one of"),
    "no such size": (lambda: small_llama(hidden_size=4 * 46), {}, UsageError, "use the random rotation"),
    "no such seed": (small_llama, {"seed": -1}, UsageError, "seed"),
    "inf": (lambda: spread(small_llama()), {}, FlashNormError, "layers.1.mlp.down_proj.weight: holds inf"),
    "overflow": (lambda: overflowing(small_llama()), {}, GainOverflowError, "layers.1.mlp.up_proj.weight: a rotated"),
    "underflow": (lambda: tiny(small_llama()), {}, GainUnderflowError, "layers.1.mlp.down_proj.weight: .* rotated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_left_as_it_was(name):
    make, options, error, says = REFUSED[name]
    model = make()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(error, match=says):
        fold_model_(model, **{"rotate": "hadamard", **options})
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())
    assert model.config.to_dict() == config


def test_what_others_hang_into_a_model_that_changes_nothing():
    model, seed = small_llama().eval(), numpy.int64(3)
    inputs = families.text_inputs(model, seed=3)
    model(**inputs, output_hidden_states=True)  # transformers leaves its hooks there
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    want = families.logits(model, inputs)
    fold_model_(model, rotate="hadamard", seed=seed)
    assert (families.logits(model, inputs) - want).norm() / want.norm() < EXACT
    assert type(model.config.flashnorm["rotation"]["seed"]) is int


def test_a_parameter_that_does_not_lie_in_one_piece(tmp_path: Path):
    """As after `model.to(memory_format=...)`, or a tensor that was transposed on load."""
    model, other = small_llama(), small_llama()
    other.load_state_dict(model.state_dict())
    down = other.model.layers[0].mlp.down_proj
    down.weight.data = down.weight.data.T.contiguous().T
    fold_model_(model, rotate="hadamard")
    fold_model_(other, rotate="hadamard")
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_products_are_float32_whatever_the_process_has_chosen(monkeypatch, tmp_path):
    """On processors and GPUs that can do less, torch takes TF32 or bf16 for float32 products if it is told to."""
    cpu, gpu = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    seen = set()
    turn = Rotation.turn

    def watched(*arguments):
        seen.add((cpu.fp32_precision, gpu.fp32_precision))
        return turn(*arguments)

    monkeypatch.setattr(Rotation, "turn", watched)
    small_llama().save_pretrained(tmp_path / "source")
    before = cpu.fp32_precision, gpu.fp32_precision
    cpu.fp32_precision, gpu.fp32_precision = "bf16", "tf32"  # torch's one setting for all would raise
    try:
        fold(tmp_path / "source", tmp_path / "out", rotate="hadamard", workers=2)
        fold_model_(small_llama(), rotate="hadamard")
        assert seen == {("ieee", "ieee")} and (cpu.fp32_precision, gpu.fp32_precision) == ("bf16", "tf32")
        assert verify(tmp_path / "out", tmp_path / "source", levels=("logits",), record=False).equivalent
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before


# ---- every family ----------------------------------------------------------------------------------------------------


def surveyed(family: str) -> dict[str, float | str]:
    """How far a family's logits are from the source's after a rotation (float32, relative), or why it is refused."""
    model = model_of(family).float()
    inputs = families.text_inputs(model, seed=3)
    want = families.logits(model, inputs)
    if not bool(want.isfinite().all()) or not bool(want.any()):
        return {"refused": "transformers' own model gives no logits for text"}
    try:
        fold_model_(model, rotate="hadamard", seed=5)
    except FlashNormError as error:
        return {"refused": str(error)[:160]}
    error = float((families.logits(model, inputs) - want).norm() / want.norm())
    return {"error": float(f"{error:.1e}")}


def test_the_survey():
    """What it says of 60 families and more; a few are looked at again."""
    said = json.loads(SURVEY.read_text())
    if Version(said["transformers"]) > Version(transformers.__version__):
        pytest.skip("docs/rotated_families.json was written with a newer transformers")
    found = said["families"]
    assert list(found) == list(families.families()), STALE
    exact = {name for name, row in found.items() if "error" in row}
    assert len(exact) >= 60 and all(found[name]["error"] < EXACT for name in exact)
    assert all(found[name]["refused"] for name in found.keys() - exact)
    again = random.sample(sorted(found), 3)
    for family in again:
        row = surveyed(family)
        near = max(EXACT, 2 * found[family].get("error", 0.0))  # another processor sums in another order
        assert row.keys() == found[family].keys() and row.get("error", 0.0) < near, (family, row, STALE)


def survey() -> None:
    """Write docs/rotated_families.json: every family rotated in memory."""
    found = {}
    for family in families.families():
        try:
            found[family] = surveyed(family)
        except Exception as error:  # a family that transformers itself cannot run
            found[family] = {"refused": f"transformers cannot run it: {type(error).__name__}: {error}"[:160]}
        print(family, found[family], flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "device": "cpu"}
    rows = ",\n".join(f"  {json.dumps(family)}: {json.dumps(row)}" for family, row in found.items())
    SURVEY.write_text(f'{json.dumps(versions)[:-1]}, "families": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    survey()
