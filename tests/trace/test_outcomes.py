"""Meta operations that are computed once per shape: nothing that decides about a result may be missing from the key."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashnorm_cli.trace.outcomes import outcome

aten = torch.ops.aten
WIDE, ROW = (torch.empty(shape, device="meta") for shape in ((2, 6, 8), (8,)))
IDS = torch.empty(2, 6, dtype=torch.int64, device="meta")
# Calls that differ in one thing only, and give something else for it.
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.pow.Tensor_Scalar, (IDS, 2), {}),
    (aten.pow.Tensor_Scalar, (IDS, 2.0), {}),
    (aten.mul.Tensor, (WIDE, ROW), {}),
    (aten.mul.Tensor, (WIDE.bfloat16(), ROW), {}),
    (aten.mul.Tensor, (WIDE.bfloat16(), ROW.bfloat16()), {}),
    (aten.mul.Tensor, (WIDE.transpose(0, 1), ROW), {}),
    (aten.mean.dim, (WIDE, [-1]), {}),
    (aten.mean.dim, (WIDE, [-1], True), {}),
    (aten.mean.dim, (WIDE, [-1], True), {"dtype": torch.float64}),
    (aten.cat.default, ([WIDE, WIDE],), {}),
    (aten.cat.default, ([WIDE, WIDE], 1), {}),
    (aten.cat.default, ([WIDE, WIDE, WIDE], 1), {}),
    (aten._to_copy.default, (WIDE,), {"dtype": torch.float16}),
    (aten.view.default, (WIDE, [12, 8]), {}),
    (aten.add_.Tensor, (WIDE, 1.0), {}),
]


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def test_as_the_operation_itself() -> None:
    for _ in range(2):  # the second time from what is known
        for func, args, kwargs in CALLS:
            assert facts(outcome(func, args, kwargs)) == facts(func(*args, **kwargs)), (func, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_counts(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert outcome(aten.div.Tensor, (IDS, IDS), {}).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_memory_of_its_own_unless_it_is_a_view() -> None:
    first, second = (outcome(aten.mul.Tensor, (WIDE, ROW), {}) for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    for call in (aten.view.default, (WIDE, [96])), (aten.add_.Tensor, (WIDE, 2.0)):
        func: Callable[..., Any] = call[0]
        for _ in range(2):
            assert outcome(func, call[1], {}).untyped_storage()._cdata == WIDE.untyped_storage()._cdata


def test_real_tensors_are_computed() -> None:
    for value in (1.0, 2.0):
        assert outcome(aten.mul.Tensor, (torch.full((2,), value), torch.ones(2)), {}).tolist() == [value, value]
