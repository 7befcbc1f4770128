"""Every plot, one function a plot: data in, Figure out. No pyplot, so no state between plots; equal data give equal bytes.

Tables over seeds come as `intervals.summarise` makes them: columns `m`, `m low`, `m high` for a metric m.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.stats import norm

from pipeline import artifacts

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
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NOISE_LABELS = {"sparse_abs_gaussian": "sparse |Gaussian|", "gaussian": "Gaussian", "salt_and_pepper": "salt and pepper"}
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
    columns = min(3, len(panels))
    figure, axes = _panels(math.ceil(len(panels) / columns), columns, height=2.5)
    for panel, ax in zip(panels, axes.flat, strict=False):
        _draw_training(ax, _labelled(curves[curves["panel"] == panel]), by)
        ax.set_title(panel)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    _label_edges(axes, "update", "validation loss (nats)")
    for ax in axes.flat[len(panels) - columns : len(panels)]:
        ax.set_xlabel("update")
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
        ax.axhline(row["test/reconstruction"], color=colours[row["series"]], linewidth=1.4)
        if math.isfinite(row["test/reconstruction low"]):
            span = (row["test/reconstruction low"], row["test/reconstruction high"])
            ax.axhspan(*span, color=colours[row["series"]], alpha=0.15, linewidth=0.0)


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
        shown = table[(table["noise"] == kind) & (table["latent_dim"] == latent_dim)].sort_values("level")
        if pca is not None:
            line = pca[(pca["noise"] == kind) & (pca["latent_dim"] == latent_dim)].sort_values("level")
            ax.plot(line["level"], line["mse_clean"], color=GREY, linestyle="--", marker=".", linewidth=1.3)
        for series, curve in shown.groupby("series", sort=False):
            _line(ax, curve, "level", "mse_clean", colours[series], marker="o", markersize=4)
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


def _noise_panels(table: pd.DataFrame) -> tuple[Figure, np.ndarray, list[tuple[Axes, str, Any]]]:
    kinds, latent_dims = list(table["noise"].unique()), sorted(table["latent_dim"].unique())
    figure, axes = _panels(len(latent_dims), len(kinds), height=2.2, sharey="row")
    cells = [(axes[r, c], kind, dim) for r, dim in enumerate(latent_dims) for c, kind in enumerate(kinds)]
    for ax, kind, latent_dim in cells:
        ax.set_title(f"{NOISE_LABELS.get(kind, kind)}, {_latents(latent_dim)}")
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
    names = ["AE" if beta < 0 else number(beta) for beta in grid.columns]
    options = {
        "cmap": "crest",
        "annot_kws": {"size": 8},
        "linewidths": 1.5,
        "cbar": False,
        "vmin": limits[0],
        "vmax": limits[1],
    }
    texts = grid.map(lambda value: "" if math.isnan(value) else _short(value))
    sns.heatmap(grid, annot=texts, fmt="", ax=ax, xticklabels=names, yticklabels=[number(l2) for l2 in grid.index], **options)
    ax.tick_params(length=0, rotation=0)
    ax.grid(False)


# Pictures of one cell


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
def latent_scatter(codes: np.ndarray, labels: np.ndarray | None = None, names: Sequence[str] | None = None) -> Figure:
    """Codes coloured by label: one latent as strips, two as they are, more on their first two principal components."""
    figure, axes = _panels(1, 1, height=4.4, width=5.6)
    ax = axes[0, 0]
    labels = np.zeros(len(codes), dtype=int) if labels is None else np.asarray(labels).astype(int)
    names = names or [str(label) for label in range(labels.max(initial=0) + 1)]
    shown, x, y = _shown_codes(codes, labels)
    colours = sns.color_palette("colorblind", max(1, len(names)))
    for label in np.unique(labels):
        rows = labels == label
        ax.plot(*shown[rows].T, ".", color=colours[label], markersize=3.5, alpha=0.7, label=names[label])
    if codes.shape[1] == 1:
        ax.set_yticks(np.unique(labels), [names[label] for label in np.unique(labels)])
    elif len(np.unique(labels)) > 1:
        figure.legend(loc="outside right center", markerscale=2.5, handletextpad=0)
    _label_edges(axes, x, y)
    _title(figure, "Codes of the test set")
    return figure


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
        shares = f"{MANIFOLD_SHARES[0]:g} to {MANIFOLD_SHARES[1]:g}"
        axes[0, 0].imshow(_mosaic(outputs, image_shape, side), cmap="gray_r", aspect="equal")
        _no_ticks(axes[0, 0], f"latent 0, prior quantiles {shares}", f"latent 1, prior quantiles {shares}")
    _title(figure, "The decoder's manifold under the prior")
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
        axes[0, 0].imshow(_mosaic(outputs, image_shape, math.isqrt(len(outputs))), cmap="gray_r", aspect="equal")
        _no_ticks(axes[0, 0], "decoded draws from N(0, I)", "")
    _title(figure, "Samples from the prior")
    return figure


def _image_pairs(inputs: np.ndarray, outputs: np.ndarray, image_shape: Sequence[int], across: int = 10) -> Figure:
    count = min(len(inputs), 3 * across) // across * across or len(inputs)
    across = min(across, count)
    rows = count // across
    figure, axes = _panels(rows, 1, height=1.65, width=0.75 * across)
    for row, ax in enumerate(axes.flat):
        chosen = slice(row * across, (row + 1) * across)
        both = np.concatenate([inputs[chosen], outputs[chosen]])
        ax.imshow(_mosaic(both, image_shape, across), cmap="gray_r", vmin=0, vmax=1, aspect="equal")
        _no_ticks(ax, "", "")
        ax.set_yticks([0.5 * image_shape[-2], 1.5 * image_shape[-2]], ["input", "decoded"])
        ax.tick_params(length=0)
    axes[-1, 0].set_xlabel("test images, each above its reconstruction")
    _title(figure, "Inputs and their reconstructions")
    return figure


def _mosaic(images: np.ndarray, image_shape: Sequence[int], across: int) -> np.ndarray:
    height, width = image_shape[-2:]
    down = len(images) // across
    tiles = np.asarray(images)[: down * across].reshape(down, across, height, width)
    return tiles.swapaxes(1, 2).reshape(down * height, across * width)


def _quadrant_scatter(ax: Axes, points: np.ndarray, inputs: np.ndarray, name: str) -> None:
    middle = (inputs.min(axis=0) + inputs.max(axis=0)) / 2
    quadrant = (inputs > middle) @ np.array([1, 2])
    flat = points.shape[1] == 1
    if flat:
        points = np.column_stack([points[:, 0], _spread(len(points))])
        ax.set_yticks([])
    for index, colour in enumerate(sns.color_palette("colorblind", 4)):
        ax.plot(*points[quadrant == index, :2].T, ".", color=colour, markersize=3, alpha=0.7)
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


def _panels(rows: int, columns: int, height: float, width: float = 9.0, sharey: Any = False) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.locator_params(nbins=6)
    return figure, axes


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


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(
        series=[arm_label(arm, beta) for arm, beta in zip(table["arm"], table["beta"].astype(float), strict=True)]
    )


def _colours(table: pd.DataFrame) -> dict[str, Any]:
    """A colour for each series of a labelled table, in the order of arms and β; a larger β is a darker shade."""
    found = {}
    for arm, base in ARM_COLOURS.items():
        betas = sorted(set(table.loc[table["arm"] == arm, "beta"].astype(float).dropna())) or [math.nan]
        if arm in set(table["arm"]):
            found |= dict(zip([arm_label(arm, beta) for beta in betas], _shades(base, len(betas)), strict=True))
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


def _handles(colours: dict[str, Any], marker: str | None = None) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=label, marker=marker, markersize=4) for label, colour in colours.items()]


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
    return None if name is None else name.replace("_", " ")


def _short(value: float) -> str:
    if abs(value) < 1e-8:
        return "0"
    return number(float(f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1g}"))


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0]
    return min(known), max(known)
