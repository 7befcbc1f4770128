"""From a study to its cells, and from cells to the stacks that train together. Knows no torch."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.config import ARMS, Arm, Data, Model, Study, Train

ENGINE_VERSION = 5  # raise it when a change alters a cell's numbers, or old cells are silently reused


@dataclass(frozen=True)
class Runtime:
    """What besides its config decides the bits of a cell's result."""

    device: str
    torch: str
    precision: str = "float32"


@dataclass(frozen=True)
class Cell:
    """One point of a study's grid: one trained model, one MLflow run.

    `beta` and `anneal` are None for an arm without penalty, `sigma2` for a Bernoulli likelihood. `dataset` indexes the
    study's prepared datasets; `data` holds the values of its data axes.
    """

    arm_name: str
    beta: float | None
    latent_dim: int
    l2: float
    sigma2: float | str | None
    learning_rate: float
    seed: int
    dataset: int
    model: Model
    train: Train
    data: dict[str, Any] = field(default_factory=dict)
    anneal: float | None = 0.0
    train_noise: float = 0.0

    @property
    def arm(self) -> Arm:
        return ARMS[self.arm_name]

    @property
    def held(self) -> bool:
        """Whether the prior holds the scale and origin of the cell's code, which are arbitrary otherwise."""
        return self.arm.variational and self.beta > 0

    @property
    def lanes(self) -> int:
        """Latent lanes that the cell occupies in a stack: the next power of two, at least 2.

        Matrix kernels round differently for different widths, so cells share a stack only at equal `lanes`; a cell's
        numbers then do not depend on the widest latent beside it.
        """
        return max(2, 2 ** math.ceil(math.log2(self.latent_dim)))

    def row(self) -> dict[str, Any]:
        """The cell's values under the names that every table uses."""
        return {
            "arm": self.arm_name,
            **self.data,
            "latent_dim": self.latent_dim,
            "beta": self.beta,
            "anneal": self.anneal,
            "l2": self.l2,
            "sigma2": self.sigma2,
            "train_noise": self.train_noise,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


AXES = ("latent_dim", "beta", "anneal", "l2", "sigma2", "train_noise", "learning_rate")
"""Columns of `Cell.row` that, with the arm and the data axes, tell settings apart; `seed` repeats them."""


def cells(study: Study) -> list[Cell]:
    """The product of the axes that each arm has, in the order of the file."""
    grid, found = study.grid, []
    sigma2 = grid.sigma2 if study.model.likelihood == "gaussian" else (None,)
    for name, axes in grid.arms.items():
        penalised = ARMS[name].penalty != "none"
        points = itertools.product(
            enumerate(data_points(study.data)),
            grid.latent_dim,
            axes.beta if penalised else (None,),
            axes.anneal if penalised else (None,),
            grid.l2,
            sigma2,
            grid.train_noise,
            grid.learning_rate,
            grid.seed,
        )
        for (index, data), latent_dim, beta, anneal, l2, variance, noise, rate, seed in points:
            cell = Cell(name, beta, latent_dim, l2, variance, rate, seed, index, study.model, study.train, data, anneal, noise)
            found.append(cell)
    return found


def data_points(data: Data) -> list[dict[str, Any]]:
    """One mapping of axis to value for each dataset of a study; one empty mapping without data axes."""
    return [dict(zip(data.axes, values, strict=True)) for values in itertools.product(*data.axes.values())]


def cell_id(cell: Cell, data_hash: str, runtime: Runtime) -> str:
    """Names a cell by everything that decides its result: 16 hexadecimal digits."""
    recipe = {
        # The data's hash says what the data's axes say, and says it for shared datasets too.
        **{axis: value for axis, value in cell.row().items() if axis not in cell.data},
        "model": cell.model.model_dump(mode="json"),
        "train": cell.train.model_dump(mode="json"),
        "data_hash": data_hash,
        "engine": ENGINE_VERSION,
        **asdict(runtime),
    }
    if not cell.train_noise:  # what kind of noise there would be is then no matter
        recipe["train"].pop("noise", None)
    recipe["device"] = runtime.device.split(":")[0]
    recipe["torch"] = ".".join(runtime.torch.split(".")[:2])
    return hashlib.sha256(json.dumps(_normalised(recipe), sort_keys=True).encode()).hexdigest()[:16]


def identify(cells: Iterable[Cell], data_hashes: Sequence[str], runtime: Runtime) -> dict[str, Cell]:
    """Cells by their ids, in order; `data_hashes` has one item a dataset of the study."""
    return {cell_id(cell, data_hashes[cell.dataset], runtime): cell for cell in cells}


def _normalised(value: Any) -> Any:
    """`1`, `1.0` and `1e0` are one number."""
    if isinstance(value, dict):
        return {key: _normalised(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normalised(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    return value


def stacks(wanted: Mapping[str, Cell], size: int) -> list[list[str]]:
    """Ids of cells that may share a stack, in balanced stacks of at most `size`, larger ones first.

    Equal learning rates and λ stand side by side, because the optimiser steps such runs of cells in one call.
    """

    def shape(key: str) -> tuple:
        cell = wanted[key]
        return cell.lanes, _text(cell.model), _text(cell.train)

    ordered = sorted(wanted, key=lambda key: (*shape(key), wanted[key].learning_rate, wanted[key].l2))
    return [stack for _, group in itertools.groupby(ordered, key=shape) for stack in balanced(list(group), size)]


@functools.cache
def _text(config: Model | Train) -> str:
    """Cells share their configs, of which there are few."""
    return config.model_dump_json()


def balanced(group: Sequence[str], size: int) -> Iterator[list[str]]:
    """Splits a group into the fewest runs of at most `size`, whose lengths differ by at most one."""
    count = math.ceil(len(group) / size)
    small, larger = divmod(len(group), count)
    start = 0
    for index in range(count):
        stop = start + small + (index < larger)
        yield list(group[start:stop])
        start = stop


def layer_shapes(model: Model, features: int, latent_dim: int) -> list[tuple[int, int]]:
    """(in, out) of one cell's layers, encoder before decoder; means and log-variances come from one layer."""
    encoder = [features, *model.hidden]
    return [*itertools.pairwise(encoder), (encoder[-1], 2 * latent_dim), *itertools.pairwise([latent_dim, *reversed(encoder)])]


def parameter_count(model: Model, features: int, latent_dim: int) -> int:
    """Weights and biases of one cell."""
    return sum(fan_in * fan_out + model.bias * fan_out for fan_in, fan_out in layer_shapes(model, features, latent_dim))
