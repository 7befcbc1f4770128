"""The statistics over seeds agree with scipy, cover what they promise, and print no digit that they do not know."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline import intervals

values = st.floats(-1e6, 1e6, allow_subnormal=False)
several = st.lists(values, min_size=2, max_size=9).filter(lambda found: np.std(found) > 1e-6 * max(map(abs, found)))


@given(several)
def test_an_interval_is_scipys_t_interval(found: list[float]):
    interval = intervals.seed_interval(found)
    expected = stats.ttest_1samp(found, 0).confidence_interval(0.95)
    assert interval.seeds == len(found)
    np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], rtol=1e-7, atol=1e-7)


def test_one_seed_has_no_interval_and_none_has_no_mean():
    single, none = intervals.seed_interval([3.0, math.nan]), intervals.seed_interval([])
    assert single.mean == 3 and math.isnan(single.low) and math.isnan(single.high) and single.seeds == 1
    assert math.isnan(none.mean) and none.seeds == 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(2000, 5))
    found = [intervals.seed_interval(row) for row in draws]
    covered = np.mean([interval.low <= 5.0 <= interval.high for interval in found])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_paired_differences_are_scipys_and_match_seeds_by_name():
    rng = np.random.default_rng(1)
    treatment = pd.Series(rng.normal(size=5), index=[3, 1, 2, 0, 9])
    control = pd.Series(rng.normal(size=6), index=[0, 1, 2, 3, 4, 9])
    shared = [0, 1, 2, 3, 9]
    expected = stats.ttest_rel(treatment[shared], control[shared]).confidence_interval(0.95)
    found = intervals.paired_difference(treatment, control)
    assert found.seeds == 5
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], rtol=1e-12)


def test_a_seed_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="one value a seed"):
        intervals.paired_difference(pd.Series([1.0, 2.0], index=[0, 0]), pd.Series([1.0], index=[0]))


def _table() -> pd.DataFrame:
    rng = np.random.default_rng(2)
    settings = [("vae", 1.0), ("vae", 4.0), ("ae", math.nan)]
    rows = [
        {"arm": arm, "latent_dim": dim, "beta": beta, "l2": 0.0, "seed": seed, "unconverged": seed == 0, "m": rng.normal()}
        for dim in (8, 2)
        for arm, beta in settings
        for seed in range(4)
    ]
    return pd.DataFrame(rows)


def test_a_summary_has_one_row_a_setting_in_order_and_agrees_with_the_interval():
    table = _table()
    found = intervals.summarise(table, ["latent_dim", "arm", "beta"], ["m"])
    assert list(found.columns) == ["latent_dim", "arm", "beta", "cells", "unconverged", "m", "m low", "m high"]
    assert list(found["latent_dim"]) == [8, 8, 8, 2, 2, 2] and set(found["cells"]) == {4} and set(found["unconverged"]) == {1}
    ae = table[(table["arm"] == "ae") & (table["latent_dim"] == 2)]
    expected = intervals.seed_interval(ae["m"])
    np.testing.assert_allclose(found.iloc[5][["m", "m low", "m high"]].astype(float), expected[:3])


def test_cells_of_one_seed_are_no_repetitions():
    table = _table()
    pooled = intervals.summarise(table, ["arm"], ["m"]).set_index("arm").loc["ae"]
    of_seed = table[table["arm"] == "ae"].groupby("seed")["m"].mean()
    np.testing.assert_allclose(pooled[["m", "m low", "m high"]].astype(float), intervals.seed_interval(of_seed)[:3])
    assert pooled["cells"] == 8


def test_a_paired_table_is_the_paired_difference_of_every_other_arm():
    table = _table()
    found = intervals.paired_table(table, ["latent_dim", "l2"], "m")
    columns = ["latent_dim", "l2", "arm", "beta", "unconverged", "metric", "seeds", "difference", "low", "high"]
    assert list(found.columns) == columns
    assert len(found) == 4 and set(found["arm"]) == {"vae"} and set(found["metric"]) == {"m"} and set(found["seeds"]) == {4}
    row = found[(found["latent_dim"] == 2) & (found["beta"] == 4)].iloc[0]
    of = {key: group.set_index("seed")["m"] for key, group in table[table["latent_dim"] == 2].groupby("beta", dropna=False)}
    expected = intervals.paired_difference(
        of[4.0], table[(table["arm"] == "ae") & (table["latent_dim"] == 2)].set_index("seed")["m"]
    )
    np.testing.assert_allclose([row["difference"], row["low"], row["high"]], expected[:3])


def test_a_paired_table_leaves_out_seeds_without_a_partner_and_is_empty_without_a_plain_ae():
    table = _table()
    lost = table[(table["arm"] != "ae") | (table["seed"] != 1)]
    assert set(intervals.paired_table(lost, ["latent_dim"], "m")["seeds"]) == {3}
    assert intervals.paired_table(table[table["arm"] != "ae"], ["latent_dim"], "m").empty
    assert intervals.paired_table(table.iloc[:0], ["latent_dim"], "m").empty


def test_a_paired_table_refuses_a_control_that_is_not_one():
    with pytest.raises(ValueError, match="must tell the plain AEs apart"):
        intervals.paired_table(_table(), ["l2"], "m")


@pytest.mark.parametrize(
    ("low", "high", "verdict", "change"),
    [
        (-2.0, -1.0, "beats", "lowers"),
        (1.0, 2.0, "loses to", "raises"),
        (-1.0, 1.0, "does not differ from", "does not measurably change"),
        (0.0, 0.0, "does not differ from", "does not measurably change"),
        (math.nan, math.nan, "cannot be told from", "has too few seeds to tell about"),
    ],
)
def test_verdicts_follow_the_interval(low: float, high: float, verdict: str, change: str):
    interval = intervals.Interval((low + high) / 2, low, high, 5)
    assert intervals.comparison(interval) == verdict and intervals.change(interval) == change


@pytest.mark.parametrize(
    ("mean", "half", "text", "bounds"),
    [
        (123.44, 1.23, "123.4 ± 1.2", "123.4 [122.2, 124.7]"),
        (0.034512, 0.00047, "0.0345 ± 0.0005", "0.0345 [0.0340, 0.0350]"),
        (-0.0021, 0.0009, "−0.0021 ± 0.0009", "−0.0021 [−0.0030, −0.0012]"),
        (-0.0001, 0.02, "0.000 ± 0.020", "0.000 [−0.020, 0.020]"),
        (12345.6, 812.0, "12300 ± 800", "12300 [11500, 13200]"),
        (1.1e-5, 2e-6, "(1.10 ± 0.20) × 10⁻⁵", "(1.10 [0.90, 1.30]) × 10⁻⁵"),
        (2.0, 0.0, "2 ± 0", "2 [2, 2]"),
        (0.0, 0.0, "0 ± 0", "0 [0, 0]"),
        (3e-13, 7e-13, "0 ± 0", "0 [0, 0]"),
        (3.14159, math.nan, "3.14", "3.14"),
        (math.nan, math.nan, "–", "–"),
    ],
)
def test_numbers_are_written_with_the_digits_of_their_interval(mean: float, half: float, text: str, bounds: str):
    interval = intervals.Interval(mean, mean - half, mean + half, 5)
    assert intervals.with_half_width(interval) == text and intervals.with_bounds(interval) == bounds


@given(st.floats(1e-12, 1e12))
def test_rounding_moves_a_number_by_less_than_a_sixth_of_its_interval(half: float):
    unit = 10.0 ** -intervals.decimals(half)
    assert unit / 2 <= half / 6
    assert half < 36 * unit  # and no third digit is claimed
