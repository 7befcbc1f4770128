"""A search and its parts: one YAML in `configs/`, frozen and strict models, and one clear line for every mistake."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config import (
    ARMS,
    CONFIG_FOLDER,
    MAX_CELLS,
    PARAMS_FILE,
    ConfigError,
    Count,
    Data,
    Direction,
    Evaluate,
    Grid,
    Level,
    Model,
    Name,
    Noise,
    NoiseName,
    Scalar,
    Seed,
    Settings,
    Strict,
    Study,
    Train,
    axis,
    config_path,
    exact,
    load_strict,
    load_study,
    nearest,
    text,
)
from pipeline.databases import without_password
from pipeline.measures import MEASURES

HELD_OUT = "validation/"  # what a search calls the measures of group `test/`: it takes all measures on the validation set


class Axis(Strict):
    """The values of one setting: a range, log-uniform unless `log` is false, or a list; a lone value is a list of one."""

    low: float | None = None
    high: float | None = None
    log: bool = True
    values: axis(Scalar) | None = None

    @model_validator(mode="before")
    @classmethod
    def _lone_value(cls, given: Any) -> Any:
        if isinstance(given, (bool, int, float, str)):
            return {"values": (given,)}
        if isinstance(given, dict) and isinstance(given.get("values"), list):  # no longer JSON, in which lists are tuples
            return {**given, "values": tuple(given["values"])}
        return given

    @model_validator(mode="after")
    def _a_range_or_a_list(self) -> Axis:
        if (self.low is None) != (self.high is None) or (self.low is None) == (self.values is None):
            raise ValueError("either `low` and `high` must be given, or `values`")
        if self.low is not None and not self.low < self.high:
            raise ValueError(f"`low < high` must hold, but got (low={self.low:g}, high={self.high:g})")
        if self.low is not None and self.log and self.low <= 0:
            raise ValueError(f"a log-uniform range must begin above 0, but got low={self.low:g}; `log: false` makes it uniform")
        return self

    @property
    def corners(self) -> tuple[Scalar, ...]:
        """Values between which, or among which, all others lie."""
        return self.values if self.values is not None else (self.low, self.high)

    @property
    def fixed(self) -> bool:
        return self.values is not None and len(self.values) == 1

    def __contains__(self, value: Scalar | None) -> bool:
        if self.values is not None:
            return value in self.values
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def index(self, value: Scalar) -> int:
        """The place of a value of the list, which a table may have made a text."""
        return list(map(exact, self.values)).index(exact(value))


class Space(Strict):
    """What the search varies, and what it keeps fixed. An arm without a penalty has no β."""

    arm: Axis = Axis(values=("vae",))
    beta: Axis = Axis(values=(1.0,))
    latent_dim: Axis
    l2: Axis = Axis(values=(0.0,))
    sigma2: Axis | None = Field(None, description="of a Gaussian likelihood, where it is 1 if not given")
    learning_rate: Axis = Axis(values=(1e-3,))

    @model_validator(mode="after")
    def _such_as_a_grid_has(self) -> Space:
        """The rules for a grid's values are those for the space's corners."""
        corners = {name: item.corners for name, item in self if isinstance(item, Axis)}
        penalised = [arm for arm in corners["arm"] if arm in ARMS and ARMS[arm].penalty != "none"]
        arms = {arm: {"beta": corners["beta"]} if arm in penalised else {} for arm in map(str, corners.pop("arm"))}
        shared = {name: tuple(map(_whole, values)) for name, values in corners.items() if name != "beta"}
        try:
            Grid(**shared, arms=arms)
        except ValidationError as error:
            first = error.errors()[0]
            name = next((name for name in (*corners, "beta") if name in first["loc"]), "arm")
            raise ValueError(f"{name}: {first['msg']}, but got {first['input']!r:.80}") from None
        if not penalised and not self.beta.fixed:
            raise ValueError(f"beta: arm '{next(iter(arms))}' has none, so it cannot be varied")
        return self

    @property
    def varied(self) -> dict[str, Axis]:
        """The settings that have more than one value."""
        return {name: item for name, item in self if isinstance(item, Axis) and not item.fixed}


def _whole(value: Scalar) -> Scalar:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Goal(Strict):
    """One objective: a measure of a trial's kept weights, taken on validation data, and which way is better."""

    metric: str
    direction: Direction | None = None
    target: float | None = Field(None, description="the wanted value, as a KL budget: the distance from it is minimised")
    noise: NoiseName | None = Field(None, description="corruption under which a measure of group `noise` is taken")
    level: Level | None = None

    @model_validator(mode="after")
    def _known_and_complete(self) -> Goal:
        if self.metric.startswith("test/"):
            raise ValueError(
                f"a search never sees the test set: '{self.metric.replace('test/', HELD_OUT)}', not '{self.metric}'"
            )
        if self.measure not in MEASURES or self.metric.startswith(("prune/", "matched/")):
            known = [name.replace("test/", HELD_OUT) for name in MEASURES if not name.startswith(("prune/", "matched/"))]
            raise ValueError(f"there is no metric '{self.metric}' to search by{nearest(self.metric, known)}")
        if (self.direction is None) == (self.target is None):
            raise ValueError(f"'{self.metric}' needs either `direction` (up or down) or `target`")
        under_noise = self.metric.startswith("noise/")
        if under_noise != (self.noise is not None) or under_noise != (self.level is not None):
            raise ValueError("metrics of group 'noise', and they alone, need `noise` and `level`")
        if self.noise:
            self.evaluate  # noqa: B018, raises where the level is no share
        return self

    @property
    def measure(self) -> str:
        """Its name in `measures.py`."""
        return self.metric.replace(HELD_OUT, "test/")

    @property
    def evaluate(self) -> Evaluate:
        """How evaluation takes it."""
        return Evaluate(noise=(Noise(kind=self.noise, levels=(self.level,)),)) if self.noise else Evaluate()

    @property
    def maximised(self) -> bool:
        return self.direction == "up"

    @property
    def name(self) -> str:
        """How tables and Optuna call it."""
        text = f"{self.metric} {self.noise} {self.level:g}" if self.noise else self.metric
        return text if self.target is None else f"{text} from {self.target:g}"

    @property
    def on_test(self) -> str:
        """Its name where it is taken on the test set."""
        return self.name.replace(HELD_OUT, "test/")

    @property
    def label(self) -> str:
        """How figures and sentences call it."""
        text = MEASURES[self.measure].label
        text += f", {self.noise.replace('_', ' ')} {self.level:g}" if self.noise else ""
        return text if self.target is None else f"distance of {text} from {self.target:g}"


class Sampler(Strict):
    """Who proposes trials."""

    kind: Literal["tpe", "nsga2", "gp", "qmc", "random", "grid"] = "tpe"
    seed: Seed = 0
    points: Annotated[int, Field(ge=2)] = Field(5, description="of each range, for the sampler 'grid'")

    @model_validator(mode="after")
    def _only_a_grid_has_points(self) -> Sampler:
        if "points" in self.model_fields_set and self.kind != "grid":
            raise ValueError(f"points: only the sampler 'grid' has them, but got kind '{self.kind}'")
        return self


class Pruner(Strict):
    """One of Optuna's pruners: at each rung it compares a trial with finished ones, or with all that reached the rung."""

    kind: Literal["median", "percentile", "successive_halving", "hyperband"]
    startup: Annotated[int, Field(ge=1)] = Field(
        8, description="finished trials, also of the grid, before it begins (median, percentile)"
    )
    percentile: Annotated[float, Field(gt=0, lt=100)] = Field(25.0, description="of finished trials, that a trial must reach")
    factor: Annotated[int, Field(ge=2)] = Field(3, description="of successive_halving and hyperband")


class Winner(Strict):
    """How the best setting is chosen, and on which seeds it then meets the grid's best, on the test set.

    A trial is one seed, and the best of many is a lucky one: so the best few are compared on further seeds.
    """

    goal: Goal | None = Field(None, description="what chooses among finished trials; the objective, where there is one")
    finalists: Count = Field(4, description="of the trials, and of the grid's settings, how many of the best are compared")
    validation_seeds: axis(Seed) = Field((6, 7, 8), description="of the finalists; the best mean on validation data wins")
    test_seeds: axis(Seed) = Field((1, 2, 3, 4, 5), description="on which the winner and the grid's best are compared")


class Search(Strict):
    """A search: data and network, a space, one objective or two, and who proposes, prunes and stores trials."""

    title: text(200)
    name: Name | None = Field(None, description="begins the Optuna study's name; the file's name if not given")
    study: Name | None = Field(None, description="the study whose data and network are searched, and whose cells begin it")
    data: Data | None = Field(None, description="in place of a study's")
    model: Model | None = Field(None, description="in place of a study's")
    train: Train | None = Field(None, description="a trial's whole budget; the study's if not given")
    space: Space
    seed: Seed = Field(0, description="of every trial")
    objectives: Annotated[tuple[Goal, ...], Field(min_length=1, max_length=2)]
    winner: Winner = Winner()
    sampler: Sampler = Sampler()
    trials: Count = Field(description="target count of the search's own finished trials, pruned ones among them")
    batch: Count = Field(description="trials that are asked and trained together")
    rungs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field((), description="shares of the budget at which trials leave")
    halving: Annotated[int, Field(ge=2)] | None = Field(None, description="at each rung one in so many of a batch goes on")
    pruner: Pruner | None = None
    storage: text(1000) | None = Field(
        None, description="an SQLAlchemy URL, or a journal's file; optuna.db if not given; OPTUNA_STORAGE overrides it"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        alone = {"data": self.data, "model": self.model, "train": self.train}
        if self.study and (self.data or self.model):
            raise ValueError("`study` names data and network, so neither `data` nor `model` stands beside it")
        if not self.study and (missing := [key for key, value in alone.items() if value is None]):
            raise ValueError(f"`study` must name a study, or `{missing[0]}` be given in place")
        if self.storage and without_password(self.storage) != self.storage:  # as this file is logged
            raise ValueError("storage: must hold no password: `OPTUNA_STORAGE`, `PGPASSWORD` or ~/.pgpass may")
        if self.data and self.data.axes:
            raise ValueError("data.axes: a search sees one dataset, so its data have no axes")
        if self.train and self.train.noise:
            raise ValueError("train.noise: a search has no levels of noise, so it names no kind")
        if len(self.goal_names) > len(set(self.goal_names)):
            raise ValueError(f"objectives: no objective may stand twice, but got {self.goal_names}")
        if len(self.objectives) == 2 and self.winner.goal is None:
            raise ValueError("winner.goal: with two objectives it must say what chooses among finished trials")
        seeds = (self.seed, *self.winner.validation_seeds, *self.winner.test_seeds)
        if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
            raise ValueError(
                f"winner: `validation_seeds` and `test_seeds` must be others than `seed` and each other, but share {twice[0]}"
            )
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs must rise, but got {list(self.rungs)}")
        if bool(self.rungs) != bool(self.halving or self.pruner):
            raise ValueError("rungs are where `halving` or `pruner` let trials leave: neither stands without the other")
        if self.pruner and len(self.objectives) == 2:
            raise ValueError(f"pruner: '{self.pruner.kind}' compares one objective, but got two; `halving` ranks both")
        self._check_sampler()
        return self

    def _check_sampler(self) -> None:
        kind, varied = self.sampler.kind, self.space.varied
        if not varied:
            raise ValueError("space: some setting must have a range or several values")
        if kind == "qmc" and (listed := [name for name, item in varied.items() if item.values]):
            raise ValueError(f"sampler: 'qmc' covers ranges, but space.{listed[0]} is a list")
        if kind == "gp" and self.halving:
            raise ValueError(
                "sampler: 'gp' learns from trials that reach the end, of which `halving` leaves few; 'tpe' from all"
            )
        if kind == "grid" and (most := math.prod(map(self._most_points, varied.values()))) > MAX_CELLS:
            raise ValueError(f"sampler: its grid may have {most} points, at most {MAX_CELLS} are allowed")
        if kind == "grid" and self.trials > (size := len(self.grid())):
            raise ValueError(f"trials: the sampler's grid has {size} points, but got {self.trials}")

    def grid(self) -> list[dict[str, Scalar]]:
        """The points of the sampler 'grid': the product of all varied settings, each once."""
        axes = {name: _points(item, self.sampler.points, name == "latent_dim") for name, item in self.space.varied.items()}
        found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        for point in found:
            if ARMS[str(point.get("arm", self.space.arm.corners[0]))].penalty == "none":
                point.pop("beta", None)
        return [dict(point) for point in dict.fromkeys(tuple(point.items()) for point in found)]

    def _most_points(self, item: Axis) -> int:
        return self.sampler.points if item.values is None else len(item.values)

    @property
    def goal_names(self) -> list[str]:
        """How tables and Optuna call the objectives."""
        return [goal.name for goal in self.objectives]

    @property
    def chooses(self) -> Goal:
        """What chooses the winner."""
        return self.winner.goal or self.objectives[0]

    def settled(self, study: Study | None) -> tuple[Data, Model, Train]:
        """Data, network and budget, from the study where it names one. Raises ConfigError."""
        data, model = (study.data, study.model) if study else (self.data, self.model)
        train = self.train or study.train
        if data.axes:
            raise ConfigError(f"study: must have one dataset, but '{self.study}' varies {', '.join(data.axes)}")
        if train.noise:
            raise ConfigError(f"study: '{self.study}' trains on noise, which a search does not; give it a `train` of its own")
        if self.space.sigma2 and model.likelihood == "bernoulli":
            raise ConfigError("space.sigma2: a Bernoulli likelihood has no σ²")
        return data, model, train


def _points(item: Axis, count: int, whole: bool) -> list[Scalar]:
    if item.values is not None:
        return list(item.values)
    shares = [number / (count - 1) for number in range(count)]
    if item.log:
        points = [item.low * (item.high / item.low) ** share for share in shares]
    else:
        points = [item.low + (item.high - item.low) * share for share in shares]
    points[-1] = item.high  # which rounding may miss
    return list(dict.fromkeys(round(point) for point in points)) if whole else points


def load_search(name: str, folder: Path = CONFIG_FOLDER, named_by: str = "") -> tuple[Search, Study | None]:
    """Reads and checks the YAML of a search, and of the study that it names. Raises ConfigError."""
    path = config_path(name, folder, named_by)
    search = load_strict(Search, path)
    study = load_study(search.study, folder, f"{path}: study") if search.study else None
    try:
        search.settled(study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return search, study


def load_listed(settings: Settings, folder: Path = CONFIG_FOLDER) -> dict[str, Search]:
    """The searches of `params.yaml` by name, which must name the studies that it says. Raises ConfigError."""
    found = {name: load_search(name, folder, f"{PARAMS_FILE}: searches")[0] for name in settings.every_search}
    for name, search in found.items():
        if search.study != (listed := settings.searches.get(name)):
            key = f"searches.{name}" if listed else "searches_alone"
            raise ConfigError(f"{PARAMS_FILE}: {key}: its file names study {search.study!r}, but got {listed or name!r}")
    return found
