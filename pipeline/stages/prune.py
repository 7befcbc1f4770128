"""`prune`: which latent dimensions each cell's decoder uses, by four criteria, and what zeroing the others costs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import tracking
from pipeline.artifacts import Folders, finished_cells, load_prepared, trained_stacks, write_table
from pipeline.config import Study, load_settings, load_study
from pipeline.executors import find_runtime, keep_freed_memory
from pipeline.latents import ablation_masks, active, decoder_columns, elbow, mean_variance
from pipeline.metrics import squared_error
from pipeline.model import StackedAutoencoder
from pipeline.objective import kl_per_latent

ROWS = 512  # test rows on which ablation is measured
CRITERIA = ("column_sum", "column_l1", "column_l2", "kl")

Rows = list[dict[str, Any]]


def run(name: str) -> None:
    """Writes `runs/<name>/prune/`. Raises VaesweepError."""
    study, folder = load_study(name), Folders(name).prune
    keep_freed_memory()
    device = find_runtime(load_settings()).device
    data = load_prepared(Folders(name).prepared, study.data).to(device)
    finished = finished_cells(Folders(name), study, data)
    tables: dict[str, Rows] = {"columns": [], "ablation": [], "summary": []}
    for keys, model, dataset in trained_stacks(Folders(name), finished, data.features, device):
        x = data.x["test"][dataset][:ROWS]
        for table, rows in _analyse(keys, model, x, study).items():
            tables[table] += rows
    shutil.rmtree(folder, ignore_errors=True)
    rank = {key: position for position, key in enumerate(finished)}
    for table, rows in tables.items():
        ordered = sorted(rows, key=lambda row: rank[row["cell_id"]])
        write_table(folder / f"{table}.csv", pd.DataFrame(ordered) if ordered else pd.DataFrame(columns=["cell_id"]))
    tracking.publish(studies=[name])


@torch.no_grad()
def _analyse(keys: list[str], model: StackedAutoencoder, x: Float[Tensor, "row feature"], study: Study) -> dict[str, Rows]:
    """Rows of the tables `columns`, `ablation` and `summary`."""
    mu, log_variance = model.encode(x.expand(len(keys), -1, -1))
    samples = [cell.arm.samples for cell in model.cells]
    variance = mean_variance(mu, samples)
    # The scale of a code that no prior holds is arbitrary: columns compare after it is divided out.
    scale = torch.where(torch.tensor(samples, device=x.device)[:, None], 1.0, mu.std(dim=1))
    columns = decoder_columns(model.layers[model.depth + 1].weight.detach(), scale)
    used = active(variance, study.evaluate.active_threshold)
    # Where the arm does not sample, nothing ever trained the variance head, and a KL would mean nothing.
    kl = kl_per_latent(mu, log_variance).mean(dim=1)
    kl[[not sampled for sampled in samples]] = torch.nan
    measured = {**columns._asdict(), "kl": kl, "mean_variance": variance}
    found: dict[str, Rows] = {"columns": [], "ablation": [], "summary": []}
    for row, (key, cell) in enumerate(zip(keys, model.cells, strict=True)):
        place, dim = {"cell_id": key, **cell.row()}, cell.latent_dim
        for latent in range(dim):
            values = {name: values[row, latent].item() for name, values in {**measured, "active": used}.items()}
            found["columns"].append({**place, "latent": latent, **values})
        known = [name for name in CRITERIA if name != "kl" or cell.arm.samples]
        elbows = {f"elbow_{name}": elbow(measured[name][row, :dim].cpu().numpy()) for name in known}
        units = {"active_units": int(used[row, :dim].sum())}
        found["summary"].append({**place, **units, **elbows, "cancelled": int(columns.cancels[row, :dim].sum())})
    for criterion in CRITERIA:
        found["ablation"] += _ablate(keys, model, x, mu, criterion, measured[criterion])
    return found


def _ablate(
    keys: list[str], model: StackedAutoencoder, x: Tensor, mu: Tensor, criterion: str, importance: Tensor
) -> Iterator[dict[str, Any]]:
    """Reconstruction error at z = μ with the least important dimensions zeroed, 0 to all of them."""
    dims = [cell.latent_dim for cell in model.cells]
    for zeroed, mask in enumerate(ablation_masks(importance, dims)):
        errors = squared_error(model.reconstruct(mu * mask[:, None]), x).mean(dim=1).tolist()
        for row, error in enumerate(errors):
            if zeroed <= dims[row] and not importance[row].isnan().any():
                place = {"cell_id": keys[row], **model.cells[row].row()}
                yield {**place, "criterion": criterion, "zeroed": zeroed, "mse": error}
