"""Training of one stack: batches, stacked Adam, history, divergence, checkpoint and resume."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config import Schedule, Train, TrainNoise
from pipeline.corruption import corrupt
from pipeline.grid import Cell
from pipeline.model import StackedAutoencoder
from pipeline.objective import Objective, Terms
from pipeline.randomness import Stream, normals, permutations, uniforms

BLOCK = 16  # updates whose random numbers are drawn together; a multiple of 4
VALIDATION_ROWS = 512
TRAIN_NOISE_SEED, VALIDATION_NOISE_SEED = 1, 2  # evaluation corrupts test rows with seed 0
FALLING = 0.01  # share of a loss's whole way that a tenth of the budget may still add
HISTORY = ("train_loss", "train_reconstruction", "train_penalty")
HISTORY += tuple(name.replace("train", "validation") for name in HISTORY)


RECORDED = ("history", "diverged_at", "best_update", "best_loss")
"""Parts of a stack's state that say how training went."""


def factor(schedule: Schedule, update: int, updates: int) -> float:
    """The schedule's factor before update number `update` (0-based) of `updates`."""
    share = min(1.0, update / updates / schedule.over)
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "steps":
        return schedule.ratio ** sum(update / updates >= at for at in schedule.at)
    if schedule.kind == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return schedule.start + (schedule.end - schedule.start) * share


class Traits(NamedTuple):
    """What training must know of its data beside the rows."""

    unit_range: bool = False
    dynamic: bool = False
    """Whether training rows are grey levels, which every update draws anew as black or white."""


PLAIN = Traits()
Version = tuple[int, float]
"""A dataset's index, and the level of the noise on it."""


def inputs(cells: list[Cell]) -> list[Version]:
    """What each cell sees."""
    return [(cell.dataset, cell.train_noise) for cell in cells]


def targets(cells: list[Cell]) -> list[Version]:
    """What each cell's reconstruction is compared with."""
    noise = cells[0].train.noise
    return [(cell.dataset, 0.0) for cell in cells] if noise and noise.target == "clean" else inputs(cells)


def versions(cells: list[Cell]) -> list[Version]:
    """All that a stack of these cells needs."""
    return sorted({*inputs(cells), *targets(cells)})


class Split:
    """One split of the datasets, joined in all versions that the cells need. Noise is drawn once, by `seed`."""

    def __init__(
        self, cells: list[Cell], x: list[Float[Tensor, "_ feature"]], seed: int, clip: bool, device: torch.device | str
    ):
        seen, wanted, needed = inputs(cells), targets(cells), versions(cells)
        parts = [_noisy(x[dataset], cells[0].train.noise, level, seed, clip) for dataset, level in needed]
        self.x = torch.cat(parts).to(device)
        self.rows = [len(part) for part in parts]
        self.version = [needed.index(version) for version in seen]
        starts = torch.tensor([0, *itertools.accumulate(self.rows[:-1])], device=device)[:, None]
        self.start = starts[self.version]
        self.shift = starts[[needed.index(version) for version in wanted]] - self.start if seen != wanted else None

    def take(self, rows: Int[Tensor, "stack batch"]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [stack, batch, feature]; `rows` count from the first row of all versions."""
        x = self._take(rows)
        return x, x if self.shift is None else self._take(rows + self.shift)

    def _take(self, rows: Int[Tensor, "stack batch"]) -> Float[Tensor, "stack batch feature"]:
        return self.x.index_select(0, rows.flatten()).view(*rows.shape, -1)


def _noisy(x: Float[Tensor, "_ feature"], noise: TrainNoise | None, level: float, seed: int, clip: bool) -> Tensor:
    return corrupt(x, noise.kind, level, seed, clip=clip and noise.clip) if noise else x


class Batches:
    """Rows and ε of every update, as functions of (cell seed, update, row, lane) and of what version of the data a cell sees.

    `version` indexes `rows`, the number of rows in each version.
    """

    def __init__(self, cells: list[Cell], version: list[int], rows: list[int], device: torch.device | str):
        self.batch_size, self.lanes, self.shuffle = cells[0].train.batch_size, cells[0].lanes, cells[0].train.shuffle
        self.rows = rows
        self.offsets = [0, *itertools.accumulate(rows)]
        wanted = [(index, cell.seed) for index, cell in zip(version, cells, strict=True)]
        self.feeds = sorted(set(wanted))
        self.feed = torch.tensor([self.feeds.index(feed) for feed in wanted], device=device)
        seeds = sorted({cell.seed for cell in cells})
        self.seeds = torch.tensor(seeds, device=device)
        self._seed_of = dict(zip(seeds, self.seeds.split(1), strict=True))
        self.seed = torch.tensor([seeds.index(cell.seed) for cell in cells], device=device)
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def block(self, first: int) -> tuple[Int[Tensor, "feed step batch"], Float[Tensor, "seed step batch lane"]]:
        """Row numbers into the joined versions, and ε, for `BLOCK` updates from `first` on."""
        rows = torch.stack([self._rows(version, seed, first) for version, seed in self.feeds])
        epsilon = normals(self.seeds, Stream.EPSILON, first, BLOCK, self.batch_size, self.lanes)
        return rows, epsilon

    def uniforms(self, stream: Stream, update: int, columns: int) -> Float[Tensor, "seed batch column"]:
        """Uniform numbers on (0, 1), as a function of (cell seed, update, row, column); `seed` says whose are which."""
        return uniforms(self.seeds, stream, self.batch_size, columns, update)

    def _rows(self, version: int, seed: int, first: int) -> Int[Tensor, "step batch"]:
        """A stream of whole epochs, each in an order of its own, cut into batches; a batch may span two epochs."""
        count = self.rows[version]
        start, stop = first * self.batch_size, (first + BLOCK) * self.batch_size
        epochs = range(start // count, (stop - 1) // count + 1)
        stream = torch.cat([self._order(seed, epoch, count) for epoch in epochs])
        return stream[start - epochs[0] * count :][: stop - start].view(BLOCK, -1) + self.offsets[version]

    def _order(self, seed: int, epoch: int, count: int) -> Int[Tensor, " row"]:
        key = seed, epoch, count
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] >= epoch - 1}
            rows = torch.arange(count, device=self.seeds.device)
            self._orders[key] = permutations(self._seed_of[seed], epoch, count)[0] if self.shuffle else rows
        return self._orders[key]


class Result(NamedTuple):
    """A trained cell: what the cell store keeps. A diverged cell has no weights."""

    record: dict[str, Any]
    weights: dict[str, Tensor] | None


class StackTrainer:
    """Trains cells of equal `lanes`, `model` and `train` as one program, on the rows of every dataset.

    Where products take all cells at once, a lone cell trains beside a copy of itself: one matrix alone rounds differently.
    """

    def __init__(
        self,
        cells: list[Cell],
        train_x: list[Float[Tensor, "_ feature"]],
        validation_x: list[Float[Tensor, "_ feature"]],
        device: torch.device | str = "cpu",
        precision: str = "float32",
        traits: Traits = PLAIN,
    ):
        self.wanted, self.config = len(cells), cells[0].train
        self.model = StackedAutoencoder(cells, train_x[0].shape[1], device, precision)
        if len(cells) == 1 and not self.model.encoder.one_by_one:
            self.model = StackedAutoencoder(cells * 2, train_x[0].shape[1], device, precision)
        self.cells = self.model.initialise().cells
        self.train = Split(self.cells, train_x, TRAIN_NOISE_SEED, traits.unit_range, device)
        self.validation = Split(self.cells, validation_x, VALIDATION_NOISE_SEED, traits.unit_range, device)
        self.dynamic = traits.dynamic
        self.l2 = torch.tensor([cell.l2 for cell in self.cells], device=device)
        self.objective = Objective(self.cells, device)
        self.batches = Batches(self.cells, self.train.version, self.train.rows, device)
        self.optimizer = _Adam(self.model, self.cells)
        self.points = history_updates(self.config)
        self.update = 0
        stack, nan = len(self.cells), float("nan")
        self.history = torch.full((stack, len(self.points), len(HISTORY)), nan, device=device)
        self.sums = torch.zeros(stack, 3, device=device)  # of loss terms since the last history point
        self.diverged_at = torch.full((stack,), -1, device=device)
        self.best_loss = torch.full((stack,), float("inf"), device=device)
        self.best_update = torch.zeros(stack, dtype=torch.long, device=device)
        self.best = [self.model.weights.value.clone(), self.model.biases.value.clone()]

    def run(self, until: int | None = None, pause_seconds: float = math.inf) -> Iterator[int]:
        """Trains to the end of the budget, or to the last history point that is not beyond the update `until`.

        Yields the update at each history point, and between them after every so many seconds; there `state` may be taken.
        """
        block, paused = None, time.monotonic()
        for start, stop in itertools.pairwise([0, *self.points]):
            if self.update >= stop:
                continue
            if until is not None and stop > until:
                return
            while self.update < stop:
                if block is None or self.update % BLOCK == 0:
                    if time.monotonic() - paused > pause_seconds:
                        yield self.update
                        paused = time.monotonic()
                    block = self.batches.block(self.update // BLOCK * BLOCK)
                self.sums += self._step(*block)
            self._record(self.points.index(stop), self.sums / (stop - start))
            self.sums.zero_()
            yield self.update
            paused = time.monotonic()

    def _step(self, rows: Tensor, epsilon: Tensor) -> Float[Tensor, "stack term"]:
        """One update of every cell; returns its loss terms."""
        step = self.update % BLOCK
        x, target = self.train.take(rows[:, step][self.batches.feed])
        if self.dynamic:
            x = target = self._black_and_white(x)
        terms = self._terms(x, target, epsilon[:, step][self.batches.seed] * self.model.mask, self.update)
        self._mark_diverged(terms.loss)
        torch.where(self.diverged_at < 0, terms.loss, 0.0).sum().backward()
        if self.config.clip_norm:
            self._clip(self.config.clip_norm)
        self.optimizer.step(factor(self.config.learning_rate_schedule, self.update, self.config.updates))
        self.update += 1
        return torch.stack(terms, dim=1).detach()

    def _terms(self, x: Tensor, target: Tensor, epsilon: Tensor, update: int | None = None) -> Terms:
        """Terms as training number `update` has them; without one, as validation has them: at the final β, nothing dropped."""
        mu, log_variance = self.objective.posterior(*self.model.encode(x))
        output = self.model.decode(self.objective.sample(mu, log_variance, epsilon))
        if update is not None and self.model.config.dropout:
            output = self._dropped(output, update)
        reconstruction = self.objective.reconstruction(output, target, self.model.log_sigma2)
        beta = self.objective.beta if update is None else self.objective.beta_at(update)
        return self.objective.terms(reconstruction, self.objective.penalty(mu, log_variance), beta)

    def _dropped(self, mean: Float[Tensor, "stack batch feature"], update: int) -> Float[Tensor, "stack batch feature"]:
        """Means of which a share is set to 0, and the rest scaled up to the same expectation."""
        share = self.model.config.dropout
        kept = self.batches.uniforms(Stream.DROPOUT, update, mean.shape[-1]) >= share
        return mean * (kept / (1 - share))[self.batches.seed]

    def _black_and_white(self, grey: Float[Tensor, "stack batch feature"]) -> Float[Tensor, "stack batch feature"]:
        """Every pixel 1 with its grey as the probability, else 0."""
        return (self.batches.uniforms(Stream.BINARISE, self.update, grey.shape[-1])[self.batches.seed] < grey).float()

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
        self.history[:, point] = torch.cat([train_terms, validation], dim=1).masked_fill(dead[:, None], torch.nan)
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
        rows = self.validation.rows[0]
        epsilon = normals(self.batches.seeds, Stream.EVALUATION, 0, 4, rows, self.model.lanes)[:, 0]
        total = torch.zeros(len(self.cells), 3, device=self.l2.device)
        for part in torch.arange(rows, device=self.l2.device).split(VALIDATION_ROWS):
            x, target = self.validation.take(self.validation.start + part)
            terms = self._terms(x, target, epsilon[:, part][self.batches.seed] * self.model.mask)
            total += torch.stack(terms, dim=1) * len(part)
        return total / rows

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, beside `update`: one row a cell, as wanted."""
        return {name: tensor[: self.wanted] for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {
            "weights": self.model.weights.value,
            "biases": self.model.biases.value,
            **self.optimizer.moments,
            "best_weights": self.best[0],
            "best_biases": self.best[1],
            "best_loss": self.best_loss,
            "best_update": self.best_update,
            "diverged_at": self.diverged_at,
            "sums": self.sums,
            "history": self.history,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], update: int) -> None:
        """Goes on where `state` was taken, or where its rows were: the cells may have stood in other stacks."""
        self.update = update
        for name, tensor in self._state().items():
            tensor.copy_(state[name])  # a lone cell's row also to the copy beside it
        self.optimizer.set_step(update)

    def finish(self) -> list[Result]:
        """Puts the kept weights in place, and returns the cells as wanted. Ends training."""
        for best, buffer in zip(self.best, (self.model.weights, self.model.biases), strict=True):
            buffer.value.copy_(best)
        return [
            Result(record, self.model.cell_state(row) if record["status"] == "finished" else None)
            for row, record in enumerate(records(self.state(), self.config, self.update))
        ]


def history_updates(train: Train) -> list[int]:
    """The updates after which losses are recorded, and where training can stop and go on."""
    count = train.history_points
    return [round(point * train.updates / count) for point in range(1, count + 1)]


def records(state: Mapping[str, Tensor], train: Train, update: int) -> list[dict[str, Any]]:
    """How the training of each row of a stack's state has gone up to `update`."""
    points = [point for point in history_updates(train) if point <= update]
    status = "finished" if update == train.updates else "unfinished"
    return [_record(*row, points, status) for row in zip(*(state[name].tolist() for name in RECORDED), strict=True)]


def _record(
    history: list[list[float]], diverged_at: int, best_update: int, best_loss: float, points: list[int], status: str
) -> dict[str, Any]:
    columns = zip(*history[: len(points)], strict=True)
    curves = {name: [_number(value) for value in column] for name, column in zip(HISTORY, columns, strict=True)}
    return {
        "status": "diverged" if diverged_at >= 0 else status,
        "diverged_at": diverged_at if diverged_at >= 0 else None,
        "updates": points[-1],
        "evaluated_update": best_update,
        "validation_loss": _number(best_loss),
        "history": {"update": points, **curves},
    }


def unconverged(record: Mapping[str, Any]) -> bool:
    """Whether a cell's validation loss was still falling when its budget ended."""
    return record["status"] == "finished" and still_falling(record["history"]["validation_loss"])


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the mean loss over the last tenth lies below that over the tenth before by more than 1% of the whole way.

    The way is the sum of all rises and falls of the tenths' means: a density's loss has no natural zero, and one that rises on
    the way, as where training and validation data differ, may end where it began. It tells that a budget was cut short, not
    that more updates would change nothing: a learning rate that falls to zero flattens its end.
    """
    tenth = max(1, len(losses) // 10)
    means = [sum(losses[start : start + tenth]) / tenth for start in range(len(losses) % tenth, len(losses), tenth)]
    steps = [after - mean for mean, after in itertools.pairwise(means)]
    return -steps[-1] > FALLING * sum(map(abs, steps))


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
