"""The real `dvc repro` on a tiny study, in a clone of its own with a space in its path."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import SEARCH, STUDY

from pipeline.artifacts import CellStore, read_table

ROOT = Path(__file__).parents[1]
TRACKED = ("pipeline", "configs", "dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")


def environment():
    hidden = ("MLFLOW_", "OPTUNA_", "DVC_", "VAESWEEP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(clone, *command):
    done = subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new user") / "a clone"
    for name in TRACKED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, folder / name)
    (folder / "configs" / "tiny.yaml").write_text(STUDY)
    (folder / "configs" / "hunt.yaml").write_text(SEARCH)
    (folder / "params.yaml").write_text(
        "{studies: [tiny], searches: {hunt: tiny}, searches_alone: [], reports: reports, scales: {}, "
        "device: cpu, precision: float32}"
    )
    run(folder, "dvc", "config", "--local", "core.no_scm", "true")  # also what a downloaded archive needs
    run(folder, "dvc", "repro")
    return folder


def runs(clone):
    """Names and statuses of all runs, and how many metric points they hold, straight from MLflow's database."""
    with sqlite3.connect(clone / "mlflow.db") as database:
        named = database.execute("select name, status from runs").fetchall()
        (points,) = database.execute("select count(*) from metrics").fetchone()
    return sorted(named), points


def test_the_report_says_what_ran(clone):
    report = (clone / "reports" / "report.md").read_text(encoding="utf-8")
    assert "A tiny study" in report and "A tiny search" in report
    for picture in [line.split("](")[1].split(")")[0] for line in report.splitlines() if line.startswith("![")]:
        assert (clone / "reports" / picture).read_bytes().startswith(b"\x89PNG")
    assert str(clone) not in report


def test_mlflow_holds_every_cell_and_trial_once(clone):
    named, points = runs(clone)
    trials = (read_table(clone / "runs/hunt/search/trials.csv")["state"] != "grid").sum()
    assert len(named) == 1 + 8 + 1 + trials
    assert {status for _, status in named} == {"FINISHED"}
    assert points > 8 * 10 * 6


def test_dvc_shows_metrics_and_plots(clone):
    assert "reconstruction" in run(clone, "dvc", "metrics", "show")
    assert "index.html" in run(clone, "dvc", "plots", "show")


def test_a_second_run_does_nothing_and_logs_nothing(clone):
    before = runs(clone)
    assert "Data and pipelines are up to date" in run(clone, "dvc", "repro")
    run(clone, "vaesweep", "sync")
    assert runs(clone) == before


def test_a_new_beta_trains_its_cells_alone_and_reaches_report_and_mlflow(clone):
    """Last in this file, because it changes the clone."""
    cells = {path: path.stat().st_mtime_ns for path in (clone / ".vaesweep" / "cells").glob("*/record.json")}
    (clone / "configs" / "tiny.yaml").write_text(STUDY.replace("[1]}", "[1, 4]}"))
    run(clone, "dvc", "repro")
    after = {path: path.stat().st_mtime_ns for path in (clone / ".vaesweep" / "cells").glob("*/record.json")}
    assert len(after) == len(cells) + 4 and all(after[path] == written for path, written in cells.items())
    assert len(read_table(clone / "runs/tiny/train/manifest.csv")) == 12
    assert "β = 4" in (clone / "reports" / "report.md").read_text(encoding="utf-8")
    assert sum(name.startswith("vae") for name, _ in runs(clone)[0]) == 8


LONG = STUDY.replace("updates: 30, history_points: 10", "updates: 3000, history_points: 300")


@pytest.fixture
def long_study(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(LONG)
    (tmp_path / "params.yaml").write_text("studies: [tiny]\n")
    run(tmp_path, "vaesweep", "prepare", "tiny")
    return tmp_path


def training(folder, *command):
    """A trainer that holds the store's lock, and so has begun."""
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    lock = folder / ".vaesweep" / "lock"
    while process.poll() is None and not (lock.exists() and str(process.pid) in lock.read_text()):
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_one_line(long_study, number, code):
    process = training(long_study, "vaesweep", "train", "tiny")
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == "vaesweep: interrupted; the next run goes on from the checkpoint"
    store = CellStore(long_study / ".vaesweep")
    assert store.progress() or list(store)


CHECKPOINTS_ALWAYS = """
from functools import partial
from pipeline import executors, tracking
from pipeline.stages import train
train.local_executor = partial(executors.Workers, checkpoint_seconds=0)
tracking.MlflowTracker = tracking.MemoryTracker
train.run("tiny", lambda name, advances: list(advances))
"""


def test_killed_again_and_again_ends_bit_identical(long_study):
    kills = 0
    while kills < 4:
        process = training(long_study, sys.executable, "-c", CHECKPOINTS_ALWAYS)
        time.sleep(0.3 + 0.4 * kills)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    run(long_study, sys.executable, "-c", CHECKPOINTS_ALWAYS)
    broken = outputs(long_study)
    shutil.rmtree(long_study / ".vaesweep")
    run(long_study, sys.executable, "-c", CHECKPOINTS_ALWAYS)
    assert outputs(long_study) == broken


def outputs(folder):
    train = folder / "runs" / "tiny" / "train"
    return {path.relative_to(train): path.read_bytes() for path in sorted(train.rglob("*")) if path.is_file()}
