"""Files that are damaged, foreign or hostile: caught, and never run or silently used."""

import json
import os
import pickle  # noqa: TID251, to make payloads
import random
import re
import struct
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from project import ROOT, outputs, ran, run, run_in_turn, write_project
from scale import ALL, times
from tiny import SEARCH, STUDY, drive

from pipeline import artifacts, drawing
from pipeline.artifacts import ArtifactError, CellStore
from pipeline.config import ConfigError, Study, load_strict
from pipeline.stages import train

AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
READERS = {
    "a.json": (artifacts.read_json, ArtifactError),
    "a.csv": (artifacts.read_table, ArtifactError),
    "a.safetensors": (artifacts.read_tensors, ArtifactError),
    "b.safetensors": (artifacts.read_about, ArtifactError),
    "a.yaml": (lambda path: load_strict(Study, path), ConfigError),
    "a.png": (drawing.is_ours, ()),
}
HEAD = b"IHDR" + struct.pack(">II5B", 20_000, 20_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + HEAD + struct.pack(">I", zlib.crc32(HEAD))
"""A picture that would take more memory than PIL gives it."""


@pytest.fixture
def checkpoint(tmp_path):
    """A store with two states of one stack, the furthest one's file, and its content."""
    store = CellStore(tmp_path)
    for update in (10, 20):
        rows = {"weights": torch.rand(2, 4000), "best_update": torch.tensor([update, update])}
        store.save_checkpoint(["a", "b"], rows, update)
    path = store.progress()["a"].path
    return store, path, path.read_bytes()


def falls_back(store, path):
    """Whether a damaged file is refused, and the state before it found."""
    with pytest.raises(ArtifactError, match=path.name):
        artifacts.read_tensors(path)
    return {place.update for place in store.progress().values()} == {10}


def test_a_checkpoint_truncated_anywhere_is_caught(checkpoint, figure):
    store, path, content = checkpoint
    lengths = [*range(0, len(content), 1000), len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        assert falls_back(store, path), length
    figure(f"{len(lengths)} lengths, all caught; the state before it is used")


def test_a_checkpoint_with_one_bit_flipped_is_caught(checkpoint, figure):
    store, path, content = checkpoint
    places = random.Random(0)
    flips = [(places.randrange(len(content)), places.randrange(8)) for _ in range(100)]
    for byte, bit in [*flips, (0, 0), (8, 1), (len(content) - 1, 7)]:
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :])
        assert falls_back(store, path), (byte, bit)
    figure(f"{len(flips) + 3} bits, all caught; the state before it is used")


def test_weights_truncated_or_flipped_anywhere_are_caught_and_trained_anew(workspace, figure):
    cell_id = next(iter(CellStore()))
    path, shown = CellStore().weights_path(cell_id), Path(f"runs/tiny/train/weights/{cell_id}.safetensors")
    whole, places = path.read_bytes(), random.Random(0)
    bits = [(places.randrange(len(whole)), places.randrange(8)) for _ in range(times(100, 1000))]
    damages = [whole[:length] for length in [*range(0, len(whole), 100), len(whole) - 1]]
    damages += [whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :] for byte, bit in [(0, 0), (8, 1), *bits]]
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        os.utime(path, ns=(number, number))  # writes within one tick of the clock
        with pytest.raises(ArtifactError, match=path.name):
            artifacts.read_tensors(path)
    assert CellStore().forget_damaged([cell_id]) == [cell_id]
    train.run("tiny", drive)
    assert path.read_bytes() == shown.read_bytes() == whole
    figure(f"{len(damages) - len(bits) - 2} lengths and {len(bits) + 2} bits, all caught; trained anew, bit-identical")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_weights_damaged_at_equal_size_and_time_stop_what_reads_them_and_are_trained_anew(make_project, tmp_path, figure):
    folder = make_project(tmp_path / "work")
    run(folder, "vaesweep", "train", "tiny", **AWAY)
    path = sorted((folder / "runs/tiny/train/weights").iterdir())[0]
    whole, before = path.read_bytes(), path.stat()
    with path.open("r+b") as file:  # in the store too, to which it is linked
        file.seek(-9, os.SEEK_END)
        file.write(bytes([whole[-9] ^ 16]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / ".vaesweep/cells" / path.stem / "weights.safetensors").stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    failed = ran(folder, "vaesweep", "evaluate", "tiny", **AWAY)
    assert failed.returncode == 1 and len(failed.stderr.strip().splitlines()) == 1 and path.name in failed.stderr
    output = run(folder, "vaesweep", "train", "tiny", **AWAY)
    assert f"cell {path.stem} was damaged on disk: it is trained anew" in output
    assert path.read_bytes() == whole
    run(folder, "vaesweep", "evaluate", "tiny", **AWAY)
    figure("one line naming the file; trained anew, bit-identical")


PLANTS = """
import json, sys
from pathlib import Path
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pipeline.cli import main

FigureCanvasAgg.draw = FigureCanvasAgg.get_renderer  # empty pictures: they take most of the time, and read nothing

if __name__ == "__main__":
    payload, plan = bytes.fromhex(sys.argv[1]), json.loads(sys.argv[2])
    for names, commands in plan:
        kept = {Path(name): Path(name).read_bytes() for name in names}

        def put(content):
            for path in kept:
                path.parent.mkdir(exist_ok=True)  # a damaged cell goes
                path.unlink(missing_ok=True)  # not what it is linked to
                path.write_bytes(content or kept[path])

        for command in commands:
            put(payload)
            result = CliRunner().invoke(main, command)
            assert result.exception is None or isinstance(result.exception, SystemExit), (names, command, result)
            assert not list(Path().rglob("PWNED")), (names, command)
        put(None)
"""


def _kind(path: Path) -> str:
    """One for all cells, and for all pictures of a folder."""
    return re.sub(r"[^/]+\.png$|[0-9a-f]{16}", "*", path.as_posix())


def _writer(path: Path) -> int:
    """How many stages have run before the first that reads a file, so that none writes it anew before it is read."""
    folders = {"prepared": 1, "train": 2, "evaluate": 3, "prune": 4, "search": 5, "figures": 5}
    return next((folders[part] for part in path.parts[:-1] if part in folders), 0)


def _plants(folder: Path) -> list[list[Path]]:
    """A file of each kind; those of the store together, as all stages read it, and none hides another of the same cell."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".md", ".db")]
    kinds = defaultdict(list)
    for path in files:
        if "lock" not in path.name:
            kinds[_kind(path.relative_to(folder))].append(path)
    of_store, alone = [], []
    for kind, paths in kinds.items():
        if kind.startswith(".vaesweep/"):
            of_store.append(next(path for path in paths if path.parent not in {other.parent for other in of_store}))
        else:
            alone.append([paths[0]])
    return [of_store, *alone]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("PWNED",)


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_weights_that_are_damaged_under_dvc_are_restored_by_the_next_run(make_clone, figure):
    """Also where DVC does not notice, because size and time are as they were."""
    folder = make_clone(STUDY)
    run(folder, "dvc", "repro", "evaluate@tiny", **AWAY)
    whole = outputs(folder)
    path = folder / "runs/tiny/train/weights" / next(name for name in whole if name.startswith("weights/")).split("/")[1]
    path.write_bytes(whole[f"weights/{path.name}"][:-1] + b"x")
    run(folder, "dvc", "repro", "evaluate@tiny", **AWAY)
    assert outputs(folder) == whole
    path.write_bytes(whole[f"weights/{path.name}"][:-1] + b"x")
    done = ran(folder, "vaesweep", "evaluate", "tiny", **AWAY)
    assert done.returncode == 1 and f"{path.relative_to(folder)}: is damaged" in done.stderr and not path.exists()
    run(folder, "dvc", "repro", "evaluate@tiny", **AWAY)
    assert outputs(folder) == whole
    figure("noticed by DVC, or by the stage that reads it; as it was after the next run")


@pytest.mark.skipif(not ALL, reason="in `make faults`")
def test_a_pickle_is_run_nowhere(tmp_path, figure):
    """A payload at every path that any stage reads, anew before each command."""
    folder, payload = write_project(tmp_path / "work"), pickle.dumps(Payload())
    halved = SEARCH.replace("trials: 5\nbatch: 2", "trials: 8\nbatch: 4\nrungs: [0.3]\nhalving: 2")
    (folder / "configs/hunt.yaml").write_text(halved)
    stages = [["prepare", "tiny"], ["train", "tiny"], ["evaluate", "tiny"], ["prune", "tiny"], ["search", "hunt"], ["report"]]
    run_in_turn(folder, stages, **AWAY)
    store = CellStore(folder / ".vaesweep")
    store.save_fit("ab", 2)
    store.save_checkpoint(["cd"], {"w": torch.ones(1, 1)}, 10)
    assert all((store.root / kind).is_dir() for kind in ("checkpoints", "fits", "rungs", "unfinished"))
    plants, commands = _plants(folder), [*stages, ["plan", "tiny"], ["sync"], ["clean", "--dry-run"]]
    plan = [(list(map(str, paths)), commands[_writer(paths[0].relative_to(folder)) :]) for paths in plants]
    run(folder, sys.executable, "-c", PLANTS, payload.hex(), json.dumps(plan), **AWAY)
    figure(f"{sum(map(len, plants))} kinds of files, run in none, a line of error or none at all")


def test_the_linter_refuses_readers_that_can_run_code(tmp_path, figure):
    bans = ["import pickle", "import torch\ntorch.load('x')", "import yaml\nyaml.load('x')", "import numpy\nnumpy.load('x')"]
    bans += ["import pandas\npandas.read_pickle('x')", "import joblib\njoblib.load('x')", "import shelve"]
    for number, text in enumerate(bans):
        path = tmp_path / f"reads_{number}.py"
        path.write_text(text + "\n")
        done = subprocess.run(["ruff", "check", "--config", ROOT / "pyproject.toml", path], capture_output=True, text=True)
        assert done.returncode == 1 and "TID251" in done.stdout, text
    figure(f"{len(bans)} ways to read, all refused")


@pytest.mark.parametrize("name", READERS)
@example(b"[" * 100_000)
@example(b":")
@example(BOMB)
@given(content=st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused_by_our_own_error(tmp_path_factory, name, content):
    read, error = READERS[name]
    path = tmp_path_factory.getbasetemp() / f"{os.getpid()}-{name}"
    path.write_bytes(content)
    try:
        read(path)
    except error as refused:
        assert "\n" not in str(refused) and name in str(refused)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.safetensors"])
@given(st.data())
def test_a_damaged_file_of_ours_is_read_or_refused_by_our_own_error(tmp_path_factory, name, data):
    path = tmp_path_factory.getbasetemp() / f"{os.getpid()}-ours-{name}"
    if path.suffix == ".json":
        artifacts.write_json(path, {"status": "finished", "history": {"update": [1, 2]}})
    elif path.suffix == ".csv":
        artifacts.write_table(path, pd.DataFrame({"cell_id": ["ab", "cd"], "value": [1.5, 2.0]}))
    else:
        artifacts.write_tensors(path, {"w": torch.ones(3)})
    content = path.read_bytes()
    byte, value = data.draw(st.integers(0, len(content) - 1)), data.draw(st.binary(max_size=4))
    before = READERS[name][0](path)
    path.write_bytes(content[:byte] + value + content[byte + data.draw(st.integers(0, 4)) :])
    changed = path.read_bytes() != content
    try:
        after = READERS[name][0](path)
        assert path.suffix != ".json" or after == before, "a change was not noticed"
        assert path.suffix != ".safetensors" or not changed, "a change was not noticed"
    except ArtifactError as refused:
        assert path.name in str(refused)


def test_files_of_a_newer_version_are_refused_by_name(tmp_path, monkeypatch, figure):
    monkeypatch.setattr(artifacts, "FORMAT_VERSION", artifacts.FORMAT_VERSION + 1)
    artifacts.write_json(tmp_path / "a.json", {})
    artifacts.write_table(tmp_path / "a.csv", pd.DataFrame({"cell_id": ["a"]}))
    artifacts.write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    monkeypatch.undo()
    kinds = ("a.json", "a.csv", "a.safetensors")
    for name in kinds:
        with pytest.raises(ArtifactError, match=rf"{name}: has format 2, this version reads format 1"):
            READERS[name][0](tmp_path / name)
    figure(f"{len(kinds)} kinds of files, refused by name and version")
