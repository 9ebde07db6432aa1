"""AutoRound: the RotationMapping of its in-place Hadamard rotation.

Source: auto_round/algorithms/transforms/hadamard/inplace/{model_config,apply,hooks}.py. A mapping names one embedding,
one head, and the same parts in each layer: two norms, q, k and v, the output projection, the linears into the MLP and
the one out of it. The tool also rotates each head of the values and, at run time, what goes into the output projection
and out of the MLP; it finds the linears that need this by the ends of their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.plan.emit.modules import Fusion, Modules

TRIED_WITH = "auto-round 0.16.1"


@dataclass(frozen=True)
class _Layer:
    """The parts of one layer, by their names in it."""

    attn_input_ln: str
    attn_q: str
    attn_k: str
    attn_v: str
    attn_o: str
    mlp_input_ln: str
    mlp_in: tuple[str, ...]
    mlp_out: str


def settings(modules: Modules) -> dict[str, Any]:
    """`register_as` and the fields of a RotationMapping. Raises PlanError where the tool cannot express the model."""
    for fusion in modules.fusions:
        if fusion.offset:
            raise modules.refusal(
                f"the gain of `{pattern_of(fusion.norm)}` is `{fusion.offset:g} + weight`, and the tool multiplies by "
                "the weight itself"
            )
        if issubclass(modules.kind(fusion.norm), nn.LayerNorm):
            raise modules.refusal(f"`{pattern_of(fusion.norm)}` is a LayerNorm, and the tool subtracts means for it")
    prefix = f"{modules.layers}."
    count = len(modules.model.get_submodule(modules.layers))  # type: ignore[arg-type]
    top = [fusion for fusion in modules.fusions if not fusion.norm.startswith(prefix)]
    outer = [name for name in modules.writers if not name.startswith(prefix)]
    if len(top) != 1 or len(top[0].linears) != 1 or len(outer) not in (1, 2):
        raise modules.refusal("outside of the layers it is not one norm before one head, and one or two embeddings")
    embedding = next((n for n, m in modules.model.named_modules() if m is _input_embeddings(modules.model)), "")
    others = [name for name in outer if name != embedding]
    if embedding not in outer or any(not issubclass(modules.kind(n), nn.Embedding) for n in outer):
        raise modules.refusal("something else than embeddings writes into the residual stream before its layers")
    layers = {_layer(modules, f"{prefix}{number}.") for number in range(count)}
    if len(layers) != 1:
        raise modules.refusal("its layers have different parts, and the tool takes one list of parts for all")
    layer = layers.pop()
    named = {f"{prefix}{n}.{part}" for n in range(count) for part in (layer.attn_o, layer.mlp_out)} | {*outer}
    if named != {*modules.writers}:
        left = sorted({*modules.writers} - named)[0]
        raise modules.refusal(f"`{pattern_of(left)}` writes into the residual stream, too")
    _refuse_readers(modules, top[0])
    _refuse_ends(modules, layer, prefix, count)
    config = modules.model.config
    head_dim = _head_dim(modules, layer, prefix, count)
    _refuse_config(modules, config, layer, prefix, count, head_dim)
    return {
        "register_as": config.model_type,
        "RotationMapping": {
            "embedding": embedding,
            "lm_head": top[0].linears[0],
            "positional_embedding": others[0] if others else None,
            "layers_attr": modules.layers,
            **{name: value for name, value in vars(layer).items() if name != "mlp_in"},
            "mlp_in": [*layer.mlp_in],
            "pre_head_ln": top[0].norm,
            "attn_head_dim": head_dim,
            "num_heads_attr": "num_attention_heads",
            "hidden_size_attr": "hidden_size",
            "intermediate_size_attr": "intermediate_size",
        },
    }


def _input_embeddings(model: nn.Module) -> Any:
    return model.get_input_embeddings()  # type: ignore[operator]


def _layer(modules: Modules, prefix: str) -> _Layer:
    """The parts of the layer whose modules' names begin with `prefix`."""
    norms = [fusion for fusion in modules.fusions if fusion.norm.startswith(prefix)]
    writers = [name for name in modules.writers if name.startswith(prefix)]
    if len(norms) != 2 or len(writers) != 2:
        raise modules.refusal(
            f"`{pattern_of(prefix.rstrip('.'))}` has {len(norms)} norms and {len(writers)} linears that write into the "
            "residual stream, and the tool takes two of both"
        )
    first, second = norms
    out, mlp_out = writers
    if modules.before[out] >= modules.before[mlp_out]:
        raise modules.refusal(f"`{pattern_of(out)}` and `{pattern_of(mlp_out)}` are not each behind a norm of its own")
    carried = modules.stream.carried.get(f"{out}.weight")
    values = carried[0].rpartition(".")[0] if carried else ""
    if len(first.linears) != 3 or values not in first.linears:
        raise modules.refusal(
            f"`{pattern_of(first.norm)}` is not read by three linears of which one alone makes what "
            f"`{pattern_of(out)}` sums up; the tool takes q, k and v"
        )
    if modules.model.get_submodule(values).bias is not None:
        raise modules.refusal(f"the tool rotates the heads that `{pattern_of(values)}` makes, and not their bias")
    query, key = (name for name in first.linears if name != values)
    names = (first.norm, query, key, values, out, second.norm, *second.linears, mlp_out)
    if not all(name.startswith(prefix) for name in names):
        raise modules.refusal(f"`{pattern_of(first.norm)}` or `{pattern_of(second.norm)}` is read outside of its layer")
    short = [name.removeprefix(prefix) for name in names]
    return _Layer(*short[:6], tuple(short[6:-1]), short[-1])


def _refuse_readers(modules: Modules, top: Fusion) -> None:
    read = {linear for fusion in (*modules.fusions, top) for linear in fusion.linears}
    bare = [name for name in modules.readers if name not in read]
    if bare:
        raise modules.refusal(f"`{pattern_of(bare[0])}` reads the residual stream with no norm's weight in between")


def _refuse_ends(modules: Modules, layer: _Layer, prefix: str, count: int) -> None:
    """The tool changes what goes into every linear whose name ends as that of `mlp_out`, or of `attn_o`."""
    linears = [name for name, module in modules.model.named_modules() if isinstance(module, nn.Linear)]
    taken: set[str] = set()
    for part in (layer.mlp_out, layer.attn_o):
        end = part.rpartition(".")[2]
        found = {name for name in linears if name.endswith(end)} - taken
        if found != {f"{prefix}{number}.{part}" for number in range(count)}:
            raise modules.refusal(f"more linears than `{part}` have names that end in {end}")
        taken |= found


def _head_dim(modules: Modules, layer: _Layer, prefix: str, count: int) -> int:
    """Channels of a head, the same in all layers; each head of the values has to arrive whole and in order."""
    heads = modules.model.config.num_attention_heads
    found = set()
    for number in range(count):
        _, channels = modules.stream.carried[f"{prefix}{number}.{layer.attn_o}.weight"]
        if not isinstance(heads, int) or heads < 1 or len(channels) % heads:
            raise modules.refusal(f"`{layer.attn_o}` has {len(channels)} inputs for {heads} heads")
        size = len(channels) // heads
        rows = channels.view(heads, size)
        if bool((rows[:, :1] % size != 0).any()) or not torch.equal(rows, rows[:, :1] + torch.arange(size)):
            raise modules.refusal(f"the heads of `{layer.attn_v}` do not arrive at `{layer.attn_o}` one by one")
        found.add(size)
    if len(found) != 1:
        raise modules.refusal("its layers have heads of different sizes")
    return found.pop()


def _refuse_config(modules: Modules, config: Any, layer: _Layer, prefix: str, count: int, head_dim: int) -> None:
    """The tool reads sizes of the config where the layers have them, too."""
    widths: Mapping[str, set[int]] = {
        "hidden_size": {modules.size},
        "intermediate_size": {
            modules.model.get_submodule(f"{prefix}{number}.{layer.mlp_out}").in_features for number in range(count)
        },
    }
    for name, there in widths.items():
        if {getattr(config, name, None)} != there:
            raise modules.refusal(
                f"config.json does not give the width {min(there)} as {name}, where the tool reads it"
            )
