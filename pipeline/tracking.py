"""MLflow as a copy of what is on disk: one experiment a study, one parent run, one run a cell, nothing logged twice.

This is the only module that imports mlflow, and it does so inside functions, because the import takes seconds.

A run that is still RUNNING was cut off while it was written: the next `publish` completes it. A finished run says in its
`version.*` tags what it holds; they are written after what they speak of, so that a cut-off update is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import queue
import sys
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline import databases
from pipeline.artifacts import ArtifactError, CellStore, main_checkout, sha256
from pipeline.config import Model, VaesweepError, claims_about
from pipeline.records import (
    BEST,
    PARENT,
    ParentRecord,
    Reconstruction,
    RunRecord,
    Trained,
    as_text,
    load_reconstruction,
    search_records,
    study_records,
)

KEY = "run_key"
WRITING = "RUNNING"
STATUSES = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "killed": "KILLED", "running": WRITING}
CURRENT = "current"  # tag
SUPERSEDED = {CURRENT: "false", BEST: "false", "claims": ""}  # tags of a run that is no longer one of its study or search

SECONDS_TO_ANSWER = databases.SECONDS_TO_ANSWER
SECONDS_TO_END = 2.5  # for who was told to stop
REQUEST_TIMEOUT = "10"
CELLS_A_TURN = 256  # other writers wait some seconds
POINTS_A_CALL = 800  # MLflow takes 1,000 metrics, params and tags in one call; beyond, it would write the tags first


class TrackingError(VaesweepError):
    """A tracking store that cannot be reached or refuses; what is on disk is whole, and `vaesweep sync` uploads it later."""


class Point(NamedTuple):
    """One value of a metric; a store keeps equal points once."""

    name: str
    value: float
    step: int
    timestamp: int


@dataclass
class StoredRun:
    """What a store says that it holds of a run; `metrics` are the latest values. Times are in milliseconds."""

    id: str
    name: str
    started: int
    newest: int = 0
    """When the newest of the metrics was taken."""
    status: str = WRITING
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What a stored run lacks."""

    params: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)
    model: Callable[[], Reconstruction] | None = None
    registered: str = ""
    status: str | None = None

    def __bool__(self) -> bool:
        return any((self.params, self.points, self.tags, self.artifacts, self.model, self.status))


@runtime_checkable
class Tracker(Protocol):
    """Where runs are shown."""

    def publish(self, experiment: str, parent: ParentRecord, records: Iterable[RunRecord]) -> int:
        """Brings a store up to date with the records, below one parent run; says how many of them it wrote or changed."""
        ...


class _Publisher(ABC):
    """The one way to publish, over a store that can open an experiment, create a run, and write to it."""

    def publish(self, experiment: str, parent: ParentRecord, records: Iterable[RunRecord]) -> int:
        with self._session():
            experiment_id, runs = self._open(experiment)
            self._put(experiment_id, runs, parent.as_run())
            below, given, changed = {"mlflow.parentRunId": runs[PARENT].id}, {PARENT}, 0
            for record in records:
                changed += self._put(experiment_id, runs, replace(record, tags={**record.tags, **below}))
                given.add(record.key)
            if parent.all_given:
                for run in (run for key, run in runs.items() if key not in given):
                    stale = {name: value for name, value in SUPERSEDED.items() if run.tags.get(name, value) != value}
                    if stale:
                        self._bring(experiment_id, run, Change(tags=stale))
            return changed

    def _put(self, experiment_id: str, runs: dict[str, StoredRun], record: RunRecord) -> bool:
        versions = _versions(record)
        record = replace(record, tags={**record.tags, KEY: record.key, CURRENT: "true"})
        if record.key not in runs:
            written = {} if record.status == "running" else versions
            runs[record.key] = self._create(experiment_id, record.name, {**record.tags, **written, **_origin()})
        run = runs[record.key]
        change = _difference(record, versions, run)
        if change:
            self._bring(experiment_id, run, change)
        return bool(change)

    def _bring(self, experiment_id: str, run: StoredRun, change: Change) -> None:
        self._write(experiment_id, run, change)
        _absorb(run, change)

    @abstractmethod
    def _session(self) -> contextlib.AbstractContextManager[None]: ...

    @abstractmethod
    def _open(self, experiment: str) -> tuple[str, dict[str, StoredRun]]: ...

    @abstractmethod
    def _create(self, experiment_id: str, name: str, tags: dict[str, str]) -> StoredRun: ...

    @abstractmethod
    def _write(self, experiment_id: str, run: StoredRun, change: Change) -> None:
        """Writes artifacts first, then points, then tags, then the status."""


def _difference(record: RunRecord, versions: dict[str, str], run: StoredRun) -> Change:
    held = {} if run.status == WRITING and record.status != "running" else run.tags
    stale = {name.removeprefix("version.") for name, version in versions.items() if held.get(name) != version}
    tags = {name: value for name, value in {**record.tags, **versions}.items() if run.tags.get(name) != value}
    status = STATUSES[record.status]
    return Change(
        params={name: as_text(value) for name, value in record.params.items() if name not in run.params},
        points=[*_curve_points(record, run, "curves" in stale), *_final_points(record, run, "metrics" in stale)],
        tags=tags,
        artifacts={path: source for path, source in record.artifacts.items() if path in stale},
        model=record.model if "model" in stale else None,
        registered=record.registered,
        status=status if run.status != status else None,
    )


def _versions(record: RunRecord) -> dict[str, str]:
    """A tag for each part of a run. Curves have one version only: steps logged twice would be kept twice."""
    found = {f"version.{path}": _fingerprint(source) for path, source in record.artifacts.items()}
    if record.curves is not None:
        found["version.curves"] = "1"
    if metrics := _finite(record.metrics):
        found["version.metrics"] = _hash(json.dumps(metrics, sort_keys=True))
    if record.model is not None:
        found["version.model"] = found.get("version.weights", "1")
    return found


def _fingerprint(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return _hash(json.dumps([(str(file.relative_to(path.parent)), sha256(file)) for file in files]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _curve_points(record: RunRecord, run: StoredRun, wanted: bool) -> Iterator[Point]:
    """Points whose time follows from the run and the update, so that writing them again adds nothing.

    The newest come first: MLflow keeps the latest value of each curve in a row of its own, which it then sets once.
    """
    if record.curves is None or not wanted:
        return
    curves = record.curves[::-1].to_dict("list")
    updates = [int(update) for update in curves.pop("update")]
    for name, values in curves.items():
        for update, value in zip(updates, values, strict=True):
            if math.isfinite(value):
                yield Point(name, value, update, run.started + update)


def _final_points(record: RunRecord, run: StoredRun, wanted: bool) -> Iterator[Point]:
    """Of two points at one step, stores call the later one the latest: so a new evaluation replaces an old one.

    Later than all before also where the clock has been set back.
    """
    now = max(time.time_ns() // 1_000_000, run.newest + 1)
    for name, value in _finite(record.metrics).items():
        if wanted and run.metrics.get(name) != value:
            yield Point(name, value, record.step, now)


def _absorb(run: StoredRun, change: Change) -> None:
    run.params |= change.params
    run.tags |= change.tags
    for point in sorted(change.points, key=lambda point: (point.step, point.timestamp)):
        run.metrics[point.name] = point.value
        run.newest = max(run.newest, point.timestamp)
    run.status = change.status or run.status


class MemoryTracker(_Publisher):
    """Keeps runs in dictionaries: `runs[experiment][key]`, and by run id its points, artifacts and model."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, StoredRun]] = {}
        self.points: dict[str, set[Point]] = {}
        self.artifacts: dict[str, dict[str, Path]] = {}
        self.models: dict[str, Reconstruction] = {}

    def _session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _open(self, experiment: str) -> tuple[str, dict[str, StoredRun]]:
        return experiment, self.runs.setdefault(experiment, {})

    def _create(self, experiment_id: str, name: str, tags: dict[str, str]) -> StoredRun:
        run = StoredRun(str(len(self.points)), name, time.time_ns() // 1_000_000, tags=dict(tags))
        self.points[run.id], self.artifacts[run.id] = set(), {}
        return run

    def _write(self, experiment_id: str, run: StoredRun, change: Change) -> None:
        self.artifacts[run.id] |= change.artifacts
        if change.model is not None:
            self.models[run.id] = change.model()
        self.points[run.id] |= set(change.points)


class MlflowTracker(_Publisher):
    """Keeps runs in an MLflow store; by default in `mlflow.db` and `mlartifacts/` of the main checkout."""

    def __init__(self, uri: str | None = None):
        self.uri = uri or tracking_uri()
        self._client: Any = None

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        with _one_line_errors(self.uri), _one_writer(self.uri), databases.quick_commits(self.uri), _no_full_collections():
            self._client = self._client or _connect(self.uri)
            yield

    def _open(self, experiment: str) -> tuple[str, dict[str, StoredRun]]:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # or the UI asks which of its views to show
            return self._client.create_experiment(experiment, _artifact_location(self.uri, experiment), kind), {}
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        ours: dict[str, StoredRun] = {}
        for run in sorted(map(_stored, self._search(found.experiment_id)), key=lambda run: run.status == WRITING):
            key = run.tags.get(KEY)
            if key in ours:  # one call to create it was obeyed twice
                self._client.delete_run(run.id)
            elif key:
                ours[key] = run
        return found.experiment_id, ours

    def _search(self, experiment_id: str) -> Iterator[Any]:
        token = None
        while token != "":
            page = self._client.search_runs([experiment_id], max_results=1000, page_token=token)
            yield from page
            token = page.token or ""

    def _create(self, experiment_id: str, name: str, tags: dict[str, str]) -> StoredRun:
        return _stored(self._client.create_run(experiment_id, tags=tags, run_name=name))

    def _write(self, experiment_id: str, run: StoredRun, change: Change) -> None:
        for path, source in change.artifacts.items():
            log = self._client.log_artifacts if source.is_dir() else self._client.log_artifact
            log(run.id, str(source), path)
        if change.model is not None:
            model_id = self._log_model(experiment_id, run.id, {**run.params, **change.params}, *change.model())
            if change.registered:
                self._register(change.registered, model_id, run.id)
        elif change.registered:  # it is the best again
            versions = self._client.search_model_versions(f"name = '{change.registered}' and run_id = '{run.id}'")
            if versions:  # else somebody has deleted them
                newest = max(int(found.version) for found in versions)
                self._client.set_registered_model_alias(change.registered, BEST, newest)
        self._log_batches(run, change)
        if change.status == WRITING:
            self._client.update_run(run.id, change.status)
        elif change.status:
            self._client.set_terminated(run.id, change.status)

    def _log_batches(self, run: StoredRun, change: Change) -> None:
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(point.name, point.value, point.timestamp, point.step) for point in change.points]
        while len(points) > POINTS_A_CALL:
            self._client.log_batch(run.id, points[:POINTS_A_CALL])
            points = points[POINTS_A_CALL:]
        params = [Param(name, value) for name, value in change.params.items()]
        self._client.log_batch(run.id, points, params, [RunTag(name, value) for name, value in change.tags.items()])

    def _register(self, name: str, model_id: str, run_id: str) -> None:
        """Makes a logged model the newest version of a registered one, and the one that the alias `best` names."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(name)
        source = self._client.get_logged_model(model_id).artifact_location
        version = self._client.create_model_version(name, source, run_id, model_id=model_id).version
        self._client.set_registered_model_alias(name, BEST, version)

    def _log_model(self, experiment_id: str, run_id: str, params: dict[str, str], module: nn.Module, example: Tensor) -> str:
        # `mlflow.pytorch.log_model` needs an active run and the process-wide store; these are the calls that it makes.
        from mlflow.entities import LoggedModelOutput

        for earlier in self._client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
            self._client.delete_logged_model(earlier.model_id)
        model_id = self._client.create_logged_model(experiment_id, "reconstruction", run_id, params=params).model_id
        with tempfile.TemporaryDirectory() as folder:
            _save_model(Path(folder) / "model", module, example, run_id=run_id, model_id=model_id)
            self._client.log_model_artifacts(model_id, f"{folder}/model")
        self._client.finalize_logged_model(model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id


def _stored(run: Any) -> StoredRun:
    info, data = run.info, run.data
    newest = max((metric.timestamp for metric in data._metric_objs), default=0)  # else a call for each metric tells the time
    return StoredRun(info.run_id, info.run_name, info.start_time, newest, info.status, data.params, data.tags, data.metrics)


def _save_model(path: Path, module: nn.Module, example: Tensor, **ids: str) -> None:
    """Writes an MLflow model with signature that loads with torch alone."""
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    with torch.no_grad():
        output = module.eval()(example)
    schemas = (Schema([TensorSpec(x.numpy().dtype, (-1, *x.shape[1:]))]) for x in (example, output))
    # Measured: the first export as "pt2" takes 10 s of imports in every process, the first pickle 1 s. Named requirements
    # spare MLflow the subprocess that infers them.
    mlflow.pytorch.save_model(
        module,
        path,
        mlflow_model=Model(**ids),
        signature=ModelSignature(*schemas),
        pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],
        serialization_format="pickle",
    )


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the main checkout."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    return databases.sqlite_uri(main_checkout() / "mlflow.db")


def _artifact_location(uri: str, experiment: str) -> str | None:
    """A server decides where artifacts lie; for a database MLflow's default depends on the current folder."""
    return None if uri.startswith("http") else (main_checkout() / "mlartifacts" / experiment).as_uri()


@contextlib.contextmanager
def _one_writer(uri: str) -> Iterator[None]:
    """One writer at a time creates the database, and looks for a run before it creates it."""
    database = databases.sqlite_file(uri)
    path = Path(f"{database}.lock") if database else main_checkout() / ".vaesweep" / "tracking.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_full_collections() -> Iterator[None]:
    """MLflow makes so many objects that Python goes through all of torch's, again and again, to find garbage among them."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _mlflow() -> Any:
    """Imports mlflow so that it stays off the network and off the terminal, and gives up early on a server that is away."""
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": REQUEST_TIMEOUT,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a call that timed out may have been obeyed: sent again, it makes two runs
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


def _connect(uri: str) -> Any:
    """A client of a store that answers."""
    mlflow = _mlflow()
    databases.check_answers(uri, SECONDS_TO_ANSWER)
    if database := databases.sqlite_file(uri):
        _create(database)
    client = mlflow.MlflowClient(uri)
    if uri.startswith(("http:", "https:")):
        patient = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] != REQUEST_TIMEOUT
        databases.within(None if patient else SECONDS_TO_ANSWER, lambda: client.search_experiments(max_results=1))
    return client


def _create(database: Path) -> None:
    """Has MLflow make a new database beside its place: it cannot go on with one whose tables a killed process began to make."""
    if database.exists():
        return
    begun = Path(f"{database}.{uuid.uuid4().hex}.new")  # MLflow remembers what it has connected to by name
    for leftover in database.parent.glob(f"{glob.escape(database.name)}.*.new*"):
        leftover.unlink()
    _mlflow().MlflowClient(databases.sqlite_uri(begun))
    os.replace(begun, database)


@contextlib.contextmanager
def _one_line_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, _refusals()):
            raise
        raise TrackingError(databases.without_password(f"MLflow at {uri}: {databases.reason(error)}")) from error


def _refusals() -> tuple[type[BaseException], ...]:
    """What a store that is away, locked, full, or of another version makes its client raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, ImportError)


@dataclass(frozen=True)
class Synced:
    """How many runs of each study and search were written or changed, and what could not be published yet."""

    changed: dict[str, int]
    notes: list[str]


def sync(
    tracker: Tracker,
    studies: Iterable[str],
    searches: Iterable[str] = (),
    reconstruction: Callable[[Path, Model], Reconstruction] | None = None,
    wait: bool = False,
) -> Synced:
    """Publishes everything on disk of the named studies and searches. Raises TrackingError.

    `reconstruction` builds the MLflow model of a study's cell; without it no models are logged. A search whose results another
    process holds is noted, unless they may be waited for.
    """
    changed, notes, store = {}, [], CellStore()
    turns = [(name, study_records, contextlib.nullcontext()) for name in studies]
    turns += [(name, search_records, store.results_lock(name, wait)) for name in searches]
    for name, read, held in turns:
        try:
            with held:  # while they are read and copied, nobody writes them anew
                changed[name] = tracker.publish(name, *read(name, reconstruction))
        except ArtifactError as error:
            notes.append(f"{name} is not in MLflow: {error}")
    return Synced(changed, notes)


def publish(studies: Iterable[str] = (), searches: Iterable[str] = ()) -> None:
    """`sync` for a stage, with models: a tracking store that is away costs one line of warning, and nothing else."""
    try:
        synced = sync(MlflowTracker(), studies, searches, load_reconstruction, wait=True)
    except TrackingError as error:
        _warn(error)
        return
    for note in synced.notes:
        print(note, file=sys.stderr)


def _warn(error: VaesweepError) -> None:
    _print_once(f"not in MLflow yet: {error}; `vaesweep sync` uploads it later")


@cache
def _print_once(line: str) -> None:
    """Prints to stderr what several attempts in one process would say again."""
    print(line, file=sys.stderr)


class Background:
    """Publishes cells of a study from a thread of its own while others train; meanwhile the parent run is RUNNING.

    It may fail, and it ends after the run at hand: whatever it leaves, the next `publish` writes. Where training ends by an
    exception, the parent run is KILLED.
    """

    def __init__(self, study: str, read: Callable[[list[str]], Trained]):
        """`read` is told the ids of finished cells; it is called in the thread."""
        self.study, self.read, self.tracker, self.claims = study, read, MlflowTracker(), claims_about(study)
        self._cells: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ended, self._killed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name=databases.THREAD, daemon=True)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._killed = failure is not None
        self._ended.set()
        self._cells.put("")
        if self._thread.ident:
            self._thread.join(SECONDS_TO_END if self._killed else SECONDS_TO_ANSWER)

    def put(self, cell_ids: Iterable[str]) -> None:
        """Hands over finished cells; the first call starts the thread, which begins with the parent run."""
        for cell_id in cell_ids:
            self._cells.put(cell_id)
        if not self._thread.ident:
            self._thread.start()

    def _work(self) -> None:
        cell_ids: list[str] = []
        while not self._ended.is_set():
            self._publish("running", cell_ids)
            cell_ids = self._wait()
        if self._killed:
            self._publish("killed", [])

    def _publish(self, status: str, cell_ids: list[str]) -> None:
        try:
            parent, records = study_records(self.study, trained=self.read(cell_ids), claims=self.claims)
            records = itertools.takewhile(lambda _: not self._ended.is_set(), records)
            self.tracker.publish(self.study, replace(parent, status=status), records)
        except VaesweepError as error:
            _warn(error)

    def _wait(self) -> list[str]:
        """The next cell and those that wait behind it; not all, because other writers wait for the turn to end."""
        cell_ids = [self._cells.get()]
        while len(cell_ids) < CELLS_A_TURN and not self._cells.empty():
            cell_ids.append(self._cells.get())
        return cell_ids


def become_ui(host: str, port: int) -> NoReturn:
    """Turns this process into the MLflow UI on the store that runs are kept in. Raises TrackingError."""
    uri = tracking_uri()
    if uri.startswith(("http:", "https:")):
        raise TrackingError(f"runs are kept on a server, which has a UI itself: {databases.without_password(uri)}")
    with _one_line_errors(uri), _one_writer(uri):
        if database := databases.sqlite_file(uri):
            _create(database)
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # arguments are there for everyone to read, and it may hold a password
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # for pages that no study has, and a way in
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--host", host, "--port", str(port)])


def _origin() -> dict[str, str]:
    """The code that first published a run; it stays when others publish the same run again."""
    commit = _git_commit(Path.cwd())
    return {"mlflow.source.git.commit": commit} if commit else {}


def _git_commit(folder: Path) -> str | None:
    """The commit that is checked out, read without git, which a machine may lack."""
    git = folder / ".git"
    try:
        if git.is_file():
            git = folder / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        return _resolve(git, head.removeprefix("ref: ")) if head.startswith("ref: ") else head
    except OSError:
        return None


def _resolve(git: Path, ref: str) -> str | None:
    shared = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
    if (shared / ref).is_file():
        return (shared / ref).read_text().strip()
    packed = (line.split() for line in (shared / "packed-refs").read_text().splitlines())
    return next((words[0] for words in packed if words[1:] == [ref]), None)
