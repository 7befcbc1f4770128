"""`plan`: what a study would train and cost, from a short measurement, before anything is spent. Writes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter

import torch
from tabulate import tabulate

from pipeline import datasets
from pipeline.artifacts import ArtifactError, CellStore, Folders, Prepared, load_prepared
from pipeline.config import CONFIG_FOLDER, ArmAxes, ConfigError, Study, load_settings, load_study
from pipeline.devices import find_runtime, workers
from pipeline.executors import bytes_per_cell, known_fits, plan_stacks, traits
from pipeline.grid import Cell, Runtime, cells, data_points, identify, parameter_count
from pipeline.mlp import one_thread
from pipeline.trainer import PLAIN, StackTrainer, Traits, versions

MEASURED_UPDATES = 12
MEASURED_ROWS = 1024


def run(name: str) -> str:
    """The plan as text: defaults, grid, cells, stacks, parameters, memory, disk and time. Raises VaesweepError."""
    settings, study = load_settings(), load_study(name)
    runtime, wanted = find_runtime(settings), cells(study)
    data = _prepared(name, study)
    features = data.features if data else _features(name, study)
    missing = _missing(wanted, data, runtime)
    fits = known_fits(CellStore(), features, runtime.device)
    groups = plan_stacks(missing, features, runtime.device, settings.stack_size, fits)
    costs = _cost_rows(study, wanted, missing, groups, features, runtime, data)
    rows = [*_grid_rows(study, wanted, missing), *costs]
    return f"{name}: {study.title}\n\n{tabulate(rows, tablefmt='plain')}\n\n{_defaults(study)}"


def _prepared(name: str, study: Study) -> Prepared | None:
    try:
        return load_prepared(Folders(name).prepared, study.data)
    except ArtifactError:
        return None


def _features(name: str, study: Study) -> int:
    """The width of data that is not prepared yet."""
    try:
        return datasets.features(study.data)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_FOLDER / name}.yaml: {error}") from None


def _missing(wanted: list[Cell], data: Prepared | None, runtime: Runtime) -> dict[str, Cell]:
    """Cells that the store lacks; without prepared data, all of them."""
    if data is None:
        return {str(number): cell for number, cell in enumerate(wanted)}
    store = CellStore()
    return {key: cell for key, cell in identify(wanted, data.hashes, runtime).items() if key not in store}


def _grid_rows(study: Study, wanted: list[Cell], missing: dict[str, Cell]) -> list[tuple[str, str]]:
    arms = ", ".join(f"{count} {arm}" for arm, count in Counter(cell.arm_name for cell in wanted).items())
    axes = {name: values for name, values in study.axes.items() if name not in ("arm", *ArmAxes.model_fields)}
    shown = " × ".join(f"{name} {list(values)}" for name, values in axes.items() if len(values) > 1)
    return [
        ("data", f"{len(data_points(study.data))} dataset(s) of {study.data.name}"),
        ("grid", shown),
        ("arms", "; ".join(_arm(name, arm) for name, arm in study.grid.arms.items())),
        ("cells", f"{len(wanted)} ({arms}); {len(wanted) - len(missing)} are trained already"),
    ]


def _arm(name: str, axes: ArmAxes) -> str:
    """An arm with the axes that the study gives it."""
    words = {"beta": "β", "anneal": "annealed over"}
    given = [f"{word} {list(getattr(axes, axis))}" for axis, word in words.items() if axis in axes.model_fields_set]
    return " ".join([name, *given])


def _cost_rows(
    study: Study,
    wanted: list[Cell],
    missing: dict[str, Cell],
    groups: list[list[str]],
    features: int,
    runtime: Runtime,
    data: Prepared | None,
) -> list[tuple[str, str]]:
    largest = max(wanted, key=lambda cell: cell.latent_dim)
    parameters = parameter_count(study.model, features, largest.latent_dim)
    widest = max((len(group) for group in groups), default=0)
    at_once = min(workers(runtime.device), len(groups))
    memory = at_once * widest * bytes_per_cell(study.model, features, largest.lanes, study.train.batch_size)
    copies = at_once * max((_copied_bytes([missing[key] for key in group], data) for group in groups), default=0)
    disk = 4 * sum(parameter_count(study.model, features, cell.latent_dim) for cell in missing.values())
    known = traits(data) if data else PLAIN
    seconds = sum(_seconds(group, missing, features, runtime, known) for group in groups) / max(1, at_once)
    sizes = ", ".join(f"{count} of {size}" for size, count in Counter(map(len, groups)).items())
    return [
        ("device", f"{runtime.device}, torch {runtime.torch}, {runtime.precision}"),
        ("stacks", f"{sizes}; {at_once} at a time" if groups else "none"),
        ("parameters", f"{parameters:,} a cell at most"),
        ("memory", f"{(memory + copies) / 1e6:,.0f} MB for stacks in training and the rows they see, and the data"),
        ("disk", f"{disk / 1e6:,.0f} MB of weights"),
        ("time", f"about {_duration(seconds)} of training, from {MEASURED_UPDATES} measured updates" if groups else "none"),
    ]


def _copied_bytes(cells: list[Cell], data: Prepared | None) -> int:
    """What a stack copies of the data: one split of a dataset for each level of noise. Nothing is known of unprepared data."""
    splits = (data.x["train"], data.x["validation"]) if data else ()
    return sum(4 * x[dataset].numel() for x in splits for dataset, _ in versions(cells))


def _seconds(group: list[str], cells: dict[str, Cell], features: int, runtime: Runtime, traits: Traits) -> float:
    """Training time of one stack, from a few updates on random data after some to warm up."""
    budget = cells[group[0]].train
    short = budget.model_copy(update={"updates": MEASURED_UPDATES, "history_points": 3})
    members = [dataclasses.replace(cells[key], dataset=0, train=short) for key in group]
    x = torch.rand(MEASURED_ROWS, features)
    times = [time.perf_counter()]
    with one_thread():
        trainer = StackTrainer(members, [x], [x[:1]], runtime.device, runtime.precision, traits)
        for _ in trainer.run():
            times.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(times)]
    return min(steps[1:]) / (MEASURED_UPDATES / 3) * budget.updates


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _defaults(study: Study) -> str:
    """Every setting of the study, those that it leaves to their defaults too."""
    lines = []
    for section in Study.sections:
        for field, value in getattr(study, section).model_dump(mode="json").items():
            lines.append((f"{section}.{field}", "" if value is None else value))
    return tabulate(lines, headers=("setting", "value"), tablefmt="simple", maxcolwidths=[None, 100])
