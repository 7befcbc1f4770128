"""Where stacks train: the Executor protocol; in this process, one stack after another; in processes of one CPU thread each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pipeline.artifacts import ArtifactError, CellStore, Prepared
from pipeline.config import Model, VaesweepError
from pipeline.devices import keep_freed_memory, out_of_memory, workers
from pipeline.grid import Cell, Runtime, balanced, parameter_count, stacks
from pipeline.mlp import one_thread
from pipeline.trainer import StackTrainer, Traits

CHECKPOINT_SECONDS = 20.0
CPU_STACK_PARAMETERS = 2**23  # measured: from 8 cells of 0.9 million parameters on, time a cell is level
STACK_CELLS = 256
# Measured: what an update costs beside its products, as parameters whose products take as long; for a stack, and for each cell.
STACK_OVERHEAD, CELL_OVERHEAD = 120_000, 6_000
WORTH_A_SPLIT = 0.97  # of the time before
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that ask training to stop
SECONDS_TO_END = 3.0  # for training processes whose pool is broken
PAUSE_SECONDS = 0.5  # after which a stack in training hears that it must stop


class Advance(NamedTuple):
    """How far training has come: cells, and updates summed over cells."""

    cells_done: int
    cells: int
    updates_done: int
    updates: int


class Interrupted(VaesweepError):
    """A signal asked training to stop; what was trained is in a checkpoint."""

    def __init__(self, signal_number: int):
        super().__init__("interrupted; the next run goes on from the checkpoint")
        self.exit_code = 128 + signal_number


@runtime_checkable
class Executor(Protocol):
    """Trains cells and keeps them in the cell store; a generator, so that whoever drives it can show how far it is."""

    def run(self, wanted: Mapping[str, Cell], data: Prepared, until: int | None = None) -> Iterator[Advance]: ...


def bytes_per_cell(model: Model, features: int, latent_dim: int, batch_size: int) -> int:
    """Memory of one cell in training: weights, gradients, two moments, the best weights, and the activations of one batch."""
    wide = 6 + 2 * (model.output != "identity") + 4 * bool(model.dropout)
    activations = batch_size * (wide * features + 4 * sum(model.hidden))
    return 4 * (6 * parameter_count(model, features, latent_dim) + activations)


def choose_stack_size(cell: Cell, features: int, device: str) -> int:
    """How many such cells train together: enough to hide what an update costs beside its products; half of a GPU's memory."""
    if device == "cpu":
        return min(STACK_CELLS, max(8, CPU_STACK_PARAMETERS // parameter_count(cell.model, features, cell.lanes)))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch's cache too
    return max(2, free // 2 // bytes_per_cell(cell.model, features, cell.lanes, cell.train.batch_size))


def plan_stacks(
    wanted: Mapping[str, Cell],
    features: int,
    device: str,
    size: int | None = None,
    fits: Callable[[Cell], float] = lambda cell: math.inf,
) -> list[list[str]]:
    """Ids of the cells that will train together, the longest training first.

    `size` overrides the chosen number of cells; `fits` says how many like a given one are known to go into memory.
    """
    if not wanted:
        return []

    def cost(keys: Sequence[str]) -> int:
        cell = wanted[keys[0]]
        own = parameter_count(cell.model, features, cell.lanes) + CELL_OVERHEAD
        return cell.train.updates * (STACK_OVERHEAD + len(keys) * own)

    most = min(map(fits, wanted.values()))
    if size:
        return sorted(stacks(wanted, int(min(size, most))), key=cost, reverse=True)
    at_once = workers(device)
    share = math.ceil(len(wanted) / at_once)
    found = stacks(wanted, int(min(share, most, *(choose_stack_size(cell, features, device) for cell in wanted.values()))))
    return _levelled(found, cost, at_once)


def _levelled(found: list[list[str]], cost: Callable[[Sequence[str]], int], at_once: int) -> list[list[str]]:
    """Halves stacks as long as the last of several processes, each of which takes the next longest stack, ends sooner."""

    def dealt(groups: list[list[str]]) -> tuple[int, list[list[str]]]:
        loads: list[tuple[int, list[list[str]]]] = [(0, []) for _ in range(at_once)]
        for keys in sorted(groups, key=cost, reverse=True):
            index = min(range(at_once), key=lambda number: loads[number][0])
            loads[index] = loads[index][0] + cost(keys), [*loads[index][1], keys]
        return max(loads, key=lambda load: load[0])

    def halved(keys: list[str]) -> list[list[str]]:
        return [*(other for other in found if other is not keys), *balanced(keys, math.ceil(len(keys) / 2))]

    while True:
        end, last = dealt(found)
        best = min(map(halved, last), key=lambda groups: dealt(groups)[0])
        if dealt(best)[0] > WORTH_A_SPLIT * end:
            return sorted(found, key=cost, reverse=True)
        found = best


def traits(data: Prepared) -> Traits:
    """What training must know of the data beside its rows."""
    return Traits(unit_range=data.unit_range, dynamic=data.binarise == "dynamic")


def _check(cells: Mapping[str, Cell], data: Prepared) -> None:
    """Whether the data are such as the cells need. Raises VaesweepError."""
    _check_targets(cells, data)
    if data.binarise == "dynamic" and any(cell.train_noise for cell in cells.values()):
        raise VaesweepError("data.binarise: 'dynamic' draws in every update, but train.noise is drawn once; use 'fixed'")


def _check_targets(cells: Mapping[str, Cell], data: Prepared) -> None:
    """A Bernoulli likelihood needs targets in [0, 1], but for noise that a study does not clip. Raises VaesweepError."""
    if any(cell.model.likelihood == "bernoulli" for cell in cells.values()):
        low, high = (extreme(f(x).item() for x in data.x["train"]) for extreme, f in ((min, torch.min), (max, torch.max)))
        if low < 0 or high > 1:
            span = f"'{data.description.get('name')}' spans [{low:.3g}, {high:.3g}]"
            raise VaesweepError(f"model.likelihood: 'bernoulli' needs data in [0, 1], but {span}")


def known_fits(store: CellStore, features: int, device: str) -> Callable[[Cell], float]:
    """How many cells like a given one are known to train at once, from stacks that did not fit into memory."""
    return lambda cell: store.fit(_memory_kind(cell, features, device))


def _memory_kind(cell: Cell, features: int, device: str) -> str:
    """Names what decides, beside their number, how much memory cells take in training."""
    settled = [cell.model.model_dump_json(), cell.lanes, cell.train.batch_size, features, device]
    return hashlib.sha256(json.dumps(settled).encode()).hexdigest()[:16]


class StackTraining:
    """Trains stacks of one dataset collection into the cell store, from checkpoints where there are some."""

    def __init__(
        self,
        store: CellStore,
        train_x: list[Tensor],
        validation_x: list[Tensor],
        traits: Traits,
        runtime: Runtime,
        stop: Callable[[], bool],
        checkpoint_seconds: float,
    ):
        self.store, self.data, self.runtime = store, (train_x, validation_x), runtime
        self.settings = runtime.device, runtime.precision, traits
        self.stop, self.checkpoint_seconds, self.stopped = stop, checkpoint_seconds, False

    def run(self, keys: list[str], cells: Mapping[str, Cell], until: int | None) -> Iterator[int]:
        """Yields the update reached. A stack that does not fit into memory is halved. `stopped` says that it ended early."""
        try:
            yield from self._whole(keys, cells, until)
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the large stack's tensors alive.
        torch.cuda.empty_cache()
        if len(keys) == 1:
            raise VaesweepError("one cell alone does not fit into the device's memory")
        features = self.data[0][0].shape[1]
        self.store.save_fit(_memory_kind(cells[keys[0]], features, self.runtime.device), len(keys) // 2)
        print(f"{len(keys)} cells at once do not fit into memory: they are trained in halves", file=sys.stderr)
        for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            if not self.stopped:
                yield from self.run(half, cells, until)

    def _whole(self, keys: list[str], cells: Mapping[str, Cell], until: int | None) -> Iterator[int]:
        trainer = StackTrainer([cells[key] for key in keys], *self.data, *self.settings)
        self._restore(trainer, keys)
        saved = time.monotonic()
        for update in trainer.run(until, PAUSE_SECONDS):
            self.stopped = self.stop()
            if self.stopped or time.monotonic() - saved > self.checkpoint_seconds:
                self.store.save_checkpoint(keys, trainer.state(), update)
                saved = time.monotonic()
            if self.stopped:
                return
            yield update
        if trainer.update < trainer.config.updates:
            self.store.save_checkpoint(keys, trainer.state(), trainer.update)
            return
        for key, result in zip(keys, trainer.finish(), strict=True):
            self.store.save(key, result.record, result.weights)

    def _restore(self, trainer: StackTrainer, keys: list[str]) -> None:
        """Goes on where the cells were, if they all were at one update; what cannot be read is trained anew."""
        progress = self.store.progress()
        places = [progress[key] for key in keys if key in progress]
        if len(places) == len(keys) and len({place.update for place in places}) == 1:
            with contextlib.suppress(ArtifactError):
                trainer.restore(self.store.load_rows(places, self.runtime.device), places[0].update)


class _LocalExecutor(ABC):
    """What both executors on this machine share: which cells are missing, how far training is, and when it must stop."""

    def __init__(
        self,
        store: CellStore,
        runtime: Runtime,
        stack_size: int | None = None,
        stop: Callable[[], int | None] = lambda: None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ):
        """`stop` answers the number of a signal that asked to stop, or None; it is asked after each history point."""
        self.store, self.runtime, self.stack_size = store, runtime, stack_size
        self.stop, self.checkpoint_seconds = stop, checkpoint_seconds
        self.signal_number: int | None = None

    def run(self, wanted: Mapping[str, Cell], data: Prepared, until: int | None = None) -> Iterator[Advance]:
        """Trains those wanted cells that the store lacks, to their end or to the update `until`, where a checkpoint has them.

        `until` is one of `history_updates`. Cells of several stacks go on together from where they are. Raises Interrupted
        after checkpoints.
        """
        for key in self.store.forget_damaged(wanted):
            print(f"cell {key} was damaged on disk: it is trained anew", file=sys.stderr)
        self.store.release(keep=wanted)  # what killed processes have left
        reached_by = {key: place.update for key, place in self.store.progress().items()}
        missing = {key: cell for key, cell in wanted.items() if key not in self.store}
        if until is not None:  # at its very end, where a checkpoint may be left too, a cell must be in the store
            missing = {k: cell for k, cell in missing.items() if reached_by.get(k, 0) < until or until == cell.train.updates}
        _check(missing, data)
        for key in missing:
            self.store.take_up(key)
        groups = self._stacks(missing, reached_by, data.features)
        budgets = [until or missing[keys[0]].train.updates for keys in groups]
        reached = [0] * len(groups)
        total = sum(budget * len(keys) for budget, keys in zip(budgets, groups, strict=True))
        cells_done = 0
        for index, update in self._train(groups, missing, data, until):
            cells_done += len(groups[index]) if update is None else 0
            reached[index] = budgets[index] if update is None else update
            updates_done = sum(len(keys) * update for keys, update in zip(groups, reached, strict=True))
            yield Advance(cells_done, len(missing), updates_done, total)
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)
        self.store.release(keep=wanted)

    def _stacks(self, missing: dict[str, Cell], reached: Mapping[str, int], features: int) -> list[list[str]]:
        """Stacks of cells that stand at the same update, the furthest first."""
        updates = sorted({reached.get(key, 0) for key in missing}, reverse=True)
        parts = [{key: cell for key, cell in missing.items() if reached.get(key, 0) == update} for update in updates]
        device, fits = self.runtime.device, known_fits(self.store, features, self.runtime.device)
        return [keys for part in parts for keys in plan_stacks(part, features, device, self.stack_size, fits)]

    def _asked_to_stop(self) -> bool:
        self.signal_number = self.signal_number or self.stop()
        return self.signal_number is not None

    @abstractmethod
    def _train(
        self, groups: list[list[str]], cells: Mapping[str, Cell], data: Prepared, until: int | None
    ) -> Iterator[tuple[int, int | None]]:
        """Yields the number of a stack and the update that it reached; None once the store has what was wanted of it."""


class Inline(_LocalExecutor):
    """Trains stack after stack in this process."""

    def _train(
        self, groups: list[list[str]], cells: Mapping[str, Cell], data: Prepared, until: int | None
    ) -> Iterator[tuple[int, int | None]]:
        x = data.x["train"], data.x["validation"]
        training = StackTraining(self.store, *x, traits(data), self.runtime, self._asked_to_stop, self.checkpoint_seconds)
        keep_freed_memory()
        with one_thread():
            for index, keys in enumerate(groups):
                for update in training.run(keys, cells, until):
                    yield index, update
                if training.stopped:
                    return
                yield index, None


class _Pool(NamedTuple):
    """Training processes that hold one collection of datasets."""

    data: Prepared
    processes: ProcessPoolExecutor
    progress: Any
    stop: Any


class Workers(_LocalExecutor):
    """Trains a stack in each of several processes, with one CPU thread each.

    Cells have nothing to say to each other, and a product that two cores share is slower than two products on a core each
    (measured: by a quarter and more, for large networks and small). The processes wait for further work on the same data, as a
    search has after each rung: to start them costs a second or two.
    """

    _pool: _Pool | None = None

    def _train(
        self, groups: list[list[str]], cells: Mapping[str, Cell], data: Prepared, until: int | None
    ) -> Iterator[tuple[int, int | None]]:
        if not groups:
            return
        pool, self._pool = self._pool or self._begin(data), None
        if pool.data is not data:
            pool.processes.shutdown()
            pool = self._begin(data)
        try:
            pending = {
                pool.processes.submit(_work, index, keys, {key: cells[key] for key in keys}, until)
                for index, keys in enumerate(groups)
            }
            while pending:
                finished, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                # A future that its pool cancelled counts as pending for good.
                pending = {future for future in pending if not future.cancelled()}
                if self._asked_to_stop() and not pool.stop.is_set():
                    pool.stop.set()
                    pool.processes.shutdown(wait=False, cancel_futures=True)
                while not pool.progress.empty():
                    yield pool.progress.get()
                for future in finished:
                    with contextlib.suppress(CancelledError):
                        future.result()
            if not pool.stop.is_set():
                self._pool = pool
        except BrokenProcessPool as error:
            pool.stop.set()
            _end_training_processes()
            message = "a training process was killed, perhaps for want of memory; the next run goes on from its checkpoint"
            raise VaesweepError(message) from error
        finally:
            if self._pool is None:
                pool.stop.set()
                pool.processes.shutdown(cancel_futures=True)

    def _begin(self, data: Prepared) -> _Pool:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        # A signal to the whole group is this process's to answer: the server of forks inherits that it is blocked. The tracker
        # comes before, because its start unblocks it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        progress, stop = context.SimpleQueue(), context.Event()
        # As arrays, by value: tensors would travel through shared memory, of which a container may have little.
        x = [[part.numpy() for part in data.x[split]] for split in ("train", "validation")]
        job = (self.store.root, *x, traits(data), self.runtime, self.checkpoint_seconds, progress, stop)
        return _Pool(data, ProcessPoolExecutor(workers("cpu"), context, _begin_work, job), progress, stop)


def _end_training_processes() -> None:
    """Ends those that outlive their pool, once a checkpoint could be taken: one may wait for a lock that a killed one held."""
    end = time.monotonic() + SECONDS_TO_END
    for process in multiprocessing.active_children():
        process.join(max(0.0, end - time.monotonic()))
        process.kill()


class _Worker(NamedTuple):
    """What a training process works with."""

    training: StackTraining
    progress: Any


_worker: _Worker


def _begin_work(
    root: Path,
    train_x: list[np.ndarray],
    validation_x: list[np.ndarray],
    traits: Traits,
    runtime: Runtime,
    checkpoint_seconds: float,
    progress: Any,
    stop: Any,
) -> None:
    """Begins a training process: it leaves signals to its parent, and ends with it."""
    global _worker
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    x = [[torch.from_numpy(part) for part in parts] for parts in (train_x, validation_x)]
    _worker = _Worker(StackTraining(CellStore(root), *x, traits, runtime, stop.is_set, checkpoint_seconds), progress)


def _work(index: int, keys: list[str], cells: dict[str, Cell], until: int | None) -> None:
    training, progress = _worker
    for update in training.run(keys, cells, until):
        progress.put((index, update))
    if not training.stopped:
        progress.put((index, None))


def local_executor(
    store: CellStore, runtime: Runtime, stack_size: int | None = None, stop: Callable[[], int | None] = lambda: None
) -> Executor:
    """The executor that uses this machine best."""
    kind = Workers if workers(runtime.device) > 1 else Inline
    return kind(store, runtime, stack_size, stop)
