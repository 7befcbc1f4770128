"""The statistics over seeds: intervals, paired differences, and the words and digits that they support.

The unit is the seed: cells that share a seed are averaged before anything is counted as a repetition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
CONTROL = "ae"
NEGLIGIBLE = 1e-8  # below the resolution of what float32 training measures


class Interval(NamedTuple):
    """A mean over seeds and its 95% t interval; the interval of a single seed is NaN."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def seed_interval(values: Iterable[float]) -> Interval:
    """The mean of one value a seed, and its 95% t interval. Missing values are left out."""
    known = np.asarray(list(values), dtype=float)
    known = known[~np.isnan(known)]
    if len(known) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    spread = known.std(ddof=1) if len(known) > 1 else math.nan
    half = float(_half_width(spread, len(known)))
    mean = float(known.mean())
    return Interval(mean, mean - half, mean + half, len(known))


def paired_difference(treatment: pd.Series, control: pd.Series) -> Interval:
    """Treatment minus control, seed by seed; both are indexed by seed, and seeds that only one has are left out."""
    for series in (treatment, control):
        if not series.index.is_unique:
            raise ValueError(f"one value a seed must be given, but got seeds {sorted(series.index)}")
    return seed_interval((treatment - control).dropna())


def summarise(table: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """One row a setting: its number of cells, and `m`, `m low`, `m high` for each metric, over seeds.

    Settings keep the order in which they first appear. The number of unconverged cells is added where the table knows it.
    """
    by, metrics = list(by), list(metrics)
    means, halves, _ = _over_seeds(table, by, metrics)
    found = {}
    for metric in metrics:
        found[metric] = means[metric].to_numpy()
        found[f"{metric} low"] = (means[metric] - halves[metric]).to_numpy()
        found[f"{metric} high"] = (means[metric] + halves[metric]).to_numpy()
    return pd.concat([_counts(table, by), pd.DataFrame(found)], axis=1)


def paired_table(table: pd.DataFrame, same: Sequence[str], metric: str) -> pd.DataFrame:
    """Every other arm minus the plain AE that agrees with it on the columns `same` and the seed, over seeds.

    One row for each value of `same`, arm and β: metric, seeds, difference, low, high, and the pairs with an unconverged cell
    where the table knows that. Empty without a plain AE.
    """
    same = list(same)
    keys, by = [*same, "seed"], [*same, "arm", "beta"]
    table = table.assign(unconverged=table.get("unconverged", False))
    names = {metric: "control", "unconverged": "control_unconverged"}
    control = table.loc[table["arm"] == CONTROL, [*keys, *names]].rename(columns=names)
    if control.duplicated(keys).any():
        raise ValueError(f"columns {keys} must tell the plain AEs apart, but several agree on them: name further axes")
    pairs = table[table["arm"] != CONTROL].merge(control, on=keys)
    pairs["difference"] = pairs[metric].astype(float) - pairs["control"].astype(float)
    pairs["unconverged"] = pairs["unconverged"].astype(bool) | pairs["control_unconverged"].astype(bool)
    means, halves, seeds = _over_seeds(pairs, by, ["difference"])
    found = _counts(pairs, by)[[*by, "unconverged"]]
    found["metric"] = metric
    found["seeds"] = seeds["difference"].to_numpy()
    found["difference"] = means["difference"].to_numpy()
    found["low"] = (means["difference"] - halves["difference"]).to_numpy()
    found["high"] = (means["difference"] + halves["difference"]).to_numpy()
    return found


def _counts(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    groups = table.groupby(by, dropna=False, sort=False)
    found = groups.size().rename("cells").reset_index()
    if "unconverged" in table:
        found["unconverged"] = groups["unconverged"].agg(lambda flags: int(flags.astype(bool).sum())).to_numpy(dtype=int)
    return found


def _over_seeds(table: pd.DataFrame, by: list[str], metrics: list[str]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Means, half-widths and numbers of seeds of every setting, in order of first appearance."""
    values = table[[*by, "seed", *metrics]].astype(dict.fromkeys(metrics, float))
    of_seed = values.groupby([*by, "seed"], dropna=False, sort=False)[metrics].mean().reset_index()
    groups = of_seed.groupby(by, dropna=False, sort=False)[metrics]
    means, spreads, seeds = groups.mean(), groups.std(ddof=1), groups.count()
    return means, _half_width(spreads, seeds), seeds


def _half_width(spread, count):
    # scipy gives NaN for no degrees of freedom, which is what a single seed's interval is.
    return spread * stats.t.ppf((1 + LEVEL) / 2, count - 1) / np.sqrt(count)


def comparison(difference: Interval) -> str:
    """How a treatment does against its control, by the interval of their difference in a metric where lower is better."""
    if math.isnan(difference.low):
        return "cannot be told from"
    if difference.low <= 0 <= difference.high:
        return "does not differ from"
    return "beats" if difference.mean < 0 else "loses to"


def change(difference: Interval) -> str:
    """What a change does to a metric, by the interval of the difference."""
    if math.isnan(difference.low):
        return "has too few seeds to tell about"
    if difference.low <= 0 <= difference.high:
        return "does not measurably change"
    return "lowers" if difference.mean < 0 else "raises"


def with_half_width(interval: Interval) -> str:
    """`mean ± half-width` with the digits that the interval supports: `123.4 ± 1.2`."""

    def write(mean: str, low: str, high: str, half: str) -> str:
        return f"{mean} ± {half}"

    return _written(interval, write)


def with_bounds(interval: Interval) -> str:
    """`mean [low, high]` with the digits that the interval supports: `−0.012 [−0.015, −0.009]`."""

    def write(mean: str, low: str, high: str, half: str) -> str:
        return f"{mean} [{low}, {high}]"

    return _written(interval, write)


def plain(value: float, digits: int = 3) -> str:
    """A number that has no interval, to a few significant digits."""
    if math.isnan(value):
        return "–"
    if value == 0 or math.isinf(value) or 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits}g}"
        return (_fixed(value, 0) if "e" in text else text).replace("-", "−")
    exponent = math.floor(math.log10(abs(value)))
    return f"{_fixed(value / 10.0**exponent, digits - 1)} × {_power(exponent)}"


def decimals(half_width: float) -> int:
    """Decimals that a half-width supports: two significant digits of it up to 3.5, one above (the rule of physics' tables)."""
    exponent = math.floor(math.log10(half_width))
    return (1 if half_width / 10.0**exponent < 3.55 else 0) - exponent


def _written(interval: Interval, write: Callable[..., str]) -> str:
    mean, half = interval.mean, interval.half_width
    if not (math.isfinite(mean) and math.isfinite(half)):
        return plain(mean)
    size = max(abs(mean), half)
    if size < NEGLIGIBLE:
        return write("0", "0", "0", "0")
    if half <= 1e-12 * abs(mean):  # every seed gives the same number
        return write(plain(mean, 4), plain(mean, 4), plain(mean, 4), "0")
    if 1e-4 <= size < 1e6:
        return write(*_texts(mean, half))
    exponent = math.floor(math.log10(size))
    scale = 10.0**exponent
    return f"({write(*_texts(mean / scale, half / scale))}) × {_power(exponent)}"


def _texts(mean: float, half: float) -> list[str]:
    digits = decimals(half)
    return [_fixed(value, digits) for value in (mean, mean - half, mean + half, half)]


def _fixed(value: float, digits: int) -> str:
    text = f"{round(value, digits):.{max(digits, 0)}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
