"""`search`: Optuna over a space of settings. A batch of trials is drawn, trained as stacks, halved at rungs, and told."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from pipeline import drawing, halving, search_figures, tracking
from pipeline.artifacts import (
    CellStore,
    Folders,
    HeldError,
    Prepared,
    finished_cells,
    kept_stacks,
    link,
    load_prepared,
    trained_stacks,
    write_json,
    write_table,
)
from pipeline.config import CONFIG_FOLDER, Settings, Study, load_settings
from pipeline.evaluation import stack_size
from pipeline.executors import Interrupted, find_runtime, keep_freed_memory, local_executor
from pipeline.goals import Judge, Values
from pipeline.grid import ENGINE_VERSION, Cell, identify
from pipeline.searches import Search, load_listed, load_search
from pipeline.storages import SearchError, open_storage, storage_url
from pipeline.trainer import RECORDED, records, unconverged
from pipeline.trials import GRID, SETTINGS, Batch, Standing, Trials

WAITED = 0.5  # seconds between looks at what other searchers do
WINNER = "winner"

Stop = Callable[[], int | None]


class Step(NamedTuple):
    """How far a search is: its trials, what it does, and about which share of its work is done."""

    standing: Standing
    doing: str
    share: float


Show = Callable[[str, Iterable[Step]], None]
"""Drives a search by taking every Step, and shows it under a name."""


def run(name: str, show: Show, stop: Stop = lambda: None) -> None:
    """Writes `runs/<name>/search/`. Raises VaesweepError; Interrupted where `stop` answers a signal's number."""
    settings, (search, study) = load_settings(), load_search(name)
    load_listed(settings)
    spec, _, _ = search.settled(study)
    data = load_prepared(Folders(search.study or name).prepared, spec)
    keep_freed_memory()
    store = CellStore()
    with store.lock(f"search {name}", shared=True), open_storage(storage_url(search)) as storage:
        hunt = Hunt(name, search, study, data, settings, store, storage, stop)
        hunt.check()
        with hunt.trials.searcher:
            show(name, hunt.steps())
        with store.results_lock(name, wait=True):
            _write(hunt)
    tracking.publish(searches=[name])


class Hunt:
    """One search, from its first trial to the winner on other seeds."""

    def __init__(
        self,
        name: str,
        search: Search,
        study: Study | None,
        data: Prepared,
        settings: Settings,
        store: CellStore,
        storage: Any,
        stop: Stop,
    ):
        self.name, self.search, self.study, self.data, self.store, self.stop = name, search, study, data, store, stop
        self.runtime = find_runtime(settings)
        self.executor = local_executor(store, self.runtime, settings.stack_size, stop)
        _, self.model, self.train = search.settled(study)
        self.trials = Trials(name, search, self.model, self.train, data.hashes[0], self.runtime, storage, store)
        self.folders = Folders(search.study or name)
        self.goals = list(dict.fromkeys([*search.objectives, search.chooses]))
        self.chooses = self.goals.index(search.chooses)
        self.on_device = data.to(self.runtime.device)
        self.judge = Judge(self.on_device, self.goals)
        self.grid = finished_cells(self.folders, study, data) if study else {}

    def check(self) -> None:
        """Whether these data and every arm of the space have the goals, and the budget all rungs. Raises SearchError."""
        where = f"{CONFIG_FOLDER / self.name}.yaml"
        if len(self.trials.rungs) < len(self.search.rungs):
            points = f"{self.train.history_points} history points of {self.train.updates} updates"
            raise SearchError(f"{where}: rungs: each must be another one of the {points}, and not the last")
        for arm in self.search.space.arm.values:
            corners = ({name: item.corners[end] for name, item in self.search.space.varied.items()} for end in (0, -1))
            few, many = (self.judge.lacking(self.trials.cell({**corner, "arm": arm})) for corner in corners)
            if lacking := [goal for goal in few if goal in many]:
                key = "objectives" if lacking[0] in self.search.objectives else "winner.goal"
                data = self.data.description["name"]
                raise SearchError(f"{where}: {key}: arm '{arm}' on '{data}' has no {lacking[0].metric}")

    def steps(self) -> Iterator[Step]:
        """The whole search: its trials, and then what came of them."""
        yield from self.find()
        yield from self.compare()

    def find(self) -> Iterator[Step]:
        """Trains until the target count is finished."""
        yield Step(self.trials.standing(), "reading the grid", 0.0)
        self._begin_with_the_grid()
        while not (standing := self.trials.standing()).reached:
            if batch := self.trials.next():
                yield from self._train(batch)
            elif (standing := self.trials.standing()).running:
                yield Step(standing, "waiting for other searchers", standing.ended / standing.target)
                self._wait()
            elif self.trials.exhausted:
                break

    def compare(self) -> Iterator[Step]:
        """Trains the winner and the grid's best setting on the winner's seeds."""
        self.winner, self.rival = self.trials.winner(), self._rival()
        compared = self.seeds(self.winner) | self.seeds(self.rival) | self.identified([self.winner])
        standing = self.trials.standing()
        with contextlib.ExitStack() as held:
            while not self._are_ours(held):  # of several searchers, the first trains them
                yield Step(standing, "waiting for another searcher", 1.0)
                self._wait()
            for _ in self.executor.run(compared, self.data):
                yield Step(standing, "winner and grid on other seeds", 1.0)

    def _are_ours(self, held: contextlib.ExitStack) -> bool:
        try:
            held.enter_context(self.store.results_lock(self.name, wait=False))
        except HeldError:
            return False
        return True

    def _wait(self) -> None:
        time.sleep(WAITED)
        if number := self.stop():
            raise Interrupted(number)

    # The grid

    def _begin_with_the_grid(self) -> None:
        params = self.trials.inside(self.grid)
        self.trials.add_from_grid(self.search.study or "", params, self._objectives(self._grid_values))

    @cached_property
    def _grid_values(self) -> Values:
        device, size = self.runtime.device, stack_size(self.on_device)
        return self.judge.values(trained_stacks(self.folders, self.grid, self.data.features, device, size))

    def _rival(self) -> Cell | None:
        """The grid's best setting, by its mean of what chooses the winner, on validation data.

        Over seeds on which it is not compared, as the winner is chosen; over all where it has no others.
        """
        scores = {key: values[self.chooses] for key, values in self._grid_values.items()}
        rows = [{"key": key, "score": score, "setting": str(replace(self.grid[key], seed=0))} for key, score in scores.items()]
        table = pd.DataFrame(rows, columns=["key", "score", "setting"]).dropna()
        if table.empty:
            return None
        others = table[[self.grid[key].seed not in self.search.winner.seeds for key in table["key"]]]
        means = (table if others.empty else others).groupby("setting")["score"].mean()
        best = means.idxmax() if self.search.chooses.maximised else means.idxmin()
        return self.grid[table.loc[table["setting"] == best, "key"].iloc[0]]

    def seeds(self, cell: Cell | None) -> dict[str, Cell]:
        """A setting on the winner's seeds, by id."""
        return self.identified([replace(cell, seed=seed) for seed in self.search.winner.seeds] if cell else [])

    def identified(self, wanted: Sequence[Cell]) -> dict[str, Cell]:
        return identify(wanted, self.data.hashes, self.runtime)

    # A batch

    def _train(self, batch: Batch) -> Iterator[Step]:
        """From rung to rung, where some leave, to the end."""
        rungs = [*self.trials.rungs, self.train.updates]
        costs, before = halving.costs(batch.size, self.search.halving or 1, rungs), self.trials.standing().ended
        for number, update in enumerate(rungs):
            if not self.trials.still_ours(batch):
                return
            decision, standing = self.trials.decision(batch, update), self.trials.standing()
            doing = f"batch of {batch.size}: {len(batch.running)} to update {update}"
            while not decision and (wanted := self._wanted(batch, update)):
                for advance in self.executor.run(wanted, self.data, update):
                    done = (sum(costs[:number]) + costs[number] * advance.updates_done / advance.updates) / sum(costs)
                    yield Step(standing, doing, min(1.0, (before + done * batch.size) / standing.target))
            if update < self.train.updates:
                self._leave(batch, update, decision or self._decide(batch, update))
        self._finish(batch)

    def _wanted(self, batch: Batch, update: int) -> dict[str, Cell]:
        """Cells that were not judged here, if any is not trained so far yet, or no more, as its checkpoint has gone."""
        judged, reached, end = self._judged(batch, update), self.store.progress(), update == self.train.updates
        there = {key for key, place in reached.items() if place.update >= update and not end}
        wanted = {key: cell for key, cell in batch.cells.items() if key not in judged}
        return wanted if any(key not in self.store and key not in there for key in wanted) else {}

    def _decide(self, batch: Batch, update: int) -> dict[str, Any]:
        records = self._records(batch.cells, update)
        sound = {key: batch.cells[key] for key, record in records.items() if record["status"] != "diverged"}
        known = self._judged(batch, update)
        fresh = self._objectives(self._values({key: cell for key, cell in sound.items() if key not in known}))
        for key, values in fresh.items():
            named = dict(zip(self.search.goal_names, values, strict=True))
            self.store.save_rung(key, update, {**self.store.rung(key, update), **named})
        return self.trials.decide(batch, update, known | fresh, records.keys() - sound.keys())

    def _judged(self, batch: Batch, update: int) -> Values:
        """Objectives of those cells of a batch that were measured at this rung before, by this search or another one."""
        names = self.search.goal_names
        found = {key: self.store.rung(key, update) for key in batch.cells}
        return {key: [row[name] for name in names] for key, row in found.items() if all(name in row for name in names)}

    def _leave(self, batch: Batch, update: int, decision: Mapping[str, Any]) -> None:
        leaving = self.trials.leaving(batch, decision)
        staying = {member.key for member in batch.running if member not in leaving}  # two trials may be one cell
        gone = {member.key: member.cell for member in leaving if member.key not in staying}
        for key, record in self._records(gone, update).items():
            self.store.save_unfinished(key, record)
        self.trials.leave(batch, update, decision)
        self.store.release(keep=batch.cells)

    def _finish(self, batch: Batch) -> None:
        sound = {key: cell for key, cell in batch.cells.items() if self.is_sound(key)}
        values = {key: row for key, row in self._values(sound).items() if None not in row}
        notes: dict[str, dict[str, Any]] = {key: {"updates": self.store.record(key)["updates"]} for key in batch.cells}
        for key, row in values.items():
            notes[key] |= {"score": row[self.chooses], "unconverged": unconverged(self.store.record(key))}
        self.trials.finish(batch, self._objectives(values), notes)

    def _records(self, wanted: Mapping[str, Cell], update: int) -> dict[str, dict[str, Any]]:
        """How the training of those cells has gone that stand at an update, by id."""
        progress = self.store.progress()
        return {
            key: records(self.store.load_rows([progress[key]], names=RECORDED), cell.train, update)[0]
            for key, cell in wanted.items()
            if key not in self.store and key in progress and progress[key].update == update
        }

    def is_sound(self, key: str) -> bool:
        return self.store.record(key)["status"] == "finished"

    def kept(self, wanted: Mapping[str, Cell]) -> Iterator[Any]:
        return kept_stacks(self.store, wanted, self.data.features, self.runtime.device, stack_size(self.on_device))

    def _values(self, wanted: Mapping[str, Cell]) -> Values:
        """All goals of the kept weights, on validation data."""
        return self.judge.values(self.kept(wanted))

    def _objectives(self, values: Values) -> Values:
        return {key: found[: len(self.search.objectives)] for key, found in values.items()}


# What is written


def _write(hunt: Hunt) -> None:
    folder, store = Folders(hunt.name).search, hunt.store
    shutil.rmtree(folder, ignore_errors=True)
    trials, rungs, weights = hunt.trials.table(), hunt.trials.rungs_table(), hunt.trials.importances()
    keys = dict.fromkeys(trials.loc[trials["state"] != GRID, "cell_id"])
    write_table(folder / "trials.csv", trials)
    write_table(folder / "rungs.csv", rungs)
    write_table(folder / "importances.csv", weights)
    write_table(folder / "history.csv", store.history(key for key in keys if store.has_history(key)))
    write_table(folder / "winner.csv", _compared(hunt))
    (best,) = hunt.identified([hunt.winner])
    link(store.weights_path(best), folder / "weights" / f"{best}.safetensors")
    write_json(folder / "about.json", _about(hunt, trials))
    for kind, picture in search_figures.all_of(hunt.search, trials, rungs, weights).items():
        drawing.save(picture, folder / "pictures" / f"{kind}.png")


def _compared(hunt: Hunt) -> pd.DataFrame:
    """Winner and grid's best setting, seed by seed, on the test set, which nothing before this has seen."""
    judge = Judge(hunt.on_device, hunt.goals, "test")
    sides = {WINNER: hunt.seeds(hunt.winner), GRID: hunt.seeds(hunt.rival)}
    rows = []
    for side, wanted in sides.items():
        sound = {key: cell for key, cell in wanted.items() if hunt.is_sound(key)}
        values = judge.values(hunt.kept(sound))
        for key, cell in sound.items():
            found = {goal.on_test: value for goal, value in zip(hunt.goals, values[key], strict=True)}
            rows.append({"side": side, "cell_id": key, **cell.row(), "updates": cell.train.updates, **found})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["side", "cell_id", "seed"])


def _about(hunt: Hunt, trials: pd.DataFrame) -> dict[str, Any]:
    search, runtime = hunt.search, hunt.runtime
    own = trials[trials["state"] != GRID]
    trained = own[~own["cell_id"].isin(hunt.grid)].groupby("cell_id")["updates"].max()
    return {
        "search": hunt.name,
        "title": search.title,
        "study": search.study or "",
        "settings": list(SETTINGS),
        "objectives": search.goal_names,
        "optuna_study": hunt.trials.study.study_name,
        "sampler": search.sampler.kind,
        "trials": search.trials,
        "batch": search.batch,
        "seed": search.seed,
        "updates": hunt.train.updates,
        "rungs": hunt.trials.rungs,
        "updates_spent": int(trained.sum()),
        "grid_cells": len(hunt.grid),
        "grid_updates": sum(cell.train.updates for cell in hunt.grid.values()),
        "device": runtime.device,
        "torch": runtime.torch,
        "precision": runtime.precision,
        "engine_version": ENGINE_VERSION,
    }
