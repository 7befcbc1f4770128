"""Several real processes search one study, on SQLite and on a PostgreSQL server."""

from __future__ import annotations

import collections
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from test_trials import a_search, search_through, trials_of

from pipeline.storages import open_storage

SEARCHERS, TARGET, ROUNDS = 3, 30, 10
SEARCH = {"trials": TARGET, "batch": 4, "rungs": (0.25, 0.5), "halving": 2}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a server that lives as long as these tests."""
    pytest.importorskip("psycopg", reason="NOT TESTED ON POSTGRESQL: psycopg is not installed (extra 'postgres')")
    if not (found := shutil.which("initdb")):
        pytest.skip("NOT TESTED ON POSTGRESQL: there is no initdb on the PATH (Debian's package: postgresql)")
    programs, folder = Path(found).resolve().parent, Path(tempfile.mkdtemp(prefix="postgresql-"))
    owner = {"user": "postgres"} if os.getuid() == 0 else {}  # the server refuses to run as root
    if owner:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, **owner}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "me", "--auth=trust", "--no-sync"], **quiet)
    options = f"-h 127.0.0.1 -p {port} -k {folder}"
    control = [programs / "pg_ctl", "-D", folder / "data", "-w"]
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], **quiet)
    yield f"postgresql://me@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    return "sqlite:///optuna.db" if request.param == "sqlite" else request.getfixturevalue("postgresql")


@pytest.fixture
def empty(request, url):
    """The URLs of empty databases."""
    if url.startswith("sqlite"):
        return [f"sqlite:///first-{number}.db" for number in range(ROUNDS)]
    import psycopg

    names = [f"first_{number}" for number in range(ROUNDS)]
    with psycopg.connect(url, autocommit=True) as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name}")
    return [url.removesuffix("postgres") + name for name in names]


def opening(urls: list[str], barrier) -> None:
    for url in urls:
        barrier.wait()
        with open_storage(url) as storage:
            storage.get_all_studies()


def searching(url: str, name: str, barrier) -> None:
    with open_storage(url) as storage:
        barrier.wait()
        search_through(a_search(**SEARCH, name=name), storage, slowly=0.05)


def asking(url: str, name: str, asked) -> None:
    """Asks for a batch, and never tells."""
    with open_storage(url) as storage:
        trials = trials_of(a_search(**SEARCH, name=name), storage)
        with trials.searcher:
            trials.next()
            asked.set()
            time.sleep(600)


def test_first_starts_at_one_moment_on_an_empty_database(empty):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(SEARCHERS, timeout=60)
    processes = [context.Process(target=opening, args=(empty, barrier)) for _ in range(SEARCHERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * SEARCHERS


def test_several_processes_share_the_work_and_pass_no_target(url):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(SEARCHERS, timeout=60)
    processes = [context.Process(target=searching, args=(url, "shared", barrier)) for _ in range(SEARCHERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * SEARCHERS
    with open_storage(url) as storage:
        trials = trials_of(a_search(**SEARCH, name="shared"), storage)
        assert trials.standing().ended == TARGET and trials.standing().running == 0
        shares = collections.Counter(trial.user_attrs["searcher"] for trial in trials.own())
        assert len(shares) == SEARCHERS, shares


def test_of_three_processes_one_is_killed_and_its_batch_run_anew_once(url, figure):
    context = multiprocessing.get_context("spawn")
    asked, barrier = context.Event(), context.Barrier(SEARCHERS - 1, timeout=60)
    killed = context.Process(target=asking, args=(url, "killed", asked))
    killed.start()
    assert asked.wait(60)
    with open_storage(url) as storage:
        left = [trial.params for trial in trials_of(a_search(**SEARCH, name="killed"), storage).own("RUNNING")]
    others = [context.Process(target=searching, args=(url, "killed", barrier)) for _ in range(SEARCHERS - 1)]
    for process in others:
        process.start()
    killed.kill()
    for process in (killed, *others):
        process.join(120)
    assert [process.exitcode for process in (killed, *others)] == [-signal.SIGKILL, 0, 0]
    with open_storage(url) as storage:
        trials = trials_of(a_search(**SEARCH, name="killed"), storage)
        standing, ended = trials.standing(), [trial.params for trial in trials.own("COMPLETE", "PRUNED")]
        assert standing.ended == TARGET and standing.running == 0
        assert len(left) == 4 and all(params in ended for params in left)
        assert sum(trial.user_attrs.get("void") == "stale" for trial in storage.get_all_trials(trials.study._study_id)) == 4
    figure(f"{len(left)} of {len(left)} left trials run anew, {standing.ended} of {TARGET} ended")
