"""The law on exact numbers and on NumPy; PyTorch's tensors are in tests/torch."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch import law


@given(st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=6), min_size=1, max_size=8))
def test_the_mean_of_means_by_items_is_the_mean_of_all(micro_batches):
    means = [Fraction(sum(m), len(m)) for m in micro_batches]
    everything = [v for m in micro_batches for v in m]
    assert law.mean(means, map(len, micro_batches)) == Fraction(sum(everything), len(everything))


def test_arrays_and_weights():
    g = law.mean([np.array([1.0, 4.0]), np.array([3.0, 8.0])], [3, 1])
    assert g.tolist() == [1.5, 5.0]  # and not [2, 6], the mean of means


def test_an_unequal_count_or_nothing_at_all():
    with pytest.raises(ValueError, match="zip"):
        law.mean([1.0], [1, 2])
    with pytest.raises(ZeroDivisionError):
        law.mean([], [])
