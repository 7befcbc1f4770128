"""What evaluation measures, as pure functions on tensors. The leading axis is `stack`, the cells that are measured together."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import special, stats
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pipeline.latents import VARIANCE_FLOOR
from pipeline.randomness import Stream, normals

DIRECTIONS = 100  # onto which codes are projected
BINS = 10  # a latent, of equal prior probability
PAIRS = 100  # of latents whose plane is looked at
LINES, LINE_WIDTH = 90, 0.1  # directions, and deviations, of lines along which codes may crowd
FOLD = 0.1  # data units by which a decoded line must turn back


def squared_error(
    output: Float[Tensor, "stack batch feature"], target: Float[Tensor, "... batch feature"]
) -> Float[Tensor, "stack batch"]:
    """Mean squared error per dimension of each sample."""
    return (output - target).square().mean(dim=-1)


def log_importance_weight(
    nll: Float[Tensor, "stack batch"],
    z: Float[Tensor, "stack batch lane"],
    epsilon: Float[Tensor, "stack batch lane"],
    log_variance: Float[Tensor, "stack batch lane"],
) -> Float[Tensor, "stack batch"]:
    """log p(x|z) + log p(z) − log q(z|x) for z = μ + σ ⊙ ε, in nats, from −log p(x|z).

    The log of its mean over K draws of ε is a lower bound of log p(x) that rises with K (Burda, Grosse & Salakhutdinov 2016).
    """
    return 0.5 * (epsilon.square() + log_variance - z.square()).sum(dim=-1) - nll


def knn_accuracy(
    train: Float[Tensor, "row feature"],
    train_labels: Int[Tensor, " row"],
    test: Float[Tensor, "other feature"],
    test_labels: Int[Tensor, " other"],
    neighbours: int,
) -> float:
    """Share of test rows whose label the k nearest training rows vote for, by Euclidean distance in the code as it is."""
    classifier = KNeighborsClassifier(min(neighbours, len(train))).fit(train.numpy(), train_labels.numpy())
    return float(classifier.score(test.numpy(), test_labels.numpy()))


def fit_pca(x: Float[Tensor, "row feature"], dimensions: int) -> PCA:
    """Principal components of the training data: the best linear code of this dimension."""
    return PCA(n_components=min(dimensions, *x.shape), svd_solver="auto", random_state=0).fit(x.numpy())


def pca_reconstruction(pca: PCA, x: Float[Tensor, "row feature"]) -> Float[Tensor, "row feature"]:
    """Projection onto the components and back."""
    return torch.from_numpy(np.asarray(pca.inverse_transform(pca.transform(x.numpy())), dtype=np.float32))


# ---------------------------------------- reconstructions and the posterior


def bernoulli_entropy(x: Float[Tensor, "row feature"]) -> Float[Tensor, " row"]:
    """The lowest cross-entropy that any reconstruction of grey values in [0, 1] can have, in nats; 0 for black and white."""
    return (torch.special.entr(x) + torch.special.entr(1 - x)).sum(dim=-1)


def edge_energy(images: Float[Tensor, "*_ row height width"]) -> Float[Tensor, "*_"]:
    """Mean squared Laplacian (four neighbours) of inner pixels, a focus measure (Subbarao, Choi & Nikzad 1993)."""
    inner = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return (around - 4 * inner).square().mean(dim=(-3, -2, -1))


class Units(NamedTuple):
    """How many latents are of each kind."""

    active: Int[Tensor, " stack"]
    mixed: Int[Tensor, " stack"]
    passive: Int[Tensor, " stack"]


def posterior_units(variance: Float[Tensor, "stack row latent"]) -> Units:
    """Active, mixed and passive latents by σ² of q(z|x) (Bonheme & Grzes, "Be more active!", JMLR 2023).

    Where σ² varies over the data by less than 0.1, a latent is passive at a mean of 0.9 to 1.1 and active at one of at most
    0.1; all others are mixed.
    """
    steady, mean = variance.var(dim=1) < 0.1, variance.mean(dim=1)
    passive, active = steady & ((mean - 1).abs() <= 0.1), steady & (mean <= 0.1)
    return Units(*(kind.sum(dim=-1) for kind in (active, ~passive & ~active, passive)))


# ---------------------------------------- codes


def sliced_wasserstein(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """1-Wasserstein distance to N(0, 1), averaged over 100 fixed random directions (Bonneel et al. 2015), in prior units.

    As many draws from N(0, I) have about 0.9/√row.
    """
    directions = fixed_normals(DIRECTIONS, codes.shape[-1], codes.device)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    # numpy sorts short rows 10 times as fast as torch
    projected = np.sort((directions @ codes.transpose(-2, -1)).cpu().numpy(), axis=-1)
    quantiles = torch.special.ndtri(_plotting_positions(codes.shape[1], codes.device))
    return (torch.from_numpy(projected).to(codes.device) - quantiles).abs().mean(dim=(-2, -1))


def non_normality(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """Henze and Zirkler's statistic (1990) over its 5% critical value: above 1, the test rejects a normal distribution.

    Affine-invariant. Directions in which codes do not vary have distance 0, hence are not normal. Above some ten latents a
    few hundred rows lie so far apart that it is 1 whatever their distribution.
    """
    rows, latents = codes.shape[1:]
    squared = _mahalanobis(codes)
    b = 0.5 * ((2 * latents + 1) * rows / 4) ** (2 / (latents + 4))  # β² of the paper
    among = torch.exp(-0.5 * b * squared).mean(dim=(-2, -1))
    lengths = squared.mean(dim=-1) - 0.5 * squared.mean(dim=(-2, -1))[:, None]  # from the centre
    to_centre = torch.exp(-0.5 * b / (1 + b) * lengths).mean(dim=-1)
    statistic = among - 2 * (1 + b) ** (-latents / 2) * to_centre + (1 + 2 * b) ** (-latents / 2)
    return rows * statistic / _henze_zirkler_critical(b, latents)


def _mahalanobis(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, "stack row row"]:
    """Squared Mahalanobis distances among rows; directions without variance count for nothing."""
    whitened = _whitened(codes).float()
    return _squared_distances(whitened, whitened)


def _whitened(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, "stack row latent"]:
    """Centred codes on their principal axes, each scaled to variance 1; an axis without variance becomes 0."""
    centred = codes.double() - codes.double().mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.transpose(-2, -1) @ centred / codes.shape[1])
    varies = values > 1e-9 * values.amax(dim=-1, keepdim=True).clamp(min=VARIANCE_FLOOR)
    return centred @ (vectors * torch.where(varies, values.rsqrt(), 0.0)[:, None])


def _henze_zirkler_critical(b: float, d: int) -> float:
    """The statistic's 95% quantile under normality, by the lognormal distribution of its mean and variance (their eq. 3.1)."""
    a, w = 1 + 2 * b, (1 + b) * (1 + 3 * b)
    mean = 1 - a ** (-d / 2) * (1 + d * b / a + d * (d + 2) * b**2 / (2 * a**2))
    variance = (
        2 * (1 + 4 * b) ** (-d / 2)
        + 2 * a**-d * (1 + 2 * d * b**2 / a**2 + 3 * d * (d + 2) * b**4 / (4 * a**4))
        - 4 * w ** (-d / 2) * (1 + 3 * d * b**2 / (2 * w) + d * (d + 2) * b**4 / (2 * w**2))
    )
    spread = math.log1p(variance / mean**2)
    return float(stats.lognorm.ppf(0.95, math.sqrt(spread), scale=mean * math.exp(-spread / 2)))


def kurtosis(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """Mardia's excess kurtosis (1970) for each latent: whatever the rotation, 0 for a normal and −1.2 for a uniform one.

    NaN where a latent does not vary.
    """
    codes = codes.double()
    rows = codes - codes.mean(dim=1, keepdim=True)
    flat = (rows.square().mean(dim=1) <= 1e-12 * codes.square().mean(dim=1)).any(dim=-1)
    precision = torch.linalg.pinv(rows.mT @ rows / rows.shape[1], hermitian=True)
    squared = ((rows @ precision) * rows).sum(dim=-1)
    dim = codes.shape[-1]
    return (squared.square().mean(dim=1) / dim - dim - 2).masked_fill(flat, torch.nan).float()


def utilisation(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """How evenly standardised codes fill the plane of two latents: 1 for N(0, I), 0.01 for a point.

    exp(entropy) over 10 x 10 cells of equal prior probability, averaged over at most 100 pairs of latents, as a share of
    what as many draws from N(0, I) have: a finite sample never fills all cells evenly. A lone latent has 10 cells.
    """
    return _filled_cells(codes) / _filled_cells_of_normals(codes.shape[1], min(2, codes.shape[-1]))


@cache
def _filled_cells_of_normals(rows: int, latents: int) -> float:
    draws = fixed_normals(rows, 32 * latents, torch.device("cpu")).view(rows, 32, latents).transpose(0, 1)
    return float(_filled_cells(draws).mean())


def _filled_cells(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """exp(entropy) of the histogram of each pair of latents, or of the only one, averaged over pairs."""
    latents = codes.shape[-1]
    bins = (BINS * torch.special.ndtr(codes)).long().clamp(max=BINS - 1).transpose(-2, -1)
    pairs = torch.combinations(torch.arange(latents, device=codes.device)) if latents > 1 else None
    if pairs is not None:
        pairs = pairs[evenly(len(pairs), PAIRS).to(codes.device)]
        bins = BINS * bins[:, pairs[:, 0]] + bins[:, pairs[:, 1]]
    counts = torch.zeros(*bins.shape[:2], BINS**2, device=codes.device)
    shares = counts.scatter_add_(-1, bins, torch.ones((), device=codes.device).expand(bins.shape)) / codes.shape[1]
    return torch.special.entr(shares).sum(dim=-1).exp().mean(dim=-1)


def on_lines(codes: Float[Tensor, "stack row 2"]) -> Float[Tensor, " stack"]:
    """How many more codes lie along two lines than would if each had a random direction: 0 for any round cloud, at most 1.

    Codes are whitened, so that neither rotation nor scale matters; in a random direction they lie as far from the centre.
    """
    white = _whitened(codes).float()
    directions = torch.nn.functional.normalize(fixed_normals(codes.shape[1], 2, codes.device), dim=-1)
    return _on_best_lines(white) - _on_best_lines(white.norm(dim=-1, keepdim=True) * directions)


def _on_best_lines(white: Float[Tensor, "stack row 2"]) -> Float[Tensor, " stack"]:
    """Share of rows within 0.1 of one of two lines that cross at 30° or more, by a Hough transform (Duda & Hart 1972).

    The first line holds as many as it can, the second as many of those left.
    """
    angles = torch.arange(0, math.pi, math.pi / LINES, device=white.device)
    offsets = torch.arange(-2, 2.01, LINE_WIDTH, device=white.device)
    normal, angle = torch.stack([angles.cos(), angles.sin()]), angles.repeat_interleave(len(offsets))
    shares = []
    for rows in white:
        near = (((rows @ normal)[..., None] - offsets).abs() < LINE_WIDTH).flatten(1).float()
        first = near.sum(dim=0).argmax()
        crosses = (angle - angle[first]).sin().abs() >= 0.5
        left = near[:, crosses].T @ (1 - near[:, first])
        shares.append((near[:, first].sum() + left.max()) / len(rows))
    return torch.stack(shares)


def total_correlation(codes: Float[Tensor, "stack row latent"]) -> Float[Tensor, " stack"]:
    """Total correlation in nats of a Gaussian copula (Ma & Sun 2011): −½ log det of the correlations of normal scores.

    Less its exact mean for as many independent Gaussian draws, about latent²/(4 row), so that independent latents have 0.
    """
    rows, latents = codes.shape[1:]
    ranks = torch.from_numpy(stats.rankdata(codes.cpu().numpy(), axis=1)).to(codes.device)
    scores = torch.special.ndtri((ranks - 0.5) / rows)
    scores = scores / scores.norm(dim=1, keepdim=True).clamp(min=VARIANCE_FLOOR)
    correlation = (scores.transpose(-2, -1) @ scores).clone()
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # of a constant latent too
    others = np.arange(1, latents)
    by_chance = 0.5 * float((special.digamma((rows - 1) / 2) - special.digamma((rows - 1 - others) / 2)).sum())
    return (-0.5 * torch.logdet(correlation) - by_chance).float()


def neighbour_ranks(distances: Float[Tensor, "row row"]) -> Int[Tensor, "row row"]:
    """Each row's neighbours by number, the row itself being 0."""
    return distances.clone().fill_diagonal_(-1.0).argsort(dim=-1).argsort(dim=-1)


def trustworthiness(
    ranks: Int[Tensor, "row row"], distances: Float[Tensor, "stack row row"], neighbours: int
) -> Float[Tensor, " stack"]:
    """Whether neighbours in the code are neighbours in the data (Venna & Kaski 2001): scikit-learn's, for a stack at once.

    `ranks` are the data's `neighbour_ranks`, `distances` those among codes. 1 is best; codes by chance have about 0.5.
    """
    rows = len(ranks)
    near = (distances + torch.diag(ranks.new_full((rows,), torch.inf, dtype=torch.float))).topk(neighbours, largest=False)
    late = (ranks.expand(len(distances), -1, -1).gather(-1, near.indices) - neighbours).clamp(min=0)
    return 1 - late.sum(dim=(-2, -1)) * 2 / (rows * neighbours * (2 * rows - 3 * neighbours - 1))


def silhouette(distances: Float[Tensor, "stack row row"], labels: Int[Tensor, " row"]) -> Float[Tensor, " stack"]:
    """Mean silhouette of the classes (Rousseeuw 1987): scikit-learn's, for a stack at once. From -1 to 1, which is best."""
    member = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).to(distances)
    count = member.sum(dim=0)
    totals = distances @ member
    inside = (totals * member).sum(dim=-1) / ((count - 1) @ member.T).clamp(min=1)
    outside = (totals / count).masked_fill(member.bool(), torch.inf).amin(dim=-1)
    width = torch.nan_to_num((outside - inside) / torch.maximum(outside, inside))
    return (width * (count @ member.T > 1)).mean(dim=-1)


def class_radii(
    codes: Float[Tensor, "stack row latent"], labels: Int[Tensor, " row"], classes: int
) -> Float[Tensor, "stack class"]:
    """Mean distance of each class' codes from 0; NaN for a class without rows."""
    member = torch.nn.functional.one_hot(labels, classes).to(codes)
    return codes.norm(dim=-1) @ (member / member.sum(dim=0))


# ---------------------------------------- the decoder


def folds(lines: Float[Tensor, "stack point feature"]) -> Float[Tensor, " stack"]:
    """Turning points of a decoded line with a prominence of at least 0.1, of the coordinate that has the most."""
    sides = lines.transpose(-2, -1).cpu().numpy()
    turns = [[_peaks(side) + _peaks(-side) for side in line] for line in sides]
    return torch.tensor(turns, dtype=torch.float, device=lines.device).amax(dim=-1)


def _peaks(values: Float[np.ndarray, " point"]) -> int:
    from scipy.signal import find_peaks  # takes a second to import, which few studies need

    return len(find_peaks(values, prominence=FOLD)[0])


def roughness(paths: Float[Tensor, "stack pair point feature"]) -> Float[Tensor, " stack"]:
    """Longest over mean Euclidean step along a path, averaged over pairs; 1 for even steps, NaN where nothing moves."""
    steps = paths.diff(dim=-2).norm(dim=-1)
    return (steps.amax(dim=-1) / steps.mean(dim=-1)).mean(dim=-1)


def nearest_distance(x: Float[Tensor, "stack row feature"], data: Float[Tensor, "other feature"]) -> Float[Tensor, "stack row"]:
    """Euclidean distance of each row to the nearest row of the data."""
    return torch.stack([_squared_distances(rows[None], data[None])[0].amin(dim=-1).sqrt() for rows in x])


class SampleQuality(NamedTuple):
    """Whether samples look like data (precision, density) and reach all of it (recall, coverage)."""

    precision: Float[Tensor, " stack"]
    recall: Float[Tensor, " stack"]
    f1: Float[Tensor, " stack"]
    density: Float[Tensor, " stack"]
    coverage: Float[Tensor, " stack"]


def neighbour_radius(x: Float[Tensor, "stack row feature"], neighbours: int) -> Float[Tensor, "stack row"]:
    """Squared distance of each row to its k-th nearest other row."""
    return _squared_distances(x, x).topk(neighbours + 1, largest=False).values[..., -1]


def sample_quality(
    real: Float[Tensor, "row feature"], fake: Float[Tensor, "stack draw feature"], neighbours: int
) -> SampleQuality:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) of samples.

    Samples and data lie near each other where one is in a ball around the other that holds its k nearest of its own kind.
    A blurred mean has a precision of 1 and a density far above it, but no recall: the harmonic mean of the first two, F1, is 0.
    """
    squared = _squared_distances(real[None], fake)
    in_real = squared < neighbour_radius(real[None], neighbours)[..., None]
    in_fake = squared < neighbour_radius(fake, neighbours)[:, None]
    precision, recall = in_real.any(dim=1).float().mean(dim=-1), in_fake.any(dim=2).float().mean(dim=-1)
    return SampleQuality(
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall).clamp(min=1e-12),
        density=in_real.sum(dim=1).float().mean(dim=-1) / neighbours,
        coverage=in_real.any(dim=2).float().mean(dim=-1),
    )


# ---------------------------------------- ankle boots


def boot_heights(images: Float[Tensor, "... 28 28"]) -> Float[Tensor, "... 2"]:
    """Heights in pixels of shaft and heel of Fashion-MNIST's ankle boots, whose toes point left.

    Ink is what exceeds a third of an image's brightest pixel. The arch is the highest of the lower edges of columns 14 to 21,
    the waist of the sole. Shaft: from the boot's upper edge to the arch. Heel: from the arch to the lower edge of columns 20
    to 27; none if the sole is flat.
    """
    ink = images > images.amax(dim=(-2, -1), keepdim=True) / 3
    row = torch.arange(28, device=images.device)[:, None]
    lower = torch.where(ink, row + 1, 0).amax(dim=-2)
    upper = torch.where(ink, row, 28).amin(dim=(-2, -1))
    arch = lower[..., 14:22].amin(dim=-1)
    return torch.stack([(arch - upper).clamp(min=0), lower[..., 20:].amax(dim=-1) - arch], dim=-1).float()


def axis_alignment(latents: Float[Tensor, "point 2"], attributes: Float[Tensor, "stack point 2"]) -> Float[Tensor, " stack"]:
    """How far each latent governs one attribute of its own, whichever: 1 if fully, 0 if both govern both alike.

    From Spearman's |ρ| of latents and attributes, the mean of the better assignment minus that of the other. An attribute
    that never changes has ρ = 0.
    """
    ranks = [torch.from_numpy(stats.rankdata(values.cpu().numpy(), axis=-2)).to(values) for values in (latents, attributes)]
    centred = [values - values.mean(dim=-2, keepdim=True) for values in ranks]
    x, y = (values / values.norm(dim=-2, keepdim=True).clamp(min=VARIANCE_FLOOR) for values in centred)
    rho = (x.T @ y).abs()
    return 0.5 * (rho[:, 0, 0] + rho[:, 1, 1] - rho[:, 0, 1] - rho[:, 1, 0]).abs()


# ---------------------------------------- shared


def evenly(count: int, most: int) -> Int[Tensor, " index"]:
    """At most so many of `count` indices, evenly spaced."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)


def fixed_normals(rows: int, columns: int, device: torch.device | str) -> Float[Tensor, "row column"]:
    """Standard normal numbers that are the same for every cell."""
    return normals(torch.zeros(1, dtype=torch.long, device=device), Stream.EVALUATION, 0, 4, rows, columns)[0, 0]


def _plotting_positions(rows: int, device: torch.device) -> Float[Tensor, " row"]:
    """Probabilities at which a sorted sample stands for its quantiles."""
    return (torch.arange(rows, device=device) + 0.5) / rows


def _squared_distances(
    x: Float[Tensor, "#stack row feature"], y: Float[Tensor, "#stack other feature"]
) -> Float[Tensor, "stack row other"]:
    """Squared Euclidean distances by one product; exact enough for rows that lie around the origin."""
    lengths = x.square().sum(dim=-1)[..., None] + y.square().sum(dim=-1)[:, None]
    return (lengths - 2 * x @ y.transpose(-2, -1)).clamp(min=0)
