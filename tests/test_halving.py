"""Successive halving: who goes on, and what a batch then costs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import halving

value = st.floats(-1e6, 1e6)
of_one = st.lists(st.tuples(value), min_size=1, max_size=12)
of_two = st.lists(st.tuples(value, value), min_size=1, max_size=12)


@given(of_one, st.integers(2, 5))
def test_of_one_objective_the_smallest_values_go_on(values, factor):
    kept = halving.survivors(values, factor)
    assert len(kept) == math.ceil(len(values) / factor)
    assert sorted(values[index] for index in kept) == sorted(values)[: len(kept)]


def test_of_equal_trials_the_first_goes_on():
    assert halving.survivors([(1.0,), (1.0,), (2.0,), (1.0,)], 2) == [0, 1]


@given(of_two)
def test_fronts_hold_every_trial_once_and_none_dominates_its_own(values):
    fronts = halving.fronts(values)
    assert sorted(index for front in fronts for index in front) == list(range(len(values)))
    for front in fronts:
        assert not any(_dominates(values[one], values[other]) for one in front for other in front)


@given(of_two)
def test_a_trial_of_a_later_front_is_dominated_by_one_of_the_front_before(values):
    fronts = halving.fronts(values)
    for before, after in itertools.pairwise(fronts):
        assert all(any(_dominates(values[one], values[other]) for one in before) for other in after)


def _dominates(one, other):
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def test_the_first_front_goes_on_before_the_second():
    diagonal, behind = [(0.0, 3.0), (1.0, 1.0), (3.0, 0.0)], [(1.5, 3.5), (2.0, 2.0), (3.5, 1.5)]
    assert halving.survivors([*behind, *diagonal], 2) == [3, 4, 5]


def test_within_a_front_its_ends_and_the_less_crowded_go_on():
    front = [(0.0, 10.0), (1.0, 9.0), (1.1, 8.9), (5.0, 4.0), (10.0, 0.0)]
    assert halving.survivors(front, 2) == [0, 3, 4]


@pytest.mark.parametrize(
    ("shares", "updates"), [((0.1, 0.5), [10, 50]), ((0.12, 0.14), [10]), ((0.99,), []), ((0.0001, 0.26), [10, 30])]
)
def test_rungs_are_history_points_before_the_last_each_once(shares, updates):
    assert halving.rung_updates(shares, range(10, 101, 10)) == updates


def test_a_halved_batch_costs_what_its_members_train():
    assert halving.costs(16, 3, [75, 225, 600]) == [16 * 75, 6 * 150, 2 * 375]
    assert halving.costs(16, 1, [600]) == [16 * 600]
