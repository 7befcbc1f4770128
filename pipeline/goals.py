"""What a search's objectives are of trained cells: measures of the weights that they kept, on validation or on test data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pipeline.artifacts import Prepared, TrainedStack
from pipeline.config import Evaluate
from pipeline.evaluation import Measured, Reference, measured_one, noise_curves
from pipeline.grid import Cell
from pipeline.measures import MEASURES
from pipeline.mlp import one_thread
from pipeline.model import StackedAutoencoder
from pipeline.searches import Goal

Values = dict[str, list[float | None]]
"""By cell one value a goal, in the unit of its measure or as the distance from its target; None where a cell has none."""


class Judge:
    """Takes goals of stacks of cells that saw one dataset."""

    def __init__(self, data: Prepared, goals: Sequence[Goal], held_out: Literal["test", "validation"] = "validation"):
        self.goals, self.features, self.device = goals, data.features, str(data.x["train"][0].device)
        self.references: Mapping[Evaluate, Reference] = {
            evaluate: Reference(data, 0, evaluate, held_out) for evaluate in {goal.evaluate for goal in goals}
        }

    def lacking(self, cell: Cell) -> list[Goal]:
        """Goals that no such cell has, as an untrained one shows; not those that only a trained one can have."""
        model = StackedAutoencoder([cell, cell], self.features, self.device).initialise()
        values = self.values([TrainedStack(["untrained"] * 2, model, 0)])["untrained"]
        lacking = [goal for goal, value in zip(self.goals, values, strict=True) if value is None]
        return [goal for goal in lacking if not MEASURES[goal.measure].learned]

    def values(self, stacks: Iterable[TrainedStack]) -> Values:
        """A cell's values do not depend on its neighbours, as in training."""
        found: Values = {}
        with one_thread():
            for trained in stacks:
                measured = {evaluate: Measured(trained, reference) for evaluate, reference in self.references.items()}
                columns = [_taken(measured[goal.evaluate], goal) for goal in self.goals]
                found |= {key: list(row) for key, *row in zip(trained.keys, *columns, strict=True)}
        return found


def _taken(stack: Measured, goal: Goal) -> list[float | None]:
    """One value a cell."""
    if goal.noise:
        ((_, _, columns),) = noise_curves(stack)
        values = columns[goal.metric.removeprefix("noise/")]
    else:
        values = measured_one(stack, goal.measure)
    return [_reached(value, goal.target) for value in values]


def _reached(value: float | None, target: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value if target is None else abs(value - target)
