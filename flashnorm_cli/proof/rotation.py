"""Rotations, built again from the definition in docs/rotation.md: float64, and apart from the fold's own arithmetic.

A fold's product is float32 and rounded once, in an order of its own. So a rotated value is not recomputed bit by bit:
it has to be what the dtype makes of the float64 product, give or take what float32 may have added before the rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch

from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan.model import PlannedRotation

# What float32 may add to a rotated value, in units of 2^-24 times the root mean square of its vector: four times what
# was seen over sizes from 2 to 5120, with single channels up to 10,000 times as large as the others (Hadamard: 32;
# random ones, which sum over all n channels: 127 for n = 576).
NOISE = {"hadamard": 128.0, "random": 512.0}


def rotated(rotation: PlannedRotation, values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """float64 `values` with each vector along each of `dims` multiplied by Q."""
    shape = values.shape
    for dim in dims:
        vectors = values.reshape(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))
        values = _along(rotation, vectors).reshape(shape)
    return values


def noise(rotation: PlannedRotation, values: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """What the fold's float32 product may differ from `rotated`, to be broadcast to its shape.

    `values` are those that are rotated, float64.
    """
    norms = torch.linalg.vector_norm(values, dim=dims, keepdim=True)
    return norms * (math.sqrt(rotation.size) ** -len(dims) * 2.0**-24 * len(dims) * NOISE[rotation.kind])


def _along(rotation: PlannedRotation, values: torch.Tensor) -> torch.Tensor:
    """Q times each vector along the middle one of three dimensions."""
    n = rotation.size
    if rotation.kind == "random":
        return _times(gaussian(n, rotation.seed), values)
    shape = values.shape
    values = values * _scaled_signs(n, rotation.seed)[:, None]
    behind = n * shape[2]
    for factor in _factors(n):  # which of its channels the vector's index names: the first factor's change slowest
        behind //= len(factor)
        values = _times(factor, values.reshape(values.numel() // (len(factor) * behind), len(factor), behind))
    return values.reshape(shape)


def _times(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if values.shape[2] == 1:  # one product instead of many narrow ones
        return (values[:, :, 0] @ matrix.T)[:, :, None]
    return torch.bmm(matrix.expand(len(values), *matrix.shape), values)  # `matmul` would copy them into other orders


# ---- from a seed -----------------------------------------------------------------------------------------------------


def _stream(name: str) -> Iterator[int]:
    """The bytes of SHA-256 of "name 0", "name 1", ..."""
    block = 0
    while True:
        yield from hashlib.sha256(f"{name} {block}".encode()).digest()
        block += 1


@lru_cache(2)
def random_signs(n: int, seed: int) -> torch.Tensor:
    """Bit k of the stream, lowest bit of each byte first: 0 is +1, 1 is -1."""
    stream = _stream(f"flashnorm signs {seed}")
    found: list[float] = []
    while len(found) < n:
        byte = next(stream)
        found += [-1.0 if byte >> bit & 1 else 1.0 for bit in range(8)]
    return torch.tensor(found[:n], dtype=torch.float64)


@lru_cache(2)
def _scaled_signs(n: int, seed: int) -> torch.Tensor:
    return random_signs(n, seed) / math.sqrt(n)


@lru_cache(1)
def gaussian(n: int, seed: int) -> torch.Tensor:
    """The orthogonal factor of a Gaussian matrix, by Householder's QR, the diagonal of R made positive."""
    count = -(-16 * n * n // 32)
    name = f"flashnorm gauss {seed}"
    data = b"".join(hashlib.sha256(f"{name} {block}".encode()).digest() for block in range(count))[: 16 * n * n]
    words = torch.tensor(memoryview(data).cast("q"), dtype=torch.int64)
    uniform = ((words >> 11 & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53
    radius, angle = uniform[: n * n].view(n, n), uniform[n * n :].view(n, n)
    q, r = torch.linalg.qr((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos())
    return q * r.diagonal().sign()


# ---- Hadamard matrices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How a Hadamard matrix of an order is built: `paley` is 0 (Sylvester's of order 2), 1 or 2."""

    order: int
    paley: int
    prime: int


def _kind(order: int) -> _Kind | None:
    if order == 2:
        return _Kind(2, 0, 0)
    if order % 4:
        return None
    for paley, prime in ((1, order - 1), (2, order // 2 - 1)):
        if prime % 4 == (3 if paley == 1 else 1) and prime > 2 and not any(prime % k == 0 for k in range(2, prime)):
            return _Kind(order, paley, prime)
    return None


def _split(n: int) -> list[_Kind] | None:
    """Powers of two as twos; else the smallest order from 12 on that divides n and leaves what can be split again."""
    if n & (n - 1) == 0:
        return [_Kind(2, 0, 0)] * (n.bit_length() - 1)
    for order in range(12, n + 1, 4):
        if n % order == 0 and (kind := _kind(order)) and (rest := _split(n // order)) is not None:
            return sorted([kind, *rest], key=lambda each: -each.order)
    return None


@lru_cache(2)
def _factors(n: int) -> tuple[torch.Tensor, ...]:
    """The Kronecker factors, the largest order first; the twos at the end multiplied out to sixteens."""
    kinds = _split(n)
    if kinds is None:
        raise PlanError(f"there is no Hadamard matrix of order {n} that docs/rotation.md defines")
    found = [_matrix(kind) for kind in kinds if kind.paley]
    twos = len(kinds) - len(found)
    for together in (twos % 4, *[4] * (twos // 4)):
        found += [reduce(torch.kron, [_matrix(_Kind(2, 0, 0))] * together)] if together else []
    return tuple(found)


def _matrix(kind: _Kind) -> torch.Tensor:
    if kind.paley == 0:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    p = kind.prime
    legendre = [0, *(1 if pow(a, (p - 1) // 2, p) == 1 else -1 for a in range(1, p))]  # Euler's criterion
    jacobsthal = [[legendre[(i - j) % p] for j in range(p)] for i in range(p)]
    if kind.paley == 1:  # ones above, minus ones to the left, and Q + I
        rows = [[1] * (p + 1)] + [[-1, *(x + (i == j) for j, x in enumerate(row))] for i, row in enumerate(jacobsthal)]
        return torch.tensor(rows, dtype=torch.float64)
    conference = [[0] + [1] * p] + [[1, *row] for row in jacobsthal]
    cell = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
    rows = [[cell[x][half][k] for x in row for k in range(2)] for row in conference for half in range(2)]
    return torch.tensor(rows, dtype=torch.float64)
