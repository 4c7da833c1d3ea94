"""The histogram of durations: percentiles within the width of a bucket, whatever was put in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crsm.latency import LARGEST, SMALLEST, Histogram


@given(
    seconds=st.lists(st.floats(2 * SMALLEST, LARGEST / 2), min_size=1, max_size=200),
    share=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_percentile_is_the_nearest_rank_to_within_a_bucket(seconds: list[float], share: float) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.add(value)
    exact = sorted(seconds)[math.ceil(share * len(seconds) - 1e-9) - 1]
    assert exact * (1 - 1e-9) <= histogram.percentile(share) <= exact * 1.021
    assert histogram.count == len(seconds) and histogram.longest == max(seconds)
    assert histogram.total == pytest.approx(sum(seconds))


def test_durations_can_be_added_many_at_a_time_and_out_of_range() -> None:
    histogram = Histogram()
    histogram.add(0.001, times=99)
    histogram.add(1e9)
    histogram.add(0.0)
    summary = histogram.summary()
    assert summary["count"] == 101 and summary["max"] == 1e9
    assert summary["p50"] == pytest.approx(0.001, rel=0.021)
    assert histogram.percentile(1.0) >= LARGEST


def test_without_durations_everything_is_zero() -> None:
    assert Histogram().summary() == {"count": 0, "mean": 0.0, "p50": 0.0, "p99": 0.0, "max": 0.0}
