"""Where stacks train: the Executor protocol, and the executor that trains them here, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from pipeline.artifacts import ArtifactError, CellStore, Prepared
from pipeline.config import Model, VaesweepError
from pipeline.grid import Cell, Runtime, parameter_count, stacks
from pipeline.trainer import StackTrainer

CHECKPOINT_SECONDS = 20.0
CPU_STACK_PARAMETERS = 2**24  # measured: stacks of 8 to 16 are best for 0.9 million parameters, 256 and more for 3,000
STACK_CELLS = 512


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


class Executor(Protocol):
    """Trains cells and keeps them in the cell store; a generator, so that whoever drives it can show how far it is."""

    def run(self, wanted: Mapping[str, Cell], data: Prepared) -> Iterator[Advance]: ...


def find_runtime(setting: str) -> Runtime:
    """The device that `device: auto|cpu|cuda` means here, and the torch that runs on it. Raises VaesweepError."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise VaesweepError("params.yaml: device: is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    device = "cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu"
    return Runtime(device=device, torch=torch.__version__)


def bytes_per_cell(model: Model, features: int, latent_dim: int, batch_size: int) -> int:
    """Memory of one cell in training: weights, gradients, two moments, the best weights, and the activations of one batch."""
    activations = batch_size * (4 * features + 4 * sum(model.hidden))
    return 4 * (6 * parameter_count(model, features, latent_dim) + activations)


def choose_stack_size(cell: Cell, features: int, device: str) -> int:
    """How many such cells train together: what the cache likes on a CPU, what half of the free memory holds on a GPU."""
    if device == "cpu":
        return min(STACK_CELLS, max(8, CPU_STACK_PARAMETERS // parameter_count(cell.model, features, cell.lanes)))
    free, _ = torch.cuda.mem_get_info()
    return max(2, free // 2 // bytes_per_cell(cell.model, features, cell.lanes, cell.train.batch_size))


def plan_stacks(wanted: Mapping[str, Cell], features: int, device: str, size: int | None = None) -> list[list[str]]:
    """Ids of the cells that will train together; `size` overrides the chosen number of cells."""
    if not wanted:
        return []
    return stacks(wanted, size or min(choose_stack_size(cell, features, device) for cell in wanted.values()))


def _check_targets(cells: Mapping[str, Cell], data: Prepared) -> None:
    """A Bernoulli likelihood needs targets in [0, 1]. Raises VaesweepError."""
    if any(cell.model.likelihood == "bernoulli" for cell in cells.values()):
        low, high = (extreme(f(x).item() for x in data.x["train"]) for extreme, f in ((min, torch.min), (max, torch.max)))
        if low < 0 or high > 1:
            span = f"'{data.description.get('name')}' spans [{low:.3g}, {high:.3g}]"
            raise VaesweepError(f"model.likelihood: 'bernoulli' needs data in [0, 1], but {span}")


def _out_of_memory(error: RuntimeError) -> bool:
    """torch raises OutOfMemoryError on a GPU only; on the CPU its allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Inline:
    """Trains stack after stack in this process, from checkpoints where there are some."""

    def __init__(
        self,
        store: CellStore,
        device: str = "cpu",
        stack_size: int | None = None,
        stop: Callable[[], int | None] = lambda: None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ):
        """`stop` answers the number of a signal that asked to stop, or None; it is asked after each history point."""
        self.store, self.device, self.stack_size = store, device, stack_size
        self.stop, self.checkpoint_seconds = stop, checkpoint_seconds

    def run(self, wanted: Mapping[str, Cell], data: Prepared) -> Iterator[Advance]:
        """Trains those wanted cells that the store lacks. Raises Interrupted after a checkpoint."""
        missing = {key: cell for key, cell in wanted.items() if key not in self.store}
        _check_targets(missing, data)
        totals = len(missing), sum(cell.train.updates for cell in missing.values())
        cells_done = updates_done = 0
        for keys in self._stacks(missing, data.features):
            for update in self._train(keys, missing, data):
                yield Advance(cells_done, totals[0], updates_done + update * len(keys), totals[1])
            cells_done += len(keys)
            updates_done += sum(missing[key].train.updates for key in keys)
            yield Advance(cells_done, totals[0], updates_done, totals[1])

    def _stacks(self, missing: dict[str, Cell], features: int) -> list[list[str]]:
        """Stacks with a checkpoint first, as they were; then the rest."""
        rest, resumed = dict(missing), []
        for keys in self.store.checkpoints():
            if all(key in rest for key in keys):
                resumed.append(keys)
                rest = {key: cell for key, cell in rest.items() if key not in keys}
        return resumed + plan_stacks(rest, features, self.device, self.stack_size)

    def _train(self, keys: list[str], cells: Mapping[str, Cell], data: Prepared) -> Iterator[int]:
        """Trains one stack into the store; yields the update reached. A stack that does not fit into memory is halved."""
        try:
            yield from self._train_whole(keys, cells, data)
            return
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the large stack's tensors alive.
        torch.cuda.empty_cache()
        if len(keys) == 1:
            raise VaesweepError("one cell alone does not fit into the device's memory")
        for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            yield from self._train(half, cells, data)

    def _train_whole(self, keys: list[str], cells: Mapping[str, Cell], data: Prepared) -> Iterator[int]:
        trainer = StackTrainer([cells[key] for key in keys], data.x["train"], data.x["validation"], self.device)
        if state := self._checkpoint(keys):
            trainer.restore(state)
        saved = time.monotonic()
        for progress in trainer.run():
            signal_number = self.stop()
            if signal_number is not None or time.monotonic() - saved > self.checkpoint_seconds:
                self.store.save_checkpoint(keys, trainer.state())
                saved = time.monotonic()
            if signal_number is not None:
                raise Interrupted(signal_number)
            yield progress.update
        for key, result in zip(keys, trainer.finish(), strict=True):
            self.store.save(key, result.record, result.weights)
        self.store.remove_checkpoint(keys)

    def _checkpoint(self, keys: list[str]) -> dict[str, torch.Tensor] | None:
        """The stack's checkpoint, or None where there is none that can be read: training then starts anew."""
        try:
            return self.store.load_checkpoint(keys, self.device)
        except ArtifactError:
            return None
