"""The ledger: how a study's claims are decided, and what is left of their p after correction.

Every kind of test says that contrasts, of which each seed gives one value, have positive means: all of them (an
intersection-union test), or all of any one of some alternatives. What would contradict the claim is said in the same way. The
unit is the seed: whatever else varies is averaged before a contrast is made. A new kind is its schema in `config.py`, a
function here, and its line in KINDS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from pipeline import config, grid
from pipeline.intervals import Interval, seed_interval
from pipeline.measures import find

LEVEL = 0.05
FEWEST_SEEDS = 5
NOT_RUN, UNDECIDED = "not run", "undecided"
NOISE = "noise/"
NO_INTERVAL = Interval(math.nan, math.nan, math.nan, 0)

Seeds = Float[np.ndarray, " seed"]
Levels = Float[np.ndarray, "level seed"]
Hypothesis = list[list[Seeds]]
"""Any of these alternatives holds, of which each says that all of its contrasts have positive means."""


class Contrasts(NamedTuple):
    """What a claim says, what would contradict it, and its effect, one value a seed."""

    says: Hypothesis
    opposite: Hypothesis
    effect: Seeds


class Decision(NamedTuple):
    """Two-sided p of a claim, and the side that it speaks for. p is NaN where there are too few seeds.

    `weakest` is the part of what the claim says that is the least certain.
    """

    p: float
    side: Literal["supported", "contradicted"]
    seeds: int
    weakest: Seeds


class Measured(NamedTuple):
    """A study's measures: one row a cell, and one row a cell, kind of noise and level; with axes, `seed` and `unconverged`."""

    cells: pd.DataFrame
    noise: pd.DataFrame


class Side(NamedTuple):
    """One of the things that a test compares: its level of an axis, and the measure of each seed, averaged over all else.

    `averaged` is the least number of values that a seed's is the mean of.
    """

    level: str
    by_seed: pd.Series
    averaged: int = 1


class Entry(NamedTuple):
    """A line of the ledger."""

    study: str
    claim: config.Claim
    verdict: str
    sides: Sequence[Side] = ()
    effect: Interval = NO_INTERVAL
    margin: Interval = NO_INTERVAL
    """By how much the claim holds in its weakest part; below 0 that does not hold."""
    p: float = math.nan
    corrected: float = math.nan
    note: str = ""
    """Why it is undecided, or which studies have not run."""
    floor: float = 0.0
    """What p would be if all seeds agreed; above 0 where the measure is a count."""


def ledger(studies: Mapping[str, config.Study], measured: Mapping[str, Measured | None]) -> list[Entry]:
    """Every claim of the studies, in order; those whose studies were not all measured are `not run`.

    p is corrected over all that could be decided, the control claims among them. A study is measured as None if no cell of it
    came to an end.
    """
    entries = [_examine(name, claim, studies, measured) for name, study in studies.items() for claim in study.claims]
    corrected = holm([entry.p for entry in entries])
    together = sum(not math.isnan(p) for p in corrected)
    return [_with_verdict(entry, p, together) for entry, p in zip(entries, corrected, strict=True)]


def _examine(
    name: str, claim: config.Claim, studies: Mapping[str, config.Study], measured: Mapping[str, Measured | None]
) -> Entry:
    """An entry with p; the side that it speaks for stands in place of a verdict."""
    about = [str(side.get("study", name)) for side in claim.test.sides]
    if absent := sorted({of for of in about if of not in measured}):
        return Entry(name, claim, NOT_RUN, note=", ".join(absent))
    if lost := sorted({of for of in about if measured[of] is None}):
        return Entry(name, claim, UNDECIDED, note=f"every cell of {', '.join(lost)} diverged or is missing")
    over = list(claim.test.varied)
    parts = [Part(side, over, studies[of], measured[of]) for side, of in zip(claim.test.sides, about, strict=True)]
    if note := _shortage(parts):
        return Entry(name, claim, UNDECIDED, note=note)
    sides = _aligned(claim.test, parts)
    contrasts = KINDS[claim.test.kind](claim.test, sides)
    least_spread = _least_spread(claim.test, sides)
    decision = decide(contrasts, least_spread)
    effect, margin = seed_interval(contrasts.effect), seed_interval(decision.weakest)
    note, floor = _doubt(parts, decision), _floor(contrasts, least_spread)
    return Entry(name, claim, decision.side, sides, effect, margin, decision.p, note=note, floor=floor)


def _with_verdict(entry: Entry, corrected: float, together: int) -> Entry:
    """`together` is how many claims p is corrected over."""
    if entry.verdict == NOT_RUN:
        return entry
    decided = not entry.note and corrected < LEVEL
    note = entry.note
    if note and corrected < LEVEL:
        note = f"would be {entry.verdict}, but {note}"
    elif not note and not decided and entry.floor * together >= LEVEL:
        note = f"if all seeds agreed, p would still be {entry.floor:.2g}"
    return entry._replace(corrected=corrected, verdict=entry.verdict if decided else UNDECIDED, note=note)


class Part:
    """One side of a test: the cells that it is about, those of them that were measured, and the columns of its measures."""

    def __init__(self, side: Mapping[str, Any], over: Sequence[str], study: config.Study, measured: Measured):
        metrics = config.choices(side["metric"])
        of_noise = metrics[0].startswith(NOISE)
        table = measured.noise if of_noise else measured.cells
        self.metrics = [metric.removeprefix(NOISE) if of_noise else metric for metric in metrics]
        self.wanted = [cell.row() for cell in grid.cells(study) if config.chooses(side, cell.row(), over)]
        chosen = np.array([config.chooses(side, row, over) for row in table.to_dict("records")], dtype=bool)
        self.rows = table[chosen]

    @property
    def known(self) -> pd.DataFrame:
        """The rows that have all of the measures."""
        return self.rows.dropna(subset=self.metrics) if set(self.metrics) <= set(self.rows) else self.rows.iloc[:0]

    def side(self, over: str | None = None, level: Any = None) -> Side:
        """The measure of each seed, averaged over all else; of one level of an axis where it is given."""
        rows = self.known if over is None else self.known[self.known[over].astype(float) == level]
        of_seed = rows[self.metrics].astype(float).mean(axis=1).groupby(rows["seed"])
        name = "" if level is None else f"{level:g}"
        return Side(name, of_seed.mean(), len(self.metrics) * int(of_seed.size().min()) if len(rows) else 1)


def _shortage(parts: Sequence[Part]) -> str:
    """What a claim lacks; empty if every cell that it is about was measured."""
    wanted = sum(len(part.wanted) for part in parts)
    there = sum(part.rows["cell_id"].nunique() for part in parts)
    known = sum(part.known["cell_id"].nunique() for part in parts)
    if not known:
        return "the metric is not measured in this study"
    if there < wanted:
        return f"{wanted - there} of {wanted} cells diverged or are missing"
    return f"{there - known} of {wanted} cells have no such value" if known < there else ""


def _doubt(parts: Sequence[Part], decision: Decision) -> str:
    """Why the claim is undecided whatever its numbers say; empty if nothing keeps it from a verdict."""
    cells = pd.concat([part.rows for part in parts]).drop_duplicates("cell_id")
    unconverged = int(cells["unconverged"].astype(bool).sum())
    if decision.seeds < FEWEST_SEEDS:
        return f"{decision.seeds} seeds, at least {FEWEST_SEEDS} decide"
    return f"of {len(cells)} cells {unconverged} did not converge" if unconverged else ""


def _floor(contrasts: Contrasts, least_spread: float) -> float:
    """p if every seed had the mean of all."""
    if not least_spread:
        return 0.0
    says, opposite = (
        [[np.full_like(part, part.mean()) for part in parts] for parts in side] for side in (contrasts.says, contrasts.opposite)
    )
    return decide(contrasts._replace(says=says, opposite=opposite), least_spread).p


def _aligned(test: config.Test, parts: Sequence[Part]) -> list[Side]:
    """The sides, their changes, or the levels that the test goes over, with the seeds that all of them have."""
    sides = [part.side() for part in parts]
    for over in test.varied:
        levels = sorted({float(cell[over]) for cell in parts[0].wanted})
        sides = [parts[0].side(over, level) for level in levels]
    together = pd.concat([side.by_seed for side in sides], axis=1, join="inner")
    sides = [side._replace(by_seed=together.iloc[:, number]) for number, side in enumerate(sides)]
    return _changes(sides) if isinstance(test, config.Interaction) else sides


def _changes(sides: list[Side]) -> list[Side]:
    """Each side's change from its base, which stands as far behind it."""
    changed, bases = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    return [side._replace(by_seed=side.by_seed - base.by_seed) for side, base in zip(changed, bases, strict=True)]


def _least_spread(test: config.Test, sides: list[Side]) -> float:
    """The standard deviation below which equal values say no more: half a step of what can only be counted.

    A count that is one of two neighbours has at most this one, and five equal ones are no proof that the other cannot come. A
    mean of several counts spreads less, and a difference of several more.
    """
    averaged = min(side.averaged for side in sides) * (len(sides) if test.kind == "count" else 1)
    compared = (2 if test.kind in ("monotone", "interior_optimum") else len(test.sides)) / averaged
    return max(find(metric).step for metric in config.choices(test.metric)) / 2 * math.sqrt(compared)


# Kinds of tests


def _values(sides: list[Side]) -> Levels:
    return np.stack([side.by_seed.to_numpy(dtype=float) for side in sides])


def _count(test: config.CountIs, sides: list[Side]) -> Contrasts:
    numbers = [test.number] if isinstance(test.number, int) else [float(side.level) for side in sides]
    return counts(_values(sides), numbers=numbers)


KINDS: dict[str, Callable[[Any, list[Side]], Contrasts]] = {
    "monotone": lambda test, sides: monotone(_values(sides), down=test.direction == "down"),
    "difference": lambda test, sides: difference(*_values(sides), lower=test.direction == "down"),
    "interaction": lambda test, sides: difference(*_values(sides), lower=test.direction == "down"),
    "equal": lambda test, sides: equal(*_values(sides), margin=test.margin),
    "no_better": lambda test, sides: no_better(*_values(sides), margin=test.margin, lower=test.direction == "down"),
    "bound": lambda test, sides: bound(*_values(sides), above=test.above, below=test.below),
    "interior_optimum": lambda test, sides: interior_optimum(_values(sides), lowest=test.direction == "down"),
    "count": _count,
}


def difference(treatment: Seeds, control: Seeds, *, lower: bool) -> Contrasts:
    """The treatment's metric is lower (else higher) than that of its control, seed by seed."""
    change = treatment - control
    return _all_of([-change if lower else change], change)


def monotone(levels: Levels, *, down: bool = False) -> Contrasts:
    """The metric rises (else falls) from each level of an axis to the next; the effect is last minus first."""
    steps = np.diff(levels, axis=0)
    return _all_of(list(-steps if down else steps), levels[-1] - levels[0])


def equal(treatment: Seeds, control: Seeds, *, margin: float) -> Contrasts:
    """The two differ by less than the margin either way (Schuirmann's two one-sided tests)."""
    change = treatment - control
    return _all_of([margin - change, margin + change], change)


def no_better(treatment: Seeds, control: Seeds, *, margin: float, lower: bool) -> Contrasts:
    """The treatment does not improve on its control by the margin or more; better is lower (else higher)."""
    change = treatment - control
    return _all_of([margin + change if lower else margin - change], change)


def bound(values: Seeds, *, above: float | None = None, below: float | None = None) -> Contrasts:
    """The mean lies above the one and below the other, where given."""
    contrasts = [*([] if above is None else [values - above]), *([] if below is None else [below - values])]
    return _all_of(contrasts, values)


def counts(levels: Levels, *, numbers: Sequence[float | int]) -> Contrasts:
    """Counts are off the numbers of their levels by less than a half, on average; the effect is the mean excess."""
    excess = levels - np.asarray(numbers)[:, None]
    return _all_of([0.5 - np.abs(excess).mean(axis=0)], excess.mean(axis=0))


def interior_optimum(levels: Levels, *, lowest: bool) -> Contrasts:
    """Some inner level of an axis is better than both of its ends; better is lower (else higher).

    The effect is the best inner level minus the better end, both chosen by their means.
    """
    worse = levels if lowest else -levels
    first, *inner, last = worse
    says = [[first - level, last - level] for level in inner]
    opposite = [[level - end for level in inner] for end in (first, last)]
    best, end = min(inner, key=np.mean), min((first, last), key=np.mean)
    return Contrasts(says, opposite, best - end if lowest else end - best)


def decide(claim: Contrasts, least_spread: float = 0.0) -> Decision:
    """The smaller p of the two sides, doubled because there are two. No contrast spreads less than `least_spread`."""
    seeds = len(claim.effect)
    (supported, weakest), (contradicted, _) = (_weakest(side, least_spread) for side in (claim.says, claim.opposite))
    side = "supported" if supported <= contradicted else "contradicted"
    p = min(1.0, 2 * min(supported, contradicted)) if seeds >= FEWEST_SEEDS else math.nan
    return Decision(p, side, seeds, weakest)


def holm(p_values: Sequence[float]) -> list[float]:
    """p corrected over those that are known, so that any false one among them passes with at most its level (Holm 1979)."""
    known = [index for index, p in enumerate(p_values) if not math.isnan(p)]
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(sorted(known, key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _all_of(contrasts: list[Seeds], effect: Seeds) -> Contrasts:
    """A claim that all contrasts are positive; it is contradicted by any that is negative."""
    return Contrasts([contrasts], [[-contrast] for contrast in contrasts], effect)


def _weakest(hypothesis: Hypothesis, least_spread: float) -> tuple[float, Seeds]:
    """p against the hypothesis' negation, corrected over its alternatives (Bonferroni), and the contrast that it is of."""
    alternatives = [[(_above_zero(contrast, least_spread), contrast) for contrast in contrasts] for contrasts in hypothesis]
    of_each = [max(contrasts, key=lambda found: found[0]) for contrasts in alternatives]
    p, contrast = min(of_each, key=lambda found: found[0])
    return min(1.0, len(hypothesis) * p), contrast


def _above_zero(contrast: Seeds, least_spread: float) -> float:
    """One-sided p of Student's t that the mean is above zero; of equal values without a least spread, the sign test's."""
    count = len(contrast)
    if count < 2:
        return 1.0
    spread = max(contrast.std(ddof=1), least_spread)
    if spread <= 1e-12 * abs(contrast.mean()):
        return 0.5**count if contrast[0] > 0 else 1.0
    return float(stats.t.sf(contrast.mean() / spread * math.sqrt(count), count - 1)) if spread else 1.0
