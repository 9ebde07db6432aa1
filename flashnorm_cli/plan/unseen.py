"""Norms that are kept because something may read them that the traced forward did not show.

Each function returns reasons by runtime parameter; the planner keeps those gains.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.names import any_layer, layer_of, list_of, pattern_of
from flashnorm_cli.checkpoint.users import ANY, INPUTS, User
from flashnorm_cli.plan.readers import reads_media

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from flashnorm_cli.checkpoint.model import Checkpoint
    from flashnorm_cli.trace.result import Trace

OVERRIDE = '`final_norm="untie"` folds it all the same'


def norm_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The weights of modules that are called norms, by runtime name."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if name not in ("bias",)
    ]


def other_norms(model: PreTrainedModel, trace: Trace) -> list[tuple[str, tuple[int, ...], str]]:
    """Norm modules that ran, but whose weight the trace did not see scaling a normalised activation."""
    return [
        (name, tuple(parameter.shape), "its weight does not act as a gain of a normalised activation")
        for name, parameter in norm_modules(model)
        if name in trace.reached and name not in trace.gains
    ]


def not_traced(model: PreTrainedModel, trace: Trace, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Norms that no forward reached, by their names on disk."""
    from flashnorm_cli.modeling import disk_names

    names = [name for name, _ in norm_modules(model) if name not in trace.reached]
    if not names:
        return ()
    loads = disk_names.loader_names(model, list(checkpoint.tensors))
    on_disk = {target: found for found, (target, _) in loads.items()}
    return tuple(on_disk.get(name, name) for name in names)


# ---- users that files, config or code announce -----------------------------------------------------------------------


def kept_for_users(users: Iterable[User], trace: Trace, head_gains: list[str]) -> dict[str, str]:
    """Gains that a user of hidden states reads: those outside of the numbered layers, or, for ANY, all of them."""
    kept: dict[str, str] = {}
    for user in users:
        if user.reads == INPUTS:
            continue
        last = {*head_gains, *(name for name in trace.gains if not layer_of(name))}
        for gain in trace.gains if user.reads == ANY else (name for name in trace.gains if name in last):
            kept.setdefault(gain, f"{user.line}; {OVERRIDE}")
    return kept


def kept_for_modules(
    users: Iterable[User], trace: Trace, on_disk: Mapping[str, torch.Tensor], norms: Mapping[str, str]
) -> dict[str, str]:
    """Gains of the inputs of modules that a user names, and gains that it names themselves.

    `on_disk` maps tensors on disk to ids, `norms` runtime gains to their tensors on disk.
    """
    kept: dict[str, str] = {}
    for user in users:
        if user.reads != INPUTS:
            continue
        named = {f"{module}.weight" for module in user.modules}
        gains = [gain for gain, tensor in norms.items() if tensor in named]
        for name in named & on_disk.keys():
            gains += trace.gains_of(on_disk[name])
        for gain in gains:
            kept.setdefault(gain, f"{user.line}; {OVERRIDE}")
    return kept


# ---- weights of the model that the forward did not reach -------------------------------------------------------------


def kept_beside_unreached(model: PreTrainedModel, trace: Trace) -> dict[str, str]:
    """Gains beside weights that the forward never reached, and that may read them on another input.

    - In the same layer: experts for image tokens, say. A weight whose namesake in another layer is used is one
      that this layer skips by its config (a shared key and value cache).
    - Members of a list of which the forward used others: experts that are chosen one at a time.
    - In the module that holds both the norm and a reader of it.
    - Linear layers outside of towers which read the hidden size and end in another: heads for images.
    """
    import torch

    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    reached = matrices & trace.reached
    unreached = sorted(matrices - reached)
    used = {any_layer(name) for name in reached}
    norms = [name for name, _ in norm_modules(model)]
    layers = {list_of(name) for name in norms}
    lists_used = {list_of(name) for name in reached}
    outer = {list_of(f"{layer_of(name)}.") for name in norms if layer_of(name)}
    in_layer = {layer_of(n): n for n in reversed(unreached) if layer_of(n) and any_layer(n) not in used}
    in_list = {
        list_of(n): n
        for n in reversed(unreached)
        if list_of(n) in lists_used - layers - {None} and list_of(f"{layer_of(n)}.") not in outer
    }
    heads = {}
    for path in (name.removesuffix(".weight") for name in unreached if name.endswith(".weight")):
        module = model.get_submodule(path)
        if isinstance(module, torch.nn.Linear) and (beside := _head_beside(model, trace, path, module)) is not None:
            heads[f"{path}.weight"] = (module.in_features, beside)
    readers = {gain: name for name, r in trace.readers.items() for gain in trace.gains_of(r.ids)}
    kept: dict[str, str] = {}
    for name, gain in trace.gains.items():
        parent = name.rsplit(".", 2)[0] + "." if name.count(".") > 1 else ""
        if layer := layer_of(name):
            unseen = in_layer.get(layer)
        elif parent and readers.get(name, "").startswith(parent):
            unseen = next((n for n in unreached if n.startswith(parent)), None)
        else:
            unseen = next((n for m, n in in_list.items() if m and m.startswith(parent)), None) or next(
                (
                    n
                    for n in unreached
                    if n in heads and heads[n][0] == gain.size and name.startswith(heads[n][1]) and not layer_of(n)
                ),
                None,
            )
        if unseen:
            kept[name] = f"`{unseen}` was not reached by a text forward and may read it"
    return kept


def _head_beside(model: PreTrainedModel, trace: Trace, path: str, linear: torch.nn.Linear) -> str | None:
    """The prefix of the norms that a linear layer may read as a head; None for one that makes its input by itself.

    Of the parts that the forward did not enter, a tower embeds what it reads, and a projector from a tower to this
    model may be square, or end in a square layer. A square head reads a norm of its own module, or of one below. A
    second decoder embeds tokens of its own as well: what it takes of the first one, `readers.py` sees.
    """
    import torch

    top = path
    while "." in top and not any(n.startswith(top.rpartition(".")[0] + ".") for n in trace.reached):
        top = top.rpartition(".")[0]
    own_input = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)
    parts = list(model.get_submodule(top).modules())
    if any(isinstance(m, own_input) for m in parts):
        return None
    width = linear.in_features
    if linear.out_features != width:
        return ""
    above, _, part = top.rpartition(".")
    widens = any(isinstance(m, torch.nn.Linear) and m.out_features == width != m.in_features for m in parts)
    if widens or reads_media(type(model.get_submodule(above)), part):
        return None
    return f"{above}." if above else ""


# ---- tensors on disk that the model does not read --------------------------------------------------------------------


def kept_for_unread(
    unread: Iterable[str],
    tensors: Mapping[str, TensorEntry],
    known: Iterable[str],
    norms: Mapping[str, str],
    head_gains: list[str],
    class_name: str,
) -> tuple[dict[str, str], dict[str, str]]:
    """Gains which a tensor may read that is on disk, but not read by the model: within layers, and before the head.

    A draft or multi-token prediction head (MTP, EAGLE) may read the final norm's output, a matrix within a layer the
    layer's norms. `known` are the tensors that the model reads, `norms` maps runtime gains to tensors on disk.
    """
    stems = {name.rsplit(".", 1)[0] for name in known}
    widths = {tensors[name].shape[-1] for name in norms.values() if name in tensors and tensors[name].shape}
    heads = [  # scales and zero points lie beside a tensor that the model does read
        name
        for name in unread
        if (len(tensors[name].shape) > 1 or _is_vector_head(name, tensors[name].shape, widths))
        and not stems & {name[: m.start()] for m in re.finditer(r"\.", name)}
    ]
    by_layer = {layer_of(name): name for name in reversed(heads)}
    within, last = {}, {}
    for gain, tensor in norms.items():
        layer = layer_of(tensor)
        if layer in by_layer and layer is not None:
            within[gain] = f"`{by_layer[layer]}` is on disk but not read by {class_name}"
    for gain in head_gains if heads else ():
        last[gain] = (
            f"`{pattern_of(heads[0])}` is on disk but not read by {class_name} (a draft or multi-token "
            f"prediction head?) and may read it at run time; {OVERRIDE}"
        )
    return within, last


def _is_vector_head(name: str, shape: tuple[int, ...], widths: set[int]) -> bool:
    """A head with one output that is stored as a vector; norms and biases are vectors of that length too."""
    return len(shape) == 1 and shape[0] in widths and not layer_of(name) and not re.search(r"norm|bias|ln_", name)
