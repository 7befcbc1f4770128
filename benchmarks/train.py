"""Training speed, side by side in one run: the stack against a floor, a loop, a script and `torch.func` ensembling.

    python benchmarks/train.py [--network large] [--device cuda] [--rounds 5]

Every contender first trains two equal cells on equal batches and noise; its loss must lie within 1% of the loop's. Then all
take turns, round after round, so that a machine whose speed drifts drifts under all of them; figures are medians over rounds.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import click
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from pipeline.config import Data, Model, Train
from pipeline.datasets import build
from pipeline.executors import bytes_per_cell, choose_stack_size
from pipeline.grid import Cell, parameter_count
from pipeline.model import StackedAutoencoder
from pipeline.trainer import Batches, StackTrainer

BATCH = 128
SIZES = [2**power for power in range(11)]
CHECKED_UPDATES = 128
TOLERANCE = 0.01
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
    x = build(Data(name=name), Path("data"))[0].x["train"]
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

    def __init__(self, network: Network, x: Tensor, cells: int, updates: int):
        self.cells = cells
        self.trainer = StackTrainer(make_cells(network, cells, updates), [x], [x[:BATCH]], x.device)
        self.run, self.point = self.trainer.run(), 0

    def advance(self, updates: int) -> Tensor:
        losses = []
        for progress in self.run:
            losses.append(self.trainer.history[self.point, : self.cells, 0])
            self.point += 1
            if progress.update % updates == 0:
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
    source = Batches(make_cells(network, cells, 1024), [len(x)], x.device)
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
    """What no engine of batched float32 products can go below: the products alone, and the optimiser's bytes alone."""

    def __init__(self, network: Network, x: Tensor, cells: int):
        self.cells = cells
        hidden, z = network.model.hidden, network.latent_dim
        shapes = [*itertools.pairwise([x.shape[1], *hidden, 2 * z]), *itertools.pairwise([z, *reversed(hidden), x.shape[1]])]

        def values(*shape: int) -> Tensor:
            return torch.randn(cells, *shape, device=x.device)

        self.layers = [(values(BATCH, i), values(i, o), values(BATCH, o)) for i, o in shapes]
        self.out = [tuple(torch.empty_like(part) for part in layer) for layer in self.layers]
        size = cells * parameter_count(network.model, x.shape[1], z)
        self.source, self.target = torch.randn(size, device=x.device), torch.randn(size, device=x.device)

    def advance(self, updates: int) -> None:
        for _ in range(updates):
            for number, ((x, weight, grad), (x_out, weight_out, grad_out)) in enumerate(
                zip(self.layers, self.out, strict=True)
            ):
                torch.bmm(x, weight, out=grad_out)
                torch.bmm(x.mT, grad, out=weight_out)
                if number:  # data need no gradient
                    torch.bmm(grad, weight.mT, out=x_out)
            for _ in range(ADAM_FLOATS // 2):  # a copy moves two floats
                self.target.copy_(self.source)
            half = len(self.source) // 2
            self.target[:half].copy_(self.source[:half])


def seconds(contender: Contender | Floor, updates: int, device: torch.device) -> float:
    """Seconds for one update of one cell."""
    _synchronise(device)
    start = time.perf_counter()
    contender.advance(updates)
    _synchronise(device)
    return (time.perf_counter() - start) / updates / contender.cells


def _synchronise(device: torch.device) -> None:
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


def check(network: Network, x: Tensor) -> None:
    """Trains two cells with every contender on the same draws; ends the benchmark where one trains something else."""
    draw = replayed(network, x, 2)
    contenders = {
        "loop": Loop(network, x, 2, draw),
        "loop, fused Adam": Loop(network, x, 2, draw, fused=True),
        "script": Script(network, x, 2, draw),
        "vmap": Vmap(network, x, 2, draw),
        "stack": Stack(network, x, 2, 10 * CHECKED_UPDATES),
    }
    losses = {name: contender.advance(CHECKED_UPDATES) for name, contender in contenders.items()}
    for name, loss in losses.items():
        off = ((loss - losses["loop"]) / losses["loop"]).abs().max().item()
        if not off < TOLERANCE:
            sys.exit(f"{name}: its loss is off the loop's by {off:.2%}; nothing was timed")
    print(f"checked: losses of {len(losses)} contenders agree within {TOLERANCE:.0%}, {losses['loop'].tolist()}", flush=True)


class Row(NamedTuple):
    """Medians over rounds: milliseconds for an update of a cell, and ratios."""

    cells: int
    stack: float
    floor: float
    share: float
    loop: float
    fused: float
    script: float
    vmap: float
    mib: float


def compare(network: Network, x: Tensor, cells: int, rounds: int) -> Row:
    """One stack of that many cells against the contenders, in turns."""
    turn, total = network.updates, network.updates * max(10, rounds + 1)
    peak = Peak(x.device)
    stack = Stack(network, x, cells, total)
    stack.advance(turn)
    mib = peak.mib()
    draw = fresh(network, x)
    turns = {
        "stack": (stack, turn),
        "floor": (Floor(network, x, cells), turn),
        "loop": (Loop(network, x, 1, draw), network.loop_updates),
        "fused": (Loop(network, x, 1, draw, fused=True), network.loop_updates),
        "script": (Script(network, x, 1, draw), network.loop_updates),
        "vmap": (Vmap(network, x, cells, draw), turn),
    }
    for name in turns.keys() - {"stack"}:
        turns[name][0].advance(2)
    times = {name: [] for name in turns}
    for _ in range(rounds):
        for name, (contender, updates) in turns.items():
            times[name].append(seconds(contender, updates, x.device))

    def ratio(name: str) -> float:
        return statistics.median(other / own for other, own in zip(times[name], times["stack"], strict=True))

    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return Row(cells, ms["stack"], ms["floor"], *map(ratio, ("floor", "loop", "fused", "script", "vmap")), mib)


def grid(network: Network, x: Tensor, cells: int, size: int) -> tuple[int, int, float, float]:
    """A grid of that many cells in stacks of the chosen size: milliseconds for an update of a cell, and peak memory."""
    peak, spent = Peak(x.device), 0.0
    sizes = [min(size, cells - start) for start in range(0, cells, size)]
    for count in sizes:
        stack = Stack(network, x, count, 10 * network.updates)
        spent += seconds(stack, network.updates, x.device) * count / cells
    return cells, size, 1e3 * spent, peak.mib()


def fits(network: Network, x: Tensor, cells: int, device: torch.device) -> bool:
    """Whether the stack, and vmap beside it, leave half of the memory free."""
    import psutil

    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    return 2 * cells * bytes_per_cell(network.model, x.shape[1], network.latent_dim, BATCH) < free // 2


@click.command(help=__doc__)
@click.option("--network", "chosen", type=click.Choice(list(NETWORKS)), multiple=True, default=list(NETWORKS))
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True, help="stack sizes, and grid sizes from 16 on")
def main(chosen: tuple[str, ...], device: str, rounds: int, sizes: str) -> None:
    device = torch.device(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, batch {BATCH}, medians of {rounds} rounds")
    for name in chosen:
        network = NETWORKS[name]
        x = training_data(network.data).to(device)
        print(f"\n## {name}\n")
        check(network, x)
        counts = [int(size) for size in sizes.split(",")]
        rows = [compare(network, x, cells, rounds) for cells in counts if fits(network, x, cells, device)]
        heads = ["cells in the stack", "ms", "floor, ms", "floor/stack", "loop/stack", "fused loop/stack", "script/stack"]
        print(tabulate(rows, [*heads, "vmap/stack", "MiB"], tablefmt="github", floatfmt=".3g"), flush=True)
        size = choose_stack_size(make_cells(network, 1, 1024)[0], x.shape[1], device.type)
        grids = [grid(network, x, cells, size) for cells in counts if cells >= 16]
        print(
            "\n" + tabulate(grids, ["cells in the grid", "stack size", "ms", "MiB"], tablefmt="github", floatfmt=".3g"),
            flush=True,
        )


if __name__ == "__main__":
    main()
