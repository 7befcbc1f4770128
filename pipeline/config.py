"""A study and its parts: YAML in, frozen and strict models out, and one clear line for every mistake.

This module knows no torch. What a dataset's options may be is known by `datasets.py`, which checks them before any command.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.measures import MEASURES
from pipeline.measures import find as find_measure

CONFIG_FOLDER = Path("configs")
PARAMS_FILE = Path("params.yaml")
MAX_CELLS = 20_000
MAX_BYTES = 100_000  # a second's reading
MAX_VALUES = 50_000


def printable(text: str) -> str:
    """One line without characters that steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class VaesweepError(Exception):
    """Every error that a user can cause; the command line prints it as one line and exits with a non-zero status."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(VaesweepError):
    """A wrong value in a config file: which file, which key, which rule, and the value that breaks it."""


class Arm(NamedTuple):
    """Which terms of the objective a cell trains: loss = reconstruction_weight · R + β · penalty."""

    samples: bool
    penalty: Literal["kl", "code_l2", "none"]
    reconstruction_weight: float = 1.0

    @property
    def variational(self) -> bool:
        """Whether its loss is a bound of the ELBO's kind: expected under q(z|x), with the KL from the prior."""
        return self.samples and self.penalty == "kl"


ARMS = {
    "vae": Arm(samples=True, penalty="kl"),
    "ae": Arm(samples=False, penalty="none"),
    "ae_code_l2": Arm(samples=False, penalty="code_l2"),
    "ae_as_published": Arm(samples=True, penalty="code_l2"),
    "kl_only": Arm(samples=True, penalty="kl", reconstruction_weight=0.0),
}
NoiseName = Literal["sparse_abs_gaussian", "gaussian", "salt_and_pepper", "erased_block"]
ActivationName = Literal["relu", "tanh", "identity"]
ArmName = Literal["vae", "ae", "ae_code_l2", "ae_as_published", "kl_only"]

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Level = Annotated[float, Field(ge=0, le=1e6)]  # whose square is far from overflow in float32
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Width = Annotated[int, Field(gt=0, le=10**6)]  # so that a layer's bytes are a number that torch can refuse
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Scalar = bool | int | float | str


def _readable(value: str) -> str:
    """Free text goes to terminals, MLflow and reports, so it holds no character that steers them."""
    steering = [c for c in value if not (c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs")]
    if steering:
        raise ValueError(f"must be readable text, but holds {steering[0]!r}")
    return value


def text(most: int) -> Any:
    """The type of free text of at most so many characters."""
    return Annotated[str, Field(min_length=1, max_length=most), AfterValidator(_readable)]


def axis(item: Any) -> Any:
    """The type of a grid axis: one value or more. (That none stands twice is checked by the models.)"""
    return Annotated[tuple[item, ...], Field(min_length=1)]


class Strict(BaseModel):
    """A frozen model that converts nothing and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_value_twice(cls, value: Any, info: Any) -> Any:
        if (
            info.field_name not in ("hidden", "noise", "claims", "objectives")
            and isinstance(value, tuple)
            and len(set(value)) < len(value)
        ):
            raise ValueError("no value may stand twice")
        return value


class Data(Strict):
    """Which data the cells see. Further keys are options of the dataset's function in `datasets.py`."""

    model_config = ConfigDict(extra="allow")

    name: Name
    axes: dict[str, axis(Scalar)] = Field({}, description="options of the dataset that the grid varies: one dataset a value")

    @model_validator(mode="after")
    def _no_axis_value_twice(self) -> Data:
        for name, values in self.axes.items():
            if len(set(values)) < len(values):
                raise ValueError(f"axes.{name}: no value may stand twice, but got {list(values)}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Model(Strict):
    """The network of every cell; the decoder mirrors the encoder."""

    hidden: tuple[Width, ...] = Field(description="widths of the encoder's hidden layers; empty for a linear network")
    activation: ActivationName = Field("relu", description="between layers, never after the last one")
    decoder_activation: ActivationName | None = Field(None, description="between the decoder's layers, if not `activation`")
    likelihood: Literal["bernoulli", "gaussian"] = Field(description="what R, the reconstruction term, is the negative log of")
    bias: bool = Field(True, description="whether layers have biases")
    output: Literal["identity", "relu"] = Field("identity", description="after the last layer, for the mean of a Gaussian")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of a Gaussian's mean dropped in training")

    @model_validator(mode="after")
    def _logits_stay_as_they_are(self) -> Model:
        if self.likelihood == "bernoulli" and (self.output != "identity" or self.dropout):
            raise ValueError("output and dropout act on the mean of a Gaussian likelihood; a Bernoulli one has logits")
        return self


class ArmAxes(Strict):
    """Axes that only some arms have."""

    beta: axis(NonNegative) = Field((1.0,), description="weight of the arm's penalty, per sample and in nats")
    anneal: axis(Share) = Field((0.0,), description="share of the updates over which β rises from 0 to its value; 0: fixed")


class Grid(Strict):
    """The axes of a study; its cells are the product of the axes that each arm has."""

    latent_dim: axis(Width)
    l2: axis(NonNegative) = Field((0.0,), description="λ: weight of the summed squares of all weight matrices")
    sigma2: axis(Positive | Literal["learned"]) = Field((1.0,), description="σ² of a Gaussian likelihood")
    train_noise: axis(Level) = Field((0.0,), description="level of the noise on training images that `train.noise` names")
    learning_rate: axis(Positive) = Field((1e-3,), description="of Adam, before the schedule")
    seed: axis(Seed) = Field((0, 1, 2, 3, 4), description="decides initial weights, batch order and ε")
    arms: dict[ArmName, ArmAxes] = Field(min_length=1)

    @model_validator(mode="after")
    def _an_arm_has_only_its_axes(self) -> Grid:
        for name, axes in self.arms.items():
            if ARMS[name].penalty == "none" and axes.model_fields_set:
                raise ValueError(f"arm '{name}' has no penalty, so it has no axis '{sorted(axes.model_fields_set)[0]}'")
        return self


class Schedule(Strict):
    """A factor that changes over training: from `start` to `end` within the share `over` of all updates, or in steps."""

    kind: Literal["constant", "linear", "cosine", "steps"] = "constant"
    start: NonNegative = 1.0
    end: NonNegative = 1.0
    over: Annotated[float, Field(gt=0, le=1)] = 1.0
    at: tuple[Share, ...] = Field((), description="shares of all updates at which `steps` multiplies by `ratio`")
    ratio: Positive = 1.0

    @model_validator(mode="after")
    def _only_steps_have_steps(self) -> Schedule:
        if (self.kind == "steps") != bool(self.at):
            raise ValueError(f"kind 'steps', and it alone, needs `at`, but got kind '{self.kind}' with at={list(self.at)}")
        return self


class TrainNoise(Strict):
    """Corruption of the training and validation inputs, drawn once; its levels are the grid's axis `train_noise`."""

    kind: NoiseName
    target: Literal["clean", "noisy"] = Field("noisy", description="what the reconstruction is compared with in training")
    clip: bool = Field(True, description="whether noisy images stay in [0, 1]; else a Bernoulli cell sees larger targets")


class Train(Strict):
    """The training budget, in updates, so that small and large datasets compare."""

    updates: Count
    batch_size: Count = 128
    learning_rate_schedule: Schedule = Schedule()
    shuffle: bool = Field(True, description="whether each epoch has an order of its own; if not, rows come as they are")
    noise: TrainNoise | None = Field(None, description="corruption of the training images; none where not given")
    clip_norm: Positive | None = Field(None, description="largest gradient norm of a cell")
    history_points: Annotated[int, Field(ge=10, le=1000)] = Field(40, description="how often losses are recorded")
    keep: Literal["best", "last"] = Field("best", description="which weights are evaluated: best on validation, or last")

    @model_validator(mode="after")
    def _enough_updates(self) -> Train:
        if self.updates < self.history_points:
            raise ValueError(f"updates must be at least history_points, {self.history_points}, but got {self.updates}")
        return self


class Noise(Strict):
    """Corruption of the test inputs."""

    kind: NoiseName
    levels: axis(Level)

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Noise:
        if self.kind != "gaussian" and max(self.levels) > 1:
            raise ValueError(f"levels of '{self.kind}' are shares, at most 1")
        return self


class Evaluate(Strict):
    """What is measured on the test set."""

    noise: tuple[Noise, ...] = Field((), description="corruptions under which reconstruction is measured")
    neighbours: Count = Field(5, description="k of the k-nearest-neighbour accuracy of the codes")
    importance_samples: Count = Field(64, description="draws of z behind the importance-weighted bound of log p(x)")
    between: tuple[Name, Name] | None = Field(None, description="two classes between which codes are interpolated; any if none")
    active_threshold: Positive = Field(0.01, description="a unit is active if its mean varies more than this over the data")

    @model_validator(mode="after")
    def _each_kind_once(self) -> Evaluate:
        if len({noise.kind for noise in self.noise}) < len(self.noise):
            raise ValueError("each kind of noise may stand once, with all its levels")
        return self

    def between_of(self, names: Sequence[str]) -> list[int]:
        """The places of `between` among a dataset's classes. Raises ConfigError where it lacks one."""
        if missing := [name for name in self.between or () if name not in names]:
            raise ConfigError(f"evaluate.between: must name two of the classes {list(names)}, but got '{missing[0]}'")
        return [names.index(name) for name in self.between or ()]


Choice = Scalar | axis(Scalar)
Direction = Literal["up", "down"]


class Test(Strict):
    """What every kind of test is about: a measure of some of a study's cells, averaged over all but what the test names."""

    metric: str | axis(str) = Field(description="a name of `measures.py`; of several, their mean")
    where: dict[str, Choice] = Field({}, description="values of axes, or `study`, that choose cells")

    @property
    def sides(self) -> list[dict[str, Choice]]:
        """The choices of cells that the test compares, each with its `metric`."""
        return [{"metric": self.metric, **self.where}]

    @property
    def given(self) -> list[dict[str, Choice]]:
        """What the test says of each side itself."""
        return [self.where]

    @property
    def varied(self) -> dict[str, int]:
        """The axes that the test goes over, and how many values each must have."""
        return {}


class Compared(Test):
    """A test of one side against another."""

    against: dict[str, Choice] = Field(min_length=1, description="what the other side chooses instead; `metric` too")

    @property
    def sides(self) -> list[dict[str, Choice]]:
        return [*super().sides, {**super().sides[0], **self.against}]

    @property
    def given(self) -> list[dict[str, Choice]]:
        return [*super().given, self.against]


class Monotone(Test):
    """The measure rises (or falls) from each value of an axis to the next."""

    kind: Literal["monotone"]
    over: str
    direction: Direction

    @property
    def varied(self) -> dict[str, int]:
        return {self.over: 2}


class Difference(Compared):
    """The measure is higher (up) or lower (down) than on the other side, paired by seed."""

    kind: Literal["difference"]
    direction: Direction


class Interaction(Compared):
    """The measure's change from `base` is higher (up) or lower (down) than on the other side, paired by seed."""

    kind: Literal["interaction"]
    base: dict[str, Choice] = Field(min_length=1, description="what both sides choose instead where their change begins")
    direction: Direction

    @property
    def sides(self) -> list[dict[str, Choice]]:
        return [*super().sides, *({**side, **self.base} for side in super().sides)]

    @property
    def given(self) -> list[dict[str, Choice]]:
        return [*super().given, self.base, self.base]


class Equal(Compared):
    """The two sides differ by less than the margin."""

    kind: Literal["equal"]
    margin: Positive


class NoBetter(Compared):
    """The measure does not lie above (up) or below (down) the other side's by the margin or more."""

    kind: Literal["no_better"]
    direction: Direction = Field(description="which way is better")
    margin: Positive


class Bound(Test):
    """The measure lies above and below given numbers."""

    kind: Literal["bound"]
    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Bound:
        if self.above is None and self.below is None:
            raise ValueError("a bound needs `above`, `below` or both")
        return self


class InteriorOptimum(Test):
    """Some inner value of an axis has a higher (up) or lower (down) measure than both ends."""

    kind: Literal["interior_optimum"]
    over: str
    direction: Direction = Field(description="which way is better")

    @property
    def varied(self) -> dict[str, int]:
        return {self.over: 3}


class CountIs(Test):
    """The measure, a count, is a number, or the value of an axis at each of its values."""

    kind: Literal["count"]
    number: Annotated[int, Field(ge=0, lt=2**31)] | str

    @property
    def varied(self) -> dict[str, int]:
        return {self.number: 2} if isinstance(self.number, str) else {}


class Claim(Strict):
    """A statement by a source, and the test that decides it."""

    id: Name
    source: text(200) = Field(description="file and section")
    says: text(500) = Field(description="the statement, in our words")
    control: bool | None = Field(None, description="whether a claim that checks the ledger itself is known to hold")
    test: Annotated[
        Monotone | Difference | Interaction | Equal | NoBetter | Bound | InteriorOptimum | CountIs, Field(discriminator="kind")
    ]


class Study(Strict):
    """One question, one file: data, network, grid, budget, evaluation, claims."""

    sections: ClassVar = ("data", "model", "grid", "train", "evaluate")

    title: text(200)
    data: Data
    model: Model
    grid: Grid
    train: Train
    evaluate: Evaluate
    claims: tuple[Claim, ...] = Field((), description="statements that the report decides")

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        grid = self.grid
        if self.model.likelihood == "bernoulli" and "sigma2" in grid.model_fields_set:
            raise ValueError("a Bernoulli likelihood has no σ², so the grid has no axis 'sigma2'")
        if (self.train.noise is None) == any(grid.train_noise):
            raise ValueError("train.noise says what kind of noise grid.train_noise has levels of: neither stands alone")
        if self.train.noise and self.train.noise.kind != "gaussian" and max(grid.train_noise) > 1:
            raise ValueError(f"grid.train_noise: levels of '{self.train.noise.kind}' are shares, at most 1")
        if len({claim.id for claim in self.claims}) < len(self.claims):
            raise ValueError("no claim id may stand twice")
        if self.size > MAX_CELLS:
            raise ValueError(f"the grid has {self.size} cells, at most {MAX_CELLS} are allowed")
        return self

    @property
    def axes(self) -> dict[str, tuple[Scalar, ...]]:
        """The values of every axis by the name of its column in tables; `beta` and `anneal` are those of all arms."""
        own = [self.axes_of(arm) for arm in self.grid.arms]
        names = dict.fromkeys(axis for axes in own for axis in axes)
        found = {axis: tuple(dict.fromkeys(v for axes in own for v in axes.get(axis, ()))) for axis in names}
        return {"arm": tuple(self.grid.arms), **dict.fromkeys(ArmAxes.model_fields, ()), **found}

    def axes_of(self, arm: str) -> dict[str, tuple[Scalar, ...]]:
        """The values of every axis that an arm has."""
        own = self.grid.arms[arm].model_dump() if ARMS[arm].penalty != "none" else {}
        shared = {axis: getattr(self.grid, axis) for axis in Grid.model_fields if axis != "arms"}
        return {**own, **shared, **self.data.axes}

    @property
    def size(self) -> int:
        """The number of cells."""
        return sum(math.prod(map(len, self.axes_of(arm).values())) for arm in self.grid.arms)


class Scale(Strict):
    """What one `dvc repro` runs, and where its report goes."""

    studies: axis(Name)
    searches: dict[Name, Name] = Field({}, description="each search, and the study whose data, network and cells it uses")
    searches_alone: tuple[Name, ...] = Field((), description="searches that have data and network in their own file")
    reports: text(200) = Field("reports", description="folder of the report, below the project's")

    @field_validator("reports")
    @classmethod
    def _within_the_project(cls, value: str) -> str:
        path = PurePath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:  # its figures are removed before new ones are drawn
            raise ValueError("must be a folder below the project's")
        return value


class Settings(Scale):
    """`params.yaml`: what runs, and where."""

    scales: dict[Name, Scale] = Field({}, description="named choices of what runs; claims of those that do not are 'not run'")
    data_root: text(1000) | None = Field(None, description="folder with downloaded datasets; VAESWEEP_DATA_ROOT overrides it")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = Field("float32", description="of the products of wide layers in training")
    stack_size: Count | None = Field(None, description="cells that train together; chosen automatically if null")

    @property
    def every_search(self) -> list[str]:
        """The searches that run."""
        return [*self.searches, *self.searches_alone]

    @property
    def known_searches(self) -> list[str]:
        """The searches that run, and those of the other scales."""
        scales = (self, *self.scales.values())
        return list(dict.fromkeys(name for scale in scales for name in [*scale.searches, *scale.searches_alone]))

    @property
    def known_studies(self) -> list[str]:
        """The studies that run, and those of the other scales."""
        return list(dict.fromkeys([*self.studies, *(name for scale in self.scales.values() for name in scale.studies)]))

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Settings:
        if clash := (set(self.studies) & set(self.every_search)) | (set(self.searches) & set(self.searches_alone)):
            raise ValueError(f"two studies or searches share the name {sorted(clash)[0]!r}")
        for search, study in self.searches.items():
            if study not in self.studies:
                raise ValueError(f"searches.{search}: its study must be listed in studies, but got '{study}'")
        return self


def load_study(name: str, folder: Path = CONFIG_FOLDER, named_by: str = "") -> Study:
    """Reads and checks `configs/<name>.yaml`, its claims too. Raises ConfigError."""
    path = config_path(name, folder, named_by)
    study = load_strict(Study, path)
    about = {str(side["study"]) for claim in study.claims for side in claim.test.sides if "study" in side}
    others = {other: load_strict(Study, config_path(other, folder, f"{path}: claims")) for other in sorted(about - {name})}
    studies = {name: study, **others}
    for index, claim in enumerate(study.claims):
        try:
            _check_test(claim.test, name, studies)
        except ValueError as error:
            raise ConfigError(f"{path}: claims.{index} ({claim.id}): {error}") from None
    return study


def load_known(settings: Settings, folder: Path = CONFIG_FOLDER) -> dict[str, Study]:
    """The studies of all scales by name. Raises ConfigError, also where two have a claim of one id."""
    studies, owners = {name: load_study(name, folder, f"{PARAMS_FILE}: studies") for name in settings.known_studies}, {}
    for name, claim in ((name, claim) for name, study in studies.items() for claim in study.claims):
        if owners.setdefault(claim.id, name) != name:
            raise ConfigError(f"{config_path(name, folder)}: claims: {owners[claim.id]} has a claim '{claim.id}' too")
    return studies


About = Sequence[tuple[str, Test, Mapping[str, Choice]]]
"""Claims that are about some cells: id, test, and the side of the test that chooses them."""


def claims_about(name: str) -> About:
    """Claims of known studies that are about cells of this one.

    A study that cannot be read has none here: what reads it for its own sake says why.
    """
    found = []
    for study in load_settings().known_studies:
        with contextlib.suppress(ConfigError):
            sides = [(claim.id, claim.test, side) for claim in load_study(study).claims for side in claim.test.sides]
            found += [about for about in sides if about[-1].get("study", study) == name]
    return found


def _check_test(test: Test, name: str, studies: Mapping[str, Study]) -> None:
    """Raises ValueError where a test asks for what its studies do not have."""
    for side, chosen in zip(test.sides, test.given, strict=True):
        study = studies[str(side.get("study", name))]
        _check_metrics(choices(side["metric"]), study)
        _check_cells(side, chosen, study)
        for axis, least in test.varied.items():
            _check_levels(axis, least, test, side, study)
    for one, other in itertools.combinations(test.sides, 2):
        if _overlap({"study": name, **one}, {"study": name, **other}):
            raise ValueError("`against` and `base` must choose other cells than `where`, but two sides share some")


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether no axis that both name, nor the metric, tells the cells of two sides apart."""
    return all(set(map(exact, choices(one[key]))) & set(map(exact, choices(other[key]))) for key in one if key in other)


def _check_metrics(metrics: tuple, study: Study) -> None:
    for metric in metrics:
        if find_measure(metric) is None:
            raise ValueError(f"there is no metric '{metric}'{nearest(metric, list(MEASURES))}")
    of_noise = {str(metric).startswith("noise/") for metric in metrics}
    if len(of_noise) > 1:
        raise ValueError(f"metrics under noise and others do not mix, but got {list(metrics)}")
    if of_noise == {True} and not study.evaluate.noise:
        raise ValueError(f"the study has no evaluate.noise, which '{metrics[0]}' needs")


def _check_cells(side: Mapping[str, Any], chosen: Mapping[str, Any], study: Study) -> None:
    """Every axis that is chosen for this side must be one of its arms', with these values."""
    axes, arms = study.axes, choices(side.get("arm", tuple(study.grid.arms)))
    if str(choices(side["metric"])[0]).startswith("noise/"):
        levels = {level: None for noise in study.evaluate.noise for level in noise.levels}
        axes |= {"noise": tuple(noise.kind for noise in study.evaluate.noise), "level": tuple(levels)}
    for axis, values in ((axis, choices(choice)) for axis, choice in chosen.items() if axis not in ("metric", "study")):
        if axis not in axes:
            raise ValueError(f"there is no axis '{axis}'{nearest(axis, list(axes))}; there are: {', '.join(axes)}")
        own = [study.axes_of(arm) for arm in arms if arm in study.grid.arms] if axis in ArmAxes.model_fields else [axes]
        known = tuple(dict.fromkeys(value for one in own for value in one.get(axis, ())))
        if not known:
            raise ValueError(f"arm '{arms[0]}' has no axis '{axis}'")
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"axis '{axis}' has the values {list(known)}, but got {unknown[0]!r}")


def _check_levels(axis: str, least: int, test: Test, side: Mapping[str, Any], study: Study) -> None:
    """A test over an axis needs several numbers, the same in every arm that has the axis."""
    needs = f"axis '{axis}' must have at least {least} values for a test of kind '{test.kind}', but got"
    if axis not in study.axes or axis == "seed":
        raise ValueError(f"{needs} no such axis{nearest(axis, list(study.axes))}")
    arms = choices(side.get("arm", tuple(study.grid.arms)))
    levels = {known for arm in arms if (known := study.axes_of(arm).get(axis))}
    if len(levels) > 1:
        raise ValueError(f"arms have different values of axis '{axis}': name one in `where`")
    found = [value for value in (levels.pop() if levels else ()) if axis not in side or value in choices(side[axis])]
    if len(found) < least or any(isinstance(value, str) for value in found):
        raise ValueError(
            f"{needs} only {found}" if len(found) < least else f"axis '{axis}' must be of numbers, but got {found}"
        )


def choices(choice: Any) -> tuple:
    """One value or several, as several."""
    return choice if isinstance(choice, tuple) else (choice,)


def chooses(side: Mapping[str, Any], row: Mapping[str, Any], over: Iterable[str] = ()) -> bool:
    """Whether a side of a test is about a cell with these values.

    A cell without an axis of `over`, which the test goes over, is never chosen; another axis that it lacks does not matter.
    """
    if any(_lacks(row, axis) for axis in over):
        return False
    axes = {axis: choice for axis, choice in side.items() if axis not in ("metric", "study") and not _lacks(row, axis)}
    return all(exact(row[axis]) in map(exact, choices(choice)) for axis, choice in axes.items())


def _lacks(row: Mapping[str, Any], axis: str) -> bool:
    value = row.get(axis)
    return value is None or value != value


def exact(value: Scalar) -> float | str:
    """`1`, `1.0` and `"1"` are one value."""
    try:
        return float(value)
    except ValueError:
        return str(value)


def load_settings(path: Path = PARAMS_FILE) -> Settings:
    """Reads and checks `params.yaml`. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; all commands run in the folder of a project, which has one")
    return load_strict(Settings, path)


def config_path(name: str, folder: Path = CONFIG_FOLDER, named_by: str = "") -> Path:
    """The YAML of a study or a search. Raises ConfigError, which begins with the file and the key that name it."""
    path = folder / f"{name}.yaml"
    if re.fullmatch(NAME, name) and path.is_file():
        return path
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    begin = f"{named_by}: there" if named_by else "there"
    raise ConfigError(f"{begin} is no config {name[:80]!r}{nearest(name, known)}; in {folder}/ are: {', '.join(known)}")


def load_strict(model: type[Strict], path: Path) -> Any:
    """Reads YAML 1.2 into a model. Raises ConfigError."""
    try:
        yaml = YAML(typ="safe", pure=True)
        root = yaml.compose(_text(path))
        _check_size(root)
        as_json = json.dumps(yaml.constructor.construct_document(root) if root else None, default=str)
        content = json.loads(as_json)  # whose keys are all text, also those that YAML reads as null or numbers
    except Exception as error:  # on malformed text ruamel raises of many kinds
        raise ConfigError(f"{path}: cannot be read: {_syntax_error(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, but got {content!r:.80}")
    try:
        return model.model_validate_json(as_json)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_line(model, content, error)}") from None


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, at most {MAX_BYTES} are allowed")
    return path.read_text(encoding="utf-8")


def _check_size(root: Node | None) -> None:
    """By aliases and merged keys, a few lines can stand for billions of values, or for themselves. Raises ValueError."""
    waiting, characters = [root], 0
    for seen in itertools.count(1):
        if not waiting:
            return
        if seen + len(waiting) > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values")
        node = waiting.pop()
        characters += len(node.value) if isinstance(node, ScalarNode) else 0
        if characters > 2 * MAX_BYTES:
            raise ValueError(f"its values have more than {2 * MAX_BYTES} characters")
        if isinstance(node, MappingNode):
            waiting += itertools.chain(*node.value)
        elif isinstance(node, SequenceNode):
            waiting += node.value


def _syntax_error(error: Exception) -> str:
    """What a YAML reader found, and in which line, without the text around it that it prints too."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())[:300]
    here, start = error.problem_mark.line + 1, error.context_mark.line + 1 if error.context_mark else None
    began = f" {error.context} from line {start} on" if start not in (None, here) else ""
    problem = re.sub(r" with value .*", "", str(error.problem), flags=re.DOTALL)  # of a duplicate key, whose values it garbles
    return f"line {here}: {problem}{began}"


def _first_line(model: type[Strict], content: Any, error: ValidationError) -> str:
    # An unknown key is likelier the cause than the key that is then missing.
    first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "missing"))
    location = [part for part in first["loc"] if not (isinstance(part, str) and part not in _keys(content, first["loc"]))]
    key = ".".join(map(str, location))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(str(location[-1]), _fields(model, location[:-1]))}"
    if first["type"] == "missing":
        missing = str(first["loc"][-1])
        hint = " (write `evaluate: {}` for its defaults)" if missing == "evaluate" else ""
        return f"{'.'.join(map(str, first['loc']))}: is required{hint}"
    if first["type"] == "union_tag_invalid":
        tag, known = first["ctx"]["tag"], re.findall(r"'(\w+)'", first["ctx"]["expected_tags"])
        key = ".".join(part for part in (key, first["ctx"]["discriminator"].strip("'")) if part)
        return f"{key}: must be one of {', '.join(known)}, but got {tag!r:.80}{nearest(tag, known)}"
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "too_short":
        rule = "must have a value"
    shown = "" if isinstance(first["input"], dict) else f", but got {first['input']!r:.80}"
    return f"{key + ': ' if key else ''}{rule}{shown}"


def _keys(content: Any, location: tuple) -> set:
    """Every key and index met on the way to `location`; pydantic also names union members and '[key]', which are no keys."""
    met = set()
    for part in location:
        known = range(len(content)) if isinstance(content, list) else content
        if not isinstance(known, (dict, range)) or part not in known:
            continue
        content = content[part]
        met.add(part)
    return met


def _fields(model: Any, location: list) -> list[str]:
    """The keys that may stand at a place, in any of the models that may."""
    schema = model.model_json_schema()
    nodes = [schema]
    for part in location:
        parts = [_part(node, part) for node in _resolved(schema, nodes)]
        nodes = [node for node in parts if isinstance(node, dict)]
    return list(dict.fromkeys(name for node in _resolved(schema, nodes) for name in node.get("properties", {})))


def _part(node: dict, part: str | int) -> Any:
    return node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items")


def _resolved(schema: dict, nodes: list[dict]) -> Iterator[dict]:
    """The models behind references and alternatives."""
    for node in nodes:
        if "$ref" in node:
            yield from _resolved(schema, [schema["$defs"][node["$ref"].split("/")[-1]]])
        elif alternatives := node.get("anyOf") or node.get("oneOf"):
            yield from _resolved(schema, alternatives)
        else:
            yield node


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean …?)' for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
