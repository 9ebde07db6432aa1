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

# Kronecker factors are multiplied out up to this order: one matrix product beats several passes over memory.
LARGEST_BLOCK = 128
# What a pass costs besides its products, in products per value, where the factors behind it have this order or a
# larger one. As measured: BLAS is slow at batches of narrow matrices. No factor behind makes it one product of rows.
PASSES = {64: 12, 32: 20, 16: 35, 8: 70, 2: 300, 1: 12}


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix of order `size`."""

    kind: str
    size: int
    seed: int

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """`Q x` for each row x. `rows` is float32 or float64 of shape (count, size); so is the result."""
        values = rows[:, :, None].clone(memory_format=torch.contiguous_format)
        return self.turn(values, torch.empty_like(values))[:, :, 0]

    def turn(self, values: torch.Tensor, spare: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """`Q x`, or `Q (gain x)` by a gain (size,), for each vector x along the second dimension of `values`.

        The result is in `values` or in `spare`: both float32 or float64 of shape (outer, size, inner), contiguous, and
        overwritten.
        """
        outer, _, inner = shape = values.shape
        like, factors = (values.dtype, values.device), gain
        if self.kind == "random":
            blocks: tuple[torch.Tensor, ...] = (_random(self.size, self.seed, *like),)
        else:
            blocks, signs = _blocks(self.size, *like), _signs(self.size, self.seed, *like)
            factors = signs if gain is None else signs * gain
        if factors is not None:
            values.mul_(factors[:, None])
        left = self.size
        for block in blocks:
            left //= len(block)
            # (..., block, left): the first factor of the Kronecker product strides over all that follow.
            part = (-1, len(block), left * inner) if outer else (0, len(block), left * inner)
            _times(block, values.view(part), spare.view(part))
            values, spare = spare, values
        return values.view(shape)


def _times(matrix: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """`matrix` times each vector along the middle dimension, into `out`."""
    if values.shape[2] == 1:
        torch.mm(values[:, :, 0], matrix.T, out=out[:, :, 0])
    elif len(values) == 1:
        torch.mm(matrix, values[0], out=out[0])
    else:
        torch.bmm(matrix.expand(len(values), -1, -1), values, out=out)


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
def _random(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An orthogonal matrix: Q of the QR decomposition of a Gaussian matrix, with the signs that R's positive
    diagonal gives it (Mezzadri 2007, "How to generate random matrices from the classical compact groups")."""
    raw = torch.frombuffer(bytearray(_bytes(f"flashnorm gauss {seed}", 16 * size * size)), dtype=torch.int64)
    uniform = ((raw >> 11) & (2**53 - 1)).double().add(0.5) / 2**53
    first, second = uniform.view(2, size, size)
    gaussian = torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(torch.diagonal(r))).to(dtype).to(device)


@functools.lru_cache(4)
def _signs(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The signs over the square root of the size."""
    return (signs(size, seed).double() / math.sqrt(size)).to(dtype).to(device)


@functools.lru_cache(4)
def _blocks(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hadamard matrices whose Kronecker product has order `size`; small ones multiplied out."""
    groups = _grouped(orders(size) or ())[1]
    return tuple(functools.reduce(torch.kron, map(hadamard, group)).to(dtype).to(device) for group in groups)


def _grouped(found: tuple[int, ...]) -> tuple[int, list[tuple[int, ...]]]:
    """Orders in their order, in the groups that cost least, and what they cost."""
    best: tuple[int, list[tuple[int, ...]]] | None = None
    for end in range(1, len(found) + 1):
        order, behind = math.prod(found[:end]), math.prod(found[end:])
        if best is not None and order > LARGEST_BLOCK:
            break
        cost, rest = _grouped(found[end:])
        cost += order + next(more for least, more in PASSES.items() if behind >= least)
        if best is None or cost < best[0]:
            best = cost, [found[:end], *rest]
    return best or (0, [])


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
