"""One conformance suite over both trackers; what only MLflow can get wrong; and the records that files turn into."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pandas as pd
import pytest
import sqlalchemy
import torch
from tiny import drive, write
from torch import nn

import pipeline
from pipeline import tracking
from pipeline.artifacts import CellStore, Folders, load_prepared, read_table, write_json, write_table, write_tensors
from pipeline.config import load_study
from pipeline.records import (
    ParentRecord,
    Reconstruction,
    RunRecord,
    Trained,
    _read_trained,
    load_reconstruction,
    search_records,
    study_records,
)
from pipeline.stages import search
from pipeline.tracking import MemoryTracker, MlflowTracker, Tracker, TrackingError

PARENT = ParentRecord("digits", "Real digits", {"study": "digits"})
NAN = float("nan")

STUDY = """
title: Real digits
data: {name: digits5k}
model: {hidden: [8], likelihood: bernoulli}
grid: {latent_dim: [8], arms: {vae: {beta: [0, 4]}, ae: {}}}
train: {updates: 100}
evaluate: {}
claims:
  - {id: rises, source: x, says: y, test: {kind: monotone, metric: test/mse, over: beta, direction: up, where: {arm: vae}}}
  - {id: free, source: x, says: y, test: {kind: bound, metric: test/mse, above: 0, where: {beta: 0}}}
"""
HUNT = """
title: A search with trials of every kind
study: tiny
space: {latent_dim: {low: 2, high: 4}, learning_rate: {values: [0.001, 0.002, 0.004, 1.0e+30]}}
objectives: [{metric: validation/bce_elbo, direction: up}]
winner: {finalists: 1, validation_seeds: [2], test_seeds: [1]}
sampler: {kind: random, seed: 0}
trials: 6
batch: 6
rungs: [0.3]
halving: 2
"""
FIRST_START = """
import sys, time
from pathlib import Path
import pandas as pd
from pipeline.tracking import *
from pipeline.tracking import _mlflow
_mlflow()
Path(sys.argv[1]).touch()
while len(list(Path().glob("ready *"))) < 2: time.sleep(0.01)
losses = pd.DataFrame({"update": [1, 2], "train/loss": [2.0, 1.0]})
records = [RunRecord(str(n), f"cell {n}", curves=losses) for n in range(3)]
print(MlflowTracker().publish("digits", ParentRecord("digits", "Real digits"), records))
"""


@pytest.fixture(scope="session")
def first_starts(tmp_path_factory) -> tuple[Path, list[subprocess.CompletedProcess]]:
    """A folder without a database in which two processes publish the same three cells at the same moment."""
    folder = tmp_path_factory.mktemp("a fresh 100% store")
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(Path(pipeline.__file__).parents[1]), "HOME": str(folder)}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [[sys.executable, "-c", FIRST_START, f"ready {number}"] for number in range(2)]
    started = [subprocess.Popen(command, **options) for command in commands]
    ended = [(process.args, process.communicate(timeout=120), process.returncode) for process in started]
    return folder, [subprocess.CompletedProcess(command, code, *streams) for command, streams, code in ended]


@pytest.fixture(params=["memory", "mlflow"])
def tracker(request, workspace) -> Tracker:
    if request.param == "memory":
        return MemoryTracker()
    return MlflowTracker(request.getfixturevalue("database"))


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "with a space"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "digits.yaml").write_text(STUDY)
    (folder / "params.yaml").write_text("studies: [digits]")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    return folder


@pytest.fixture
def database(workspace, first_starts) -> str:
    """The default store of the workspace, its tables copied, because MLflow takes seconds to create them."""
    shutil.copy(first_starts[0] / "mlflow.db", workspace / "mlflow.db")
    return tracking.tracking_uri()


@dataclass
class Seen:
    """A run as a person finds it in the store."""

    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    points: Counter
    files: set[str]
    models: int


def seen(tracker: Tracker, experiment: str = "study") -> dict[str, Seen]:
    return (seen_in_memory if isinstance(tracker, MemoryTracker) else seen_in_mlflow)(tracker, experiment)


def seen_in_memory(tracker: MemoryTracker, experiment: str) -> dict[str, Seen]:
    found = {}
    for key, run in tracker.runs[experiment].items():
        points = Counter((point.name, point.step, point.value) for point in tracker.points[run.id])
        files = {name for path, source in tracker.artifacts[run.id].items() for name in names_below(source, path)}
        models = run.id in tracker.models
        found[key] = Seen(run.name, run.status, {**run.params}, {**run.tags}, {**run.metrics}, points, files, int(models))
    return found


def names_below(source: Path, path: str) -> set[str]:
    files = source.rglob("*") if source.is_dir() else [source]
    start = source if source.is_dir() else source.parent
    return {f"{path}/{file.relative_to(start)}" for file in files}


def seen_in_mlflow(tracker: MlflowTracker, experiment: str) -> dict[str, Seen]:
    client = tracking._mlflow().MlflowClient(tracker.uri)
    place = client.get_experiment_by_name(experiment).experiment_id
    found = {}
    for run in client.search_runs([place]):
        info, data = run.info, run.data
        history = [point for name in data.metrics for point in client.get_metric_history(info.run_id, name)]
        points = Counter((point.key, point.step, point.value) for point in history)
        folder = Path(unquote(urlsplit(info.artifact_uri).path))
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        models = client.search_logged_models([place], f"source_run_id = '{info.run_id}'")
        assert data.tags["run_key"] not in found, "a run stands twice"
        found[data.tags["run_key"]] = Seen(
            info.run_name, info.status, data.params, data.tags, data.metrics, points, files, len(models)
        )
    return found


def curves(points: int = 3) -> pd.DataFrame:
    updates = np.arange(1, points + 1) * 10
    return pd.DataFrame({"update": updates, "train/loss": 1.0 / updates, "validation/loss": 2.0 / updates})


def record(key: str = "c0", **fields) -> RunRecord:
    usual = {"params": {"beta": 1.0}, "tags": {"arm": "vae"}, "curves": curves(), "metrics": {"test/mse": 0.5}, "step": 30}
    return RunRecord(key, f"cell {key}", **{**usual, **fields})


def identity() -> Reconstruction:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), torch.zeros(2, 3)


@pytest.fixture
def best(workspace) -> RunRecord:
    """A cell with pictures, weights and a model."""
    (workspace / "pictures of c0").mkdir()
    (workspace / "pictures of c0" / "latent.png").write_bytes(b"a picture")
    (workspace / "c0.safetensors").write_bytes(b"weights")
    artifacts = {"pictures": workspace / "pictures of c0", "weights": workspace / "c0.safetensors"}
    return record(artifacts=artifacts, model=identity)


# What every tracker does


def test_a_run_shows_what_its_record_holds(tracker, best):
    assert isinstance(tracker, Tracker)
    assert tracker.publish("study", PARENT, [best, record("c1")]) == 2
    runs = seen(tracker)
    run = runs["c0"]
    assert set(runs) == {"parent", "c0", "c1"}
    assert (run.name, run.status, run.params, run.models) == ("cell c0", "FINISHED", {"beta": "1"}, 1)
    assert run.metrics == {"test/mse": 0.5, "train/loss": 1 / 30, "validation/loss": 2 / 30}
    assert {name: step for name, step, _ in sorted(run.points)} == {"test/mse": 30, "train/loss": 30, "validation/loss": 30}
    assert run.files == {"pictures/latent.png", "weights/c0.safetensors"}
    assert runs["parent"].tags["mlflow.note.content"] == "Real digits"
    assert runs["parent"].status == "FINISHED"
    assert run.tags["arm"] == "vae"
    assert run.tags["mlflow.parentRunId"] == runs["c1"].tags["mlflow.parentRunId"] != ""


def test_publishing_again_writes_nothing(tracker, best):
    records = [best, record("c1")]
    tracker.publish("study", PARENT, records)
    before = seen(tracker)
    assert tracker.publish("study", PARENT, records) == 0
    assert seen(tracker) == before
    assert set(Counter(before["c1"].points).values()) == {1}


def test_a_new_evaluation_replaces_final_metrics_only(tracker):
    tracker.publish("study", PARENT, [record(metrics={"test/mse": 0.5, "test/kl": 3.0}), record("c1")])
    first = seen(tracker)["c0"]
    again = record(metrics={"test/mse": 0.4, "test/kl": 3.0, "test/elbo": -9.0})
    assert tracker.publish("study", PARENT, [again, record("c1")]) == 1
    run = seen(tracker)["c0"]
    assert run.metrics == {**first.metrics, "test/mse": 0.4, "test/elbo": -9.0}
    assert run.points - first.points == Counter({("test/mse", 30, 0.4): 1, ("test/elbo", 30, -9.0): 1})
    assert run.tags["version.metrics"] != first.tags["version.metrics"]


def test_what_later_stages_add_arrives_without_a_second_run(tracker, best):
    trained = replace(best, metrics={}, artifacts={}, model=None)
    tracker.publish("study", PARENT, [trained])
    assert tracker.publish("study", PARENT, [best]) == 1
    run = seen(tracker)["c0"]
    assert run.metrics["test/mse"] == 0.5
    assert run.files == {"pictures/latent.png", "weights/c0.safetensors"}
    assert run.models == 1
    assert set(run.points.values()) == {1}


def test_changed_pictures_are_copied_again_and_nothing_else(tracker, best):
    tracker.publish("study", PARENT, [best])
    before = seen(tracker)["c0"]
    (best.artifacts["pictures"] / "samples.png").write_bytes(b"another picture")
    assert tracker.publish("study", PARENT, [best]) == 1
    run = seen(tracker)["c0"]
    assert run.files == {*before.files, "pictures/samples.png"}
    assert {name for name in run.tags if run.tags[name] != before.tags[name]} == {"version.pictures"}
    assert run.points == before.points


def test_a_diverged_cell_and_a_failed_trial_are_failed_runs_without_nan(tracker):
    diverged = curves()
    diverged.loc[1:, "train/loss"] = [float("inf"), NAN]
    cells = [record(status="diverged", curves=diverged, metrics={"test/mse": NAN}), record("c1", status="failed", curves=None)]
    tracker.publish("study", PARENT, cells)
    runs = seen(tracker)
    assert runs["c0"].status == runs["c1"].status == "FAILED"
    assert runs["c0"].metrics == {"train/loss": 0.1, "validation/loss": 2 / 30}
    assert tracker.publish("study", PARENT, cells) == 0


def test_params_stay_and_tags_follow(tracker):
    tracker.publish("study", PARENT, [record(params={"beta": 1.0}, tags={"best": "false"})])
    tracker.publish("study", PARENT, [record(params={"beta": 2.0, "l2": 1e-5}, tags={"best": "true"})])
    run = seen(tracker)["c0"]
    assert run.params == {"beta": "1", "l2": "1e-05"}
    assert run.tags["best"] == "true"


def test_studies_are_apart_and_cells_that_left_the_grid_stay(tracker):
    tracker.publish("study", PARENT, [record(), record("c1")])
    assert tracker.publish("other", replace(PARENT, name="other"), [record()]) == 1
    assert tracker.publish("study", PARENT, [record("c1"), record("c2")]) == 1
    assert set(seen(tracker)) == {"parent", "c0", "c1", "c2"}
    assert set(seen(tracker, "other")) == {"parent", "c0"}


def test_the_commit_of_the_first_publication_stays(tracker, workspace):
    for commit in ("1111", "2222"):
        (workspace / ".git").mkdir(exist_ok=True)
        (workspace / ".git" / "HEAD").write_text(f"{commit}\n")
        tracker.publish("study", PARENT, [record()])
    assert seen(tracker)["c0"].tags["mlflow.source.git.commit"] == "1111"


def test_killed_between_cells_is_completed(tracker, monkeypatch):
    records = [record(f"c{number}") for number in range(4)]
    write, calls = tracker._write, []

    def die(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker, "_write", die)
        tracker.publish("study", PARENT, records)
    assert seen(tracker)["c2"].status == "RUNNING"
    assert tracker.publish("study", PARENT, records) == 2
    assert {run.status for run in seen(tracker).values()} == {"FINISHED"}


# What only MLflow can get wrong


@pytest.mark.parametrize(
    ("call", "survives"), [("log_artifacts", 0), ("log_batch", 0), ("log_batch", 1), ("log_outputs", 0), ("set_terminated", 0)]
)
def test_killed_within_a_cell_is_completed_and_not_doubled(call, survives, database, best, monkeypatch):
    long = replace(best, curves=curves(450))
    reference = MemoryTracker()
    reference.publish("study", PARENT, [long])
    victim = MlflowTracker(database)
    victim.publish("study", PARENT, [])
    original, calls = getattr(victim._client, call), []

    def die(*arguments, **options):
        calls.append(call)
        if len(calls) > survives:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(victim._client, call, die)
    with pytest.raises(KeyboardInterrupt):
        victim.publish("study", PARENT, [long])
    assert MlflowTracker(database).publish("study", PARENT, [long]) == 1
    whole, completed = seen(reference)["c0"], seen(victim)["c0"]
    assert completed.points == whole.points
    assert (completed.status, completed.params, completed.files, completed.models) == (
        "FINISHED",
        {"beta": "1"},
        whole.files,
        1,
    )
    assert MlflowTracker(database).publish("study", PARENT, [long]) == 0


def test_a_run_that_was_created_twice_is_kept_once(database):
    """As by a client that sent its call again because the answer was late."""
    tracker = MlflowTracker(database)
    tracker.publish("study", PARENT, [record(), record("c1")])
    place = tracker._client.get_experiment_by_name("study").experiment_id
    tracker._create(place, "cell c0", {"run_key": "c0"})
    assert tracker.publish("study", PARENT, [record(), record("c1")]) == 0
    runs = tracker._client.search_runs([place])
    assert Counter((run.data.tags["run_key"], run.info.status) for run in runs) == Counter(
        (key, "FINISHED") for key in ("parent", "c0", "c1")
    )


def test_killed_within_an_evaluation_is_completed_and_not_doubled(database, monkeypatch):
    tracker = MlflowTracker(database)
    tracker.publish("study", PARENT, [record()])
    log = tracker._client.log_batch

    def die(run_id, points, params=(), tags=()):
        log(run_id, points, params)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker._client, "log_batch", die)
        tracker.publish("study", PARENT, [record(metrics={"test/mse": 0.4})])
    assert tracker.publish("study", PARENT, [record(metrics={"test/mse": 0.4})]) == 1
    assert {point: count for point, count in seen(tracker)["c0"].points.items() if point[0] == "test/mse"} == {
        ("test/mse", 30, 0.5): 1,
        ("test/mse", 30, 0.4): 1,
    }


def test_two_first_starts_at_once_make_one_store_and_one_copy(first_starts, monkeypatch):
    folder, processes = first_starts
    assert [process.stderr for process in processes] == ["", ""]
    assert sorted(process.stdout for process in processes) == ["0\n", "3\n"]
    monkeypatch.chdir(folder)
    runs = seen(MlflowTracker(), "digits")
    assert set(runs) == {"parent", "0", "1", "2"}
    assert runs["1"].points == Counter({("train/loss", 1, 2.0): 1, ("train/loss", 2, 1.0): 1})


def test_artifacts_lie_in_the_main_checkout_also_from_a_temporary_one(database, workspace, best, monkeypatch):
    copy = workspace / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    tracker = MlflowTracker()
    tracker.publish("study", PARENT, [best])
    assert tracker.uri == database == f"sqlite:///{workspace}/mlflow.db"
    assert len(list((workspace / "mlartifacts" / "study").rglob("latent.png"))) == 1
    assert not list(copy.iterdir())


def test_the_environment_names_the_store(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert MlflowTracker().uri == "http://tracking:5000"
    assert MlflowTracker("sqlite:///mine.db").uri == "sqlite:///mine.db"


def test_the_model_loads_without_this_package_and_knows_its_shapes(database, best, monkeypatch):
    import mlflow.pytorch

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    tracker = MlflowTracker(database)
    module, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3), nn.Sigmoid()), torch.rand(5, 3)
    tracker.publish("study", PARENT, [replace(best, model=lambda: (module, torch.zeros(2, 3)))])
    place = tracker._client.get_experiment_by_name("study").experiment_id
    (model,) = tracker._client.search_logged_models([place])
    torch.testing.assert_close(mlflow.pytorch.load_model(model.model_uri)(x), module(x))  # noqa: TID251, our own
    predicted = mlflow.pyfunc.load_model(model.model_uri).predict(x.numpy())  # noqa: TID251
    np.testing.assert_allclose(predicted, module(x).detach(), rtol=1e-5)
    signature = mlflow.models.get_model_info(model.model_uri).signature
    assert [spec.shape for spec in (*signature.inputs, *signature.outputs)] == [(-1, 3), (-1, 3)]
    assert model.status == "READY"
    assert model.params == {"beta": "1"}
    folder = Path(unquote(urlsplit(model.artifact_location).path))
    with zipfile.ZipFile(folder / "data" / "model.pth") as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"pipeline" not in pickled


def test_the_alias_and_the_tag_best_follow_the_winner_of_a_search(database, best):
    tracker = MlflowTracker(database)
    search = replace(PARENT, all_given=True)

    def publish(winner: str | None, *keys: str) -> str:
        tag = {key: {"best": str(key == winner).lower(), "claims": " one "} for key in keys}
        records = [replace(record(), key=key, tags=tag[key], artifacts={}) for key in keys]
        model = {"model": lambda: (nn.Linear(3, 3), torch.zeros(2, 3)), "registered": "hunt"}
        tracker.publish("hunt", search, [replace(r, **model) if r.key == winner else r for r in records])
        return tracker._client.get_model_version_by_alias("hunt", "best").run_id

    runs = {winner: publish(winner, "one", "other") for winner in ("one", "other")}
    assert runs["one"] != runs["other"]
    assert publish("one", "one", "other") == runs["one"]
    assert publish("new", "new") not in runs.values()
    place = tracker._client.get_experiment_by_name("hunt").experiment_id
    (tagged,) = [run for run in tracker._client.search_runs([place]) if run.data.tags.get("best") == "true"]
    assert tagged.info.run_id == publish("new", "new")
    current = tracker._client.search_runs([place], "tags.current = 'true'")
    assert {run.data.tags["run_key"] for run in current} == {"parent", "new"}
    (of_claim,) = tracker._client.search_runs([place], "tags.claims LIKE '% one %'")
    assert of_claim.info.run_id == tagged.info.run_id


@pytest.fixture
def searched(trained, workspace, database, monkeypatch) -> pd.DataFrame:
    """The trials of a real search, which has published them."""
    shutil.copytree(trained, workspace, dirs_exist_ok=True)
    write(HUNT, "hunt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    search.run("hunt", drive)
    return read_table(Folders("hunt").search / "trials.csv").query("state != 'grid'")


def test_a_search_is_one_parent_and_a_run_a_trial_of_which_one_is_a_model(searched):
    import mlflow.pytorch

    tracker = MlflowTracker()
    runs, client = seen(tracker, "hunt"), tracking._mlflow().MlflowClient(tracker.uri)
    place = client.get_experiment_by_name("hunt").experiment_id
    (parent,) = client.search_runs([place], "tags.run_key = 'parent'")
    shown = {run.tags["trial"]: run for key, run in runs.items() if key != "parent"}
    assert set(searched["state"]) == {"complete", "pruned", "failed"}
    assert len(runs) == 1 + len(searched) and {run.tags["mlflow.parentRunId"] for run in shown.values()} == {parent.info.run_id}
    for row in searched.to_dict("records"):
        run = shown[f"{row['trial']:.0f}"]
        assert (run.tags["state"], run.tags["best"]) == (row["state"], str(row["best"]).lower())
        assert run.status == ("FAILED" if row["state"] == "failed" else "FINISHED")
        assert float(run.params["learning_rate"]) == row["learning_rate"]
        assert run.metrics.get("validation/bce_elbo", NAN) == pytest.approx(row["validation/bce_elbo"], nan_ok=True)
        assert max((step for name, step, _ in run.points if name == "validation/loss"), default=None) == (
            row["updates"] if row["state"] != "failed" else None
        )

    pictures = {f"pictures/{path.name}" for path in (Folders("hunt").search / "pictures").glob("*.png")}
    assert runs["parent"].files == {"config/hunt.yaml", "summary/trials.csv", *pictures} and len(pictures) > 2
    assert runs["parent"].status == "FINISHED"

    (best,) = searched[searched["best"].astype(bool)].to_dict("records")
    version = client.get_model_version_by_alias("hunt", "best")
    assert client.get_run(version.run_id).data.tags["trial"] == f"{best['trial']:.0f}"
    assert sum(run.models for run in runs.values()) == shown[f"{best['trial']:.0f}"].models == 1
    x = load_prepared(Folders("tiny").prepared).x["validation"][0]
    model = mlflow.pytorch.load_model("models:/hunt@best")  # noqa: TID251, our own
    weights = CellStore().weights_path(best["cell_id"])
    torch.testing.assert_close(model(x), load_reconstruction(weights, load_study("tiny").model)[0](x))
    assert (model(x) - x).square().mean() < x.square().mean()

    assert tracking.sync(tracker, [], ["hunt"], load_reconstruction).changed == {"hunt": 0}


def test_a_deleted_experiment_comes_back_with_its_runs(database):
    tracker = MlflowTracker(database)
    tracker.publish("study", PARENT, [record()])
    tracker._client.delete_experiment(tracker._client.get_experiment_by_name("study").experiment_id)
    assert tracker.publish("study", PARENT, [record()]) == 0
    assert set(seen(tracker)) == {"parent", "c0"}


def test_runs_of_others_in_the_experiment_are_left_alone(database):
    tracker = MlflowTracker(database)
    tracker.publish("study", PARENT, [record()])
    place = tracker._client.get_experiment_by_name("study").experiment_id
    mine = tracker._client.create_run(place, run_name="by hand").info.run_id
    assert tracker.publish("study", PARENT, [record(), record("c1")]) == 1
    assert tracker._client.get_run(mine).info.status == "RUNNING"


def test_a_store_whose_creation_is_cut_off_is_made_anew(workspace, monkeypatch):
    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alembic.command.upgrade", die)
        MlflowTracker().publish("study", PARENT, [])
    assert not (workspace / "mlflow.db").exists()
    assert MlflowTracker().publish("study", PARENT, [record()]) == 1


def journal_mode(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA journal_mode").fetchone()[0]


def names(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute("select name from runs")}


def test_the_database_file_alone_is_whole(database, workspace):
    MlflowTracker(database).publish("study", PARENT, [record(f"c{number}") for number in range(3)])
    assert journal_mode(workspace / "mlflow.db") == "wal"
    shutil.copy(workspace / "mlflow.db", workspace / "copy.db")
    assert names(workspace / "copy.db") >= {"cell c0", "cell c1", "cell c2"}


def test_a_reader_holds_up_no_writer_and_is_not_held_up(database, workspace):
    tracker = MlflowTracker(database)
    tracker.publish("study", PARENT, [record()])
    with closing(sqlite3.connect(workspace / "mlflow.db", isolation_level=None)) as reader:
        reader.execute("begin")
        before = reader.execute("select count(*) from runs").fetchone()
        assert tracker.publish("study", PARENT, [record("c1")]) == 1
        assert reader.execute("select count(*) from runs").fetchone() == before
    assert "cell c1" in names(workspace / "mlflow.db")


def test_on_a_network_disk_and_in_other_databases_nothing_is_changed(database, workspace, monkeypatch):
    MlflowTracker(database).publish("study", PARENT, [])
    with sqlalchemy.create_engine(f"sqlite:///{workspace}/optuna.db").connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    shared = workspace / "shared"
    shared.mkdir()
    shutil.copy(workspace / "mlflow.db", shared)
    with closing(sqlite3.connect(shared / "mlflow.db")) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    disk = partial(SimpleNamespace, opts="rw", device="")
    disks = [disk(mountpoint="/", fstype="ext4"), disk(mountpoint=str(shared), fstype="nfs4")]
    monkeypatch.setattr("psutil.disk_partitions", lambda **options: disks)
    assert MlflowTracker(f"sqlite:///{shared}/mlflow.db").publish("study", PARENT, [record()]) == 1
    assert journal_mode(shared / "mlflow.db") == "delete"


# A store that is away


def refused(uri: str) -> str:
    tracking._mlflow()
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        MlflowTracker(uri).publish("study", PARENT, [record()])
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    return message


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_is_away_is_named_in_one_line(scheme, workspace):
    message = refused(f"{scheme}://me:secret@127.0.0.1:9")
    assert message.startswith(f"MLflow at {scheme}://me@127.0.0.1:9: [Errno ")
    assert message.endswith("Connection refused")


@pytest.mark.parametrize("uri", ["postgresql://me:secret@host:port/db", "http://[::1", "http://me:secret@[host"])
def test_what_is_no_url_is_one_line(uri, workspace):
    assert "is no URL" in refused(uri)


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_never_answers_is_given_up(scheme, workspace, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS_TO_ANSWER", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(3))
    assert "no answer within 0.5 s" in refused(f"{scheme}://me:secret@tracking.example:5000/x")


def test_a_server_that_accepts_and_is_silent_is_given_up(workspace, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "no answer" in refused(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_a_store_that_mlflow_refuses_is_named_in_one_line(workspace):
    (workspace / "text.db").write_text("no database " * 100)
    for uri in ("file:./mlruns", "sqlite:///text.db", "sqlite:////proc/nowhere/mlflow.db"):
        assert uri in refused(uri)


# The records that files turn into


def write_study(cells: pd.DataFrame, *, evaluated: bool = True) -> None:
    """A study's files as its stages leave them."""
    folders = Folders("digits")
    state = {"dataset": 0, "data_hash": "abc12", "status": "finished", "diverged_at": NAN, "updates": 30}
    kept = {"evaluated_update": 20.0, "validation_loss": 0.7, "unconverged": False}
    manifest = cells.assign(**{column: value for column, value in {**state, **kept}.items() if column not in cells})
    history = pd.concat([curves().rename(columns=lambda name: name.replace("/", "_")).assign(cell_id=c) for c in cells.cell_id])
    write_table(folders.train / "manifest.csv", manifest)
    write_table(folders.train / "history.csv", history)
    write_json(folders.train / "about.json", {"study": "digits", "title": "Real digits", "cells": len(cells), "keep": "best"})
    if evaluated:
        write_table(folders.evaluate / "metrics.csv", cells.assign(unconverged=False, **{"test/mse": 0.25, "test/elbo": NAN}))
        write_table(folders.prune / "summary.csv", cells.assign(active_units=2))


def read_study(cell_ids: list[str]) -> Trained:
    """Those cells of the files that `write_study` writes."""
    whole = _read_trained(Folders("digits").train)
    manifest, history = (table[table["cell_id"].isin(cell_ids)] for table in (whole.manifest, whole.history))
    return replace(whole, manifest=manifest, history=history)


def cell(cell_id: str, arm: str = "vae", beta: float = 4.0, **fields) -> dict:
    axes = {"manifold_dim": 3, "latent_dim": 8, "beta": beta, "l2": 1e-5, "sigma2": NAN, "learning_rate": 1e-3, "seed": 0}
    return {"cell_id": cell_id, "arm": arm, **axes, **fields}


def test_a_cell_shows_only_the_params_that_apply(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b", beta=0.0), cell("00000000000000e1", "ae", NAN, sigma2="learned", seed=3)]))
    _, (vae, free, plain) = study_records("digits")
    shared = {"manifold_dim": 3, "latent_dim": 8, "l2": 1e-5, "learning_rate": 1e-3, "updates": 30}
    assert vae.params == {"arm": "vae", **shared, "beta": 4.0, "log10_beta": 0.60206, "seed": 0}
    assert free.params == {"arm": "vae", **shared, "beta": 0.0, "seed": 0}
    assert plain.params == {"arm": "ae", **shared, "sigma2": "learned", "seed": 3}
    assert [vae.name, plain.name] == [
        "vae manifold_dim=3 z8 β=4 λ=1e-05 seed 0",
        "ae manifold_dim=3 z8 λ=1e-05 σ²=learned seed 3",
    ]
    tags = {"study": "digits", "data_hash": "abc12", "unconverged": "false", "best": "false"}
    assert plain.tags == {**tags, "cell_id": "00000000000000e1", "arm": "ae", "claims": " free "}
    assert (plain.key, plain.step, plain.status) == ("00000000000000e1", 30, "finished")


def test_a_run_names_the_claims_that_it_is_about(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b", beta=0.0), cell("c", "ae", NAN)]))
    _, (vae, free, plain) = study_records("digits")
    assert [record.tags.get("claims") for record in (vae, free, plain)] == [" rises ", " rises  free ", " free "]


def test_only_all_cells_of_a_study_supersede_others(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b", beta=0.0)]))
    assert study_records("digits")[0].all_given
    assert not study_records("digits", trained=read_study(["a"]))[0].all_given


def test_an_experiment_in_a_copy_of_dvc_supersedes_nothing(workspace, tmp_path, monkeypatch):
    copy = shutil.copytree(workspace, tmp_path / "main" / ".dvc" / "tmp" / "exps" / "temp")
    monkeypatch.chdir(copy)
    write_study(pd.DataFrame([cell("a")]))
    assert not study_records("digits")[0].all_given


def test_sigma2_is_a_number_also_beside_learned(workspace):
    write_study(pd.DataFrame([cell("a", sigma2=1.0), cell("b", sigma2=0.1), cell("c", sigma2="learned")]))
    _, records = study_records("digits")
    assert [record.params["sigma2"] for record in records] == [1.0, 0.1, "learned"]
    assert [record.name for record in records] == [
        f"vae manifold_dim=3 z8 β=4 λ=1e-05 {word}seed 0" for word in ("", "σ²=0.1 ", "σ²=learned ")
    ]


def test_metrics_come_from_the_stages_that_have_run(workspace):
    kept = {"evaluated/validation_loss": 0.7, "evaluated/update": 20.0}
    write_study(pd.DataFrame([cell("a")]), evaluated=False)
    parent, (trained,) = study_records("digits")
    assert trained.metrics == kept
    assert set(trained.curves) == {"update", "train/loss", "validation/loss"}
    assert (parent.name, parent.title, parent.tags) == (
        "digits",
        "Real digits",
        {"study": "digits", "cells": "1", "keep": "best"},
    )
    write_study(pd.DataFrame([cell("a")]))
    _, (evaluated,) = study_records("digits")
    assert tracking._finite(evaluated.metrics) == {**kept, "test/mse": 0.25, "prune/active_units": 2.0}


def test_cells_with_pictures_are_the_best_ones(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b")]))
    pictures = Folders("digits").evaluate / "pictures" / "b"
    pictures.mkdir(parents=True)
    write_tensors(Folders("digits").train / "weights" / "b.safetensors", {"weight": torch.ones(2)})
    _, (other, best) = study_records("digits", lambda weights, config: identity() if (weights, config) else None)
    assert (other.tags["best"], other.artifacts, other.model) == ("false", {}, None)
    assert best.tags["best"] == "true"
    assert set(best.artifacts) == {"pictures", "weights"}
    assert isinstance(best.model()[0], nn.Sequential)


def test_a_diverged_cell_says_where(workspace):
    gone = {"status": "diverged", "diverged_at": 12.0, "validation_loss": NAN, "evaluated_update": NAN, "unconverged": False}
    fine = {"status": "finished", "diverged_at": NAN, "validation_loss": 0.7, "evaluated_update": 20.0, "unconverged": True}
    write_study(pd.DataFrame([cell("a", **gone), cell("b", **fine)]), evaluated=False)
    _, (diverged, finished) = study_records("digits")
    assert (diverged.status, diverged.tags["diverged_at"]) == ("diverged", "12")
    assert tracking._finite(diverged.metrics) == {}
    assert (finished.tags["unconverged"], "diverged_at" in finished.tags) == ("true", False)


def test_trials_are_runs_also_where_two_have_the_same_cell_and_the_grids_cells_are_not(workspace):
    folder = Folders("kl_weight").search
    row = {"cell_id": "a", "arm": "vae", "beta": 0.1, "latent_dim": 2, "batch": 0, "unconverged": True}
    failed = {
        "trial": 0,
        "state": "failed",
        "validation/kl": NAN,
        "on_front": False,
        "updates": 10,
        "score": NAN,
        "final": NAN,
        "best": False,
    }
    complete = {
        "trial": 1,
        "state": "complete",
        "validation/kl": 8.0,
        "on_front": True,
        "updates": 30,
        "score": 90.0,
        "final": 89.0,
        "best": True,
    }
    grid = {**row, **complete, "cell_id": "g", "state": "grid", "best": False}
    write_table(folder / "trials.csv", pd.DataFrame([grid, {**row, **failed, "beta": 0.123456789}, {**row, **complete}]))
    write_table(folder / "history.csv", pd.DataFrame({"cell_id": ["a"], "update": [10], "train_loss": [2.0]}))
    about = {"title": "KL weights", "study": "digits", "seed": 0, "updates": 30}
    about |= {"settings": ["arm", "beta", "latent_dim"], "objectives": ["validation/kl"]}
    write_json(folder / "about.json", about)
    parent, (first, second) = search_records("kl_weight")
    assert (first.key, first.status, second.key, second.status) == ("a-0", "failed", "a-1", "finished")
    assert (first.name, second.name) == ("trial 0 vae β=0.123 z2", "trial 1 vae β=0.1 z2")
    assert second.params == {"arm": "vae", "beta": 0.1, "log10_beta": -1.0, "latent_dim": 2, "seed": 0, "updates": 30}
    assert second.metrics == {"validation/kl": 8.0, "search/score": 90.0, "search/final": 89.0}
    assert second.tags | {"state": "complete", "updates_reached": "30", "on_front": "true", "best": "true"} == second.tags
    assert second.tags["search"] == parent.tags["search"] == "kl_weight"


def test_sync_publishes_what_is_there_and_notes_the_rest(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b")]))
    tracker = MemoryTracker()
    synced = tracking.sync(tracker, ["digits", "pruning"], ["kl_weight"])
    assert synced.changed == {"digits": 2}
    assert [note.split()[0] for note in synced.notes] == ["pruning", "kl_weight"]
    assert tracking.sync(tracker, ["digits"]).changed == {"digits": 0}


def test_sync_leaves_alone_a_search_whose_results_are_being_written(workspace):
    with CellStore().results_lock("kl_weight", wait=False):
        (note,) = tracking.sync(MemoryTracker(), [], ["kl_weight"]).notes
    assert note.startswith("kl_weight is not in MLflow: ") and f"is held by process {os.getpid()}" in note


class Slow(MemoryTracker):
    """Notes the turns in which cells are written, and lingers in each cell until somebody ends the thread."""

    def __init__(self, ended: threading.Event):
        super().__init__()
        self.ended, self.began, self.turns = ended, threading.Event(), []

    def _session(self):
        self.turns.append([])
        return super()._session()

    def _write(self, experiment_id, run, change):
        super()._write(experiment_id, run, change)
        if run.tags["run_key"] != "parent":
            self.turns[-1].append(run.tags["run_key"])
            self.began.set()
            self.ended.wait(10)


def test_an_ended_thread_finishes_its_run_and_begins_no_other(workspace):
    write_study(pd.DataFrame([cell("a"), cell("b"), cell("c")]))
    with tracking.Background("digits", read_study) as background:
        background.tracker = tracker = Slow(background._ended)
        background.put(["a", "b", "c"])
        assert tracker.began.wait(10)
    assert not background._thread.is_alive()
    assert tracker.turns == [[], ["a"]]
    assert {key: run.status for key, run in tracker.runs["digits"].items()} == {"parent": "RUNNING", "a": "FINISHED"}
    assert tracking.sync(tracker, ["digits"]).changed == {"digits": 2}


def test_other_writers_get_a_turn(workspace, monkeypatch):
    monkeypatch.setattr(tracking, "CELLS_A_TURN", 2)
    write_study(pd.DataFrame([cell(key) for key in "abcde"]))
    never_slow = threading.Event()
    never_slow.set()
    with tracking.Background("digits", read_study) as background:
        background.tracker = tracker = Slow(never_slow)
        background.put("abcde")
        end = time.monotonic() + 10
        while sum(map(len, tracker.turns)) < 5 and time.monotonic() < end:
            time.sleep(0.01)
    assert tracker.turns == [[], ["a", "b"], ["c", "d"], ["e"]]


def test_a_thread_and_another_writer_make_one_copy_in_mlflow(database, workspace):
    write_study(pd.DataFrame([cell(key) for key in "abcdef"]))
    with tracking.Background("digits", read_study) as background:
        background.put("abc")
        tracking.sync(MlflowTracker(), ["digits"])
        background.put("def")
    assert tracking.sync(MlflowTracker(), ["digits"]).changed == {"digits": 0}
    runs = seen(MlflowTracker(), "digits")
    assert {"parent", *"abcdef"} <= set(runs)
    assert {count for run in runs.values() for count in run.points.values()} == {1}


def test_a_study_that_is_not_training_starts_no_thread(workspace):
    with tracking.Background("digits", read_study) as background:
        pass
    assert background._thread.ident is None


@pytest.mark.parametrize("layout", ["detached", "loose", "packed", "worktree", "none"])
def test_the_commit_is_read_without_git(layout, workspace):
    git = workspace / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("c0ffee\n" if layout == "detached" else "ref: refs/heads/main\n")
    if layout == "packed":
        (git / "packed-refs").write_text("# pack-refs with: peeled\nbad refs/heads/mainly\nc0ffee refs/heads/main\n")
    elif layout != "none":
        (git / "refs" / "heads" / "main").write_text("c0ffee\n")
    if layout == "worktree":
        (git / "worktrees" / "w").mkdir(parents=True)
        shutil.copy(git / "HEAD", git / "worktrees" / "w" / "HEAD")
        (git / "worktrees" / "w" / "commondir").write_text("../..\n")
        (workspace / "w").mkdir()
        (workspace / "w" / ".git").write_text(f"gitdir: {git}/worktrees/w\n")
    assert tracking._git_commit(workspace / "w" if layout == "worktree" else workspace) == (
        None if layout == "none" else "c0ffee"
    )
