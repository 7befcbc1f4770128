"""Every plot of tables, one function a plot: data in, Figure out.

Tables over seeds come as `intervals.summarise` makes them: columns `m`, `m low`, `m high` for a metric m.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline import drawing, intervals

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NOISE_LABELS = {
    "sparse_abs_gaussian": "sparse |Gaussian|",
    "gaussian": "Gaussian",
    "salt_and_pepper": "salt and pepper",
    "erased_block": "erased block",
}
TARGET_LABELS = {"clean": "from the clean image", "noisy": "from the noisy image"}
VERDICT_COLOURS = {"supported": "#0072b2", "contradicted": "#d55e00", "undecided": "#999999"}
CRITERIA = {"column_sum": "|column sum|", "column_l1": "column L1 norm", "column_l2": "column L2 norm", "kl": "KL"}


# Curves over training


@drawing.house_style
def training_curves(curves: pd.DataFrame) -> Figure:
    """Validation loss against updates: one panel for each value of `panel`, one line for each arm and β."""
    panels = list(curves["panel"].unique())
    figure, axes = drawing.wrapped(len(panels), "update", "validation loss (nats)", height=2.5)
    for panel, ax in zip(panels, axes, strict=True):
        _draw_training(ax, _labelled(curves[curves["panel"] == panel]))
        ax.set_title(panel)
    drawing.title(figure, "Validation loss over training")
    return figure


def _draw_training(ax: Axes, curves: pd.DataFrame) -> None:
    colours = _colours(curves)
    for series, curve in curves.groupby("series", sort=False):
        _line(ax, curve.sort_values("update"), "update", "validation_loss", colours[series])
    settled = curves[curves["update"] >= 0.05 * curves["update"].max()]
    low, high = settled["validation_loss"].min(), settled["validation_loss"].max()
    if math.isfinite(low) and high > low:
        room = 0.1 + 0.17 * len(colours)  # for the legend, above the curves
        ax.set_ylim(low - 0.05 * (high - low), high + room * (high - low))
    ax.legend(handles=drawing.handles(colours), loc="upper right", handlelength=1.2)


@drawing.house_style
def likelihood_curves(curves: pd.DataFrame, reached: Sequence[float], published: float) -> Figure:
    """−ELBO of validation data over updates by seed, the bound for test data that each reached, and what was published."""
    figure, axes = drawing.panels(1, 1, height=3.4, width=6.6)
    ax = axes[0, 0]
    for _, curve in curves.groupby("seed"):
        ax.plot(curve["update"], curve["validation_loss"], color=drawing.ARM_COLOURS["vae"], linewidth=0.9)
    ax.plot([curves["update"].max()] * len(reached), reached, "o", color="black", markersize=4, clip_on=False)
    ax.axhline(published, color=drawing.GREY, linestyle="--")
    ax.set_xscale("log")
    ax.set(xlabel="update", ylabel="nats")
    dashed = Line2D([], [], color=drawing.GREY, linestyle="--", label=f"published: {published:g}")
    of_test = drawing.handles({"bound on −log p(x), test": "black"}, marker="o", linestyle="")
    ax.legend(handles=[*drawing.handles({"−ELBO, validation": drawing.ARM_COLOURS["vae"]}), *of_test, dashed])
    drawing.title(figure, "Towards a published log-likelihood")
    return figure


# Over noise in training


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
    ax.set_xticks(shown, map(drawing.number, shown))
    ax.minorticks_off()


@drawing.house_style
def noise_curves(summary: pd.DataFrame, metric: str, label: str) -> Figure:
    """A measure over the level of noise in training: what it is taken from across, latents down, a line for each arm and β."""
    table = _labelled(summary)
    figure, axes, cells = _noise_panels(table, "target", TARGET_LABELS)
    colours = _colours(table)
    for ax, target, latent_dim in cells:
        shown = table[(table["target"] == target) & (table["latent_dim"] == latent_dim)]
        _draw_series(ax, shown, "train_noise", metric, colours)
    drawing.label_edges(axes, drawing.words("train_noise"), textwrap.fill(label, 30))
    drawing.title(figure, "Noise in training: error on inputs as noisy as those")
    drawing.legend(figure, drawing.handles(colours, marker="o"))
    return figure


# Rate and distortion


@drawing.house_style
def rate_distortion(summary: pd.DataFrame) -> Figure:
    """KL against reconstruction over β, one panel for each latent dimension, one marker for each λ.

    The plain AE has no rate: it is a horizontal line with its interval.
    """
    table = _labelled(summary)
    latent_dims = sorted(table["latent_dim"].unique())
    figure, axes = drawing.panels(1, len(latent_dims), height=3.6)
    for latent_dim, ax in zip(latent_dims, axes.flat, strict=True):
        _draw_rate_distortion(ax, table[table["latent_dim"] == latent_dim], _colours(table), _markers(table["l2"]))
        ax.set_title(drawing.latents(latent_dim))
    drawing.label_edges(axes, "rate: KL (nats per sample)", "distortion: reconstruction (nats per sample)")
    drawing.title(figure, "Rate and distortion: what each β buys")
    drawing.legend(figure, [*drawing.handles(_colours(table)), *_marker_handles(table["l2"])])
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


# Robustness


@drawing.house_style
def robustness(summary: pd.DataFrame, pca: pd.DataFrame | None = None) -> Figure:
    """Error against the clean input over noise level: VAE for each β, AE, and PCA; noise kinds across, latents down."""
    table = _labelled(summary)
    figure, axes, cells = _noise_panels(table)
    colours = _colours(table)
    for ax, kind, latent_dim in cells:
        shown = table[(table["noise"] == kind) & (table["latent_dim"] == latent_dim)]
        if pca is not None:
            line = pca[(pca["noise"] == kind) & (pca["latent_dim"] == latent_dim)].sort_values("level")
            ax.plot(line["level"], line["mse_clean"], color=drawing.GREY, linestyle="--", marker=".", linewidth=1.3)
        _draw_series(ax, shown, "level", "mse_clean", colours)
    drawing.label_edges(axes, "noise level", "squared error\nper dimension")
    drawing.title(figure, "Error on corrupted inputs, measured against the clean ones")
    pca_handle = [] if pca is None else [Line2D([], [], color=drawing.GREY, linestyle="--", marker=".", label="PCA")]
    drawing.legend(figure, [*drawing.handles(colours, marker="o"), *pca_handle])
    return figure


@drawing.house_style
def paired_differences(paired: pd.DataFrame) -> Figure:
    """Error of each arm minus that of its plain AE, with 95% intervals over seeds, over noise level."""
    table = _labelled(paired)
    figure, axes, cells = _noise_panels(table)
    colours = _colours(table)
    for ax, kind, latent_dim in cells:
        ax.axhline(0, color=drawing.ARM_COLOURS["ae"], linewidth=1.4, zorder=1.5)
        shown = table[(table["noise"] == kind) & (table["latent_dim"] == latent_dim)]
        _dodged(ax, shown, colours)
    drawing.label_edges(axes, "noise level", "difference in squared\nerror per dimension")
    drawing.title(figure, "Error minus the plain AE's of the same seed: below the line is better than the AE")
    drawing.legend(
        figure,
        [*drawing.handles(colours, marker="o"), Line2D([], [], color=drawing.ARM_COLOURS["ae"], label="plain AE (zero)")],
    )
    return figure


def _noise_panels(
    table: pd.DataFrame, across: str = "noise", labels: dict[str, str] = NOISE_LABELS
) -> tuple[Figure, np.ndarray, list[tuple[Axes, str, Any]]]:
    kinds, latent_dims = list(table[across].unique()), sorted(table["latent_dim"].unique())
    figure, axes = drawing.panels(len(latent_dims), len(kinds), height=2.2, sharey="row")
    cells = [(axes[r, c], kind, dim) for r, dim in enumerate(latent_dims) for c, kind in enumerate(kinds)]
    for ax, kind, latent_dim in cells:
        ax.set_title(f"{labels.get(kind, kind)},\n{drawing.latents(latent_dim)}")
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


@drawing.house_style
def pca_curve(pca: pd.DataFrame, models: pd.DataFrame) -> Figure:
    """Variance that each principal component explains, and all up to it; and PCA's error beside that of models as wide."""
    table = _labelled(models)
    colours = _colours(table)
    figure, axes = drawing.panels(1, 2, height=3.2)
    axes[0, 0].plot(pca["components"], pca["variance_ratio"].cumsum(), color=drawing.GREY, label="all up to this one")
    axes[0, 0].plot(pca["components"], pca["variance_ratio"], color=drawing.GREY, linestyle="--", label="each component")
    axes[0, 0].legend(loc="best")
    axes[0, 1].plot(pca["components"], pca["mse"], color=drawing.GREY)
    for index, (series, colour) in enumerate(colours.items()):
        shown = table[table["series"] == series].sort_values("latent_dim")
        beside = shown.assign(place=shown["latent_dim"] * 1.04 ** (index - (len(colours) - 1) / 2))  # or markers would overlap
        _count_line(axes[0, 1], beside, "place", "mse", colour, 0.0, "o")
    for ax, label in zip(axes.flat, ("share of variance explained", "squared error per dimension"), strict=True):
        ax.set(ylabel=label, xlabel="principal components, or latents", ylim=(0, None))
        _axis_of_levels(ax, [2.0**power for power in range(int(pca["components"].max()).bit_length())])
    drawing.title(figure, "PCA: variance explained and error, beside models of as many latents")
    drawing.legend(figure, [Line2D([], [], color=drawing.GREY, label="PCA"), *drawing.handles(colours, marker="o")])
    return figure


# Pruning


@drawing.house_style
def scree(columns: pd.DataFrame, truth: str) -> Figure:
    """How much each latent dimension is used, sorted within each cell and averaged over seeds.

    Rows are arms; a line for each value of the data axis `truth`. Beside |column sum| and the L2 norm stands the KL, or
    for an arm without one the variance of the code.
    """
    table = _labelled(columns)
    series = list(_colours(table))
    figure, axes = drawing.panels(len(series), 3, height=2.3)
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
    drawing.label_edges(axes, "rank of the latent dimension")
    drawing.title(figure, "Scree: first decoder layer's columns, and what each dimension carries")
    drawing.legend(figure, drawing.handles(colours), title=drawing.words(truth))
    return figure


def _draw_scree(ax: Axes, columns: pd.DataFrame, measure: str, truth: str, colours: dict) -> None:
    ranked = columns.assign(rank=columns.groupby("cell_id")[measure].rank(ascending=False, method="first"))
    for key, colour in colours.items():
        lines = ranked[ranked[truth].map(_key) == key]
        mean = lines.groupby("rank")[measure].mean()
        ax.plot(mean.index, mean, color=colour, marker=".", linewidth=1.2)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


@drawing.house_style
def ablation(curves: pd.DataFrame, truth: str) -> Figure:
    """Error as dimensions are taken away, the least first in each criterion's order; a ring where the true number is left."""
    table = _labelled(curves)
    series, criteria = list(_colours(table)), [name for name in CRITERIA if name in set(table["criterion"])]
    figure, axes = drawing.panels(len(series), len(criteria), height=2.3, sharey="row")
    colours = _truth_colours(table, truth)
    for row, name in zip(axes, series, strict=True):
        for ax, criterion in zip(row, criteria, strict=True):
            shown = table[(table["series"] == name) & (table["criterion"] == criterion)]
            _draw_ablation(ax, shown, truth, colours)
            ax.set_title(f"{name}\nby {CRITERIA[criterion]}")
    drawing.label_edges(axes, "dimensions taken away", "squared error\nper dimension")
    drawing.title(figure, "Ablation: error as the least used dimensions are taken away")
    ring = Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label="true number left")
    drawing.legend(figure, [*drawing.handles(colours), ring], title=drawing.words(truth))
    return figure


def _draw_ablation(ax: Axes, table: pd.DataFrame, truth: str, colours: dict) -> None:
    if table.empty:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "(this arm has none)", transform=ax.transAxes, ha="center", color=drawing.GREY)
        return
    for key, colour in colours.items():
        curve = table[table[truth].map(_key) == key].sort_values("zeroed")
        _line(ax, curve, "zeroed", "mse", colour)
        true_left = curve[curve["zeroed"] == curve["latent_dim"] - curve[truth]]
        ax.plot(true_left["zeroed"], true_left["mse"], "o", color=colour, markerfacecolor="white", zorder=3)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


@drawing.house_style
def used_dimensions(counts: pd.DataFrame, truth: str, measures: dict[str, str]) -> Figure:
    """Counts of used dimensions against the true one, with intervals over seeds and the diagonal; a panel for each arm."""
    table = _labelled(counts)
    series = list(_colours(table))
    figure, axes = drawing.panels(1, len(series), height=3.4, sharey=True)
    colours = dict(zip(measures, sns.color_palette("colorblind", len(measures)), strict=True))
    for ax, name in zip(axes.flat, series, strict=True):
        shown = table[table["series"] == name].sort_values(truth)
        ax.plot(shown[truth], shown[truth], color="#cccccc", linewidth=6.0, solid_capstyle="round", zorder=1)
        for index, measure in enumerate(measures):
            _count_line(ax, shown, truth, measure, colours[measure], (index - (len(measures) - 1) / 2) * 0.12, MARKERS[index])
        ax.set_title(name)
        ax.set_xticks(sorted(shown[truth].unique()))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(bottom=0)
    drawing.label_edges(axes, f"true dimension ({drawing.words(truth)})", "dimensions counted as used")
    drawing.title(figure, "Used dimensions against the true dimension of the data")
    handles = [
        Line2D([], [], color=colours[m], marker=MARKERS[i], label=label) for i, (m, label) in enumerate(measures.items())
    ]
    drawing.legend(figure, [*handles, Line2D([], [], color="#cccccc", linewidth=6.0, label="true dimension")])
    return figure


def _count_line(ax: Axes, table: pd.DataFrame, x: str, measure: str, colour: Any, shift: float, marker: str) -> None:
    known = table.dropna(subset=[measure])
    spread = np.nan_to_num([known[measure] - known[f"{measure} low"], known[f"{measure} high"] - known[measure]])
    ax.errorbar(known[x] + shift, known[measure], yerr=spread, color=colour, marker=marker, linewidth=1.0, elinewidth=1.4)


# Grids


@drawing.house_style
def heat_map(summary: pd.DataFrame, metrics: dict[str, str]) -> Figure:
    """Means of metrics over β (across, after the plain AE) and λ (up): a row for each metric, a column for each latent_dim."""
    latent_dims = sorted(summary["latent_dim"].unique())
    figure, axes = drawing.panels(len(metrics), len(latent_dims), height=2.7, sharey=False)
    for row, (metric, label) in zip(axes, metrics.items(), strict=True):
        limits = _range(summary[metric])
        for ax, latent_dim in zip(row, latent_dims, strict=True):
            _draw_heat(ax, summary[summary["latent_dim"] == latent_dim], metric, limits)
            ax.set_title(f"{label}, {drawing.latents(latent_dim)}")
    drawing.label_edges(axes, "β", "λ")
    drawing.title(figure, "What β and λ do, as means over seeds")
    return figure


def _draw_heat(ax: Axes, table: pd.DataFrame, metric: str, limits: tuple[float, float]) -> None:
    kept = table.dropna(subset=[metric])
    kept = kept.assign(column=kept["beta"].fillna(-1.0))
    grid = kept.pivot_table(index="l2", columns="column", values=metric, sort=True).iloc[::-1]
    _draw_grid(
        ax, grid.rename(columns=lambda beta: "AE" if beta < 0 else drawing.number(beta), index=drawing.number), "crest", limits
    )


def _draw_grid(ax: Axes, grid: pd.DataFrame, colour_map: str, limits: tuple[float, float], digits: int = 3) -> None:
    options = {"annot_kws": {"size": 8}, "linewidths": 1.5, "cbar": False, "vmin": limits[0], "vmax": limits[1]}
    texts = grid.map(lambda value: "" if math.isnan(value) else _short(value, digits))
    sns.heatmap(grid, annot=texts, fmt="", ax=ax, cmap=colour_map, xticklabels=True, yticklabels=True, **options)
    ax.tick_params(length=0, rotation=0)
    ax.grid(False)


@drawing.house_style
def outlier_map(summary: pd.DataFrame, x: str, y: str, metric: str, label: str) -> Figure:
    """Means of a metric over two axes of the data: a row for each arm, with the plain AE, the arm, and the arm minus the AE."""
    table = _labelled(summary)
    grids = {series: _grid_of(table[table["series"] == series], x, y, metric) for series in _colours(table)}
    plain = grids.pop(drawing.ARM_LABELS["ae"])
    figure, axes = drawing.panels(len(grids), 3, height=2.7)
    limits, most = _range(table[metric]), max(float(np.nanmax(abs(grid - plain))) for grid in grids.values())
    for row, (name, grid) in zip(axes, grids.items(), strict=True):
        for ax, shown, title in zip(row, (plain, grid), (drawing.ARM_LABELS["ae"], name), strict=False):
            _draw_grid(ax, shown, "crest", limits)
            ax.set_title(title)
        _draw_grid(row[2], grid - plain, "vlag", (-most, most), digits=2)
        row[2].set_title(f"{name} minus {drawing.ARM_LABELS['ae']}")
    drawing.label_edges(axes, drawing.words(x), drawing.words(y))
    drawing.title(figure, f"{label} over {drawing.words(x)} and {drawing.words(y)}, as means over seeds")
    return figure


def _grid_of(table: pd.DataFrame, x: str, y: str, metric: str) -> pd.DataFrame:
    grid = table.pivot_table(index=y, columns=x, values=metric, sort=True).iloc[::-1]
    return grid.rename(columns=_key, index=_key)


# Claims


@drawing.house_style
def ledger(claims: pd.DataFrame) -> Figure:
    """Every claim's margin with its 95% interval, scaled so that the far end of the interval is at 1 or −1; by source.

    The effects, which are text, stand on the right. Claims without one of the three verdicts, such as those not run, are left
    out.
    """
    claims = claims[claims["verdict"].isin(VERDICT_COLOURS)]
    claims = claims.assign(group=claims.groupby("source").ngroup()).sort_values("group", kind="stable")
    claims["place"] = np.arange(len(claims)) + claims["group"] + 1  # a line above each group is its source's
    lines = len(claims) + claims["group"].nunique()
    figure, axes = drawing.panels(1, 1, height=0.18 * lines + 0.5)
    axes[0, 0].axvline(0, color="#444444", linewidth=1.0)
    axes[0, 0].set(xlim=(-1.08, 1.08), ylim=(lines - 0.4, -0.6))
    for claim in claims.itertuples():
        _draw_claim(axes[0, 0], claim)
    _label_claims(axes[0, 0], claims)
    drawing.label_edges(axes, "← contradicts      scaled by its interval's far end      supports →", "claim")
    drawing.title(figure, "By how much each claim holds")
    figure.legend(handles=drawing.handles(VERDICT_COLOURS, marker="o"), loc="outside upper right", ncols=3)
    return figure


@drawing.house_style
def identities(shares: Mapping[str, float]) -> Figure:
    """Deviation of each identity as a share of its tolerance: to the right of 1 it fails."""
    figure, axes = drawing.panels(1, 1, height=0.18 * len(shares) + 0.4)
    ax, places = axes[0, 0], np.arange(len(shares))
    values = np.minimum(np.nan_to_num(list(shares.values()), nan=np.inf), 1.5)
    ax.hlines(places, 0, values, color=drawing.GREY, linewidth=1.0)
    ax.plot(values, places, "o", color="black", markersize=4, clip_on=False)
    ax.axvline(1, color=drawing.GREY, linestyle="--")
    ax.set_yticks(places, list(shares))
    ax.set(xlim=(0, 1.6), ylim=(len(shares) - 0.4, -0.6))
    drawing.label_edges(axes, "deviation, as a share of what is tolerated", "identity")
    drawing.title(figure, "The identities: deviation of both sides")
    return figure


def _label_claims(ax: Axes, claims: pd.DataFrame) -> None:
    right = ax.secondary_yaxis("right")
    ax.set_yticks(claims["place"], claims["id"])
    right.set_yticks(claims["place"], claims["effect"])
    right.spines[:].set_visible(False)
    for side in (ax, right):
        side.tick_params(axis="y", length=0)
    heading = {"fontweight": "bold", "fontsize": 8.5, "va": "center", "backgroundcolor": "white"}
    for source, place in claims.groupby("source", sort=False)["place"].min().items():
        ax.text(-1.05, place - 1, textwrap.shorten(str(source), 70), parse_math=False, **heading)


def _draw_claim(ax: Axes, claim: Any) -> None:
    scale, colour = max(abs(claim.low), abs(claim.high), 1e-300), VERDICT_COLOURS[claim.verdict]
    ax.plot([claim.low / scale, claim.high / scale], [claim.place] * 2, color=colour, linewidth=2.2, solid_capstyle="butt")
    ax.plot(claim.margin / scale, claim.place, "o", color=colour, markeredgecolor="white", markeredgewidth=0.6)


class ClaimPanel(NamedTuple):
    """What decides a claim: a measure of each seed on each side or level, and the numbers it is held against."""

    id: str
    verdict: str
    measure: str
    axis: str
    sides: Sequence[str]
    values: np.ndarray  # [side, seed]
    limits: Sequence[float]


@drawing.house_style
def claim_panels(claims: Sequence[ClaimPanel]) -> Figure:
    """A panel a claim: its seeds as thin lines from side to side, their means with 95% intervals, its bounds dashed."""
    figure, axes = drawing.wrapped(len(claims), "", height=2.5)
    for ax, claim in zip(axes, claims, strict=True):
        _draw_sides(ax, claim)
        ax.set_title(textwrap.fill(f"{claim.id}: {claim.verdict}", 30), color=VERDICT_COLOURS[claim.verdict])
        ax.set_ylabel(textwrap.fill(claim.measure, 28), fontsize=8.5)
        ax.set_xlabel(claim.axis)
    drawing.title(figure, "What decides the claims")
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


# Shared parts


def _line(ax: Axes, table: pd.DataFrame, x: str, y: str, colour: Any, **options: Any) -> None:
    ax.plot(table[x], table[y], color=colour, **options)
    ax.fill_between(table[x], table[f"{y} low"], table[f"{y} high"], color=colour, alpha=0.15, linewidth=0.0)


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    """With `series`, what a line is called: its arm and β."""
    pairs = zip(table["arm"], table["beta"].astype(float), strict=True)
    return table.assign(series=[drawing.arm_label(arm, beta) for arm, beta in pairs])


def _colours(table: pd.DataFrame) -> dict[str, Any]:
    """A colour for each series of a labelled table, in the order of arms, β and latents; a larger β is a darker shade."""
    order = table.sort_values([axis for axis in ("beta", "latent_dim") if axis in table], kind="stable")
    found = {}
    for arm, base in drawing.ARM_COLOURS.items():
        series = order.loc[order["arm"] == arm, "series"].unique()
        found |= dict(zip(series, _shades(base, len(series)), strict=True))
    return found


def _shades(base: str, count: int) -> list[Any]:
    if count == 1:
        return [base]
    return sns.blend_palette([sns.light_palette(base, 5)[2], base, sns.dark_palette(base, 5)[2]], count)


def _truth_colours(table: pd.DataFrame, truth: str) -> dict[str, Any]:
    values = sorted(table[truth].unique())
    return dict(zip(map(_key, values), sns.color_palette("viridis_r", len(values) + 1)[1:], strict=True))


def _key(value: Any) -> str:
    return drawing.number(float(value)) if isinstance(value, (int, float, np.number)) else str(value)


def _markers(values: Iterable[float]) -> dict[float, str]:
    return {value: MARKERS[index % len(MARKERS)] for index, value in enumerate(sorted(set(values)))}


def _marker_handles(values: Iterable[float]) -> list[Line2D]:
    markers = _markers(values)
    style = {"color": drawing.GREY, "linestyle": ""}
    return [Line2D([], [], marker=m, label=f"λ = {drawing.number(v)}", **style) for v, m in markers.items()]


def _short(value: float, digits: int = 3) -> str:
    if abs(value) < 1e-8:
        return "0"
    return drawing.number(float(f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1g}")).replace("-0", "−0")


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0]
    return min(known), max(known)
