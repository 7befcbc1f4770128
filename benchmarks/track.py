"""What a cell costs in MLflow: milliseconds to publish new cells to a fresh SQLite store, then other metrics, then nothing new.

    python benchmarks/track.py [--cells 100] [--rounds 5]

Importing mlflow and creating the store's tables come once a process and once a store; they are shown apart.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from tabulate import tabulate

from pipeline.records import ParentRecord, RunRecord
from pipeline.tracking import MlflowTracker

CURVES = [f"{split}/{part}" for split in ("train", "validation") for part in ("loss", "reconstruction", "penalty")]
METRICS = ["mse", "elbo", "kl", "reconstruction", "active_units", "knn_accuracy", "gap", "elbow"]
PARENT = ParentRecord("benchmark", "What a cell costs", {"study": "benchmark"})


def make_record(number: int, points: int) -> RunRecord:
    """A cell as `train`, `evaluate` and `prune` leave it."""
    values = np.random.default_rng(number)
    curves = pd.DataFrame({"update": np.arange(1, points + 1) * 25, **{name: values.random(points) for name in CURVES}})
    params = {"arm": "vae", "latent_dim": 8, "beta": 4.0, "log10_beta": 0.60206, "l2": 1e-5, "learning_rate": 1e-3}
    tags = {"study": "benchmark", "cell_id": str(number), "arm": "vae", "data_hash": "0" * 64, "unconverged": "false"}
    return RunRecord(
        key=str(number),
        name=f"vae z8 β=4 λ=1e-05 seed {number}",
        params={**params, "seed": number, "updates": 25 * points},
        tags={**tags, "best": "false"},
        curves=curves,
        metrics={f"test/{name}": values.random() for name in METRICS},
        step=25 * points,
    )


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def published(store: Path, records: list[RunRecord]) -> list[float]:
    """Milliseconds a cell to publish new cells, the same cells with other metrics, and those without a change."""
    tracker = MlflowTracker(f"sqlite:///{store}")
    tracker.publish("benchmark", PARENT, [])
    evaluated = [replace(record, metrics={name: -value for name, value in record.metrics.items()}) for record in records]
    return [
        milliseconds(lambda cells=cells: tracker.publish("benchmark", PARENT, cells)) / len(cells)
        for cells in (records, evaluated, evaluated)
    ]


@click.command(help=__doc__)
@click.option("--cells", default=100, show_default=True)
@click.option("--points", default=40, show_default=True, help="history points a cell, for each of 6 curves")
@click.option("--rounds", default=5, show_default=True)
def main(cells: int, points: int, rounds: int) -> None:
    records = [make_record(number, points) for number in range(cells)]
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        empty = Path(name, "empty.db")
        first = milliseconds(lambda: MlflowTracker(f"sqlite:///{empty}").publish("benchmark", PARENT, []))
        stores = [Path(shutil.copy(empty, f"{number}.db")).resolve() for number in range(rounds)]
        times = zip(*(published(store, records) for store in stores), strict=True)
    names = ("a new cell", "other metrics", "nothing new")
    rows = [(name, statistics.median(ms), min(ms), max(ms)) for name, ms in zip(names, times, strict=True)]
    print(f"{cells} cells, {points} points of {len(CURVES)} curves, {len(METRICS)} metrics; {rounds} rounds")
    print(f"once: {first / 1e3:.1f} s to import mlflow and create the tables\n")
    print(tabulate(rows, ["ms", "median", "least", "most"], tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
