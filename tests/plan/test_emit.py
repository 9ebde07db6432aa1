"""What `plan --emit` writes, applied as the tools' documentation says: the model computes the same.

The tools themselves are run by docs/experiments/plan_as_data.py.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from torch import nn

from flashnorm_cli.checkpoint.model import Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.cli import main
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan.emit import TOOLS, emit
from flashnorm_cli.plan.planner import plan_checkpoint
from flashnorm_cli.plan.rotation import stream_json

EXACT = 1e-5


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A family's checkpoint and its plan, made once."""
    made: dict[tuple[str, str], Any] = {}

    def get(family: str, final_norm: str = "auto") -> Any:
        if (family, final_norm) not in made:
            model = families.build(family, seed=0)
            families.randomize_gains(model, seed=1)
            folder = tmp_path_factory.mktemp("emit") / family
            families.save(model, folder, None, "5GB")
            checkpoint = open_checkpoint(Source(str(folder)), weights=False)
            traced = plan_checkpoint(checkpoint, final_norm)
            made[family, final_norm] = SimpleNamespace(folder=folder, checkpoint=checkpoint, traced=traced)
        return made[family, final_norm]

    return get


def loaded(folder: Path, family: str, untied: bool = True) -> nn.Module:
    model = getattr(transformers, families.families()[family]).from_pretrained(folder, dtype=torch.float32).eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if untied and head.weight is embedding.weight:  # whatever rotates unties first, in all three tools
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.requires_grad_(False)


def difference(model: nn.Module, folder: Path, family: str) -> float:
    source = loaded(folder, family)
    inputs = families.text_inputs(source, seed=2)
    expected = families.logits(source, inputs).double()
    return float((families.logits(model, inputs).double() - expected).norm() / expected.norm())


def orthogonal(size: int) -> torch.Tensor:
    torch.manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def into(linear: nn.Module, q: torch.Tensor) -> None:
    """What comes in is `x q`."""
    linear.weight.copy_(linear.weight.double() @ q)


def out_of(module: nn.Module, q: torch.Tensor) -> None:
    """What goes out becomes `y q`."""
    if isinstance(module, nn.Embedding):
        module.weight.copy_(module.weight.double() @ q)
        return
    module.weight.copy_(q.T @ module.weight.double())
    if module.bias is not None:
        module.bias.copy_(module.bias.double() @ q)


def fuse(norm: nn.Module, linears: list[nn.Module], offset: float = 0.0) -> None:
    for linear in linears:
        linear.weight.mul_(norm.weight + offset)
    norm.weight.fill_(1.0 - offset)


# ---- llm-compressor --------------------------------------------------------------------------------------------------


def matching(model: nn.Module, targets: list[str]) -> list[str]:
    """compressed_tensors.utils.match: a name, or a pattern after `re:` that has to match from a name's beginning."""
    return [
        name
        for name, _ in model.named_modules()
        if any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in targets)
    ]


def apply_llm_compressor(model: nn.Module, settings: dict[str, Any], offset: float = 0.0) -> None:
    arguments = settings["SpinQuantModifier"]
    for name in matching(model, [arguments["mappings"]["embedding"]]):  # `_center_embeddings`
        weight = model.get_submodule(name).weight
        weight.sub_(weight.mean(-1, keepdim=True))
    for mapping in arguments["norm_mappings"]:
        (norm,) = matching(model, [mapping["norm"]])
        linears = [name for target in mapping["linears"] for name in matching(model, [target])]
        assert len(linears) == len(mapping["linears"])
        fuse(model.get_submodule(norm), [model.get_submodule(name) for name in linears], offset)
    (scheme,) = arguments["transform_config"]["config_groups"].values()
    for args in scheme["apply"]:
        for name in matching(model, args["targets"]):
            module = model.get_submodule(name)
            assert type(module) in (nn.Linear, nn.Embedding)
            q = orthogonal(families.TEXT_SIZES["hidden_size"])
            assert args.get("inverse", False) == (args["location"] == "weight_input")
            (into if args["location"] == "weight_input" else out_of)(module, q)


def apply_smoothing(model: nn.Module, settings: dict[str, Any]) -> None:
    pairs = settings["SmoothQuantModifier"]["mappings"]
    awq = settings["AWQModifier"]["mappings"]
    assert awq == [{"smooth_layer": norm, "balance_layers": linears} for linears, norm in pairs]
    for linears, norm in pairs:
        scales = torch.rand_like(model.get_submodule(norm).weight) + 0.5
        model.get_submodule(norm).weight.div_(scales)
        for name in linears:
            model.get_submodule(name).weight.mul_(scales)


# ---- Quark -----------------------------------------------------------------------------------------------------------


def apply_quark(model: nn.Module, settings: dict[str, Any], offset: float = 0.0) -> None:
    config = settings["RotationConfig"]
    layers = model.get_submodule(config["model_decoder_layers"])
    q = orthogonal(families.TEXT_SIZES["hidden_size"])
    for number in range(len(layers)):
        for group in config["scaling_layers"]["first_layer" if number == 0 else "middle_layers"]:
            previous, following = (
                [model.get_submodule(name) for name in group[key]] for key in ("prev_modules", "next_modules")
            )
            assert previous and following and not {*previous} & {*following}
            fuse(model.get_submodule(group["norm_module"]), following, offset)
            for module in previous:
                out_of(module, q)
            for module in following:
                into(module, q)
    assert config["scaling_layers"]["last_layer"] == []


# ---- AutoRound -------------------------------------------------------------------------------------------------------


def apply_auto_round(model: nn.Module, settings: dict[str, Any], offset: float = 0.0) -> None:
    mapping = settings["RotationMapping"]
    config, part = model.config, model.get_submodule
    q, head = orthogonal(getattr(config, mapping["hidden_size_attr"])), orthogonal(mapping["attn_head_dim"])
    between = orthogonal(getattr(config, mapping["intermediate_size_attr"]))
    heads = getattr(config, mapping["num_heads_attr"])
    fuse(part(mapping["pre_head_ln"]), [part(mapping["lm_head"])], offset)
    out_of(part(mapping["embedding"]), q)
    into(part(mapping["lm_head"]), q)
    assert mapping["positional_embedding"] is None
    for layer in part(mapping["layers_attr"]):
        qkv = [layer.get_submodule(mapping[f"attn_{x}"]) for x in "qkv"]
        wide = [layer.get_submodule(name) for name in mapping["mlp_in"]]
        o, down = layer.get_submodule(mapping["attn_o"]), layer.get_submodule(mapping["mlp_out"])
        fuse(layer.get_submodule(mapping["attn_input_ln"]), qkv, offset)
        fuse(layer.get_submodule(mapping["mlp_input_ln"]), wide, offset)
        for linear in (*qkv, *wide):
            into(linear, q)
        out_of(o, q)
        out_of(down, q)
        assert qkv[2].bias is None  # which the tool forgets
        out_of(qkv[2], torch.block_diag(*[head] * (qkv[2].out_features // len(head))))
        into(o, torch.block_diag(*[head] * heads))
    for name, module in model.named_modules():  # found by the ends of their names
        if isinstance(module, nn.Linear) and name.endswith(mapping["mlp_out"].split(".")[-1]):
            into(module, between)
            module.register_forward_pre_hook(lambda _, inputs: ((inputs[0].double() @ between).float(),))


APPLY = {"llm-compressor": apply_llm_compressor, "quark": apply_quark, "auto-round": apply_auto_round}
# Biases of readers; a tied head; fused projections; latent attention.
FAMILIES = ("qwen2", "smollm3", "phi3", "youtu")
DENSE = {
    "model.embed_tokens.weight 1",
    "model.layers.N.self_attn.o_proj.weight 0",
    "model.layers.N.mlp.down_proj.weight 0",
}
WRITERS = dict.fromkeys(FAMILIES, DENSE) | {
    "olmoe": {
        "model.embed_tokens.weight 1",
        "model.layers.N.self_attn.o_proj.weight 0",
        "model.layers.N.mlp.experts.N.down_proj.weight 0",
    }
}
NOT_FOR_AUTO_ROUND = {"qwen2": "and not their bias", "phi3": "takes q, k and v", "youtu": "takes q, k and v"}


@pytest.mark.parametrize(
    ("family", "tool"),
    [*itertools.product(FAMILIES, TOOLS), ("arcee", "auto-round"), ("granite", "auto-round")],
)
def test_applied_as_documented(planned, family, tool):
    source = planned(family)
    if tool == "auto-round" and family in NOT_FOR_AUTO_ROUND:
        with pytest.raises(PlanError, match=NOT_FOR_AUTO_ROUND[family]):
            emit(tool, source.checkpoint, source.traced)
        return
    settings = json.loads(json.dumps(emit(tool, source.checkpoint, source.traced)))
    model = loaded(source.folder, family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    APPLY[tool](model, settings)
    assert difference(model, source.folder, family) < EXACT
    same = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not any(name.endswith(("embed_tokens.weight", "o_proj.weight", "input_layernorm.weight")) for name in same)
    # The comparison sees a writer that is left out.
    forgotten = next(name for name in before if name.endswith("o_proj.weight"))
    dict(model.named_parameters())[forgotten].copy_(before[forgotten])
    assert difference(model, source.folder, family) > 1e-3


@pytest.mark.parametrize("family", ["smollm3", "youtu", "granite"])
def test_smoothing_mappings_leave_the_model_as_it_is(planned, family):
    source = planned(family)
    settings = emit("llm-compressor", source.checkpoint, source.traced)
    model = loaded(source.folder, family, untied=False)  # what smooths does not untie
    apply_smoothing(model, settings)
    assert difference(model, source.folder, family) < EXACT
    found, tied = settings["SmoothQuantModifier"]["mappings"], source.traced.untied is not None
    assert len(found) == len(source.traced.plan.folded) - tied and any("lm_head" in each[0] for each in found) != tied


def test_one_plus_weight(planned):
    """Gemma: the norm's class decides what a tool makes of its weight."""
    for family, tool in (("qwen3_5_text", "llm-compressor"), ("gemma", "quark")):
        source = planned(family, "untie")
        model = loaded(source.folder, family)
        APPLY[tool](model, emit(tool, source.checkpoint, source.traced), offset=1.0)
        assert difference(model, source.folder, family) < EXACT
    with pytest.raises(PlanError, match="is a GemmaTextScaledWordEmbedding"):
        emit("llm-compressor", source.checkpoint, source.traced)
    with pytest.raises(PlanError, match=r"`1 \+ weight`, and the tool multiplies by the weight itself"):
        emit("auto-round", source.checkpoint, source.traced)


@pytest.mark.parametrize(
    ("family", "tools", "why"),
    [
        ("gemma", TOOLS, "`model.norm.weight`, a weight that is kept"),  # its tie is hard-wired
        ("olmoe", TOOLS, r"`model.layers.\*.mlp.gate.weight`, .* is of a OlmoeTopKRouter"),
        ("nanochat", ("quark",), "with no norm's weight in between"),
        ("nanochat", ("auto-round",), "0 lists of layers"),
    ],
)
def test_what_a_tool_cannot_express_is_refused(planned, family, tools, why):
    source = planned(family)
    for tool in tools:
        with pytest.raises(PlanError, match=why):
            emit(tool, source.checkpoint, source.traced)


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "phi3", "olmoe"])
def test_json_says_who_writes_and_who_reads(planned, family):
    source = planned(family)
    stream = stream_json(source.checkpoint, source.traced)
    written, read = stream["writers"], stream["readers"]
    assert {re.sub(r"\.\d+\.", ".N.", f"{w['tensor']} {w['dim']}") for w in written} == WRITERS[family]
    layers = source.traced.model.config.num_hidden_layers
    per_layer = [len([w for w in written if f"layers.{n}." in w["tensor"]]) for n in range(layers)]
    assert len(written) == 1 + sum(per_layer) and len({*per_layer}) == 1
    norms = {norm.tensor: norm.readers for norm in source.traced.plan.norms}
    assert stream["refused"] is None and stream["size"] == families.TEXT_SIZES["hidden_size"]
    for reader in read:
        assert reader["dim"] == 1 and reader["tensor"] in norms[reader["norm"]]
        attention = ".self_attn." in reader["tensor"]
        assert reader["norm"].endswith(
            "model.norm.weight"
            if reader["tensor"] == "lm_head.weight"
            else ".input_layernorm.weight"
            if attention
            else ".post_attention_layernorm.weight"
        )
    stream_norms = [n for n in norms if n.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(read) == sum(len(norms[name]) for name in stream_norms) and "lm_head.weight" in {
        r["tensor"] for r in read
    }
    lying = {(each["tensor"], each["dim"]) for each in (*written, *read)}
    assert lying == {(name, dim) for name, dims in stream["tensors"].items() for dim in dims}


def test_json_says_why_not(planned):
    source = planned("gemma")
    stream = stream_json(source.checkpoint, source.traced)
    assert "a weight that is kept" in stream.pop("refused")
    assert stream == {"size": None, "tensors": {}, "writers": [], "readers": []}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


def test_command_line(planned, tmp_path, capsys):
    source = planned("qwen2")
    assert run("plan", str(source.folder), "--emit", "quark", "--quiet") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(emit("quark", source.checkpoint, source.traced)))
    file = tmp_path / "plan.json"
    assert run("plan", str(source.folder), "--emit", "quark", "-o", str(file)) == 0
    assert capsys.readouterr().out == "" and json.loads(file.read_text()) == printed
    # A refusal leaves the file as it was.
    assert run("plan", str(planned("olmoe").folder), "--emit", "quark", "-o", str(file)) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "quark has no words" in error
    assert json.loads(file.read_text()) == printed and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--emit", "gptq"), "'gptq' is not one of 'llm-compressor', 'auto-round', 'quark'"),
        (("--emit", "quark", "--json"), "--emit and --json exclude each other"),
        (("-o", "plan.json"), "--output needs --emit"),
        (("--emit", "quark", "-o", "/nowhere/plan.json"), "there is no folder /nowhere"),
    ],
)
def test_wrong_usage(tmp_path, capsys, options, words):
    assert run("plan", str(tmp_path), *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
