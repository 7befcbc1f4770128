"""The trials of a search in Optuna's storage: drawn, told, taken over, counted.

Optuna takes a second to import: here, in `storages.py` and in `proposals.py`, inside functions, and nowhere else.

A batch of trials is drawn in memory, from what the storage knows, and each trial then enters the storage whole, in one
transaction: no killed process leaves half a trial. What is drawn depends on the sampler's seed, the trial's ordinal, and what
was told before; so a search that was killed draws what it would have drawn.

Several processes may search one study. Each names itself in the trials that it has running; where it has gone, another one
fails these and runs them anew, as members of the same batch.
"""

from __future__ import annotations

import contextlib
import uuid
import warnings
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline import halving, proposals
from pipeline.artifacts import CellStore
from pipeline.config import ARMS, Model, Scalar, Strict, Train
from pipeline.grid import Cell, Runtime, cell_id
from pipeline.searches import Axis, Goal, Search
from pipeline.storages import Searcher, SearchError

if TYPE_CHECKING:
    import optuna

MOST_ASKED = 3  # trials that are asked at most, as a multiple of the target count
GRID = "grid"  # state of a trial that is a cell of the study's grid
SETTINGS = ("arm", "beta", "latent_dim", "l2", "sigma2", "learning_rate")
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
AT = "at update "  # begins the attributes that hold two objectives at a rung
OF_PRUNERS = "completed_rung_"  # begins what successive halving notes of a trial, which one that is run anew has to earn
PLACE = ("ordinal", "batch", "first", "size", "cell_id")  # of a trial, which it keeps when it is run anew


@dataclass(frozen=True)
class Member:
    """A running trial of a batch, and the cell that it is. `ordinal` is its place among the search's own trials."""

    number: int
    id: int
    ordinal: int
    key: str
    cell: Cell


@dataclass
class Batch:
    """Trials that train and are halved together: `size` of them from the ordinal `first` on, those that have ended too."""

    name: str
    first: int
    size: int
    running: list[Member] = field(default_factory=list)

    @property
    def cells(self) -> dict[str, Cell]:
        """Of the running trials, by id."""
        return {member.key: member.cell for member in self.running}


@dataclass(frozen=True)
class Standing:
    """How far a search is: its own trials by state.

    `best` is the best value of one objective, `front` how many no other dominates; of trials and the grid's cells together.
    """

    target: int
    complete: int
    pruned: int
    failed: int
    running: int
    best: float | None
    front: int

    @property
    def ended(self) -> int:
        """How many count towards the target."""
        return self.complete + self.pruned

    @property
    def reached(self) -> bool:
        return self.ended >= self.target


class Trials:
    """The trials of one search: drawn, told, taken over, counted. Every method may raise SearchError."""

    def __init__(
        self,
        name: str,
        search: Search,
        model: Model,
        train: Train,
        data_hash: str,
        runtime: Runtime,
        storage: optuna.storages.BaseStorage,
        store: CellStore,
    ):
        self.search, self.model, self.train, self.data_hash, self.runtime = search, model, train, data_hash, runtime
        self.name, self.storage, self.store = search.name or name, storage, store

    @cached_property
    def searcher(self) -> Searcher:
        """This process."""
        return Searcher(self.study, self.store)

    # The study, and what must be equal for everyone who works on it

    @cached_property
    def study(self) -> optuna.Study:
        """Optuna's study, made where it is not there yet."""
        import optuna

        # The id of some cell stands for data, network, budget, seed and engine, which all trials of a study share.
        some = Cell("ae", None, 2, 0.0, None, 1e-3, self.search.seed, 0, self.model, self.train, anneal=None)
        full_name = f"{self.name}-{self._key(some)[:8]}"
        directions = ["maximize" if goal.maximised else "minimize" for goal in self.search.objectives]
        study = optuna.create_study(
            storage=self.storage,
            study_name=full_name,
            directions=directions,
            load_if_exists=True,
            pruner=proposals.pruner(self.search, self.rungs, self.train.updates),
        )
        if (there := [direction.name.lower() for direction in study.directions]) != directions:
            raise SearchError(self._other(full_name, f"directions {', '.join(there)} there, {', '.join(directions)} here"))
        question, known = self._question(), study.user_attrs.get("question", {})
        different = [key for key in {**question, **known} if known.get(key) != question.get(key)]
        if different and study.get_trials(deepcopy=False):
            key = different[0]
            there, here = (asked.get(key, "not given") for asked in (known, question))
            raise SearchError(self._other(full_name, f"{key} {there} there, {here} here"))
        if different:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                study.set_metric_names(self.search.goal_names)  # by which Optuna's own plots and dashboards call them
            study.set_user_attr("question", question)
        return study

    def _question(self) -> dict[str, str]:
        """What decides which trials are drawn and what comes of them, in words; it must be the same for all of a study."""
        search = self.search
        return {
            "objectives": "; ".join(map(_goal_text, search.objectives)),
            "winner.goal": _goal_text(search.chooses),
            **{f"space.{name}": _axis_text(item) for name, item in search.space if isinstance(item, Axis)},
            "sampler": _text(search.sampler, "" if search.sampler.kind == "grid" else "points"),
            "batch": str(search.batch),
            "rungs": ", ".join(map(str, search.rungs)) or "none",
            "halving": str(search.halving or "none"),
            "pruner": _text(search.pruner) if search.pruner else "none",
        }

    def _other(self, name: str, what: str) -> str:
        ways_out = "give this search another `name`, or remove it by `optuna delete-study`"
        return f"Optuna's study '{name}' exists and asks something else: {what}; {ways_out}"

    @property
    def rungs(self) -> list[int]:
        """The updates at which trials may leave."""
        from pipeline.trainer import history_updates

        return halving.rung_updates(self.search.rungs, history_updates(self.train))

    # What the storage knows

    def _all(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _known(self) -> list[optuna.trial.FrozenTrial]:
        """All trials that count: none that is void, and of doubles, which only several machines can enter, the first."""
        found: dict[Any, optuna.trial.FrozenTrial] = {}
        for trial in self._all():
            if "void" not in trial.user_attrs:
                found.setdefault(trial.user_attrs["cell_id"] if _is_of_grid(trial) else _ordinal(trial), trial)
        return list(found.values())

    def _complete(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._known() if trial.state.name == "COMPLETE"]

    def own(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """The search's own trials in some states, or in all; not the grid's, nor those that were only run anew."""
        return [trial for trial in self._known() if not _is_of_grid(trial) and (not states or trial.state.name in states)]

    def grid(self) -> list[optuna.trial.FrozenTrial]:
        """The cells of the grid that began the search."""
        return [trial for trial in self._known() if _is_of_grid(trial)]

    def front(self) -> list[optuna.trial.FrozenTrial]:
        """The finished trials that no other dominates, the grid's among them: with one objective, those of the best value."""
        complete = self._complete()
        best = halving.fronts([self._minimised(trial.values) for trial in complete])[:1]
        return [complete[index] for front in best for index in front]

    def standing(self) -> Standing:
        counts: dict[str, int] = defaultdict(int)
        for trial in self.own():
            counts[trial.state.name] += 1
        front = self.front()
        best = front[0].value if front and len(self.search.objectives) == 1 else None
        states = (counts[state] for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
        return Standing(self.search.trials, *states, best, len(front))

    def finalists(self) -> list[Cell]:
        """The best finished trials' cells by what chooses the winner, best first, each once. Raises SearchError without any."""
        complete = self.own("COMPLETE")
        if not complete:
            raise SearchError(f"{self.study.study_name}: no trial was finished with values, so there is no winner")
        sign, cells = -1 if self.search.chooses.maximised else 1, {}
        for trial in sorted(complete, key=lambda trial: (sign * trial.user_attrs["outcome"]["score"], _ordinal(trial))):
            cells.setdefault(trial.user_attrs["cell_id"], self.cell(trial.params))
        return list(cells.values())[: self.search.winner.finalists]

    def table(self) -> pd.DataFrame:
        """One row a trial in the order in which they were drawn, after the grid's cells: settings, values, outcome."""
        front = {trial.number for trial in self.front()}
        ended = sorted(self.own("COMPLETE", "PRUNED", "FAIL"), key=_ordinal)
        batches = list(dict.fromkeys(trial.user_attrs["batch"] for trial in ended))
        rows = [self._row(trial, front) | {"state": GRID, "updates": self.train.updates} for trial in self.grid()]
        for trial in ended:
            place = {"trial": _ordinal(trial), "batch": batches.index(trial.user_attrs["batch"])}
            rows.append({**self._row(trial, front), "state": STATES[trial.state.name], **place, **trial.user_attrs["outcome"]})
        return pd.DataFrame(rows)

    def _row(self, trial: optuna.trial.FrozenTrial, front: set[int]) -> dict[str, Any]:
        row = self.cell(trial.params).row()
        settings = {name: row[name] for name in SETTINGS}
        values = trial.values if trial.state.name == "COMPLETE" else [None] * len(self.search.objectives)
        named = dict(zip(self.search.goal_names, values, strict=True))
        return {"trial": None, "cell_id": trial.user_attrs["cell_id"], **settings, **named, "on_front": trial.number in front}

    def rungs_table(self) -> pd.DataFrame:
        """Values of the search's own ended trials at each rung that they reached."""
        names = self.search.goal_names
        rows = [
            {"trial": _ordinal(trial), "update": update, **dict(zip(names, values, strict=True))}
            for trial in sorted(self.own("COMPLETE", "PRUNED", "FAIL"), key=_ordinal)
            for update, values in _rungs(trial)
        ]
        return pd.DataFrame(rows, columns=["trial", "update", *names])

    def importances(self) -> pd.DataFrame:
        """How much of each objective's variance over finished trials each varied setting explains (fANOVA).

        A setting that some arms lack, as β, is assessed among the trials that have it.
        """
        import optuna
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

        rows, study = [], optuna.create_study(directions=self.study.directions)
        study.add_trials(self._complete())
        for number, goal in enumerate(self.search.objectives):
            assess = partial(
                get_param_importances,
                study,
                evaluator=FanovaImportanceEvaluator(seed=0),
                target=lambda t, at=number: t.values[at],
            )
            with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError):  # too few trials, or all alike
                warnings.simplefilter("ignore")
                found = assess()
                if set(self.search.space.varied) - set(found):
                    found = assess(params=list(self.search.space.varied)) | found
                rows += [{"goal": goal.name, "setting": name, "importance": value} for name, value in found.items()]
        return pd.DataFrame(rows, columns=["goal", "setting", "importance"])

    def cell(self, params: Mapping[str, Scalar]) -> Cell:
        """The cell of a trial: its parameters, and what the space keeps fixed."""
        fixed = {name: item.values[0] for name, item in self.search.space if isinstance(item, Axis) and item.fixed}
        at = {**fixed, **params}
        penalised = ARMS[str(at["arm"])].penalty != "none"
        return Cell(
            arm_name=str(at["arm"]),
            beta=float(at["beta"]) if penalised else None,
            latent_dim=int(at["latent_dim"]),
            l2=float(at["l2"]),
            sigma2=at.get("sigma2", 1.0) if self.model.likelihood == "gaussian" else None,
            learning_rate=float(at["learning_rate"]),
            seed=self.search.seed,
            dataset=0,
            model=self.model,
            train=self.train,
            anneal=0.0 if penalised else None,
        )

    def _key(self, cell: Cell) -> str:
        return cell_id(cell, self.data_hash, self.runtime)

    # The grid's cells

    def inside(self, cells: Mapping[str, Cell]) -> dict[str, dict[str, Scalar]]:
        """Which cells are points of the space, trained as a trial would be, and their parameters, by id."""
        space, found = self.search.space, {}
        for key, cell in cells.items():
            at = {"arm": cell.arm_name, **{name: getattr(cell, name) for name in ("latent_dim", "l2", "learning_rate")}}
            at |= {"beta": cell.beta} if cell.beta is not None else {}
            at |= {"sigma2": cell.sigma2} if space.sigma2 else {}
            params = {name: at[name] for name in space.varied if name in at}
            if all(value in getattr(space, name) for name, value in at.items()) and self._key(self.cell(params)) == key:
                found[key] = params
        return found

    def add_from_grid(self, study: str, params: Mapping[str, Mapping[str, Scalar]], values: Mapping[str, list]) -> None:
        """Enters trained cells as finished trials, each once."""
        import optuna

        with self.searcher.turn():
            known = {trial.user_attrs["cell_id"] for trial in self.grid()}
            new = [key for key in params if key not in known and None not in values[key]]
            self.study.add_trials(
                optuna.trial.create_trial(
                    params=dict(params[key]),
                    distributions=proposals.distributions(self.search.space, params[key]),
                    values=values[key],
                    user_attrs={"cell_id": key, "from_grid": study},
                )
                for key in new
            )

    # Batches

    def next(self) -> Batch | None:
        """A batch whose searcher has gone, else new trials; None where as many as are wanted have ended or are running."""
        with self.searcher.turn():
            return self._take_over() or self._ask()

    @property
    def exhausted(self) -> bool:
        """Whether no further trial is asked: a grid has no further point, or too many trials have failed."""
        return self._left() <= 0

    def _left(self) -> int:
        most = len(self.search.grid()) if self.search.sampler.kind == "grid" else MOST_ASKED * self.search.trials
        return most - len(self.own())

    def _ask(self) -> Batch | None:
        own = self.own()
        short = self.search.trials - sum(trial.state.name != "FAIL" for trial in own)
        wanted = min(self.search.batch, short, self._left())
        if wanted <= 0:
            return None
        batch = Batch(f"{len(own)}-{uuid.uuid4().hex[:8]}", len(own), wanted)
        return self._draw(batch, range(len(own), len(own) + wanted))

    def _draw(self, batch: Batch, ordinals: Sequence[int]) -> Batch | None:
        """Draws members of a batch, and enters them into the storage."""
        known = [*self.grid(), *sorted(self.own(), key=_ordinal)]  # as they were drawn, however often they were run anew
        drawn_trials = proposals.drawn(self.search, self.study.directions, known, ordinals)
        for ordinal, drawn in zip(ordinals, drawn_trials, strict=True):
            values = (ordinal, batch.name, batch.first, batch.size, self._key(self.cell(drawn.params)))
            self._enter(drawn, dict(zip(PLACE, values, strict=True)))
        self._drop_doubles()
        return self._running().get(batch.name)

    def _enter(self, drawn: optuna.trial.FrozenTrial, place: Mapping[str, Any]) -> None:
        """A running trial of this searcher, in one transaction."""
        import optuna

        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=drawn.params,
                distributions=drawn.distributions,
                user_attrs={**place, "searcher": self.searcher.id},
                system_attrs={key: value for key, value in drawn.system_attrs.items() if not key.startswith(OF_PRUNERS)},
            )
        )

    def _drop_doubles(self) -> None:
        """Fails this searcher's trials whose ordinals another one has entered before: on other machines, no turn parts them."""
        known = {trial.number for trial in self._known()}
        for trial in self._left_running(self.searcher.id):
            if trial.number not in known:
                self._void(trial, "double")

    def _left_running(self, searcher: str) -> list[optuna.trial.FrozenTrial]:
        """A searcher's running trials, those too that do not count."""
        running = (trial for trial in self._all() if trial.state.name == "RUNNING" and "void" not in trial.user_attrs)
        return [trial for trial in running if trial.user_attrs["searcher"] == searcher]

    def _void(self, trial: optuna.trial.FrozenTrial, why: str) -> None:
        """Fails a trial that then counts for nothing."""
        with _unless_ended():
            self.storage.set_trial_user_attr(trial._trial_id, "void", why)
            self.storage.set_trial_state_values(trial._trial_id, trial.state.FAIL)

    def _running(self) -> dict[str, Batch]:
        """This searcher's running trials, by batch."""
        found: dict[str, Batch] = {}
        for trial in self.own("RUNNING"):
            at = trial.user_attrs
            if at["searcher"] == self.searcher.id:
                batch = found.setdefault(at["batch"], Batch(at["batch"], at["first"], at["size"]))
                batch.running.append(self._member(trial))
        for batch in found.values():
            batch.running.sort(key=lambda member: member.ordinal)
        return found

    def _member(self, trial: optuna.trial.FrozenTrial) -> Member:
        return Member(trial.number, trial._trial_id, _ordinal(trial), trial.user_attrs["cell_id"], self.cell(trial.params))

    def _take_over(self) -> Batch | None:
        """A batch whose searcher has gone: its running trials are failed, and run anew by this one."""
        gone = {trial.user_attrs["searcher"] for trial in self.own("RUNNING")} - {self.searcher.id}
        for searcher in sorted(name for name in gone if not self.searcher.lives(name)):
            known = {trial.number for trial in self._known()}
            for trial in self._left_running(searcher):
                self._void(trial, "stale" if trial.number in known else "double")
        self.searcher.forget_gone(busy={trial.user_attrs["searcher"] for trial in self.own("RUNNING")})
        self._run_anew()
        for batch in self._running().values():
            return self._completed(batch)
        return None

    def _run_anew(self) -> None:
        """Enters stale trials again, those too whose taker was killed in between."""
        for trial in self._all():
            if trial.state.name == "RUNNING" and (why := trial.user_attrs.get("void")):
                self._void(trial, why)
        trials = self._all()
        again = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if trial.user_attrs.get("void") == "stale" and trial.number not in again:
                self._enter(trial, {**{key: trial.user_attrs[key] for key in PLACE}, "retry_of": trial.number})
        self._drop_doubles()

    def _completed(self, batch: Batch) -> Batch:
        """Draws those members of a batch that its searcher was killed before it drew."""
        entered = set(map(_ordinal, self.own()))
        missing = [ordinal for ordinal in range(batch.first, batch.first + batch.size) if ordinal not in entered]
        return (self._draw(batch, missing) if missing else None) or batch

    # What comes of trials

    def still_ours(self, batch: Batch) -> bool:
        """Drops those members that another searcher, which took this one for dead, has taken over; whether any is left."""
        running = {trial.number for trial in self.own("RUNNING")}
        batch.running = [member for member in batch.running if member.number in running]
        return bool(batch.running)

    def decision(self, batch: Batch, update: int) -> dict[str, Any] | None:
        """What was decided at a rung; by a searcher that has gone, and then trials that are run anew are told it too."""
        decision = self.study.user_attrs.get(f"rung {batch.name} {update}")
        if decision and not {member.ordinal for member in batch.running} <= set(decision["of"]):
            return None  # about other members: two machines have taken over a part of the batch each
        if decision and any(trial.user_attrs.get("retry_of") is not None for trial in self.own("RUNNING")):
            self._report(batch, update, {int(ordinal): values for ordinal, values in decision["values"].items()})
        return decision

    def decide(
        self, batch: Batch, update: int, values: Mapping[str, list[float | None]], diverged: Container[str] = ()
    ) -> dict[str, Any]:
        """Reports values at a rung, by cell, and decides, once for all, who goes on.

        Who diverged or has a value that is None fails. Who has no values goes on: its cell was trained beyond the rung before.
        """
        failed = [member for member in batch.running if member.key in diverged or None in values.get(member.key, [])]
        ranked = [member for member in batch.running if member.key in values and member not in failed]
        self._report(batch, update, {member.ordinal: values[member.key] for member in ranked})
        kept = ranked
        if self.search.halving and ranked:
            points = [self._minimised(values[member.key]) for member in ranked]
            kept = [ranked[index] for index in halving.survivors(points, self.search.halving)]
        if self.search.pruner:
            frozen = {trial.number: trial for trial in self._all()}
            kept = [member for member in kept if not self._is_pruned(frozen[member.number])]
        decision = {
            "of": [member.ordinal for member in batch.running],
            "go on": [member.ordinal for member in batch.running if member in kept or member not in [*ranked, *failed]],
            "fail": [member.ordinal for member in failed],
            "values": {str(member.ordinal): values[member.key] for member in ranked},
        }
        self.study.set_user_attr(f"rung {batch.name} {update}", decision)
        return decision

    def _is_pruned(self, trial: optuna.trial.FrozenTrial) -> bool:
        with _unless_ended():  # some of Optuna's pruners note in the trial how far it came
            return bool(self.study.pruner.prune(self.study, trial))
        return False

    def _minimised(self, values: Sequence[float]) -> list[float]:
        return [-value if goal.maximised else value for value, goal in zip(values, self.search.objectives, strict=True)]

    def _report(self, batch: Batch, update: int, values: Mapping[int, list[float]]) -> None:
        """As intermediate values of one objective; Optuna takes none of two, which become an attribute."""
        for member in batch.running:
            if found := values.get(member.ordinal):
                with _unless_ended():
                    if len(found) == 1:
                        self.storage.set_trial_intermediate_value(member.id, update, found[0])
                    else:
                        self.storage.set_trial_user_attr(member.id, f"{AT}{update}", found)

    def leaving(self, batch: Batch, decision: Mapping[str, Any]) -> list[Member]:
        """The running members that do not go on."""
        return [member for member in batch.running if member.ordinal not in decision["go on"]]

    def leave(self, batch: Batch, update: int, decision: Mapping[str, Any]) -> None:
        """Tells who has left a batch at a rung."""
        leaving = self.leaving(batch, decision)
        for member in leaving:
            self._tell(member, "FAIL" if member.ordinal in decision["fail"] else "PRUNED", {"updates": update})
        batch.running = [member for member in batch.running if member not in leaving]

    def finish(self, batch: Batch, values: Mapping[str, list[float | None]], notes: Mapping[str, Mapping[str, Any]]) -> None:
        """Tells the values of trained cells, and notes about them; a trial without all its values has failed."""
        for member in batch.running:
            found = values.get(member.key, [None])
            complete = None not in found
            self._tell(member, "COMPLETE" if complete else "FAIL", notes[member.key], found if complete else None)
        batch.running = []

    def _tell(self, member: Member, state: str, outcome: Mapping[str, Any], values: list[float] | None = None) -> None:
        from optuna.trial import TrialState

        with _unless_ended():
            self.storage.set_trial_user_attr(member.id, "outcome", dict(outcome))
            self.storage.set_trial_state_values(member.id, TrialState[state], values)


@contextlib.contextmanager
def _unless_ended() -> Iterator[None]:
    """Passes over a trial that another searcher, which took this one for dead, has ended."""
    from optuna.exceptions import UpdateFinishedTrialError

    with contextlib.suppress(UpdateFinishedTrialError):
        yield


def _is_of_grid(trial: optuna.trial.FrozenTrial) -> bool:
    return "from_grid" in trial.user_attrs


def _ordinal(trial: optuna.trial.FrozenTrial) -> int:
    """Its place among the search's own trials, however often it was run anew."""
    return trial.user_attrs["ordinal"]


def _rungs(trial: optuna.trial.FrozenTrial) -> list[tuple[int, list[float]]]:
    """Updates and values of the rungs that it reached."""
    several = [(int(name.removeprefix(AT)), values) for name, values in trial.user_attrs.items() if name.startswith(AT)]
    return sorted(several or [(update, [value]) for update, value in trial.intermediate_values.items()])


def _goal_text(goal: Goal) -> str:
    return f"{goal.name} {goal.direction or ''}".strip()


def _text(part: Strict, without: str = "") -> str:
    return ", ".join(f"{key} {value}" for key, value in part.model_dump(exclude={without}).items())


def _axis_text(item: Axis) -> str:
    if item.values is not None:
        return " or ".join(map(str, item.values))
    return f"{item.low:g} to {item.high:g}{', log' if item.log else ''}"
