"""Verdicts against scipy, and by how often they are wrong on data in which nothing is true."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.claims import (
    LEVEL,
    bound,
    count,
    decide,
    difference,
    equal,
    holm,
    interior_optimum,
    monotone,
    no_better,
    verdict,
)

SEEDS = np.arange(6.0)
NOISE = np.array([0.1, -0.2, 0.15, -0.05, 0.02, -0.1])


def side(claim):
    decision = decide(claim)
    return verdict(decision, decision.p)


def test_a_difference_is_students_paired_t():
    one, other = SEEDS + NOISE, SEEDS + 0.3
    assert decide(difference(one, other, lower=True)).p == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert decide(difference(one, other, lower=False)).p == decide(difference(one, other, lower=True)).p


VALLEY = np.array([[1.0], [0.0], [0.5], [2.0]])
TRUE_AND_FALSE = {
    "difference": lambda sign: difference(SEEDS - sign + NOISE, SEEDS, lower=True),
    "monotone": lambda sign: monotone(np.outer(sign * np.arange(4), np.ones(6)) + 0.5 * NOISE * np.eye(4, 6)),
    "equal": lambda sign: equal(SEEDS + (sign < 0) + NOISE, SEEDS, margin=0.5),
    "no_better": lambda sign: no_better(SEEDS - (sign < 0) + NOISE, SEEDS, margin=0.5, lower=True),
    "bound": lambda sign: bound(sign + NOISE, above=0.0),
    "count": lambda sign: count(4 - sign + NOISE, number=3),
    "interior_optimum": lambda sign: interior_optimum(sign * VALLEY + NOISE * np.eye(4, 6), lowest=True),
}


@pytest.mark.parametrize("kind", TRUE_AND_FALSE)
def test_what_is_plain_is_supported_and_its_opposite_contradicted(kind):
    assert side(TRUE_AND_FALSE[kind](1)) == "supported"
    assert side(TRUE_AND_FALSE[kind](-1)) == "contradicted"


NULLS = {
    "difference": lambda draw: difference(draw(6), draw(6), lower=True),
    "monotone": lambda draw: monotone(np.stack([draw(6) for _ in range(3)])),
    "equal": lambda draw: equal(draw(6) + 1, np.zeros(6), margin=1.0),
    "no_better": lambda draw: no_better(draw(6) - 1, np.zeros(6), margin=1.0, lower=True),
    "bound": lambda draw: bound(draw(6), above=0.0),
    "count": lambda draw: count(3.5 + draw(6), number=3),
    "interior_optimum": lambda draw: interior_optimum(np.stack([draw(6) for _ in range(4)]), lowest=True),
}


@pytest.mark.parametrize("kind", NULLS)
def test_where_nothing_is_true_at_most_one_in_twenty_is_decided(kind):
    """On the border between true and false, where a test errs most; four standard errors above 5% would be a fault."""
    generator, rounds = np.random.default_rng(0), 1500
    wrong = sum(decide(NULLS[kind](generator.standard_normal)).p < LEVEL for _ in range(rounds))
    assert wrong / rounds < LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / rounds)


def test_a_ledger_of_nulls_errs_in_at_most_one_of_twenty_ledgers():
    generator, rounds = np.random.default_rng(1), 400
    wrong = 0
    for _ in range(rounds):
        decisions = [decide(null(generator.standard_normal)) for null in NULLS.values()]
        corrected = holm([decision.p for decision in decisions])
        wrong += any(verdict(one, p) != "undecided" for one, p in zip(decisions, corrected, strict=True))
    assert wrong / rounds < LEVEL + 4 * math.sqrt(LEVEL * (1 - LEVEL) / rounds)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_rule(p_values):
    corrected = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    stepped = [(len(p_values) - rank) * p_values[index] for rank, index in enumerate(order)]
    expected = np.minimum(1, np.maximum.accumulate(stepped))
    np.testing.assert_allclose(np.array(corrected)[order], expected)
    assert all(one >= other for one, other in zip(corrected, p_values, strict=True))


def test_holm_leaves_out_what_is_not_known():
    assert holm([0.01, math.nan, 0.02])[::2] == [0.02, 0.02]
    assert math.isnan(holm([0.01, math.nan])[1])


def test_few_seeds_and_what_has_not_converged_decide_nothing():
    four = decide(bound(np.array([1.0, 1.1, 0.9, 1.0]), above=0.0))
    assert math.isnan(four.p)
    assert verdict(four, four.p) == "undecided"
    five = decide(bound(np.array([1.0, 1.1, 0.9, 1.0, 1.0]), above=0.0))
    assert verdict(five, five.p) == "supported"
    assert verdict(five, five.p, converged=False) == "undecided"


def test_seeds_that_agree_exactly_decide():
    assert side(count(np.full(5, 3.0), number=3)) == "supported"
    assert side(count(np.full(5, 4.0), number=3)) == "contradicted"
    assert side(difference(SEEDS, SEEDS, lower=True)) == "undecided"
