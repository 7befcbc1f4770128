"""What MLflow is to show of a study or a search, made of the files that its stages have left. Knows no MLflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pipeline.artifacts import Folders, in_main_checkout, read_json, read_table, read_tensors
from pipeline.config import CONFIG_FOLDER, About, Model, Scalar, chooses, claims_about, load_study
from pipeline.escaping import escape
from pipeline.model import Autoencoder
from pipeline.searches import load_search

PARENT = "parent"  # key of the parent run
BEST = "best"  # tag, and alias in the registry

Reconstruction = tuple[nn.Module, Tensor]
"""A module from x to its reconstruction at z = μ, made of torch's own modules alone, and an example of x."""


@dataclass(frozen=True)
class RunRecord:
    """What a run shows: one trained cell, or one trial of a search.

    `curves` has a column `update` and one column a curve; `metrics` are final values, which stand at update `step`;
    `artifacts` maps a folder of the run to the local file or folder that is copied into it.
    """

    key: str
    name: str
    params: Mapping[str, Scalar] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    curves: pd.DataFrame | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    model: Callable[[], Reconstruction] | None = None
    registered: str = ""
    """Under which name the model stands in the registry, with the alias `best`; none if empty."""
    status: str = "finished"
    """One of `STATUSES`."""


@dataclass(frozen=True)
class ParentRecord:
    """What the parent run of a study or a search shows. It has no params: those are immutable, and a study's file is not."""

    name: str
    title: str
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    all_given: bool = False
    """Whether the records beside it are all that it has; runs of earlier ones then are no longer `best`, nor of any claim.

    An experiment that DVC runs in a copy shows its runs beside those of the main checkout.
    """
    status: str = "finished"

    def as_run(self) -> RunRecord:
        """The parent as a run like any other."""
        tags = {**self.tags, "mlflow.note.content": escape(self.title)}  # which the UI shows as markdown
        return RunRecord(PARENT, self.name, {}, tags, artifacts=self.artifacts, status=self.status)


@dataclass(frozen=True)
class Trained:
    """What `train` leaves of a study, or of some of its cells: contents of `about.json`, `manifest.csv` and `history.csv`."""

    about: dict[str, Any]
    manifest: pd.DataFrame
    history: pd.DataFrame


# A study


def study_records(
    name: str,
    reconstruction: Callable[[Path, Model], Reconstruction] | None = None,
    trained: Trained | None = None,
    claims: About | None = None,
) -> tuple[ParentRecord, list[RunRecord]]:
    """The runs of a study, from the files that its stages have left so far; with `trained`, those of its cells.

    `claims` are those of `claims_about`, which reads many files. Raises ArtifactError where `train` has not run.
    """
    all_given = trained is None and in_main_checkout()
    trained = trained or _read_trained(Folders(name).train)
    parent = _parent(name, "study", trained.about, Folders(name).evaluate / "summary.csv")
    curves = _curves(trained.history)
    metrics = _metrics(name, trained.manifest)
    claims, records = claims_about(name) if claims is None else claims, []
    build = partial(reconstruction, config=load_study(name).model) if reconstruction else None
    for row in trained.manifest.to_dict("records"):
        named = dict.fromkeys(claim for claim, test, side in claims if chooses(side, row, test.varied))
        record = _cell_record(name, row, curves.get(row["cell_id"]), metrics.get(row["cell_id"], {}), named)
        records.append(_with_pictures(name, record, build))
    return replace(parent, all_given=all_given), records


def _read_trained(folder: Path) -> Trained:
    manifest, history = (read_table(folder / table) for table in ("manifest.csv", "history.csv"))
    return Trained(read_json(folder / "about.json"), manifest, history)


def _parent(name: str, kind: str, about: dict[str, Any], summary: Path) -> ParentRecord:
    shown = {key: value for key, value in about.items() if isinstance(value, Scalar) and key not in ("format", "title")}
    facts = {key: as_text(value) for key, value in shown.items()}
    files = {"config": CONFIG_FOLDER / f"{name}.yaml", "summary": summary}
    return ParentRecord(
        name, about["title"], {**facts, kind: name}, {key: file for key, file in files.items() if file.is_file()}
    )


def _curves(history: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each cell's history; `train_loss` becomes `train/loss`, which the UI shows in a group `train`."""
    if history.empty:
        return {}
    values = history.drop(columns="cell_id").rename(columns=lambda name: name.replace("_", "/", 1)).astype(float)
    return dict(iter(values.groupby(history["cell_id"])))


def _metrics(name: str, manifest: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Final metrics by cell, from the tables that exist; a name without a group is one of `prune`."""
    found: dict[str, dict[str, float]] = {}
    cell_ids = set() if manifest.empty else set(manifest["cell_id"])
    for path in (Folders(name).evaluate / "metrics.csv", Folders(name).prune / "summary.csv"):
        if path.is_file():
            for row in (row for row in read_table(path).to_dict("records") if row["cell_id"] in cell_ids):
                values = {key: value for key, value in row.items() if key not in manifest.columns}
                named = {key if "/" in key else f"prune/{key}": value for key, value in values.items()}
                found.setdefault(row["cell_id"], {}).update(_numbers(named))
    return found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if not pd.isna(value)}


def _cell_record(
    study: str, row: dict[str, Any], curves: pd.DataFrame | None, metrics: dict[str, float], claims: Iterable[str]
) -> RunRecord:
    params = _params({column: value for column, value in row.items() if column not in RESULTS})
    kept = {"evaluated/validation_loss": row["validation_loss"], "evaluated/update": row["evaluated_update"]}
    shown = _tags(row, "cell_id", "arm", "data_hash", "unconverged", "diverged_at")
    return RunRecord(
        key=row["cell_id"],
        name=_name(params),
        params=params,
        tags={"study": study, "claims": _claims_tag(claims), **shown},
        curves=curves,
        metrics={**_numbers(kept), **metrics},
        step=int(row["updates"]),
        status=row["status"],
    )


def _claims_tag(claims: Iterable[str]) -> str:
    """Ids with a blank on either side, so that `tags.claims LIKE '% id %'` finds one, and none of which it is a part."""
    return "".join(f" {claim} " for claim in claims)


RESULTS = ("cell_id", "dataset", "data_hash", "status", "diverged_at", "evaluated_update", "validation_loss", "unconverged")
"""Columns of a manifest that describe what came of a cell; the others say what was asked for."""


def _tags(row: dict[str, Any], *columns: str) -> dict[str, str]:
    return {column: as_text(row[column]) for column in columns if not pd.isna(row[column])}


def _params(row: dict[str, Any]) -> dict[str, Scalar]:
    """What applies to the cell; log10 β too, because the UI's plots have no logarithmic axis."""
    params = {key: value for key, value in row.items() if not pd.isna(value)}
    if params.get("sigma2", "learned") != "learned":
        params["sigma2"] = float(params["sigma2"])  # beside "learned", numbers are read as text
    if params.get("beta", 0) > 0:
        params["log10_beta"] = round(math.log10(params["beta"]), 6)
    return params


USUAL = {"sigma2": 1.0, "learning_rate": 1e-3, "anneal": 0.0, "train_noise": 0.0}


def _name(params: dict[str, Scalar]) -> str:
    """Arm and axes in short; those that few studies vary only where they are not as usual."""
    labels = {"latent_dim": "z", "beta": "β=", "l2": "λ=", "sigma2": "σ²=", "learning_rate": "lr=", "seed": "seed "}
    silent = {"arm", "log10_beta", "updates"} | {key for key, usual in USUAL.items() if params.get(key) == usual}
    words = [f"{labels.get(key, key + '=')}{_short(value)}" for key, value in params.items() if key not in silent]
    return " ".join([str(params["arm"]), *words])


def _short(value: Scalar) -> str:
    """A grid's values in full, a sampler's to three digits."""
    return f"{value:.3g}" if isinstance(value, float) and float(f"{value:.6g}") != value else as_text(value)


def _with_pictures(study: str, record: RunRecord, reconstruction: Callable[[Path], Reconstruction] | None) -> RunRecord:
    """Cells that have pictures are the best ones: they get them, their weights and a model."""
    pictures = Folders(study).evaluate / "pictures" / record.key
    weights = Folders(study).train / "weights" / f"{record.key}.safetensors"
    best = pictures.is_dir() and weights.is_file()
    record = replace(record, tags={**record.tags, "best": as_text(best)})
    if not best:
        return record
    model = partial(reconstruction, weights) if reconstruction else None
    return replace(record, artifacts={"pictures": pictures, "weights": weights}, model=model)


# A search


def search_records(
    name: str, reconstruction: Callable[[Path, Model], Reconstruction] | None = None
) -> tuple[ParentRecord, list[RunRecord]]:
    """The trials of a search, from the files that it has left. Raises ArtifactError where it has not run.

    Cells of the grid, with which it began, have their runs in the experiment of their study.
    """
    folder = Folders(name).search
    trials, about = read_table(folder / "trials.csv"), read_json(folder / "about.json")
    curves = _curves(read_table(folder / "history.csv"))
    own = trials[trials["state"] != "grid"]
    records = [_trial_record(name, row, about, curves.get(row["cell_id"])) for row in own.to_dict("records")]
    if reconstruction:
        search, study = load_search(name)
        model = search.settled(study)[1]
        records = [_with_model(folder, record, partial(reconstruction, config=model)) for record in records]
    parent = _parent(name, "search", about, folder / "trials.csv")
    shown = {**parent.artifacts, "pictures": folder / "pictures"}
    return replace(parent, artifacts=shown, all_given=in_main_checkout()), records


def _trial_record(search: str, row: dict[str, Any], about: dict[str, Any], curves: pd.DataFrame | None) -> RunRecord:
    settings = {name: row[name] for name in about["settings"]}
    shown = _tags(row, "cell_id", "trial", "state", "unconverged", "on_front", "batch", BEST)
    status = "failed" if row["state"] == "failed" else "finished"
    values = {name: row[name] for name in about["objectives"]}
    return RunRecord(
        key=f"{row['cell_id']}-{row['trial']:.0f}",  # two trials may be one cell
        name=f"trial {row['trial']:.0f} " + _name(_params(settings)),
        params=_params({**settings, "seed": about["seed"], "updates": about["updates"]}),
        tags={"search": search, "study": about["study"], "updates_reached": as_text(row["updates"]), **shown},
        curves=curves,
        metrics=_numbers({**values, "search/score": row["score"], "search/final": row.get("final")}),
        step=int(row["updates"]),
        status=status,
    )


def _with_model(folder: Path, record: RunRecord, reconstruction: Callable[[Path], Reconstruction]) -> RunRecord:
    """The winner gets its weights and a model, registered under the search's name."""
    if record.tags[BEST] != "true":
        return record
    weights = folder / "weights" / f"{record.tags['cell_id']}.safetensors"
    return replace(
        record, artifacts={"weights": weights}, model=partial(reconstruction, weights), registered=record.tags["search"]
    )


# Shared parts


def as_text(value: Scalar) -> str:
    """`1`, `1.0` and `1e0` are one value."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def load_reconstruction(weights: Path, config: Model) -> Reconstruction:
    """A trained cell as a module of torch's own parts, and an example of its input. Raises ArtifactError."""
    state = read_tensors(weights)
    features, latent_dim = state[f"decoder.{2 * len(config.hidden)}.weight"].shape[0], state["mean.weight"].shape[0]
    cell = Autoencoder(config, features, latent_dim)
    cell.load_state_dict(state)
    return cell.mean_path(), torch.zeros(2, features)
