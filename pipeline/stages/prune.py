"""`prune`: which latent dimensions each cell's decoder uses, by four criteria, and what it costs to do without the others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline import tracking
from pipeline.artifacts import Folders, finished_cells, in_order, load_prepared, trained_stacks, write_table
from pipeline.config import load_settings, load_study
from pipeline.devices import find_runtime, keep_freed_memory
from pipeline.evaluation import Measured, Reference
from pipeline.latents import ablation_masks, decoder_columns, elbow
from pipeline.metrics import squared_error

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
    references = [Reference(data, index, study.evaluate) for index in range(len(data.points))]
    tables: dict[str, Rows] = {"columns": [], "ablation": [], "summary": []}
    for trained in trained_stacks(Folders(name), finished, data.features, device):
        for table, rows in _analyse(Measured(trained, references[trained.dataset])).items():
            tables[table] += rows
    shutil.rmtree(folder, ignore_errors=True)
    for table, rows in tables.items():
        write_table(folder / f"{table}.csv", in_order(rows, finished))
    tracking.publish(studies=[name])


@torch.no_grad()
def _analyse(stack: Measured) -> dict[str, Rows]:
    """Rows of the tables `columns`, `ablation` and `summary`."""
    keys, model, mu = stack.keys, stack.model, stack.codes["test"]
    variance, used = stack.mean_variance, stack.active
    # The scale of a code that no prior holds is arbitrary: columns compare after it is divided out.
    scale = torch.where(stack.held[:, None], 1.0, mu.std(dim=1))
    columns = decoder_columns(model.layers[model.depth + 1].weight.detach(), scale)
    # Where the arm does not sample, nothing ever trained the variance head, and a KL would mean nothing.
    samples = torch.tensor([cell.arm.samples for cell in model.cells], device=stack.device)
    kl = torch.where(samples[:, None], stack.kl, torch.nan)
    measured = {**columns._asdict(), "kl": kl, "mean_variance": variance}
    found: dict[str, Rows] = {"columns": [], "ablation": [], "summary": []}
    for row, (key, cell) in enumerate(zip(keys, model.cells, strict=True)):
        place, dim = {"cell_id": key, **cell.row()}, cell.latent_dim
        for latent in range(dim):
            values = {name: values[row, latent].item() for name, values in {**measured, "active": used}.items()}
            found["columns"].append({**place, "latent": latent, **values})
        sizes = {name: measured[name][row, :dim].cpu().numpy() for name in CRITERIA if name != "kl" or cell.arm.samples}
        elbows = {f"elbow_{name}": elbow(sizes[name]) if name in sizes else None for name in CRITERIA}
        units = {"active_units": int(used[row, :dim].sum())}
        found["summary"].append({**place, **units, **elbows, "cancelled": int(columns.cancels[row, :dim].sum())})
    # A latent that is taken away stands where the prior has its mean, or where its code has it if no prior holds that.
    rest = torch.where(stack.held[:, None], 0.0, mu.mean(dim=1))[:, None]
    for criterion in CRITERIA:
        found["ablation"] += _ablate(stack, rest, criterion, measured[criterion])
    return found


def _ablate(stack: Measured, rest: Tensor, criterion: str, importance: Tensor) -> Iterator[dict[str, Any]]:
    """Reconstruction error at z = μ with the least important dimensions at `rest`, 0 to all of them."""
    dims = [cell.latent_dim for cell in stack.cells]
    x, mu = stack.x["test"][:ROWS], stack.codes["test"][:, :ROWS]
    for zeroed, mask in enumerate(ablation_masks(importance, dims)):
        errors = squared_error(stack.decode(torch.where(mask[:, None] > 0, mu, rest)), x).mean(dim=1).tolist()
        for row, error in enumerate(errors):
            if zeroed <= dims[row] and not importance[row].isnan().any():
                place = {"cell_id": stack.keys[row], **stack.cells[row].row()}
                yield {**place, "criterion": criterion, "zeroed": zeroed, "mse": error}
