"""The real `dvc repro` on a tiny study, in a clone of its own with a space in its path."""

import sqlite3

import pytest
from project import run, write_clone
from tiny import STUDY

from pipeline.artifacts import read_table


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = write_clone(tmp_path_factory.mktemp("new user") / "a clone")
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
