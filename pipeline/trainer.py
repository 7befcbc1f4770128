"""Training of one stack: batches, stacked Adam, history, divergence, checkpoint and resume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config import Schedule
from pipeline.grid import Cell
from pipeline.model import StackedAutoencoder
from pipeline.objective import Objective
from pipeline.randomness import Stream, normals, permutations

BLOCK = 16  # updates whose random numbers are drawn together; a multiple of 4
VALIDATION_ROWS = 512
FALLING = 0.01  # share of the validation loss by which a tenth of the budget may still lower it
HISTORY = ("train_loss", "train_reconstruction", "train_penalty")
HISTORY += tuple(name.replace("train", "validation") for name in HISTORY)


def factor(schedule: Schedule, update: int, updates: int) -> float:
    """The schedule's factor before update number `update` (0-based) of `updates`."""
    share = min(1.0, update / updates / schedule.over)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return schedule.start + (schedule.end - schedule.start) * share


class Batches:
    """Rows and ε of every update, as functions of (cell seed, update, row, lane) and of the cell's dataset."""

    def __init__(self, cells: list[Cell], rows: list[int], device: torch.device | str):
        self.batch_size, self.lanes = cells[0].train.batch_size, cells[0].lanes
        self.rows = rows
        self.offsets = [0, *itertools.accumulate(rows)]
        feeds = sorted({(cell.dataset, cell.seed) for cell in cells})
        self.feeds = feeds
        self.feed = torch.tensor([feeds.index((cell.dataset, cell.seed)) for cell in cells], device=device)
        seeds = sorted({cell.seed for cell in cells})
        self.seeds = torch.tensor(seeds, device=device)
        self._seed_of = dict(zip(seeds, self.seeds.split(1), strict=True))
        self.seed = torch.tensor([seeds.index(cell.seed) for cell in cells], device=device)
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def block(self, first: int) -> tuple[Int[Tensor, "feed step batch"], Float[Tensor, "seed step batch lane"]]:
        """Row numbers into the joined datasets, and ε, for `BLOCK` updates from `first` on."""
        rows = torch.stack([self._rows(dataset, seed, first) for dataset, seed in self.feeds])
        epsilon = normals(self.seeds, Stream.EPSILON, first, BLOCK, self.batch_size, self.lanes)
        return rows, epsilon

    def _rows(self, dataset: int, seed: int, first: int) -> Int[Tensor, "step batch"]:
        """A stream of whole epochs, each in an order of its own, cut into batches; a batch may span two epochs."""
        count = self.rows[dataset]
        start, stop = first * self.batch_size, (first + BLOCK) * self.batch_size
        epochs = range(start // count, (stop - 1) // count + 1)
        stream = torch.cat([self._order(seed, epoch, count) for epoch in epochs])
        return stream[start - epochs[0] * count :][: stop - start].view(BLOCK, -1) + self.offsets[dataset]

    def _order(self, seed: int, epoch: int, count: int) -> Int[Tensor, " row"]:
        key = seed, epoch, count
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] >= epoch - 1}
            self._orders[key] = permutations(self._seed_of[seed], epoch, count)[0]
        return self._orders[key]


class Result(NamedTuple):
    """A trained cell: what the cell store keeps. A diverged cell has no weights."""

    record: dict[str, Any]
    weights: dict[str, Tensor] | None


class StackTrainer:
    """Trains cells of equal `lanes`, `model` and `train` as one program.

    Where products take all cells at once, a lone cell trains beside a copy of itself: one matrix alone rounds differently.
    """

    def __init__(
        self,
        cells: list[Cell],
        train_x: list[Float[Tensor, "_ feature"]],
        validation_x: list[Float[Tensor, "_ feature"]],
        device: torch.device | str = "cpu",
        precision: str = "float32",
    ):
        self.wanted, self.config = len(cells), cells[0].train
        self.model = StackedAutoencoder(cells, train_x[0].shape[1], device, precision)
        if len(cells) == 1 and not self.model.encoder.one_by_one:
            self.model = StackedAutoencoder(cells * 2, train_x[0].shape[1], device, precision)
        self.cells = self.model.initialise().cells
        self.train_x = torch.cat(train_x).to(device)
        self.validation_x = torch.stack(validation_x).to(device)
        self.l2 = torch.tensor([cell.l2 for cell in self.cells], device=device)
        self.dataset = torch.tensor([cell.dataset for cell in self.cells], device=device)
        self.objective = Objective(self.cells, device)
        self.batches = Batches(self.cells, [len(x) for x in train_x], device)
        self.optimizer = _Adam(self.model, self.cells)
        count = self.config.history_points
        self.points = [round(point * self.config.updates / count) for point in range(1, count + 1)]
        self.update = 0
        stack, nan = len(self.cells), float("nan")
        self.history = torch.full((len(self.points), stack, len(HISTORY)), nan, device=device)
        self.diverged_at = torch.full((stack,), -1, device=device)
        self.best_loss = torch.full((stack,), float("inf"), device=device)
        self.best_update = torch.zeros(stack, dtype=torch.long, device=device)
        self.best = [self.model.weights.value.clone(), self.model.biases.value.clone()]

    def run(self) -> Iterator[int]:
        """Trains to the end of the budget; yields the update at each history point, where `state` may be taken."""
        sums = torch.zeros(len(self.cells), 3, device=self.train_x.device)
        block = None
        for point, stop in enumerate(self.points):
            if self.update >= stop:
                continue
            start = self.update
            while self.update < stop:
                if block is None or self.update % BLOCK == 0:
                    block = self.batches.block(self.update // BLOCK * BLOCK)
                sums += self._step(*block)
            self._record(point, sums / (stop - start))
            sums.zero_()
            yield self.update

    def _step(self, rows: Tensor, epsilon: Tensor) -> Float[Tensor, "stack term"]:
        """One update of every cell; returns its loss terms."""
        step = self.update % BLOCK
        chosen = rows[:, step][self.batches.feed]
        x = self.train_x.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
        beta_factor = factor(self.config.beta_schedule, self.update, self.config.updates)
        terms = self._terms(x, epsilon[:, step][self.batches.seed] * self.model.mask, beta_factor)
        self._mark_diverged(terms.loss)
        torch.where(self.diverged_at < 0, terms.loss, 0.0).sum().backward()
        if self.config.clip_norm:
            self._clip(self.config.clip_norm)
        self.optimizer.step(factor(self.config.learning_rate_schedule, self.update, self.config.updates))
        self.update += 1
        return torch.stack(terms, dim=1).detach()

    def _terms(self, x: Tensor, epsilon: Tensor, beta_factor: float = 1.0) -> Any:
        mu, log_variance = self.objective.posterior(*self.model.encode(x))
        output = self.model.decode(self.objective.sample(mu, log_variance, epsilon))
        reconstruction = self.objective.reconstruction(output, x, self.model.log_sigma2)
        return self.objective.terms(reconstruction, self.objective.penalty(mu, log_variance), beta_factor)

    def _mark_diverged(self, loss: Float[Tensor, " stack"]) -> None:
        diverges = (self.diverged_at < 0) & ~torch.isfinite(loss)
        self.diverged_at = torch.where(diverges, self.update, self.diverged_at)

    def _clip(self, norm: float) -> None:
        """Scales each cell's whole gradient, λ's part included, which Adam therefore does not add again."""
        self.model.weights.grad.addcmul_(self.model.weights.value, 2 * self.l2[:, None])
        grads = self.model.weights.grad, self.model.biases.grad
        norms = sum(grad.square().sum(dim=1, keepdim=True) for grad in grads).sqrt()
        for grad in grads:
            grad.mul_((norm / (norms + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def _record(self, point: int, train_terms: Float[Tensor, "stack term"]) -> None:
        """History, freezing of diverged cells, and the best weights so far."""
        validation = self._validate()
        penalty = self.l2 * self.model.weights.value.square().sum(dim=1)
        for terms in (train_terms, validation):
            terms[:, 0] += penalty
        self._mark_diverged(validation[:, 0])
        dead = self.diverged_at >= 0
        self.history[point] = torch.cat([train_terms, validation], dim=1).masked_fill(dead[:, None], torch.nan)
        if dead.any():
            self.optimizer.freeze(dead)
        keep = (validation[:, 0] < self.best_loss) if self.config.keep == "best" else ~dead
        keep &= ~dead
        self.best_loss = torch.where(keep, validation[:, 0], self.best_loss)
        self.best_update.masked_fill_(keep, self.update)
        rows = keep.nonzero()[:, 0]
        for best, buffer in zip(self.best, (self.model.weights, self.model.biases), strict=True):
            best.index_copy_(0, rows, buffer.value.index_select(0, rows))

    @torch.no_grad()
    def _validate(self) -> Float[Tensor, "stack term"]:
        """Loss terms on the validation set without the λ term, at the final β and with the same ε every time."""
        rows = self.validation_x.shape[1]
        epsilon = normals(self.batches.seeds, Stream.EVALUATION, 0, 4, rows, self.model.lanes)[:, 0]
        total = torch.zeros(len(self.cells), 3, device=self.train_x.device)
        for start in range(0, rows, VALIDATION_ROWS):
            part = slice(start, start + VALIDATION_ROWS)
            x = self.validation_x[:, part][self.dataset]
            total += torch.stack(self._terms(x, epsilon[:, part][self.batches.seed] * self.model.mask), dim=1) * x.shape[1]
        return total / rows

    def state(self) -> dict[str, Tensor]:
        """Everything that changes in training; valid between two history points."""
        return {
            "weights": self.model.weights.value,
            "biases": self.model.biases.value,
            **self.optimizer.moments,
            "best_weights": self.best[0],
            "best_biases": self.best[1],
            "best_loss": self.best_loss,
            "best_update": self.best_update,
            "diverged_at": self.diverged_at,
            "history": self.history,
            "update": torch.tensor(self.update),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state` was taken."""
        self.update = int(state["update"])
        for name, tensor in self.state().items():
            if name != "update":
                tensor.copy_(state[name])
        self.optimizer.set_step(self.update)

    def finish(self) -> list[Result]:
        """Puts the kept weights in place, and returns the cells as wanted. Ends training."""
        for best, buffer in zip(self.best, (self.model.weights, self.model.biases), strict=True):
            buffer.value.copy_(best)
        history, best_loss = self.history.cpu(), self.best_loss.tolist()
        return [self._result(row, history[:, row], best_loss[row]) for row in range(self.wanted)]

    def _result(self, row: int, history: Tensor, best_loss: float) -> Result:
        diverged_at = int(self.diverged_at[row])
        curves = {name: [_number(value) for value in column] for name, column in zip(HISTORY, history.T.tolist(), strict=True)}
        record = {
            "status": "diverged" if diverged_at >= 0 else "finished",
            "diverged_at": diverged_at if diverged_at >= 0 else None,
            "updates": self.config.updates,
            "evaluated_update": int(self.best_update[row]),
            "validation_loss": _number(best_loss),
            "unconverged": still_falling(history[:, HISTORY.index("validation_loss")].tolist()),
            "history": {"update": self.points, **curves},
        }
        return Result(record, self.model.cell_state(row) if diverged_at < 0 else None)


def still_falling(losses: list[float]) -> bool:
    """Whether the mean loss over the last tenth lies more than 1% below that over the tenth before."""
    tenth = max(1, len(losses) // 10)
    last, before = (sum(part) / tenth for part in (losses[-tenth:], losses[-2 * tenth : -tenth]))
    return bool(before - last > FALLING * abs(last))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Adam:
    """torch's fused Adam kernel over rows of the two buffers: one group for each run of cells with equal learning rate and λ.

    The kernel itself, because `torch.optim` takes 3 s to import what it does not need here, and 0.4 ms a step.
    """

    def __init__(self, model: StackedAutoencoder, cells: list[Cell]):
        self.buffers = {"weights": model.weights, "biases": model.biases}
        self.moments = {
            f"{name}_{moment}": torch.zeros_like(buffer.value)
            for name, buffer in self.buffers.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }
        self.update = torch.zeros((), device=model.weights.value.device)
        self.groups, start = [], 0
        for (rate, l2), run in itertools.groupby(cells, key=lambda cell: (cell.learning_rate, cell.l2)):
            rows = slice(start, start := start + len(list(run)))
            decay = 0.0 if cells[0].train.clip_norm else 2 * l2
            self.groups += [self._group("weights", rows, rate, decay), self._group("biases", rows, rate, 0.0)]

    def _group(self, name: str, rows: slice, rate: float, weight_decay: float) -> tuple[list[list[Tensor]], float, float]:
        """What the kernel takes: views of value, gradient, moments, and no largest moment; learning rate; weight decay."""
        moments = (self.moments[f"{name}_{moment}"] for moment in ("exp_avg", "exp_avg_sq"))
        views = [[tensor[rows]] for tensor in (*self.buffers[name], *moments)]
        return [*views, [], [self.update]], rate, weight_decay

    def step(self, rate_factor: float) -> None:
        """One update at the base learning rates times `rate_factor`."""
        self.update += 1
        settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False}
        for tensors, rate, weight_decay in self.groups:
            torch._fused_adam_(*tensors, lr=rate * rate_factor, weight_decay=weight_decay, **settings)

    def set_step(self, update: int) -> None:
        self.update.fill_(update)

    def freeze(self, rows: Tensor) -> None:
        """Zeroes cells, moments and gradients: with zero gradients from then on, Adam leaves them where they are."""
        for tensor in (*(part for buffer in self.buffers.values() for part in buffer), *self.moments.values()):
            tensor[rows] = 0.0
