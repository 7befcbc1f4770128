"""A search's objectives: which data they are taken of, and that they are what evaluation gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_evaluation import make_data
from tiny import SEARCH, drive, write

from pipeline.artifacts import TrainedStack
from pipeline.config import Evaluate
from pipeline.evaluation import Measured, Reference, measured, noise_curves
from pipeline.goals import Judge
from pipeline.measures import MEASURES
from pipeline.model import StackedAutoencoder
from pipeline.searches import Goal
from pipeline.stages import search
from pipeline.storages import SearchError

COLUMNS = ("mse_clean", "mse_noisy", "left", "rise")


def goal(metric: str, **more) -> Goal:
    return Goal(metric=metric, **({"direction": "down"} | more))


CLEAN = [
    goal(name.replace("test/", "validation/")) for name in MEASURES if not name.startswith(("noise/", "matched/", "prune/"))
]
NOISY = [
    goal(f"noise/{column}", noise=kind, level=level)
    for column in COLUMNS
    for kind in ("gaussian", "salt_and_pepper")
    for level in (0.1, 0.5)
]
ALL = CLEAN + NOISY


def without(data, split: str):
    """The same data, a split of which gives no number."""
    return replace(data, x={**data.x, split: [torch.full_like(rows, math.nan) for rows in data.x[split]]})


def seen_as_test(data, split: str):
    """The same data, whose test set is another split."""
    return replace(data, **{part: {**getattr(data, part), "test": getattr(data, part)[split]} for part in ("x", "labels")})


def structured(**options):
    """Made data in which a few updates find something, with classes of their own in each split."""
    data, generator = make_data(**options), torch.Generator().manual_seed(5)
    turn = torch.randn(2, data.features, generator=generator)
    x = {split: [0.5 + 0.45 * (torch.randn(80, 2, generator=generator) @ turn).sin()] for split in data.x}
    x = {split: [rows.round() for rows in parts] for split, parts in x.items()} if data.binarise != "none" else x
    labels = {split: [data.labels[split][0][torch.randperm(80, generator=generator)]] for split in x}
    return replace(data, x=x, labels=labels)


@pytest.fixture
def make_stack(make_cell):
    """Cells that were trained a little, without a bottleneck's noise."""

    def make(data, *cells) -> TrainedStack:
        cells = [make_cell(**{"model": {"hidden": (8,)}, **cell}) for cell in cells]
        model = StackedAutoencoder(cells, data.features).initialise()
        for row in range(len(cells)):
            module, x = model.cell(row), data.x["train"][0]
            optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
            for _ in range(40):
                optimiser.zero_grad()
                (module(x) - x).square().mean().backward()
                optimiser.step()
            model.load_cell(row, module.state_dict())
        return TrainedStack([f"cell {row}" for row in range(len(cells))], model, 0)

    return make


DATA = {
    "grey images": {"features": 16, "image_shape": (4, 4)},
    "black and white": {"features": 16, "image_shape": (4, 4), "binarise": "fixed"},
    "the plane": {"features": 2, "unit_range": False},
}
CELLS = ({}, {"beta": 4.0, "seed": 3}, {"latent_dim": 1, "seed": 1}, {"arm": "ae", "seed": 2})


@pytest.fixture(params=DATA)
def case(request, make_stack):
    """Data, and cells on it."""
    data = structured(**DATA[request.param])
    model = {"hidden": (8,), "likelihood": "gaussian" if request.param == "the plane" else "bernoulli"}
    return data, make_stack(data, *({"model": model, **cell} for cell in CELLS))


def taken(data, stack, goals=ALL, *held_out) -> dict[str, list]:
    """Values by the goal's name, one a cell."""
    values = Judge(data, goals, *held_out).values([stack])
    return {goal.name: list(column) for goal, column in zip(goals, zip(*values.values(), strict=True), strict=True)}


def evaluated(data, stack) -> dict[str, list]:
    """What evaluation gives of the test set, under the goals' names."""
    found = measured(Measured(stack, Reference(data, 0, Evaluate())))
    names = {goal.name: found[goal.measure] for goal in CLEAN}
    for goal in NOISY:
        ((kind, level, columns),) = noise_curves(Measured(stack, Reference(data, 0, goal.evaluate)))
        assert (kind, level) == (goal.noise, goal.level)
        names[goal.name] = columns[goal.metric.removeprefix("noise/")]
    return names


def numbers(values: list) -> list[float]:
    """What a cell has not is NaN."""
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]


def test_objectives_are_what_evaluation_gives_of_the_validation_data(case):
    data, stack = case
    found, wanted = taken(data, stack), evaluated(seen_as_test(data, "validation"), stack)
    for name, values in wanted.items():
        assert numbers(found[name]) == pytest.approx(numbers(values), rel=1e-5, nan_ok=True), name
    assert sum(value is not None for values in found.values() for value in values) > len(found) * len(CELLS) / 2


@pytest.mark.parametrize("held_out", [(), ("test",)], ids=["validation", "test"])
def test_no_objective_sees_the_other_split(case, held_out):
    data, stack = case
    ours, other = ("test", "validation") if held_out else ("validation", "test")
    found = taken(data, stack, ALL, *held_out)
    assert taken(without(data, other), stack, ALL, *held_out) == found
    assert all(value is not None for value in found["validation/reconstruction"])
    assert set(taken(without(data, ours), stack, [goal("validation/mse")], *held_out)["validation/mse"]) == {None}


def test_a_bound_and_a_score_are_each_of_the_data_that_have_them(make_stack):
    bound, score = goal("validation/iw_bound", direction="up"), goal("validation/bce_elbo", direction="up")
    for binarise, there, absent in (("none", score, bound), ("fixed", bound, score)):
        data = structured(binarise=binarise)
        stack = make_stack(data, {}, {"arm": "ae"})
        found = taken(data, stack, [bound, score])
        reference = Reference(seen_as_test(data, "validation"), 0, Evaluate())
        values = measured(Measured(stack, reference))[there.measure]
        assert found[there.name] == [pytest.approx(values[0]), None] and values[0] < 0
        assert found[absent.name] == [None, None]


def test_a_target_is_the_distance_from_it_on_either_side(make_stack):
    data = structured()
    stack = make_stack(data, {}, {"seed": 1})
    (first, second) = taken(data, stack, [goal("validation/kl")])["validation/kl"]
    middle = (first + second) / 2
    budget = Goal(metric="validation/kl", target=middle)
    (found,) = taken(data, stack, [budget]).values()
    assert found == [pytest.approx(abs(first - middle)), pytest.approx(abs(second - middle))]
    assert min(found) > 0 and not budget.maximised
    noisy = Goal(metric="noise/mse_clean", noise="gaussian", level=0.3, target=1.0)
    plain = goal("noise/mse_clean", noise="gaussian", level=0.3)
    (distances, errors) = taken(data, stack, [noisy, plain]).values()
    assert distances == [pytest.approx(1 - error) for error in errors]


def test_each_objective_under_noise_has_its_own_kind_level_and_column(case):
    data, stack = case
    found = taken(data, stack, NOISY)
    columns = {name: tuple(values) for name, values in found.items()}
    assert len(columns) == len(NOISY)
    for column in COLUMNS:
        ours = [values for name, values in columns.items() if name.startswith(f"noise/{column} ")]
        assert len(set(ours)) == 4, column


def test_a_value_does_not_depend_on_the_neighbours_of_its_cell(make_stack):
    data = structured()
    cells = [{}, {"beta": 4.0, "seed": 3}, {"seed": 1}]
    whole = Judge(data, [goal("validation/mse"), goal("validation/kl")]).values([make_stack(data, *cells)])
    pair = Judge(data, [goal("validation/mse"), goal("validation/kl")]).values([make_stack(data, *cells[:2])])
    assert pair == {key: whole[key] for key in pair}


@pytest.mark.parametrize(
    ("metric", "data", "cell", "lacks"),
    [
        ("validation/knn_accuracy", {"names": None}, {}, True),
        ("validation/knn_accuracy", {}, {}, False),
        ("validation/sharpness", {}, {}, True),
        ("validation/sharpness", {"features": 16, "image_shape": (4, 4)}, {}, False),
        ("validation/near_0", {"unit_range": False}, {}, True),
        ("validation/near_0", {}, {}, False),
        ("validation/iw_bound", {}, {}, True),
        ("validation/iw_bound", {"binarise": "fixed"}, {}, False),
        ("validation/kl", {}, {"arm": "ae"}, True),
        ("validation/kl", {}, {}, False),
    ],
)
def test_what_data_or_an_arm_lack_is_told(make_cell, metric, data, cell, lacks):
    asked = [goal("validation/mse"), goal(metric)]
    lacking = Judge(make_data(**data), asked).lacking(make_cell(**cell))
    assert lacking == (asked[1:] if lacks else [])


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("validation/kl,", "validation/elbo,", "objectives: arm 'vae' on 'digits5k' has no validation/elbo"),
        ("validation/kl,", "decoder/folds,", "objectives: arm 'vae' on 'digits5k' has no decoder/folds"),
        ("validation/bce_elbo", "validation/iw_bound", "winner.goal: arm 'vae' on 'digits5k' has no validation/iw_bound"),
        ("  beta:", "  arm: {values: [vae, ae]}\n  beta:", "objectives: arm 'ae' on 'digits5k' has no validation/kl"),
    ],
)
def test_a_search_by_a_measure_that_data_or_an_arm_lack_is_refused_in_one_line(workspace, right, wrong, told):
    write(SEARCH.replace(right, wrong), "hunt")
    with pytest.raises(SearchError) as error:
        search.run("hunt", drive)
    assert str(error.value) == f"configs/hunt.yaml: {told}"
