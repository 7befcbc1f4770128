"""Disks that are full, read-only or slow to answer, and a clock that was set back."""

import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import torch
from project import begin, outputs, ran, run, run_in_turn, wait_until, write_project
from scale import SHORTER, times

from pipeline import tracking
from pipeline.artifacts import CellStore
from pipeline.records import ParentRecord, RunRecord
from pipeline.tracking import MlflowTracker

AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
EAGER = """
from functools import partial
from pipeline import cli, executors
from pipeline.stages import train

train.local_executor = partial(executors.Inline, checkpoint_seconds=0.0)
cli.main(["train", "tiny"])
"""


REFUSED = """
import json, sys
from click.testing import CliRunner
from pipeline.cli import main

for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, words)
    print(json.dumps([" ".join(words), result.exit_code, result.stderr]))
"""
"""Runs several commands that fail in one process, for the sake of the time that its imports take."""
NOTES = ("train tiny: ", "search hunt: ", "not in MLflow yet: ")
"""How lines begin that tell no error."""
TRAIN = [["vaesweep", "train", "tiny"], [sys.executable, "-c", EAGER]]


def one_line(done):
    """The error of a command that failed, which must be all that it says of it."""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(NOTES)]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("vaesweep: "), done.stderr
    return lines[0]


@pytest.mark.parametrize("train", TRAIN[times(1, 0) :], ids=["command", "eager"][times(1, 0) :])
def test_a_full_disk_costs_nothing_but_time(mounted, make_project, tmp_path, train, figure):
    """At the end of training, or at the first of many checkpoints."""
    disk, _ = mounted
    folder = make_project(disk / "work", SHORTER)
    whole = shutil.copytree(folder, tmp_path / "whole")
    process = begin(folder, sys.executable, "-c", EAGER, **AWAY)
    wait_until(lambda: CellStore(folder / ".vaesweep").progress())
    process.send_signal(signal.SIGTERM)
    process.communicate()
    before = CellStore(folder / ".vaesweep").progress()
    (folder / ".vaesweep" / "lock").write_bytes(b"")
    with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(4096))
    error = one_line(ran(folder, *train, **AWAY))
    assert str(folder) in error and "No space left on device" in error
    after = CellStore(folder / ".vaesweep").progress()
    assert all(after[key].update >= place.update for key, place in before.items())
    (disk / "filler").unlink()
    for place in (folder, whole):
        run(place, *train, **AWAY)
    assert outputs(folder) == outputs(whole)
    assert not list((folder / ".vaesweep").rglob(".*"))
    figure("one line naming the file; the checkpoint stays; bit-identical after")


def test_a_read_only_folder_is_one_line_in_every_command(mounted, figure):
    """That names a file of the folder; every command has run before, so that none ends for want of what it reads."""
    disk, remount = mounted
    folder = write_project(disk / "work")
    commands = [["prepare", "tiny"], ["train", "tiny"], ["evaluate", "tiny"], ["prune", "tiny"], ["search", "hunt"]]
    commands = [*commands, ["report"], ["clean"], ["code"], ["sync"]][: times(2, 9)]
    run_in_turn(folder, commands)
    remount("ro")
    alone = [command for command in commands if command[0] in ("train", "search", "sync")]
    done = {" ".join(command): ran(folder, "vaesweep", *command, **({} if command == ["sync"] else AWAY)) for command in alone}
    together = [command for command in commands if command not in alone]
    for line in run(folder, sys.executable, "-c", REFUSED, json.dumps(together), **AWAY).splitlines():
        command, code, errors = json.loads(line)
        done[command] = SimpleNamespace(returncode=code, stderr=errors)
    assert len(done) == len(commands)
    for command, ended in done.items():
        path, _, reason = one_line(ended).removeprefix("vaesweep: ").partition(": ")
        print(command, path, reason)
        assert "Read-only file system" in reason, (command, path, reason)
        assert (folder / path).parent.is_dir() or str(folder) in reason, (command, path, reason)
    assert "is missing" not in run(folder, "vaesweep", "plan", "tiny")
    figure(f"{len(commands)} commands, one line each; `plan` writes nothing")


@contextmanager
def locked(path):
    """Holds a SQLite database for itself alone."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def test_locked_databases_are_waited_for_and_nothing_is_lost(make_project, tmp_path, figure):
    """MLflow's at the start of a training, Optuna's in the midst of a search."""
    seconds, trains, searches = times(3, 60), make_project(tmp_path / "trains"), make_project(tmp_path / "searches")
    run(searches, "vaesweep", "train", "tiny", **AWAY)
    searching = begin(searches, "vaesweep", "search", "hunt", **AWAY)
    wait_until((searches / "optuna.db").exists)
    time.sleep(1)
    with locked(searches / "optuna.db"), locked(trains / "mlflow.db"):
        assert searching.poll() is None, "it had ended before"
        training = begin(trains, "vaesweep", "train", "tiny")
        wait_until((trains / "runs/tiny/train/about.json").exists)
        time.sleep(seconds)
        assert searching.poll() is None, "it did not wait"
        waited = training.poll() is None
    for process in (searching, training):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert waited or "not in MLflow yet" in errors, errors
    trials = (searches / "runs/hunt/search/trials.csv").read_text().splitlines()
    assert sum(",complete," in line for line in trials) == 5
    run(trains, "vaesweep", "sync")
    with closing(sqlite3.connect(trains / "mlflow.db")) as database:
        runs = database.execute("select name, status from runs").fetchall()
    runs.remove(("x", "FINISHED"))
    assert len(runs) == len(set(runs)) == 1 + 8 and {status for _, status in runs} == {"FINISHED"}
    figure(f"{seconds} s locked; 8 of 8 cells once in MLflow, 5 of 5 trials")


def test_a_clock_that_is_set_back_changes_no_order(tmp_path, monkeypatch, figure):
    """The furthest checkpoint is used, and the newest evaluation shown, whatever the clock says."""
    monkeypatch.chdir(tmp_path)
    now = time.time_ns()
    parent = ParentRecord("tiny", "Tiny")
    for back, value in ((0, 0.5), (3600, 0.4), (7200, 0.3)):
        monkeypatch.setattr(tracking.time, "time_ns", lambda back=back: now - back * 10**9)
        MlflowTracker().publish("tiny", parent, [RunRecord("c", "cell", metrics={"test/mse": value}, step=30)])
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("select value from latest_metrics where key = 'test/mse'").fetchall() == [(0.3,)]
    store = CellStore(tmp_path / "store")
    for number, update in enumerate((10, 20, 30)):
        store.save_checkpoint(["a"], {"w": torch.full((1, 1), float(update))}, update)
        for path in (tmp_path / "store" / "checkpoints").iterdir():
            os.utime(path, (0, -3600 * number))
    progress = store.progress()
    assert progress["a"].update == 30 and store.load_rows([progress["a"]])["w"].item() == 30
    figure("set back twice by an hour; steps decide")
