"""Successive halving of a batch of trials that train in lockstep: where its rungs are, and who goes on. Knows no torch.

Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016. With two objectives,
trials rank by non-dominated sorting and crowding distance: Deb et al., "NSGA-II", 2002.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Point = Sequence[float]
"""One value an objective, all to be minimised."""


def rung_updates(shares: Sequence[float], points: Sequence[int]) -> list[int]:
    """The history points nearest to shares of the budget, which the last point ends; each once, and the last is no rung."""
    found = [min(points, key=lambda point: abs(point - share * points[-1])) for share in shares]
    return [update for update in dict.fromkeys(found) if update < points[-1]]


def costs(size: int, factor: int, rungs: Sequence[int]) -> list[int]:
    """Updates that a batch takes up to each rung and, last, to its end, if no trial leaves for another reason."""
    steps = (update - before for before, update in itertools.pairwise([0, *rungs]))
    return [finishing(size, factor, number) * step for number, step in enumerate(steps)]


def finishing(size: int, factor: int, rungs: int) -> int:
    """How many of a batch go on after so many rungs, if none leaves for another reason."""
    return size if rungs == 0 else finishing(math.ceil(size / factor), factor, rungs - 1)


def survivors(values: Sequence[Point], factor: int) -> list[int]:
    """Which of the trials go on: one in `factor`, rounded up, the best by rank; of equal ones the first."""
    count = math.ceil(len(values) / factor)
    return sorted(ranked(values)[:count])


def ranked(values: Sequence[Point]) -> list[int]:
    """Trials from best to worst: of one objective by value, of several by front, and within a front the less crowded first."""
    order: list[int] = []
    for front in fronts(values):
        crowding = _crowding([values[index] for index in front])
        order += [index for _, index in sorted(zip((-distance for distance in crowding), front, strict=True))]
    return order


def fronts(values: Sequence[Point]) -> list[list[int]]:
    """Trials that no other dominates; those that only these dominate; and so on."""
    if not values:
        return []
    points = np.asarray(values, dtype=float)
    one, other = points[:, None], points[None]
    dominates = (one <= other).all(axis=-1) & (one < other).any(axis=-1)
    left, found = np.ones(len(points), dtype=bool), []
    while left.any():
        front = left & ~dominates[left].any(axis=0)
        found.append(np.flatnonzero(front).tolist())
        left &= ~front
    return found


def _crowding(front: Sequence[Point]) -> list[float]:
    """For each trial of a front the sum over objectives of how far apart its neighbours lie; its ends are never crowded."""
    distances = [0.0] * len(front)
    for values in zip(*front, strict=True):
        order = sorted(range(len(front)), key=values.__getitem__)
        span = values[order[-1]] - values[order[0]]
        if not span:
            continue  # equal trials: none is an end
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, index, after in zip(order, order[1:], order[2:], strict=False):
            distances[index] += (values[after] - values[before]) / span
    return distances
