"""Orthogonal matrices that rotate a residual stream, and how they are applied.

`Q = H D / sqrt(n)`: D a diagonal of random signs, H a Hadamard matrix of the stream's size n (QuIP#, Tseng et al.,
arXiv 2402.04396, section 3; QuaRot, Ashkboos et al., arXiv 2404.00456). H is a Kronecker product of small Hadamard
matrices: of order 2 (Sylvester), of order q + 1 for a prime q = 3 mod 4 and of order 2 (q + 1) for a prime q = 1 mod 4
(Paley 1933, "On orthogonal matrices"). `random` is an orthogonal matrix of a Gaussian one instead, for any n.

All of it follows from a kind, a size and a seed: signs and Gaussians come from SHA-256, not from a generator of a
library that may change. What is written is rounded once: products are float32, or float64 for float64 tensors.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch

from flashnorm_cli.errors import UsageError
from flashnorm_cli.plan.model import ROTATIONS

# Kronecker factors are multiplied out up to one of these orders: one matrix product beats several passes over memory.
BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix of order `size`."""

    kind: str
    size: int
    seed: int

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """`Q x` for each row x. `rows` is float32 or float64 of shape (count, size); so is the result."""
        return self.along(rows[:, :, None])[:, :, 0]

    def along(self, values: torch.Tensor) -> torch.Tensor:
        """`Q x` for each vector x along the middle dimension of float32 or float64 `values` (outer, size, inner)."""
        outer, _, inner = values.shape
        if self.kind == "random":
            return _times(_random(self.size, self.seed, values.dtype), values)
        rotated = values * _signs(self.size, self.seed, values.dtype)[:, None]
        left = self.size
        for block in _blocks(self.size, values.dtype):
            left //= block.shape[0]
            # (..., block, left): the first factor of the Kronecker product strides over all that follow.
            rotated = _times(block, rotated.view(-1, block.shape[0], left * inner))
        return rotated.view(outer, self.size, inner)


def _times(matrix: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`matrix` times each vector along the middle dimension."""
    if values.shape[2] == 1:
        return (values[:, :, 0] @ matrix.T)[:, :, None]
    return torch.bmm(matrix.expand(len(values), -1, -1), values)


def rotation(kind: str, size: int, seed: int) -> Rotation:
    """Raises UsageError where there is no such matrix."""
    if kind not in ROTATIONS:
        raise UsageError(f"a rotation is one of {', '.join(ROTATIONS)}, not {kind!r}")
    if kind == "hadamard" and orders(size) is None:
        raise UsageError(f"no Hadamard matrix of order {size} can be built here; use the random rotation")
    return Rotation(kind, size, seed)


@functools.cache
def orders(size: int) -> tuple[int, ...] | None:
    """Orders of small Hadamard matrices whose product is `size`, largest first, with the smallest largest one."""
    best: tuple[int, ...] | None = (2,) * (size.bit_length() - 1) if size & (size - 1) == 0 and size > 0 else None
    if best is not None:
        return best
    for order in range(12, size + 1, 4):
        if size % order or not (_is_paley_1(order) or _is_paley_2(order)):
            continue
        rest = orders(size // order)
        if rest is not None:
            return tuple(sorted((order, *rest), reverse=True))
    return None


def signs(size: int, seed: int) -> torch.Tensor:
    """The diagonal of D: int8 of shape (size,), each 1 or -1, from the bits of SHA-256 in order, lowest bit first."""
    bits = [(byte >> n) & 1 for byte in _bytes(f"flashnorm signs {seed}", (size + 7) // 8) for n in range(8)]
    return 1 - 2 * torch.tensor(bits[:size], dtype=torch.int8)


def _bytes(name: str, count: int) -> bytes:
    blocks = (hashlib.sha256(f"{name} {n}".encode()).digest() for n in range(-(-count // 32)))
    return b"".join(blocks)[:count]


@functools.lru_cache(1)
def _random(size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """An orthogonal matrix: Q of the QR decomposition of a Gaussian matrix, with the signs that R's positive
    diagonal gives it (Mezzadri 2007, "How to generate random matrices from the classical compact groups")."""
    raw = torch.frombuffer(bytearray(_bytes(f"flashnorm gauss {seed}", 16 * size * size)), dtype=torch.int64)
    uniform = ((raw >> 11) & (2**53 - 1)).double().add(0.5) / 2**53
    first, second = uniform.view(2, size, size)
    gaussian = torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(torch.diagonal(r))).to(dtype)


@functools.lru_cache(2)
def _signs(size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The signs over the square root of the size."""
    return (signs(size, seed).double() / math.sqrt(size)).to(dtype)


@functools.lru_cache(4)
def _blocks(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hadamard matrices whose Kronecker product has order `size`; small ones multiplied out."""
    blocks = []
    for together in min((_grouped(orders(size) or (), most) for most in BLOCKS), key=_cost):
        blocks.append(functools.reduce(torch.kron, map(hadamard, together)).to(dtype))
    return tuple(blocks)


def _grouped(found: tuple[int, ...], most: int) -> list[list[int]]:
    """Orders in their order, in groups whose product is at most `most`."""
    groups: list[list[int]] = []
    for order in found:
        if groups and math.prod(groups[-1]) * order <= most:
            groups[-1].append(order)
        else:
            groups.append([order])
    return groups


def _cost(groups: list[list[int]]) -> int:
    """Roughly, in time: a pass costs as much as 32 products, and a small matrix as one of 32."""
    return sum(32 + max(math.prod(group), 32) for group in groups)


@functools.cache
def hadamard(order: int) -> torch.Tensor:
    """A Hadamard matrix of one of the orders of `orders`: float64 of shape (order, order)."""
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if _is_paley_1(order):
        core = _jacobsthal(order - 1)
        matrix = torch.ones(order, order, dtype=torch.float64)
        matrix[1:, 0] = -1
        matrix[1:, 1:] = core + torch.eye(order - 1, dtype=torch.float64)
        return matrix
    half = order // 2
    conference = torch.zeros(half, half, dtype=torch.float64)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(half - 1)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, one) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)


def _jacobsthal(q: int) -> torch.Tensor:
    """The matrix of quadratic characters of a - b modulo a prime q."""
    squares = {(x * x) % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _is_paley_1(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _is_paley_2(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
