"""Faults that are made for real, and a table of what came of them."""

import shutil
import subprocess
from collections import defaultdict

import pytest
from project import LONG, make_database, run, write_clone, write_project
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
def prepared(tmp_path_factory):
    """A folder with the tiny study, its data prepared, and MLflow's database."""
    folder = write_project(tmp_path_factory.mktemp("prepared") / "work")
    run(folder, "vaesweep", "prepare", "tiny")
    make_database(folder)
    return folder


@pytest.fixture
def make_project(prepared):
    """A copy of it at a folder, perhaps with another study of the same data."""

    def make(folder, study=STUDY):
        shutil.copytree(prepared, folder)
        (folder / "configs" / "tiny.yaml").write_text(study)
        return folder

    return make


@pytest.fixture(scope="session")
def prepared_clone(tmp_path_factory):
    """The whole project, in which `dvc` has prepared the data of the long study, and MLflow's database."""
    folder = write_clone(tmp_path_factory.mktemp("prepared") / "clone", LONG)
    run(folder, "dvc", "repro", "prepare@tiny")
    make_database(folder)
    return folder


@pytest.fixture
def long_clone(prepared_clone, tmp_path):
    return shutil.copytree(prepared_clone, tmp_path / "clone")


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
