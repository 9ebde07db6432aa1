"""Rotations: orthogonal, the same everywhere, and as fast a transform as the matrix that they stand for."""

import pytest
import torch

from flashnorm_cli.errors import UsageError
from flashnorm_cli.folding.rotation import hadamard, orders, rotation, signs

# Hidden sizes of released models.
SIZES = (48, 576, 768, 960)
LARGE = (
    896,
    1024,
    1152,
    1280,
    1536,
    1600,
    1920,
    2048,
    2304,
    2432,
    2560,
    2816,
    2880,
    2944,
    3072,
    3328,
    3584,
    3840,
    4096,
    4608,
    5120,
    5376,
    6144,
    6656,
    7168,
    8192,
    12288,
    16384,
    18432,
)


@pytest.mark.parametrize("order", [2, 12, 20, 24, 28, 36, 44, 60, 76, 84, 104])
def test_small_hadamard_matrices(order):
    matrix = hadamard(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotations_are_orthogonal(kind, size):
    q = rotation(kind, size, seed=size).apply(torch.eye(size, dtype=torch.float64)).T
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if kind == "hadamard":
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))


@pytest.mark.parametrize("size", LARGE)
def test_large_sizes_have_a_hadamard_matrix(size):
    assert orders(size) is not None
    x = torch.randn(3, size, dtype=torch.float64)
    y = rotation("hadamard", size, seed=1).apply(x)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1)) and not torch.allclose(x, y)


def test_transform_is_the_kronecker_product():
    size, seed = 2 * 12 * 20, 7
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in orders(size):
        matrix = torch.kron(matrix, hadamard(order))
    x = torch.randn(5, size, dtype=torch.float64)
    expected = (x * signs(size, seed)) @ matrix.T / size**0.5
    assert torch.allclose(rotation("hadamard", size, seed).apply(x), expected, atol=1e-12)


def test_seeds_give_the_same_signs_everywhere():
    # Folded checkpoints name their seed: these may never change.
    expected = "-++-+-----+--+---+--+---"
    assert signs(24, 0).tolist() == [1 if sign == "+" else -1 for sign in expected]
    assert not torch.equal(signs(64, 0), signs(64, 1))


@pytest.mark.parametrize(("kind", "size"), [("hadamard", 6), ("hadamard", 1), ("walsh", 64)])
def test_what_there_is_not(kind, size):
    if (kind, size) == ("hadamard", 1):
        assert rotation(kind, size, 0).apply(torch.ones(1, 1)).abs().item() == 1
        return
    with pytest.raises(UsageError):
        rotation(kind, size, 0)
