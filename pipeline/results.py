"""What the report reads of each study and search, and where it puts its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from pipeline import artifacts, claims, config, drawing, grid, searches
from pipeline import markdown as md


@dataclass(frozen=True)
class Gallery:
    """Where the report's figures go, and the name that begins those of one study or search."""

    folder: Path
    name: str

    def show(self, kind: str, picture: Figure, caption: str) -> str:
        """Saves a figure, and gives the markdown that shows it."""
        file = f"{self.name}-{kind}.png"
        drawing.save(picture, self.folder / "figures" / file)
        return md.picture(f"figures/{file}", caption)


@dataclass(frozen=True)
class StudyResults:
    """A study and every table that its stages wrote."""

    name: str
    gallery: Gallery
    study: config.Study
    describe: dict[str, Any]
    about: dict[str, Any]
    manifest: pd.DataFrame
    history: pd.DataFrame
    metrics: pd.DataFrame
    noise: pd.DataFrame
    pca: pd.DataFrame
    paired: pd.DataFrame
    pictured: pd.DataFrame
    components: pd.DataFrame
    columns: pd.DataFrame
    ablation: pd.DataFrame
    counts: pd.DataFrame

    @property
    def measured(self) -> claims.Measured:
        """What claims are decided from."""
        converged = self.manifest[["cell_id", "unconverged"]]
        counts = self.counts[["cell_id", *set(self.counts) - set(self.manifest)]].rename(
            columns=lambda name: name if name == "cell_id" else f"prune/{name}"
        )
        cells = self.metrics.merge(counts, on="cell_id", how="left")
        return claims.Measured(cells, self.noise.merge(converged, on="cell_id", how="left"))

    @property
    def axes(self) -> list[str]:
        """Columns that, beside arm and β, tell settings apart."""
        return [*self.study.data.axes, *(axis for axis in grid.AXES if axis != "beta")]

    def slice(self, table: pd.DataFrame, keep: Sequence[str] = ("latent_dim",)) -> tuple[pd.DataFrame, list[str]]:
        """Fixes every axis not in `keep` at its smallest or first value, so that a line is one setting; says what was fixed.

        An axis that an arm lacks is fixed as it is.
        """
        fixed = []
        for axis in self.axes:
            if axis in keep or axis not in table or table[axis].nunique() < 2:
                continue
            known = table[axis].dropna()
            first = known.min() if pd.api.types.is_numeric_dtype(known) else known.iloc[0]
            table = table[table[axis].isna() | (table[axis] == first)]
            fixed.append(f"{md.words(axis)} = {md.value(first)}")
        return table, fixed


@dataclass(frozen=True)
class SearchResults:
    """A search and its tables."""

    name: str
    gallery: Gallery
    search: searches.Search
    about: dict[str, Any]
    trials: pd.DataFrame
    rungs: pd.DataFrame
    importances: pd.DataFrame
    finalists: pd.DataFrame
    winner: pd.DataFrame

    @property
    def own(self) -> pd.DataFrame:
        """The search's own trials, without the grid's cells."""
        return self.trials[self.trials["state"] != "grid"]


def load_study(name: str, reports: Path) -> StudyResults:
    """Reads a study's config and tables; `reports` is the report's folder. Raises ArtifactError where one is missing."""
    folders = artifacts.Folders(name)
    paths = {key: folders.evaluate / f"{key}.csv" for key in ("metrics", "noise", "pca", "paired", "pictured", "components")}
    paths |= {key: folders.prune / f"{key}.csv" for key in ("columns", "ablation")} | {"counts": folders.prune / "summary.csv"}
    paths |= {key: folders.train / f"{key}.csv" for key in ("manifest", "history")}
    return StudyResults(
        name=name,
        gallery=Gallery(reports, name),
        study=config.load_study(name),
        describe=artifacts.read_json(folders.prepared / "describe.json"),
        about=artifacts.read_json(folders.train / "about.json"),
        **{key: artifacts.read_table(path) for key, path in paths.items()},
    )


def reconstructing(table: pd.DataFrame) -> pd.DataFrame:
    """Without arms that are not trained to reconstruct, beside whose errors all others would look alike."""
    return table[table["arm"].map(lambda arm: config.ARMS[arm].reconstruction_weight > 0).astype(bool)] if len(table) else table


def load_search(name: str, search: searches.Search, reports: Path) -> SearchResults:
    """Reads a search's tables. Raises ArtifactError where one is missing."""
    folder = artifacts.Folders(name).search
    tables = ("trials", "rungs", "importances", "finalists", "winner")
    read = {table: artifacts.read_table(folder / f"{table}.csv") for table in tables}
    return SearchResults(name, Gallery(reports, name), search, artifacts.read_json(folder / "about.json"), **read)
