"""Commands of the installed program in folders of their own: a folder with a tiny study, or a clone that `dvc` runs in."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tiny import SEARCH, STUDY

ROOT = Path(__file__).parents[1]
TRACKED = ("pipeline", "configs", "dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")


def lasting(updates):
    """The tiny study with another budget, and a history point every 10 updates."""
    return STUDY.replace("updates: 30, history_points: 10", f"updates: {updates}, history_points: {updates // 10}")


LONG = lasting(2000)
GATED = """
import time
from pathlib import Path
from pipeline.trainer import StackTrainer

step = StackTrainer._step


def waiting(trainer, *block):
    while len(list(Path(".vaesweep/cells").glob("*/record.json"))) >= int(Path("gate").read_text() or 0):
        Path("waits").touch()
        time.sleep(0.05)
    return step(trainer, *block)


StackTrainer._step = waiting
if __name__ == "__main__":
    from pipeline.cli import main

    main()
"""
"""`vaesweep`, whose training waits while as many cells are finished as the file `gate` says; then there is a file `waits`."""
IN_TURN = """
import json, sys
from pipeline.cli import main

for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
"""
PARAMS = (
    "{studies: [tiny], searches: {hunt: tiny}, searches_alone: [], reports: reports, scales: {}, "
    "device: cpu, precision: float32}"
)


def environment(**more):
    hidden = ("MLFLOW_", "OPTUNA_", "DVC_", "VAESWEEP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def ran(folder, *command, **more):
    """The process that a command was, at its end."""
    return subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=900)


def run(folder, *command, **more):
    """What a command prints, which must succeed."""
    done = ran(folder, *command, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_in_turn(folder, commands, **more):
    """Runs several commands of `vaesweep` in one process, for the sake of the time that its imports take."""
    run(folder, sys.executable, "-c", IN_TURN, json.dumps(commands), **more)


def begin(folder, *command, **more):
    """Starts a command in a process group of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(**more), start_new_session=True, **pipes)


def begin_gated(folder, gate, *command, **more):
    """Starts a command of `vaesweep` whose training waits once there are so many cells."""
    (folder / "gated.py").write_text(GATED)
    (folder / "gate").write_text(str(gate))
    return begin(folder, sys.executable, "gated.py", *command, **more)


def finished(folder):
    """How many cells a folder's store has."""
    return len(list((folder / ".vaesweep" / "cells").glob("*/record.json")))


def make_database(folder):
    """MLflow's, which takes it seconds."""
    run(
        folder,
        sys.executable,
        "-c",
        "from pipeline.tracking import *; MlflowTracker().publish('x', ParentRecord('x', 'x'), [])",
    )


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def write_project(folder, study=STUDY):
    """A folder in which the commands of the tiny study and its search work."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "tiny.yaml").write_text(study)
    (folder / "configs" / "hunt.yaml").write_text(SEARCH)
    (folder / "params.yaml").write_text(PARAMS)
    return folder


def write_clone(folder, study=STUDY):
    """The whole project, in which `dvc` runs the tiny study and its search."""
    for name in TRACKED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, folder / name)
    (folder / "configs" / "tiny.yaml").write_text(study)
    (folder / "configs" / "hunt.yaml").write_text(SEARCH)
    (folder / "params.yaml").write_text(PARAMS)
    run(folder, "dvc", "config", "--local", "core.no_scm", "true")  # also what a downloaded archive needs
    return folder


def outputs(folder, stage="train"):
    """The files of a stage, by name."""
    made = folder / "runs" / "tiny" / stage
    return {str(path.relative_to(made)): path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()}
