"""Every plot, one function a plot: data in, Figure out. No pyplot, so no state between plots; equal data give equal bytes.

Tables over seeds come as `intervals.summarise` makes them: columns `m`, `m low`, `m high` for a metric m.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.stats import norm

from pipeline import artifacts, intervals

HOUSE_STYLE = {
    "figure.dpi": 125,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
# Okabe and Ito's colours, told apart by colour-blind readers; an arm has the same one in every plot.
ARM_COLOURS = {
    "ae": "#d55e00",
    "vae": "#0072b2",
    "ae_code_l2": "#e69f00",
    "ae_as_published": "#cc79a7",
    "kl_only": "#009e73",
}
ARM_LABELS = {
    "ae": "plain AE",
    "vae": "VAE",
    "ae_code_l2": "AE, code L2",
    "ae_as_published": "AE as published",
    "kl_only": "KL only",
}
GREY = "#777777"
GREYS = colormaps["gray_r"].resampled(24)  # of images; each level more makes the PNG larger
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NOISE_LABELS = {
    "sparse_abs_gaussian": "sparse |Gaussian|",
    "gaussian": "Gaussian",
    "salt_and_pepper": "salt and pepper",
    "erased_block": "erased block",
}
TARGET_LABELS = {"clean": "target: clean image", "noisy": "target: noisy image"}
AXIS_WORDS = {"beta": "β", "l2": "λ", "sigma2": "σ²", "train_noise": "noise level in training", "latent_dim": "latents"}
VERDICT_COLOURS = {"supported": "#0072b2", "contradicted": "#d55e00", "undecided": "#999999"}
CRITERIA = {"column_sum": "|column sum|", "column_l1": "column L1 norm", "column_l2": "column L2 norm", "kl": "KL"}
MANIFOLD_SHARES = (0.05, 0.95)


def _house_style(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Any:
        with style.context(["default", HOUSE_STYLE]):
            return draw(*arguments, **options)

    return styled


@_house_style
def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the figure alone: no date, no software version."""
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)  # a third of the size
    artifacts.write_bytes(path, buffer.getvalue())


def arm_label(arm: str, beta: SupportsFloat | None = None) -> str:
    """How plots and tables call an arm: `VAE, β = 4`."""
    name = ARM_LABELS.get(arm, arm)
    return name if beta is None or math.isnan(beta) else f"{name}, β = {number(float(beta))}"


def number(value: float) -> str:
    """A setting's value as plots and tables write it: `1e-5`, not `1e-05`."""
    return re.sub(r"e([-+])0", r"e\1", f"{value:g}").replace("e+", "e")


# Curves over training


@_house_style
def training_curves(curves: pd.DataFrame, by: Sequence[str]) -> Figure:
    """Validation loss against updates: one panel for each value of `panel`, one line for each setting in `by`."""
    panels = list(curves["panel"].unique())
    figure, axes = _wrapped(len(panels), "update", "validation loss (nats)", height=2.5)
    for panel, ax in zip(panels, axes, strict=True):
        _draw_training(ax, _labelled(curves[curves["panel"] == panel]), by)
        ax.set_title(panel)
    _title(figure, "Validation loss over training")
    return figure


def _draw_training(ax: Axes, curves: pd.DataFrame, by: Sequence[str]) -> None:
    colours = _colours(curves)
    for _, setting in curves.groupby(["series", *by], dropna=False, sort=False):
        _line(ax, setting.sort_values("update"), "update", "validation_loss", colours[setting["series"].iloc[0]])
    settled = curves[curves["update"] >= 0.05 * curves["update"].max()]
    low, high = settled["validation_loss"].min(), settled["validation_loss"].max()
    if math.isfinite(low) and high > low:
        room = 0.1 + 0.17 * len(colours)  # for the legend, above the curves
        ax.set_ylim(low - 0.05 * (high - low), high + room * (high - low))
    ax.legend(handles=_handles(colours), loc="upper right", handlelength=1.2)


# Measures over an axis


@_house_style
def measure_over(summary: pd.DataFrame, over: str, metrics: dict[str, str], title: str = "") -> Figure:
    """Measures over an axis, a panel each, with bands over seeds; the values of an axis of names are points, with intervals.

    A line for each arm, and for each β and latent dimension where the table has several. Settings without a value of the
    axis, such as the plain AE's over β, are horizontal.
    """
    table = _labelled(summary, besides=over)
    colours = _colours(table)
    draw = _draw_over if pd.api.types.is_numeric_dtype(table[over]) else _draw_names
    figure, axes = _wrapped(len(metrics), _words(over), height=2.5)
    for ax, (metric, label) in zip(axes, metrics.items(), strict=True):
        draw(ax, table.dropna(subset=[metric]), over, metric, colours)
        ax.set_ylabel(textwrap.fill(label, 30))
    _title(figure, title or f"Measures over {_words(over)}")
    _legend(figure, _handles(colours, marker="o"))
    return figure


def _draw_over(ax: Axes, table: pd.DataFrame, over: str, metric: str, colours: dict) -> None:
    for _, setting in table[table[over].isna()].iterrows():
        _draw_level(ax, setting, metric, colours)
    table = table.dropna(subset=[over])
    _draw_series(ax, table, over, metric, colours)
    _axis_of_levels(ax, sorted(table[over].astype(float).unique()))


def _draw_names(ax: Axes, table: pd.DataFrame, over: str, metric: str, colours: dict) -> None:
    names = list(table[over].unique())
    for place, name in enumerate(names):
        shown = table[table[over] == name].assign(place=place)
        for index, (series, point) in enumerate(shown.groupby("series", sort=False)):
            _count_line(ax, point, "place", metric, colours[series], 0.12 * (index - (shown["series"].nunique() - 1) / 2), "o")
    labels = [(ARM_LABELS | NOISE_LABELS).get(name, _key(name)) for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(names) - 0.5)


def _draw_series(ax: Axes, table: pd.DataFrame, x: str, y: str, colours: dict) -> None:
    for series, curve in table.sort_values(x).groupby("series", sort=False):
        _line(ax, curve, x, y, colours[series], marker="o", markersize=4)


def _draw_level(ax: Axes, setting: pd.Series, metric: str, colours: dict) -> None:
    ax.axhline(setting[metric], color=colours[setting["series"]], linewidth=1.4)
    if math.isfinite(setting[f"{metric} low"]):
        span = (setting[f"{metric} low"], setting[f"{metric} high"])
        ax.axhspan(*span, color=colours[setting["series"]], alpha=0.15, linewidth=0.0)


def _axis_of_levels(ax: Axes, levels: Sequence[float]) -> None:
    """Ticks at the levels, on a log scale where they are far from even; 0, if among them, is then the left edge."""
    positive = [level for level in levels if level > 0]
    if positive and positive[-1] > 2 * len(positive) * positive[0]:
        ax.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        ax.set_xlim(*((0, None) if levels[0] == 0 else (positive[0] / 1.25, None)))
    shown = levels[:: max(1, math.ceil(len(levels) / 6))]
    ax.set_xticks(shown, map(number, shown))
    ax.minorticks_off()


@_house_style
def noise_curves(summary: pd.DataFrame, metric: str, label: str) -> Figure:
    """A measure over the level of noise in training: training targets across, latents down, a line for each arm and β."""
    table = _labelled(summary)
    figure, axes, cells = _noise_panels(table, "target", TARGET_LABELS)
    colours = _colours(table)
    for ax, target, latent_dim in cells:
        shown = table[(table["target"] == target) & (table["latent_dim"] == latent_dim)]
        _draw_series(ax, shown, "train_noise", metric, colours)
    _label_edges(axes, _words("train_noise"), textwrap.fill(label, 30))
    _title(figure, "Noise in training: what it costs, and what the target changes")
    _legend(figure, _handles(colours, marker="o"))
    return figure


# Rate and distortion


@_house_style
def rate_distortion(summary: pd.DataFrame, front: pd.DataFrame | None = None) -> Figure:
    """KL against reconstruction over β, one panel for each latent dimension, one marker for each λ.

    The plain AE has no rate: it is a horizontal line with its interval. `front`, a search's trials (latent_dim, rate,
    distortion, on_front), lies beneath where it is given.
    """
    table = _labelled(summary)
    latent_dims = sorted(table["latent_dim"].unique())
    figure, axes = _panels(1, len(latent_dims), height=3.6)
    for latent_dim, ax in zip(latent_dims, axes.flat, strict=True):
        if front is not None:
            _draw_trials_beneath(ax, front[front["latent_dim"] == latent_dim])
        _draw_rate_distortion(ax, table[table["latent_dim"] == latent_dim], _colours(table), _markers(table["l2"]))
        ax.set_title(_latents(latent_dim))
    _label_edges(axes, "rate: KL (nats per sample)", "distortion: reconstruction (nats per sample)")
    _title(figure, "Rate and distortion: what each β buys")
    _legend(figure, [*_handles(_colours(table)), *_marker_handles(table["l2"]), *_front_handles(front)])
    return figure


def _draw_rate_distortion(ax: Axes, table: pd.DataFrame, colours: dict, markers: dict) -> None:
    for (arm, l2), curve in table.groupby(["arm", "l2"], sort=False):
        curve = curve.dropna(subset=["test/kl", "test/reconstruction"]).sort_values("beta")
        if arm != "ae" and len(curve):
            ax.plot(curve["test/kl"], curve["test/reconstruction"], color="#bbbbbb", linewidth=1.0, zorder=1.5)
        for _, point in curve.iterrows():
            if arm != "ae":
                _cross(ax, point, "test/kl", "test/reconstruction", colours[point["series"]], markers[l2])
    plain = table[table["arm"] == "ae"]
    for _, row in plain[plain["l2"] == plain["l2"].min()].head(1).iterrows():
        _draw_level(ax, row, "test/reconstruction", colours)


def _cross(ax: Axes, point: pd.Series, x: str, y: str, colour: Any, marker: str) -> None:
    spreads = [[[point[m] - point[f"{m} low"]], [point[f"{m} high"] - point[m]]] for m in (x, y)]
    ax.errorbar(
        point[x], point[y], xerr=np.nan_to_num(spreads[0]), yerr=np.nan_to_num(spreads[1]),
        color=colour, marker=marker, markersize=6, markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.2,
    )  # fmt: skip


def _draw_trials_beneath(ax: Axes, trials: pd.DataFrame) -> None:
    ax.plot(trials["rate"], trials["distortion"], ".", color="#cccccc", markersize=4, zorder=1)
    on_front = trials[trials["on_front"].astype(bool)].sort_values("rate")
    ax.plot(on_front["rate"], on_front["distortion"], color=GREY, linewidth=1.0, linestyle=":", zorder=1.2)


def _front_handles(front: pd.DataFrame | None) -> list[Line2D]:
    if front is None:
        return []
    return [
        Line2D([], [], color="#cccccc", marker=".", linestyle="", label="trial of the search"),
        Line2D([], [], color=GREY, linewidth=1.0, linestyle=":", label="front of the search"),
    ]


# Search


@_house_style
def search_front(trials: pd.DataFrame) -> Figure:
    """Every finished trial of a search, coloured by log10 β, and the Pareto front through the best of them."""
    trials = trials.dropna(subset=["rate", "distortion"])
    figure, axes = _panels(1, 1, height=3.8, width=6.4)
    ax = axes[0, 0]
    on_front = trials[trials["on_front"].astype(bool)].sort_values("rate")
    ax.plot(on_front["rate"], on_front["distortion"], color="#444444", linewidth=1.0, zorder=2)
    colour_of = Normalize(*_range(np.log10(trials["beta"])))
    for rows, size, edge in ((trials[~trials["on_front"].astype(bool)], 24, "none"), (on_front, 52, "#222222")):
        options = {"cmap": "viridis", "norm": colour_of, "s": size, "edgecolors": edge, "linewidths": 0.9, "zorder": 3}
        points = ax.scatter(rows["rate"], rows["distortion"], c=np.log10(rows["beta"]), **options)
    figure.colorbar(points, ax=ax, label="log₁₀ β", fraction=0.05, pad=0.02).outline.set_visible(False)
    _label_edges(axes, "rate: KL (nats per sample)", "distortion: reconstruction (nats per sample)")
    ax.legend(
        handles=[
            Line2D([], [], color="#444444", marker="o", markerfacecolor="#cccccc", linewidth=1.0, label="Pareto front"),
            Line2D([], [], color="#bbbbbb", marker="o", markersize=4, linestyle="", label="dominated trial"),
        ],
        loc="upper right",
    )
    _title(figure, "The search's trials and their Pareto front")
    return figure


# Robustness


@_house_style
def robustness(summary: pd.DataFrame, pca: pd.DataFrame | None = None) -> Figure:
    """Error against the clean input over noise level: VAE for each β, AE, and PCA; noise kinds across, latents down."""
    table = _labelled(summary)
    figure, axes, cells = _noise_panels(table)
    colours = _colours(table)
    for ax, kind, latent_dim in cells:
        shown = table[(table["noise"] == kind) & (table["latent_dim"] == latent_dim)]
        if pca is not None:
            line = pca[(pca["noise"] == kind) & (pca["latent_dim"] == latent_dim)].sort_values("level")
            ax.plot(line["level"], line["mse_clean"], color=GREY, linestyle="--", marker=".", linewidth=1.3)
        _draw_series(ax, shown, "level", "mse_clean", colours)
    _label_edges(axes, "noise level", "squared error\nper dimension")
    _title(figure, "Error on corrupted inputs, measured against the clean ones")
    pca_handle = [] if pca is None else [Line2D([], [], color=GREY, linestyle="--", marker=".", label="PCA")]
    _legend(figure, [*_handles(colours, marker="o"), *pca_handle])
    return figure


@_house_style
def paired_differences(paired: pd.DataFrame) -> Figure:
    """Error of each arm minus that of its plain AE, with 95% intervals over seeds, over noise level."""
    table = _labelled(paired)
    figure, axes, cells = _noise_panels(table)
    colours = _colours(table)
    for ax, kind, latent_dim in cells:
        ax.axhline(0, color=ARM_COLOURS["ae"], linewidth=1.4, zorder=1.5)
        shown = table[(table["noise"] == kind) & (table["latent_dim"] == latent_dim)]
        _dodged(ax, shown, colours)
    _label_edges(axes, "noise level", "difference in squared\nerror per dimension")
    _title(figure, "Error minus the plain AE's of the same seed: below the line is better than the AE")
    _legend(figure, [*_handles(colours, marker="o"), Line2D([], [], color=ARM_COLOURS["ae"], label="plain AE (zero)")])
    return figure


def _noise_panels(
    table: pd.DataFrame, across: str = "noise", labels: dict[str, str] = NOISE_LABELS
) -> tuple[Figure, np.ndarray, list[tuple[Axes, str, Any]]]:
    kinds, latent_dims = list(table[across].unique()), sorted(table["latent_dim"].unique())
    figure, axes = _panels(len(latent_dims), len(kinds), height=2.2, sharey="row")
    cells = [(axes[r, c], kind, dim) for r, dim in enumerate(latent_dims) for c, kind in enumerate(kinds)]
    for ax, kind, latent_dim in cells:
        ax.set_title(f"{labels.get(kind, kind)}, {_latents(latent_dim)}")
    return figure, axes, cells


def _dodged(ax: Axes, table: pd.DataFrame, colours: dict) -> None:
    levels = sorted(table["level"].unique())
    gaps = np.diff(levels)
    step = (gaps.min() if len(gaps) else 1.0) * 0.5 / max(1, len(colours))
    for index, (series, colour) in enumerate(colours.items()):
        curve = table[table["series"] == series].sort_values("level")
        spread = np.nan_to_num([curve["difference"] - curve["low"], curve["high"] - curve["difference"]])
        x = curve["level"] + (index - (len(colours) - 1) / 2) * step
        ax.errorbar(x, curve["difference"], yerr=spread, color=colour, marker="o", markersize=4, linewidth=0.9, elinewidth=1.6)
    ax.set_xticks(levels)


# PCA


@_house_style
def pca_curve(pca: pd.DataFrame, models: pd.DataFrame) -> Figure:
    """Variance that each principal component explains, and all up to it; and PCA's error beside that of models as wide."""
    table = _labelled(models)
    colours = _colours(table)
    figure, axes = _panels(1, 2, height=3.2)
    axes[0, 0].plot(pca["components"], pca["variance_ratio"].cumsum(), color=GREY, label="all up to this one")
    axes[0, 0].plot(pca["components"], pca["variance_ratio"], color=GREY, linestyle="--", label="each component")
    axes[0, 0].legend(loc="best")
    axes[0, 1].plot(pca["components"], pca["mse"], color=GREY)
    for index, (series, colour) in enumerate(colours.items()):
        shown = table[table["series"] == series].sort_values("latent_dim")
        beside = shown.assign(place=shown["latent_dim"] * 1.04 ** (index - (len(colours) - 1) / 2))  # or markers would overlap
        _count_line(axes[0, 1], beside, "place", "mse", colour, 0.0, "o")
    for ax, label in zip(axes.flat, ("share of variance explained", "squared error per dimension"), strict=True):
        ax.set(ylabel=label, xlabel="principal components, or latents", ylim=(0, None))
        _axis_of_levels(ax, [2.0**power for power in range(int(pca["components"].max()).bit_length())])
    _title(figure, "PCA: variance explained and error, beside models of as many latents")
    _legend(figure, [Line2D([], [], color=GREY, label="PCA"), *_handles(colours, marker="o")])
    return figure


# Pruning


@_house_style
def scree(columns: pd.DataFrame, truth: str | None = None) -> Figure:
    """How much each latent dimension is used, sorted within each cell and averaged over seeds.

    Rows are arms; a line for each value of the data axis `truth`. Beside |column sum| and the L2 norm stands the KL, or
    for an arm without one the variance of the code.
    """
    table = _labelled(columns)
    series = list(_colours(table))
    figure, axes = _panels(len(series), 3, height=2.3)
    colours = _truth_colours(table, truth)
    for row, name in zip(axes, series, strict=True):
        shown = table[table["series"] == name]
        last = ("kl", "KL (nats)") if shown["kl"].notna().any() else ("mean_variance", "variance of the code")
        for ax, (measure, label) in zip(
            row, [("column_sum", "|column sum|"), ("column_l2", "column L2 norm"), last], strict=True
        ):
            _draw_scree(ax, shown, measure, truth, colours)
            ax.set_ylabel(label)
            ax.set_title(name)
    _label_edges(axes, "rank of the latent dimension")
    _title(figure, "Scree: first decoder layer's columns, and what each dimension carries")
    _legend(figure, _handles(colours), title=_words(truth))
    return figure


def _draw_scree(ax: Axes, columns: pd.DataFrame, measure: str, truth: str | None, colours: dict) -> None:
    ranked = columns.assign(rank=columns.groupby("cell_id")[measure].rank(ascending=False, method="first"))
    for key, colour in colours.items():
        lines = ranked if truth is None else ranked[ranked[truth].map(_key) == key]
        mean = lines.groupby("rank")[measure].mean()
        ax.plot(mean.index, mean, color=colour, marker=".", linewidth=1.2)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


@_house_style
def ablation(curves: pd.DataFrame, truth: str | None = None) -> Figure:
    """Error as dimensions are zeroed, smallest first in each criterion's order; a ring where only the true number is left."""
    table = _labelled(curves)
    series, criteria = list(_colours(table)), [name for name in CRITERIA if name in set(table["criterion"])]
    figure, axes = _panels(len(series), len(criteria), height=2.3, sharey="row")
    colours = _truth_colours(table, truth)
    for row, name in zip(axes, series, strict=True):
        for ax, criterion in zip(row, criteria, strict=True):
            shown = table[(table["series"] == name) & (table["criterion"] == criterion)]
            _draw_ablation(ax, shown, truth, colours)
            ax.set_title(f"{name}\nby {CRITERIA[criterion]}")
    _label_edges(axes, "dimensions set to zero", "squared error\nper dimension")
    _title(figure, "Ablation: error as the least used dimensions are zeroed")
    ring = Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label="true number left")
    _legend(figure, [*_handles(colours), *([ring] if truth else [])], title=_words(truth))
    return figure


def _draw_ablation(ax: Axes, table: pd.DataFrame, truth: str | None, colours: dict) -> None:
    if table.empty:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "(this arm has none)", transform=ax.transAxes, ha="center", color=GREY)
        return
    for key, colour in colours.items():
        curve = table if truth is None else table[table[truth].map(_key) == key]
        curve = curve.sort_values("zeroed")
        _line(ax, curve, "zeroed", "mse", colour)
        if truth is not None:
            true_left = curve[curve["zeroed"] == curve["latent_dim"] - curve[truth]]
            ax.plot(true_left["zeroed"], true_left["mse"], "o", color=colour, markerfacecolor="white", zorder=3)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


@_house_style
def used_dimensions(counts: pd.DataFrame, truth: str, measures: dict[str, str]) -> Figure:
    """Counts of used dimensions against the true one, with intervals over seeds and the diagonal; a panel for each arm."""
    table = _labelled(counts)
    series = list(_colours(table))
    figure, axes = _panels(1, len(series), height=3.4, sharey=True)
    colours = dict(zip(measures, sns.color_palette("colorblind", len(measures)), strict=True))
    for ax, name in zip(axes.flat, series, strict=True):
        shown = table[table["series"] == name].sort_values(truth)
        ax.plot(shown[truth], shown[truth], color="#cccccc", linewidth=6.0, solid_capstyle="round", zorder=1)
        for index, measure in enumerate(measures):
            _count_line(ax, shown, truth, measure, colours[measure], (index - (len(measures) - 1) / 2) * 0.12, MARKERS[index])
        ax.set_title(name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _label_edges(axes, f"true dimension ({_words(truth)})", "dimensions counted as used")
    _title(figure, "Used dimensions against the true dimension of the data")
    handles = [
        Line2D([], [], color=colours[m], marker=MARKERS[i], label=label) for i, (m, label) in enumerate(measures.items())
    ]
    _legend(figure, [*handles, Line2D([], [], color="#cccccc", linewidth=6.0, label="true dimension")])
    return figure


def _count_line(ax: Axes, table: pd.DataFrame, x: str, measure: str, colour: Any, shift: float, marker: str) -> None:
    known = table.dropna(subset=[measure])
    spread = np.nan_to_num([known[measure] - known[f"{measure} low"], known[f"{measure} high"] - known[measure]])
    ax.errorbar(known[x] + shift, known[measure], yerr=spread, color=colour, marker=marker, linewidth=1.0, elinewidth=1.4)


# Grids


@_house_style
def heat_map(summary: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """Means of metrics over β (across, after the plain AE) and λ (up): a row for each metric, a column for each latent_dim."""
    latent_dims = sorted(summary["latent_dim"].unique())
    figure, axes = _panels(len(metrics), len(latent_dims), height=2.7, sharey=False)
    for row, (metric, label) in zip(axes, metrics.items(), strict=True):
        limits = _range(summary[metric])
        for ax, latent_dim in zip(row, latent_dims, strict=True):
            _draw_heat(ax, summary[summary["latent_dim"] == latent_dim], metric, limits)
            ax.set_title(f"{label}, {_latents(latent_dim)}")
    _label_edges(axes, "β", "λ")
    _title(figure, "What β and λ do, as means over seeds")
    return figure


def _draw_heat(ax: Axes, table: pd.DataFrame, metric: str, limits: tuple[float, float]) -> None:
    kept = table.dropna(subset=[metric])
    kept = kept.assign(column=kept["beta"].fillna(-1.0))
    grid = kept.pivot_table(index="l2", columns="column", values=metric, sort=True).iloc[::-1]
    _draw_grid(ax, grid.rename(columns=lambda beta: "AE" if beta < 0 else number(beta), index=number), "crest", limits)


def _draw_grid(ax: Axes, grid: pd.DataFrame, colour_map: str, limits: tuple[float, float], digits: int = 3) -> None:
    options = {"annot_kws": {"size": 8}, "linewidths": 1.5, "cbar": False, "vmin": limits[0], "vmax": limits[1]}
    texts = grid.map(lambda value: "" if math.isnan(value) else _short(value, digits))
    sns.heatmap(grid, annot=texts, fmt="", ax=ax, cmap=colour_map, xticklabels=True, yticklabels=True, **options)
    ax.tick_params(length=0, rotation=0)
    ax.grid(False)


@_house_style
def outlier_map(summary: pd.DataFrame, x: str, y: str, metric: str, label: str) -> Figure:
    """Means of a metric over two axes of the data: a row for each arm, with the plain AE, the arm, and the arm minus the AE."""
    table = _labelled(summary)
    grids = {series: _grid_of(table[table["series"] == series], x, y, metric) for series in _colours(table)}
    plain = grids.pop(ARM_LABELS["ae"])
    figure, axes = _panels(len(grids), 3, height=2.7)
    limits, most = _range(table[metric]), max(float(np.nanmax(abs(grid - plain))) for grid in grids.values())
    for row, (name, grid) in zip(axes, grids.items(), strict=True):
        for ax, shown, title in zip(row, (plain, grid), (ARM_LABELS["ae"], name), strict=False):
            _draw_grid(ax, shown, "crest", limits)
            ax.set_title(title)
        _draw_grid(row[2], grid - plain, "vlag", (-most, most), digits=2)
        row[2].set_title(f"{name} minus {ARM_LABELS['ae']}")
    _label_edges(axes, _words(x), _words(y))
    _title(figure, f"{label} over {_words(x)} and {_words(y)}, as means over seeds")
    return figure


def _grid_of(table: pd.DataFrame, x: str, y: str, metric: str) -> pd.DataFrame:
    grid = table.pivot_table(index=y, columns=x, values=metric, sort=True).iloc[::-1]
    return grid.rename(columns=_key, index=_key)


# Claims


@_house_style
def ledger(claims: pd.DataFrame) -> Figure:
    """Every claim's effect with its 95% interval, scaled so that the far end of the interval is at 1 or −1; by source.

    The numbers stand on the right. Claims without one of the three verdicts, such as those not run, are left out.
    """
    claims = claims[claims["verdict"].isin(VERDICT_COLOURS)]
    claims = claims.assign(group=pd.factorize(claims["source"])[0]).sort_values("group", kind="stable")
    claims["place"] = np.arange(len(claims)) + claims["group"] + 1  # a line above each group is its source's
    lines = len(claims) + claims["group"].nunique()
    figure, axes = _panels(1, 1, height=0.18 * lines + 0.5)
    axes[0, 0].axvline(0, color="#444444", linewidth=1.0)
    axes[0, 0].set(xlim=(-1.08, 1.08), ylim=(lines - 0.4, -0.6))
    for claim in claims.itertuples():
        _draw_claim(axes[0, 0], claim)
    _label_claims(axes[0, 0], claims)
    _label_edges(axes, "effect, scaled by its interval's far end", "claim")
    _title(figure, "The claims: effects with 95% intervals")
    figure.legend(handles=_handles(VERDICT_COLOURS, marker="o"), loc="outside upper right", ncols=3)
    return figure


def _label_claims(ax: Axes, claims: pd.DataFrame) -> None:
    right = ax.secondary_yaxis("right")
    ax.set_yticks(claims["place"], claims["id"])
    right.set_yticks(claims["place"], [_effect(claim) for claim in claims.itertuples()])
    right.spines[:].set_visible(False)
    for side in (ax, right):
        side.tick_params(axis="y", length=0)
    heading = {"fontweight": "bold", "fontsize": 8.5, "va": "center", "backgroundcolor": "white"}
    for source, place in claims.groupby("source", sort=False)["place"].min().items():
        ax.text(-1.05, place - 1, textwrap.shorten(str(source), 70), **heading)


def _draw_claim(ax: Axes, claim: Any) -> None:
    scale, colour = max(abs(claim.low), abs(claim.high), 1e-300), VERDICT_COLOURS[claim.verdict]
    ax.plot([claim.low / scale, claim.high / scale], [claim.place] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
    ax.plot(claim.effect / scale, claim.place, "o", color=colour, markeredgecolor="white", markeredgewidth=0.6)


def _effect(claim: Any) -> str:
    return intervals.with_bounds(intervals.Interval(claim.effect, claim.low, claim.high, 0))


class ClaimPanel(NamedTuple):
    """What decides a claim: a measure of each seed on each side or level, and the numbers it is held against."""

    id: str
    verdict: str
    measure: str
    axis: str
    sides: Sequence[str]
    values: np.ndarray  # [side, seed]
    limits: Sequence[float]


@_house_style
def claim_panels(claims: Sequence[ClaimPanel]) -> Figure:
    """A panel a claim: its seeds as thin lines from side to side, their means with 95% intervals, its bounds dashed."""
    figure, axes = _wrapped(len(claims), "", height=2.5)
    for ax, claim in zip(axes, claims, strict=True):
        _draw_sides(ax, claim)
        ax.set_title(f"{claim.id}: {claim.verdict}", color=VERDICT_COLOURS[claim.verdict])
        ax.set_ylabel(textwrap.fill(claim.measure, 28), fontsize=8.5)
        ax.set_xlabel(claim.axis)
    _title(figure, "What decides the claims")
    return figure


def _draw_sides(ax: Axes, claim: ClaimPanel) -> None:
    places, colour = np.arange(len(claim.sides)), VERDICT_COLOURS[claim.verdict]
    width = 0.25 if len(places) == 1 else 0.0  # no lines tell the seeds of a lone side apart
    for shift, seed in zip(np.linspace(-width, width, claim.values.shape[1]), claim.values.T, strict=True):
        ax.plot(places + shift, seed, color="#bbbbbb", linewidth=0.8, marker=".", markersize=4, zorder=1.5)
    found = [intervals.seed_interval(side) for side in claim.values]
    spread = [np.nan_to_num(interval.half_width) for interval in found]
    ax.errorbar(places, [interval.mean for interval in found], yerr=spread, color=colour, marker="o", linewidth=1.6, zorder=3)
    for limit in claim.limits:
        ax.axhline(limit, color="#444444", linestyle="--", linewidth=1.0)
    ax.set_xticks(places, [textwrap.fill(side, 16) for side in claim.sides])
    ax.set_xlim(-0.5, len(places) - 0.5)


# Pictures of cells


@_house_style
def reconstructions(inputs: np.ndarray, outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """Inputs and their reconstructions: pairs of images, points in the plane, or value against value."""
    if image_shape is not None:
        return _image_pairs(inputs, outputs, image_shape)
    if inputs.shape[1] == 2:
        figure, axes = _panels(1, 2, height=3.6, width=7.2)
        _quadrant_scatter(axes[0, 0], inputs, inputs, "input")
        _quadrant_scatter(axes[0, 1], outputs, inputs, "reconstruction")
        _same_frame(axes[0, 0], axes[0, 1])
        _title(figure, "Inputs and their reconstructions")
        return figure
    figure, axes = _panels(1, 1, height=4.0, width=4.4)
    axes[0, 0].plot(inputs[:100].ravel(), outputs[:100].ravel(), ".", color=ARM_COLOURS["vae"], markersize=2, alpha=0.4)
    axes[0, 0].axline((0, 0), slope=1, color=GREY, linestyle="--", linewidth=1.0)
    _label_edges(axes, "input value", "reconstructed value")
    _title(figure, "Reconstruction against input")
    return figure


@_house_style
def plane(inputs: np.ndarray, codes: np.ndarray, outputs: np.ndarray, title: str = "") -> Figure:
    """Data of two dimensions: input, code and reconstruction side by side, coloured by the input's quadrant."""
    figure, axes = _panels(1, 3, height=2.75)
    _quadrant_scatter(axes[0, 0], inputs, inputs, "input")
    _quadrant_scatter(axes[0, 1], codes, inputs, "latent")
    _quadrant_scatter(axes[0, 2], outputs, inputs, "reconstruction")
    _same_frame(axes[0, 0], axes[0, 2])
    _title(figure, title or "Input, latent code and reconstruction, coloured by the input's quadrant")
    return figure


@_house_style
def quadrant_lattice(cells: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Data of two dimensions: codes and reconstructions of cells over arm (across) and λ (up), beside the input.

    Points are coloured by the input's quadrant. All reconstructions lie in one frame with the input; codes have a frame each,
    at least 0.2 wide, so that a collapsed code is a dot.
    """
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    rows = sorted({float(cell["l2"]) for cell in cells}, reverse=True)
    ratios = [*[1, 1, 0.15] * len(columns), 1]
    figure, axes = _panels(len(rows), len(ratios), height=8.8 / sum(ratios), width_ratios=ratios)
    figure.get_layout_engine().set(w_pad=0.02, wspace=0.0)
    for ax in axes.flat:
        _no_ticks(ax, "", "")
    framed = [_lattice_panel(axes[0, -1], cells[0]["x"], cells[0]["x"])]
    for cell in cells:
        row, column = rows.index(cell["l2"]), 3 * columns.index(cell["column"])
        _own_frame(_lattice_panel(axes[row, column], cell["codes"], cell["x"]), cell["codes"])
        framed.append(_lattice_panel(axes[row, column + 1], cell["reconstructions"], cell["x"]))
    _same_frame(*framed)
    _label_lattice(axes, columns, rows)
    _title(figure, title or "Latent codes and reconstructions over β and λ, coloured by the input's quadrant")
    return figure


def _lattice_panel(ax: Axes, points: np.ndarray, inputs: np.ndarray) -> Axes:
    _quadrant_scatter(ax, points, inputs, "", size=1.6)
    _no_ticks(ax, "", "")
    ax.spines[:].set(visible=True, color="#bbbbbb")
    return ax


def _own_frame(ax: Axes, codes: np.ndarray) -> None:
    middle = (codes.min(axis=0) + codes.max(axis=0)) / 2
    half = max(0.1, 1.08 * np.ptp(codes, axis=0).max() / 2)
    for dimension, place in zip("xy", middle, strict=False):
        ax.set(**{f"{dimension}lim": (place - half, place + half)})


def _label_lattice(axes: np.ndarray, columns: Sequence[str], rows: Sequence[float]) -> None:
    axes[0, -1].set_title("input")
    for index, label in enumerate(columns):
        axes[0, 3 * index].set_title(label, x=1.05)  # over both panels
        axes[-1, 3 * index].set_xlabel("code")
        axes[-1, 3 * index + 1].set_xlabel("decoded")
    for ax, l2 in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"λ = {number(l2)}")


@_house_style
def latent_scatter(codes: np.ndarray, labels: np.ndarray | None = None, names: Sequence[str] | None = None) -> Figure:
    """Codes coloured by label: one latent as strips, two as they are, more on their first two principal components."""
    figure, axes = _panels(1, 1, height=4.4, width=5.6)
    ax = axes[0, 0]
    labels = np.zeros(len(codes), dtype=int) if labels is None else np.asarray(labels).astype(int)
    names = names or [str(label) for label in range(labels.max(initial=0) + 1)]
    shown, x, y = _shown_codes(codes, labels)
    _class_scatter(ax, shown, labels, _class_colours(names), size=3.5)
    if codes.shape[1] == 1:
        ax.set_yticks(np.unique(labels), [names[label] for label in np.unique(labels)])
    elif len(np.unique(labels)) > 1:
        _legend(figure, _handles(_class_colours(names), marker="o", linestyle=""))
    _label_edges(axes, x, y)
    _title(figure, "Codes of the test set")
    return figure


@_house_style
def latent_spaces(spaces: Sequence[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str]) -> Figure:
    """Spaces of two latents beside each other, coloured by class; a space is its title, codes and labels."""
    figure, axes = _wrapped(len(spaces), "latent 0", "latent 1", height=2.6)
    for ax, (title, codes, labels) in zip(axes, spaces, strict=True):
        _class_scatter(ax, codes, labels, _class_colours(names), size=2.0)
        ax.set_title(title)
        ax.set_box_aspect(1)
    _title(figure, "Latent spaces, coloured by class")
    _legend(figure, _handles(_class_colours(names), marker="o", linestyle=""))
    return figure


def _class_colours(names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def _class_scatter(ax: Axes, points: np.ndarray, labels: np.ndarray, colours: dict[str, Any], size: float) -> None:
    for label, colour in enumerate(colours.values()):
        ax.plot(*points[labels == label].T, ".", color=colour, markersize=size, alpha=0.7)


@_house_style
def manifold(outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """What the decoder makes of `manifold_codes`: images in a grid, or the grid's lines in the plane of 2-D data."""
    side = math.isqrt(len(outputs))
    if image_shape is None:
        figure, axes = _panels(1, 1, height=4.0, width=4.4)
        grid = outputs.reshape(side, side, -1)[..., :2]
        for lines in (grid, grid.swapaxes(0, 1)):
            axes[0, 0].plot(lines[..., 0], lines[..., 1], color=ARM_COLOURS["vae"], linewidth=0.9)
        _label_edges(axes, "dimension 0", "dimension 1")
        axes[0, 0].set_aspect("equal")
    else:
        figure, axes = _panels(1, 1, height=5.0, width=5.0)
        words = [f"latent {k}, prior quantiles {MANIFOLD_SHARES[0]:g} to {MANIFOLD_SHARES[1]:g}" for k in (0, 1)]
        _show(axes[0, 0], outputs, image_shape, side, *words)
    _title(figure, "The decoder's manifold under the prior")
    return figure


@_house_style
def boot_axes(outputs: np.ndarray, image_shape: Sequence[int], x: str, y: str) -> Figure:
    """What the decoder makes of `manifold_codes` in two of its latents, and what these two stand for in words."""
    side = math.isqrt(len(outputs))
    figure, axes = _panels(1, 1, height=5.0, width=5.4)
    ax, labels = axes[0, 0], [f"{value:.1f}".replace("-", "−") for value in manifold_codes(side)[:side, 0].round(1) + 0.0]
    _show(ax, outputs, image_shape, side, x, y)
    shown = slice(None, None, math.ceil(side / 10))  # or the labels would touch
    ax.set_xticks(_middles(side, image_shape[-1])[shown], labels[shown])
    ax.set_yticks(_middles(side, image_shape[-2])[shown], labels[::-1][shown])
    ax.tick_params(length=0)
    _title(figure, "Decoded boots over two latents")
    return figure


def manifold_codes(side: int = 15) -> np.ndarray:
    """`side`² codes of two latents, evenly spaced in prior probability on [0.05, 0.95]: row by row, latent 1 falling."""
    values = norm.ppf(np.linspace(*MANIFOLD_SHARES, side))
    return np.stack([np.tile(values, side), np.repeat(values[::-1], side)], axis=1).astype(np.float32)


@_house_style
def samples(outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """What the decoder makes of draws from the prior: images in a grid, or points."""
    if image_shape is None:
        figure, axes = _panels(1, 1, height=4.0, width=4.4)
        points = outputs if outputs.shape[1] > 1 else np.column_stack([outputs[:, 0], _spread(len(outputs))])
        axes[0, 0].plot(points[:, 0], points[:, 1], ".", color=ARM_COLOURS["vae"], markersize=3, alpha=0.6)
        _label_edges(axes, "dimension 0", "dimension 1")
    else:
        figure, axes = _panels(1, 1, height=4.2, width=4.2)
        _show(axes[0, 0], outputs, image_shape, math.isqrt(len(outputs)), "decoded draws from N(0, I)")
    _title(figure, "Samples from the prior")
    return figure


@_house_style
def sample_sheets(
    sheets: Sequence[tuple[str, np.ndarray]],
    image_shape: Sequence[int],
    title: str = "Samples from the prior",
    x: str = "decoded draws from N(0, I)",
    y: str = "",
) -> Figure:
    """Square sheets of decoded images, such as samples or manifolds, one a model, beside each other."""
    figure, axes = _wrapped(len(sheets), "", height=3.05)
    for ax, (name, outputs) in zip(axes, sheets, strict=True):
        _show(ax, outputs, image_shape, math.isqrt(len(outputs)), x, y)
        ax.set_title(name)
    _title(figure, title)
    return figure


@_house_style
def interpolations(rows: Sequence[tuple[str, np.ndarray]], image_shape: Sequence[int]) -> Figure:
    """Decoded steps from one code to another, a row each; rows of one label, a model, lie together."""
    models = {label: [images for name, images in rows if name == label] for label, _ in rows}
    steps, heights = len(rows[0][1]), [len(of_model) for of_model in models.values()]
    figure, axes = _panels(len(models), 1, height=(0.54 * len(rows) + 0.4) / len(models), width=7.0, height_ratios=heights)
    for ax, (label, of_model) in zip(axes.flat, models.items(), strict=True):
        _show(ax, np.concatenate(of_model), image_shape, steps)
        ax.set_anchor("W")
        ax.set_yticks([len(of_model) * image_shape[-2] / 2], [label])
        ax.tick_params(length=0)
    axes[-1, 0].set_xticks(_middles(steps, image_shape[-1]), [number(round(step / (steps - 1), 2)) for step in range(steps)])
    axes[-1, 0].set_xlabel("share of the way from one image's code to the other's")
    _title(figure, "Interpolations between codes of test images")
    return figure


def _image_pairs(inputs: np.ndarray, outputs: np.ndarray, image_shape: Sequence[int], across: int = 10) -> Figure:
    count = min(len(inputs), 3 * across) // across * across or len(inputs)
    across = min(across, count)
    rows = count // across
    figure, axes = _panels(rows, 1, height=1.65, width=0.75 * across)
    for row, ax in enumerate(axes.flat):
        chosen = slice(row * across, (row + 1) * across)
        both = np.concatenate([inputs[chosen], outputs[chosen]])
        _show(ax, both, image_shape, across)
        ax.set_yticks([0.5 * image_shape[-2], 1.5 * image_shape[-2]], ["input", "decoded"])
        ax.tick_params(length=0)
    axes[-1, 0].set_xlabel("test images, each above its reconstruction")
    _title(figure, "Inputs and their reconstructions")
    return figure


def _show(ax: Axes, images: np.ndarray, image_shape: Sequence[int], across: int, x: str = "", y: str = "") -> None:
    ax.imshow(_mosaic(images, image_shape, across), cmap=GREYS, vmin=0, vmax=1, interpolation="nearest")
    _no_ticks(ax, x, y)


def _middles(tiles: int, size: int) -> np.ndarray:
    """Of the tiles of a mosaic along one axis."""
    return (np.arange(tiles) + 0.5) * size - 0.5


def _mosaic(images: np.ndarray, image_shape: Sequence[int], across: int) -> np.ndarray:
    height, width = image_shape[-2:]
    down = len(images) // across
    tiles = np.asarray(images)[: down * across].reshape(down, across, height, width)
    return tiles.swapaxes(1, 2).reshape(down * height, across * width)


def _quadrant_scatter(ax: Axes, points: np.ndarray, inputs: np.ndarray, name: str, size: float = 3.0) -> None:
    middle = (inputs.min(axis=0) + inputs.max(axis=0)) / 2
    quadrant = (inputs > middle) @ np.array([1, 2])
    flat = points.shape[1] == 1
    if flat:
        points = np.column_stack([points[:, 0], _spread(len(points))])
        ax.set_yticks([])
    for index, colour in enumerate(sns.color_palette("colorblind", 4)):
        ax.plot(*points[quadrant == index, :2].T, ".", color=colour, markersize=size, alpha=0.7)
    ax.set_title(name)
    ax.set_xlabel(f"{name} 0")
    ax.set_ylabel("(spread to be seen)" if flat else f"{name} 1")
    ax.set_box_aspect(1)
    ax.locator_params(axis="x", nbins=4)


def _same_frame(*axes: Axes) -> None:
    """One square frame around the points of all axes, so that shrinkage shows."""
    limits = np.array([[ax.get_xlim(), ax.get_ylim()] for ax in axes])
    for ax in axes:
        ax.set(xlim=(limits[..., 0].min(), limits[..., 1].max()), ylim=(limits[..., 0].min(), limits[..., 1].max()))


def _shown_codes(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, str, str]:
    if codes.shape[1] == 1:
        return np.column_stack([codes[:, 0], labels + 0.7 * (_spread(len(codes)) - 0.5)]), "latent 0", "label"
    if codes.shape[1] == 2:
        return codes, "latent 0", "latent 1"
    centred = codes - codes.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])  # an SVD fixes directions only up to sign
    share = (sizes**2 / max((sizes**2).sum(), 1e-300))[:2]
    names = [f"principal component {k + 1} of {codes.shape[1]} latents ({share[k]:.0%} of variance)" for k in (0, 1)]
    return left[:, :2] * sizes[:2] * signs, *names


def _spread(count: int) -> np.ndarray:
    """Evenly spread numbers in [0, 1) that look like noise and are none: multiples of the golden ratio."""
    return np.arange(count) * 0.6180339887498949 % 1


# Shared parts


def _panels(rows: int, columns: int, height: float, width: float = 9.0, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.locator_params(nbins=6)
    return figure, axes


def _wrapped(count: int, x: str, y: str | None = None, *, height: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """Panels in even rows of up to `across`, with x below the lowest of each column."""
    rows = math.ceil(count / across)
    columns = math.ceil(count / rows)
    figure, axes = _panels(rows, columns, height)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    _label_edges(axes, x, y)
    for ax in axes.flat[count - columns : count]:
        ax.set_xlabel(x)
    return figure, list(axes.flat[:count])


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left")


def _label_edges(axes: np.ndarray, x: str, y: str | None = None) -> None:
    for ax in axes.flat:
        ax.set_xlabel("")
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for column, ax in np.ndenumerate(axes):
        if y is not None:
            ax.set_ylabel(y if column[1] == 0 else "")


def _line(ax: Axes, table: pd.DataFrame, x: str, y: str, colour: Any, **options: Any) -> None:
    ax.plot(table[x], table[y], color=colour, **options)
    ax.fill_between(table[x], table[f"{y} low"], table[f"{y} high"], color=colour, alpha=0.15, linewidth=0.0)


def _labelled(table: pd.DataFrame, besides: str | None = None) -> pd.DataFrame:
    """With `series`, what a line is called: its arm and β; besides an axis, its latent dimension too, but not that axis."""
    betas = table["beta"].astype(float) if besides != "beta" and "beta" in table else [math.nan] * len(table)
    labels = [arm_label(arm, beta) for arm, beta in zip(table["arm"], betas, strict=True)]
    if besides not in (None, "latent_dim") and "latent_dim" in table and table["latent_dim"].nunique() > 1:
        labels = [f"{label}, {_latents(count)}" for label, count in zip(labels, table["latent_dim"], strict=True)]
    return table.assign(series=labels)


def _colours(table: pd.DataFrame) -> dict[str, Any]:
    """A colour for each series of a labelled table, in the order of arms, β and latents; a larger β is a darker shade."""
    order = table.sort_values([axis for axis in ("beta", "latent_dim") if axis in table], kind="stable")
    found = {}
    for arm, base in ARM_COLOURS.items():
        series = order.loc[order["arm"] == arm, "series"].unique()
        found |= dict(zip(series, _shades(base, len(series)), strict=True))
    return found


def _shades(base: str, count: int) -> list[Any]:
    if count == 1:
        return [base]
    return sns.blend_palette([sns.light_palette(base, 5)[2], base, sns.dark_palette(base, 5)[2]], count)


def _truth_colours(table: pd.DataFrame, truth: str | None) -> dict[str, Any]:
    if truth is None:
        return {"mean over seeds": ARM_COLOURS["vae"]}
    values = sorted(table[truth].unique())
    return dict(zip(map(_key, values), sns.color_palette("viridis_r", len(values) + 1)[1:], strict=True))


def _key(value: Any) -> str:
    return number(float(value)) if isinstance(value, (int, float, np.number)) else str(value)


def _handles(colours: dict[str, Any], marker: str | None = None, **options: Any) -> list[Line2D]:
    options |= {"marker": marker, "markersize": 4}
    return [Line2D([], [], color=colour, label=label, **options) for label, colour in colours.items()]


def _markers(values: Iterable[float]) -> dict[float, str]:
    return {value: MARKERS[index % len(MARKERS)] for index, value in enumerate(sorted(set(values)))}


def _marker_handles(values: Iterable[float]) -> list[Line2D]:
    markers = _markers(values)
    return [Line2D([], [], color=GREY, marker=m, linestyle="", label=f"λ = {number(v)}") for v, m in markers.items()]


def _legend(figure: Figure, handles: list[Line2D], title: str | None = None) -> None:
    figure.legend(handles=handles, loc="outside right center", title=title, alignment="left")


def _no_ticks(ax: Axes, x: str, y: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def _latents(count: Any) -> str:
    return f"{int(count)} latent{'s' if count != 1 else ''}"


def _words(name: str | None) -> str | None:
    return None if name is None else AXIS_WORDS.get(name, name.replace("_", " "))


def _short(value: float, digits: int = 3) -> str:
    if abs(value) < 1e-8:
        return "0"
    return number(float(f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1g}")).replace("-0", "−0")


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0]
    return min(known), max(known)
