"""What a stack of trained cells is, measured: every measure of `measures.MEASURES` but those of `noise` and `prune`.

A new measure is one function below `@measure` and its line in `measures.py`. What several measures need is a property of
`Measured`, or of `Reference` where it depends on the data alone, and is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA
from torch import Tensor

from pipeline import latents, metrics
from pipeline.artifacts import Prepared, TrainedStack
from pipeline.config import Evaluate
from pipeline.corruption import corrupt
from pipeline.measures import RADIUS
from pipeline.objective import LOG_2PI, Objective, kl_per_latent
from pipeline.randomness import Stream, normals

ROWS = 512  # rows that pass through a stack at a time
SAMPLED, DRAWN, STEPPED, IMPORTANCE = 4, 8, 12, 16  # steps of ε; validation during training draws its ε at step 0
PROJECTED = 1000  # test rows in the sliced Wasserstein distance
COMPARED = 500  # test rows, and samples, in measures that compare all pairs of them
TRAINING_ROWS = 2000  # training rows among which a nearest one is sought
COMPONENTS = 32  # principal components of the space in which images are compared
NEIGHBOURS = 5  # of codes and of samples, on which measures of neighbourhoods rest
PATHS, POINTS = 100, 11  # interpolations, and points on each
STEP = 0.1
STACK = 32  # cells that are measured together
OUTPUTS = 2**26  # numbers that a stack's reconstructions may have
BOOTS = ("Ankle boot",)  # the classes of data that are all ankle boots
QUANTILES = 9  # a side of the grid on which boots are decoded


def stack_size(data: Prepared) -> int:
    """Cells whose reconstructions and interpolations fit in memory together."""
    rows = max(PATHS * POINTS, *(len(x) for x in data.x["test"]))
    return max(1, min(STACK, OUTPUTS // (rows * data.features)))


class Reference:
    """One dataset of a study, and what its cells are compared with.

    A search may see no test set: with `held_out="validation"`, what is called the test set here is the validation set.
    """

    def __init__(self, data: Prepared, index: int, evaluate: Evaluate, held_out: Literal["test", "validation"] = "test"):
        self.data, self.evaluate, self.point = data, evaluate, data.points[index]
        splits = {"train": "train", "test": held_out}
        self.x = {name: data.x[split][index] for name, split in splits.items()}
        self.labels = {name: data.labels[split][index] for name, split in splits.items()} if data.labels else None
        self.pca: Callable[[int], PCA] = cache(lambda dim: metrics.fit_pca(self.x["train"].cpu(), dim))
        self.noisy: Callable[[str, float, bool], Tensor] = cache(self._noisy)

    def _noisy(self, kind: str, level: float, clip: bool) -> Float[Tensor, "row feature"]:
        """The test inputs, corrupted."""
        return corrupt(self.x["test"], kind, level, seed=0, clip=clip)

    def pca_mse(self, dim: int) -> float:
        """PCA's squared error on the test set."""
        x = self.x["test"].cpu()
        return (metrics.pca_reconstruction(self.pca(dim), x) - x).square().mean().item()

    def knn_accuracy(self, codes: Mapping[str, Tensor]) -> float:
        """Of codes of both splits, on labelled data."""
        sides = [side for split in self.x for side in (codes[split].cpu(), self.labels[split])]
        return metrics.knn_accuracy(*sides, self.evaluate.neighbours)

    @cached_property
    def raw_knn_accuracy(self) -> float | None:
        return self.knn_accuracy(self.x) if self.labels else None

    @cached_property
    def compared(self) -> Int[Tensor, " row"]:
        """Evenly spaced test rows for measures that compare all pairs."""
        return metrics.evenly(len(self.x["test"]), COMPARED)

    @cached_property
    def neighbours(self) -> int:
        """k among the compared rows, fewer than half of them."""
        return max(1, min(NEIGHBOURS, (len(self.compared) - 1) // 2))

    @cached_property
    def compared_labels(self) -> Int[Tensor, " row"] | None:
        """Their classes, where they have several."""
        labels = self.labels["test"][self.compared] if self.labels else torch.zeros(1)
        return labels if len(labels.unique()) > 1 else None

    @cached_property
    def ranks(self) -> Int[Tensor, "row row"]:
        """Their neighbours in the data."""
        x = self.x["test"][self.compared]
        return metrics.neighbour_ranks(torch.cdist(x, x))

    def features(self, x: Float[Tensor, "*stack row feature"]) -> Float[Tensor, "*stack row component"]:
        """Principal components of the training data, the space in which samples and interpolations are compared with it."""
        pca = self.pca(min(COMPONENTS, self.data.features))
        mean, components = (torch.from_numpy(part).to(x) for part in (pca.mean_, pca.components_))
        return (x - mean) @ components.T

    @cached_property
    def real(self) -> Float[Tensor, "row component"]:
        """The compared test rows."""
        return self.features(self.x["test"][self.compared])

    def distance(self, x: Float[Tensor, "stack row feature"]) -> Float[Tensor, " stack"]:
        """Mean distance to the nearest of at most 2,000 training rows, in units of the test rows' own."""
        return metrics.nearest_distance(self.features(x), self._training_features).mean(dim=1) / self._test_distance

    @cached_property
    def _training_features(self) -> Float[Tensor, "row component"]:
        return self.features(self.x["train"][metrics.evenly(len(self.x["train"]), TRAINING_ROWS)])

    @cached_property
    def _test_distance(self) -> Float[Tensor, ""]:
        return metrics.nearest_distance(self.real[None], self._training_features).mean()

    @cached_property
    def pairs(self) -> Int[Tensor, "pair 2"]:
        """Test rows between which codes are interpolated.

        Of the two classes in `evaluate.between`; else each row and the next, where their classes differ or none do.
        """
        if self.evaluate.between:
            between = self.evaluate.between_of(self.data.class_names or ())
            ends = [(self.labels["test"] == index).nonzero()[:, 0] for index in between]
            return torch.stack([end[: min(map(len, ends))] for end in ends], dim=1)[:PATHS]
        pairs = torch.arange(len(self.x["test"])).unfold(0, 2, 1)
        changes = self.labels["test"].diff() != 0 if self.labels else torch.ones(len(pairs), dtype=torch.bool)
        return (pairs[changes] if changes.any() else pairs)[:PATHS]


class _Lazy(Mapping):
    """Values that are made when they are first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]):
        self._makers, self._made = makers, {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Measured:
    """A stack of cells that saw one dataset, with its codes, reconstructions, samples and interpolations."""

    def __init__(self, trained: TrainedStack, reference: Reference):
        self.keys, self.model, self.reference = trained.keys, trained.model, reference
        self.cells, self.evaluate = trained.model.cells, reference.evaluate
        self.x, self.labels, self.data = reference.x, reference.labels, reference.data
        self.device = self.x["test"].device
        self.objective = Objective(self.cells, self.device)
        self.variational = torch.tensor([cell.arm.variational for cell in self.cells], device=self.device)
        self.held = torch.tensor([cell.held for cell in self.cells], device=self.device)
        self.dims = torch.tensor([cell.latent_dim for cell in self.cells], device=self.device)

    # What networks make of rows and codes

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*stack row feature"]) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q(z|x), [stack, row, lane], of rows that all cells share or that each cell has."""
        parts = [self.model.encode(rows.expand(len(self.cells), -1, -1)) for rows in x.split(ROWS, dim=-2)]
        mu, log_variance = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return self.objective.posterior(mu, log_variance)

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "stack row lane"]) -> Float[Tensor, "stack row feature"]:
        """Means of p(x|z), in data units."""
        return torch.cat([self.model.reconstruct(part) for part in z.split(ROWS, dim=1)], dim=1)

    @torch.no_grad()
    def nll(self, x: Float[Tensor, "row feature"], z: Float[Tensor, "stack row lane"]) -> Float[Tensor, "stack row"]:
        """−log p(x|z) of every row, in nats."""
        parts = zip(z.split(ROWS, dim=1), x.split(ROWS), strict=True)
        decoded = ((self.model.decode(part), rows.expand(len(z), -1, -1)) for part, rows in parts)
        return torch.cat([self.objective.reconstruction(*pair, self.model.log_sigma2) for pair in decoded], dim=1).detach()

    def errors(self, codes: Float[Tensor, "stack row lane"], *against: tuple[Tensor, Tensor | float]) -> list[Tensor]:
        """Mean squared errors [stack] of the reconstruction of `codes`, per dimension, against each (target, weight)."""
        totals = [torch.zeros(len(codes), device=self.device) for _ in against]
        for start in range(0, codes.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            output = self.decode(codes[:, rows])
            for total, (target, weight) in zip(totals, against, strict=True):
                squared = (output - target[..., rows, :]).square()
                total += (squared * (weight if isinstance(weight, float) else weight[rows])).mean(dim=-1).sum(dim=1)
        return [total / codes.shape[1] for total in totals]

    def draws(self, step: int, rows: int) -> Float[Tensor, "stack draw row lane"]:
        """Four draws of ε for each row, by each cell's seed."""
        seeds, index = torch.tensor([cell.seed for cell in self.cells], device=self.device).unique(return_inverse=True)
        return normals(seeds, Stream.EVALUATION, step, 4, rows, self.model.lanes)[index] * self.model.mask[:, None]

    # What measures share

    @cached_property
    def _test_posterior(self) -> tuple[Tensor, Tensor]:
        return self.encode(self.x["test"])

    @cached_property
    def codes(self) -> Mapping[str, Float[Tensor, "stack _ lane"]]:
        """Means of q(z|x) of each split, encoded when they are first asked for."""
        return _Lazy({"train": lambda: self.encode(self.x["train"])[0], "test": lambda: self._test_posterior[0]})

    @cached_property
    def log_variance(self) -> Float[Tensor, "stack row lane"]:
        """Of q(z|x) of the test rows."""
        return self._test_posterior[1]

    @cached_property
    def z(self) -> Float[Tensor, "stack row lane"]:
        """One draw from q(z|x) for each test row where the arm samples, else its mean."""
        epsilon = self.draws(SAMPLED, len(self.x["test"]))[:, 0]
        return self.objective.sample(self.codes["test"], self.log_variance, epsilon)

    @cached_property
    def kl(self) -> Float[Tensor, "stack lane"]:
        """Mean over the test set, in nats."""
        return kl_per_latent(self.codes["test"], self.log_variance).mean(dim=1)

    @cached_property
    def mean_variance(self) -> Float[Tensor, "stack lane"]:
        """Variance of each latent's mean over the test set, as `latents.mean_variance` has it."""
        return latents.mean_variance(self.codes["test"], self.held)

    @cached_property
    def active(self) -> Bool[Tensor, "stack lane"]:
        """Latents that are active on the test set."""
        return latents.active(self.mean_variance, self.evaluate.active_threshold)

    @cached_property
    def nats(self) -> Float[Tensor, " stack"]:
        """Mean reconstruction term of the test set at `z`."""
        return self.nll(self.x["test"], self.z).mean(dim=1)

    @cached_property
    def bound(self) -> Float[Tensor, " stack"]:
        """−(reconstruction + KL) in nats: the ELBO where p(x|z) is a likelihood."""
        return -(self.nats + self.kl.sum(dim=1))

    @cached_property
    def is_likelihood(self) -> bool:
        """Whether p(x|z) is normalised: a grey pixel's cross-entropy is not."""
        return not self.objective.bernoulli or self.data.binarise != "none"

    @cached_property
    def reconstructions(self) -> Float[Tensor, "stack row feature"]:
        """Of the test set, at z = μ."""
        return self.decode(self.codes["test"])

    @cached_property
    def mse(self) -> Float[Tensor, " stack"]:
        return metrics.squared_error(self.reconstructions, self.x["test"]).mean(dim=1)

    @cached_property
    def knn_accuracy(self) -> Float[Tensor, " stack"] | None:
        if self.labels is None:
            return None
        codes = [{split: mu[row, :, :dim] for split, mu in self.codes.items()} for row, dim in enumerate(self.dims)]
        return torch.tensor([self.reference.knn_accuracy(pair) for pair in codes], dtype=torch.double)

    @cached_property
    def prior(self) -> tuple[Float[Tensor, "stack 1 lane"], Float[Tensor, "stack 1 lane"]]:
        """Mean and standard deviation of what codes are drawn from.

        N(0, I) where a KL holds codes to it, else the diagonal Gaussian fitted to the training codes.
        """
        codes, held = self.codes["train"], self.held[:, None, None]
        return torch.where(held, 0.0, codes.mean(dim=1, keepdim=True)), torch.where(held, 1.0, codes.std(dim=1, keepdim=True))

    def from_prior(self, standard: Float[Tensor, "*stack row lane"]) -> Float[Tensor, "stack row lane"]:
        """Codes where the prior has these standardised ones."""
        mean, deviation = self.prior
        return mean + deviation * standard * self.model.mask

    @cached_property
    def samples(self) -> Float[Tensor, "stack row feature"]:
        """As many decoded draws from `prior` as test rows are compared with."""
        return self.decode(self.from_prior(self.draws(DRAWN, len(self.reference.compared))[:, 0]))

    @cached_property
    def paths(self) -> Float[Tensor, "stack pair point feature"]:
        """Decoded points, evenly spaced on the straight lines between the codes of `Reference.pairs`."""
        first, last = self.codes["test"][:, self.reference.pairs].unbind(dim=2)
        share = torch.linspace(0, 1, POINTS, device=self.device)[:, None]
        z = first[:, :, None] + share * (last - first)[:, :, None]
        return self.decode(z.flatten(1, 2)).unflatten(1, z.shape[1:3])

    def deviation(self, codes: Float[Tensor, "stack row lane"]) -> Float[Tensor, "stack 1 lane"]:
        """Each latent's standard deviation over rows, but no less than what makes it active: noise is not blown up.

        That least one is in prior units where a KL gives codes a scale, else relative to the largest of the cell.
        """
        spread = codes.std(dim=1, keepdim=True)
        unit = torch.where(self.held[:, None, None], 1.0, spread.amax(dim=-1, keepdim=True))
        return torch.maximum(spread, unit * math.sqrt(self.evaluate.active_threshold)).clamp(min=latents.VARIANCE_FLOOR)

    @cached_property
    def standard(self) -> Float[Tensor, "stack row lane"]:
        """Test codes with each latent centred and divided by its `deviation`."""
        codes = self.codes["test"]
        return (codes - codes.mean(dim=1, keepdim=True)) / self.deviation(codes)

    @cached_property
    def aggregate(self) -> Float[Tensor, "stack row lane"]:
        """Draws from the aggregate posterior, to be compared with the prior: `z`, standardised where no KL gives it a scale."""
        standard = (self.z - self.z.mean(dim=1, keepdim=True)) / self.deviation(self.z)
        return torch.where(self.held[:, None, None], self.z, standard)

    @cached_property
    def distances(self) -> Float[Tensor, "stack row row"]:
        """Among the codes of the compared test rows."""
        codes = self.codes["test"][:, self.reference.compared]
        return torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")

    # Which cells a measure is of

    def where(self, cells: Bool[Tensor, " stack"], values: Tensor) -> Float[Tensor, " stack"]:
        """Values of some cells, NaN for the others."""
        return torch.where(cells, values.to(self.device), math.nan)

    def by_latents(
        self,
        measured: Callable[[Tensor], Tensor],
        codes: Float[Tensor, "stack row lane"],
        least: int = 1,
        most: int | None = None,
    ) -> Float[Tensor, " stack"]:
        """What is measured of codes without unused lanes, of all cells with as many latents at a time; NaN outside bounds."""
        found = torch.full(self.dims.shape, math.nan, device=self.device)
        for dim in self.dims.unique().tolist():
            if least <= dim <= (most or dim):
                chosen = self.dims == dim
                found[chosen] = measured(codes[chosen, :, :dim]).float()
        return found


Values = Float[Tensor, " stack"] | Int[Tensor, " stack"] | None
"""One number a cell, NaN where a cell has none; None where no cell of the stack can have one."""
MEASUREMENTS: dict[tuple[str, ...], Callable[[Measured], Values | Mapping[str, Tensor]]] = {}


def measure(*names: str) -> Callable[[Callable], Callable]:
    """Registers what measures `names`; a function of several returns them by name."""

    def register(function: Callable) -> Callable:
        MEASUREMENTS[names] = function
        return function

    return register


def measured(stack: Measured) -> dict[str, list[float | int | None]]:
    """Every measure by name: one number a cell, or None."""
    found: dict[str, Values] = {}
    for names, function in MEASUREMENTS.items():
        values = function(stack)
        found |= values if isinstance(values, dict) else dict.fromkeys(names, values)
    return {name: [None] * len(stack.keys) if values is None else values.tolist() for name, values in found.items()}


def measured_one(stack: Measured, name: str) -> list[float | None]:
    """One measure of all cells: what `measured` has under this name."""
    function = next(function for names, function in MEASUREMENTS.items() if name in names)
    values = function(stack)
    values = values[name] if isinstance(values, Mapping) else values
    return [None] * len(stack.keys) if values is None else values.double().tolist()


def noise_curves(stack: Measured) -> Iterator[tuple[str, float, dict[str, list[float]]]]:
    """Kind, level, and by column one number a cell: squared errors of the reconstruction of corrupted test inputs.

    Against the clean input and against the corrupted one; the first where an input was changed, as the share that is `left` of
    the error of the training data's mean there; and its `rise` over that of the reconstruction of clean inputs, as a share of
    the variance that this explains: what explains nothing has nothing to lose.
    """
    x, mean = stack.x["test"], stack.x["train"].mean(dim=0)
    explained = x.var(dim=0, correction=0).mean() - stack.mse
    explained = stack.where(explained > 0, explained)
    for kind, level in ((noise.kind, level) for noise in stack.evaluate.noise for level in noise.levels):
        noisy = stack.reference.noisy(kind, level, stack.data.unit_range)
        changed = (noisy != x).float()
        clean, dirty, there = stack.errors(stack.encode(noisy)[0], (x, 1.0), (noisy, 1.0), (x, changed))
        of_mean = ((mean - x).square() * changed).mean()
        columns = {"mse_clean": clean, "mse_noisy": dirty, "left": there / of_mean, "rise": (clean - stack.mse) / explained}
        yield kind, level, {name: values.tolist() for name, values in columns.items()}


# ---------------------------------------- one sample each of the test set


@measure("test/reconstruction")
def reconstruction(stack: Measured) -> Values:
    return stack.nats


@measure("test/kl")
def kl(stack: Measured) -> Values:
    return stack.where(stack.variational, stack.kl.sum(dim=1))


@measure("test/kl_share")
def kl_share(stack: Measured) -> Values:
    """KL / (KL + R − lowest R): what no reconstruction can lower is no part of the loss that β trades."""
    if stack.objective.bernoulli:
        lowest = metrics.bernoulli_entropy(stack.x["test"]).mean()
    else:
        lowest = stack.data.features / 2 * (LOG_2PI + stack.model.log_sigma2.detach())
    rate = stack.kl.sum(dim=1)
    return stack.where(stack.variational, rate / (rate + stack.nats - lowest))


@measure("test/elbo")
def elbo(stack: Measured) -> Values:
    return stack.where(stack.variational, stack.bound) if stack.is_likelihood else None


@measure("test/bce_elbo")
def bce_elbo(stack: Measured) -> Values:
    return None if stack.is_likelihood else stack.where(stack.variational, stack.bound)


@measure("test/iw_bound")
def iw_bound(stack: Measured) -> Values:
    """The ELBO plus what `evaluate.importance_samples` draws add to it, whose mean at most 500 test rows tell well enough."""
    if not stack.is_likelihood or not stack.variational.any():
        return None
    rows = stack.reference.compared
    x, mu, log_variance = stack.x["test"][rows], stack.codes["test"][:, rows], stack.log_variance[:, rows]
    draws, log_sums, sums = (
        stack.evaluate.importance_samples,
        torch.full_like(mu[..., 0], -math.inf),
        torch.zeros_like(mu[..., 0]),
    )
    for first in range(0, draws, 4):
        for epsilon in stack.draws(IMPORTANCE + first, len(rows))[:, : draws - first].unbind(dim=1):
            z = stack.objective.sample(mu, log_variance, epsilon)
            weight = metrics.log_importance_weight(stack.nll(x, z), z, epsilon, log_variance)
            log_sums, sums = torch.logaddexp(log_sums, weight), sums + weight
    return stack.where(stack.variational, stack.bound + (log_sums - math.log(draws) - sums / draws).mean(dim=1))


@measure("test/mse")
def mse(stack: Measured) -> Values:
    return stack.mse


@measure("test/sharpness")
def sharpness(stack: Measured) -> Values:
    """Edge energy of the reconstructions over that of the test images."""
    if (shape := stack.data.image_shape) is None:
        return None
    return metrics.edge_energy(stack.reconstructions.unflatten(-1, shape)) / metrics.edge_energy(
        stack.x["test"].unflatten(-1, shape)
    )


@measure("test/near_0")
def near_0(stack: Measured) -> Values:
    return (stack.reconstructions < 0.05).float().mean(dim=(1, 2)) if stack.data.unit_range else None


@measure("test/near_1")
def near_1(stack: Measured) -> Values:
    return (stack.reconstructions > 0.95).float().mean(dim=(1, 2)) if stack.data.unit_range else None


@measure("test/active_units")
def active_units(stack: Measured) -> Values:
    return stack.active.sum(dim=-1)


@measure("units/active", "units/mixed", "units/passive")
def units(stack: Measured) -> Mapping[str, Tensor]:
    variance, kinds = stack.log_variance.exp(), metrics.Units._fields
    found = [stack.by_latents(lambda part, kind=kind: getattr(metrics.posterior_units(part), kind), variance) for kind in kinds]
    return {f"units/{kind}": stack.where(stack.variational, values) for kind, values in zip(kinds, found, strict=True)}


@measure("test/posterior_variance")
def posterior_variance(stack: Measured) -> Values:
    """Mean over latents of σ² / (σ² + variance of μ), averaged over rows first: without a KL the scale of z is arbitrary."""
    noise, signal = stack.log_variance.exp().mean(dim=1), stack.codes["test"].var(dim=1)
    share = (noise / (noise + signal))[:, None]
    return stack.where(stack.variational, stack.by_latents(lambda shares: shares.mean(dim=(1, 2)), share))


@measure("test/knn_accuracy")
def knn_accuracy(stack: Measured) -> Values:
    return stack.knn_accuracy


# ---------------------------------------- compared with the training set, and with linear or raw codes


@measure("gap/mse")
def gap_mse(stack: Measured) -> Values:
    return stack.mse - stack.errors(stack.codes["train"], (stack.x["train"], 1.0))[0]


@measure("gap/pca_mse")
def gap_pca_mse(stack: Measured) -> Values:
    """Less the error of as many principal components."""
    return stack.mse - torch.tensor([stack.reference.pca_mse(cell.latent_dim) for cell in stack.cells], device=stack.device)


@measure("gap/raw_knn_accuracy")
def gap_raw_knn_accuracy(stack: Measured) -> Values:
    return None if stack.knn_accuracy is None else stack.knn_accuracy - stack.reference.raw_knn_accuracy


# ---------------------------------------- the codes of the test set


@measure("latent/sliced_wasserstein")
def sliced_wasserstein(stack: Measured) -> Values:
    rows = metrics.evenly(stack.aggregate.shape[1], PROJECTED)
    return stack.by_latents(metrics.sliced_wasserstein, stack.aggregate[:, rows])


@measure("latent/non_normality")
def non_normality(stack: Measured) -> Values:
    return stack.by_latents(metrics.non_normality, stack.aggregate[:, stack.reference.compared])


@measure("latent/kurtosis")
def kurtosis(stack: Measured) -> Values:
    """Excess kurtosis, averaged over latents: 0 for the prior, −1.2 for a uniform distribution, more for a pointed one."""
    return stack.by_latents(metrics.kurtosis, stack.aggregate)


@measure("latent/utilisation")
def utilisation(stack: Measured) -> Values:
    return stack.by_latents(metrics.utilisation, stack.standard)


@measure("latent/on_lines")
def on_lines(stack: Measured) -> Values:
    """Of two active latents."""
    rows = metrics.evenly(len(stack.x["test"]), PROJECTED)
    found = stack.by_latents(metrics.on_lines, stack.codes["test"][:, rows], least=2, most=2)
    return stack.where(stack.active.sum(dim=-1) == 2, found)


@measure("latent/trustworthiness")
def trustworthiness(stack: Measured) -> Values:
    return metrics.trustworthiness(stack.reference.ranks, stack.distances, stack.reference.neighbours)


@measure("latent/silhouette")
def silhouette(stack: Measured) -> Values:
    labels = stack.reference.compared_labels
    return None if labels is None else metrics.silhouette(stack.distances, labels.to(stack.device))


@measure("latent/dependence")
def dependence(stack: Measured) -> Values:
    """Total correlation of the active latents' means, a latent after the first: idle ones depend on nothing. NaN below two."""
    found = torch.full(stack.dims.shape, math.nan, device=stack.device)
    for row, active in enumerate(stack.active):
        if (count := int(active.sum())) > 1:
            found[row] = metrics.total_correlation(stack.codes["test"][row : row + 1, :, active]).item() / (count - 1)
    return found


@measure()  # its names are the data's
def radii(stack: Measured) -> Mapping[str, Tensor] | None:
    """Mean distance of each class' standardised codes from their common centre."""
    if stack.labels is None:
        return None
    names = stack.data.class_names
    found = metrics.class_radii(stack.standard, stack.labels["test"].to(stack.device), len(names))
    return {RADIUS + name: radius for name, radius in zip(names, found.T, strict=True)}


# ---------------------------------------- the decoder


@measure("decoder/sensitivity")
def sensitivity(stack: Measured) -> Values:
    """Change of the output for a random step that is distributed as codes are, a tenth as far.

    Root mean squares: of the change, as a share of the deviation of outputs over test rows, so that neither a code's scale and
    rotation nor a decoder that ignores it matters. Every linear decoder has 0.1.
    """
    rows, codes = stack.reference.compared, stack.codes["test"].double()
    centred = codes - codes.mean(dim=1, keepdim=True)
    floor = latents.VARIANCE_FLOOR * torch.eye(codes.shape[-1], device=stack.device)
    factor = torch.linalg.cholesky(centred.mT @ centred / codes.shape[1] + floor).float()
    moved = stack.decode(stack.codes["test"][:, rows] + STEP * stack.draws(STEPPED, len(rows))[:, 0] @ factor.mT)
    change = metrics.squared_error(moved, stack.reconstructions[:, rows]).mean(dim=1)
    return (change / stack.reconstructions.var(dim=1).mean(dim=-1)).sqrt()


@measure("decoder/folds")
def folds(stack: Measured) -> Values:
    """Of the line through 400 codes between the 1% and 99% quantile of the test set's: one latent, data in the plane."""
    if stack.data.features != 2 or not (stack.dims == 1).any():
        return None
    low, high = stack.codes["test"].quantile(torch.tensor([0.01, 0.99], device=stack.device), dim=1)[:, :, None]
    line = low + torch.linspace(0, 1, 400, device=stack.device)[:, None] * (high - low)
    return stack.where(stack.dims == 1, metrics.folds(stack.decode(line)))


@measure("interpolation/roughness")
def roughness(stack: Measured) -> Values:
    return metrics.roughness(stack.paths)


@measure("interpolation/distance")
def distance(stack: Measured) -> Values:
    """Of the points at 0.3 to 0.7 of the way, relative to that of test rows: above 1, they lie off the data."""
    return stack.reference.distance(stack.paths[:, :, 3:8].flatten(1, 2))


@measure("samples/precision", "samples/recall", "samples/f1", "samples/density", "samples/coverage")
def sample_quality(stack: Measured) -> Mapping[str, Tensor]:
    quality = metrics.sample_quality(stack.reference.real, stack.reference.features(stack.samples), stack.reference.neighbours)
    return {f"samples/{name}": values for name, values in quality._asdict().items()}


@measure("boots/axis_alignment")
def axis_alignment(stack: Measured) -> Values:
    """Of two latents with the heights of decoded boots' shafts and heels, over a grid of the prior's 5% to 95% quantiles."""
    if stack.data.class_names != BOOTS or not (stack.dims == 2).any():
        return None
    side = torch.special.ndtri(torch.linspace(0.05, 0.95, QUANTILES, device=stack.device))
    grid = torch.cartesian_prod(side, side)
    images = stack.decode(stack.from_prior(grid)).unflatten(-1, stack.data.image_shape)
    return stack.where(stack.dims == 2, metrics.axis_alignment(grid, metrics.boot_heights(images)))


# ---------------------------------------- under the noise that a cell was trained with


@measure("matched/mse_clean", "matched/mse_noisy")
def matched(stack: Measured) -> Mapping[str, Tensor] | None:
    """Errors of the reconstruction of test inputs that are corrupted as the cell's training inputs were."""
    if (noise := stack.cells[0].train.noise) is None:
        return None
    clip = stack.data.unit_range and noise.clip
    noisy = torch.stack([stack.reference.noisy(noise.kind, cell.train_noise, clip) for cell in stack.cells])
    errors = stack.errors(stack.encode(noisy)[0], (stack.x["test"], 1.0), (noisy, 1.0))
    return dict(zip(("matched/mse_clean", "matched/mse_noisy"), errors, strict=True))
