"""Who proposes trials, and who prunes them: Optuna's samplers and pruners, as a search's file asks for them."""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline import halving
from pipeline.config import ARMS, Scalar
from pipeline.searches import Axis, Search, Space

if TYPE_CHECKING:
    import optuna

STARTUP = 10  # trials drawn at random before TPE or GP begin, as in Optuna; fewer where that ends a batch
# Batches give TPE few rounds, so each has to count: it weighs more candidates than Optuna's 24, and takes fewer trials for good
# ones than Optuna's tenth.
TPE_CANDIDATES = 100
TPE_GOOD = 0.05


def drawn(
    search: Search,
    directions: Sequence[optuna.study.StudyDirection],
    known: Iterable[optuna.trial.FrozenTrial],
    ordinals: Sequence[int],
) -> Iterator[optuna.trial.FrozenTrial]:
    """Trials of these ordinals, drawn in memory after the known ones, and each after the one before."""
    import optuna

    kind, scratch = search.sampler.kind, optuna.create_study(directions=directions, pruner=optuna.pruners.NopPruner())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "grid":
            points = search.grid()
            random.Random(search.sampler.seed).shuffle(points)  # fewer trials than points then cover all of it
            for point in (points[ordinal] for ordinal in ordinals):
                yield optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING, params=point, distributions=distributions(search.space, point)
                )
        elif kind == "qmc":  # a sequence that knows nothing of values: from its start, whoever drew before
            scratch.sampler = optuna.samplers.QMCSampler(seed=search.sampler.seed, scramble=True)
            sequence = [_suggested(scratch, search.space) for _ in range(max(ordinals) + 1)]
            yield from (sequence[ordinal] for ordinal in ordinals)
        else:
            scratch.add_trials(trial for trial in known if trial.state.name != "FAIL")
            for ordinal in ordinals:
                scratch.sampler = _sampler(search, ordinal)
                yield _suggested(scratch, search.space)


def _sampler(search: Search, ordinal: int) -> optuna.samplers.BaseSampler:
    """A sampler for one trial, so that what it draws depends on no other draw."""
    import optuna.samplers as samplers

    seed = int.from_bytes(hashlib.sha256(f"{search.sampler.seed} {ordinal}".encode()).digest()[:4])
    startup = STARTUP - STARTUP % min(STARTUP, search.batch)
    # NSGA-II begins a generation once a population has finished: half of those of a batch, so that each batch is one.
    finishing = halving.finishing(search.batch, search.halving or 1, len(search.rungs))
    return {
        "tpe": lambda: samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup,
            n_ei_candidates=TPE_CANDIDATES,
            gamma=lambda trials: math.ceil(TPE_GOOD * trials),
            constant_liar=True,
        ),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=max(2, finishing // 2)),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }[search.sampler.kind]()


def _suggested(scratch: optuna.Study, space: Space) -> optuna.trial.FrozenTrial:
    trial, at = scratch.ask(), {}
    for name, item in ((name, item) for name, item in space if isinstance(item, Axis)):
        if name == "beta" and ARMS[str(at["arm"])].penalty == "none":
            continue
        at[name] = item.values[0] if item.fixed else _suggest(trial, name, item)
    return scratch.get_trials(deepcopy=False)[trial.number]


def _suggest(trial: optuna.Trial, name: str, item: Axis) -> Scalar:
    if item.values is not None:
        return trial.suggest_categorical(name, item.values)
    if name == "latent_dim":
        return trial.suggest_int(name, int(item.low), int(item.high), log=item.log)
    return trial.suggest_float(name, item.low, item.high, log=item.log)


def distributions(space: Space, names: Iterable[str]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's words for the ranges and lists of varied settings."""
    return {name: _distribution(name, space.varied[name]) for name in names}


def _distribution(name: str, item: Axis) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if item.values is not None:
        return distributions.CategoricalDistribution(item.values)
    if name == "latent_dim":
        return distributions.IntDistribution(int(item.low), int(item.high), log=item.log)
    return distributions.FloatDistribution(item.low, item.high, log=item.log)


def pruner(search: Search, rungs: Sequence[int], updates: int) -> optuna.pruners.BasePruner:
    """What decides across batches; without one in the file, nothing does. `updates` is a trial's whole budget."""
    import optuna.pruners as pruners

    wanted = search.pruner
    if wanted is None:
        return pruners.NopPruner()
    first = min(rungs, default=1)
    return {
        "median": lambda: pruners.MedianPruner(n_startup_trials=wanted.startup),
        "percentile": lambda: pruners.PercentilePruner(wanted.percentile, n_startup_trials=wanted.startup),
        "successive_halving": lambda: pruners.SuccessiveHalvingPruner(first, reduction_factor=wanted.factor),
        "hyperband": lambda: pruners.HyperbandPruner(first, updates, reduction_factor=wanted.factor),
    }[wanted.kind]()
