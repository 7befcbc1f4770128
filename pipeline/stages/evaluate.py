"""`evaluate`: every finished cell on the test set, clean and corrupted, beside PCA, and pictures of the best cells."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from pipeline import figures, intervals, metrics, tracking
from pipeline.artifacts import (
    Folders,
    Prepared,
    TrainedStack,
    finished_cells,
    load_prepared,
    read_table,
    trained_stacks,
    write_json,
    write_table,
    write_tensors,
)
from pipeline.config import ARMS, Study, load_settings, load_study
from pipeline.datasets import corrupt
from pipeline.executors import find_runtime
from pipeline.grid import AXES, Cell
from pipeline.model import StackedAutoencoder
from pipeline.objective import Objective, kl_per_latent
from pipeline.randomness import Stream, normals

ROWS = 512  # rows that pass through a stack at a time
EVALUATION_STEP = 4  # validation during training draws its ε at step 0
IMPORTANCE_STEP = 16
PICTURED = 1000  # test rows in a scatter
SAMPLES = 64
SHOWN = ["test/reconstruction", "test/mse", "test/kl", "test/active_units", "test/knn_accuracy"]

Rows = list[dict[str, Any]]


def run(name: str) -> None:
    """Writes `runs/<name>/evaluate/`. Raises VaesweepError."""
    study, folder = load_study(name), Folders(name).evaluate
    device = find_runtime(load_settings()).device
    data = load_prepared(Folders(name).prepared, study.data).to(device)
    finished = finished_cells(Folders(name), study, data)
    manifest = read_table(Folders(name).train / "manifest.csv")
    best = _best(name, manifest[manifest["status"] == "finished"])
    shutil.rmtree(folder, ignore_errors=True)
    rows: dict[str, Rows] = {"metrics": [], "latents": [], "noise": []}
    for trained in trained_stacks(Folders(name), finished, data.features, device):
        stack = _with_codes(trained, data)
        for table, found in _measure(stack, study).items():
            rows[table] += found
        _save_best(name, stack, set(best["cell_id"]))
    tables = {"best": best, "pca": pd.DataFrame(_pca(data, study))}
    tables |= {table: _in_order(found, finished) for table, found in rows.items()}
    tables["metrics"] = tables["metrics"].merge(manifest[["cell_id", "unconverged"]], how="left")
    tables |= _over_seeds(tables["metrics"], tables["noise"], list(study.data.axes))
    for table, content in tables.items():
        write_table(folder / f"{table}.csv", content)
    write_json(Folders(name).metrics, _means(tables["metrics"]))
    write_table(Folders(name).rate_distortion, _rate_distortion(tables["metrics"]))
    tracking.publish(studies=[name])


def _best(name: str, finished: pd.DataFrame) -> pd.DataFrame:
    """The best cell on validation of each arm, latent dimension and dataset.

    Losses of different β do not compare, so cells are ranked by reconstruction plus KL, whatever their β; an arm without a
    KL by its reconstruction.
    """
    history = read_table(Folders(name).train / "history.csv").rename(columns={"update": "evaluated_update"})
    kept = finished.merge(history, on=["cell_id", "evaluated_update"])
    has_kl = kept["arm"].map(lambda arm: ARMS[arm].penalty == "kl")
    penalty = kept["validation_penalty"].where(has_kl, 0.0)
    kept = kept.assign(score=kept["validation_reconstruction"] + penalty).sort_values(["score", "cell_id"])
    best = kept.groupby(["arm", "latent_dim", "dataset"]).head(1).sort_values(["arm", "latent_dim", "dataset"])
    return best[["cell_id", "arm", "latent_dim", "dataset", "beta", "l2", "seed", "score"]]


class Measured(NamedTuple):
    """A stack of cells that saw one dataset, with that data and q(z|x) of its rows: means, and log-variances of test rows."""

    keys: list[str]
    model: StackedAutoencoder
    objective: Objective
    data: Prepared
    x: dict[str, Float[Tensor, "_ feature"]]
    labels: dict[str, Tensor] | None
    codes: dict[str, Float[Tensor, "stack _ lane"]]
    log_variance: Float[Tensor, "stack row lane"]


def _with_codes(stack: TrainedStack, data: Prepared) -> Measured:
    x = {split: data.x[split][stack.dataset] for split in ("train", "test")}
    labels = {split: data.labels[split][stack.dataset] for split in x} if data.labels else None
    codes = {split: _posterior(stack.model, rows) for split, rows in x.items()}
    means, log_variance = {split: mu for split, (mu, _) in codes.items()}, codes["test"][1]
    objective = Objective(stack.model.cells, stack.model.mask.device)
    return Measured(stack.keys, stack.model, objective, data, x, labels, means, log_variance)


@torch.no_grad()
def _posterior(model: StackedAutoencoder, x: Float[Tensor, "row feature"]) -> tuple[Tensor, Tensor]:
    """Means and log-variances of q(z|x) as the encoders give them, [stack, row, lane]."""
    parts = [model.encode(rows.expand(len(model.cells), -1, -1)) for rows in x.split(ROWS)]
    mu, log_variance = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return mu, log_variance


def _measure(stack: Measured, study: Study) -> dict[str, Rows]:
    """Rows of the tables `metrics`, `latents` and `noise`."""
    likelihood, bound = _likelihood_terms(stack), _importance_weighted_bound(stack, study.evaluate.importance_samples)
    variance = metrics.mean_variance(stack.codes["test"], [cell.arm.samples for cell in stack.model.cells])
    clean = {split: _errors(stack, stack.codes[split], x)[0] for split, x in stack.x.items()}
    units = metrics.active_units(variance, study.evaluate.active_threshold)
    found: dict[str, Rows] = {"metrics": [], "latents": [], "noise": []}
    for row, cell in enumerate(stack.model.cells):
        measured = {
            **_nats(stack.model, cell, likelihood, row),
            "test/iw_bound": bound[row].item() if cell.arm.variational and bound is not None else None,
            "test/mse": clean["test"][row].item(),
            "test/active_units": int(units[row]),
            "test/knn_accuracy": _knn(stack, row, study.evaluate.neighbours),
            "gap/mse": (clean["test"][row] - clean["train"][row]).item(),
        }
        found["metrics"].append({"cell_id": stack.keys[row], **cell.row(), **measured})
        for latent in range(cell.latent_dim):
            kl = likelihood["kl"][row, latent].item() if cell.arm.samples else None
            values = {"kl": kl, "mean_variance": variance[row, latent].item()}
            found["latents"].append({"cell_id": stack.keys[row], **cell.row(), "latent": latent, **values})
    found["noise"] += _noise(stack, study)
    return found


@torch.no_grad()
def _likelihood_terms(stack: Measured) -> dict[str, Tensor]:
    """Means over the test set: reconstruction [stack] in nats at sampled z where the arm samples, KL [stack, lane]."""
    mu, log_variance = stack.objective.posterior(stack.codes["test"], stack.log_variance)
    z = stack.objective.sample(mu, log_variance, _epsilon(stack.model, mu.shape[1], EVALUATION_STEP)[:, 0])
    return {"reconstruction": _nll(stack, z).mean(dim=1), "kl": kl_per_latent(mu, log_variance).mean(dim=1)}


@torch.no_grad()
def _nll(stack: Measured, z: Float[Tensor, "stack row lane"]) -> Float[Tensor, "stack row"]:
    """−log p(x|z) of every test row."""
    found = []
    for part, rows in zip(z.split(ROWS, dim=1), stack.x["test"].split(ROWS), strict=True):
        target = rows.expand(len(z), -1, -1)
        found.append(stack.objective.reconstruction(stack.model.decode(part), target, stack.model.log_sigma2))
    return torch.cat(found, dim=1)


def _epsilon(model: StackedAutoencoder, rows: int, step: int) -> Float[Tensor, "stack draw row lane"]:
    """Four draws of ε for each row, by each cell's seed."""
    seeds, index = torch.tensor([cell.seed for cell in model.cells], device=model.mask.device).unique(return_inverse=True)
    return normals(seeds, Stream.EVALUATION, step, 4, rows, model.lanes)[index] * model.mask[:, None]


@torch.no_grad()
def _importance_weighted_bound(stack: Measured, draws: int) -> Float[Tensor, " stack"] | None:
    """Mean over the test set, in nats; None where p(x|z) is no normalised likelihood, or no arm has a q(z|x) that bounds it."""
    cells = stack.model.cells
    if stack.model.config.likelihood == "bernoulli" or not any(cell.arm.variational for cell in cells):
        return None
    mu, log_variance = stack.objective.posterior(stack.codes["test"], stack.log_variance)
    log_sums = torch.full(mu.shape[:2], -torch.inf, device=mu.device)
    for first in range(0, draws, 4):
        for epsilon in _epsilon(stack.model, mu.shape[1], IMPORTANCE_STEP + first)[:, : draws - first].unbind(dim=1):
            z = stack.objective.sample(mu, log_variance, epsilon)
            weight = metrics.log_importance_weight(_nll(stack, z), z, epsilon, log_variance)
            log_sums = torch.logaddexp(log_sums, weight)
    return log_sums.mean(dim=1) - math.log(draws)


def _nats(model: StackedAutoencoder, cell: Cell, likelihood: dict[str, Tensor], row: int) -> dict[str, float | None]:
    """Reconstruction, KL and their sum as a bound. A grey pixel's cross-entropy is no likelihood, so its sum is no ELBO."""
    reconstruction, kl = likelihood["reconstruction"][row].item(), likelihood["kl"][row].sum().item()
    variational = cell.arm.variational
    bound = "test/bce_elbo" if model.config.likelihood == "bernoulli" else "test/elbo"
    return {
        "test/reconstruction": reconstruction,
        "test/kl": kl if variational else None,
        bound: -(reconstruction + kl) if variational else None,
    }


@torch.no_grad()
def _errors(stack: Measured, codes: Float[Tensor, "stack row lane"], *targets: Tensor) -> list[Float[Tensor, " stack"]]:
    """Mean squared errors per dimension of the reconstruction of `codes` against each target."""
    totals = [0.0] * len(targets)
    for part, *rows in zip(codes.split(ROWS, dim=1), *(target.split(ROWS) for target in targets), strict=True):
        output = stack.model.reconstruct(part)
        totals = [total + metrics.squared_error(output, x).sum(dim=1) for total, x in zip(totals, rows, strict=True)]
    return [total / codes.shape[1] for total in totals]


def _knn(stack: Measured, row: int, neighbours: int) -> float | None:
    if stack.labels is None:
        return None
    train, test = (stack.codes[split][row, :, : stack.model.cells[row].latent_dim].cpu() for split in ("train", "test"))
    return metrics.knn_accuracy(train, stack.labels["train"], test, stack.labels["test"], neighbours)


def _noise(stack: Measured, study: Study) -> Iterator[dict[str, Any]]:
    """Reconstruction of corrupted test inputs: error against the clean image and against the corrupted one."""
    x = stack.x["test"]
    for kind, level in _noise_levels(study):
        noisy = _corrupted(x, kind, level, stack.data.unit_range)
        codes, _ = _posterior(stack.model, noisy)
        errors = [error.tolist() for error in _errors(stack, codes, x, noisy)]
        for row, (clean, dirty) in enumerate(zip(*errors, strict=True)):
            place = {"cell_id": stack.keys[row], **stack.model.cells[row].row(), "noise": kind, "level": level}
            yield {**place, "mse_clean": clean, "mse_noisy": dirty}


def _noise_levels(study: Study) -> list[tuple[str, float]]:
    return [(noise.kind, level) for noise in study.evaluate.noise for level in noise.levels]


@cache
def _corrupted(x: Tensor, kind: str, level: float, clip: bool) -> Tensor:
    return corrupt(x, kind, level, seed=0, clip=clip)


def _pca(data: Prepared, study: Study) -> Iterator[dict[str, Any]]:
    """PCA of every dataset and latent dimension: the linear code that autoencoders should beat."""
    for index, point in enumerate(data.points):
        x = {split: data.x[split][index].cpu() for split in ("train", "test")}
        labels = {split: data.labels[split][index] for split in x} if data.labels else None
        for dim in sorted(set(study.grid.latent_dim)):
            yield from ({**point, "latent_dim": dim, **row} for row in _pca_rows(x, labels, dim, study, data.unit_range))


def _pca_rows(x: dict[str, Tensor], labels: dict[str, Tensor] | None, dim: int, study: Study, clip: bool) -> Iterator[dict]:
    pca = metrics.fit_pca(x["train"], dim)
    for kind, level in [(None, 0.0), *_noise_levels(study)]:
        noisy = _corrupted(x["test"], kind, level, clip) if kind else x["test"]
        found = metrics.pca_reconstruction(pca, noisy)
        errors = {"mse_clean": (found - x["test"]).square().mean().item(), "mse_noisy": (found - noisy).square().mean().item()}
        yield {"noise": kind, "level": level, **errors, **({} if kind else _pca_knn(pca, x, labels, study.evaluate.neighbours))}


def _pca_knn(pca: Any, x: dict[str, Tensor], labels: dict[str, Tensor] | None, neighbours: int) -> dict[str, float | None]:
    if labels is None:
        return {"knn_accuracy": None, "raw_knn_accuracy": None}
    codes = {split: torch.from_numpy(pca.transform(rows.numpy())).float() for split, rows in x.items()}
    accuracy = {"knn_accuracy": codes, "raw_knn_accuracy": x}
    return {
        name: metrics.knn_accuracy(rows["train"], labels["train"], rows["test"], labels["test"], neighbours)
        for name, rows in accuracy.items()
    }


def _in_order(rows: Rows, wanted: Mapping[str, Cell]) -> pd.DataFrame:
    """Rows as a table, in the order of the study's cells."""
    if not rows:
        return pd.DataFrame(columns=["cell_id"])
    rank = {key: position for position, key in enumerate(wanted)}
    return pd.DataFrame(sorted(rows, key=lambda row: rank[row["cell_id"]]))


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
    same = [*data_axes, *(axis for axis in AXES if axis != "beta"), "noise", "level"]
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


def _save_best(name: str, stack: Measured, best: set[str]) -> None:
    for row, key in enumerate(stack.keys):
        if key in best:
            for picture, figure in _pictures(stack, row):
                figures.save(figure, Folders(name).evaluate / "pictures" / key / f"{picture}.png")
            _save_codes(name, stack, row)


def _save_codes(name: str, stack: Measured, row: int) -> None:
    """The codes of a best cell, and rows with their reconstructions, from which the report draws."""
    codes = stack.codes["test"][row, :PICTURED, : stack.model.cells[row].latent_dim]
    tensors = {"codes": codes, "x": stack.x["test"][:PICTURED], "reconstructions": _decoded(stack, row, codes)}
    if stack.labels:
        tensors["labels"] = stack.labels["test"][:PICTURED]
    write_tensors(Folders(name).evaluate / "codes" / f"{stack.keys[row]}.safetensors", tensors)


@torch.no_grad()
def _decoded(stack: Measured, row: int, codes: Float[Tensor, "row latent"]) -> Float[Tensor, "row feature"]:
    """The means of p(x|z) of one cell."""
    z = torch.zeros(len(stack.model.cells), len(codes), stack.model.lanes, device=codes.device)
    z[row, :, : codes.shape[1]] = codes
    return stack.model.reconstruct(z)[row]


def _pictures(stack: Measured, row: int) -> Iterator[tuple[str, Figure]]:
    cell, shape = stack.model.cells[row], stack.data.image_shape
    codes, x = stack.codes["test"][row, :PICTURED, : cell.latent_dim], stack.x["test"][:PICTURED]
    labels = stack.labels["test"][:PICTURED].numpy() if stack.labels else None
    shown = min(len(x), 20) if shape else len(x)
    yield "reconstructions", figures.reconstructions(*_arrays(x[:shown], _decoded(stack, row, codes[:shown])), shape)
    yield "latent", figures.latent_scatter(codes.cpu().numpy(), labels, stack.data.class_names)
    if cell.latent_dim == 2:
        grid = torch.from_numpy(figures.manifold_codes()).to(codes.device)
        yield "manifold", figures.manifold(*_arrays(_decoded(stack, row, grid)), shape)
    seed = torch.tensor([cell.seed], device=codes.device)
    draws = normals(seed, Stream.EVALUATION, 2 * EVALUATION_STEP, 4, SAMPLES if shape else PICTURED, cell.latent_dim)[0, 0]
    yield "samples", figures.samples(*_arrays(_decoded(stack, row, draws)), shape)


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.cpu().numpy() for tensor in tensors]
