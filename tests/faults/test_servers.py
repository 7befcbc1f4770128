"""A tracking server that is away, stopped or killed, and first starts on a database that nobody has made yet."""

import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from project import PARAMS, begin, begin_gated, finished, outputs, run, run_in_turn, wait_until
from scale import ALL, times

from pipeline.records import ParentRecord, RunRecord
from pipeline.tracking import MlflowTracker, _mlflow


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def server(folder, port):
    """A real MLflow server on this machine, once it answers."""
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    process = begin(folder, *command, *stores, MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def answers():
        assert process.poll() is None, process.communicate()
        try:
            return urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
        except (URLError, OSError):
            return False

    wait_until(answers)
    return process


def stop(process, number):
    os.killpg(process.pid, number)
    process.communicate()


def runs_on(uri):
    client = _mlflow().MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def cells_on(uri):
    """How often each cell stands on a server."""
    runs = runs_on(uri)
    return Counter(run.data.tags["run_key"] for run in runs), {run.info.status for run in runs}


ONE_BY_ONE = PARAMS.replace("device: cpu", "device: cpu, stack_size: 1")
"""Cells that end, and are published, one after another."""


def check_synced(folder, uri):
    """A server has each cell once after `sync`, however often."""
    run_in_turn(folder, [["sync"], ["sync"]], MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    counted, statuses = cells_on(uri)
    assert len(counted) == 1 + 8 and set(counted.values()) == {1} and statuses == {"FINISHED"}


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_server_that_goes_in_mid_run_costs_no_training_and_no_cell(
    make_project, trained_outputs, tmp_path, number, figure, monkeypatch
):
    """Killed or ended until a call has failed, and started again before training ends; or stopped, so that it never answers."""
    monkeypatch.setenv("NO_PROXY", "*")
    folder, port = make_project(tmp_path / "work"), free_port()
    (folder / "params.yaml").write_text(ONE_BY_ONE)
    uri, gate = f"http://127.0.0.1:{port}", folder / "gate"
    (tmp_path / "server").mkdir()
    served = server(tmp_path / "server", port)
    training = begin_gated(folder, 3, "train", "tiny", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    wait_until(lambda: len(runs_on(uri)) > 1 or training.poll() is not None)
    os.killpg(served.pid, number)
    gate.write_text("6")
    line = next((line for line in training.stderr if "not in MLflow yet" in line), None)
    if number != signal.SIGSTOP:
        served.communicate()
        served = server(tmp_path / "server", port)
    in_mid_run = training.poll() is None and finished(folder) < 8
    gate.write_text("9")
    wait_until((folder / "runs/tiny/train/about.json").exists)
    last_file = time.monotonic()
    _, errors = training.communicate()
    ended_after = time.monotonic() - last_file
    assert training.returncode == 0 and line and in_mid_run and ended_after < 30, errors
    assert outputs(folder) == trained_outputs
    if number == signal.SIGSTOP:
        os.killpg(served.pid, signal.SIGCONT)
    check_synced(folder, uri)
    stop(served, signal.SIGTERM)
    figure(f"training went on, and ended {ended_after:.0f} s after its last file; 8 of 8 cells once on the server after `sync`")


def test_a_server_that_is_away_is_decided_within_seconds_and_training_goes_on(make_project, tmp_path, figure):
    folder, port = make_project(tmp_path / "work"), free_port()
    uri = f"http://127.0.0.1:{port}"
    output = run(folder, "vaesweep", "train", "tiny", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    assert output.count("not in MLflow yet") == 1 and "vaesweep sync" in output
    start = time.monotonic()
    with pytest.raises(Exception, match="Connection refused"):
        MlflowTracker(uri).publish("tiny", ParentRecord("tiny", "Tiny"), [])
    took = time.monotonic() - start
    assert took < 5
    figure(f"one line; decided in {took:.1f} s")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_a_server_that_was_away_at_the_start_gets_every_cell_once(make_project, tmp_path, figure, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    folder, port = make_project(tmp_path / "work"), free_port()
    uri = f"http://127.0.0.1:{port}"
    whole = shutil.copytree(folder, tmp_path / "whole")
    assert "not in MLflow yet" in run(folder, "vaesweep", "train", "tiny", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    assert "not in MLflow yet" not in run(whole, "vaesweep", "train", "tiny")
    assert outputs(folder) == outputs(whole)
    (tmp_path / "server").mkdir()
    served = server(tmp_path / "server", port)
    check_synced(folder, uri)
    stop(served, signal.SIGTERM)
    figure("trained as with a store that is there; 8 of 8 cells once on the server after `sync`")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@pytest.mark.parametrize(
    ("told", "address"), [([], "127.0.0.1"), (["--host", "127.0.0.2"], "127.0.0.2")], ids=["default", "told"]
)
def test_the_ui_listens_on_this_machine_alone_unless_told_otherwise(tmp_path, told, address, figure):
    port = free_port()
    ui = begin(tmp_path, "vaesweep", "ui", "--port", str(port), *told)

    def listening():
        assert ui.poll() is None, ui.communicate()
        found = set()
        for process in [psutil.Process(ui.pid), *psutil.Process(ui.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                found |= {at.laddr for at in process.net_connections("inet") if at.status == psutil.CONN_LISTEN}
        return found

    try:
        wait_until(listening)
        urlopen(f"http://{address}:{port}/health", timeout=60)
        found = listening()
    finally:
        stop(ui, signal.SIGKILL)
    assert found == {(address, port)}
    figure(f"{address}, and nowhere else")


def publishing(folder, rounds, barrier):
    _mlflow()
    for number in range(rounds):
        uri = f"sqlite:///{folder}/{number}.db"
        barrier.wait()
        MlflowTracker(uri).publish("tiny", ParentRecord("tiny", "Tiny"), [RunRecord("c", "cell")])


def test_first_starts_on_a_fresh_database(tmp_path, monkeypatch, figure):
    rounds = times(1, 20)
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2, timeout=120)
    processes = [context.Process(target=publishing, args=(tmp_path, rounds, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for number in range(rounds):
        assert cells_on(f"sqlite:///{tmp_path}/{number}.db")[0] == {"parent": 1, "c": 1}
    figure(f"{rounds} rounds of two processes, 0 failures")
