"""Operations on meta tensors, each computed once per shape.

What a meta kernel makes of its arguments depends on their shapes, strides and dtypes alone, and the layers of a model
repeat themselves. Many of torch's meta kernels are written in Python and take longer than all that the trace does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# Of a call: shape, strides and dtype of what it returns.
_OUTCOMES: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NoKeyError(Exception):
    """The arguments hold something whose influence on the result is not known."""


def outcome(func: Any, args: Any, kwargs: Any) -> Any:
    """`func(*args, **kwargs)`; a new meta tensor at once where an equal call was made before."""
    if not _makes_one_tensor(func):
        return func(*args, **kwargs)
    try:
        # Sums of integers, for one, are of the default dtype.
        key = (func, torch.get_default_dtype(), _key(args), _key(tuple(kwargs.items())))
    except _NoKeyError:
        return func(*args, **kwargs)
    if found := _OUTCOMES.get(key):
        shape, strides, dtype = found
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    out = func(*args, **kwargs)
    if type(out) is torch.Tensor and out.device.type == "meta" and not out.dtype.is_complex:
        _OUTCOMES[key] = (out.shape, out.stride(), out.dtype)
    return out


@functools.cache
def _makes_one_tensor(func: Any) -> bool:
    """Whether an operation of torch's own returns one tensor with memory of its own, and writes into no other."""
    schema = func._schema
    returns = schema.returns
    return (
        func.namespace == "aten"
        and not schema.is_mutable
        and len(returns) == 1
        and str(returns[0].type) == "Tensor"
        and all(a.alias_info is None for a in (*schema.arguments, *returns))
    )


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta" or value.dtype.is_complex or value.layout is not torch.strided:
            raise _NoKeyError
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if type(value) not in _PLAIN:
        raise _NoKeyError
    return (type(value), value)  # 2 and 2.0 are equal, and make different results
