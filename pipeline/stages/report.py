"""Report: every table becomes `reports/report.md` and its figures. From files alone; equal files and packages, equal bytes."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline import artifacts, claims, config, drawing, figures, grid, intervals, ledger, results, search_sections, sections
from pipeline import markdown as md
from pipeline.results import Gallery, SearchResults, StudyResults
from pipeline.searches import load_listed

PACKAGES = (
    "dvc",
    "matplotlib",
    "mlflow",
    "numpy",
    "optuna",
    "pandas",
    "scikit-learn",
    "scipy",
    "seaborn",
    "torch",
    "torchvision",
)
MOST_PROBLEMS = 40
HOW_TO_READ = (
    "**How to read the numbers.** The unit is the seed: `mean ± half-width` and `mean [low, high]` are 95% t intervals over "
    "seeds, rounded to the digits that the interval supports. Arms share initial weights, batches and noise seed by seed, so "
    "differences are paired. Outside the ledger, words such as *beats*, *raises* or *does not differ* are computed too: they "
    "say on which side of zero the interval of the paired difference lies. There nothing corrects for the number of "
    "comparisons: of those where nothing differs, about one in twenty will seem to."
)
WHAT_COUNTS = (
    "A cell is one trained model; parameters are those of a study's largest cell. *Diverged* cells went non-finite and are in "
    "no table of metrics; of *unconverged* ones the validation loss still fell over the last tenth of the budget, by more than "
    "1% of all its rises and falls; *missing* ones are in the grid but not in the tables. They are listed under "
    "[cells to be wary of](#cells-to-be-wary-of). A learning rate that falls to zero flattens that tenth: then it tells that "
    "the budget is spent, not that more updates would change nothing."
)


def run() -> None:
    """Writes the report of all studies and searches in `params.yaml`. Raises ArtifactError where a table is missing."""
    settings = config.load_settings()
    folder = Path(settings.reports)
    studies = [results.load_study(name, folder) for name in settings.studies]
    searches = [results.load_search(name, search, folder) for name, search in load_listed(settings).items()]
    known = config.load_known(settings)
    measured = {of_study.name: of_study.measured if len(of_study.metrics) else None for of_study in studies}
    entries = claims.ledger(known, measured)
    gallery = Gallery(folder, "all")
    parts = [
        _head(studies, searches, ledger.section(entries, _ledger_figure(entries, gallery)) if entries else ""),
        *(sections.study_section(results, _of(entries, results.name), known) for results in studies),
        *(search_sections.section(results) for results in searches),
        ledger.identities_section(gallery),
        *(_problems(studies), _training(studies, gallery), _tracking(studies[0].name), _versions(studies)),
    ]
    text = md.join(*parts) + "\n"
    artifacts.write_bytes(folder / "report.md", text.encode())
    for file in (folder / "figures").glob("*"):
        begun = file.name.startswith(".") and file.suffix == ".tmp"  # by a process that was killed
        if begun or (f"figures/{file.name})" not in text and drawing.is_ours(file)):  # a removed study's
            file.unlink()


def _of(entries: Sequence[claims.Entry], study: str) -> list[claims.Entry]:
    return [entry for entry in entries if entry.study == study and entry.verdict != claims.NOT_RUN]


def _ledger_figure(entries: Sequence[claims.Entry], gallery: Gallery) -> str:
    decided = [entry for entry in entries if not math.isnan(entry.margin.low)]
    if not decided:
        return ""
    columns = ["id", "source", "verdict", "effect", "margin", "low", "high"]
    rows = [
        [e.claim.id, e.claim.source.split(",")[0], e.verdict, intervals.with_bounds(e.effect), *e.margin[:3]] for e in decided
    ]
    caption = (
        "By how much each claim holds in its weakest part, with 95% intervals, each scaled by its interval's far end: to the "
        "right of 0 it holds. Blue is supported, orange contradicted, grey undecided; the numbers are the effects."
    )
    return gallery.show("ledger", figures.ledger(pd.DataFrame(rows, columns=columns)), caption)


# What was run


def _head(studies: Sequence[StudyResults], searches: Sequence[SearchResults], ledger_of_claims: str) -> str:
    header = ["study", "dataset", "cells", "seeds", "updates", "parameters", "diverged", "unconverged", "missing"]
    short = [sentence for results in studies for sentence in sections.headlines(results)]
    short += [sentence for results in searches if (sentence := search_sections.headline(results))]
    return md.join(
        "# vaesweep: what the sweeps show",
        ledger_of_claims,
        "## What was run",
        md.table(header, [_run_row(results) for results in studies]),
        *(search_sections.line(results) for results in searches),
        WHAT_COUNTS,
        HOW_TO_READ,
        "## In short" if short else "",
        md.bullets(short),
    )


def _run_row(results: StudyResults) -> list[str]:
    study, manifest = results.study, results.manifest
    diverged = int((manifest["status"] == "diverged").sum()) if len(manifest) else 0
    unconverged = int(_flags(manifest).sum()) if len(manifest) else 0
    numbers = [study.size, len(study.grid.seed), study.train.updates, results.about["parameters"]]
    names = [f"[`{results.name}`](#{results.name.lower()})", f"`{study.data.name}`"]
    return [*names, *map(md.count, [*numbers, diverged, unconverged, len(_missing(results))])]


# Cells to be wary of


def _problems(studies: Sequence[StudyResults]) -> str:
    rows = [row for results in studies for row in _problem_rows(results)]
    if not rows:
        return md.join("## Cells to be wary of", "No cell diverged, none is unconverged, and none is missing.")
    left = len(rows) - MOST_PROBLEMS
    more = f"… and {left} settings more, in `runs/<study>/train/manifest.csv`." if left > 0 else ""
    header, diverged = ["study", "what", "setting", "seeds", "at update"], any(row[1] == "diverged" for row in rows)
    shown = [row if diverged else row[:-1] for row in [header, *rows[:MOST_PROBLEMS]]]
    return md.join("## Cells to be wary of", md.table(shown[0], shown[1:]), more)


def _problem_rows(results: StudyResults) -> list[list[str]]:
    manifest, rows = results.manifest, []
    if len(manifest):
        rows += _grouped(results, "diverged", manifest[manifest["status"] == "diverged"])
        rows += _grouped(results, "unconverged", manifest[_flags(manifest)])
    return rows + _grouped(results, "missing", pd.DataFrame(_missing(results)))


def _grouped(results: StudyResults, what: str, cells: pd.DataFrame) -> list[list[str]]:
    """One row a setting, with the seeds that it happened to."""
    if cells.empty:
        return []
    varying = [axis for axis in results.axes if len(results.study.axes[axis]) > 1]
    rows = []
    for _, group in cells.groupby(["arm", "beta", *varying], dropna=False, sort=False):
        first = group.iloc[0]
        setting = [
            drawing.arm_label(first["arm"], first["beta"]),
            *(f"{md.words(axis)} {md.value(first[axis])}" for axis in varying),
        ]
        updates = md.values(dict.fromkeys(group["diverged_at"].dropna())) if what == "diverged" else ""
        rows.append([f"`{results.name}`", what, ", ".join(setting), md.values(sorted(group["seed"])), updates or "–"])
    return rows


def _missing(results: StudyResults) -> list[dict[str, Any]]:
    """Cells of the grid that the manifest lacks, or that finished but were not evaluated."""
    manifest, known = results.manifest, set()
    expected = [cell.row() for cell in grid.cells(results.study)]
    if len(manifest):
        evaluated = set(results.metrics["cell_id"]) if len(results.metrics) else set()
        accounted = manifest[(manifest["status"] == "diverged") | manifest["cell_id"].isin(evaluated)]
        known = {_identity(row, expected[0]) for row in accounted.to_dict("records")}
    lost = [row for row in expected if _identity(row, expected[0]) not in known]
    return [{**row, "beta": math.nan if row["beta"] is None else row["beta"]} for row in lost]


def _identity(row: dict[str, Any], columns: dict[str, Any]) -> tuple[Any, ...]:
    return tuple("" if pd.isna(row[column]) else config.exact(row[column]) for column in columns)


def _flags(manifest: pd.DataFrame) -> pd.Series:
    return manifest["unconverged"].fillna(False).astype(bool)


# Training, tracking, versions


def _training(studies: Sequence[StudyResults], gallery: Gallery) -> str:
    header = ["study", "weights evaluated", "taken from updates", "device", "torch", "precision", "engine version"]
    found = [_curves(results) for results in studies if len(results.history) and len(results.manifest)]
    curves = [table for table in found if len(table)]
    caption = (
        "Validation loss: each line is an arm's mean over seeds, with its 95% band, at the first value of every other axis. "
        "The first twentieth of training may lie above the frame, and the loss holds β times the penalty: only lines of one β "
        "compare."
    )
    shown = gallery.show("training", figures.training_curves(pd.concat(curves)), caption) if curves else ""
    return md.join("## Training", md.table(header, [_training_row(results) for results in studies]), shown)


def _training_row(results: StudyResults) -> list[str]:
    about, manifest = results.about, results.manifest
    kept = {"best": "best on validation", "last": "last"}[results.study.train.keep]
    taken = manifest[manifest["status"] == "finished"]["evaluated_update"] if len(manifest) else pd.Series(dtype=float)
    updates = f"{md.value(float(taken.min()))} to {md.value(float(taken.max()))}" if len(taken) else "–"
    return [
        f"`{results.name}`",
        kept,
        updates,
        *(md.escape(about[key]) for key in ("device", "torch", "precision", "engine_version")),
    ]


def _curves(results: StudyResults) -> pd.DataFrame:
    """Validation losses of every arm that reconstructs and β, at the first value of every other axis."""
    cells = results.slice(results.manifest[["cell_id", "arm", "beta", *results.axes, "seed"]])[0]
    cells = cells[cells["arm"].map(lambda arm: config.ARMS[arm].reconstruction_weight > 0)]
    table = (
        results.history[["cell_id", "update", "validation_loss"]].merge(cells, on="cell_id").replace([np.inf, -np.inf], np.nan)
    )
    summary = intervals.summarise(table, ["arm", "beta", "latent_dim", "update"], ["validation_loss"])
    summary["panel"] = [f"{results.name}, {drawing.latents(count)}" for count in summary["latent_dim"]]
    return summary


def _tracking(study: str) -> str:
    return md.join(
        "## The runs in MLflow",
        "`make ui` opens MLflow: a study is an experiment with a parent run, a cell a run below it, with its curves; the best "
        "cells have pictures. A filter for the search box:",
        f"```text\ntags.study = '{study}' and tags.current = 'true' and params.arm = 'vae'\n```",
        "Runs of cells that a study no longer has stay, with `current` at `false`.",
    )


def _versions(studies: Sequence[StudyResults]) -> str:
    versions = [f"Python {platform.python_version()}", *(f"{package} {_version(package)}" for package in PACKAGES)]
    rows = [_data_row(results, dataset) for results in studies for dataset in results.describe["datasets"]]
    header = ["study", "data", "rows: train / validation / test", "SHA-256 (first 16 digits)"]
    return md.join("## Versions and data", f"Written under {', '.join(versions)}.", md.table(header, rows))


def _data_row(results: StudyResults, dataset: dict[str, Any]) -> list[str]:
    point = "".join(f", {md.words(axis)} {md.value(value)}" for axis, value in dataset["point"].items())
    rows = " / ".join(md.count(dataset["rows"][split]) for split in ("train", "validation", "test"))
    return [f"`{results.name}`", f"`{results.describe['name']}`{point}", rows, f"`{dataset['sha256'][:16]}`"]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
