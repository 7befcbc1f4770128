"""Several real processes search one study, on SQLite and on a PostgreSQL server."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from project import begin, begin_gated, finished, run, wait_until
from scale import ALL, times
from test_trials import a_search, search_through, trials_of
from tiny import HALVED, write
from tiny import SEARCH as HUNT

from pipeline import tracking
from pipeline.artifacts import Folders, read_table
from pipeline.stages import search
from pipeline.storages import open_storage

SEARCHERS, TARGET, ROUNDS = 3, 30, times(3, 10)
DEBIANS = Path("/usr/lib/postgresql")
SEARCH = {"trials": TARGET, "batch": 4, "rungs": (0.25, 0.5), "halving": 2}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def place_of_postgresql() -> Path | None:
    """The folder of the server's programs: of those on the PATH, else of the newest that Debian keeps off it."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    kept = (path.parent for path in DEBIANS.glob("*/bin/initdb"))
    return max(kept, key=lambda folder: float(folder.parent.name), default=None)


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a server that lives as long as these tests."""
    pytest.importorskip("psycopg", reason="NOT TESTED ON POSTGRESQL: psycopg is not installed (extra 'postgres')")
    if not (programs := place_of_postgresql()):
        pytest.skip("NOT TESTED ON POSTGRESQL: there is no initdb (Debian's package: postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
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


@pytest.fixture
def context():
    """Of processes of their own, which import all this once together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


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


def test_first_starts_at_one_moment_on_an_empty_database(context, empty):
    barrier = context.Barrier(SEARCHERS, timeout=60)
    processes = [context.Process(target=opening, args=(empty, barrier)) for _ in range(SEARCHERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * SEARCHERS


def test_several_processes_share_the_work_and_pass_no_target(context, url):
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


def test_of_three_processes_one_is_killed_and_its_batch_run_anew_once(context, url, figure):
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


def attributes(name: str) -> list:
    """What the storage notes of trials under a name."""
    with contextlib.closing(sqlite3.connect("optuna.db")) as database:
        return database.execute("select value_json from trial_user_attributes where key = ?", [name]).fetchall()


def hunting(folder: Path, begun, training) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    tracking.MlflowTracker = tracking.MemoryTracker
    search.run("hunt", lambda name, steps: [(training if number else begun).set() for number, _ in enumerate(steps)])


@pytest.fixture
def begin_search(workspace, context):
    """Starts a process that searches, and tells when it has begun, and when it trains."""

    def begin_search():
        begun, training = context.Event(), context.Event()
        process = context.Process(target=hunting, args=(workspace, begun, training))
        process.begun, process.training = begun, training
        process.start()
        return process

    return begin_search


def test_two_searchers_share_a_search_and_both_end_with_all_of_it(workspace, begin_search):
    write(HALVED.replace("trials: 12", "trials: 24"), "hunt")
    both = [begin_search(), begin_search()]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    trials = read_table(Folders("hunt").search / "trials.csv")
    assert sorted(trials["trial"].dropna()) == list(range(24))
    assert set(trials["state"]) == {"grid", "complete", "pruned"}
    assert len(read_table(Folders("hunt").search / "winner.csv")) == 4
    assert len(set(attributes("searcher"))) == 2


def ended(process, seconds: float | None = None) -> float:
    """How long a search took from its first step, or until it was killed."""
    assert process.begun.wait(120)
    start = time.monotonic()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return time.monotonic() - start


@pytest.mark.parametrize("kind", ["tpe", "random"][: times(1, 2)])
def test_a_search_killed_at_random_moments_ends_with_the_trials_of_one_that_was_not(workspace, begin_search, kind, figure):
    write(HALVED.replace("kind: random", f"kind: {kind}"), "hunt")
    process, moments, kills, killed, again = begin_search(), random.Random(0), times(2, 5), 0, 0
    took = ended(process)
    trials = read_table(Folders("hunt").search / "trials.csv")
    while killed < kills or process.exitcode:
        if process.exitcode == 0:
            for left in (workspace / "optuna.db", workspace / ".vaesweep", Folders("hunt").search):
                left.unlink() if left.is_file() else shutil.rmtree(left)
        process = begin_search()
        if not killed:  # one at least meets a batch
            assert process.training.wait(120)
        ended(process, moments.uniform(0, 0.4 * bool(killed)) * took if killed < kills else None)
        killed += process.exitcode != 0
        if process.exitcode == 0:
            pd.testing.assert_frame_equal(read_table(Folders("hunt").search / "trials.csv"), trials)
            again += len(attributes("retry_of"))
    assert again > 0
    figure(f"{killed} kills, {again} trials run anew, the same trials at the end")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_of_three_commands_one_is_killed_while_it_trains_and_its_trials_run_anew(url, make_project, tmp_path, figure):
    folder, target = make_project(tmp_path / "work"), 9
    (folder / "configs/hunt.yaml").write_text(HUNT.replace("trials: 5", f"trials: {target}"))
    named = f"sqlite:///{folder}/optuna.db" if url.startswith("sqlite") else url
    settings = {"OPTUNA_STORAGE": named, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    run(folder, "vaesweep", "train", "tiny", **settings)
    killed = begin_gated(folder, 8, "search", "hunt", **settings)
    wait_until(lambda: (folder / "waits").exists() or killed.poll() is not None)
    searchers = [killed, *(begin(folder, "vaesweep", "search", "hunt", **settings) for _ in range(SEARCHERS - 1))]
    wait_until(lambda: finished(folder) > 8)
    killed.kill()
    (folder / "gate").write_text("99")
    errors = [searcher.communicate()[1] for searcher in searchers]
    assert [searcher.returncode for searcher in searchers] == [-signal.SIGKILL, 0, 0], errors
    with open_storage(named) as storage:
        (study,) = (study for study in storage.get_all_studies() if "hunt" in study.study_name)
        trials = storage.get_all_trials(study._study_id)
    left = [trial for trial in trials if trial.user_attrs.get("void") == "stale"]
    again = [trial for trial in trials if trial.user_attrs.get("retry_of") in [trial.number for trial in left]]
    own = [trial for trial in trials if "void" not in trial.user_attrs and "searcher" in trial.user_attrs]
    assert len(left) == len(again) == 2 and all(f"-{killed.pid}-" in trial.user_attrs["searcher"] for trial in left)
    assert [trial.params for trial in again] == [trial.params for trial in left]
    assert [trial.state.name for trial in own] == ["COMPLETE"] * target
    table = (folder / "runs/hunt/search/trials.csv").read_text().splitlines()
    assert sum(",complete," in line for line in table) == target
    figure(f"{len(left)} of {len(left)} left trials run anew, {len(own)} of {target} ended")


def test_the_servers_programs_are_those_on_the_path_or_debians_newest(tmp_path, monkeypatch):
    def put(*parts):
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        (folder / "initdb").write_text("")
        (folder / "initdb").chmod(0o755)
        return folder

    monkeypatch.setitem(globals(), "DEBIANS", tmp_path / "debian")
    monkeypatch.setenv("PATH", str(tmp_path / "on the path"))
    assert place_of_postgresql() is None
    _, newest = put("debian", "9.6", "bin"), put("debian", "15", "bin")
    assert place_of_postgresql() == newest
    on_path = put("on the path")
    assert place_of_postgresql() == on_path
