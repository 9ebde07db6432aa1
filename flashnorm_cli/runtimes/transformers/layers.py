"""Which decoder layers add their residuals as `x + attention(norm(x))` and `x + mlp(norm(x))`, and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from flashnorm_cli.runtimes.transformers.observe import Call, Observed, Op, tensors
from flashnorm_cli.runtimes.transformers.products import Mlp, Product, Wiring

_PROBE = "flashnorm_probe"


class LayerError(Exception):
    """Why a layer keeps its own adds."""


class _Found(Exception):
    """Ends a forward where attention would begin."""


def read_layer(
    name: str, layer: nn.Module, norms: dict[str, str], seen: Observed, modules: dict[str, nn.Module]
) -> tuple[Wiring, str]:
    """How a layer is wired, and the name of the linear that ends its attention.

    Args:
        norms: the deferred norms among its children, with the child that holds their readers.
        modules: the model's modules by name.
    Raises:
        LayerError: it is wired otherwise.
    """
    call = seen.only_call(name)
    if call is None or len(call.arguments) != 1:
        raise LayerError("it was not called once with the hidden states alone")
    x = call.arguments[0]
    ops = [op for op in seen.ops if op.scope == name]
    if len(ops) != 2 or any(op.name not in ("add", "__add__", "__radd__") or op.more for op in ops):
        raise LayerError(f"it does more than two adds: {', '.join(dict.fromkeys(op.name for op in ops)) or 'none'}")
    first = next((key for key in norms if _input(seen, f"{name}.{key}") is x), None)
    children = [key for key, _ in layer.named_children()]
    second = next((key for key in children if _input(seen, f"{name}.{key}") is ops[0].out), None)
    if first is None or second is None:
        raise LayerError("no deferred norm reads its input, or none of its parts the sum after attention")
    attention = norms[first]
    after = _output(seen, f"{name}.{second}")
    mlp = next((key for key in children if key != second and _input(seen, f"{name}.{key}") is after), None)
    heard = seen.only_call(f"{name}.{attention}")
    if heard is None or mlp is None:
        raise LayerError("it has no attention, or nothing behind its second norm, that was called once")
    if heard.arguments or heard.more.get("hidden_states") is not _output(seen, f"{name}.{first}"):
        raise LayerError("its attention does not take the norm's output as hidden_states")
    a = heard.out[0] if isinstance(heard.out, tuple) else heard.out
    d = _output(seen, f"{name}.{mlp}")
    if not (_adds(ops[0], x, a) and _adds(ops[1], ops[0].out, d) and call.out is ops[1].out):
        raise LayerError("it adds something else than its input and its parts' outputs")
    product = _only_product(seen, a, f"{name}.{attention}", ops[0], modules)
    down = None
    if isinstance(part := layer.get_submodule(mlp), Mlp):
        down = modules[_only_product(seen, d, f"{name}.{mlp}", ops[1], modules)]
    passed, ignored, defaults = _keywords(layer, call, heard)
    wiring = Wiring(
        norm=first,
        attention=attention,
        attention_product=None,  # filled in when that is swapped
        second_norm=second,
        mlp=mlp,
        mlp_product=down if isinstance(down, Product) and down is part._modules[str(part._part)] else None,
        passed=frozenset(passed),
        ignored=ignored,
        defaults=defaults,
        extra=_hands_on_more(layer, attention, call),
        known=frozenset(inspect.signature(layer.forward).parameters),
    )
    return wiring, product


def _input(seen: Observed, name: str) -> Any:
    call = seen.only_call(name)
    return call.arguments[0] if call is not None and len(call.arguments) == 1 else None


def _output(seen: Observed, name: str) -> Any:
    call = seen.only_call(name)
    return None if call is None else call.out


def _adds(op: Op, one: Any, other: Any) -> bool:
    return len(op.positional) == 2 and (
        (op.positional[0] is one and op.positional[1] is other)
        or (op.positional[0] is other and op.positional[1] is one)
    )


def _only_product(seen: Observed, out: Any, part: str, add: Op, modules: dict[str, nn.Module]) -> str:
    """The linear whose output is that of a part of a layer, read by the add alone. Dropouts do nothing here."""
    makers = {each for each in seen.returned_by(out) - {part} if not isinstance(modules[each], nn.Dropout)}
    name = next(iter(makers), "")
    if len(makers) != 1 or not isinstance(modules[name], nn.Linear):
        raise LayerError(f"{part} does not end in a linear")
    if any(op is not add and op.name != "dropout" for op in seen.uses_of(out)):
        raise LayerError(f"the output of {part} is read elsewhere too")
    return name


def _keywords(layer: nn.Module, call: Call, heard: Call) -> tuple[set[str], dict[str, Any], dict[str, Any]]:
    """Keywords of a layer that its attention gets as they are, those it does not get, and defaults that it gets."""
    parameters = inspect.signature(layer.forward).parameters
    passed, defaults = set(), {}
    for key, value in heard.more.items():
        if key == "hidden_states":
            continue
        if key in call.more:
            if call.more[key] is not value:
                raise LayerError(f"its attention is given another {key} than the layer")
            passed.add(key)
        elif key in parameters and parameters[key].default is value:
            defaults[key] = value
        else:
            raise LayerError(f"its attention is given a {key} that the layer makes")
    ignored = {key: value for key, value in call.more.items() if key not in passed}
    if any(True for _ in tensors(ignored)):
        raise LayerError(f"it reads {', '.join(ignored)} itself")
    return passed, ignored, defaults


def _hands_on_more(layer: nn.Module, attention: str, call: Call) -> bool:
    """Whether a keyword that the layer does not know arrives at its attention."""
    arrived: list[bool] = []

    def look(module: nn.Module, arguments: Any, more: Any) -> None:
        arrived.append(_PROBE in more)
        raise _Found

    handle = layer.get_submodule(attention).register_forward_pre_hook(look, with_kwargs=True)
    try:
        layer.forward(*call.arguments, **call.more, **{_PROBE: True})
    except (_Found, TypeError):
        pass
    finally:
        handle.remove()
    return arrived == [True]
