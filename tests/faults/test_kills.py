"""Processes that are killed, or asked to stop, at any moment."""

import os
import random
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing

import psutil
import pytest
import torch
from project import LONG, begin, make_database, outputs, ran, run, wait_until, write_clone, write_project
from scale import ALL, SHORTER, UPDATES, killed_by, times

from pipeline.artifacts import CellStore

TRAIN = """
import sys
from pipeline.artifacts import CellStore, Folders, load_prepared
from pipeline.config import load_settings, load_study
from pipeline.executors import Workers, find_runtime
from pipeline.grid import cells, identify

if __name__ == "__main__":
    data, runtime = load_prepared(Folders("tiny").prepared), find_runtime(load_settings())
    wanted = identify(cells(load_study("tiny")), data.hashes, runtime)
    executor = Workers(CellStore(), runtime, stack_size=2, checkpoint_seconds=0.0)
    with CellStore().lock("training"):
        for advance in executor.run(wanted, data, int(sys.argv[1])):
            print(advance.updates_done, flush=True)
"""
INTERVAL = 10
RUNG = UPDATES // 2


def trained(folder, until):
    return [sys.executable, str(folder / "trains.py"), str(until)]


def kept(store):
    """Updates of all cells that the store would go on from."""
    return {key: place.update for key, place in store.progress().items()} | dict.fromkeys(store, UPDATES)


def kill_in_training(folder, until, moments):
    """Kills a trainer after its first words; updates that it had told of, and that the store did not keep."""
    process, store = begin(folder, *trained(folder, until)), CellStore(folder / ".vaesweep")
    before, told = kept(store), 0
    for line in process.stdout:
        told = int(line)
        if told:
            break
    time.sleep(moments.uniform(0, 0.5))
    process.kill()
    told = max([told, *map(int, process.stdout.read().split())])
    process.communicate()
    wait_until(lambda: not [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder)], 10)
    finished_before = sum(update for update in before.values() if update == UPDATES)
    return max(0, told + finished_before - sum(kept(store).values())), process.returncode


def test_killed_in_training_ends_bit_identical(long_study, tmp_path, figure):
    """Weights, optimiser and history at half the budget; weights, records and tables at the end."""
    (long_study / "trains.py").write_text(TRAIN)
    (long_study / "configs" / "tiny.yaml").write_text(SHORTER)
    whole = shutil.copytree(long_study, tmp_path / "whole")
    moments, kills, lost = random.Random(0), 0, []
    for until in (RUNG, UPDATES):
        wanted = kills + times(1, 10)
        while kills < wanted:
            lost_now, code = kill_in_training(long_study, until, moments)
            kills, lost = kills + (code == -signal.SIGKILL), [*lost, lost_now]
            assert len(lost) < 3 * times(2, 20), "too many came too late"
        for folder in (long_study, whole):
            run(folder, *trained(folder, until))
        if until == RUNG:
            states = [state(CellStore(folder / ".vaesweep")) for folder in (long_study, whole)]
            assert states[0].keys() == states[1].keys() and len(states[0]) > 8 * 10
            assert all(torch.equal(*(found[name].nan_to_num(-1.0) for found in states)) for name in states[0])
    for folder in (long_study, whole):
        for stage in ("train", "evaluate"):
            run(folder, "vaesweep", stage, "tiny", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    for stage in ("train", "evaluate"):
        assert outputs(long_study, stage) == outputs(whole, stage)
    assert max(lost) <= INTERVAL * 8
    figure(f"{kills} kills; at most {max(lost) / 8:.0f} of {INTERVAL} updates a cell lost; bit-identical")


def state(store):
    """All that a checkpoint holds of every cell: weights, best weights, moments, sums, history."""
    rows = {key: store.load_rows([place]) for key, place in store.progress().items()}
    return {f"{key} {name}": tensor for key, row in rows.items() for name, tensor in row.items()}


def parent_status(folder):
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        named = database.execute("select status from runs where name = 'tiny'").fetchall()
    return named[0][0] if named else None


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_leaves_a_checkpoint_and_a_killed_run(long_study, number, code, group, figure):
    if not ALL and not (group and number == signal.SIGINT):
        pytest.skip("in `make faults`")
    make_database(long_study)
    process = begin(long_study, "vaesweep", "train", "tiny")
    wait_until(lambda: parent_status(long_study) == "RUNNING")
    start = time.monotonic()
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    took = time.monotonic() - start
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == "vaesweep: interrupted; the next run goes on from the checkpoint"
    assert took < 5
    store = CellStore(long_study / ".vaesweep")
    assert store.progress() or list(store)
    assert parent_status(long_study) == "KILLED"
    run(long_study, "vaesweep", "train", "tiny")
    assert parent_status(long_study) == "FINISHED"
    figure(f"exit {code} after {took:.1f} s, run KILLED, then FINISHED")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_command_that_waits_for_a_locked_database(tmp_path, number, code, figure):
    if not ALL and number == signal.SIGINT:
        pytest.skip("in `make faults`")
    folder = write_project(tmp_path / "work")
    run(folder, "vaesweep", "prepare", "tiny")
    run(folder, "vaesweep", "train", "tiny")
    assembled = folder / "runs/tiny/train/about.json"
    before = assembled.stat().st_ino
    with closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        process = begin(folder, "vaesweep", "train", "tiny")
        wait_until(lambda: assembled.stat().st_ino != before)
        time.sleep(2)
        assert process.poll() is None
        start = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate()
        took = time.monotonic() - start
    assert process.returncode == code and took < 5, errors
    figure(f"exit {code} after {took:.1f} s")


def trainers(folder):
    """Ids of the processes of `vaesweep train` that work in a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["cwd"] == str(folder) and words[-2:] == ["train", "tiny"] and "vaesweep" in words[-3]:
            found.append(process.pid)
    return found


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@killed_by
def test_a_killed_dvc_leaves_no_orphan_and_never_two_writers(tmp_path, number, figure):
    folder = write_clone(tmp_path / "clone", LONG)
    first = begin(folder, "dvc", "repro", "train@tiny")
    wait_until(lambda: "training study" in lock_of(folder))
    began = trainers(folder)
    first.send_signal(number)
    first.wait()
    second = begin(folder, "dvc", "repro", "train@tiny")
    time.sleep(1)
    orphans = set(began) & set(trainers(folder))
    writers = 0
    while second.poll() is None:
        writers = max(writers, len(trainers(folder)))
        time.sleep(0.2)
    output = "".join(second.communicate())
    assert second.returncode == 0, output
    assert len(began) == 1 and not orphans and writers <= 1 and not trainers(folder)
    figure(f"{len(orphans)} orphans after 1 s, at most {writers} writer at once; the second run ends well")


def lock_of(folder):
    lock = folder / ".vaesweep" / "lock"
    return lock.read_text() if lock.exists() else ""


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_of_two_runs_at_once_the_second_says_who_holds_the_lock(tmp_path, figure):
    folder = write_clone(tmp_path / "clone", LONG)
    first = begin(folder, "dvc", "repro", "train@tiny")
    time.sleep(3)
    wait_until(lambda: "training study" in lock_of(folder))
    second = ran(folder, "dvc", "repro", "train@tiny")
    output = "".join(first.communicate())
    assert first.returncode == 0, output
    assert second.returncode != 0 and str(first.pid) in second.stderr, second.stdout + second.stderr
    assert "up to date" in run(folder, "dvc", "repro", "train@tiny")
    figure("the second names the process that holds the lock, the first ends well")
