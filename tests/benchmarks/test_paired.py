"""The confidence interval of paired differences: against the t table, and what one seed cannot tell."""

import math

import pytest

from benchmarks import paired


def test_interval_is_that_of_the_t_table():
    # Three differences: mean 2, standard deviation 1, t(0.975, 2) = 4.3027; two: t(0.975, 1) = 12.706.
    assert paired.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert paired.interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), rel=1e-4)
    assert paired.interval([1.0, 2.0, 3.0], confidence=0.9)[1] == pytest.approx(2.92 / math.sqrt(3), rel=1e-3)


def test_an_interval_excludes_zero_or_not():
    assert paired.differs([1.0, 1.1, 0.9]) and paired.differs([-1.0, -1.1, -0.9])
    assert not paired.differs([1.0, 2.0, 3.0])
    assert not paired.differs([0.0, 0.0])


def test_one_seed_or_a_nan_tells_nothing():
    mean, half = paired.interval([0.5])
    assert mean == 0.5 and math.isnan(half)
    assert not paired.differs([0.5])
    assert math.isnan(paired.interval([1.0, math.nan])[0]) and not paired.differs([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one seed"):
        paired.interval([])
