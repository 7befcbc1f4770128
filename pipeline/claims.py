"""How a claim is decided: contrasts over seeds, the hypotheses made of them, and what is left of their p after correction.

Every kind of claim says that contrasts, of which each seed gives one value, have positive means: all of them (an
intersection-union test), or all of any one of some alternatives. What would contradict the claim is said in the same way. The
unit is the seed: whatever else varies is averaged before a contrast is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.05
FEWEST_SEEDS = 5

Seeds = Float[np.ndarray, " seed"]
Levels = Float[np.ndarray, "level seed"]
Hypothesis = list[list[Seeds]]
"""Any of these alternatives holds, of which each says that all of its contrasts have positive means."""


class Claim(NamedTuple):
    """What a claim says, what would contradict it, and its effect, one value a seed."""

    says: Hypothesis
    opposite: Hypothesis
    effect: Seeds


class Decision(NamedTuple):
    """Two-sided p of a claim, and the side that it speaks for. p is NaN where there are too few seeds."""

    p: float
    side: Literal["supported", "contradicted"]
    seeds: int


def difference(treatment: Seeds, control: Seeds, *, lower: bool) -> Claim:
    """The treatment's metric is lower (else higher) than that of its control, seed by seed."""
    change = treatment - control
    return _all_of([-change if lower else change], change)


def monotone(levels: Levels, *, down: bool = False) -> Claim:
    """The metric rises (else falls) from each level of an axis to the next; the effect is last minus first."""
    steps = np.diff(levels, axis=0)
    return _all_of(list(-steps if down else steps), levels[-1] - levels[0])


def equal(treatment: Seeds, control: Seeds, *, margin: float) -> Claim:
    """The two differ by less than the margin either way (Schuirmann's two one-sided tests)."""
    change = treatment - control
    return _all_of([margin - change, margin + change], change)


def no_better(treatment: Seeds, control: Seeds, *, margin: float, lower: bool) -> Claim:
    """The treatment does not improve on its control by the margin or more; better is lower (else higher)."""
    change = treatment - control
    return _all_of([margin + change if lower else margin - change], change)


def bound(values: Seeds, *, above: float | None = None, below: float | None = None) -> Claim:
    """The mean lies above the one and below the other, where given."""
    contrasts = [*([] if above is None else [values - above]), *([] if below is None else [below - values])]
    return _all_of(contrasts, values)


def count(values: Seeds, *, number: int) -> Claim:
    """The mean count, rounded, is the number."""
    return bound(values, above=number - 0.5, below=number + 0.5)


def interior_optimum(levels: Levels, *, lowest: bool) -> Claim:
    """Some inner level of an axis is better than both of its ends; better is lower (else higher).

    The effect is the best inner level minus the better end, both chosen by their means.
    """
    worse = levels if lowest else -levels
    first, *inner, last = worse
    says = [[first - level, last - level] for level in inner]
    opposite = [[level - end for level in inner] for end in (first, last)]
    best, end = min(inner, key=np.mean), min((first, last), key=np.mean)
    return Claim(says, opposite, best - end if lowest else end - best)


def decide(claim: Claim) -> Decision:
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


def verdict(decision: Decision, corrected: float, *, converged: bool = True) -> str:
    """`supported`, `contradicted` or `undecided`; what has not converged decides nothing."""
    return decision.side if converged and corrected < LEVEL else "undecided"


def _all_of(contrasts: list[Seeds], effect: Seeds) -> Claim:
    """A claim that all contrasts are positive; it is contradicted by any that is negative."""
    return Claim([contrasts], [[-contrast] for contrast in contrasts], effect)


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
