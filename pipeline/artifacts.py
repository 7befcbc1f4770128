"""What is on disk: one writer and one reader for each kind of file, every write atomic, and the cell store.

Formats are JSON, CSV, safetensors and PNG; nothing that is read can run code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.config import ConfigError, Data, Study, VaesweepError
from pipeline.datasets import SPLITS, Binarise, Dataset
from pipeline.grid import Cell, Runtime, balanced, cells, data_points, identify
from pipeline.model import StackedAutoencoder

FORMAT_VERSION = 1
CHECKPOINT_VERSION = 3
MAX_HEADER = 100_000_000  # as safetensors has it
WORDS, BLANK = "vaesweep", 64 * "0"
UMASK = os.umask(0o077)
os.umask(UMASK)
TABLE_SEAL = re.compile(rb"(?:^|,)format ([0-9]{1,9}) ([0-9a-f]{64})\r?$")
_intact: dict[Path, tuple[int, int, int]] = {}


class ArtifactError(VaesweepError):
    """A file that cannot be read or written, or that a newer version wrote."""


class MissingError(ArtifactError):
    """A file that is not there."""


class DamagedError(ArtifactError):
    """A file that is not as it was written. The stage that wrote it writes it anew."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: {what}; the stage that wrote it writes it anew")
        self.path = path


class HeldError(ArtifactError):
    """Another process holds what is asked for."""


def main_checkout(here: Path | None = None) -> Path:
    """The folder that owns the cell store and the tracking database.

    `dvc exp run --temp` and `--queue` work in a copy below `.dvc/tmp/exps`; what must outlive it belongs to the original.
    """
    here = (here or Path.cwd()).resolve()
    for parent in (here, *here.parents):
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def in_main_checkout() -> bool:
    """Whether this is no copy that DVC made for an experiment."""
    return main_checkout() == Path.cwd().resolve()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename. Raises ArtifactError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # it is made for this user alone
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _reading(path: Path, *damaged: type[Exception]) -> Iterator[None]:
    """What goes wrong in reading a file as ArtifactErrors; `damaged` are the errors that its content causes."""
    try:
        yield
    except FileNotFoundError:
        raise MissingError(f"{path}: is missing; run the stage that writes it, or `dvc repro`") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
    except damaged as error:
        raise DamagedError(path, f"cannot be read: {error}") from error


def write_json(path: Path, content: Mapping[str, Any], sealed: bool = True) -> None:
    """Writes a JSON object under a format version; `sealed`, with the SHA-256 of its content, which `read_json` asks for."""
    content = json.loads(json.dumps({"format": FORMAT_VERSION, **content}, allow_nan=False))  # as it will be read
    seal = {"sha256": _digest(content)} if sealed else {}
    text = json.dumps({**seal, **content}, indent=2, sort_keys=True)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that `write_json` wrote. Raises ArtifactError, also where a value has changed since."""
    with _reading(path, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    _check_format(path, content)
    if (seal := content.pop("sha256", None)) is None:
        raise _unsealed(path)
    if seal != _digest(content):
        raise _changed(path)
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unsealed(path: Path) -> DamagedError:
    return DamagedError(path, "holds no SHA-256: it is damaged, or of an older version")


def _changed(path: Path) -> DamagedError:
    return DamagedError(path, "is damaged: its SHA-256 is not the one that was written")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a table as CSV; floats keep the digits that tell them apart.

    The name of its last column, which is empty, holds a format version and the file's SHA-256, as `write_tensors` takes it.
    """
    content = table.assign(**{f"format {FORMAT_VERSION} {BLANK}": ""}).to_csv(index=False, lineterminator="\n").encode()
    write_bytes(path, content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1))


def read_table(path: Path) -> pd.DataFrame:
    """Reads a table that `write_table` wrote; `cell_id` stays text. Raises ArtifactError, also where a bit has changed."""
    with _reading(path, ValueError):
        content = path.read_bytes()
    written = TABLE_SEAL.search(content.partition(b"\n")[0])
    _check_format(path, {"format": int(written[1])} if written else None)
    if hashlib.sha256(content.replace(written[2], BLANK.encode(), 1)).hexdigest() != written[2].decode():
        raise _changed(path)
    with _reading(path, ValueError):
        return pd.read_csv(io.BytesIO(content), dtype={"cell_id": str}, float_precision="round_trip").iloc[:, :-1]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: dict[str, Any] | None = None) -> None:
    """Writes named tensors as safetensors; its header holds words about them, a format version and the file's SHA-256.

    The digest is that of the file in which zeros stand in its own place.
    """
    # One entry: safetensors writes several in random order.
    words = {WORDS: json.dumps({"format": FORMAT_VERSION, "sha256": BLANK, **(about or {})}, sort_keys=True)}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, words)
    write_bytes(path, content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1))
    with contextlib.suppress(FileNotFoundError):  # another process has removed it already
        _intact[path] = _stamp(path)


def read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Reads named tensors that `write_tensors` wrote. Raises ArtifactError, also where one bit has changed since."""
    with _opened(path, device) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def read_about(path: Path) -> dict[str, Any]:
    """The words in the header of a file that `write_tensors` wrote. Raises ArtifactError."""
    with _opened(path) as file:
        return _words(file)


@contextlib.contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    with _reading(path, ValueError, RecursionError, SafetensorError):
        check_intact(path)
        with _safe_open(path, device) as file:
            _check_format(path, _words(file))
            yield file


def _safe_open(path: Path, device: str) -> Any:
    """safetensors calls a missing file, as one that another process has just removed, a RuntimeError."""
    try:
        return safe_open(path, "pt", device=device)
    except RuntimeError:
        path.stat()
        raise


def _words(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(WORDS, "{}"))


def _check_format(path: Path, content: Any) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, int):
        raise DamagedError(path, "says no format: it is damaged, or not ours")
    if found != FORMAT_VERSION:
        raise ArtifactError(f"{path}: has format {found!r}, this version reads format {FORMAT_VERSION}")


def check_intact(path: Path) -> None:
    """Whether a file of tensors is the one that was written, bit for bit. Raises ArtifactError, OSError.

    safetensors checks sizes and names only. What this process wrote or has checked before is not read again.
    """
    if _intact.get(path) == (stamp := _stamp(path)):
        return
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(8 + min(length, MAX_HEADER))
        written = re.search(rb"sha256\W{1,9}([0-9a-f]{64})\W", header)
        if not written:
            raise _unsealed(path)
        digest = hashlib.sha256(header[: written.start(1)] + BLANK.encode() + header[written.end(1) :])
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest() != written[1].decode():
        raise _changed(path)
    _intact[path] = stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there yet. Raises ArtifactError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error


def link(source: Path, target: Path) -> None:
    """Puts `source` at `target` too, as a hard link where the file system can, else as a copy. Raises ArtifactError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        write_bytes(target, source.read_bytes())


class Folders:
    """Where a study's files lie, relative to the workspace."""

    def __init__(self, name: str):
        self.prepared = Path("data/prepared") / name
        self.runs = Path("runs") / name
        self.train = self.runs / "train"
        self.evaluate = self.runs / "evaluate"
        self.metrics = self.runs / "metrics.json"  # a file of its own, and so the next one: DVC shows only those
        self.rate_distortion = self.runs / "rate_distortion.csv"
        self.prune = self.runs / "prune"
        self.search = self.runs / "search"


class Progress(NamedTuple):
    """How far a cell's training has come, and the checkpoint and its row that hold the cell's state."""

    cell_id: str
    update: int
    path: Path
    row: int


def _rows(path: Path) -> dict[str, Progress]:
    """What a checkpoint holds; nothing where it is damaged, of an older version, or gone. Raises ArtifactError."""
    try:
        about = read_about(path)
    except (DamagedError, MissingError):
        return {}
    if (version := about.get("checkpoint", 0)) > CHECKPOINT_VERSION:
        raise ArtifactError(f"{path}: is of a newer version: go on with that one, or remove the file to train anew")
    if version < CHECKPOINT_VERSION:
        return {}
    return {key: Progress(key, about["update"], path, row) for row, key in enumerate(about["cell_ids"])}


class CellStore:
    """Finished cells and the checkpoints of unfinished stacks, addressed by content; safe to delete while nothing runs."""

    def __init__(self, root: Path | None = None):
        self.root = root or main_checkout() / ".vaesweep"

    def weights_path(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id / "weights.safetensors"

    def __contains__(self, cell_id: str) -> bool:
        return self._record(cell_id).is_file()

    def __iter__(self) -> Iterator[str]:
        """The ids of all finished cells."""
        return iter(sorted(path.parent.name for path in (self.root / "cells").glob("*/record.json")))

    def save(self, cell_id: str, record: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None) -> None:
        """Keeps a finished cell; a diverged one has no weights. The record comes last, so it marks a whole cell."""
        if weights is not None:
            write_tensors(self.weights_path(cell_id), weights)
        write_json(self._record(cell_id), record)

    def record(self, cell_id: str) -> dict[str, Any]:
        return read_json(self._record(cell_id))

    def _record(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id / "record.json"

    def save_unfinished(self, cell_id: str, record: Mapping[str, Any]) -> None:
        """Keeps how the training of a cell had gone that a search gave up."""
        write_json(self._unfinished(cell_id), record)

    def take_up(self, cell_id: str) -> None:
        """Trains a cell that was given up again: from now on others keep its checkpoints."""
        self._unfinished(cell_id).unlink(missing_ok=True)

    def _unfinished(self, cell_id: str) -> Path:
        return self.root / "unfinished" / f"{cell_id}.json"

    def save_rung(self, cell_id: str, update: int, values: Mapping[str, float | None]) -> None:
        """Keeps what a search measured of a cell that stood at an update, by objective; training goes on from there."""
        write_json(self._rung(cell_id, update), {"values": values})

    def rung(self, cell_id: str, update: int) -> dict[str, float | None]:
        """What was measured at that update; empty where nothing was."""
        return self._note(self._rung(cell_id, update)).get("values", {})

    def _rung(self, cell_id: str, update: int) -> Path:
        return self.root / "rungs" / f"{cell_id}-{update}.json"

    def save_fit(self, kind: str, count: int) -> None:
        """Keeps how many cells of a kind are known to train at once, after more did not fit into memory."""
        write_json(self._fit(kind), {"cells": count})

    def fit(self, kind: str) -> float:
        """How many cells of a kind are known to train at once; infinity where no limit was met."""
        return float(self._note(self._fit(kind)).get("cells", math.inf))

    def _fit(self, kind: str) -> Path:
        return self.root / "fits" / f"{kind}.json"

    def _note(self, path: Path) -> dict[str, Any]:
        """What the store would do without; empty where it is not there, or no longer as it was written."""
        try:
            return read_json(path)
        except (MissingError, DamagedError):
            return {}

    def remove_leftovers(self) -> None:
        """Removes what killed processes had begun to write. Only for who holds the store alone."""
        for path in [*self.root.glob("*/.*"), *self.root.glob("cells/*/.*")]:
            path.unlink(missing_ok=True)

    def remove_traces(self, used: Container[str]) -> None:
        """Forgets given-up cells that are not in use, what was measured of cells on their way, and limits of memory."""
        shutil.rmtree(self.root / "fits", ignore_errors=True)
        for path in [*(self.root / "unfinished").glob("*.json"), *(self.root / "rungs").glob("*.json")]:
            if path.stem.split("-")[0] not in used:
                path.unlink(missing_ok=True)

    def has_history(self, cell_id: str) -> bool:
        """Whether the cell was trained here, to its end or until it was given up."""
        return cell_id in self or self._unfinished(cell_id).is_file()

    def history(self, cell_ids: Iterable[str]) -> pd.DataFrame:
        """The histories of cells, finished or given up, one row a cell and history point; none of a damaged record."""
        found = {key: self._note(self._record(key) if key in self else self._unfinished(key)) for key in cell_ids}
        parts = [pd.DataFrame({"cell_id": key, **record["history"]}) for key, record in found.items() if record]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["cell_id", "update"])

    def forget_damaged(self, cell_ids: Iterable[str]) -> list[str]:
        """Removes those finished cells that are no longer as they were written, so that they are trained anew; their ids.

        Raises ArtifactError where one cannot be read for another reason: a cell that is only out of reach is kept.
        """
        damaged = [cell_id for cell_id in cell_ids if cell_id in self and not self._is_whole(cell_id)]
        for cell_id in damaged:
            self.remove(cell_id)
        return damaged

    def _is_whole(self, cell_id: str) -> bool:
        try:
            if self.record(cell_id).get("status") == "finished":
                read_about(self.weights_path(cell_id))
        except (DamagedError, MissingError):
            return False
        return True

    def size(self, cell_id: str) -> int:
        """Bytes that a cell takes."""
        return sum(path.stat().st_size for path in (self.root / "cells" / cell_id).iterdir())

    def remove(self, cell_id: str) -> None:
        shutil.rmtree(self.root / "cells" / cell_id, ignore_errors=True)

    def save_checkpoint(self, cell_ids: Sequence[str], state: Mapping[str, torch.Tensor], update: int) -> None:
        """Keeps the state of a stack in training, one row a cell. The one before stays, should this one be damaged later."""
        # Another process that trains the same cells, as two equal searches do, writes files of its own.
        name = hashlib.sha256(" ".join([socket.gethostname(), str(os.getpid()), *cell_ids]).encode()).hexdigest()[:16]
        about = {"checkpoint": CHECKPOINT_VERSION, "cell_ids": list(cell_ids), "update": update}
        slots = [self.root / "checkpoints" / f"{name}-{slot}.safetensors" for slot in "ab"]
        write_tensors(
            min(slots, key=lambda path: max((place.update for place in _rows(path).values()), default=-1)), state, about
        )

    def progress(self) -> dict[str, Progress]:
        """Where the state of each cell in training lies: of several checkpoints, in the furthest one."""
        return {key: places[0] for key, places in self._places().items()}

    def _places(self) -> dict[str, list[Progress]]:
        """All states of each cell, the furthest first, in checkpoints that are as they were written."""
        found: dict[str, list[Progress]] = {}
        for path in sorted((self.root / "checkpoints").glob("*.safetensors")):
            for key, place in _rows(path).items():
                found.setdefault(key, []).append(place)
        return {key: sorted(places, key=lambda place: -place.update) for key, places in found.items()}

    def load_rows(
        self, places: Sequence[Progress], device: str = "cpu", names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """The state of a stack, or the `names` of it, whose rows may lie in several checkpoints. Raises ArtifactError."""
        rows = [self._row(place, device, names) for place in places]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, place: Progress, device: str, names: Sequence[str] | None) -> dict[str, torch.Tensor]:
        with _opened(place.path, device) as file:
            about = _words(file)
            if (about["update"], about["cell_ids"][place.row : place.row + 1]) != (place.update, [place.cell_id]):
                raise ArtifactError(f"{place.path}: another process has written it anew meanwhile; start again")
            return {name: file.get_slice(name)[place.row : place.row + 1] for name in names or file.keys()}

    def release(self, keep: Container[str] = (), ended: Container[str] = ()) -> None:
        """Removes the checkpoints that no cell needs: one in training needs the two furthest.

        A cell that the store has, or that has `ended`, is not; one that was given up is only if it is one to `keep`.
        """
        known = list((self.root / "checkpoints").glob("*.safetensors"))  # not those that others write from now on
        training = {
            key: places
            for key, places in self._places().items()
            if key not in self and key not in ended and (key in keep or not self.has_history(key))
        }
        needed = {place.path for places in training.values() for place in places[:2]}
        for path in set(known) - needed:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, purpose: str, *, file: str = "lock", shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Holds the store for one writer, or for one of several that may write the same bytes to the same place.

        Raises HeldError, naming the holder, while another process has it, unless it may `wait`.
        """
        path, others = self.root / file, " and perhaps others" if shared else ""
        with contextlib.ExitStack() as held:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                opened = held.enter_context(path.open("a+b", buffering=0))
                fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
                with contextlib.suppress(OSError):  # a full disk costs the name only
                    opened.truncate(0)
                    opened.write(f"process {os.getpid()} ({purpose}){others}".encode())
            except BlockingIOError:
                opened.seek(0)
                holder = opened.read().decode(errors="replace").strip() or "another process"
                raise HeldError(f"{path}: is held by {holder}; wait for it") from None
            except OSError as error:
                raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error
            yield
            if not shared:
                opened.truncate(0)

    def results_lock(self, search: str, wait: bool) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from what comes of a search. Raises HeldError, as `lock` does."""
        return self.lock(f"results of search {search}", file=f"results-{search}.lock", wait=wait)


@dataclass(frozen=True)
class Prepared:
    """A study's datasets as `prepare` left them; every list has one item a dataset, in the order of `grid.data_points`.

    `x` is float32, images scaled to [0, 1]. `labels` index `class_names`; both are None where the data has none. `hashes` are
    the SHA-256 of the files, `binarise` is that of `datasets.Dataset`, and `description` is all of `describe.json`.
    """

    x: dict[str, list[torch.Tensor]]
    labels: dict[str, list[torch.Tensor]] | None
    hashes: list[str]
    points: list[dict[str, Any]]
    features: int
    image_shape: tuple[int, int] | None
    unit_range: bool
    binarise: Binarise
    class_names: tuple[str, ...] | None
    description: dict[str, Any]

    def to(self, device: str) -> Prepared:
        """The same data with every `x` on a device; labels stay."""
        return replace(self, x={split: [part.to(device) for part in parts] for split, parts in self.x.items()})


def save_prepared(folder: Path, data: Data, datasets: Sequence[Dataset]) -> None:
    """Writes one file a dataset, and their description last. Raises ConfigError if they do not fit one study."""
    widths = sorted({x.shape[1] for dataset in datasets for x in dataset.x.values()})
    if len(widths) > 1:
        raise ConfigError(f"data.axes: all datasets of a study must have the same number of features, but got {widths}")
    for split in ("validation", "test"):
        rows = sorted({len(dataset.x[split]) for dataset in datasets})
        if len(rows) > 1:
            raise ConfigError(f"data.axes: all datasets of a study must have the same number of {split} rows, but got {rows}")
    if len(kinds := sorted({dataset.binarise for dataset in datasets})) > 1:
        raise ConfigError(f"data.axes: all datasets of a study must be binarised in the same way, but got {kinds}")
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    described = [
        _save_dataset(folder / f"{index}.safetensors", point, dataset)
        for index, (point, dataset) in enumerate(zip(data_points(data), datasets, strict=True))
    ]
    first = datasets[0]
    shared = {"image_shape": first.image_shape, "unit_range": first.unit_range, "labels": first.class_names}
    shared["binarise"] = first.binarise
    content = {"name": data.name, "options": data.options, "features": widths[0], **shared, "datasets": described}
    write_json(folder / "describe.json", content)


def _save_dataset(path: Path, point: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    arrays = {f"{split}/x": x for split, x in dataset.x.items()}
    arrays |= {f"{split}/labels": labels for split, labels in (dataset.labels or {}).items()}
    write_tensors(path, {name: torch.tensor(array) for name, array in arrays.items()})
    rows = {split: len(x) for split, x in dataset.x.items()}
    return {"point": dict(point), "file": path.name, "sha256": sha256(path), "rows": rows}


def load_prepared(folder: Path, data: Data | None = None) -> Prepared:
    """Reads what `save_prepared` wrote, each file checked against its SHA-256; with `data`, only if that is what it wrote.

    Raises ArtifactError.
    """
    description = read_json(folder / "describe.json")
    points = [entry["point"] for entry in description["datasets"]]
    if data and (data.name, data.options, data_points(data)) != (description["name"], description["options"], points):
        raise ArtifactError(f"{folder}: holds another `data:` section's data; run `vaesweep prepare {folder.name}`")
    described = description["datasets"]
    tensors = [_verified_tensors(folder / entry["file"], entry["sha256"]) for entry in described]
    labelled, shape = description["labels"] is not None, description["image_shape"]
    return Prepared(
        x={split: [_as_float(part[f"{split}/x"]) for part in tensors] for split in SPLITS},
        labels={split: [part[f"{split}/labels"] for part in tensors] for split in SPLITS} if labelled else None,
        hashes=[entry["sha256"] for entry in described],
        points=[entry["point"] for entry in described],
        features=description["features"],
        image_shape=(shape[0], shape[1]) if shape else None,
        unit_range=description["unit_range"],
        binarise=description["binarise"],
        class_names=tuple(description["labels"]) if labelled else None,
        description=description,
    )


def _verified_tensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    tensors = read_tensors(path)
    if (found := sha256(path)) != expected:
        raise ArtifactError(f"{path}: its SHA-256 must be {expected}, but got {found}; run `vaesweep prepare` again")
    return tensors


def _as_float(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def in_order(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Cell]) -> pd.DataFrame:
    """Rows about cells as a table, in the order of the study's cells."""
    if not rows:
        return pd.DataFrame(columns=["cell_id"])
    rank = {key: position for position, key in enumerate(wanted)}
    return pd.DataFrame(sorted(rows, key=lambda row: rank[row["cell_id"]]))


class TrainedStack(NamedTuple):
    """Finished cells of one dataset and one number of lanes, with the weights that `train` kept."""

    keys: list[str]
    model: StackedAutoencoder
    dataset: int


def finished_cells(folders: Folders, study: Study, data: Prepared) -> dict[str, Cell]:
    """The study's cells that `train` has finished, by id. Raises ArtifactError where it trained other ones."""
    manifest, about = read_table(folders.train / "manifest.csv"), read_json(folders.train / "about.json")
    runtime = Runtime(device=about["device"], torch=about["torch"], precision=about["precision"])
    wanted = identify(cells(study), data.hashes, runtime)
    if list(manifest["cell_id"]) != list(wanted):
        raise ArtifactError(f"{folders.train}: holds other cells than the study has here; run `vaesweep train` again")
    return {key: wanted[key] for key in manifest.loc[manifest["status"] == "finished", "cell_id"]}


def trained_stacks(
    folders: Folders, finished: Mapping[str, Cell], features: int, device: str, size: int = 32
) -> Iterator[TrainedStack]:
    """Finished cells in stacks of at most `size`. Raises ArtifactError."""

    for part in _alike(finished, size):
        model = StackedAutoencoder([finished[key] for key in part], features, device)
        for row, key in enumerate(part):
            model.load_cell(row, read_tensors(folders.train / "weights" / f"{key}.safetensors", device))
        yield TrainedStack(part, model, finished[part[0]].dataset)


def _alike(wanted: Mapping[str, Cell], size: int) -> Iterator[list[str]]:
    """Cells of equal dataset and lanes, in parts of at most `size`."""

    def group(key: str) -> tuple[int, int]:
        return wanted[key].dataset, wanted[key].lanes

    for _, keys in itertools.groupby(sorted(wanted, key=group), key=group):
        yield from balanced(list(keys), size)


def kept_stacks(
    store: CellStore, wanted: Mapping[str, Cell], features: int, device: str, size: int = 32
) -> Iterator[TrainedStack]:
    """The weights that cells have kept so far, finished or in training, in stacks of two to `size`.

    A lone cell stands beside itself, as in training. Raises ArtifactError.
    """
    progress = store.progress()
    for part in _alike(wanted, size):
        keys = part * 2 if len(part) == 1 else part
        model = StackedAutoencoder([wanted[key] for key in keys], features, device)
        for row, key in enumerate(keys):
            if key in store:
                model.load_cell(row, read_tensors(store.weights_path(key), device))
            else:
                kept = store.load_rows([progress[key]], device, ("best_weights", "best_biases"))
                model.weights.value[row], model.biases.value[row] = kept["best_weights"][0], kept["best_biases"][0]
        yield TrainedStack(keys, model, wanted[keys[0]].dataset)
