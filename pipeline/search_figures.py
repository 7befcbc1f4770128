"""Every plot of a search: its tables in, Figure out. Axes carry the names of the search's objectives."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline import drawing
from pipeline.config import Scalar
from pipeline.searches import Goal, Search

STATE_COLOURS = {"complete": "#0072b2", "pruned": "#bbbbbb", "failed": "#cc79a7", "grid": "#d55e00"}
STATE_LABELS = {
    "complete": "finished trial",
    "pruned": "trial that left at a rung",
    "failed": "trial that failed",
    "grid": "cell of the grid",
}
STATE_MARKERS = {"complete": "o", "pruned": ".", "failed": "x", "grid": "s"}
BEST = "#e69f00"


def all_of(search: Search, trials: pd.DataFrame, rungs: pd.DataFrame, importances: pd.DataFrame) -> dict[str, Figure]:
    """The plots that this search has, by name."""
    found = {"history": history(search, trials)}
    if len(search.objectives) == 2:
        found["front"] = front(search, trials)
    if len(rungs):
        found["rungs"] = halving(search, trials, rungs)
    if len(importances):
        found["importances"] = importance_bars(search, importances)
    return found | {"slices": slices(search, trials)}


@drawing.house_style
def front(search: Search, trials: pd.DataFrame) -> Figure:
    """Finished trials and the grid's cells in the plane of two objectives, with the line of those that none dominates."""
    y, x = search.objectives
    figure, axes = drawing.panels(1, 1, height=3.8, width=6.4)
    ax, valued = axes[0, 0], trials.dropna(subset=[x.name, y.name])
    edge = valued[valued["on_front"].astype(bool)].sort_values(x.name)
    ax.plot(edge[x.name], edge[y.name], color="#444444", linewidth=1.0, zorder=2)
    for state, rows in valued.groupby("state"):
        _points(ax, rows, x.name, y.name, state)
    _mark_best(ax, valued, x.name, y.name)
    drawing.label_edges(axes, _label(x), _label(y))
    for _, curve in valued[valued["state"] == "grid"].groupby(
        ["arm", "latent_dim", "l2", "sigma2", "learning_rate"], dropna=False
    ):
        curve = curve.sort_values("beta")
        ax.plot(curve[x.name], curve[y.name], color=STATE_COLOURS["grid"], linewidth=1.0, alpha=0.5, zorder=1.5)
    line = Line2D([], [], color="#444444", linewidth=1.0, label="Pareto front")
    ax.legend(handles=[line, *_handles(valued["state"])], loc="best")
    drawing.title(figure, "Trials and their Pareto front")
    return figure


@drawing.house_style
def history(search: Search, trials: pd.DataFrame) -> Figure:
    """Over trials in the order in which they were drawn: of one objective the values and the best, of two the hypervolume.

    Where trials left at a rung, marks on the axis.
    """
    figure, axes = drawing.panels(1, 1, height=3.0, width=8.0)
    ax, complete = axes[0, 0], trials[trials["state"] == "complete"].sort_values("trial")
    if len(search.objectives) == 1:
        lines = _draw_best_so_far(ax, search.objectives[0], trials, complete)
    else:
        lines = _draw_hypervolume(ax, search.objectives, trials, complete)
    left = trials[trials["state"] == "pruned"]["trial"]
    ax.plot(left, np.full(len(left), 0.03), "|", color="#999999", markersize=6, transform=ax.get_xaxis_transform())
    ax.set_xlabel("trial")
    lines += [Line2D([], [], color="#999999", marker="|", linestyle="", label=STATE_LABELS["pruned"])] if len(left) else []
    drawing.legend(figure, lines)
    drawing.title(figure, "Progress of the search")
    return figure


def _draw_best_so_far(ax: Axes, goal: Goal, trials: pd.DataFrame, complete: pd.DataFrame) -> list[Line2D]:
    valued = trials.dropna(subset=[goal.name])
    for state, rows in valued.groupby("state"):
        _points(ax, rows.assign(trial=rows["trial"].fillna(-1)), "trial", goal.name, state)
    best = complete[goal.name].cummax() if goal.maximised else complete[goal.name].cummin()
    ax.step(complete["trial"], best, where="post", color="#444444", linewidth=1.0, zorder=1.5)
    _mark_best(ax, complete, "trial", goal.name)
    ax.set_ylabel(_label(goal))
    return [*_handles(valued["state"]), Line2D([], [], color="#444444", linewidth=1.0, label="best trial so far")]


def _draw_hypervolume(ax: Axes, goals: Sequence[Goal], trials: pd.DataFrame, complete: pd.DataFrame) -> list[Line2D]:
    """As a share of the box between the worst and the best value of each objective."""
    names, signs = [goal.name for goal in goals], [-1 if goal.maximised else 1 for goal in goals]
    valued = trials.dropna(subset=names)
    points = valued[names] * signs
    unit = (points - points.min()) / (points.max() - points.min()).replace(0, 1)
    grid = unit[valued["state"] == "grid"].to_numpy()
    shares = [
        hypervolume(np.vstack([grid, unit.loc[complete.index[: count + 1]].to_numpy()])) for count in range(len(complete))
    ]
    ax.step(complete["trial"], shares, where="post", color=STATE_COLOURS["complete"], linewidth=1.3)
    ax.plot(complete["trial"], shares, ".", color=STATE_COLOURS["complete"], markersize=5)
    ax.set_ylabel("hypervolume of the front")
    lines = [Line2D([], [], color=STATE_COLOURS["complete"], marker=".", label="grid and trials so far")]
    if len(grid):
        ax.axhline(hypervolume(grid), color=STATE_COLOURS["grid"], linewidth=1.0, linestyle="--")
        lines.append(Line2D([], [], color=STATE_COLOURS["grid"], linewidth=1.0, linestyle="--", label="the grid alone"))
    return lines


def hypervolume(points: np.ndarray) -> float:
    """The area within the unit square that points, both of whose values are to be minimised, dominate."""
    area, floor = 0.0, 1.0
    for x, y in sorted(map(tuple, points)):
        area += (1.0 - x) * max(0.0, floor - y)
        floor = min(floor, y)
    return area


@drawing.house_style
def halving(search: Search, trials: pd.DataFrame, rungs: pd.DataFrame) -> Figure:
    """The values that trials had at the rungs which they reached, and at their end."""
    figure, axes = drawing.panels(1, len(search.objectives), height=3.0, width=9.0)
    ends = trials[trials["state"] == "complete"].assign(update=lambda table: table["updates"])
    states = trials.dropna(subset=["trial"]).set_index("trial")["state"]
    for goal, ax in zip(search.objectives, axes.flat, strict=True):
        values = pd.concat([rungs, ends[["trial", "update", goal.name]]])
        for trial, curve in values.groupby("trial"):
            state = states[trial]
            strong = 0.7 if state == "pruned" else 1.3
            ax.plot(curve["update"], curve[goal.name], ".-", color=STATE_COLOURS[state], linewidth=strong, zorder=strong)
        for update in rungs["update"].unique():
            ax.axvline(update, color="#cccccc", linewidth=0.8, linestyle="--", zorder=0.5)
        ax.set_ylabel(_label(goal))
        ax.set_xlabel("update")
        ax.set_xlim(left=0)
    drawing.legend(figure, _handles(states[values["trial"].unique()], line="-"))
    drawing.title(figure, "Who left at which rung")
    return figure


@drawing.house_style
def importance_bars(search: Search, importances: pd.DataFrame) -> Figure:
    """Each setting's share of the variance of each objective."""
    figure, axes = drawing.panels(1, len(search.objectives), height=1.0 + 0.35 * importances["setting"].nunique(), sharex=True)
    for goal, ax in zip(search.objectives, axes.flat, strict=True):
        rows = importances[importances["goal"] == goal.name].sort_values("importance")
        bars = ax.barh(
            [drawing.words(name) for name in rows["setting"]], rows["importance"], color=STATE_COLOURS["complete"], height=0.6
        )
        ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8.5)
        ax.set_title(_label(goal, width=60))
        ax.grid(visible=False, axis="y")
        ax.set_xlim(0, 1.12)
    drawing.label_edges(axes, "share of variance")
    drawing.title(figure, "Which settings decide")
    return figure


@drawing.house_style
def slices(search: Search, trials: pd.DataFrame) -> Figure:
    """Each objective over each varied setting, one point a finished trial or cell of the grid."""
    varied = search.space.varied
    figure, axes = drawing.panels(
        len(search.objectives), len(varied), height=2.6, width=max(5.0, 3.2 * len(varied)), sharey="row"
    )
    for row, goal in enumerate(search.objectives):
        valued = trials.dropna(subset=[goal.name])
        for column, (name, item) in enumerate(varied.items()):
            ax, rows = axes[row, column], valued.dropna(subset=[name])
            if item.values is None and item.log:
                _log_axis(ax, item.high / item.low)
            elif item.values is not None:
                rows = rows.assign(**{name: rows[name].map(item.index)})
                ax.set_xticks(range(len(item.values)), [_value_label(value) for value in item.values])
            for state, part in rows.groupby("state"):
                _points(ax, part, name, goal.name, state)
            _mark_best(ax, rows, name, goal.name)
            ax.set_xlabel(drawing.words(name) if row == len(search.objectives) - 1 else "")
        axes[row, 0].set_ylabel(_label(goal))
    drawing.legend(figure, _handles(trials.dropna(subset=[search.objectives[0].name])["state"]))
    drawing.title(figure, "Objectives over settings")
    return figure


def _value_label(value: Scalar) -> str:
    return drawing.ARM_LABELS.get(value, value) if isinstance(value, str) else drawing.number(float(value))


def _log_axis(ax: Axes, span: float) -> None:
    """A logarithmic axis with plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if span < 1000 else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: drawing.number(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _points(ax: Axes, rows: pd.DataFrame, x: str, y: str, state: str) -> None:
    ax.plot(
        rows[x], rows[y], STATE_MARKERS[state], color=STATE_COLOURS[state],
        markersize=5, markeredgecolor="white", markeredgewidth=0.5, zorder=3,
    )  # fmt: skip


def _mark_best(ax: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    best = rows[rows["best"].astype(bool)]
    ax.plot(best[x], best[y], "*", color=BEST, markersize=13, markeredgecolor="#222222", markeredgewidth=0.7, zorder=4)


def _handles(states: Iterable[str], line: str = "") -> list[Line2D]:
    known = [state for state in STATE_LABELS if state in set(states)]
    found = [
        Line2D([], [], color=STATE_COLOURS[state], marker=STATE_MARKERS[state], linestyle=line, label=STATE_LABELS[state])
        for state in known
    ]
    star = {"marker": "*", "markersize": 11, "markeredgecolor": "#222222", "markeredgewidth": 0.7}
    return found if line else [*found, Line2D([], [], color=BEST, linestyle="", label="winner", **star)]


def _label(goal: Goal, width: int = 34) -> str:
    return "\n".join(textwrap.wrap(goal.label, width))
