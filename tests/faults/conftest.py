"""Faults that are made for real, and a table of what came of them."""

import fcntl
import os
import shutil
import subprocess
from collections import defaultdict

import pytest
from project import LONG, make_database, outputs, run, write_clone, write_project
from tabulate import tabulate
from tiny import STUDY


@pytest.fixture
def figure(record_property):
    """Notes what came of a fault, for the table at the end."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter):
    found = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "figure" and report.when == "call":
                test, _, case = report.nodeid.partition("::")[2].removeprefix("test_").partition("[")
                found[test.replace("_", " "), value].append(case.removesuffix("]"))
    rows = []
    for (test, value), (case, *others) in found.items():
        rows.append((test, f"{value} ({1 + len(others)} cases)") if others else (f"{test} {case}", value))
    if rows:
        terminalreporter.write_line("\n" + tabulate(sorted(rows), ["fault", "what came of it"], maxcolwidths=[70, 60]))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder under a name, for all processes of this run of pytest."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name, make):
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / f"{name}.made").exists():
                shutil.rmtree(shared / name, ignore_errors=True)  # of one that failed
                make(shared / name)
                (shared / f"{name}.made").touch()
        return shared / name

    return made


@pytest.fixture(scope="session")
def prepared(made_once):
    """A folder with the tiny study, its data prepared, and MLflow's database."""

    def make(folder):
        run(write_project(folder), "vaesweep", "prepare", "tiny")
        make_database(folder)

    return made_once("prepared", make)


@pytest.fixture(scope="session")
def trained_outputs(made_once, prepared):
    """What an uninterrupted training of the tiny study leaves, by file."""

    def make(folder):
        shutil.copytree(prepared, folder)
        run(folder, "vaesweep", "train", "tiny", MLFLOW_TRACKING_URI="http://127.0.0.1:9")

    return outputs(made_once("trained", make))


@pytest.fixture
def make_project(prepared):
    """A copy of it at a folder, perhaps with another study of the same data."""

    def make(folder, study=STUDY):
        shutil.copytree(prepared, folder)
        (folder / "configs" / "tiny.yaml").write_text(study)
        return folder

    return make


@pytest.fixture
def make_clone(made_once, prepared, tmp_path):
    """A clone of the whole project with a study of the tiny one's data, which `dvc` has prepared, and MLflow's database."""

    def make(folder):
        run(write_clone(folder, LONG), "dvc", "repro", "prepare@tiny")
        shutil.copyfile(prepared / "mlflow.db", folder / "mlflow.db")

    def copied(study):
        folder = shutil.copytree(made_once("clone", make), tmp_path / "clone")
        (folder / "configs" / "tiny.yaml").write_text(study)
        return folder

    return copied


@pytest.fixture
def long_clone(make_clone):
    return make_clone(LONG)


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small disk of its own at a folder; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"NOT TESTED ON A DISK OF ITS OWN: mount: {done.stderr.strip()}")

    mount("size=24m")
    yield folder, lambda *options: mount("remount", "size=24m", *options)
    subprocess.run(["umount", "-l", folder], check=True)
