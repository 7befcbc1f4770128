"""What all plots share: the house style, arms' colours and names, panels, and how a figure is saved.

No pyplot, so no state between plots; equal data give equal bytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, PngImagePlugin

from pipeline import artifacts
from pipeline.measures import AXIS_WORDS

MAKER = "vaesweep"
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


def house_style(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Any:
        with style.context(["default", HOUSE_STYLE]):
            return draw(*arguments, **options)

    return styled


@house_style
def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whose bytes depend on the figure alone: no date, no software version."""
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MAKER)
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True, pnginfo=mark)  # a third of the size
    artifacts.write_bytes(path, buffer.getvalue())


def is_ours(path: Path) -> bool:
    """Whether a file is a picture that `save` wrote."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == MAKER
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # as PIL refuses what is no picture of ours
        return False


def arm_label(arm: str, beta: SupportsFloat | None = None) -> str:
    """How plots and tables call an arm: `VAE, β = 4`."""
    name = ARM_LABELS.get(arm, arm)
    return name if beta is None or math.isnan(beta) else f"{name}, β = {number(float(beta))}"


def words(axis: str) -> str:
    """An axis as plots call it."""
    return AXIS_WORDS.get(axis, axis.replace("_", " "))


def latents(count: Any) -> str:
    """`1 latent`, `2 latents`."""
    return f"{int(count)} latent{'s' if count != 1 else ''}"


def number(value: float) -> str:
    """A setting's value as plots and tables write it: `1e-5`, not `1e-05`."""
    return re.sub(r"e([-+])0", r"e\1", f"{value:g}").replace("e+", "e")


def panels(rows: int, columns: int, height: float, width: float = 9.0, **options: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.locator_params(nbins=6)
    return figure, axes


def wrapped(count: int, x: str, y: str | None = None, *, height: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """Panels in even rows of up to `across`, with x below the lowest of each column."""
    rows = math.ceil(count / across)
    columns = math.ceil(count / rows)
    figure, axes = panels(rows, columns, height)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    label_edges(axes, x, y)
    for ax in axes.flat[count - columns : count]:
        ax.set_xlabel(x)
    return figure, list(axes.flat[:count])


def title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", parse_math=False)


def label_edges(axes: np.ndarray, x: str, y: str | None = None) -> None:
    for ax in axes.flat:
        ax.set_xlabel("")
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for column, ax in np.ndenumerate(axes):
        if y is not None:
            ax.set_ylabel(y if column[1] == 0 else "")


def handles(colours: dict[str, Any], marker: str | None = None, **options: Any) -> list[Line2D]:
    options |= {"marker": marker, "markersize": 4}
    return [Line2D([], [], color=colour, label=label, **options) for label, colour in colours.items()]


def legend(figure: Figure, handles: list[Line2D], title: str | None = None) -> None:
    figure.legend(handles=handles, loc="outside right center", title=title, alignment="left")
