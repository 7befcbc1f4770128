"""Verdicts against scipy, by how often they are wrong on data in which nothing is true, and on tables of cells."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline import config, grid
from pipeline.claims import (
    FEWEST_SEEDS,
    LEVEL,
    Measured,
    bound,
    counts,
    decide,
    difference,
    equal,
    holm,
    interior_optimum,
    ledger,
    monotone,
    no_better,
)

SEEDS = np.arange(6.0)
NOISE = np.array([0.1, -0.2, 0.15, -0.05, 0.02, -0.1])


def side(claim):
    decision = decide(claim)
    return decision.side if decision.p < LEVEL else "undecided"


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
    "count": lambda sign: counts(np.stack([4 - sign + NOISE, 2 - NOISE]), numbers=[3, 2]),
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
    "count": lambda draw: counts(np.where(draw((2, 6)) > 0, 3.0, 4.0), numbers=[3, 3]),
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
        wrong += min(corrected) < LEVEL
    assert wrong / rounds <= LEVEL


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_rule(p_values):
    corrected = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    stepped = [(len(p_values) - rank) * p_values[index] for rank, index in enumerate(order)]
    expected = np.minimum(1, np.maximum.accumulate(stepped))
    np.testing.assert_allclose(np.array(corrected)[order], expected)
    assert all(one >= other for one, other in zip(corrected, p_values, strict=True))


values = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=6, max_size=6).map(np.array)


@given(values, values, st.floats(0.5, 20), st.permutations(range(6)))
def test_verdicts_do_not_depend_on_units_order_or_the_way_of_asking(one, other, scale, order):
    found = decide(difference(one, other, lower=True))
    assert 0 <= found.p <= 1
    opposite = decide(difference(one, other, lower=False))
    assert opposite.p == found.p and (opposite.side != found.side or found.p == 1)
    for same in (difference(one[order], other[order], lower=True), difference(scale * one, scale * other, lower=True)):
        decision = decide(same)
        assert decision.p == pytest.approx(found.p, rel=1e-6, abs=1e-12) and (decision.side == found.side or found.p > 0.99)


@given(values, st.floats(0.1, 50))
def test_a_wider_margin_never_makes_an_equality_less_true(change, margin):
    narrow, wide = (decide(equal(change, np.zeros(6), margin=width)) for width in (margin, 2 * margin))
    if narrow.side == "supported":
        assert wide.side == "supported" and wide.p <= narrow.p


def test_holm_leaves_out_what_is_not_known():
    assert holm([0.01, math.nan, 0.02])[::2] == [0.02, 0.02]
    assert math.isnan(holm([0.01, math.nan])[1])


def test_too_few_seeds_have_no_p():
    values = np.array([1.0, 1.1, 0.9, 1.0, 1.0])
    assert math.isnan(decide(bound(values[: FEWEST_SEEDS - 1], above=0.0)).p)
    assert side(bound(values, above=0.0)) == "supported"


def test_seeds_that_agree_exactly_have_the_sign_tests_p():
    assert decide(bound(np.full(8, 3.0), above=0.0)).p == pytest.approx(2 * 0.5**8)
    assert decide(bound(np.full(8, 0.0), above=0.0)).p == 1


def test_equal_counts_spread_by_half_a_step():
    """Five counts of 1 are no proof that the mean is not 1.5, and good proof that it is not 9."""
    found = {number: decide(counts(np.full((1, 5), 1.0), numbers=[number]), 0.5) for number in (1, 9)}
    assert found[1].p > LEVEL and found[1].side == "supported"
    assert found[9].p < 1e-4 and found[9].side == "contradicted"
    two = [
        decide(counts(np.random.default_rng(n).integers(1, 3, (1, 6)).astype(float), numbers=[1]), 0.5).p for n in range(400)
    ]
    assert np.mean(np.array(two) < LEVEL) <= LEVEL  # counts of 1 or 2, each half of the time: on the border


# The ledger on tables


STUDY = """
title: A study
data: {name: manifold, axes: {manifold_dim: [2, 3]}}
model: {hidden: [8], likelihood: gaussian}
grid:
  latent_dim: [4]
  l2: [0, 0.1]
  seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
  arms: {vae: {beta: [0.1, 1, 10]}, ae: {}}
train: {updates: 100}
evaluate: {noise: [{kind: gaussian, levels: [0, 0.5]}]}
claims:
  - {id: rises, source: "000, x", says: y, test: {kind: monotone, metric: test/mse, over: beta, direction: up}}
  - id: falls
    source: "000, x"
    says: y
    control: false
    test: {kind: monotone, metric: test/mse, over: beta, direction: down}
  - id: beats
    source: "000, x"
    says: y
    test: {kind: difference, metric: test/mse, where: {arm: vae, beta: 0.1}, against: {arm: ae}, direction: up}
  - id: robust
    source: "000, x"
    says: y
    test:
      kind: difference
      metric: noise/mse_clean
      where: {arm: vae, beta: 1, noise: gaussian, level: 0.5}
      against: {arm: ae}
      direction: down
  - id: units
    source: "002, x"
    says: y
    test: {kind: count, metric: prune/active_units, number: manifold_dim, where: {arm: vae}}
  - {id: other, source: "002, x", says: y, test: {kind: equal, metric: test/mse, margin: 1, against: {study: twin}}}
  - id: steadier
    source: "002, x"
    says: y
    test:
      kind: interaction
      metric: noise/mse_clean
      where: {arm: vae, beta: 10, noise: gaussian, level: 0.5}
      against: {arm: ae}
      base: {level: 0}
      direction: down
"""


def read(folder, text=STUDY):
    for name in ("study", "twin"):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return config.load_study("study", folder)


def measured(study):
    """Errors that rise with β by 1 a level, from 1 above those of the plain AE; noise adds 3 to those of the AE alone."""
    generator, rows = np.random.default_rng(0), []
    for number, cell in enumerate(grid.cells(study)):
        level = {None: 0, 0.1: 1, 1.0: 2, 10.0: 3}[cell.beta]
        error = {"test/mse": level + 0.1 * generator.standard_normal(), "prune/active_units": cell.data["manifold_dim"]}
        rows.append({"cell_id": f"c{number}", **cell.row(), **error, "unconverged": False})
    cells = pd.DataFrame(rows)
    noise = [
        cells.assign(noise="gaussian", level=x, mse_clean=cells["test/mse"] + 6 * x * (cells["arm"] == "ae")) for x in (0, 0.5)
    ]
    return Measured(cells, pd.concat(noise, ignore_index=True))


def verdicts(study, tables):
    twin = study.model_copy(update={"claims": ()})
    return {entry.claim.id: entry.verdict for entry in ledger({"study": study, "twin": twin}, tables)}


@pytest.fixture
def study(tmp_path):
    return read(tmp_path)


EXPECTED = {
    "rises": "supported",
    "falls": "contradicted",
    "beats": "supported",
    "robust": "supported",
    "units": "supported",
    "other": "supported",
    "steadier": "supported",  # although its error is as large: both are 3, and the AE's was 0
}


def test_a_ledger_says_what_was_built_into_its_tables(study):
    tables = {"study": measured(study), "twin": measured(study)}
    assert verdicts(study, tables) == EXPECTED


@pytest.mark.parametrize(
    ("number", "verdict", "note"), [(2, "undecided", "if all seeds agreed, p would still be 0.089"), (7, "contradicted", "")]
)
def test_five_equal_counts_can_contradict_but_not_support(tmp_path, number, verdict, note):
    lone = "manifold_dim: 2, beta: 1, l2: 0}}"
    text = STUDY.replace("number: manifold_dim, where: {arm: vae}}", f"number: {number}, where: {{arm: vae, {lone}")
    study = read(tmp_path, text.replace("seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]", "seed: [0, 1, 2, 3, 4]"))
    entry = next(entry for entry in ledger({"study": study}, {"study": measured(study)}) if entry.claim.id == "units")
    assert (entry.verdict, entry.effect.seeds) == (verdict, 5) and entry.note == note


def test_two_studies_cannot_share_a_claim(tmp_path):
    other = next(line for line in STUDY.splitlines() if "id: other" in line)  # of which a twin would be its own
    for name in ("study", "twin"):
        (tmp_path / f"{name}.yaml").write_text(STUDY.replace(other, ""), encoding="utf-8")
    with pytest.raises(config.ConfigError, match="twin.yaml: claims: study has a claim 'rises' too"):
        config.load_known(config.Settings(studies=("study", "twin")), tmp_path)


ONE_STEP = """
  - id: steps
    source: x
    says: y
    test: {kind: monotone, metric: prune/active_units, over: manifold_dim, direction: up, where: {arm: ae, l2: 0}}
  - id: differs
    source: x
    says: y
    test:
      kind: difference
      metric: prune/active_units
      where: {arm: ae, l2: 0, manifold_dim: 3}
      against: {manifold_dim: 2}
      direction: up
  - id: scattered
    source: x
    says: y
    test: {kind: bound, metric: prune/active_units, above: 0, where: {arm: vae, l2: 0, beta: 1, manifold_dim: 2}}
"""


@pytest.mark.parametrize("add", [0, 1], ids=["all agree", "one does not"])
def test_a_step_between_two_levels_of_a_count_is_as_certain_as_their_difference(tmp_path, add):
    study = read(tmp_path, STUDY + ONE_STEP.removeprefix("\n"))
    tables = measured(study)
    units = tables.cells["prune/active_units"] + add * (tables.cells["seed"] == 3) * (tables.cells["manifold_dim"] == 3)
    tables = tables._replace(cells=tables.cells.assign(**{"prune/active_units": units}))
    found = {entry.claim.id: entry for entry in ledger({"study": study}, {"study": tables})}
    assert found["steps"].p == pytest.approx(found["differs"].p) and 0 < found["steps"].p < LEVEL


def test_counts_that_scatter_are_not_undecided_for_being_counts(tmp_path):
    study = read(tmp_path, STUDY + ONE_STEP.removeprefix("\n"))
    tables = measured(study)
    units = tables.cells["prune/active_units"].where(tables.cells["seed"] != 3, 200)
    tables = tables._replace(cells=tables.cells.assign(**{"prune/active_units": units}))
    entry = next(entry for entry in ledger({"study": study}, {"study": tables}) if entry.claim.id == "scattered")
    assert (entry.verdict, entry.note) == ("undecided", "") and 0 < entry.floor < 1e-6


def test_values_of_sigma2_are_numbers_also_beside_learned(tmp_path):
    """As in a table that was read back, whose column then holds texts."""
    text = STUDY.replace("  l2: [0, 0.1]", '  l2: [0, 0.1]\n  sigma2: [0.1, 1, "learned"]')
    over = "over: sigma2, direction: up, where: {arm: vae, beta: 1, sigma2: [0.1, 1]}"
    study = read(tmp_path, text.replace("over: beta, direction: up", over))
    tables = measured(study)
    tables = tables._replace(cells=tables.cells.assign(sigma2=tables.cells["sigma2"].astype(str)))
    entry = next(entry for entry in ledger({"study": study}, {"study": tables}) if entry.claim.id == "rises")
    assert (entry.effect.seeds, entry.note) == (12, "")


def test_the_unit_is_the_seed(study):
    """Effect, interval and p are Student's, of one mean a seed."""
    tables = {"study": measured(study)}
    entry = next(entry for entry in ledger({"study": study}, tables) if entry.claim.id == "beats")
    cells = tables["study"].cells
    of_seed = [cells[rows].groupby("seed")["test/mse"].mean() for rows in (cells["beta"] == 0.1, cells["arm"] == "ae")]
    assert entry.p == pytest.approx(stats.ttest_rel(*of_seed).pvalue)
    assert entry.effect.mean == pytest.approx((of_seed[0] - of_seed[1]).mean()) and entry.effect.seeds == 12
    assert entry.corrected > entry.p


PERTURBATIONS = {
    "rises": lambda cells: cells.assign(**{"test/mse": cells["test/mse"].where(cells["beta"] != 10, 0.0)}),
    "beats": lambda cells: cells.assign(**{"test/mse": cells["test/mse"].where(cells["arm"] != "ae", 9.0)}),
    "units": lambda cells: cells.assign(**{"prune/active_units": cells["prune/active_units"] + 1}),
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_other_data_change_the_verdict(study, name):
    tables = measured(study)
    spoilt = {"study": tables._replace(cells=PERTURBATIONS[name](tables.cells))}
    assert verdicts(study, spoilt)[name] == "contradicted"


def test_what_has_not_converged_or_run_is_not_decided(study):
    tables = measured(study)
    spoilt = tables._replace(cells=tables.cells.assign(unconverged=(tables.cells["arm"] == "ae") & (tables.cells["seed"] == 3)))
    found = verdicts(study, {"study": spoilt})
    assert found["beats"] == "undecided" and found["rises"] == "supported" and found["other"] == "not run"
    assert set(verdicts(study, {}).values()) == {"not run"}


@pytest.mark.parametrize(
    ("others", "verdict", "note"),
    [({}, "not run", "twin"), ({"twin": None}, "undecided", "every cell of twin diverged or is missing")],
)
def test_what_a_claim_lacks_is_named(study, others, verdict, note):
    """A study that has not run is another thing than one of which no cell came to an end."""
    twin = study.model_copy(update={"claims": ()})
    entries = ledger({"study": study, "twin": twin}, {"study": measured(study), **others})
    entry = next(entry for entry in entries if entry.claim.id == "other")
    assert (entry.verdict, entry.note) == (verdict, note)


@pytest.mark.parametrize(
    "lost", [lambda cells: cells["seed"] == 3, lambda cells: cells["beta"] == 10, lambda cells: cells.index == 0]
)
def test_lost_cells_decide_nothing_and_are_said(study, lost):
    """A claim about the survivors would be another claim, be it one seed, one level or one cell that is gone."""
    tables = measured(study)
    left = {"study": tables._replace(cells=tables.cells[~lost(tables.cells)])}
    entry = next(entry for entry in ledger({"study": study}, left) if entry.claim.id == "rises")
    assert entry.verdict == "undecided" and "cells diverged or are missing" in entry.note


def test_a_metric_that_a_study_does_not_measure_is_undecided_and_said(study):
    tables = measured(study)
    bare = {"study": tables._replace(cells=tables.cells.drop(columns="test/mse"))}
    entries = {entry.claim.id: entry for entry in ledger({"study": study}, bare)}
    assert entries["rises"].verdict == "undecided" and "not measured" in entries["rises"].note


MISTAKES = [
    (
        "metric: test/mse, over",
        "metric: test/mes, over",
        "claims.0 (rises): there is no metric 'test/mes' (did you mean 'test/mse'?)",
    ),
    (
        "over: beta",
        "over: sigma2",
        "axis 'sigma2' must have at least 2 values for a test of kind 'monotone', but got only [1.0]",
    ),
    ("over: beta", "over: bata", "got no such axis (did you mean 'beta'?)"),
    (
        "arm: vae, beta: 0.1",
        "arm: vae, beta: 0.2",
        "claims.2 (beats): axis 'beta' has the values [0.1, 1.0, 10.0], but got 0.2",
    ),
    ("against: {arm: ae}", "against: {arm: kl_only}", "axis 'arm' has the values ['vae', 'ae'], but got 'kl_only'"),
    ("against: {arm: ae}", "against: {arm: vae}", "must choose other cells than `where`, but two sides share some"),
    ("over: beta, direction: up", "over: beta, direction: up, where: {arm: ae, beta: 1}", "arm 'ae' has no axis 'beta'"),
    ("over: beta", "over: seed", "axis 'seed' must have at least 2 values"),
    ("over: beta, direction: up", "over: beta, direction: up, where: {beta: 1}", "but got only [1.0]"),
    ("over: beta, direction: up", "over: beta, direction: up, where: {arm: ae}", "but got only []"),
    ("metric: noise/mse_clean", "metric: [noise/mse_clean, test/mse]", "metrics under noise and others do not mix"),
    ("evaluate: {noise: [{kind: gaussian, levels: [0, 0.5]}]}", "evaluate: {}", "the study has no evaluate.noise"),
    ("level: 0.5", "level: 0.7", "axis 'level' has the values [0.0, 0.5], but got 0.7"),
    ("study: twin", "study: twi", "there is no config 'twi' (did you mean 'twin'?)"),
    ("id: falls", "id: rises", "no claim id may stand twice"),
    ("kind: count", "kind: cuont", "test.kind: must be one of monotone, "),
    (
        "base: {level: 0}",
        "base: {level: 0.5}",
        "claims.6 (steadier): `against` and `base` must choose other cells than `where`",
    ),
    ("base: {level: 0}", "base: {levle: 0}", "there is no axis 'levle' (did you mean 'level'?)"),
    ("margin: 1", "margin: -1", "claims.5.test.margin: Input should be greater than 0, but got -1"),
    ("margin: 1", "margn: 1", "claims.5.test.margn: unknown key"),
    ("direction: down", "direction: sideways", "claims.1.test.direction: Input should be 'up' or 'down', but got 'sideways'"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES)
def test_a_bad_claim_is_refused_when_the_file_is_read(tmp_path, right, wrong, message):
    with pytest.raises(config.ConfigError) as caught:
        read(tmp_path, STUDY.replace(right, wrong, 1))
    assert message in str(caught.value) and "\n" not in str(caught.value)


NULL = """
title: Nothing is true
data: {name: uniform2d}
model: {hidden: [8], likelihood: gaussian}
grid: {latent_dim: [2], seed: [0, 1, 2, 3, 4, 5], arms: {vae: {beta: [0.1, 1, 10]}, ae: {}}}
train: {updates: 100}
evaluate: {}
claims:
  - {id: a, source: x, says: y, test: {kind: monotone, metric: test/mse, over: beta, direction: up}}
  - {id: b, source: x, says: y, test: {kind: interior_optimum, metric: test/mse, over: beta, direction: down}}
  - {id: c, source: x, says: y, test: {kind: bound, metric: test/mse, above: 0, where: {arm: ae}}}
  - id: d
    source: x
    says: y
    test: {kind: difference, metric: test/mse, where: {arm: vae}, against: {arm: ae}, direction: up}
  - id: e
    source: x
    says: y
    test: {kind: difference, metric: test/mse, where: {arm: vae, beta: 1}, against: {beta: 10}, direction: down}
"""


def test_a_ledger_of_null_tables_decides_anything_in_at_most_one_of_twenty(tmp_path):
    """From tables to verdicts: cells are independent draws from N(0, 1), and no more than 5% of ledgers may decide any."""
    study, generator, rounds = read(tmp_path, NULL), np.random.default_rng(2), 150
    cells = pd.DataFrame([{"cell_id": str(n), **cell.row(), "unconverged": False} for n, cell in enumerate(grid.cells(study))])
    wrong = 0
    for _ in range(rounds):
        drawn = cells.assign(**{"test/mse": generator.standard_normal(len(cells))})
        wrong += set(verdicts(study, {"study": Measured(drawn, cells.iloc[:0])}).values()) != {"undecided"}
    assert wrong / rounds <= LEVEL
