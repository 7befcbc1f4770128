"""Every figure has labelled axes, equal data give equal bytes, and nothing leaks into matplotlib's state."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline import drawing, figures, pictures
from pipeline.config import ARMS

RNG = np.random.default_rng(0)
SETTINGS = [("vae", 1.0), ("vae", 4.0), ("ae", math.nan), ("ae_code_l2", 0.5)]


def _summary(metrics: list[str], **axes: list) -> pd.DataFrame:
    rows = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    table = pd.concat([rows.assign(arm=arm, beta=beta) for arm, beta in SETTINGS], ignore_index=True)
    for metric in metrics:
        table[metric] = np.linspace(1, 2, len(table))
        table[f"{metric} low"], table[f"{metric} high"] = table[metric] - 0.1, table[metric] + 0.1
    return table


def _rates(l2: tuple[float, ...] = (0.0, 1e-5)) -> pd.DataFrame:
    table = _summary(["test/kl", "test/reconstruction", "test/mse"], latent_dim=[2, 8], l2=list(l2))
    table.loc[table["arm"] == "ae", ["test/kl", "test/kl low", "test/kl high"]] = math.nan
    return table


def _training(panels: int) -> pd.DataFrame:
    table = _summary(["validation_loss"], update=list(range(10, 200, 10)), setting=["a", "b"])
    return pd.concat([table.assign(panel=f"study {k}") for k in range(panels)])


def _likelihoods() -> pd.DataFrame:
    updates = np.geomspace(100, 10_000, 20)
    return pd.concat(pd.DataFrame({"seed": s, "update": updates, "validation_loss": 90 + s + 9e3 / updates}) for s in (0, 1))


def _noise() -> pd.DataFrame:
    return _summary(["mse_clean"], noise=["gaussian", "salt_and_pepper"], latent_dim=[2, 8], level=[0.0, 0.1, 0.3])


def _pca() -> pd.DataFrame:
    rows = [
        {"noise": n, "latent_dim": d, "level": v, "mse_clean": v} for n in ("gaussian",) for d in (2, 8) for v in (0.0, 0.3)
    ]
    return pd.DataFrame(rows)


def _paired() -> pd.DataFrame:
    table = _noise().query("arm != 'ae'")
    return table.assign(difference=table["mse_clean"] - 1.5, low=table["mse_clean"] - 1.6, high=table["mse_clean"] - 1.4)


def _columns() -> pd.DataFrame:
    table = _summary(["column_sum", "column_l2", "kl", "mean_variance"], manifold_dim=[1, 2], latent=list(range(4)))
    table["cell_id"] = table["arm"] + table["manifold_dim"].astype(str)
    table.loc[table["arm"] == "ae", "kl"] = math.nan
    return table


def _ablation() -> pd.DataFrame:
    table = _summary(["mse"], manifold_dim=[1, 2], criterion=["column_sum", "kl"], zeroed=list(range(5))).assign(latent_dim=4)
    return table[(table["arm"] != "ae") | (table["criterion"] != "kl")]


def _counts() -> pd.DataFrame:
    return _summary(["active_units", "elbow_kl"], manifold_dim=[1, 2, 3])


def _claims() -> pd.DataFrame:
    columns = ["id", "source", "verdict", "effect", "margin", "low", "high"]
    rows = [
        ("b", "second", "contradicted", "−2 [−5, 1]", -2e-5, -5e-5, 1e-5),
        ("a", "first", "supported", "2.0 [1.0, 3.0]", 2.0, 1.0, 3.0),
        ("c", "first", "undecided", "0.5", 0.5, math.nan, math.nan),
        ("d", "third", "not run", "–", math.nan, math.nan, math.nan),
    ]
    return pd.DataFrame(rows, columns=columns)


def _lattice(latents: int) -> list[dict]:
    settings = [(column, l2) for column in ("plain AE", "VAE, β = 1") for l2 in (0, 0.1, 0.25)]
    codes = POINTS[:, :latents]
    return [{"column": c, "l2": l2, "x": POINTS, "codes": codes * 1e-9, "reconstructions": 0.5 * POINTS} for c, l2 in settings]


def _spectrum(components: int) -> pd.DataFrame:
    share = 0.5 ** np.arange(1, components + 1)
    return pd.DataFrame({"components": np.arange(1, components + 1), "variance_ratio": share, "mse": share})


def _outliers() -> pd.DataFrame:
    return _summary(["mse"], outlier_ratio=[0, 0.1, 0.2], manifold_dim=[1, 2])


MEASURES = {"active_units": "active units", "elbow_kl": "elbow of KL"}
POINTS, IMAGES = RNG.uniform(-1, 1, (64, 2)), RNG.random((64, 30))
LABELS = np.arange(64) % 3
SPACES = [("PCA", POINTS, LABELS), ("plain AE", 3 * POINTS, LABELS % 2)]
DRAWINGS: dict[str, Callable[[], Figure]] = {
    "training": lambda: figures.training_curves(_training(4)),
    "training, one panel": lambda: figures.training_curves(_training(1)),
    "identities": lambda: figures.identities({"holds": 0.4, "rounds": 0.0, "fails": 9.0}),
    "likelihood": lambda: figures.likelihood_curves(_likelihoods(), [88.2, 88.4], 86.76),
    "rate-distortion": lambda: figures.rate_distortion(_rates()),
    "robustness": lambda: figures.robustness(_noise(), _pca()),
    "robustness without PCA": lambda: figures.robustness(_noise()),
    "paired": lambda: figures.paired_differences(_paired()),
    "scree": lambda: figures.scree(_columns(), "manifold_dim"),
    "ablation": lambda: figures.ablation(_ablation(), "manifold_dim"),
    "used dimensions": lambda: figures.used_dimensions(_counts(), "manifold_dim", MEASURES),
    "heat map": lambda: figures.heat_map(_rates((0.0, 0.1, 0.2)), {"test/mse": "Squared error", "test/kl": "KL (nats)"}),
    "reconstructions, plane": lambda: pictures.reconstructions(POINTS, 0.9 * POINTS),
    "reconstructions, vectors": lambda: pictures.reconstructions(IMAGES, IMAGES),
    "reconstructions, images": lambda: pictures.reconstructions(IMAGES, IMAGES, (5, 6)),
    "reconstructions, few images": lambda: pictures.reconstructions(IMAGES[:3], IMAGES[:3], (5, 6)),
    "latents, one": lambda: pictures.latent_scatter(POINTS[:, :1], LABELS, ["a", "b", "c"]),
    "latents, two": lambda: pictures.latent_scatter(POINTS, LABELS),
    "latents, many": lambda: pictures.latent_scatter(IMAGES, LABELS),
    "latents, no labels": lambda: pictures.latent_scatter(POINTS),
    "manifold, plane": lambda: pictures.manifold(pictures.manifold_codes(8)),
    "manifold, images": lambda: pictures.manifold(IMAGES, (5, 6)),
    "samples, plane": lambda: pictures.samples(POINTS),
    "samples, images": lambda: pictures.samples(IMAGES, (5, 6)),
    "noise curves": lambda: figures.noise_curves(
        _summary(["mse"], target=["clean", "noisy"], latent_dim=[2, 8], train_noise=[0, 0.1]), "mse", "squared error"
    ),
    "PCA": lambda: figures.pca_curve(_spectrum(20), _summary(["mse"], latent_dim=[2, 8])),
    "outliers": lambda: figures.outlier_map(_outliers(), "outlier_ratio", "manifold_dim", "mse", "Squared error"),
    "ledger": lambda: figures.ledger(_claims()),
    "lattice, one latent": lambda: pictures.quadrant_lattice(_lattice(1), ""),
    "lattice, two latents": lambda: pictures.quadrant_lattice(_lattice(2), ""),
    "latent spaces": lambda: pictures.latent_spaces(SPACES, ["a", "b", "c"]),
    "boots": lambda: pictures.boot_axes(IMAGES, (5, 6), "latent 3: heel", "latent 0: shaft"),
    "sheets of images": lambda: pictures.sample_sheets([("AE", IMAGES), ("VAE", IMAGES[:9])], (1, 5, 6)),
    "interpolations of images": lambda: pictures.interpolations([("AE", IMAGES[:11])] * 2 + [("VAE", IMAGES[:11])], (5, 6)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_says_what_its_axes_are(name: str):
    figure = DRAWINGS[name]()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert isinstance(figure, Figure) and figure.get_suptitle()
    assert any(ax.get_xlabel() for ax in axes)
    assert any(ax.get_ylabel() for ax in axes) or "images" in name


@pytest.mark.parametrize("name", ["latents, many", "heat map", "ledger", "boots", "PCA"])
def test_equal_data_give_equal_bytes_whatever_the_users_style(name: str, tmp_path: Path):
    drawing.save(DRAWINGS[name](), tmp_path / "first.png")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "figure.dpi": 50, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        drawing.save(DRAWINGS[name](), tmp_path / "second.png")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_a_png_carries_no_metadata_and_no_open_figure_is_left(tmp_path: Path):
    drawing.save(DRAWINGS["paired"](), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG" and image.info == {"Software": "vaesweep"}
        assert image.width >= 800
    pyplot = sys.modules.get("matplotlib.pyplot")  # seaborn imports it, but no figure may be registered with it
    assert pyplot is None or not pyplot.get_fignums()


def test_every_arm_has_its_colour_and_larger_betas_are_darker():
    colours = figures._colours(figures._labelled(_rates()))
    assert list(colours) == ["plain AE", "VAE, β = 1", "VAE, β = 4", "AE, code L2, β = 0.5"]
    assert colours["plain AE"] == drawing.ARM_COLOURS["ae"]
    assert sum(colours["VAE, β = 1"][:3]) > sum(colours["VAE, β = 4"][:3])
    assert set(drawing.ARM_COLOURS) == set(drawing.ARM_LABELS) == set(ARMS)


def test_manifold_codes_are_quantiles_of_the_prior_on_the_inner_nine_tenths():
    codes = pictures.manifold_codes(3)
    edge = 1.6448536
    np.testing.assert_allclose(codes[:3], [[-edge, edge], [0, edge], [edge, edge]], atol=1e-6)
    assert codes.shape == (9, 2) and codes.dtype == np.float32


def test_principal_components_do_not_flip_when_the_codes_do_not():
    shown, x, _ = pictures._shown_codes(IMAGES, LABELS)
    again, _, _ = pictures._shown_codes(IMAGES.copy(order="F"), LABELS)
    np.testing.assert_allclose(shown, again, atol=1e-9)
    assert "principal component 1 of 30 latents" in x


@pytest.mark.parametrize(("value", "text"), [(1e-5, "1e-5"), (1.0, "1"), (0.25, "0.25"), (2e10, "2e10"), (0.0005, "0.0005")])
def test_settings_are_written_short(value: float, text: str):
    assert drawing.number(value) == text


def test_the_ledger_shows_what_was_decided_by_source_with_its_numbers():
    ax = figures.ledger(_claims()).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c", "b"]
    assert [text.get_text() for text in ax.texts] == ["first", "second"]
    assert [label.get_text() for label in ax.child_axes[0].get_yticklabels()] == ["2.0 [1.0, 3.0]", "0.5", "−2 [−5, 1]"]
    ends = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_color() != "#444444"]
    np.testing.assert_allclose(ends, [[1 / 3, 1], [math.nan] * 2, [-1, 0.2]])


@pytest.mark.parametrize(
    ("levels", "scale", "left"),
    [
        ([0, 0.1, 0.3, 0.5], "linear", None),
        ([0.25, 1, 4], "log", None),
        ([0, 1e-3, 0.02, 0.25], "log", 0),
        ([0.0], "linear", None),
    ],
)
def test_levels_far_from_even_are_on_a_log_scale_with_zero_at_the_left_edge(levels: list, scale: str, left: float | None):
    ax = Figure().subplots()
    ax.plot(levels, levels)
    figures._axis_of_levels(ax, [float(level) for level in levels])
    assert ax.get_xscale().removeprefix("sym") == scale
    assert left is None or ax.get_xlim()[0] == left
    assert list(ax.get_xticks()) == levels


def test_a_difference_map_is_centred_at_zero():
    maps = [ax.collections[0] for ax in DRAWINGS["outliers"]().axes]
    assert len(maps) == 3 * 3
    for plain, arm, difference in zip(maps[::3], maps[1::3], maps[2::3], strict=True):
        np.testing.assert_allclose(difference.get_array(), arm.get_array() - plain.get_array())
        assert difference.norm.vmin == -difference.norm.vmax < 0


def test_a_lattice_shows_shrinkage_and_collapse():
    figure = DRAWINGS["lattice, two latents"]()
    axes = np.reshape(figure.axes, (3, 7))
    framed = [axes[0, 6], *axes[:, 1], *axes[:, 4]]
    assert len({(*ax.get_xlim(), *ax.get_ylim()) for ax in framed}) == 1  # the input's frame, for all reconstructions
    assert all(np.ptp(ax.get_xlim()) >= 0.2 for ax in axes[:, [0, 3]].flat)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["λ = 0.25", "λ = 0.1", "λ = 0"]


def test_interpolations_of_one_model_lie_together():
    axes = DRAWINGS["interpolations of images"]().axes
    assert [ax.images[0].get_array().shape for ax in axes] == [(2 * 5, 11 * 6), (5, 11 * 6)]
    assert [ax.get_yticklabels()[0].get_text() for ax in axes] == ["AE", "VAE"]


def test_large_pictures_stay_small_files(tmp_path: Path):
    noise = RNG.random((225, 28, 28)).cumsum(axis=2)  # smooth along one direction, as images are; noise along the other
    sheets = [(f"model {k}", (noise / noise.max()).reshape(225, -1)) for k in range(2)]
    drawing.save(pictures.sample_sheets(sheets, (28, 28)), tmp_path / "sheets.png")
    drawing.save(
        figures.ledger(pd.concat([_claims().assign(source=f"source {k}") for k in range(24)])), tmp_path / "ledger.png"
    )
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 150 * 1024


def test_a_claims_panel_shows_its_seeds_its_verdict_and_its_bound():
    values = np.random.default_rng(0).random((1, 6))
    panels = [
        figures.ClaimPanel("a", "supported", "squared error", "β", ["0.1", "1"], np.repeat(values, 2, axis=0), []),
        figures.ClaimPanel("b", "undecided", "silhouette", "", ["silhouette"], values, [0.0]),
    ]
    first, second = figures.claim_panels(panels).axes[:2]
    assert first.get_title() == "a: supported" and [tick.get_text() for tick in first.get_xticklabels()] == ["0.1", "1"]
    seeds = [line.get_ydata()[0] for line in second.lines[:6]]
    assert sorted(seeds) == sorted(values[0]) and second.lines[-1].get_ydata()[0] == 0.0
