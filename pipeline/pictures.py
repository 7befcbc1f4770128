"""Pictures of cells: inputs and reconstructions, codes, interpolations, samples and manifolds. Data in, Figure out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from pipeline import drawing

GREYS = colormaps["gray_r"].resampled(24)  # of images; each level more makes the PNG larger
MANIFOLD_SHARES = (0.05, 0.95)


@drawing.house_style
def reconstructions(inputs: np.ndarray, outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """Inputs and their reconstructions: pairs of images, points in the plane, or value against value."""
    if image_shape is not None:
        return _image_pairs(inputs, outputs, image_shape)
    if inputs.shape[1] == 2:
        figure, axes = drawing.panels(1, 2, height=3.6, width=7.2)
        _quadrant_scatter(axes[0, 0], inputs, inputs, "input")
        _quadrant_scatter(axes[0, 1], outputs, inputs, "reconstruction")
        _same_frame(axes[0, 0], axes[0, 1])
        drawing.title(figure, "Inputs and their reconstructions")
        return figure
    figure, axes = drawing.panels(1, 1, height=4.0, width=4.4)
    axes[0, 0].plot(inputs[:100].ravel(), outputs[:100].ravel(), ".", color=drawing.ARM_COLOURS["vae"], markersize=2, alpha=0.4)
    axes[0, 0].axline((0, 0), slope=1, color=drawing.GREY, linestyle="--", linewidth=1.0)
    drawing.label_edges(axes, "input value", "reconstructed value")
    drawing.title(figure, "Reconstruction against input")
    return figure


@drawing.house_style
def quadrant_lattice(cells: Sequence[dict[str, Any]], title: str) -> Figure:
    """Data of two dimensions: codes and reconstructions of cells over arm (across) and λ (up), beside the input.

    Points are coloured by the input's quadrant. All reconstructions lie in one frame with the input; codes have a frame each,
    at least 0.2 wide, so that a collapsed code is a dot.
    """
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    rows = sorted({float(cell["l2"]) for cell in cells}, reverse=True)
    ratios = [*[1, 1, 0.15] * len(columns), 1]
    figure, axes = drawing.panels(len(rows), len(ratios), height=8.8 / sum(ratios), width_ratios=ratios)
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
    drawing.title(figure, title or "Latent codes and reconstructions over β and λ, coloured by the input's quadrant")
    return figure


def _lattice_panel(ax: Axes, points: np.ndarray, inputs: np.ndarray) -> Axes:
    _quadrant_scatter(ax, points, inputs, "", size=1.6)
    _no_ticks(ax, "", "")
    ax.spines[:].set(visible=True, color="#bbbbbb")
    return ax


def _own_frame(ax: Axes, codes: np.ndarray, least: float = 0.1) -> None:
    """A square around all codes, of at least this half-width."""
    middle = (codes.min(axis=0) + codes.max(axis=0)) / 2
    half = max(least, 1.08 * np.ptp(codes, axis=0).max() / 2)
    for dimension, place in zip("xy", middle, strict=False):
        ax.set(**{f"{dimension}lim": (place - half, place + half)})


def _label_lattice(axes: np.ndarray, columns: Sequence[str], rows: Sequence[float]) -> None:
    axes[0, -1].set_title("input")
    for index, label in enumerate(columns):
        axes[0, 3 * index].set_title(label, x=1.05)  # over both panels
        axes[-1, 3 * index].set_xlabel("code")
        axes[-1, 3 * index + 1].set_xlabel("decoded")
    for ax, l2 in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"λ = {drawing.number(l2)}")


@drawing.house_style
def latent_scatter(codes: np.ndarray, labels: np.ndarray | None = None, names: Sequence[str] | None = None) -> Figure:
    """Codes coloured by label: one latent as strips, two as they are, more on their first two principal components."""
    figure, axes = drawing.panels(1, 1, height=4.4, width=5.6)
    ax = axes[0, 0]
    labels = np.zeros(len(codes), dtype=int) if labels is None else np.asarray(labels).astype(int)
    names = names or [str(label) for label in range(labels.max(initial=0) + 1)]
    shown, x, y = _shown_codes(codes, labels)
    _class_scatter(ax, shown, labels, _class_colours(names), size=3.5)
    if codes.shape[1] == 1:
        ax.set_yticks(np.unique(labels), [names[label] for label in np.unique(labels)])
    elif len(np.unique(labels)) > 1:
        drawing.legend(figure, drawing.handles(_class_colours(names), marker="o", linestyle=""))
    drawing.label_edges(axes, x, y)
    drawing.title(figure, "Codes of the test set")
    return figure


@drawing.house_style
def latent_spaces(spaces: Sequence[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str]) -> Figure:
    """Spaces of two latents beside each other, coloured by class; a space is its title, codes and labels."""
    figure, axes = drawing.wrapped(len(spaces), "latent 0", "latent 1", height=3.0)
    for ax, (title, codes, labels) in zip(axes, spaces, strict=True):
        _class_scatter(ax, codes, labels, _class_colours(names), size=2.0)
        _own_frame(ax, codes, least=1.0)  # or a collapsed latent would look like another
        ax.set_title(title)
        ax.set_box_aspect(1)
        ax.locator_params(nbins=4)
    drawing.title(figure, "Latent spaces, coloured by class")
    drawing.legend(figure, drawing.handles(_class_colours(names), marker="o", linestyle=""))
    return figure


def _class_colours(names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))


def _class_scatter(ax: Axes, points: np.ndarray, labels: np.ndarray, colours: dict[str, Any], size: float) -> None:
    for label, colour in enumerate(colours.values()):
        ax.plot(*points[labels == label].T, ".", color=colour, markersize=size, alpha=0.7)


@drawing.house_style
def manifold(outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """What the decoder makes of `manifold_codes`: images in a grid, or the grid's lines in the plane of 2-D data."""
    side = math.isqrt(len(outputs))
    if image_shape is None:
        figure, axes = drawing.panels(1, 1, height=4.0, width=4.4)
        grid = outputs.reshape(side, side, -1)[..., :2]
        for lines in (grid, grid.swapaxes(0, 1)):
            axes[0, 0].plot(lines[..., 0], lines[..., 1], color=drawing.ARM_COLOURS["vae"], linewidth=0.9)
        drawing.label_edges(axes, "dimension 0", "dimension 1")
        axes[0, 0].set_aspect("equal")
    else:
        figure, axes = drawing.panels(1, 1, height=5.0, width=5.0)
        words = [f"latent {k}, prior quantiles {MANIFOLD_SHARES[0]:g} to {MANIFOLD_SHARES[1]:g}" for k in (0, 1)]
        _show(axes[0, 0], outputs, image_shape, side, *words)
    drawing.title(figure, "The decoder's manifold under the prior")
    return figure


@drawing.house_style
def boot_axes(outputs: np.ndarray, image_shape: Sequence[int], x: str, y: str) -> Figure:
    """What the decoder makes of `manifold_codes` in two of its latents, and what these two stand for in words."""
    side = math.isqrt(len(outputs))
    figure, axes = drawing.panels(1, 1, height=5.0, width=5.4)
    ax, labels = axes[0, 0], [f"{value:.1f}".replace("-", "−") for value in manifold_codes(side)[:side, 0].round(1) + 0.0]
    _show(ax, outputs, image_shape, side, x, y)
    shown = slice(None, None, math.ceil(side / 10))  # or the labels would touch
    ax.set_xticks(_middles(side, image_shape[-1])[shown], labels[shown])
    ax.set_yticks(_middles(side, image_shape[-2])[shown], labels[::-1][shown])
    ax.tick_params(length=0)
    drawing.title(figure, "Decoded boots over two latents")
    return figure


def manifold_codes(side: int = 15) -> np.ndarray:
    """`side`² codes of two latents, evenly spaced in prior probability on [0.05, 0.95]: row by row, latent 1 falling."""
    values = norm.ppf(np.linspace(*MANIFOLD_SHARES, side))
    return np.stack([np.tile(values, side), np.repeat(values[::-1], side)], axis=1).astype(np.float32)


@drawing.house_style
def samples(outputs: np.ndarray, image_shape: Sequence[int] | None = None) -> Figure:
    """What the decoder makes of draws from the prior: images in a grid, or points."""
    if image_shape is None:
        figure, axes = drawing.panels(1, 1, height=4.0, width=4.4)
        points = outputs if outputs.shape[1] > 1 else np.column_stack([outputs[:, 0], _spread(len(outputs))])
        axes[0, 0].plot(points[:, 0], points[:, 1], ".", color=drawing.ARM_COLOURS["vae"], markersize=3, alpha=0.6)
        drawing.label_edges(axes, "dimension 0", "dimension 1")
    else:
        figure, axes = drawing.panels(1, 1, height=4.2, width=4.2)
        _show(axes[0, 0], outputs, image_shape, math.isqrt(len(outputs)), "decoded draws from N(0, I)")
    drawing.title(figure, "Samples from the prior")
    return figure


@drawing.house_style
def sample_sheets(
    sheets: Sequence[tuple[str, np.ndarray]],
    image_shape: Sequence[int],
    title: str = "Samples from the prior",
    x: str = "decoded draws from N(0, I)",
    y: str = "",
) -> Figure:
    """Square sheets of decoded images, such as samples or manifolds, one a model, beside each other."""
    figure, axes = drawing.wrapped(len(sheets), "", height=3.05)
    for ax, (name, outputs) in zip(axes, sheets, strict=True):
        _show(ax, outputs, image_shape, math.isqrt(len(outputs)), x, y)
        ax.set_title(name)
    drawing.title(figure, title)
    return figure


@drawing.house_style
def interpolations(rows: Sequence[tuple[str, np.ndarray]], image_shape: Sequence[int]) -> Figure:
    """Decoded steps from one code to another, a row each; rows of one label, a model, lie together."""
    models = {label: [images for name, images in rows if name == label] for label, _ in rows}
    steps, heights = len(rows[0][1]), [len(of_model) for of_model in models.values()]
    figure, axes = drawing.panels(
        len(models), 1, height=(0.54 * len(rows) + 0.4) / len(models), width=7.0, height_ratios=heights
    )
    for ax, (label, of_model) in zip(axes.flat, models.items(), strict=True):
        _show(ax, np.concatenate(of_model), image_shape, steps)
        ax.set_anchor("W")
        ax.set_yticks([len(of_model) * image_shape[-2] / 2], [label])
        ax.tick_params(length=0)
    shares = [drawing.number(round(step / (steps - 1), 2)) for step in range(steps)]
    axes[-1, 0].set_xticks(_middles(steps, image_shape[-1]), shares)
    axes[-1, 0].set_xlabel("share of the way from one image's code to the other's")
    drawing.title(figure, "Interpolations between codes of test images")
    return figure


def _image_pairs(inputs: np.ndarray, outputs: np.ndarray, image_shape: Sequence[int], across: int = 10) -> Figure:
    count = min(len(inputs), 3 * across) // across * across or len(inputs)
    across = min(across, count)
    rows = count // across
    figure, axes = drawing.panels(rows, 1, height=1.65, width=0.75 * across)
    for row, ax in enumerate(axes.flat):
        chosen = slice(row * across, (row + 1) * across)
        both = np.concatenate([inputs[chosen], outputs[chosen]])
        _show(ax, both, image_shape, across)
        ax.set_yticks([0.5 * image_shape[-2], 1.5 * image_shape[-2]], ["input", "decoded"])
        ax.tick_params(length=0)
    axes[-1, 0].set_xlabel("test images, each above its reconstruction")
    drawing.title(figure, "Inputs and their reconstructions")
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


def _no_ticks(ax: Axes, x: str, y: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
