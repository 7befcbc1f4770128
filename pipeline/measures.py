"""What is measured of every cell, by name, and the words for it in tables and plots. Knows no torch.

A measure is a function of the same name in `evaluation.py` (groups `test` to `matched`), a column of the noise table (`noise`)
or of the pruning analysis (`prune`); a test compares them with this list. Studies, the report and MLflow use these names.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Measure(NamedTuple):
    """Words, the least step of what is counted, and whether a model may lack it for want of training."""

    label: str
    step: float = 0.0
    learned: bool = False


ONE = 1.0  # a count
SHARE = 0.001  # of rows or values, of which there are about a thousand


AXIS_WORDS = {"beta": "β", "l2": "λ", "sigma2": "σ²", "train_noise": "noise level in training", "latent_dim": "latents"}
"""Words for axes in plots, where they differ from the axes' names."""
RADIUS = "radius/"  # and the name of a class
CLASS = re.compile(r"[\w .,/&'()+-]{1,64}")
MEASURES = {
    # One sample each of the test set
    "test/reconstruction": Measure("reconstruction (nats)"),
    "test/kl": Measure("KL (nats)"),
    "test/kl_share": Measure("KL's share of the loss at β = 1"),
    "test/elbo": Measure("ELBO (nats)"),
    "test/bce_elbo": Measure("−(cross-entropy + KL) (nats)"),
    "test/iw_bound": Measure("importance-weighted bound (nats)"),
    "test/mse": Measure("squared error"),
    "test/sharpness": Measure("sharpness of reconstructions, as a share of the input's"),
    "test/near_0": Measure("share of reconstructed values below 0.05", step=SHARE),
    "test/near_1": Measure("share of reconstructed values above 0.95", step=SHARE),
    "test/active_units": Measure("active units", step=ONE),
    "test/posterior_variance": Measure("σ² of q(z|x), as a share of all variance of z"),
    "test/knn_accuracy": Measure("k-NN accuracy", step=SHARE),
    "units/active": Measure("active units, by σ² of q(z|x)", step=ONE),
    "units/mixed": Measure("mixed units, by σ² of q(z|x)", step=ONE),
    "units/passive": Measure("passive units, by σ² of q(z|x)", step=ONE),
    # Compared with the training set, and with linear or raw codes
    "gap/mse": Measure("squared error, test minus training set"),
    "gap/pca_mse": Measure("squared error minus that of PCA"),
    "gap/raw_knn_accuracy": Measure("k-NN accuracy minus that of raw inputs", step=SHARE),
    # The codes of the test set
    "latent/sliced_wasserstein": Measure("sliced Wasserstein distance of codes from the prior"),
    "latent/non_normality": Measure("Henze–Zirkler statistic over its 5% critical value"),
    "latent/kurtosis": Measure("mean excess kurtosis of the latents"),
    "latent/utilisation": Measure("latent utilisation"),
    "latent/on_lines": Measure("share of codes along two lines, above that of random directions", learned=True),
    "latent/trustworthiness": Measure("trustworthiness"),
    "latent/silhouette": Measure("silhouette of the classes"),
    "latent/dependence": Measure("total correlation of active latents (nats a latent)", learned=True),
    # The decoder
    "decoder/sensitivity": Measure("output change for a step of 0.1 deviations in z"),
    "decoder/folds": Measure("folds of the decoded line", step=ONE),
    "interpolation/roughness": Measure("largest over mean step of an interpolation"),
    "interpolation/distance": Measure("distance of midpoints from the data"),
    "samples/precision": Measure("precision of samples", step=SHARE),
    "samples/recall": Measure("recall of samples", step=SHARE),
    "samples/f1": Measure("F1 of samples: harmonic mean of precision and recall", step=SHARE),
    "samples/density": Measure("density of samples", step=SHARE),
    "samples/coverage": Measure("coverage of samples", step=SHARE),
    # Ankle boots
    "boots/axis_alignment": Measure("how far one latent is the shaft's height and the other the heel's"),
    # Under the noise that the cell was trained with
    "matched/mse_clean": Measure("squared error from clean images, noise as in training"),
    "matched/mse_noisy": Measure("squared error from noisy images, noise as in training"),
    # Under noise at test time; these have axes `noise` and `level`
    "noise/mse_clean": Measure("squared error from the clean input"),
    "noise/mse_noisy": Measure("squared error from the corrupted input"),
    "noise/left": Measure("error where inputs were changed, as a share of the mean image's"),
    "noise/rise": Measure("rise of the error, as a share of the variance explained of clean input", learned=True),
    # Pruning
    "prune/active_units": Measure("active units", step=ONE),
    "prune/elbow_column_sum": Measure("elbow of |column sum|", step=ONE),
    "prune/elbow_column_l1": Measure("elbow of L1 norm", step=ONE),
    "prune/elbow_column_l2": Measure("elbow of L2 norm", step=ONE),
    "prune/elbow_kl": Measure("elbow of KL", step=ONE),
    "prune/cancelled": Measure("cancelling columns", step=ONE),
}
"""All measures; `radius/<class>`, the mean distance of a class' codes from their centre, comes on top for labelled data."""


def find(name: str) -> Measure | None:
    """The measure of this name, or None."""
    if name.startswith(RADIUS) and CLASS.fullmatch(name.removeprefix(RADIUS)):
        return Measure(f"distance of class {name.removeprefix(RADIUS)} from the centre")
    return MEASURES.get(name)
