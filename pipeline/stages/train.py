"""`train`: trains every cell that the cell store lacks, and assembles the study's outputs from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping

import pandas as pd

from pipeline import tracking
from pipeline.artifacts import CellStore, Folders, Prepared, link, load_prepared, write_json, write_table
from pipeline.config import Study, load_settings, load_study
from pipeline.executors import Advance, find_runtime, local_executor
from pipeline.grid import ENGINE_VERSION, Cell, Runtime, cells, identify, parameter_count

Show = Callable[[str, Iterable[Advance]], None]
"""Drives training by taking every Advance, and shows it under a name."""


def run(name: str, show: Show, stop: Callable[[], int | None] = lambda: None) -> None:
    """Writes `runs/<name>/train/`. Raises VaesweepError; Interrupted where `stop` answers a signal's number."""
    settings, study = load_settings(), load_study(name)
    data, runtime, store = load_prepared(Folders(name).prepared, study.data), find_runtime(settings.device), CellStore()
    wanted = identify(cells(study), data.hashes, runtime)
    with store.lock(f"training study {name}"):
        show(name, local_executor(store, runtime.device, settings.stack_size, stop).run(wanted, data))
        _assemble(name, study, wanted, data, runtime, store)
    tracking.publish(studies=[name])


def _assemble(name: str, study: Study, wanted: Mapping[str, Cell], data: Prepared, runtime: Runtime, store: CellStore) -> None:
    folder = Folders(name).train
    shutil.rmtree(folder / "weights", ignore_errors=True)
    for key in wanted:
        if store.record(key)["status"] == "finished":
            link(store.weights_path(key), folder / "weights" / f"{key}.safetensors")
    write_table(folder / "manifest.csv", pd.DataFrame(_manifest(wanted, data, store)))
    write_table(folder / "history.csv", store.history(wanted))
    about = {
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
    write_json(folder / "about.json", about)


def _manifest(wanted: Mapping[str, Cell], data: Prepared, store: CellStore) -> Iterator[dict]:
    """One row a cell: what was asked for, and how training ended."""
    for key, cell in wanted.items():
        record = store.record(key)
        ended = {
            column: record[column] for column in ("status", "diverged_at", "updates", "evaluated_update", "validation_loss")
        }
        place = {"dataset": cell.dataset, "data_hash": data.hashes[cell.dataset]}
        yield {"cell_id": key, **cell.row(), **place, **ended, "unconverged": record["unconverged"]}
