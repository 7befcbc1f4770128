"""`search`: Optuna over KL weights. A batch of trials is asked, trained as one stack, and told; never one after another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline import tracking
from pipeline.artifacts import CellStore, Folders, Prepared, load_prepared, main_checkout, write_json, write_table
from pipeline.config import Search, Study, VaesweepError, load_search, load_settings, load_study
from pipeline.executors import Advance, Inline, find_runtime
from pipeline.grid import ENGINE_VERSION, Cell, Runtime, cell_id

if TYPE_CHECKING:
    import optuna

DISTORTION, RATE = "validation_reconstruction", "validation_penalty"
MOST_ASKED = 3  # trials that are asked at most, as a multiple of the target count


class SearchError(VaesweepError):
    """A search that cannot reach its target count."""


def run(name: str, show: Callable[[str, Iterable[Advance]], None], stop: Callable[[], int | None] = lambda: None) -> None:
    """Writes `runs/<name>/search/`. Raises VaesweepError; Interrupted where `stop` answers a signal's number."""
    settings, search = load_settings(), load_search(name)
    study = load_study(search.study)
    data, runtime, store = load_prepared(Folders(search.study).prepared, study.data), find_runtime(settings.device), CellStore()
    if len(data.hashes) > 1:
        raise SearchError(f"configs/{name}.yaml: study: must have one dataset, but '{search.study}' has {len(data.hashes)}")
    trials = Trials(name, search, study, data, runtime)
    with store.lock(f"search {name}"):
        executor = Inline(store, runtime.device, settings.stack_size or search.batch, stop)
        while batch := trials.ask():
            label = f"{name} {trials.finished + len(batch)}/{search.trials}"
            show(label, executor.run(batch, data))
            trials.tell(store)
    _write(name, search, trials, store, runtime)
    tracking.publish(searches=[name])


class Trials:
    """The trials of one search in Optuna's storage, and the cells that they are."""

    def __init__(self, name: str, search: Search, study: Study, data: Prepared, runtime: Runtime):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self.model, self.data_hash, self.runtime = search, study.model, data.hashes[0], runtime
        recipe = json.dumps(
            [search.model_dump(mode="json"), study.model.model_dump(mode="json"), self.data_hash, ENGINE_VERSION]
        )
        self.study = optuna.create_study(
            storage=f"sqlite:///{main_checkout() / 'optuna.db'}",
            study_name=f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}",  # another recipe is another study
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        self.study.sampler = self._sampler(len(self.study.trials))
        self.asked: dict[str, list[optuna.Trial]] = {}
        self._retry_stale()

    def _sampler(self, trials_before: int) -> optuna.samplers.BaseSampler:
        """A sampler of its own for each start: with the same seed, a resumed one would propose its first trials again."""
        import optuna.samplers as samplers

        seed = self.search.sampler.seed + trials_before
        return {
            "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=self.search.batch, constant_liar=True),
            "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=self.search.batch),
            "qmc": lambda: samplers.QMCSampler(seed=self.search.sampler.seed, qmc_type="sobol", scramble=True),
            "random": lambda: samplers.RandomSampler(seed=seed),
        }[self.search.sampler.kind]()

    def _retry_stale(self) -> None:
        """Trials that an interrupted start left running are failed, and their parameters are asked again first."""
        import optuna

        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if trial.params:
                self.study.enqueue_trial(trial.params)

    @property
    def finished(self) -> int:
        import optuna

        return len(self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))

    def ask(self) -> dict[str, Cell]:
        """The next batch of trials as cells by their ids; nothing once the target count is finished."""
        wanted = min(self.search.batch, self.search.trials - self.finished)
        if wanted > 0 and len(self.study.trials) + wanted > MOST_ASKED * self.search.trials + self.search.batch:
            raise SearchError(f"{self.study.study_name}: {len(self.study.trials)} trials gave {self.finished} finished ones")
        batch: dict[str, Cell] = {}
        for trial in (self.study.ask() for _ in range(wanted)):
            cell = self._cell(trial)
            key = cell_id(cell, self.data_hash, self.runtime)
            trial.set_user_attr("cell_id", key)
            batch[key] = cell
            self.asked.setdefault(key, []).append(trial)
        return batch

    def _cell(self, trial: optuna.Trial) -> Cell:
        space = self.search.space
        beta = trial.suggest_float("beta", space.beta.low, space.beta.high, log=True)
        l2 = trial.suggest_float("l2", space.l2.low, space.l2.high, log=True) if space.l2 else 0.0
        sigma2 = 1.0 if self.model.likelihood == "gaussian" else None
        search = self.search
        rate = search.learning_rate
        return Cell(search.arm, beta, search.latent_dim, l2, sigma2, rate, search.seed, 0, self.model, search.train)

    def tell(self, store: CellStore) -> None:
        """Distortion and rate of the kept weights on the validation set; a diverged trial is failed."""
        import optuna

        for key, trials in self.asked.items():
            record = store.record(key)
            for trial in trials:
                if record["status"] == "diverged":
                    self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    point = record["history"]["update"].index(record["evaluated_update"])
                    self.study.tell(trial, [record["history"][objective][point] for objective in (DISTORTION, RATE)])
        self.asked = {}

    def table(self) -> pd.DataFrame:
        """One row a trial that ended with a cell, in the order in which they were asked."""
        front = {trial.number for trial in self.study.best_trials}
        ended = [trial for trial in self.study.get_trials(deepcopy=False) if "cell_id" in trial.user_attrs]
        return pd.DataFrame([self._row(trial, front) for trial in ended if trial.state.is_finished()])

    def _row(self, trial: optuna.trial.FrozenTrial, front: set[int]) -> dict[str, Any]:
        distortion, rate = trial.values or (None, None)
        return {
            "number": trial.number,
            "cell_id": trial.user_attrs["cell_id"],
            "state": "complete" if trial.values else "failed",
            "beta": trial.params["beta"],
            "l2": trial.params.get("l2", 0.0),
            "distortion": distortion,
            "rate": rate,
            "on_front": trial.number in front,
            "batch": trial.number // self.search.batch,
        }


def _write(name: str, search: Search, trials: Trials, store: CellStore, runtime: Runtime) -> None:
    folder = Folders(name).search
    shutil.rmtree(folder, ignore_errors=True)
    table = trials.table()
    write_table(folder / "trials.csv", table)
    write_table(folder / "history.csv", store.history(key for key in dict.fromkeys(table["cell_id"]) if key in store))
    about = {
        "search": name,
        "title": search.title,
        "study": search.study,
        "sampler": search.sampler.kind,
        "trials": search.trials,
        "latent_dim": search.latent_dim,
        "updates": search.train.updates,
        "device": runtime.device,
        "torch": runtime.torch,
    }
    write_json(folder / "about.json", about)
