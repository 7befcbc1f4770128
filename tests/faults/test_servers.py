"""A tracking server that is away, stopped or killed, and first starts on a database that nobody has made yet."""

import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from project import LONG, begin, run, wait_until, write_project
from scale import ALL, times

from pipeline.tracking import MlflowTracker, ParentRecord, RunRecord, _mlflow


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


@pytest.mark.skipif(not ALL, reason="in `make faults`")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_server_that_goes_in_mid_run_costs_no_training_and_no_cell(tmp_path, number, figure, monkeypatch):
    """Killed or ended, and started again before training ends; or stopped, so that it takes calls and never answers."""
    monkeypatch.setenv("NO_PROXY", "*")
    folder, port = write_project(tmp_path / "work", LONG.replace("updates: 3000", "updates: 6000")), free_port()
    uri = f"http://127.0.0.1:{port}"
    run(folder, "vaesweep", "prepare", "tiny")
    (tmp_path / "server").mkdir()
    served = server(tmp_path / "server", port)
    training = begin(folder, "vaesweep", "train", "tiny", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    wait_until(lambda: runs_on(uri) or training.poll() is not None)
    os.killpg(served.pid, number)
    if number != signal.SIGSTOP:
        served.communicate()
        served = server(tmp_path / "server", port)
    in_mid_run = training.poll() is None
    wait_until((folder / "runs/tiny/train/about.json").exists, 300)
    trained = time.monotonic()
    _, errors = training.communicate()
    ended_after = time.monotonic() - trained
    assert training.returncode == 0 and in_mid_run and ended_after < 30, errors
    assert len(list((folder / "runs/tiny/train/weights").iterdir())) == 8
    if number == signal.SIGSTOP:
        assert "not in MLflow yet" in errors
        os.killpg(served.pid, signal.SIGCONT)
    for _ in range(2):
        run(folder, "vaesweep", "sync", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    counted, statuses = cells_on(uri)
    stop(served, signal.SIGTERM)
    assert len(counted) == 1 + 8 and set(counted.values()) == {1} and statuses == {"FINISHED"}
    figure(f"training went on, and ended {ended_after:.0f} s after its last file; 8 of 8 cells once on the server after `sync`")


def test_a_server_that_is_away_is_decided_within_seconds_and_training_goes_on(tmp_path, figure):
    folder, uri = write_project(tmp_path / "work"), f"http://127.0.0.1:{free_port()}"
    run(folder, "vaesweep", "prepare", "tiny")
    output = run(folder, "vaesweep", "train", "tiny", MLFLOW_TRACKING_URI=uri, NO_PROXY="*")
    assert output.count("not in MLflow yet") == 1 and "vaesweep sync" in output
    start = time.monotonic()
    with pytest.raises(Exception, match="Connection refused"):
        MlflowTracker(uri).publish("tiny", ParentRecord("tiny", "Tiny"), [])
    took = time.monotonic() - start
    assert took < 5
    figure(f"one line; decided in {took:.1f} s")


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
