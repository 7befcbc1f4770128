"""Sections of the report that show cells themselves: codes, reconstructions, interpolations and samples of first seeds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline import artifacts, config, drawing, figures, intervals, pictures
from pipeline import markdown as md
from pipeline.results import StudyResults, reconstructing

MOST_MODELS = 6
PAIRS = 3  # interpolations a model
POINTS = 300  # a scatter of a lattice
FIRST = "the first seed of each setting"
BOOTS = "boots/axis_alignment"  # measured of ankle boots alone


def section(results: StudyResults) -> str:
    """What a study's cells look like: data in the plane, or images."""
    if results.pictured.empty:
        return ""
    if results.describe["features"] == 2 and not results.describe["image_shape"]:
        return md.join("### Input, code and reconstruction", *(_lattice(results, dim) for dim in results.study.grid.latent_dim))
    return _images(results) if results.describe["image_shape"] else ""


def _lattice(results: StudyResults, latent_dim: int) -> str:
    """Codes and reconstructions over β and λ."""
    shown = results.pictured[results.pictured["latent_dim"] == latent_dim].sort_values("seed", kind="stable")
    if shown.empty:
        return ""
    shown, fixed = results.slice(shown, keep=("l2", "anneal"))
    cells = [_lattice_cell(results, row) for row in shown.drop_duplicates(["arm", "beta", "l2", "anneal"]).to_dict("records")]
    setting = f" ({', '.join(fixed)})" if fixed else ""
    caption = (
        f"Codes and reconstructions through {drawing.latents(latent_dim)}{setting}, coloured by the input's quadrant, over β "
        f"(across) and λ (up): means of test points, one latent spread upwards at random; {FIRST}."
    )
    title = f"Codes and reconstructions through {drawing.latents(latent_dim)}"
    return results.gallery.show(f"lattice-{latent_dim}", pictures.quadrant_lattice(cells, title), caption)


def _lattice_cell(results: StudyResults, row: dict[str, Any]) -> dict[str, Any]:
    tensors = _tensors(results, row["cell_id"])
    rising = ", rising" if row["anneal"] > 0 else ""
    arrays = {name: tensors[name][:POINTS] for name in ("x", "codes", "reconstructions")}
    return {"column": drawing.arm_label(row["arm"], row["beta"]) + rising, "l2": row["l2"], **arrays}


class Portrait(NamedTuple):
    """A model of two latents: how it is called, its arm, and what `evaluate` saved of it."""

    label: str
    arm: config.Arm
    tensors: dict[str, np.ndarray]


def _images(results: StudyResults) -> str:
    """Latent spaces, interpolations, samples and manifolds of models with two latents, and PCA's errors beside theirs."""
    shown = _portraits(results)
    if not shown or results.study.train.noise:
        return _components(results)
    shape, names = results.describe["image_shape"], results.describe["labels"]
    spaces = [("PCA", _tensors(results, "pca")["codes"], shown[0].tensors["labels"])]
    spaces += [(one.label, one.tensors["codes"], one.tensors["labels"]) for one in shown]
    paths = [(one.label, path) for one in shown for path in one.tensors["interpolation"][:PAIRS]]
    drawn = [(one.label, one.tensors["samples"]) for one in shown]
    samples = pictures.sample_sheets(drawn, shape, "Decoded draws", x="decoded draws")
    show = results.gallery.show
    return md.join(
        "### Two latents: codes, interpolations, samples",
        show("latent-spaces", pictures.latent_spaces(spaces, names), f"Codes of test images by class, and PCA's; {FIRST}."),
        show("interpolations", pictures.interpolations(paths, shape), f"Decoded lines between codes of test images; {FIRST}."),
        show(
            "samples", samples, "Decoded draws from the prior, or from the Gaussian fitted to the codes of an arm without a KL."
        ),
        _manifolds(results, [one for one in shown if one.arm.variational]),
        _components(results),
    )


def _portraits(results: StudyResults) -> list[Portrait]:
    """Each arm and β of two latents, at the first value of every other axis."""
    shown = results.pictured[results.pictured["latent_dim"] == 2].sort_values("seed", kind="stable")
    shown = results.slice(shown)[0].drop_duplicates(["arm", "beta"]).head(MOST_MODELS)
    rows = shown[["arm", "beta", "cell_id"]].itertuples(index=False)
    return [Portrait(drawing.arm_label(arm, beta), config.ARMS[arm], _tensors(results, key)) for arm, beta, key in rows]


def _manifolds(results: StudyResults, shown: list[Portrait]) -> str:
    """What the prior's plane decodes to; of boots with an axis for each latent."""
    shape, sheets = results.describe["image_shape"], [(one.label, one.tensors["manifold"]) for one in shown]
    if not sheets:
        return ""
    caption = "Decoded codes on a grid of the prior's quantiles, 5% to 95%."
    sheet = pictures.sample_sheets(sheets, shape, "Manifolds of two latents", "latent 0", "latent 1")
    return md.join(results.gallery.show("manifolds", sheet, caption), _boots(results, *sheets[0]))


def _boots(results: StudyResults, label: str, manifold: np.ndarray) -> str:
    """The plane of two latents of ankle boots."""
    if results.metrics[BOOTS].isna().all():
        return ""
    caption = f"Boots over two latents ({label}): is one axis the shaft's height, and the other the heel's?"
    picture = pictures.boot_axes(manifold, results.describe["image_shape"], "latent 0", "latent 1")
    return results.gallery.show("boots", picture, caption)


def _components(results: StudyResults) -> str:
    """Error over the number of principal components, with the models' beside it."""
    if results.metrics.empty or results.study.data.axes:
        return ""
    of_models = reconstructing(results.slice(results.metrics)[0]).rename(columns={"test/mse": "mse"})
    summary = intervals.summarise(of_models, ["arm", "beta", "latent_dim"], ["mse"])
    caption = "PCA: variance explained, and test error over components; the models' errors, with 95% intervals over seeds."
    return results.gallery.show("components", figures.pca_curve(results.components, summary), caption)


def _tensors(results: StudyResults, name: str) -> dict[str, np.ndarray]:
    path = artifacts.Folders(results.name).evaluate / "codes" / f"{name}.safetensors"
    return {key: tensor.numpy() for key, tensor in artifacts.read_tensors(path).items()}
