"""Training speed, side by side in one run: the stack against a floor, a loop, a script and `torch.func` ensembling.

    python benchmarks/train.py [--network 2-30-30-2] [--device cuda] [--precision bf16] [--rounds 5]

Every contender first trains two equal cells on equal batches and noise; its loss must lie within 1% of the loop's. Then all,
in processes of their own, take turns, round after round, so that a machine whose speed drifts drifts under all of them;
figures are medians over rounds.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import click
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from pipeline.config import Data, Model, Train
from pipeline.datasets import build
from pipeline.devices import keep_freed_memory, workers
from pipeline.executors import bytes_per_cell, plan_stacks
from pipeline.grid import Cell, layer_shapes, parameter_count
from pipeline.mlp import fast_products
from pipeline.model import StackedAutoencoder
from pipeline.trainer import Batches, StackTrainer

BATCH = 128
SIZES = [2**power for power in range(11)]
CHECKED_UPDATES = 128
TOLERANCE = 0.01
STACKED = ("stack", "floor", "vmap")
ADAM_FLOATS = 7  # an update reads the value, its gradient and two moments, and writes all but the gradient


class Network(NamedTuple):
    """An architecture, the data it trains on, and how long one turn of a contender lasts."""

    model: Model
    data: str
    latent_dim: int
    updates: int  # a turn of the stack or of vmap
    loop_updates: int  # a turn of one model in a loop


NETWORKS = {
    "784-400-256-128-8": Network(Model(hidden=(400, 256, 128), likelihood="bernoulli"), "digits5k", 8, 16, 32),
    "2-30-30-2": Network(Model(hidden=(30, 30), likelihood="gaussian"), "uniform2d", 2, 64, 256),
}


def training_data(name: str) -> Tensor:
    """Training rows of a dataset that needs no download, as float32; bytes scaled to [0, 1]."""
    x = torch.tensor(build(Data(name=name), Path("data"))[0].x["train"])
    return x.float() / 255 if x.dtype == torch.uint8 else x


def make_cells(network: Network, count: int, updates: int) -> list[Cell]:
    """Cells of five seeds, as studies have them; Train demands ten history points at least."""
    train = Train(updates=updates, batch_size=BATCH, history_points=max(10, updates // network.updates))
    sigma2 = 1.0 if network.model.likelihood == "gaussian" else None
    return [
        Cell("vae", 1.0, network.latent_dim, 0.0, sigma2, 1e-3, index % 5, 0, network.model, train) for index in range(count)
    ]


class Contender(Protocol):
    """Something that trains `cells` models."""

    cells: int

    def advance(self, updates: int) -> Tensor:
        """Trains all models for that many updates; their mean losses over these, [cells]."""
        ...


Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""Rows [batch] and ε [batch, latent] of a model and an update."""


class Stack:
    """This project's engine."""

    def __init__(self, network: Network, x: Tensor, cells: int, updates: int, precision: str = "float32"):
        self.cells = cells
        self.trainer = StackTrainer(make_cells(network, cells, updates), [x], [x[:BATCH]], x.device, precision)
        self.run, self.point = self.trainer.run(), 0

    def advance(self, updates: int) -> Tensor:
        losses = []
        for update in self.run:
            losses.append(self.trainer.history[: self.cells, self.point, 0])
            self.point += 1
            if update % updates == 0:
                break
        return torch.stack(losses).mean(dim=0)


class Elbo(nn.Module):
    """The usual loss around a plain autoencoder: one module, so that a loop and `functional_call` share it."""

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor, epsilon: Tensor) -> Tensor:
        mu, log_variance = self.autoencoder.encode(x)
        output = self.autoencoder.decoder(mu + torch.exp(0.5 * log_variance) * epsilon)
        if self.autoencoder.likelihood == "bernoulli":
            reconstruction = F.binary_cross_entropy_with_logits(output, x, reduction="sum")
        else:
            reconstruction = 0.5 * (F.mse_loss(output, x, reduction="sum") + x.numel() * math.log(2 * math.pi))
        kl = -0.5 * torch.sum(1 + log_variance - mu**2 - log_variance.exp())
        return (reconstruction + kl) / len(x)


def plain_models(network: Network, x: Tensor, cells: int) -> list[Elbo]:
    """The models that the stack starts from, as plain modules."""
    stack = StackedAutoencoder(make_cells(network, cells, 1024), x.shape[1], x.device).initialise()
    return [Elbo(stack.cell(row)).to(x.device) for row in range(cells)]


def fresh(network: Network, x: Tensor) -> Draw:
    """What a script would draw: rows from a shuffled epoch, and torch's normal numbers."""
    batches = itertools.cycle(torch.randperm(len(x), device=x.device).split(BATCH)[:-1])
    return lambda model, update: (next(batches), torch.randn(BATCH, network.latent_dim, device=x.device))


def replayed(network: Network, x: Tensor, cells: int) -> Draw:
    """What the stack draws."""
    source = Batches(make_cells(network, cells, 1024), [0] * cells, [len(x)], x.device)
    blocks = {first: source.block(first) for first in range(0, CHECKED_UPDATES, 16)}

    def draw(model: int, update: int) -> tuple[Tensor, Tensor]:
        rows, epsilon = blocks[update // 16 * 16]
        latents = epsilon[source.seed[model], update % 16, :, : network.latent_dim]
        return rows[source.feed[model], update % 16], latents

    return draw


class Loop:
    """Plain PyTorch: one model after another, data resident."""

    def __init__(self, network: Network, x: Tensor, cells: int, draw: Draw, fused: bool | None = None):
        self.x, self.cells, self.draw, self.update = x, cells, draw, 0
        self.models = plain_models(network, x, cells)
        self.optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused) for model in self.models]

    def advance(self, updates: int) -> Tensor:
        steps = range(self.update, self.update + updates)
        self.update += updates
        return torch.stack([self._train(model, steps) for model in range(self.cells)])

    def _train(self, number: int, steps: range) -> Tensor:
        model, optimizer, total = self.models[number], self.optimizers[number], torch.zeros((), device=self.x.device)
        for x, epsilon in self._batches(number, steps):
            optimizer.zero_grad()
            loss = model(x, epsilon)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total / len(steps)

    def _batches(self, number: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        for update in steps:
            rows, epsilon = self.draw(number, update)
            yield self.x[rows], epsilon


class Images(Dataset):
    """Images as datasets on disk give them: one picture at a time, made a tensor by `ToTensor`."""

    def __init__(self, x: Tensor):
        side = round(x.shape[1] ** 0.5)
        self.pictures = [to_pil_image(image) for image in (x.cpu() * 255).round().byte().view(-1, 1, side, side)]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[Tensor]:
        return (to_tensor(self.pictures[row]),)


class Script(Loop):
    """The usual script: a `DataLoader`, and `ToTensor` where the data are images."""

    def __init__(self, network: Network, x: Tensor, cells: int, draw: Draw):
        super().__init__(network, x, cells, draw)
        self.dataset = Images(x) if network.model.likelihood == "bernoulli" else TensorDataset(x.cpu())

    def _batches(self, number: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        drawn = [self.draw(number, update) for update in steps]
        loader = DataLoader(self.dataset, batch_sampler=[rows.tolist() for rows, _ in drawn])
        for (images,), (_, epsilon) in zip(loader, drawn, strict=True):
            yield images.to(self.x.device).flatten(1), epsilon


class Vmap:
    """`torch.func` ensembling, with one fused Adam over the stacked parameters."""

    def __init__(self, network: Network, x: Tensor, cells: int, draw: Draw):
        self.x, self.cells, self.draw, self.update = x, cells, draw, 0
        models = plain_models(network, x, cells)
        self.params, _ = stack_module_state(models)
        self.optimizer = torch.optim.Adam(self.params.values(), lr=1e-3, fused=True)
        base = copy.deepcopy(models[0]).to("meta")
        self.gradients = vmap(grad_and_value(lambda params, x, epsilon: functional_call(base, params, (x, epsilon))))

    def advance(self, updates: int) -> Tensor:
        total = torch.zeros(self.cells, device=self.x.device)
        for update in range(self.update, self.update + updates):
            drawn = [self.draw(model, update) for model in range(self.cells)]
            rows, epsilon = (torch.stack(part) for part in zip(*drawn, strict=True))
            grads, loss = self.gradients({k: p.detach() for k, p in self.params.items()}, self.x[rows], epsilon)
            for name, param in self.params.items():
                param.grad = grads[name]
            self.optimizer.step()
            total += loss
        self.update += updates
        return total / updates


class Floor:
    """What no engine of batched float32 products can go below: the products alone, and the optimiser's bytes alone.

    Products in whichever layout is faster here: `batch` before features, or innermost.
    """

    def __init__(self, network: Network, x: Tensor, cells: int):
        self.cells, self.shapes = cells, layer_shapes(network.model, x.shape[1], network.latent_dim)
        layouts = [self._products(x.device, innermost) for innermost in (False, True)]
        self.products = min(layouts, key=self._seconds)
        size = cells * parameter_count(network.model, x.shape[1], network.latent_dim)
        self.source, self.target = torch.randn(size, device=x.device), torch.randn(size, device=x.device)

    def _products(self, device: torch.device, innermost: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Both factors and the place of every product of one update."""

        def values(rows: int, columns: int) -> Tensor:
            return torch.randn(self.cells, rows, columns, device=device)

        found = []
        for number, (i, o) in enumerate(self.shapes):
            weight = values(i, o)
            if innermost:
                x, grad = values(i, BATCH), values(o, BATCH)
                triples = [(weight.mT, x, values(o, BATCH)), (x, grad.mT, values(i, o)), (weight, grad, values(i, BATCH))]
            else:
                x, grad = values(BATCH, i), values(BATCH, o)
                triples = [(x, weight, values(BATCH, o)), (x.mT, grad, values(i, o)), (grad, weight.mT, values(BATCH, i))]
            found += triples if number else triples[:2]  # data need no gradient
        return found

    def _multiply(self, products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        with fast_products(BATCH * min(i * o for i, o in self.shapes)):
            for one, other, out in products:
                torch.bmm(one, other, out=out)

    def _seconds(self, products: list[tuple[Tensor, Tensor, Tensor]]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self._multiply(products)
            _finish(products[0][0].device)
            times.append(time.perf_counter() - start)
        return min(times)

    def advance(self, updates: int) -> None:
        for _ in range(updates):
            self._multiply(self.products)
            for _ in range(ADAM_FLOATS // 2):  # a copy moves two floats
                self.target.copy_(self.source)
            half = len(self.source) // 2
            self.target[:half].copy_(self.source[:half])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Peak:
    """The most memory that was in use, over what was in use before, in MiB; nan where the system does not tell."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        self.before = self._now(reset=True)

    def mib(self) -> float:
        return (self._now() - self.before) / 2**20

    def _now(self, reset: bool = False) -> float:
        if self.device.type == "cuda":
            if reset:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated()
        try:
            if reset:
                Path("/proc/self/clear_refs").write_text("5")
            status = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return float("nan")
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


class Task(NamedTuple):
    """What a process trains."""

    kind: str
    network: str
    device: str
    precision: str
    cells: int
    updates: int  # of all turns

    @property
    def a_process_a_core(self) -> bool:
        """The engine works so, and the floor below it; by itself PyTorch shares one process's work among the cores."""
        return self.kind in ("stack", "floor")


def make_contender(task: Task) -> Contender | Floor:
    network = NETWORKS[task.network]
    x = training_data(network.data).to(task.device)
    if task.kind == "stack":
        keep_freed_memory()
        return Stack(network, x, task.cells, task.updates, task.precision)
    if task.kind == "floor":
        return Floor(network, x, task.cells)
    kinds = {"loop": Loop, "fused loop": partial(Loop, fused=True), "script": Script, "vmap": Vmap}
    return kinds[task.kind](network, x, task.cells, fresh(network, x))


_contender: Contender | Floor
_peak: Peak


def _begin(threads: int, task: Task) -> None:
    global _contender, _peak
    torch.set_num_threads(threads)
    _peak = Peak(torch.device(task.device))
    _contender = make_contender(task)


def _advance(updates: int) -> float:
    """Trains, and tells the peak memory so far."""
    _contender.advance(updates)
    _finish(_peak.device)
    return _peak.mib()


class Processes:
    """A contender in processes of its own, with its share of the cells in each."""

    def __init__(self, task: Task, turn: int):
        count, threads = (min(workers(task.device), task.cells), 1) if task.a_process_a_core else (1, torch.get_num_threads())
        self.cells, self.turn, self.times, self.mib = task.cells, turn, [], 0.0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([StackTrainer.__module__])
        shares = [task.cells // count + (index < task.cells % count) for index in range(count)]
        self.pools = [ProcessPoolExecutor(1, context, _begin, (threads, task._replace(cells=share))) for share in shares]
        self.take_turn()
        self.times.clear()

    def take_turn(self) -> None:
        """One turn; notes the seconds for one update of one cell."""
        start = time.perf_counter()
        self.mib = sum(future.result() for future in [pool.submit(_advance, self.turn) for pool in self.pools])
        self.times.append((time.perf_counter() - start) / self.turn / self.cells)

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.times)

    def over(self, other: Processes) -> float:
        """How many times as long as the other: the median over rounds of their ratio in the same round."""
        return statistics.median(own / its for own, its in zip(self.times[-len(other.times) :], other.times, strict=True))

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown()


def check(network: Network, x: Tensor, precision: str) -> None:
    """Trains two cells with every contender on the same draws; ends the benchmark where one trains something else."""
    draw = replayed(network, x, 2)
    contenders = {
        "loop": Loop(network, x, 2, draw),
        "fused loop": Loop(network, x, 2, draw, fused=True),
        "script": Script(network, x, 2, draw),
        "vmap": Vmap(network, x, 2, draw),
        "stack": Stack(network, x, 2, 10 * CHECKED_UPDATES, precision),
    }
    losses = {name: contender.advance(CHECKED_UPDATES) for name, contender in contenders.items()}
    for name, loss in losses.items():
        off = ((loss - losses["loop"]) / losses["loop"]).abs().max().item()
        if not off < TOLERANCE:
            sys.exit(f"{name}: its loss is off the loop's by {off:.2%}; nothing was timed")
    print(f"Checked: after {CHECKED_UPDATES} updates the losses of all contenders agree within {TOLERANCE:.0%}.\n", flush=True)


HEADS = ["cells", "stack, ms", "floor, ms", "floor/stack", "loop/stack", "fused loop/stack", "script/stack", "vmap/stack"]
HEADS += ["stack, MiB", "vmap, MiB"]
GRID_HEADS = ["cells in the grid", "largest stack", "ms", "MiB"]


def compare(task: Task, counts: list[int], rounds: int) -> Iterator[list[float]]:
    """For each stack size what HEADS says; ms are for one update of one cell, ratios medians over rounds."""
    network = NETWORKS[task.network]
    loops = [Processes(task._replace(kind=kind, cells=1), network.loop_updates) for kind in ("loop", "fused loop", "script")]
    for cells in counts:
        turns = network.updates * max(10, rounds + 1)
        own = [Processes(task._replace(kind=kind, cells=cells, updates=turns), network.updates) for kind in STACKED]
        for _, contender in itertools.product(range(rounds), [*own, *loops]):
            contender.take_turn()
        stack, floor, vmap = own
        ratios = [contender.over(stack) for contender in (floor, *loops, vmap)]
        yield [cells, stack.ms, floor.ms, *ratios, stack.mib, vmap.mib]
        for contender in own:
            contender.close()
    for contender in loops:
        contender.close()


def grid(task: Task, features: int) -> list[float]:
    """What GRID_HEADS says of a grid of `task.cells` cells, in the stacks that the executor would plan."""
    network = NETWORKS[task.network]
    wanted = {str(number): cell for number, cell in enumerate(make_cells(network, task.cells, 1024))}
    sizes = [len(keys) for keys in plan_stacks(wanted, features, task.device)]
    at_once, spent, peak = workers(task.device), 0.0, 0.0
    for start in range(0, len(sizes), at_once):
        count = sum(sizes[start : start + at_once])
        stacks = Processes(task._replace(kind="stack", cells=count, updates=10 * network.updates), network.updates)
        stacks.take_turn()
        spent, peak = spent + stacks.ms * count / task.cells, max(peak, stacks.mib)
        stacks.close()
    return [task.cells, max(sizes), spent, peak]


def fits(task: Task, features: int, cells: int) -> bool:
    """Whether the stack, and vmap beside it, leave some of the memory free."""
    network = NETWORKS[task.network]
    free = torch.cuda.mem_get_info()[0] if task.device == "cuda" else psutil.virtual_memory().available
    return 2.5 * cells * bytes_per_cell(network.model, features, network.latent_dim, BATCH) < 0.9 * free


@click.command(help=__doc__)
@click.option("--network", "chosen", type=click.Choice(list(NETWORKS)), multiple=True, default=list(NETWORKS))
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", default="float32", show_default=True, help="of the stack")
@click.option("--rounds", default=5, show_default=True)
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True, help="stack sizes, and grid sizes from 16 on")
def main(chosen: tuple[str, ...], device: str, precision: str, rounds: int, sizes: str) -> None:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU cores"
    print(f"torch {torch.__version__}, {where}, batch {BATCH}, stack in {precision}, medians of {rounds} rounds")
    counts = [int(size) for size in sizes.split(",")]
    for name in chosen:
        print(f"\n## {name}\n")
        x = training_data(NETWORKS[name].data).to(device)
        check(NETWORKS[name], x, precision)
        task, features = Task("stack", name, device, precision, 1, 0), x.shape[1]
        print_table(compare(task, [cells for cells in counts if fits(task, features, cells)], rounds), HEADS)
        print_table((grid(task._replace(cells=cells), features) for cells in counts if cells >= 16), GRID_HEADS)


def print_table(rows: Iterator[list[float]], heads: list[str]) -> None:
    """A markdown table, each row as soon as it is known."""
    for cells in (heads, ["---"] * len(heads)):
        print("| " + " | ".join(cells) + " |", flush=True)
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" if value >= 1000 else f"{value:.3g}" for value in row) + " |", flush=True)
    print()


if __name__ == "__main__":
    main()
