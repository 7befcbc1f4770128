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

from pipeline import config
from pipeline.intervals import Interval, seed_interval

LEVEL = 0.05
FEWEST_SEEDS = 5
NOT_RUN, UNDECIDED = "not run", "undecided"

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
    """Two-sided p of a claim, and the side that it speaks for. p is NaN where there are too few seeds."""

    p: float
    side: Literal["supported", "contradicted"]
    seeds: int


class Measured(NamedTuple):
    """A study's measures: one row a cell, and one row a cell, kind of noise and level; with axes, `seed` and `unconverged`."""

    cells: pd.DataFrame
    noise: pd.DataFrame


class Side(NamedTuple):
    """One of the things that a test compares: its name, and the measure of each seed, averaged over all else."""

    label: str
    by_seed: pd.Series


class Entry(NamedTuple):
    """A line of the ledger."""

    study: str
    claim: config.Claim
    verdict: str
    sides: Sequence[Side] = ()
    effect: Interval = Interval(math.nan, math.nan, math.nan, 0)
    p: float = math.nan
    corrected: float = math.nan
    cells: tuple[str, ...] = ()
    note: str = ""


def ledger(studies: Mapping[str, config.Study], measured: Mapping[str, Measured]) -> list[Entry]:
    """Every claim of the studies, in order; those whose studies were not all measured are `not run`.

    p is corrected over all that could be decided, the control claims among them. Raises ConfigError where an id stands twice.
    """
    seen: set[str] = set()
    for name, claim in ((name, claim) for name, study in studies.items() for claim in study.claims):
        if claim.id in seen:
            raise config.ConfigError(f"configs/{name}.yaml: claims: another study has a claim '{claim.id}' too")
        seen.add(claim.id)
    entries = [_examine(name, claim, measured) for name, study in studies.items() for claim in study.claims]
    corrected = holm([entry.p for entry in entries])
    return [_with_verdict(entry, p) for entry, p in zip(entries, corrected, strict=True)]


def needed_studies(name: str, claim: config.Claim) -> set[str]:
    """The studies whose cells a claim is about."""
    return {str(side.get("study", name)) for side in claim.test.sides}


def _examine(name: str, claim: config.Claim, measured: Mapping[str, Measured]) -> Entry:
    """An entry with p; the side that it speaks for stands in place of a verdict."""
    if not needed_studies(name, claim) <= set(measured):
        return Entry(name, claim, NOT_RUN)
    sample = Sample(name, claim.test, measured)
    sides = sample.aligned()
    cells, note = tuple(dict.fromkeys(sample.rows["cell_id"])), sample.problem(sides)
    if sides[0].by_seed.empty:
        return Entry(name, claim, UNDECIDED, sides, cells=cells, note=note)
    contrasts = KINDS[claim.test.kind](claim.test, sides)
    decision = decide(contrasts)
    return Entry(name, claim, decision.side, sides, seed_interval(contrasts.effect), decision.p, cells=cells, note=note)


def _with_verdict(entry: Entry, corrected: float) -> Entry:
    if entry.verdict == NOT_RUN:
        return entry
    decided = not entry.note and corrected < LEVEL
    return entry._replace(corrected=corrected, verdict=entry.verdict if decided else UNDECIDED)


class Sample:
    """The cells that a test is about, and its measure of them by seed."""

    def __init__(self, study: str, test: config.Test, measured: Mapping[str, Measured]):
        self.test, self.over = test, list(test.varied)
        self.parts = [_chosen(side, measured[str(side.get("study", study))]) for side in test.sides]
        self.parts = [(metrics, rows.dropna(subset=self.over)) for metrics, rows in self.parts]
        self.rows = pd.concat([rows for _, rows in self.parts], ignore_index=True)

    def aligned(self) -> list[Side]:
        """The sides, or the levels that the test goes over, with the seeds that all of them have in full."""
        sides = [side for over in self.over for side in self._levels(over)]
        sides = sides or [Side(_side_label(self.test, number), _by_seed(*part)) for number, part in enumerate(self.parts)]
        together = pd.concat([side.by_seed for side in sides], axis=1, join="inner").dropna()
        return [Side(side.label, together.iloc[:, number]) for number, side in enumerate(sides)]

    def _levels(self, over: str) -> list[Side]:
        metrics, rows = self.parts[0]
        return [Side(f"{level:g}", _by_seed(metrics, rows[rows[over] == level])) for level in sorted(rows[over].unique())]

    def problem(self, sides: list[Side]) -> str:
        """Why the claim is undecided whatever the numbers say; empty if nothing keeps it from a verdict."""
        seeds = len(sides[0].by_seed)
        cells = self.rows.drop_duplicates("cell_id")
        unconverged = int(cells["unconverged"].astype(bool).sum())
        if not seeds and len(cells):
            return "the metric is not measured in this study"
        if seeds < FEWEST_SEEDS:
            return f"{seeds} seeds, at least {FEWEST_SEEDS} decide"
        return f"{unconverged} of {len(cells)} cells are unconverged" if unconverged else ""


def _chosen(side: Mapping[str, Any], measured: Measured) -> tuple[list[str], pd.DataFrame]:
    """The columns of a side's measures, and the rows of its cells."""
    metrics = list(config.choices(side["metric"]))
    of_noise = metrics[0].startswith("noise/")
    rows = measured.noise if of_noise else measured.cells
    kept = [config.chooses(side, row) for row in rows.to_dict("records")]
    return [metric.removeprefix("noise/") if of_noise else metric for metric in metrics], rows[kept]


def _by_seed(metrics: list[str], rows: pd.DataFrame) -> pd.Series:
    """Means over all but the seed. A seed that lacks cells which others have is left out: its mean would be of other things."""
    if rows.empty or not set(metrics) <= set(rows):
        return pd.Series(dtype=float)
    values = rows[metrics].astype(float).mean(axis=1, skipna=False).dropna()
    groups = values.groupby(rows.loc[values.index, "seed"])
    return groups.mean()[groups.size() == groups.size().max()]


def _side_label(test: config.Test, number: int) -> str:
    """What this side alone chooses, or the metric."""
    keys = test.against if isinstance(test, config.Compared) else ["metric"]
    chosen = (config.choices(test.sides[number].get(key, "this study")) for key in keys)
    return ", ".join(str(value) for values in chosen for value in values)


# Kinds of tests


def _values(sides: list[Side]) -> Levels:
    return np.stack([side.by_seed.to_numpy(dtype=float) for side in sides])


def _count(test: config.CountIs, sides: list[Side]) -> Contrasts:
    numbers = [test.number] if isinstance(test.number, int) else [float(side.label) for side in sides]
    return counts(_values(sides), numbers=numbers)


KINDS: dict[str, Callable[[Any, list[Side]], Contrasts]] = {
    "monotone": lambda test, sides: monotone(_values(sides), down=test.direction == "down"),
    "difference": lambda test, sides: difference(*_values(sides), lower=test.direction == "down"),
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
    """At each level the mean count, rounded, is the level's number; the effect is the mean excess."""
    excess = levels - np.asarray(numbers)[:, None]
    return _all_of([*(excess + 0.5), *(0.5 - excess)], excess.mean(axis=0))


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


def decide(claim: Contrasts) -> Decision:
    """The smaller p of the two sides, doubled because there are two."""
    seeds = len(claim.effect)
    supported, contradicted = _p(claim.says), _p(claim.opposite)
    side = "supported" if supported <= contradicted else "contradicted"
    p = min(1.0, 2 * min(supported, contradicted)) if seeds >= FEWEST_SEEDS else math.nan
    return Decision(p, side, seeds)


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


def _p(hypothesis: Hypothesis) -> float:
    """p against the hypothesis' negation, corrected over its alternatives (Bonferroni)."""
    return min(1.0, len(hypothesis) * min(max(_above_zero(contrast) for contrast in contrasts) for contrasts in hypothesis))


def _above_zero(contrast: Seeds) -> float:
    """One-sided p of Student's t that the mean is above zero; without any spread, 0 or 1."""
    if len(contrast) < 2:
        return 1.0
    if np.ptp(contrast) == 0:
        return 0.0 if contrast[0] > 0 else 1.0
    return float(stats.ttest_1samp(contrast, 0.0, alternative="greater").pvalue)
