"""A search's file: every mistake is one clear line, and the sampler's grid is the product of what varies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load_study
from pipeline.searches import load_search

STUDY = """
title: A study
data: {name: uniform2d}
model: {hidden: [8], likelihood: gaussian}
grid: {latent_dim: [1, 2], arms: {vae: {beta: [0.5, 1]}}}
train: {updates: 100}
evaluate: {}
"""
SEARCH = """
title: A search
study: study
space:
  beta: {low: 0.1, high: 4}
  latent_dim: {low: 1, high: 8}
objectives:
  - {metric: validation/elbo, direction: up}
sampler: {kind: tpe, seed: 0}
trials: 12
batch: 4
rungs: [0.25, 0.5]
halving: 2
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
        (tmp_path / "search.yaml").write_text(text, encoding="utf-8")
        return load_search("search", tmp_path)[0]

    return load


HALVED = "rungs: [0.25, 0.5]\nhalving: 2\n"
ELBO = "  - {metric: validation/elbo, direction: up}"
TWO = "  - {metric: validation/mse, direction: down}\n  - {metric: validation/kl, direction: down}"
MISTAKES = [
    ("space:", "space:\n  arm: ae", "space: beta: arm 'ae' has none, so it cannot be varied"),
    ("trials: 12", 'trials: 12\nstorage: "postgresql://me:secret@host/x"', "storage: must hold no password: `OPTUNA_STORAGE`"),
    ("low: 0.1, high: 4", "low: 4, high: 0.1", "space.beta: `low < high` must hold, but got (low=4, high=0.1)"),
    ("low: 0.1, high: 4", "low: 4, high: 4", "space.beta: `low < high` must hold, but got (low=4, high=4)"),
    ("low: 0.1, high: 4", "low: 0, high: 4", "space.beta: a log-uniform range must begin above 0, but got low=0"),
    ("low: 0.1, high: 4", "low: 0.1", "space.beta: either `low` and `high` must be given, or `values`"),
    ("low: 0.1, high: 4", "values: []", "space.beta.values: must have a value"),
    ("low: 1, high: 8", "low: 1.5, high: 8", "space: latent_dim: Input should be a valid integer"),
    ("  beta:", "  arm: vea\n  beta:", "space: arm: Input should be 'vae'"),
    ("space:", "spaec:", "spaec: unknown key (did you mean 'space'?)"),
    (
        "validation/elbo",
        "validation/elbow",
        "there is no metric 'validation/elbow' to search by (did you mean 'validation/elbo'?)",
    ),
    ("validation/elbo", "test/elbo", "a search never sees the test set: 'validation/elbo', not 'test/elbo'"),
    (", direction: up", "", "'validation/elbo' needs either `direction` (up or down) or `target`"),
    ("direction: up", "direction: up, target: 3", "'validation/elbo' needs either `direction` (up or down) or `target`"),
    ("validation/elbo", "noise/mse_clean", "metrics of group 'noise', and they alone, need `noise` and `level`"),
    (ELBO, TWO, "winner.goal: with two objectives it must say what chooses among finished trials"),
    (ELBO, f"{ELBO}\n{ELBO}", "objectives: no objective may stand twice"),
    (HALVED, "rungs: [0.5, 0.25]\nhalving: 2\n", "rungs must rise, but got [0.5, 0.25]"),
    (HALVED, "rungs: [0.5]\n", "rungs are where `halving` or `pruner` let trials leave: neither stands without the other"),
    (HALVED, "halving: 2\n", "rungs are where `halving` or `pruner` let trials leave: neither stands without the other"),
    ("halving: 2", "halving: 1", "halving: Input should be greater than or equal to 2, but got 1"),
    ("kind: tpe", "kind: tpe, points: 3", "sampler: points: only the sampler 'grid' has them, but got kind 'tpe'"),
    ("kind: tpe", "kind: gp", "sampler: 'gp' learns from trials that reach the end, of which `halving` leaves few"),
    ("kind: tpe", "kind: grid, points: 100000", "sampler: its grid may have 10000000000 points, at most 20000 are allowed"),
    ("kind: tpe", "kind: cmaes", "sampler.kind: Input should be 'tpe'"),
    (
        "trials: 12",
        "trials: 12\nseed: 3",
        "winner: `validation_seeds` and `test_seeds` must be others than `seed` and each other, but share 3",
    ),
    ("trials: 12", "trials: 0", "trials: Input should be greater than 0, but got 0"),
    ("study: study", "study: studdy", "there is no"),
    ("study: study", "data: {name: uniform2d}", "`study` must name a study, or `model` be given in place"),
    ("study: study", "study: study\ndata: {name: uniform2d}", "`study` names data and network, so neither"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_names_it(load, right, wrong, message):
    assert right in SEARCH
    with pytest.raises(ConfigError) as error:
        load(SEARCH.replace(right, wrong))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pruner_compares_one_objective(load):
    text = SEARCH.replace(ELBO, TWO + "\nwinner:\n  goal: {metric: validation/elbo, direction: up}")
    load(text)
    with pytest.raises(ConfigError, match="pruner: 'median' compares one objective, but got two; `halving` ranks both"):
        load(text.replace("halving: 2", "pruner: {kind: median}"))


def test_samplers_are_asked_only_for_what_they_can(load):
    listed = SEARCH.replace("low: 0.1, high: 4", "values: [0.1, 4]")
    with pytest.raises(ConfigError, match=r"'qmc' covers ranges, but space\.beta is a list"):
        load(listed.replace("kind: tpe", "kind: qmc"))
    with pytest.raises(ConfigError, match="the sampler's grid has 10 points, but got 12"):
        load(listed.replace("kind: tpe", "kind: grid"))
    with pytest.raises(ConfigError, match="some setting must have a range or several values"):
        load(SEARCH.replace("{low: 0.1, high: 4}", "1").replace("{low: 1, high: 8}", "2"))


def test_a_bernoulli_likelihood_has_no_variance_to_search(load):
    text = SEARCH.replace("space:", "space:\n  sigma2: {low: 0.1, high: 1}")
    load(text)
    own = "data: {name: digits5k}\nmodel: {hidden: [8], likelihood: bernoulli}\ntrain: {updates: 100}"
    with pytest.raises(ConfigError, match=r"space\.sigma2: a Bernoulli likelihood has no σ²"):
        load(text.replace("study: study", own))


def test_a_variance_that_is_learned_lies_in_no_range(load):
    space = load(SEARCH.replace("space:", "space:\n  sigma2: {low: 0.1, high: 1}")).space
    assert 0.5 in space.sigma2 and "learned" not in space.sigma2 and None not in space.sigma2
    listed = load(SEARCH.replace("space:", "space:\n  sigma2: {values: [1, learned]}")).space.sigma2
    assert [listed.index(value) for value in (1.0, "1.0", 1, "learned")] == [0, 0, 0, 1]


def test_the_samplers_grid_is_the_product_of_what_varies(load):
    text = SEARCH.replace("kind: tpe", "kind: grid, points: 3").replace("trials: 12", "trials: 9")
    points = load(text).grid()
    assert len(points) == 9
    assert {point["latent_dim"] for point in points} == {1, 3, 8}
    assert [round(point["beta"], 6) for point in points[::3]] == [0.1, round(0.4**0.5, 6), 4.0]


def test_the_samplers_grid_ends_where_the_range_does(load):
    """13 * (57 / 13) is more than 57."""
    text = SEARCH.replace("kind: tpe", "kind: grid, points: 3").replace("trials: 12", "trials: 9")
    points = load(text.replace("low: 0.1, high: 4", "low: 13, high: 57")).grid()
    assert max(point["beta"] for point in points) == 57


def test_an_arm_without_a_penalty_stands_once_in_the_grid(load):
    text = SEARCH.replace("kind: tpe", "kind: grid, points: 3").replace("space:", "space:\n  arm: {values: [vae, ae]}")
    points = load(text).grid()
    assert len([point for point in points if point["arm"] == "vae"]) == 9
    assert [point for point in points if point["arm"] == "ae"] == [{"arm": "ae", "latent_dim": dim} for dim in (1, 3, 8)]


def test_the_readmes_examples_are_files_that_can_be_read(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"```yaml\n# configs/(\w+)\.yaml\n(.*?)```", readme, re.DOTALL))
    for name, text in examples.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    assert load_study("mine", tmp_path).claims
    assert load_search("mine_best", tmp_path)[0].halving == 2
