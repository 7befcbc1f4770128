"""What halving loses at which cost: rungs played on whole histories of random trials.

    python benchmarks/rungs.py [--trials 192]

Settings are drawn at random from the space of `search.py`'s task digits5k and trained to the end, each with a seed of its own;
their objective is taken at every candidate rung. Then schedules are played on random draws of 64 of them in batches of 8: by
how much the best trial that is left falls short of the best of all 64, and how many whole trainings it took. As a draw costs
nothing, this tells schedules apart that whole searches, of which each is one draw, cannot. Draws share trials, so their spread
is no standard error.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

import click
import numpy as np
import torch
from scipy.stats import spearmanr
from tabulate import tabulate

from pipeline import halving
from pipeline.devices import keep_freed_memory

DRAWS, OF, BATCH = 200, 64, 8
RUNGS = (60, 75, 90, 105, 120, 150, 180, 225, 270, 300, 375, 450)  # history points of 600 updates
SCHEDULES = [((), 1), *(((rung,), 4) for rung in RUNGS), *((pair, 2) for pair in itertools.combinations(RUNGS, 2))]
DEAREST = 28  # trainings of 64 trials, for a schedule to be shown


def histories(trials: int) -> dict[int, np.ndarray]:
    """The objective of every trial by update; −∞ where it has none."""
    import optuna
    from search import TASKS, a_hunt, prepared, ways

    from pipeline.proposals import distributions

    task = TASKS["digits5k"]
    data, (_, search) = prepared(task), ways(task, 0)["batches of 8"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        hunt = a_hunt(search, data, "cpu", optuna.storages.InMemoryStorage())
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        space = dict(distributions(search.space, search.space.varied))
        settings = [study.ask(space).params for _ in range(trials)]
        cells = [replace(hunt.trials.cell(setting), seed=seed) for seed, setting in enumerate(settings)]
        wanted, found = hunt.identified(cells), {}
        for update in (*RUNGS, search.train.updates):
            for _ in hunt.executor.run(wanted, data, update):
                pass
            values = hunt.values(wanted)
            worth = [values[key][0] if key in values else None for key in wanted]
            found[update] = np.array([-np.inf if value is None else value for value in worth])
            print(f"{trials} trials at update {update}", flush=True)
    return found


def play(values: dict[int, np.ndarray], batch: Sequence[int], rungs: Sequence[int], factor: int) -> tuple[float, float]:
    """What the best that a batch's halving leaves is worth, and how many whole trainings it took."""
    end, left, spent, before = max(values), list(batch), 0, 0
    for update in rungs:
        spent, before = spent + len(left) * (update - before), update
        left = [left[index] for index in halving.survivors([(-values[update][trial],) for trial in left], factor)]
    return max(values[end][left]), (spent + len(left) * (end - before)) / end


def compare(values: dict[int, np.ndarray]) -> Iterator[list]:
    """A row a schedule: rungs, one in how many goes on, trainings, mean loss, and in which share of draws there is none."""
    generator, end = np.random.default_rng(0), max(values)
    draws = [generator.permutation(len(values[end]))[:OF] for _ in range(DRAWS)]
    for rungs, factor in SCHEDULES:
        played = [[play(values, batch, rungs, factor) for batch in draw.reshape(-1, BATCH)] for draw in draws]
        losses = [
            max(values[end][draw]) - max(worth for worth, _ in batches) for draw, batches in zip(draws, played, strict=True)
        ]
        trainings = sum(spent for _, spent in played[0])
        yield [", ".join(map(str, rungs)), factor, trainings, np.mean(losses), f"{100 * np.mean(np.array(losses) == 0):.0f}%"]


@click.command(help=__doc__)
@click.option("--trials", type=click.IntRange(min=OF), default=192, show_default=True)
def main(trials: int) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU cores")
    values = histories(trials)
    end = values[max(values)]
    print(
        f"\nbest values at the end: {', '.join(f'{value:.1f}' for value in np.sort(end)[:-9:-1])}; median {np.median(end):.1f}"
    )
    told = ", ".join(f"{update}: {spearmanr(values[update], end).statistic:.2f}" for update in RUNGS)
    print(f"rank correlation with the end at update {told}\n")
    rows = [row for row in compare(values) if row[2] <= DEAREST or not row[0]]
    heads = ["rungs", "one in", "trainings", "loss in the best, nats", "none in"]
    print(tabulate(sorted(rows, key=lambda row: row[3]), heads, tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
