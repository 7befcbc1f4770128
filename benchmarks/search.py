"""A search in batches against `study.optimize`, which calls the same engine one trial at a time; side by side in one run.

    python benchmarks/search.py [--task digits5k] [--seeds 5] [--device cuda]

A seed is that of the sampler and of every trial. Of each seed all ways take a turn, each with an empty cell store and an empty
storage, so that a machine whose speed drifts drifts under all of them. Times are those of the trials, from the first question
to the last answer.

A best value is partly luck, and more so among more trials that reached the end. So the setting of each way's best trial is also
trained on other seeds, equal for all ways and outside the time.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from tabulate import tabulate

from pipeline.artifacts import CellStore, Prepared, kept_stacks, load_prepared, save_prepared
from pipeline.config import Settings
from pipeline.datasets import build, data_root
from pipeline.devices import find_runtime, keep_freed_memory
from pipeline.executors import Inline
from pipeline.grid import Cell
from pipeline.searches import Search

if TYPE_CHECKING:  # imported where they are called: every training process imports this file, and needs none of them
    import optuna

    from pipeline.executors import Executor
    from pipeline.stages.search import Hunt

NETWORK = {"hidden": (400, 256, 128), "likelihood": "bernoulli"}
IMAGES = {
    "model": NETWORK,
    "space": {
        "beta": {"low": 0.1, "high": 4.0},
        "latent_dim": {"low": 5, "high": 32},
        "learning_rate": {"low": 3e-4, "high": 1e-2},
    },
    "objectives": ({"metric": "validation/bce_elbo", "direction": "up"},),
}
COSINE = {"kind": "cosine", "end": 0.0}
OTHER_SEEDS = range(100, 108)


@dataclass(frozen=True)
class Task:
    """What is searched, in batches of how many, with which rungs where trials are halved, and where trials are kept."""

    data: dict[str, Any]
    search: dict[str, Any]
    batch: int
    halved: dict[str, Any]
    storage: str


TASKS = {
    "2-30-30": Task(
        {"name": "uniform2d"},
        {
            "model": {"hidden": (30, 30), "likelihood": "gaussian"},
            "space": {
                "beta": {"low": 0.01, "high": 1.0},
                "latent_dim": 2,
                "sigma2": {"low": 0.003, "high": 0.3},
                "learning_rate": {"low": 1e-3, "high": 2e-2},
            },
            "objectives": ({"metric": "validation/elbo", "direction": "up"},),
            "train": {"updates": 2500, "learning_rate_schedule": COSINE},
            "trials": 64,
        },
        batch=64,
        halved={"batch": 64, "rungs": (0.1, 0.25, 0.5), "halving": 2},
        storage="journal.log",
    ),
    "digits5k": Task(
        {"name": "digits5k"},
        {**IMAGES, "train": {"updates": 600, "learning_rate_schedule": COSINE}, "trials": 64},
        batch=8,
        halved={"batch": 8, "rungs": (0.125, 0.375), "halving": 2},
        storage="sqlite:///optuna.db",
    ),
    "mnist": Task(
        {"name": "mnist"},
        {**IMAGES, "train": {"updates": 4690, "learning_rate_schedule": COSINE}, "trials": 256},
        batch=256,
        halved={"batch": 256, "rungs": (0.125, 0.375), "halving": 3},
        storage="sqlite:///optuna.db",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Of one search: its trials, seconds, of which `asking` were Optuna's, and trainings in whole budgets.

    `best` is its best value, `again` the mean of that setting's values on other seeds.
    """

    trials: int
    seconds: float
    asking: float
    trainings: float
    best: float
    again: float

    @property
    def a_minute(self) -> float:
        return 60 * self.trials / self.seconds


def one_at_a_time(search: Search, data: Prepared, device: str, url: str) -> Outcome:
    """`study.optimize`, as its users write it: an objective that trains one model and returns its value."""
    import optuna

    from pipeline.storages import open_storage

    hunt, start = a_hunt(search, data, device, optuna.storages.InMemoryStorage()), time.perf_counter()
    executor = Inline(hunt.store, hunt.runtime)

    def objective(trial: optuna.Trial) -> float:
        suggested = {name: item.values[0] for name, item in search.space if item and item.values}
        for name, item in search.space.varied.items():
            suggest = trial.suggest_int if name == "latent_dim" else trial.suggest_float
            suggested[name] = suggest(name, item.low, item.high, log=True)
        (value,) = _trained(hunt, executor, [hunt.trials.cell(suggested)])
        if value is None:
            raise optuna.TrialPruned
        trial.set_user_attr("suggested", suggested)
        return value

    engine, direction = _Clock(), "maximize" if search.objectives[0].maximised else "minimize"
    with open_storage(url) as storage:
        study = optuna.create_study(storage=storage, direction=direction, sampler=optuna.samplers.TPESampler(seed=search.seed))
        study.optimize(engine.timed(objective), n_trials=search.trials)
        seconds = time.perf_counter() - start
        best = study.best_trial
    again = _on_other_seeds(hunt, hunt.trials.cell(best.user_attrs["suggested"]))
    return Outcome(search.trials, seconds, seconds - engine.seconds, search.trials, best.value, again)


def in_batches(search: Search, data: Prepared, device: str, url: str) -> Outcome:
    """This project's search."""
    from pipeline.storages import open_storage

    with open_storage(url) as storage, _optunas_part() as clock:
        start = time.perf_counter()
        hunt = a_hunt(search, data, device, storage)
        with hunt.trials.searcher:
            for _ in hunt.find():
                pass
        seconds, asking = time.perf_counter() - start, clock.seconds
        best, setting = hunt.trials.study.best_value, hunt.trials.finalists()[0]
        updates = hunt.trials.table().query("state != 'grid'")["updates"].sum()
    return Outcome(search.trials, seconds, asking, updates / search.train.updates, best, _on_other_seeds(hunt, setting))


def a_hunt(search: Search, data: Prepared, device: str, storage: Any) -> Hunt:
    from pipeline.stages.search import Hunt

    settings = Settings(studies=("benchmark",), device=device)
    return Hunt("benchmark", search, None, data, settings, CellStore(Path("store")), storage, lambda: None)


def _trained(hunt: Hunt, executor: Executor, cells: Sequence[Cell]) -> list[float | None]:
    """Values of cells after their whole budget."""
    wanted = hunt.identified(cells)
    for _ in executor.run(wanted, hunt.data):
        pass
    values = hunt.judge.values(kept_stacks(hunt.store, wanted, hunt.data.features, hunt.runtime.device))
    return [values[key][0] for key in wanted]


def _on_other_seeds(hunt: Hunt, cell: Cell) -> float:
    """The mean value of a setting; NaN where it diverges on a seed."""
    values = _trained(hunt, hunt.executor, [replace(cell, seed=seed) for seed in OTHER_SEEDS])
    return float(np.mean([value if value is not None else np.nan for value in values]))


class _Clock:
    """Adds up the seconds of calls, those within another call once."""

    def __init__(self):
        self.seconds, self.depth = 0.0, 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def call_timed(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = time.perf_counter(), self.depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - start

        return call_timed


@contextlib.contextmanager
def _optunas_part() -> Iterator[_Clock]:
    """Times every method by which a search asks, reports, decides, tells and counts: all that touches Optuna or its storage."""
    from pipeline.trials import Trials

    clock = _Clock()
    methods = {name: method for name, method in vars(Trials).items() if callable(method) and name != "cell"}
    for name, method in methods.items():
        setattr(Trials, name, clock.timed(method))
    try:
        yield clock
    finally:
        for name, method in methods.items():
            setattr(Trials, name, method)


def ways(task: Task, seed: int) -> dict[str, tuple[Callable[..., Outcome], Search]]:
    """Who searches, and what."""
    seeds = {
        "seed": seed,
        "winner": {"validation_seeds": (101,), "test_seeds": (100,)},
        "sampler": {"kind": "tpe", "seed": seed},
    }
    shared = {**task.search, "title": "benchmark", "data": task.data, **seeds}
    plain, halved = (Search.model_validate({**shared, **more}) for more in ({"batch": task.batch}, task.halved))
    return {
        "one at a time": (one_at_a_time, plain),
        f"batches of {plain.batch}": (in_batches, plain),
        f"batches of {halved.batch}, halved": (in_batches, halved),
    }


def compare(task: Task, device: str, seeds: int) -> Iterator[dict[str, list[Outcome]]]:
    """Outcomes by way, one a seed; after each seed those so far."""
    found: dict[str, list[Outcome]] = {}
    data = prepared(task)
    for seed in range(seeds):
        for name, (way, search) in ways(task, seed).items():
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                outcome = way(search, data, device, task.storage)
            values = f"best {outcome.best:.2f}, on other seeds {outcome.again:.2f}"
            print(f"seed {seed}, {name}: {outcome.seconds:.1f} s, {values}", flush=True)
            found.setdefault(name, []).append(outcome)
        yield found


def prepared(task: Task) -> Prepared:
    search = ways(task, 0)["one at a time"][1]
    raw = data_root(None, Path.cwd())
    with tempfile.TemporaryDirectory() as folder:
        save_prepared(Path(folder), search.data, build(search.data, raw))
        return load_prepared(Path(folder), search.data)


def table(found: dict[str, list[Outcome]]) -> str:
    """Medians over seeds; of values the mean difference from one at a time, which is the first, with its standard error."""
    base, rows = next(iter(found.values())), []
    for name, outcomes in found.items():
        gains = [
            np.array([getattr(outcome, field) - getattr(other, field) for outcome, other in zip(outcomes, base, strict=True)])
            for field in ("best", "again")
        ]
        rows.append(
            [
                name,
                _median(outcome.a_minute for outcome in outcomes),
                _median(outcome.a_minute / other.a_minute for outcome, other in zip(outcomes, base, strict=True)),
                f"{_median(100 * outcome.asking / outcome.seconds for outcome in outcomes):.1f}%",
                _median(outcome.trainings for outcome in outcomes),
                *("" if outcomes is base else f"{gain.mean():+.2f} ± {_standard_error(gain):.2f}" for gain in gains),
            ]
        )
    heads = [f"{base[0].trials} trials", "a minute", "ratio", "Optuna's part", "trainings", "gain in best", "on other seeds"]
    return tabulate(rows, heads, tablefmt="github", floatfmt=".3g")


def _standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


@click.command(help=__doc__)
@click.option("--task", "chosen", type=click.Choice(list(TASKS)), multiple=True, default=("2-30-30", "digits5k"))
@click.option("--seeds", default=5, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(chosen: tuple[str, ...], seeds: int, device: str) -> None:
    import optuna

    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"torch {torch.__version__}, optuna {optuna.__version__}, {where}")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    keep_freed_memory()
    find_runtime(Settings(studies=("benchmark",), device=device))
    for name in chosen:
        print(f"\n## {name}\n", flush=True)
        for done, found in enumerate(compare(TASKS[name], device, seeds), start=1):
            print(f"\nseeds: {done}\n\n{table(found)}\n", flush=True)


if __name__ == "__main__":
    main()
