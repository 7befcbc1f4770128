"""`train`: trains every cell that the cell store lacks, and assembles the study's outputs from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import tracking
from pipeline.artifacts import CellStore, Folders, Prepared, link, load_prepared, write_json, write_table
from pipeline.config import Study, load_settings, load_study
from pipeline.devices import find_runtime
from pipeline.executors import Advance, local_executor
from pipeline.grid import ENGINE_VERSION, Cell, Runtime, cells, identify, parameter_count
from pipeline.records import Trained
from pipeline.trainer import unconverged

Show = Callable[[str, Iterable[Advance]], None]
"""Drives training by taking every Advance, and shows it under a name."""


def run(name: str, show: Show, stop: Callable[[], int | None] = lambda: None) -> None:
    """Writes `runs/<name>/train/`. Raises VaesweepError; Interrupted where `stop` answers a signal's number."""
    settings, study = load_settings(), load_study(name)
    data, runtime, store = load_prepared(Folders(name).prepared, study.data), find_runtime(settings), CellStore()
    wanted = identify(cells(study), data.hashes, runtime)
    about = _about(name, study, wanted, data, runtime)

    def trained(keys: Iterable[str]) -> Trained:
        finished = {key: wanted[key] for key in keys}
        return Trained(about, pd.DataFrame(_manifest(finished, data, store)), store.history(finished))

    with store.lock(f"training study {name}"):
        store.remove_leftovers()
        advances = local_executor(store, runtime, settings.stack_size, stop).run(wanted, data)
        with tracking.Background(name, trained) as background:
            show(name, _announced(advances, wanted, store, background.put))
        _assemble(Folders(name).train, trained(wanted), store)
    tracking.publish(studies=[name])


def _announced(
    advances: Iterable[Advance], wanted: Iterable[str], store: CellStore, announce: Callable[[list[str]], None]
) -> Iterator[Advance]:
    """The same advances; cells are announced as soon as the store has them, and at the first advance none."""
    training, done = [key for key in wanted if key not in store], None
    for advance in advances:
        if advance.cells_done != done:
            done, finished = advance.cells_done, [key for key in training if key in store]
            training = [key for key in training if key not in finished]
            announce(finished)
        yield advance


def _about(name: str, study: Study, wanted: Mapping[str, Cell], data: Prepared, runtime: Runtime) -> dict[str, Any]:
    return {
        "study": name,
        "title": study.title,
        "cells": len(wanted),
        "parameters": max(parameter_count(cell.model, data.features, cell.latent_dim) for cell in wanted.values()),
        "device": runtime.device,
        "torch": runtime.torch,
        "precision": runtime.precision,
        "engine_version": ENGINE_VERSION,
        "keep": study.train.keep,
    }


def _manifest(wanted: Mapping[str, Cell], data: Prepared, store: CellStore) -> Iterator[dict]:
    """One row a cell: what was asked for, and how training ended."""
    for key, cell in wanted.items():
        record = store.record(key)
        ended = {
            column: record[column] for column in ("status", "diverged_at", "updates", "evaluated_update", "validation_loss")
        }
        place = {"dataset": cell.dataset, "data_hash": data.hashes[cell.dataset]}
        yield {"cell_id": key, **cell.row(), **place, **ended, "unconverged": unconverged(record)}


def _assemble(folder: Path, trained: Trained, store: CellStore) -> None:
    shutil.rmtree(folder / "weights", ignore_errors=True)
    for row in trained.manifest.to_dict("records"):
        if row["status"] == "finished":
            link(store.weights_path(row["cell_id"]), folder / "weights" / f"{row['cell_id']}.safetensors")
    write_table(folder / "manifest.csv", trained.manifest)
    write_table(folder / "history.csv", trained.history)
    write_json(folder / "about.json", trained.about)
