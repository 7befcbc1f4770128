"""What an update's time is: shares of the products and of everything beside them, in one process with one thread.

python benchmarks/update.py [--network 2-30-30-2] [--cells 8]
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import click
import torch
from tabulate import tabulate
from train import NETWORKS, Stack, training_data

from pipeline.devices import keep_freed_memory
from pipeline.mlp import Layer
from pipeline.objective import Objective
from pipeline.trainer import Batches, StackTrainer, _Adam

PARTS = {
    "products": [(Layer, "_product")],
    "Adam": [(_Adam, "step")],
    "cross-entropy or squared error, and its gradient": [(Objective, "reconstruction")],
    "KL and sampling, forward": [(Objective, "penalty"), (Objective, "sample"), (Objective, "posterior")],
    "history: λ term, best weights": [(StackTrainer, "_record")],
    "random numbers": [(Batches, "block")],
}
OTHER = "other: biases, activations, autograd, batches"


class Clock:
    """Seconds by part; a part that another calls counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open, self.since = [OTHER], time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.lap()
            self.open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self.open.pop()

        return wrapper


def measure(name: str, cells: int, turns: int = 8) -> tuple[Clock, int]:
    """The parts' seconds over some turns after one to warm up, and the number of updates."""
    network = NETWORKS[name]
    stack = Stack(network, training_data(network.data), cells, network.updates * max(10, turns + 1))
    stack.advance(network.updates)
    clock = Clock()
    for part, places in PARTS.items():
        for owner, method in places:
            setattr(owner, method, clock.timed(part, getattr(owner, method)))
    clock.since = time.perf_counter()
    for _ in range(turns):
        stack.advance(network.updates)
    clock.lap()
    return clock, turns * network.updates


@click.command(help=__doc__)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="784-400-256-128-8", show_default=True)
@click.option("--cells", default=8, show_default=True)
def main(network: str, cells: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    clock, updates = measure(network, cells)
    total = sum(clock.seconds.values())
    print(f"{network}, {cells} cells: {1e3 * total / updates / cells:.4g} ms for one update of one cell, in one process\n")
    rows = [
        (part, 1e3 * clock.seconds[part] / updates / cells, f"{clock.seconds[part] / total:.1%}") for part in [*PARTS, OTHER]
    ]
    print(tabulate(rows, ["part", "ms", "share"], tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
