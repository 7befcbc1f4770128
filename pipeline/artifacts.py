"""What is on disk: one writer and one reader for each kind of file, every write atomic, and the cell store.

Formats are JSON, CSV, safetensors and PNG; nothing that is read can run code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipeline.config import VaesweepError

FORMAT_VERSION = 1


class ArtifactError(VaesweepError):
    """A file that cannot be read or written, or that a newer version wrote."""


def main_checkout(here: Path | None = None) -> Path:
    """The folder that owns the cell store and the tracking database.

    `dvc exp run --temp` and `--queue` work in a copy below `.dvc/tmp/exps`; what must outlive it belongs to the original.
    """
    here = (here or Path.cwd()).resolve()
    for parent in (here, *here.parents):
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing: temporary file, fsync, rename. Raises ArtifactError."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object under a format version."""
    text = json.dumps({"format": FORMAT_VERSION, **content}, indent=2, sort_keys=True, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that `write_json` wrote. Raises ArtifactError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: is missing; run the stage that writes it, or `dvc repro`") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
        found = content.get("format") if isinstance(content, dict) else None
        raise ArtifactError(f"{path}: has format {found!r}, this version reads format {FORMAT_VERSION}")
    return content


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Writes a table as CSV; floats keep the digits that tell them apart."""
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_table(path: Path) -> pd.DataFrame:
    """Reads a table that `write_table` wrote; `cell_id` stays text. Raises ArtifactError."""
    try:
        return pd.read_csv(path, dtype={"cell_id": str}, float_precision="round_trip")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: is missing; run the stage that writes it, or `dvc repro`") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes named tensors as safetensors."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Reads named tensors that `write_tensors` wrote. Raises ArtifactError."""
    try:
        return load_file(path, device=device)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: is missing; run the stage that writes it, or `dvc repro`") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(source: Path, target: Path) -> None:
    """Puts `source` at `target` too, as a hard link where the file system can, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Folders:
    """Where a study's files lie, relative to the workspace."""

    def __init__(self, name: str):
        self.prepared = Path("data/prepared") / name
        self.train = Path("runs") / name / "train"
        self.evaluate = Path("runs") / name / "evaluate"
        self.prune = Path("runs") / name / "prune"
        self.search = Path("runs") / name / "search"


class CellStore:
    """Finished cells and the checkpoints of unfinished stacks, addressed by content; safe to delete at any time."""

    def __init__(self, root: Path | None = None):
        self.root = root or main_checkout() / ".vaesweep"

    def weights_path(self, cell_id: str) -> Path:
        return self.root / "cells" / cell_id / "weights.safetensors"

    def __contains__(self, cell_id: str) -> bool:
        return (self.root / "cells" / cell_id / "record.json").is_file()

    def __iter__(self) -> Iterator[str]:
        """The ids of all finished cells."""
        return iter(sorted(path.parent.name for path in (self.root / "cells").glob("*/record.json")))

    def save(self, cell_id: str, record: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None) -> None:
        """Keeps a finished cell; a diverged one has no weights. The record comes last, so it marks a whole cell."""
        if weights is not None:
            write_tensors(self.weights_path(cell_id), weights)
        write_json(self.root / "cells" / cell_id / "record.json", record)

    def record(self, cell_id: str) -> dict[str, Any]:
        return read_json(self.root / "cells" / cell_id / "record.json")

    def remove(self, cell_id: str) -> None:
        shutil.rmtree(self.root / "cells" / cell_id, ignore_errors=True)

    def save_checkpoint(self, cell_ids: list[str], state: Mapping[str, torch.Tensor]) -> None:
        """Keeps the state of a stack in training, over the one before."""
        path = self._checkpoint(cell_ids)
        write_tensors(path.with_suffix(".safetensors"), state)
        write_json(path.with_suffix(".json"), {"cell_ids": cell_ids})

    def checkpoints(self) -> Iterator[list[str]]:
        """The cells of each stack that has a checkpoint."""
        for path in sorted((self.root / "checkpoints").glob("*.json")):
            with contextlib.suppress(ArtifactError):
                yield read_json(path)["cell_ids"]

    def load_checkpoint(self, cell_ids: list[str], device: str = "cpu") -> dict[str, torch.Tensor] | None:
        path = self._checkpoint(cell_ids).with_suffix(".safetensors")
        return read_tensors(path, device) if path.is_file() else None

    def remove_checkpoint(self, cell_ids: list[str]) -> None:
        for suffix in (".json", ".safetensors"):
            self._checkpoint(cell_ids).with_suffix(suffix).unlink(missing_ok=True)

    def _checkpoint(self, cell_ids: list[str]) -> Path:
        return self.root / "checkpoints" / hashlib.sha256(" ".join(cell_ids).encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def lock(self, purpose: str) -> Iterator[None]:
        """Holds the store for one writer. Raises ArtifactError, naming the holder, while another process has it."""
        path = self.root / "lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ArtifactError(f"{path}: is held by {file.read().strip() or 'another process'}; wait for it") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} ({purpose})")
            file.flush()
            yield
            file.truncate(0)
