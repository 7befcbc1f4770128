"""`evaluate`: every finished cell on the test set, clean and corrupted, beside PCA, and pictures of the best cells."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pipeline import drawing, intervals, metrics, pictures, tracking
from pipeline.artifacts import (
    Folders,
    Prepared,
    finished_cells,
    in_order,
    load_prepared,
    read_table,
    trained_stacks,
    write_json,
    write_table,
    write_tensors,
)
from pipeline.config import ARMS, load_settings, load_study
from pipeline.devices import find_runtime, keep_freed_memory
from pipeline.evaluation import COMPONENTS, Measured, Reference, measured, noise_curves, stack_size
from pipeline.grid import AXES, Cell

PICTURED = 1000  # test rows in a scatter
SHOWN_IMAGES = 50
SAMPLES = 64
INTERPOLATED = 8
SHOWN = ["test/reconstruction", "test/mse", "test/kl", "test/active_units", "test/knn_accuracy"]

Rows = list[dict[str, Any]]


def run(name: str) -> None:
    """Writes `runs/<name>/evaluate/`. Raises VaesweepError."""
    study, folder = load_study(name), Folders(name).evaluate
    keep_freed_memory()
    device = find_runtime(load_settings()).device
    data = load_prepared(Folders(name).prepared, study.data).to(device)
    finished = finished_cells(Folders(name), study, data)
    manifest = read_table(Folders(name).train / "manifest.csv")
    best = _best(name, manifest[manifest["status"] == "finished"])
    pictured = _pictured(finished, set(best["cell_id"]), data)
    shutil.rmtree(folder, ignore_errors=True)
    rows: dict[str, Rows] = {"metrics": [], "noise": []}
    references = [Reference(data, index, study.evaluate) for index in range(len(data.points))]
    for trained in trained_stacks(Folders(name), finished, data.features, device, stack_size(data)):
        stack = Measured(trained, references[trained.dataset])
        for table, found in _rows(stack).items():
            rows[table] += found
        _save_shown(name, stack, set(best["cell_id"]), set(pictured["cell_id"]))
    tables = {
        "best": best,
        "pictured": pictured,
        "pca": pd.DataFrame(row for each in references for row in _pca(each, study.grid.latent_dim)),
    }
    tables["components"] = pd.DataFrame(row for each in references for row in _components(each))
    tables |= {table: in_order(found, finished) for table, found in rows.items()}
    tables["metrics"] = tables["metrics"].merge(manifest[["cell_id", "unconverged"]], how="left")
    tables |= _over_seeds(tables["metrics"], tables["noise"], list(study.data.axes))
    for table, content in tables.items():
        write_table(folder / f"{table}.csv", content)
    write_tensors(folder / "codes" / "pca.safetensors", {"codes": _plane(references[0])})
    write_json(Folders(name).metrics, _means(tables["metrics"]), sealed=False)  # DVC alone reads it, and shows all of it
    write_table(Folders(name).rate_distortion, _rate_distortion(tables["metrics"]))
    tracking.publish(studies=[name])


def _best(name: str, finished: pd.DataFrame) -> pd.DataFrame:
    """The best cell on validation of each arm, latent dimension, dataset and noise in training.

    Losses of different noise do not compare. Nor do those of different β, so cells are ranked by reconstruction plus KL,
    whatever their β; an arm without a KL by its reconstruction.
    """
    history = read_table(Folders(name).train / "history.csv").rename(columns={"update": "evaluated_update"})
    kept = finished.merge(history, on=["cell_id", "evaluated_update"])
    has_kl = kept["arm"].map(lambda arm: ARMS[arm].penalty == "kl")
    penalty = kept["validation_penalty"].where(has_kl, 0.0)
    kept = kept.assign(score=kept["validation_reconstruction"] + penalty).sort_values(["score", "cell_id"])
    apart = ["arm", "latent_dim", "dataset", "train_noise"]
    best = kept.groupby(apart).head(1).sort_values(apart)
    return best[["cell_id", "arm", "latent_dim", "dataset", "beta", "l2", "seed", "score"]]


def _pictured(finished: Mapping[str, Cell], best: set[str], data: Prepared) -> pd.DataFrame:
    """Cells whose codes are saved: of images and of data in the plane, the best ones and every setting's first seed."""
    visible = data.features == 2 or data.image_shape
    rows = [{"cell_id": key, **cell.row(), "dataset": cell.dataset} for key, cell in finished.items() if visible]
    if not rows:
        return pd.DataFrame(columns=["cell_id"])
    table = pd.DataFrame(rows)
    return table[table["cell_id"].isin(best) | ~table.sort_values("seed").duplicated(["arm", *AXES, "dataset"])]


def _rows(stack: Measured) -> dict[str, Rows]:
    """Rows of the tables `metrics` and `noise`."""
    places = [{"cell_id": key, **cell.row()} for key, cell in zip(stack.keys, stack.cells, strict=True)]
    found: dict[str, Rows] = {"metrics": _with(places, measured(stack)), "noise": []}
    for kind, level, columns in noise_curves(stack):
        found["noise"] += _with([{**place, "noise": kind, "level": level} for place in places], columns)
    return found


def _with(places: Rows, columns: Mapping[str, list]) -> Rows:
    """Each cell's row, with its values of all columns."""
    return [{**place, **{name: values[row] for name, values in columns.items()}} for row, place in enumerate(places)]


def _pca(reference: Reference, dims: Sequence[int]) -> Iterator[dict[str, Any]]:
    """PCA of every latent dimension: the linear code that autoencoders should beat."""
    for dim in sorted(dims):
        yield from ({**reference.point, "latent_dim": dim, **row} for row in _pca_rows(reference, dim))


def _plane(reference: Reference) -> Float[Tensor, "row 2"]:
    """Test rows on the first two principal components."""
    return torch.from_numpy(reference.pca(2).transform(reference.x["test"][:PICTURED].cpu().numpy())).float()


def _components(reference: Reference) -> Iterator[dict[str, Any]]:
    """Explained variance and test error of PCA, component by component."""
    pca, x = reference.pca(min(COMPONENTS, reference.data.features)), reference.x["test"].cpu()
    scores = torch.from_numpy(pca.transform(x.numpy()))
    left = (x - torch.from_numpy(pca.mean_)).square().mean() - scores.square().mean(dim=0).cumsum(dim=0) / x.shape[1]
    for number, (ratio, mse) in enumerate(zip(pca.explained_variance_ratio_, left.tolist(), strict=True), start=1):
        yield {**reference.point, "components": number, "variance_ratio": float(ratio), "mse": mse}


def _pca_rows(reference: Reference, dim: int) -> Iterator[dict[str, Any]]:
    pca, x = reference.pca(dim), reference.x["test"].cpu()
    levels = [(noise.kind, level) for noise in reference.evaluate.noise for level in noise.levels]
    for kind, level in [(None, 0.0), *levels]:
        noisy = reference.noisy(kind, level, reference.data.unit_range).cpu() if kind else x
        found = metrics.pca_reconstruction(pca, noisy)
        errors = {"mse_clean": (found - x).square().mean().item(), "mse_noisy": (found - noisy).square().mean().item()}
        yield {"noise": kind, "level": level, **errors, **({} if kind else _pca_knn(reference, dim))}


def _pca_knn(reference: Reference, dim: int) -> dict[str, float | None]:
    if reference.labels is None:
        return {"knn_accuracy": None, "raw_knn_accuracy": None}
    pca = reference.pca(dim)
    codes = {split: torch.from_numpy(pca.transform(rows.cpu().numpy())).float() for split, rows in reference.x.items()}
    return {"knn_accuracy": reference.knn_accuracy(codes), "raw_knn_accuracy": reference.raw_knn_accuracy}


def _over_seeds(measured: pd.DataFrame, noise: pd.DataFrame, data_axes: list[str]) -> dict[str, pd.DataFrame]:
    """Means and paired differences from the plain AE, with intervals over seeds."""
    if measured.empty:
        return {"summary": pd.DataFrame(), "paired": pd.DataFrame()}
    names = [column for column in measured.columns if "/" in column]
    summary = intervals.summarise(measured, ["arm", *data_axes, *AXES], names)
    clean = measured.rename(columns={"test/mse": "mse_clean"}).assign(noise="clean", level=0.0)
    columns = ["cell_id", "arm", *data_axes, *AXES, "seed", "noise", "level", "mse_clean"]
    both = pd.concat([table[columns] for table in (clean, noise) if not table.empty], ignore_index=True)
    both = both.merge(measured[["cell_id", "unconverged"]], on="cell_id")
    same = [*data_axes, *(axis for axis in AXES if axis not in ("beta", "anneal")), "noise", "level"]
    return {"summary": summary, "paired": intervals.paired_table(both, same, "mse_clean")}


def _means(measured: pd.DataFrame) -> dict[str, Any]:
    """Means over β, λ and seeds by arm and latent dimension, for `dvc metrics show`."""
    found: dict[str, Any] = {}
    for (arm, dim), rows in measured.groupby(["arm", "latent_dim"]) if len(measured) else ():
        means = rows[SHOWN].astype(float).mean().dropna()
        found.setdefault(arm, {})[f"latent_dim_{dim}"] = {name.split("/")[1]: round(v, 6) for name, v in means.items()}
    return found


def _rate_distortion(measured: pd.DataFrame) -> pd.DataFrame:
    """Cells that have a rate, for `dvc plots show`."""
    if measured.empty:
        return pd.DataFrame(columns=["rate", "distortion"])
    names = {"test/kl": "rate", "test/reconstruction": "distortion"}
    return measured.dropna(subset="test/kl").rename(columns=names)[["rate", "distortion", *AXES, "seed"]]


def _save_shown(name: str, stack: Measured, best: set[str], pictured: set[str]) -> None:
    """Codes and what is decoded of the pictured cells, and pictures of the best ones."""
    rows = [row for row, key in enumerate(stack.keys) if key in pictured]
    shown = _shown(stack) if rows else {}
    for row in rows:
        key, tensors = stack.keys[row], _of_cell(stack, shown, row)
        write_tensors(Folders(name).evaluate / "codes" / f"{key}.safetensors", tensors)
        for picture, figure in _pictures(stack, tensors) if key in best else ():
            drawing.save(figure, Folders(name).evaluate / "pictures" / key / f"{picture}.png")


def _shown(stack: Measured) -> dict[str, Float[Tensor, "stack ..."]]:
    """What the report draws: codes and reconstructions of test rows, samples, interpolations, and the plane of two latents."""
    shown = {"codes": stack.codes["test"][:, :PICTURED], "reconstructions": stack.reconstructions[:, :PICTURED]}
    shown |= {"samples": stack.samples[:, :SAMPLES], "interpolation": stack.paths[:, :INTERPOLATED]}
    if stack.model.lanes == 2:
        grid = torch.from_numpy(pictures.manifold_codes()).to(stack.device)
        shown["manifold"] = stack.decode(stack.from_prior(grid))
    return shown


def _of_cell(stack: Measured, shown: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One cell's part, with the rows that it was given; of images, few, because they are large."""
    dim, few = stack.cells[row].latent_dim, slice(SHOWN_IMAGES if stack.data.image_shape else PICTURED)
    tensors = {name: values[row] for name, values in shown.items() if name != "manifold" or dim == 2}
    tensors |= {
        "codes": tensors["codes"][:, :dim],
        "x": stack.x["test"][few],
        "reconstructions": tensors["reconstructions"][few],
    }
    return tensors | ({"labels": stack.labels["test"][:PICTURED]} if stack.labels else {})


def _pictures(stack: Measured, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Figure]]:
    shape, arrays = stack.data.image_shape, {name: values.cpu().numpy() for name, values in tensors.items()}
    few = slice(20 if shape else None)
    yield "reconstructions", pictures.reconstructions(arrays["x"][few], arrays["reconstructions"][few], shape)
    yield "latent", pictures.latent_scatter(arrays["codes"], arrays.get("labels"), stack.data.class_names)
    if "manifold" in arrays:
        yield "manifold", pictures.manifold(arrays["manifold"], shape)
    yield "samples", pictures.samples(arrays["samples"], shape)
