"""Processes that are killed, or asked to stop, at any moment."""

import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections import defaultdict
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import torch
from project import LONG, begin, outputs, ran, run, run_in_turn, wait_until
from scale import ALL, SHORTER, UPDATES, killed_by, times

from pipeline.artifacts import CellStore

NOTED = """
import os
from pipeline.executors import StackTraining
from pipeline.trainer import StackTrainer

made = os.open("made", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
restore, step = StackTraining._restore, StackTrainer._step


def restoring(training, trainer, keys):
    trainer.keys = keys
    restore(training, trainer, keys)


def stepping(trainer, *block):
    terms = step(trainer, *block)
    os.write(made, f"{trainer.update} {' '.join(trainer.keys)}\\n".encode())
    return terms


StackTraining._restore, StackTrainer._step = restoring, stepping
"""
"""Notes every update that any process makes of a cell: training itself tells only of what is in a checkpoint already."""
TRAIN = (
    NOTED
    + """
import sys
from pipeline.artifacts import CellStore, Folders, load_prepared
from pipeline.config import load_settings, load_study
from pipeline.devices import find_runtime
from pipeline.executors import Workers
from pipeline.grid import cells, identify

if __name__ == "__main__":
    data, runtime = load_prepared(Folders("tiny").prepared), find_runtime(load_settings())
    wanted = identify(cells(load_study("tiny")), data.hashes, runtime)
    executor = Workers(CellStore(), runtime, stack_size=2, checkpoint_seconds=0.0)
    with CellStore().lock("training"):
        for _ in executor.run(wanted, data, int(sys.argv[1])):
            pass
"""
)
COMMAND = (
    NOTED
    + """
from pipeline.cli import main

if __name__ == "__main__":
    main(["train", "tiny"])
"""
)
INTERVAL = 10
RUNG = UPDATES // 2
AT_WORK = 4 if torch.get_num_threads() > 1 else 1
"""Processes of a training: itself, a tracker, a server of forks, and at least one that trains."""


def trained(folder, until):
    return [sys.executable, str(folder / "trains.py"), str(until)]


def made(folder):
    """The updates that were made of each cell since this was asked last."""
    updates = defaultdict(list)
    for line in (folder / "made").read_text().splitlines():
        update, *keys = line.split()
        for key in keys:
            updates[key].append(int(update))
    (folder / "made").unlink()
    return updates


def kept(store):
    """The update that each cell would go on from."""
    return {key: place.update for key, place in store.progress().items()} | dict.fromkeys(store, UPDATES)


def kill_in_training(folder, until, moments):
    """Kills a trainer, alone or with its processes; how many updates of each cell in training were made and not kept."""
    notes = folder / "made"
    notes.unlink(missing_ok=True)
    process = begin(folder, *trained(folder, until))
    wait_until(lambda: (notes.exists() and notes.stat().st_size) or process.poll() is not None)
    time.sleep(moments.uniform(0, 0.5))
    moments.choice([process.kill, lambda: os.killpg(process.pid, signal.SIGKILL)])()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    wait_until(lambda: not at_work(folder), 10)
    there = kept(CellStore(folder / ".vaesweep"))
    return [updates[-1] - there.get(key, 0) for key, updates in made(folder).items()], process.returncode


def test_killed_in_training_ends_bit_identical(make_project, tmp_path, figure):
    """Weights, optimiser and history at half the budget; weights, records and tables at the end."""
    folder = make_project(tmp_path / "work", SHORTER)
    (folder / "trains.py").write_text(TRAIN)
    whole = shutil.copytree(folder, tmp_path / "whole")
    moments, kills, tries, lost = random.Random(0), 0, 0, []
    for until in (RUNG, UPDATES)[times(1, 0) :]:
        wanted = kills + times(1, 10)
        while kills < wanted:
            lost_now, code = kill_in_training(folder, until, moments)
            kills, tries, lost = kills + (code == -signal.SIGKILL), tries + 1, lost + lost_now
            assert max(lost_now) <= INTERVAL, lost_now
            assert tries < 3 * times(2, 20), "too many came too late"
        for place in (folder, whole):
            run(place, *trained(place, until))
        if until == RUNG:
            states = [state(CellStore(place / ".vaesweep")) for place in (folder, whole)]
            assert states[0].keys() == states[1].keys() and len(states[0]) > 8 * 10
            assert all(torch.equal(*(found[name].nan_to_num(-1.0) for found in states)) for name in states[0])
    for place in (folder, whole):
        run_in_turn(place, [["train", "tiny"], ["evaluate", "tiny"]], MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    for stage in ("train", "evaluate"):
        assert outputs(folder, stage) == outputs(whole, stage)
    figure(f"{kills} kills; at most {max(lost)} of {INTERVAL} updates of a cell lost; bit-identical")


def state(store):
    """All that a checkpoint holds of every cell: weights, best weights, moments, sums, history."""
    rows = {key: store.load_rows([place]) for key, place in store.progress().items()}
    return {f"{key} {name}": tensor for key, row in rows.items() for name, tensor in row.items()}


def go_on(folder):
    """Trains to the end: every cell must go on from where it is kept, one at least from its midst; the furthest such update."""
    before = kept(CellStore(folder / ".vaesweep"))
    (folder / "goes_on.py").write_text(COMMAND)
    run(folder, sys.executable, "goes_on.py")
    begun = {key: updates[0] - 1 for key, updates in made(folder).items()}
    assert begun == {key: before.get(key, 0) for key in begun} and max(begun.values()) > 0
    return max(begun.values())


def parent_status(folder):
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        named = database.execute("select status from runs where name = 'tiny'").fetchall()
    return named[0][0] if named else None


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_and_a_killed_run(make_project, tmp_path, number, code, group, figure):
    folder = make_project(tmp_path / "work", LONG)
    process = begin(folder, "vaesweep", "train", "tiny")
    wait_until(lambda: parent_status(folder) == "RUNNING")
    start = time.monotonic()
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(30)
    took = time.monotonic() - start
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == "vaesweep: interrupted; the next run goes on from the checkpoint"
    assert took < 5
    assert parent_status(folder) == "KILLED"
    place = go_on(folder)
    assert parent_status(folder) == "FINISHED"
    figure(f"exit {code} after {took:.1f} s, run KILLED, then on from update {place}, FINISHED")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_dvc_and_all_its_processes_leaves_a_checkpoint_and_a_killed_run(long_clone, number, figure):
    dvc = begin(long_clone, "dvc", "repro", "train@tiny")
    wait_until(lambda: parent_status(long_clone) == "RUNNING")
    start = time.monotonic()
    os.killpg(dvc.pid, number)
    wait_until(lambda: dvc.poll() is not None and not at_work(long_clone), 30)
    took = time.monotonic() - start
    output = "".join(dvc.communicate())
    assert dvc.returncode != 0 and took < 5, output
    assert parent_status(long_clone) == "KILLED", output
    place = go_on(long_clone)
    assert parent_status(long_clone) == "FINISHED"
    figure(f"all ended after {took:.1f} s, run KILLED, then on from update {place}, FINISHED")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)][: times(1, 2)], ids=["SIGTERM", "SIGINT"][: times(1, 2)]
)
def test_a_signal_ends_a_command_that_waits_for_a_locked_database(make_project, tmp_path, number, code, figure):
    folder = make_project(tmp_path / "work")
    with closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        process = begin(folder, "vaesweep", "train", "tiny")
        wait_until((folder / "runs/tiny/train/about.json").exists)
        time.sleep(2)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(number)
        process.wait(30)
        took = time.monotonic() - start
        _, errors = process.communicate()
    assert process.returncode == code and took < 5, errors
    figure(f"exit {code} after {took:.1f} s")


def at_work(folder):
    """The processes in a folder, but for dvc's own: those that train are no children of a trainer's, and have other names."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and "dvc" not in [Path(word).name for word in process.cmdline()[:2]]:
                found.add(process)
    return found


def holder(folder):
    """The id of the process that the lock names."""
    return int((re.findall(r"process (\d+)", lock_of(folder)) or [0])[0])


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@killed_by
def test_a_killed_dvc_leaves_no_orphan_and_never_two_writers(long_clone, number, figure):
    first = begin(long_clone, "dvc", "repro", "train@tiny")
    wait_until(lambda: "training study" in lock_of(long_clone) and len(at_work(long_clone)) >= AT_WORK)
    began = at_work(long_clone)
    first.send_signal(number)
    first.wait()
    killed, ended, orphans, writers = time.monotonic(), 0.0, None, 0
    second = begin(long_clone, "dvc", "repro", "train@tiny")
    while second.poll() is None:
        left, other, after = began & at_work(long_clone), holder(long_clone), time.monotonic() - killed
        if left:
            ended = after
        if orphans is None and after > 1:
            orphans = left
        other_writes = psutil.pid_exists(other) and other not in [process.pid for process in began]
        writers = max(writers, bool(left) + other_writes)
        time.sleep(0.05)
    output = "".join(second.communicate())
    assert second.returncode == 0, output
    assert orphans == set(), (orphans, ended)
    assert writers == 1 and not at_work(long_clone)
    figure(f"{len(began)} processes ended within {ended:.1f} s; never two writers; the second run ends well")


def lock_of(folder):
    lock = folder / ".vaesweep" / "lock"
    return lock.read_text() if lock.exists() else ""


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_of_two_runs_at_once_the_second_says_who_holds_the_lock(long_clone, figure):
    first = begin(long_clone, "dvc", "repro", "train@tiny")
    time.sleep(3)
    wait_until(lambda: "training study" in lock_of(long_clone))
    second = ran(long_clone, "dvc", "repro", "train@tiny")
    output = "".join(first.communicate())
    assert first.returncode == 0, output
    assert second.returncode != 0 and str(first.pid) in second.stderr, second.stdout + second.stderr
    assert "up to date" in run(long_clone, "dvc", "repro", "train@tiny")
    figure("the second names the process that holds the lock, the first ends well")
