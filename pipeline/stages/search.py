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
from pipeline.executors import Advance, find_runtime, local_executor
from pipeline.grid import ENGINE_VERSION, Cell, Runtime, cell_id
from pipeline.trainer import unconverged

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
    data, runtime, store = load_prepared(Folders(search.study).prepared, study.data), find_runtime(settings), CellStore()
    if len(data.hashes) > 1:
        raise SearchError(f"configs/{name}.yaml: study: must have one dataset, but '{search.study}' has {len(data.hashes)}")
    with store.lock(f"search {name}"):
        trials = Trials(name, search, study, data, runtime)
        executor = local_executor(store, runtime, settings.stack_size, stop)
        show(name, executor.run(trials.told(), data))  # cells of earlier trials, if somebody emptied the store
        while batch := trials.running() or trials.ask():
            show(f"{name} {trials.finished + len(batch)}/{search.trials}", executor.run(batch, data))
            trials.tell(store)
        _write(name, search, trials, store, runtime)
    tracking.publish(searches=[name])


class Trials:
    """The trials of one search in Optuna's storage, and the cells that they are.

    What an interrupted start left running is trained and told by the next one, so a search ends as if nothing had stopped it.
    """

    def __init__(self, name: str, search: Search, study: Study, data: Prepared, runtime: Runtime):
        self.search, self.model, self.data_hash, self.runtime = search, study.model, data.hashes[0], runtime
        self.sigma2 = study.grid.sigma2[0] if study.model.likelihood == "gaussian" else None
        self.study = self._open(name)
        for trial in self._in_state("RUNNING"):
            if "cell_id" not in trial.user_attrs:  # it was interrupted while its parameters were drawn
                self.study.tell(trial.number, state=trial.state.FAIL)

    def _open(self, name: str) -> optuna.Study:
        """The study in Optuna's storage; another recipe is another study. Raises SearchError."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        recipe = [
            self.search.model_dump(mode="json", exclude={"title", "trials"}),
            self.model.model_dump(mode="json"),
            self.data_hash,
            [self.runtime.device, ".".join(self.runtime.torch.split(".")[:2]), self.runtime.precision, ENGINE_VERSION],
        ]
        path = main_checkout() / "optuna.db"
        try:
            return optuna.create_study(
                storage="sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F"),
                study_name=f"{name}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}",
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
        except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
            raise SearchError(f"{path}: cannot be opened: {str(error).splitlines()[0]}") from error

    def _in_state(self, *names: str) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name in names]

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """A sampler for one batch, seeded by how many trials went before: a resumed search goes on as it would have."""
        import optuna.samplers as samplers

        seed = self.search.sampler.seed + len(self.study.trials)
        return {
            "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=self.search.batch, constant_liar=True),
            "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=self.search.batch),
            "qmc": lambda: samplers.QMCSampler(seed=self.search.sampler.seed, qmc_type="sobol", scramble=True),
            "random": lambda: samplers.RandomSampler(seed=seed),
        }[self.search.sampler.kind]()

    @property
    def finished(self) -> int:
        """How many trials have values."""
        return len(self._in_state("COMPLETE"))

    def told(self) -> dict[str, Cell]:
        """Cells of the finished trials, by id."""
        return {trial.user_attrs["cell_id"]: self._cell(trial.params) for trial in self._in_state("COMPLETE")}

    def running(self) -> dict[str, Cell]:
        """Cells of the trials that were asked and not told, by id."""
        return {trial.user_attrs["cell_id"]: self._cell(trial.params) for trial in self._in_state("RUNNING")}

    def ask(self) -> dict[str, Cell]:
        """The next batch of trials as cells by their ids; nothing once the target count is finished."""
        wanted = min(self.search.batch, self.search.trials - self.finished)
        asked = len(self.study.trials)
        if wanted > 0 and asked + wanted > MOST_ASKED * self.search.trials + self.search.batch:
            raise SearchError(f"{self.study.study_name}: {asked} trials gave only {self.finished} finished ones")
        self.study.sampler = self._sampler()
        for _ in range(wanted):
            self._ask(batch=asked)
        return self.running()

    def _ask(self, batch: int) -> None:
        trial, space = self.study.ask(), self.search.space
        for name, limits in (("beta", space.beta), ("l2", space.l2)):
            if limits:
                trial.suggest_float(name, limits.low, limits.high, log=True)
        trial.set_user_attr("batch", batch)
        trial.set_user_attr("cell_id", cell_id(self._cell(trial.params), self.data_hash, self.runtime))

    def _cell(self, params: dict[str, float]) -> Cell:
        search = self.search
        return Cell(
            arm_name=search.arm,
            beta=params["beta"],
            latent_dim=search.latent_dim,
            l2=params.get("l2", 0.0),
            sigma2=self.sigma2,
            learning_rate=search.learning_rate,
            seed=search.seed,
            dataset=0,
            model=self.model,
            train=search.train,
        )

    def tell(self, store: CellStore) -> None:
        """Distortion and rate of the kept weights on the validation set; a diverged trial is failed."""
        for trial in self._in_state("RUNNING"):
            record = store.record(trial.user_attrs["cell_id"])
            history = record["history"]
            if record["status"] == "diverged":
                self.study.tell(trial.number, state=trial.state.FAIL)
            else:
                point = history["update"].index(record["evaluated_update"])
                self.study.tell(trial.number, [history[objective][point] for objective in (DISTORTION, RATE)])

    def table(self, store: CellStore) -> pd.DataFrame:
        """One row a trial, in the order in which they were asked."""
        front = {trial.number for trial in self.study.best_trials}
        ended = [trial for trial in self._in_state("COMPLETE", "FAIL") if "cell_id" in trial.user_attrs]
        return pd.DataFrame([self._row(trial, front, store) for trial in ended])

    def _row(self, trial: optuna.trial.FrozenTrial, front: set[int], store: CellStore) -> dict[str, Any]:
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
            "unconverged": unconverged(store.record(trial.user_attrs["cell_id"])),
            "batch": trial.user_attrs["batch"],
        }


def _write(name: str, search: Search, trials: Trials, store: CellStore, runtime: Runtime) -> None:
    folder = Folders(name).search
    shutil.rmtree(folder, ignore_errors=True)
    table = trials.table(store)
    write_table(folder / "trials.csv", table)
    write_table(folder / "history.csv", store.history(dict.fromkeys(table["cell_id"])))
    about = {
        "search": name,
        "title": search.title,
        "study": search.study,
        "sampler": search.sampler.kind,
        "trials": search.trials,
        "latent_dim": search.latent_dim,
        "learning_rate": search.learning_rate,
        "seed": search.seed,
        "updates": search.train.updates,
        "device": runtime.device,
        "torch": runtime.torch,
        "precision": runtime.precision,
        "engine_version": ENGINE_VERSION,
    }
    write_json(folder / "about.json", about)
