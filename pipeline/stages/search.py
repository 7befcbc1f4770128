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
    make_folder,
    trained_stacks,
    write_json,
    write_table,
)
from pipeline.config import CONFIG_FOLDER, Settings, Study, load_settings
from pipeline.devices import find_runtime, keep_freed_memory
from pipeline.evaluation import stack_size
from pipeline.executors import Interrupted, local_executor
from pipeline.goals import Judge, Values
from pipeline.grid import ENGINE_VERSION, Cell, identify
from pipeline.searches import Search, load_listed, load_search
from pipeline.storages import SearchError, open_storage, storage_url
from pipeline.trainer import RECORDED, records, unconverged
from pipeline.trials import GRID, SETTINGS, Batch, Standing, Trials

WAITED = 0.5  # seconds between looks at what other searchers do
SEARCH = "search"  # beside GRID, the side of a comparison

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
        make_folder(Folders(name).runs)  # by which `clean` knows a search that was interrupted
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
        """The whole search: its trials, and then the final."""
        part = self._part_of_trials()
        for step in self.find():
            yield step._replace(share=part * step.share)
        for step in self.final.steps():
            yield step._replace(share=part + (1 - part) * step.share)

    @cached_property
    def final(self) -> Final:
        """What comes after the trials."""
        return Final(self)

    def _part_of_trials(self) -> float:
        """The share of all updates that trials take, if nothing is trained yet and no trial leaves for another reason."""
        search, rungs = self.search, [*self.trials.rungs, self.train.updates]
        trials = sum(halving.costs(search.batch, search.halving or 1, rungs)) / search.batch * search.trials
        sides, winner = 1 + bool(self.grid), search.winner
        later = sides * (winner.finalists * len(winner.validation_seeds) + len(winner.test_seeds))
        return trials / (trials + later * self.train.updates)

    def find(self) -> Iterator[Step]:
        """Trains until the target count is finished."""
        yield Step(self.trials.standing(), "reading the grid", 0.0)
        self._begin_with_the_grid()
        while not (standing := self.trials.standing()).reached:
            if batch := self.trials.next():
                yield from self._train(batch)
            elif (standing := self.trials.standing()).running:
                yield Step(standing, "waiting for other searchers", standing.ended / standing.target)
                self.wait()
            elif self.trials.exhausted:
                break

    def wait(self) -> None:
        """A moment, for others. Raises Interrupted."""
        time.sleep(WAITED)
        if number := self.stop():
            raise Interrupted(number)

    # The grid

    def _begin_with_the_grid(self) -> None:
        params = self.trials.inside(self.grid)
        self.trials.add_from_grid(self.search.study or "", params, self._objectives(self.grid_values))

    @cached_property
    def grid_values(self) -> Values:
        """All goals of the grid's cells, on validation data."""
        device, size = self.runtime.device, stack_size(self.on_device)
        return self.judge.values(trained_stacks(self.folders, self.grid, self.data.features, device, size))

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
        fresh = self._objectives(self.values({key: cell for key, cell in sound.items() if key not in known}))
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
        values = {key: row for key, row in self.values(self.sound(batch.cells)).items() if None not in row}
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

    def sound(self, wanted: Mapping[str, Cell]) -> dict[str, Cell]:
        """Those trained cells that did not diverge."""
        return {key: cell for key, cell in wanted.items() if self.store.record(key)["status"] == "finished"}

    def kept(self, wanted: Mapping[str, Cell]) -> Iterator[Any]:
        return kept_stacks(self.store, wanted, self.data.features, self.runtime.device, stack_size(self.on_device))

    def values(self, wanted: Mapping[str, Cell]) -> Values:
        """All goals of the kept weights, on validation data."""
        return self.judge.values(self.kept(wanted))

    def _objectives(self, values: Values) -> Values:
        return {key: found[: len(self.search.objectives)] for key, found in values.items()}


class Final:
    """The best of a search against the best of its grid: each is chosen among finalists, on seeds that no trial has seen.

    Everything here may be asked for once what it is about is trained, which `steps` does.
    """

    def __init__(self, hunt: Hunt):
        self.hunt, self.winner = hunt, hunt.search.winner

    def steps(self) -> Iterator[Step]:
        """Trains the finalists of both sides on the validation seeds, and the best of each on the test's."""
        seeds, others = self.winner.finalists * len(self.winner.validation_seeds), len(self.winner.test_seeds)
        share = seeds / (seeds + others)
        with contextlib.ExitStack() as held:
            while not self._are_ours(held):  # of several searchers, the first trains them
                yield Step(self.hunt.trials.standing(), "waiting for another searcher", 0.0)
                self.hunt.wait()
            yield from self._train(self.trained, "finalists on other seeds", 0.0, share)
            winner = self.hunt.identified([self.best[SEARCH]])
            yield from self._train(
                winner | self.tested(SEARCH) | self.tested(GRID), "winner and grid on other seeds", share, 1.0
            )

    def _are_ours(self, held: contextlib.ExitStack) -> bool:
        try:
            held.enter_context(self.hunt.store.results_lock(self.hunt.name, wait=False))
        except HeldError:
            return False
        return True

    def _train(self, wanted: Mapping[str, Cell], doing: str, begin: float, end: float) -> Iterator[Step]:
        standing = self.hunt.trials.standing()
        for advance in self.hunt.executor.run(wanted, self.hunt.data):
            yield Step(standing, doing, begin + (end - begin) * advance.updates_done / advance.updates)

    def _on_seeds(self, cell: Cell, seeds: Sequence[int]) -> dict[str, Cell]:
        return self.hunt.identified([replace(cell, seed=seed) for seed in seeds])

    @cached_property
    def finalists(self) -> dict[str, list[Cell]]:
        """The best settings of each side, best first."""
        return {SEARCH: self.hunt.trials.finalists(), GRID: self._best_of_grid()}

    def _best_of_grid(self) -> list[Cell]:
        """By the mean of what chooses the winner, on validation data.

        Over seeds on which they are compared nowhere else; over all where the grid has no others.
        """
        hunt, chooses = self.hunt, self.hunt.search.chooses
        scores = {key: values[hunt.chooses] for key, values in hunt.grid_values.items()}
        rows = [{"key": key, "score": score, "setting": str(replace(hunt.grid[key], seed=0))} for key, score in scores.items()]
        table = pd.DataFrame(rows, columns=["key", "score", "setting"]).dropna()
        if table.empty:
            return []
        compared = {*self.winner.validation_seeds, *self.winner.test_seeds}
        others = table[[hunt.grid[key].seed not in compared for key in table["key"]]]
        means = (table if others.empty else others).groupby("setting")["score"].mean()
        ranked = means.sort_values(ascending=not chooses.maximised, kind="stable")
        known = table.drop_duplicates("setting").set_index("setting")["key"]
        return [hunt.grid[known[setting]] for setting in ranked.index[: self.winner.finalists]]

    @cached_property
    def _places(self) -> dict[tuple[str, int], dict[str, Cell]]:
        """By side and place a finalist on the validation seeds."""
        seeds = self.winner.validation_seeds
        return {
            (side, place): self._on_seeds(cell, seeds)
            for side, cells in self.finalists.items()
            for place, cell in enumerate(cells)
        }

    @property
    def trained(self) -> dict[str, Cell]:
        """The finalists of both sides on the validation seeds, by id."""
        return {key: cell for cells in self._places.values() for key, cell in cells.items()}

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What chooses the winner, on validation data, for each finalist and seed; nothing where it diverged."""
        values = self.hunt.values(self.hunt.sound(self.trained))
        scores = {key: found[self.hunt.chooses] for key, found in values.items()}
        rows = [
            {"side": side, "place": place, "cell_id": key, **cell.row(), "score": scores.get(key)}
            for (side, place), cells in self._places.items()
            for key, cell in cells.items()
        ]
        return pd.DataFrame(rows).astype({"score": float})

    def means(self, side: str) -> pd.Series:
        """Mean scores of a side's finalists, by place; NaN of one that has none on some seed."""
        scores = self.scores[self.scores["side"] == side].groupby("place")["score"]
        return scores.agg(lambda column: column.mean(skipna=False))

    @cached_property
    def best(self) -> dict[str, Cell]:
        """Of each side that has any the finalist with the best mean; the first where none has one."""
        return {side: cells[self._best_place(side)] for side, cells in self.finalists.items() if cells}

    def _best_place(self, side: str) -> int:
        means = self.means(side).dropna()
        if means.empty:
            return 0
        return int(means.idxmax() if self.hunt.search.chooses.maximised else means.idxmin())

    def tested(self, side: str) -> dict[str, Cell]:
        """The best of a side on the seeds of the test, by id; empty where the side has none."""
        return self._on_seeds(self.best[side], self.winner.test_seeds) if side in self.best else {}


# What is written


def _write(hunt: Hunt) -> None:
    folder, store = Folders(hunt.name).search, hunt.store
    shutil.rmtree(folder, ignore_errors=True)
    (best,) = hunt.identified([hunt.final.best[SEARCH]])
    trials, rungs, weights = _trials(hunt, best), hunt.trials.rungs_table(), hunt.trials.importances()
    keys = dict.fromkeys(trials.loc[trials["state"] != GRID, "cell_id"])
    write_table(folder / "trials.csv", trials)
    write_table(folder / "rungs.csv", rungs)
    write_table(folder / "importances.csv", weights)
    write_table(folder / "history.csv", store.history(key for key in keys if store.has_history(key)))
    write_table(folder / "finalists.csv", hunt.final.scores)
    write_table(folder / "winner.csv", _compared(hunt))
    link(store.weights_path(best), folder / "weights" / f"{best}.safetensors")
    write_json(folder / "about.json", _about(hunt, trials))
    for kind, picture in search_figures.all_of(hunt.search, trials, rungs, weights).items():
        drawing.save(picture, folder / "pictures" / f"{kind}.png")


def _trials(hunt: Hunt, best: str) -> pd.DataFrame:
    """All trials; of the finalists `final` is the mean over the validation seeds, and one is the `best`."""
    trials, finalists = hunt.trials.table(), hunt.identified(hunt.final.finalists[SEARCH])
    complete = trials["cell_id"].where(trials["state"] == "complete")
    finals = complete.map(dict(zip(finalists, hunt.final.means(SEARCH), strict=True)))
    return trials.assign(final=finals, best=(complete == best) & ~complete.duplicated())  # two trials may be one cell


def _compared(hunt: Hunt) -> pd.DataFrame:
    """Winner and grid's best setting, seed by seed, on the test set, which nothing before this has seen."""
    judge = Judge(hunt.on_device, hunt.goals, "test")
    rows = []
    for side in (SEARCH, GRID):
        sound = hunt.sound(hunt.final.tested(side))
        values = judge.values(hunt.kept(sound))
        for key, cell in sound.items():
            found = {goal.on_test: value for goal, value in zip(hunt.goals, values[key], strict=True)}
            rows.append({"side": side, "cell_id": key, **cell.row(), "updates": cell.train.updates, **found})
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["side", "cell_id", "seed"])


def _about(hunt: Hunt, trials: pd.DataFrame) -> dict[str, Any]:
    search, runtime = hunt.search, hunt.runtime
    own = trials[trials["state"] != GRID]
    trained = own[~own["cell_id"].isin(hunt.grid)].groupby("cell_id")["updates"].max()
    finals = hunt.final.trained.keys() - hunt.grid.keys()
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
        "finalist_updates": sum(hunt.store.record(key)["updates"] for key in finals),
        "grid_cells": len(hunt.grid),
        "grid_updates": sum(cell.train.updates for cell in hunt.grid.values()),
        "device": runtime.device,
        "torch": runtime.torch,
        "precision": runtime.precision,
        "engine_version": ENGINE_VERSION,
    }
