"""Ways in which a folded checkpoint can be wrong: each is caught by the levels that should see it, and named.

Mutations are made with plain torch on the files. `python tests/proof/test_mutations.py` writes docs/mutations.md.
"""
# ruff: noqa: E501 - a mutation is read best on one line

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import families
import pytest
import torch
import transformers
from command_line import run
from documents import document
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashnorm_cli.plan.model import Plan, Reader, Run
from flashnorm_cli.plan.planner import TracedPlan, plan_checkpoint

DOC = Path(__file__).parents[2] / "docs" / "mutations.md"
INDEX = "model.safetensors.index.json"
W, LAYERS, LOGITS = "weights", "layers", "logits"
FILES = (W,)  # nothing that a model computes with on text
ALL = (W, LAYERS, LOGITS)
RAN = (LOGITS,)
# Tied head that the fold unties; routers and shared experts; experts merged on load; 1 + w; 1 + w untied; MLA.
MODELS = ("smollm3", "qwen2_moe", "mixtral", "gemma2", "gemma3_text", "deepseek_v3", "minimax")

ATTENTION_NORM = "model.layers.1.input_layernorm.weight"
Q, K, V, OUT = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo")
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBEDDING, HEAD, FINAL = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.2.gate_proj.weight"


class Pair:
    """A source, and a copy of its fold to be spoilt."""

    def __init__(self, source: Path, folded: Path) -> None:
        self.source, self.folded = source, folded

    def before(self, name: str) -> torch.Tensor:
        with safe_open(self.source / shard_of(self.source, name), "pt") as file:
            return file.get_tensor(name)

    def edit(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        path = self.folded / shard_of(self.folded, name)
        tensors = load_file(path)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})

    def put(self, name: str, value: torch.Tensor) -> None:
        self.edit(name, lambda _: value)

    def remove(self, name: str) -> None:
        path = self.folded / shard_of(self.folded, name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        if (self.folded / INDEX).exists():
            self.json(INDEX, lambda index: index["weight_map"].pop(name))

    def json(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((self.folded / file).read_text())
        change(value)
        (self.folded / file).write_text(json.dumps(value, indent=2))

    def scaled(self, name: str, factor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The source's tensor times a float32 factor along a dimension, rounded once."""
        tensor = self.before(name)
        shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
        return (tensor.float() * factor.float().view(shape)).to(tensor.dtype)


def shard_of(folder: Path, name: str) -> str:
    if (folder / INDEX).exists():
        return json.loads((folder / INDEX).read_text())["weight_map"][name]
    return "model.safetensors"


@dataclass(frozen=True)
class Mutation:
    """`levels` have to catch it alone; level weights names `what`, in words that contain `words`.

    `plan` is how the plan is wrong, for the fold and for `verify` alike: then the files hold what it asks for.
    """

    name: str
    model: str
    apply: Callable[[Pair], Any]
    levels: tuple[str, ...]
    what: str
    words: str = ""
    plan: Callable[[Plan], Plan] | None = None


@contextlib.contextmanager
def planned_wrongly(change: Callable[[Plan], Plan] | None) -> Iterator[None]:
    """Whoever makes a plan in here makes that one: what every level but the models' own forward starts from."""
    if change is None:
        yield
        return

    def wrongly(*arguments: Any, **more: Any) -> TracedPlan:
        found = plan_checkpoint(*arguments, **more)
        return dataclasses.replace(found, plan=change(found.plan))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("flashnorm_cli.folding.planning", "flashnorm_cli.proof.pairing"):
            patch.setattr(f"{module}.plan_checkpoint", wrongly)
        yield


def fold_again(pair: Pair) -> None:
    shutil.rmtree(pair.folded)
    assert run("fold", pair.source, pair.folded, "-q") == 0


def folded_all_the_same(*tensors: str) -> Callable[[Plan], Plan]:
    """Norms that are kept because their output is read elsewhere, folded into the readers that were seen."""

    def change(plan: Plan) -> Plan:
        norms = tuple(dataclasses.replace(n, reason=None) if n.tensor in tensors else n for n in plan.norms)
        more = [Reader(r, 1, (Run(n.tensor, 0, n.shape[0]),)) for n in norms if n.tensor in tensors for r in n.readers]
        return dataclasses.replace(plan, norms=norms, readers=(*plan.readers, *more))

    return change


def without_reader(tensor: str) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        norms = tuple(dataclasses.replace(n, readers=tuple(r for r in n.readers if r != tensor)) for n in plan.norms)
        return dataclasses.replace(plan, norms=norms, readers=tuple(r for r in plan.readers if r.tensor != tensor))

    return change


def gains_without_one(plan: Plan) -> Plan:
    return dataclasses.replace(plan, norms=tuple(dataclasses.replace(n, offset=0.0) for n in plan.norms))


def channels_in_reverse(tensor: str) -> Callable[[Plan], Plan]:
    """The first half of a reader's channels gets the gain of the second, and the other way round."""

    def change(plan: Plan) -> Plan:
        def swapped(reader: Reader) -> Reader:
            (run,) = reader.runs
            half = run.length // 2
            return dataclasses.replace(reader, runs=(Run(run.norm, half, half), Run(run.norm, 0, half)))

        return dataclasses.replace(plan, readers=tuple(swapped(r) if r.tensor == tensor else r for r in plan.readers))

    return change


def forget(name: str) -> Callable[[Pair], None]:
    return lambda p: p.put(name, p.before(name))


def flip_a_bit(pair: Pair, name: str, bit: int) -> None:
    def flip(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.view(torch.int16).clone()
        bits.view(-1)[5] ^= 1 << bit
        return bits.view(tensor.dtype)

    pair.edit(name, flip)


def swap_shards(pair: Pair) -> None:
    one, two = sorted(pair.folded.glob("*.safetensors"))[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def exchange(one: str, two: str) -> Callable[[Pair], None]:
    def apply(pair: Pair) -> None:
        a, b = load_file(pair.folded / shard_of(pair.folded, one)), load_file(pair.folded / shard_of(pair.folded, two))
        first, second = a[one].clone(), b[two].clone()
        pair.put(one, second)
        pair.put(two, first)

    return apply


def reader(name: str, norm: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Pair], None]:
    """Fold a changed gain into a reader."""
    return lambda p: p.put(name, p.scaled(name, change(p.before(norm).float())))


def double_rounding(pair: Pair) -> None:
    """Multiply in float32, round to bf16 in two steps: by way of a format with two bits more."""
    product = pair.before(Q).float() * pair.before(ATTENTION_NORM).float()
    step = 2.0 ** (product.abs().log2().floor() - 9)
    pair.put(Q, ((product / step).round() * step).bfloat16())


def gemma_by_w(pair: Pair) -> None:
    """What transformer-tricks makes of a Gemma: readers times `w`, norms set to one."""
    for layer in range(4):
        for norm, names in (
            ("input_layernorm", [f"self_attn.{x}_proj" for x in "qkv"]),
            ("pre_feedforward_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            gain = f"model.layers.{layer}.{norm}.weight"
            pair.put(gain, torch.ones_like(pair.before(gain)))
            for name in names:
                name = f"model.layers.{layer}.{name}.weight"
                pair.put(name, pair.scaled(name, pair.before(gain)))


def extra_tensor(pair: Pair) -> None:
    path = pair.folded / shard_of(pair.folded, FINAL)
    tensors = {**load_file(path), "model.layers.0.extra.weight": torch.ones(3)}
    save_file(tensors, path, metadata={"format": "pt"})
    if (pair.folded / INDEX).exists():
        pair.json(INDEX, lambda i: i["weight_map"].update({"model.layers.0.extra.weight": path.name}))


def other_metadata(pair: Pair) -> None:
    path = pair.folded / shard_of(pair.folded, FINAL)
    save_file(load_file(path), path, metadata={"format": "np"})


def nested_flag(pair: Pair) -> None:
    pair.json("config.json", lambda c: c.update(flashnorm_folded=True))


def edit_the_source(pair: Pair) -> None:
    Pair(pair.source, pair.source).edit(EMBEDDING, lambda t: t * 2)


def another_seed(pair: Pair) -> None:
    """A right fold, but of other weights."""
    shutil.rmtree(pair.folded)
    made = pair.folded.with_name("another")
    make("smollm3", made, seed=77)
    assert run("fold", made, pair.folded, "-q") == 0


def all_norms_unwritten(pair: Pair) -> None:
    for name in list(json.loads((pair.folded / INDEX).read_text())["weight_map"]):
        if name.endswith("norm.weight"):
            pair.put(name, pair.before(name))


def half(gain: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(gain)) < len(gain) // 2, gain, 1.0)


MUTATIONS = (
    # ---- readers
    Mutation("one reader forgotten", "smollm3", forget(V), ALL, V, "was not folded into it"),
    Mutation("router forgotten", "qwen2_moe", forget("model.layers.1.mlp.gate.weight"), ALL, "model.layers.1.mlp.gate.weight", "was not folded into it"),
    Mutation("one expert forgotten", "qwen2_moe", forget(EXPERT), (W, LAYERS), EXPERT, "was not folded into it"),
    Mutation("one merged expert forgotten", "mixtral", forget("model.layers.1.block_sparse_moe.experts.3.w3.weight"), (W, LAYERS), "model.layers.1.block_sparse_moe.experts.3.w3.weight", "was not folded into it"),
    Mutation("shared expert's gate forgotten", "qwen2_moe", forget("model.layers.1.mlp.shared_expert_gate.weight"), ALL, "model.layers.1.mlp.shared_expert_gate.weight", "was not folded into it"),
    Mutation("latent norm's reader forgotten (MLA)", "deepseek_v3", forget("model.layers.1.self_attn.kv_b_proj.weight"), ALL, "model.layers.1.self_attn.kv_b_proj.weight", "kv_a_layernorm.weight was not folded"),
    Mutation("output head forgotten", "qwen2_moe", forget(HEAD), ALL, HEAD, "was not folded into it"),
    Mutation("untied head not scaled", "smollm3", lambda p: p.put(HEAD, p.before(EMBEDDING)), ALL, HEAD, "was not folded into it"),
    Mutation("gain applied twice", "smollm3", reader(V, ATTENTION_NORM, lambda g: g * g), ALL, V, "was applied twice"),
    Mutation("divided by the gain", "smollm3", reader(V, ATTENTION_NORM, lambda g: 1 / g), ALL, V, "was divided by the gain"),
    Mutation("w taken for 1 + w", "gemma2", lambda p: p.put(V, p.scaled(V, p.before(ATTENTION_NORM))), ALL, V, "the gain of this norm is 1 + w"),
    Mutation("1 + w taken for w", "smollm3", reader(V, ATTENTION_NORM, lambda g: 1 + g), ALL, V, "not the gain of"),
    Mutation("gain along the output dimension", "smollm3", lambda p: p.put(Q, p.scaled(Q, p.before(ATTENTION_NORM), 0)), ALL, Q, "along dimension 0 instead of 1"),
    Mutation("another layer's gain", "smollm3", lambda p: p.put(V, p.scaled(V, p.before("model.layers.2.input_layernorm.weight"))), ALL, V, "by the gain of model.layers.2.input_layernorm.weight instead"),
    Mutation("the other norm's gain", "smollm3", lambda p: p.put(UP, p.scaled(UP, p.before(ATTENTION_NORM))), ALL, UP, f"by the gain of {ATTENTION_NORM} instead"),
    Mutation("gain in another order", "smollm3", reader(V, ATTENTION_NORM, lambda g: g.flip(0)), ALL, V, "in another order"),
    Mutation("half of the channels forgotten", "smollm3", reader(V, ATTENTION_NORM, half), ALL, V, "of its 64 channels were not multiplied"),
    Mutation("reader transposed", "smollm3", lambda p: p.edit(Q, lambda t: t.T), ALL, Q, "values differ"),
    Mutation("reader negated", "smollm3", lambda p: p.edit(V, lambda t: -t), ALL, V, "not the gain of"),
    Mutation("reader zeroed", "smollm3", lambda p: p.edit(V, torch.zeros_like), ALL, V, "values differ"),
    Mutation("NaN in a reader", "smollm3", lambda p: p.edit(V, lambda t: t.index_fill(0, torch.tensor([1]), torch.nan)), ALL, V, "NaN"),
    Mutation("two experts exchanged", "qwen2_moe", exchange(EXPERT, EXPERT.replace(".2.", ".3.")), (W, LAYERS), EXPERT, "experts.3.gate_proj.weight"),
    Mutation("q of two layers exchanged", "smollm3", exchange(Q, Q.replace(".1.", ".2.")), ALL, Q, "model.layers.2.self_attn.q_proj.weight"),
    Mutation("k and v exchanged", "smollm3", exchange(K, V), ALL, K, V),
    Mutation("rounded twice", "smollm3", double_rounding, FILES, Q, "rounded in another way"),
    Mutation("1 + w rounded before the product", "gemma2", lambda p: p.put(V, p.scaled(V, (1 + p.before(ATTENTION_NORM).float()).bfloat16())), FILES, V, "rounded in another way"),
    Mutation("one bit of a reader", "smollm3", lambda p: flip_a_bit(p, V, 0), FILES, V, "1 of 2,048 values differ"),
    # ---- norms
    Mutation("identity not written", "smollm3", lambda p: p.put(ATTENTION_NORM, p.before(ATTENTION_NORM)), ALL, ATTENTION_NORM, "keeps its weight"),
    Mutation("no identity written", "smollm3", all_norms_unwritten, ALL, ATTENTION_NORM, "keeps its weight"),
    Mutation("ones where zeros are the identity", "gemma2", lambda p: p.edit(ATTENTION_NORM, torch.ones_like), ALL, ATTENTION_NORM, "its identity is 0"),
    Mutation("zeros where ones are the identity", "smollm3", lambda p: p.edit(ATTENTION_NORM, torch.zeros_like), ALL, ATTENTION_NORM, "holds 0 everywhere instead of the identity (1)"),
    Mutation("one element of an identity", "smollm3", lambda p: p.edit(ATTENTION_NORM, lambda t: t.index_fill(0, torch.tensor([9]), 0.5)), (W, LAYERS), ATTENTION_NORM, "the first is element 9: 0.5"),
    Mutation("a norm left out, the rest identity", "smollm3", lambda p: p.remove(ATTENTION_NORM), FILES, "flashnorm.json", "layout"),
    Mutation("a kept norm set to one", "gemma2", lambda p: p.edit("model.layers.1.post_attention_layernorm.weight", torch.zeros_like), (W, LOGITS), "model.layers.1.post_attention_layernorm.weight", "has to be kept"),
    Mutation("a kept norm left out", "gemma3_text", lambda p: p.remove("model.layers.1.self_attn.q_norm.weight"), (W, LOGITS), "model.layers.1.self_attn.q_norm.weight", "has to be kept"),
    Mutation("a kept norm folded all the same", "gemma2", lambda p: p.put(DOWN, p.scaled(DOWN, 1 + p.before("model.layers.1.post_feedforward_layernorm.weight").float(), 0)), (W, LOGITS), DOWN, "which keeps its weight"),
    Mutation("q_norm changed", "gemma3_text", lambda p: p.edit("model.layers.1.self_attn.q_norm.weight", lambda t: t + 1), (W, LOGITS), "model.layers.1.self_attn.q_norm.weight", "does not hold the source's weight"),
    Mutation("folded as transformer-tricks folds a Gemma", "gemma2", gemma_by_w, ALL, ATTENTION_NORM, "A tool that takes w itself for the gain"),
    # ---- tensors that a fold leaves alone
    Mutation("tied head scaled in place", "smollm3", lambda p: (p.put(EMBEDDING, p.scaled(EMBEDDING, p.before(FINAL))), p.remove(HEAD), p.json("config.json", lambda c: c.update(tie_word_embeddings=True))), (W, LAYERS, LOGITS), EMBEDDING, "it is the embedding as well"),
    Mutation("untied head left out", "smollm3", lambda p: p.remove(HEAD), ALL, HEAD, "is missing"),
    Mutation("embedding scaled", "qwen2_moe", lambda p: p.edit(EMBEDDING, lambda t: t * 2), (W, ), EMBEDDING, "the source times a factor"),
    Mutation("bias scaled with its reader", "qwen2_moe", lambda p: p.edit("model.layers.1.self_attn.q_proj.bias", lambda t: t + 1), (W, LOGITS), "model.layers.1.self_attn.q_proj.bias", "values differ"),
    Mutation("lowest bit of an untouched tensor", "qwen2_moe", lambda p: flip_a_bit(p, OUT, 0), FILES, OUT, "1 of 4,096 values differ"),
    Mutation("down_proj of another layer", "smollm3", lambda p: p.put(DOWN, p.before(DOWN.replace(".1.", ".3."))), (W, LOGITS), DOWN, "the source's model.layers.3.mlp.down_proj.weight"),
    Mutation("a tensor stored in float32", "smollm3", lambda p: p.edit(OUT, lambda t: t.float()), FILES, OUT, "stored as F32 instead of BF16"),
    Mutation("a tensor of another shape", "smollm3", lambda p: p.edit(OUT, lambda t: t[:, :32]), FILES, OUT, "has shape [64, 32] instead of [64, 64]"),
    Mutation("a tensor too many", "smollm3", extra_tensor, FILES, "model.layers.0.extra.weight", "is not in the source"),
    # ---- what the checkpoint says of itself
    Mutation("flag over a kept norm", "gemma3_text", nested_flag, FILES, "config.json", "keeps its weight: runtimes that read the flag would drop it"),
    Mutation("flag taken away", "smollm3", lambda p: p.json("config.json", lambda c: c.update(flashnorm_folded=False)), FILES, "config.json", "flashnorm_folded is false instead of true"),
    Mutation("another eps", "smollm3", lambda p: p.json("config.json", lambda c: c.update(rms_norm_eps=0.1)), (W, LOGITS), "config.json", "rms_norm_eps is 0.1 instead of"),
    Mutation("a config key lost", "smollm3", lambda p: p.json("config.json", lambda c: c.pop("num_key_value_heads")), FILES, "config.json", "num_key_value_heads is missing"),
    Mutation("head tied again in the config", "smollm3", lambda p: p.json("config.json", lambda c: c.update(tie_word_embeddings=True)), FILES, "config.json", "tie_word_embeddings is true instead of false"),
    Mutation("record lists a norm as kept", "smollm3", lambda p: p.json("flashnorm.json", lambda r: r["norms"][0].update(folded=False)), FILES, "flashnorm.json", "is not recorded as"),
    Mutation("record of another layout", "smollm3", lambda p: p.json("flashnorm.json", lambda r: r.update(layout="dropped")), FILES, "flashnorm.json", "says layout 'dropped'"),
    Mutation("source edited after the fold", "smollm3", edit_the_source, FILES, EMBEDDING, "factor"),
    Mutation("fold of another model of this shape", "smollm3", another_seed, ALL, OUT, "values differ"),
    # ---- the plan is wrong, and the files hold what it asks for: only a run of the models can see it
    Mutation("plan folds a norm that a residual reads too", "minimax", fold_again, RAN, "logits", plan=folded_all_the_same("model.layers.1.input_layernorm.weight")),
    Mutation("plan folds a norm before experts that a residual reads too", "minimax", fold_again, RAN, "logits", plan=folded_all_the_same("model.layers.2.post_attention_layernorm.weight")),
    Mutation("plan does not know of a reader", "smollm3", fold_again, RAN, "logits", plan=without_reader(V)),
    Mutation("plan does not know of the router", "qwen2_moe", fold_again, RAN, "logits", plan=without_reader("model.layers.1.mlp.gate.weight")),
    Mutation("plan takes w for 1 + w", "gemma2", fold_again, RAN, "logits", plan=gains_without_one),
    Mutation("plan exchanges halves of a gain", "smollm3", fold_again, RAN, "logits", plan=channels_in_reverse(UP)),
    # ---- files
    Mutation("two shards exchanged", "smollm3", swap_shards, FILES, "files", "but it is in"),
    Mutation("a shard lost", "smollm3", lambda p: sorted(p.folded.glob("*.safetensors"))[0].unlink(), FILES, "files", "which is not there"),
    Mutation("a shard cut off", "smollm3", lambda p: cut_off(sorted(p.folded.glob("*.safetensors"))[1]), FILES, "files", "truncated"),
    Mutation("the index lost", "smollm3", lambda p: (p.folded / INDEX).unlink(), FILES, "files", "there is neither"),
    Mutation("a single file beside the shards", "smollm3", lambda p: save_file({"x": torch.ones(1)}, p.folded / "model.safetensors"), FILES, "files", "beside"),
    Mutation("tokenizer lost", "smollm3", lambda p: (p.folded / "tokenizer.model").unlink(), FILES, "tokenizer.model", "is missing"),
    Mutation("tokenizer changed", "smollm3", lambda p: (p.folded / "tokenizer.model").write_bytes(b"x"), FILES, "tokenizer.model", "byte for byte"),
    Mutation("index entry changed", "smollm3", lambda p: p.json(INDEX, lambda i: i["metadata"].update(total_size=1)), FILES, INDEX, "metadata.total_size is 1 instead of"),
    Mutation("header metadata changed", "smollm3", other_metadata, FILES, "model-00003-of-00003.safetensors", "has the metadata"),
)  # fmt: skip


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# ---- sources and folds, made once ------------------------------------------------------------------------------------


def make(family: str, folder: Path, seed: int = 0) -> None:
    """A sharded bf16 checkpoint with gains far from one, a file besides the weights, and no tokenizer of its own."""
    model = families.build(family, seed=seed)
    families.randomize_gains(model, seed=seed + 1)
    families.save(model, folder, dtype=torch.bfloat16, max_shard_size="150KB")
    (folder / "tokenizer.model").write_bytes(bytes(range(200)))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @functools.cache
    def pair(family: str) -> Pair:
        folder = tmp_path_factory.mktemp(family)
        make(family, folder / "source")
        assert run("fold", folder / "source", folder / "folded", "-q") == 0
        return Pair(folder / "source", folder / "folded")

    return pair


def copy_of(pair: Pair, folder: Path) -> Pair:
    shutil.copytree(pair.source, folder / "source")
    shutil.copytree(pair.folded, folder / "folded")
    return Pair(folder / "source", folder / "folded")


def verified(pair: Pair, *levels: str, more: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON result."""
    options = [option for level in levels for option in ("--level", level)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run("verify", pair.folded, "--source", pair.source, "--json", "--no-record", *options, *more)
    return code, document(out.getvalue())


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_the_right_fold_passes(family: str, pairs: Callable[[str], Pair]) -> None:
    code, result = verified(pairs(family))
    assert code == 0, result
    assert {level["status"] for level in result["levels"].values()} == {"passed"}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_caught(mutation: Mutation, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = copy_of(pairs(mutation.model), tmp_path)
    with planned_wrongly(mutation.plan):
        mutation.apply(pair)
        code, result = verified(pair, *mutation.levels)  # levels that are named run all, whatever the others find
        if mutation.plan:  # it is no accident that something else sees it
            assert verified(pair, W)[0] == 4
    assert code == 3
    for level in mutation.levels:
        assert result["levels"][level]["status"] == "failed", f"level {level} does not see it"
        findings = result["levels"][level]["findings"]
        if level == W:
            said = [f["message"] for f in findings if f["what"] == mutation.what]
            assert said, findings
            assert any(mutation.words in message for message in said), said
        if level == LOGITS and "figures" in result["levels"][LOGITS]:
            assert all(f["what"] == "logits" for f in findings)


def test_there_are_enough_of_them() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 25
    assert {m.model for m in MUTATIONS} == set(MODELS)


def set_gains(value: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name] = value(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("powers of two", []),
        ("identity in places", []),
        ("huge and tiny", []),
        ("negative", []),
        ("as they are", ["--layout", "dropped"]),
        ("as they are", ["--final-norm", "keep"]),
        ("as they are", ["--final-norm", "untie"]),
        ("as they are", ["--layout", "dropped", "--final-norm", "keep"]),
    ],
)
@pytest.mark.parametrize("family", ["smollm3", "gemma2"])
def test_right_folds_of_other_kinds_pass(
    family: str, what: str, options: list[str], pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(pairs(family).source, tmp_path / "source"))
    change = {
        "powers of two": lambda t: 2.0 ** torch.randint(-1, 2, t.shape).to(t.dtype),
        "identity in places": lambda t: t if t[0] > t[1] else torch.full_like(t, float(family == "smollm3")),
        "huge and tiny": lambda t: t * 8 ** (torch.rand(t.shape) * 2 - 1).to(t.dtype),
        "negative": lambda t: -t - (2.0 if family == "gemma2" else 0.0),
        "as they are": lambda t: t,
    }[what]
    set_gains(change, source)
    assert run("fold", source, tmp_path / "folded", "-q", *options) == 0
    code, result = verified(Pair(source, tmp_path / "folded"))
    assert code == 0, [level.get("findings") for level in result["levels"].values()]


# ---- folded by somebody else -----------------------------------------------------------------------------------------


def hand_fold(pair: Pair, target: Path, norms: tuple[str, ...], one: torch.dtype, arithmetic: torch.dtype) -> Pair:
    """Fold Llama's attention or MLP norms with a few lines of torch, into one file without a record."""
    tensors = {}
    for path in pair.source.glob("*.safetensors"):
        tensors.update(load_file(path))
    readers = {"input_layernorm": [f"self_attn.{x}_proj" for x in "qkv"], "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}  # fmt: skip
    for layer in range(4):
        for norm in norms:
            gain = tensors[f"model.layers.{layer}.{norm}.weight"]
            for reader in readers[norm]:
                name = f"model.layers.{layer}.{reader}.weight"
                tensors[name] = (tensors[name].to(arithmetic) * gain.to(arithmetic)).to(torch.bfloat16)
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(len(gain), dtype=one)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(pair.source / "config.json", target)
    return Pair(pair.source, target)


BOTH = ("input_layernorm", "post_attention_layernorm")


@pytest.mark.parametrize(
    ("norms", "one", "arithmetic"),
    [
        (BOTH, torch.bfloat16, torch.float32),
        (BOTH, torch.float32, torch.float32),  # as transformer-tricks writes them into a bf16 model
        (("input_layernorm",), torch.bfloat16, torch.float64),
        (BOTH, torch.bfloat16, torch.bfloat16),
    ],
)
def test_foreign_folds_pass_and_are_adopted(
    norms: tuple[str, ...], one: torch.dtype, arithmetic: torch.dtype, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = hand_fold(pairs("smollm3"), tmp_path / "folded", norms, one, arithmetic)
    code, result = verified(pair)
    assert code == 0, result
    assert result["foreign"]
    assert not (pair.folded / "flashnorm.json").exists()
    code, result = verified(pair, more=("--adopt",))
    assert code == 0, result
    record = json.loads((pair.folded / "flashnorm.json").read_text())
    config = json.loads((pair.folded / "config.json").read_text())
    assert sum(norm["folded"] for norm in record["norms"]) == 4 * len(norms)
    assert config["flashnorm_folded"] is False  # the final norm still has its weight
    assert config["flashnorm"]["folded"] == [f"model.layers.*.{norm}.weight" for norm in norms]
    assert record["verify"]["equivalent"] is True
    assert run("verify", pair.folded, "--level", "weights", "-q") == 4  # by its own record now


def test_foreign_fold_without_norms(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """transformer-tricks' strict layout."""
    pair = hand_fold(pairs("smollm3"), tmp_path / "folded", BOTH, torch.bfloat16, torch.float32)
    tensors = load_file(pair.folded / "model.safetensors")
    for layer in range(4):
        for norm in BOTH:
            del tensors[f"model.layers.{layer}.{norm}.weight"]
    save_file(tensors, pair.folded / "model.safetensors", metadata={"format": "pt"})
    code, result = verified(pair)
    assert code == 0, result
    assert result["levels"][W]["figures"]["layout"] == "dropped"


def test_a_wrong_foreign_fold_is_not_adopted(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = hand_fold(pairs("smollm3"), tmp_path / "folded", BOTH, torch.bfloat16, torch.float32)
    pair.edit(V, lambda t: t * 1.5)
    before = (pair.folded / "config.json").read_bytes()
    for levels in ((), (LAYERS,)):
        code, result = verified(pair, *levels, more=("--adopt",))
        assert code == 3
        assert any("not adopted" in note for note in result["notes"])
    assert not (pair.folded / "flashnorm.json").exists()
    assert (pair.folded / "config.json").read_bytes() == before


def test_transformer_tricks_gemma_is_refused_in_words(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Its flashify_repo takes `w` for the gain of every Gemma; it leaves no record."""
    pair = copy_of(pairs("gemma2"), tmp_path)
    shutil.rmtree(pair.folded)
    shutil.copytree(pair.source, pair.folded)
    gemma_by_w(pair)
    code, result = verified(pair, W)
    assert code == 3
    said = {f["what"]: f["message"] for f in result["levels"][W]["findings"]}
    assert "this norm computes 1 + w: its identity is 0, and ones make it scale by 2" in said[ATTENTION_NORM]
    assert "folds this architecture wrongly" in said[ATTENTION_NORM]
    assert f"it was multiplied by w of {ATTENTION_NORM}, but the gain of this norm is 1 + w" in said[V]


# ---- docs/mutations.md -----------------------------------------------------------------------------------------------


def measured(result: dict[str, Any], level: str, what: str) -> str:
    found = result["levels"][level]
    if found["status"] != "failed":
        return ""
    if level == W:
        errors = [f["error"] for f in found["findings"] if f["what"] == what and f.get("error") is not None]
        return f"**{max(errors):.1e}**" if errors else "**caught**"
    ratio = found.get("figures", {}).get("worst_ratio" if level == LAYERS else "ratio")
    return f"**{ratio:.3g} x**" if ratio is not None else "**caught**"


def test_doc_lists_these_mutations() -> None:
    """Each by its name, model and what is named; a level that has to see it is shown to see it."""
    lines = [line.strip("|").split(" | ") for line in DOC.read_text().splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in cells] for cells in lines][1:]
    assert [cells[:3] for cells in found] == [[m.name, m.model, f"`{m.what}`"] for m in MUTATIONS], (
        "docs/mutations.md is stale: run `python tests/proof/test_mutations.py`"
    )
    for cells, mutation in zip(found, MUTATIONS, strict=True):
        unseen = [level for level, cell in zip(ALL, cells[3:], strict=True) if level in mutation.levels and not cell]
        # Files that do not hold together are found before any level runs.
        assert not unseen or (mutation.levels == FILES and not any(cells[3:])), (mutation.name, unseen)


def write_doc() -> None:
    rows = []
    with TemporaryDirectory() as folder:
        made: dict[str, Pair] = {}
        for family in MODELS:
            make(family, Path(folder) / family / "source")
            made[family] = Pair(Path(folder) / family / "source", Path(folder) / family / "folded")
            run("fold", made[family].source, made[family].folded, "-q")
        for mutation in MUTATIONS:
            with TemporaryDirectory() as copy:
                pair = copy_of(made[mutation.model], Path(copy))
                cells = []
                with planned_wrongly(mutation.plan):
                    mutation.apply(pair)
                    for level in ALL:
                        _, result = verified(pair, level)
                        broken = level not in result["levels"]  # files that do not hold together
                        cells.append("" if broken else measured(result, level, mutation.what))
            rows.append(f"| {mutation.name} | {mutation.model} | `{mutation.what}` | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    DOC.write_text(
        f"""# What `flashnorm verify` catches

Every way of being wrong below was made on a right fold of a tiny bf16 model (transformers {transformers.__version__},
torch {torch.__version__.split("+")[0]}; norm weights far from one), and each level was run alone. A cell is empty where
the level does not see the mutation: level layers looks at norms and their readers, level logits at what text shows.
Level weights has to see all of them, and names the tensor, file or key of the third column.

- weights: the error of that tensor relative to what it must hold, over the 1 MiB blocks that differ; *caught* where no
  number describes it
- layers: the largest error in terms of the noise floor; 1.5 times is allowed, and right folds of these models have 0.9
  to 1.1 times
- logits: the same for the logits, at the median position

Where the plan itself is wrong and the files hold what it asks for, levels weights and layers, which start from it, see
nothing: the last rows before those of files. Something has to run.

Written by `python tests/proof/test_mutations.py`. The tests in that file ask for the levels that have to catch each one, for
exit code 3, for the name and for the words of the explanation; and for right folds of many kinds to pass.

| what was done | model | named | weights | layers | logits |
|--|--|--|--|--|--|
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    write_doc()
