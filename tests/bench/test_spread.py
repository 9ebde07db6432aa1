"""Percentiles of few trials."""

import random

import pytest

from flashnorm_cli.bench.timing import spread


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
def test_spread_is_within_what_was_measured(count):
    values = [random.lognormvariate(3, 1) for _ in range(count)]
    low, high = spread(values, 12)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
