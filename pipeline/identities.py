"""Statements of the sources that hold exactly, or up to Monte Carlo error, and need no training sweep: each with its check.

A check computes in float64 from fixed seeds and returns its largest deviation beside the tolerance; verdicts follow from both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import subspace_angles
from scipy.optimize import minimize
from scipy.stats import kstest, kstwo, multivariate_normal
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy, normalize
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pipeline.config import Model, Train
from pipeline.grid import Cell
from pipeline.metrics import fit_pca
from pipeline.mlp import one_thread
from pipeline.model import Autoencoder
from pipeline.objective import LOG_2PI, Objective, bernoulli_nll, gaussian_nll, kl_per_latent

ROUNDING = 1e-10
OPTIMISER = 1e-5
STANDARD_ERRORS = 4.0
FALSE_ALARM = 1e-4
DRAWS = 100_000


class Outcome(NamedTuple):
    """How far the two sides of a statement lie apart, and how far they may."""

    deviation: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """False too where the deviation is no number."""
        return self.deviation <= self.tolerance


class Identity(NamedTuple):
    """A statement of a source in our words, and what checks it."""

    id: str
    source: str
    says: str
    check: Callable[[], Outcome]


class Erratum(NamedTuple):
    """What a source got wrong; `identity` names the identity that shows it, where there is one."""

    identity: str | None
    source: str
    says: str


IDENTITIES: dict[str, Identity] = {}

ERRATA = (
    Erratum("erratum-003-sign", "003, KL Divergence: Mathematical Formulation", "The KL divergence has lost its sign."),
    Erratum("erratum-002-eq8", "002, Inference as Optimization", "Equation 8 adds log p(z) where it must be subtracted."),
    Erratum(
        "erratum-001-2.4",
        "001, Variational Lower Bound",
        "The bound is said to be maximised by minimising the KL alone, which is what the arm `kl_only` trains.",
    ),
    Erratum(
        "erratum-002-unclipped",
        "002, 4.1.4 Robustness, code",
        "Noisy images as published pass 1, where the cross-entropy has no minimum: longer training on them only runs away.",
    ),
    Erratum(
        None,
        "002, code",
        "The autoencoder still samples: it overrides `reparametrize`, but what the base class calls is `reparameterize`.",
    ),
    Erratum(
        "000-weights",
        "000, 001 and 002, code",
        "Three codes, three meanings of a KL weight: β is 25088 w in 000, 1/128 in 001 and 1 in 002.",
    ),
)


def identity(id: str, source: str, says: str) -> Callable[[Callable[[], Outcome]], Callable[[], Outcome]]:
    """Registers a check under the statement that it checks."""

    def register(check: Callable[[], Outcome]) -> Callable[[], Outcome]:
        IDENTITIES[id] = Identity(id, source, says, one_thread()(check))
        return check

    return register


def _outcome(tolerance: float, *errors: Tensor, provided: bool | Tensor = True) -> Outcome:
    """The largest error; infinite where an inequality that the statement makes fails."""
    largest = torch.stack([error.abs().max() for error in errors]).max()
    return Outcome(largest.item() if provided else math.inf, tolerance)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows() -> Float[Tensor, "row feature"]:
    """500 rows in 8 dimensions, correlated and off-centre."""
    return 1 + _normal(0, 500, 8) * torch.linspace(2, 0.3, 8, dtype=torch.float64) @ torch.linalg.qr(_normal(1, 8, 8)).Q


def _eigenvalues(x: Float[Tensor, "row feature"]) -> Float[Tensor, " feature"]:
    """Of the covariance S = X̂ᵀX̂/N, largest first."""
    return torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)


def _projection_error(x: Float[Tensor, "row feature"], basis: Float[Tensor, "*many feature d"]) -> Float[Tensor, "*many"]:
    """Mean of ‖x − x̃‖² for the orthogonal projection onto mean + span(basis)."""
    centred = x - x.mean(dim=0)
    return (centred - centred @ basis @ basis.mT).square().sum(dim=-1).mean(dim=-1)


@identity(
    "000-a-variance",
    "000, Principal Component Analysis",
    "The first principal direction w solves S w = λ₁ w, the data vary along it by λ₁, and along no direction by more.",
)
def _first_direction() -> Outcome:
    x = _rows()
    largest, w = _eigenvalues(x)[0], torch.from_numpy(fit_pca(x, 1).components_[0])
    any_direction = (x @ normalize(_normal(2, 8, 10_000), dim=0)).var(dim=0, correction=0)
    errors = (x @ w).var(correction=0) / largest - 1, torch.cov(x.T, correction=0) @ w / largest - w
    return _outcome(ROUNDING, *errors, provided=(any_direction <= largest).all())


@identity(
    "000-a-error",
    "000, Principal Component Analysis",
    "PCA to d dimensions leaves the sum of the discarded eigenvalues as squared error, and no other projection leaves less.",
)
def _discarded_eigenvalues() -> Outcome:
    x, errors, least = _rows(), [], []
    for d in range(1, 8):
        discarded, pca = _eigenvalues(x)[d:].sum(), fit_pca(x, d)
        reconstructed = torch.from_numpy(pca.inverse_transform(pca.transform(x.numpy())))
        errors.append((reconstructed - x).square().sum(dim=1).mean() / discarded - 1)
        least.append((_projection_error(x, torch.linalg.qr(_normal(d, 100, 8, d)).Q) >= discarded).all())
    return _outcome(ROUNDING, *errors, provided=torch.stack(least).all())


def _cell(arm: str, latent_dim: int, beta: float | None, sigma2: float, l2: float, **model: Any) -> Cell:
    config = Model(likelihood="gaussian", **model)
    return Cell(arm, beta, latent_dim, l2, sigma2, 1e-3, 0, 0, config, Train(updates=40))


@torch.no_grad()
def _module(cell: Cell, features: int, seed: int) -> Autoencoder:
    """A cell's module in float64 with weights from N(0, 0.3²)."""
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from its global generator
        module = Autoencoder(cell.model, features, cell.latent_dim).double()
    vector_to_parameters(0.3 * _normal(seed, parameters_to_vector(module.parameters()).numel()), module.parameters())
    return module


def _losses(cells: list[Cell], module: Autoencoder, x: Tensor, epsilon: Tensor) -> Float[Tensor, " stack"]:
    """What each cell minimises, λ term included, if all had the weights of this module."""
    objective, l2 = Objective(cells), torch.tensor([cell.l2 for cell in cells], dtype=torch.float64)
    log_sigma2 = torch.tensor([cell.sigma2 for cell in cells], dtype=torch.float64).log()
    mu, log_variance = objective.posterior(*(part.expand(len(cells), -1, -1) for part in module.encode(x)))
    output = module.decoder(objective.sample(mu, log_variance, epsilon))
    reconstruction = objective.reconstruction(output, x.expand_as(output), log_sigma2)
    squares = sum(value.square().sum() for name, value in module.named_parameters() if name.endswith("weight"))
    return objective.terms(reconstruction, objective.penalty(mu, log_variance), objective.beta).loss + l2 * squares


def _fit(cell: Cell, module: Autoencoder, x: Float[Tensor, "row feature"]) -> None:
    """Minimises a deterministic cell's loss over the weights on its mean's path by L-BFGS."""
    trained = list(module.mean_path().parameters())

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        vector_to_parameters(torch.tensor(flat), trained)
        value = _losses([cell], module, x, torch.zeros(()))
        return value.item(), parameters_to_vector(torch.autograd.grad(value, trained)).numpy()

    start = parameters_to_vector(trained).detach().numpy()
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 0, "gtol": 1e-8})
    vector_to_parameters(torch.from_numpy(best.x), trained)


@identity(
    "000-b",
    "000, Linear Autoencoders as PCA",
    "The linear autoencoder without biases, trained on centred data, reaches PCA's error and spans PCA's subspace.",
)
def _linear_autoencoder() -> Outcome:
    x = _rows() - _rows().mean(dim=0)
    cell = _cell("ae", 3, None, 1.0, 0.0, hidden=(), activation="identity", bias=False)
    module = _module(cell, 8, seed=3)
    _fit(cell, module, x)
    error = (module(x) - x).square().sum(dim=1).mean() / _eigenvalues(x)[3:].sum() - 1
    angles = subspace_angles(module.decoder[0].weight.detach().numpy(), fit_pca(x, 3).components_.T)
    return _outcome(OPTIMISER, error, torch.from_numpy(angles))


class Gaussians(NamedTuple):
    """q(z|x) = N(μ, diag σ²) of every row, several times."""

    mu: Float[Tensor, "stack row latent"]
    log_variance: Float[Tensor, "stack row latent"]

    @property
    def normal(self) -> Normal:
        return Normal(self.mu, (0.5 * self.log_variance).exp())

    @property
    def kl(self) -> Float[Tensor, "stack row"]:
        """KL(q ‖ p(z)), as the objective has it."""
        return kl_per_latent(self.mu, self.log_variance).sum(dim=-1)


class LinearGaussian(NamedTuple):
    """z ~ N(0, I), x|z ~ N(W z, σ² I), in which p(x) and p(z|x) are known (Tipping & Bishop 1999)."""

    w: Float[Tensor, "feature latent"]
    sigma2: float

    def log_marginal(self, x: Float[Tensor, "row feature"]) -> Float[Tensor, " row"]:
        """log p(x), x ~ N(0, W Wᵀ + σ² I)."""
        covariance = self.w @ self.w.T + self.sigma2 * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.from_numpy(multivariate_normal(cov=covariance.numpy()).logpdf(x.numpy()))

    def posterior(self, x: Float[Tensor, "row feature"]) -> tuple[Float[Tensor, "row latent"], Float[Tensor, "latent latent"]]:
        """Means Σ Wᵀx/σ² and precision Σ⁻¹ = I + WᵀW/σ² of p(z|x)."""
        precision = torch.eye(self.w.shape[1], dtype=x.dtype) + self.w.T @ self.w / self.sigma2
        return torch.linalg.solve(precision, self.w.T @ x.T / self.sigma2).T, precision

    def expected_log_likelihood(self, x: Float[Tensor, "row feature"], q: Gaussians) -> Float[Tensor, "stack row"]:
        """E[log p(x|z)] for z ~ q: log p(x|μ) − ½ Σ_j Var(z_j) ‖W_j‖²/σ²."""
        log_sigma2 = torch.full((len(q.mu),), self.sigma2, dtype=x.dtype).log()
        spread = q.log_variance.exp() @ self.w.square().sum(dim=0) / self.sigma2
        return -gaussian_nll(q.mu @ self.w.T, x.expand(len(q.mu), -1, -1), log_sigma2) - 0.5 * spread

    def elbo(self, x: Float[Tensor, "row feature"], q: Gaussians) -> Float[Tensor, "stack row"]:
        """E[log p(x|z)] − KL(q ‖ p(z))."""
        return self.expected_log_likelihood(x, q) - q.kl

    def gap(self, x: Float[Tensor, "row feature"], q: Gaussians) -> Float[Tensor, "stack row"]:
        """KL(q ‖ p(z|x)) = ½ (tr(Σ⁻¹ S) + dᵀΣ⁻¹d − K + log det Σ − log det S), S the covariance of q, d its mean's offset."""
        mean, precision = self.posterior(x)
        trace = q.log_variance.exp() @ precision.diagonal()
        squared = ((q.mu - mean) @ precision * (q.mu - mean)).sum(dim=-1)
        return 0.5 * (trace + squared - len(precision) - precision.logdet() - q.log_variance.sum(dim=-1))


def _linear_gaussian() -> tuple[LinearGaussian, Float[Tensor, "row feature"], Gaussians]:
    """A model, 20 rows, and 50 arbitrary q for each."""
    q = Gaussians(2 * _normal(6, 50, 20, 3), _normal(7, 50, 20, 3))
    return LinearGaussian(_normal(4, 6, 3), 0.5), 2 * _normal(5, 20, 6), q


@identity(
    "001-a",
    "001, Variational Lower Bound, eq. 1",
    "log p(x) is the ELBO plus KL(q ‖ p(z|x)) for any q, so the ELBO is a lower bound.",
)
def _evidence() -> Outcome:
    model, x, q = _linear_gaussian()
    evidence, elbo = model.log_marginal(x), model.elbo(x, q)
    return _outcome(ROUNDING, evidence - elbo - model.gap(x, q), provided=(elbo <= evidence).all())


@identity(
    "001-b",
    "001, Proofs, eq. 3",
    "KL(N(μ, σ²) ‖ N(0, 1)) is −½ (1 + log σ² − μ² − σ²) for each latent: our formula against torch's.",
)
def _closed_form_kl() -> Outcome:
    q = Gaussians(2 * _normal(8, 3, 100, 4), 2 * _normal(9, 3, 100, 4))
    return _outcome(ROUNDING, kl_per_latent(*q) / kl_divergence(q.normal, Normal(torch.zeros_like(q.mu), 1.0)) - 1)


@identity(
    "001-b-monte-carlo",
    "001, Kullback-Leibler Divergence",
    "The closed form is the mean of log q(z) − log p(z) over z ~ q; the deviation is in standard errors of 100,000 draws.",
)
def _monte_carlo_kl() -> Outcome:
    q = Gaussians(_normal(10, 1, 1, 4), _normal(11, 1, 1, 4))
    z = q.mu + q.normal.stddev * _normal(12, DRAWS, 1, 4)
    ratios = q.normal.log_prob(z) - Normal(torch.zeros_like(q.mu), 1.0).log_prob(z)
    error = ratios.mean(dim=0) - kl_per_latent(*q)[0]
    return _outcome(STANDARD_ERRORS, error / ratios.std(dim=0) * math.sqrt(DRAWS))


@identity(
    "003-c",
    "003, Reparametrization Trick",
    "μ + σε is N(μ, σ²): Kolmogorov's distance of 100,000 draws, against its critical value at 1 in 10,000.",
)
def _reparametrised() -> Outcome:
    mu, log_variance = torch.full((1, 1, 1), 0.7, dtype=torch.float64), torch.full((1, 1, 1), -1.2, dtype=torch.float64)
    objective = Objective([_cell("vae", 1, 1.0, 1.0, 0.0, hidden=())])
    z = objective.sample(mu, log_variance, _normal(13, 1, DRAWS, 1)).flatten().numpy()
    distance = kstest(z, "norm", args=(0.7, math.exp(-0.6)), method="asymp").statistic
    return Outcome(float(distance), float(kstwo.isf(FALSE_ALARM, DRAWS)))


@identity(
    "003-d",
    "003, VAE Objective: Reconstruction Loss + KL Divergence",
    "σ² times the loss at (σ², β = 1, λ) is the loss at (1, β = σ², σ²λ) plus a constant: values and all gradients agree.",
)
def _sigma2_is_beta() -> Outcome:
    sigma2, l2, errors = 0.25, 1e-2, []  # a σ² that the objective's float32 β holds exactly
    shape = {"hidden": (5,), "activation": "tanh"}
    cells = [_cell("vae", 2, 1.0, sigma2, l2, **shape), _cell("vae", 2, sigma2, 1.0, sigma2 * l2, **shape)]
    constant = 4 * (sigma2 * (LOG_2PI + math.log(sigma2)) - LOG_2PI)
    for seed in range(3):
        module = _module(cells[0], 8, seed)
        trained = [value for name, value in module.named_parameters() if name != "log_sigma2"]
        ours, theirs = _losses(cells, module, _rows()[:20], _normal(seed, 1, 20, 2)) * torch.tensor([sigma2, 1.0])
        gradients = [parameters_to_vector(torch.autograd.grad(loss, trained, retain_graph=True)) for loss in (ours, theirs)]
        errors += [ours - theirs - constant, (gradients[0] - gradients[1]) / gradients[1].abs().max()]
    return _outcome(ROUNDING, *errors)


class Batches(NamedTuple):
    """Five batches of images in [0, 1], what a decoder made of them, and q(z|x)."""

    x: Float[Tensor, "stack row 784"]
    output: Float[Tensor, "stack row 784"]
    q: Gaussians

    @classmethod
    def of(cls, rows: int) -> Batches:
        q = Gaussians(_normal(16, 5, rows, 2), _normal(17, 5, rows, 2))
        return cls(_normal(14, 5, rows, 784).sigmoid(), _normal(15, 5, rows, 784), q)

    def ours(self, beta: float) -> Float[Tensor, " stack"]:
        """Our loss with a Bernoulli likelihood."""
        return (bernoulli_nll(self.output, self.x) + beta * self.q.kl).mean(dim=1)

    @property
    def source_bce(self) -> Float[Tensor, "stack row"]:
        return binary_cross_entropy(self.output.sigmoid(), self.x, reduction="none").sum(dim=-1)

    @property
    def source_kl(self) -> Float[Tensor, "stack row"]:
        return -_printed_kl(*self.q)


def _printed_kl(
    mu: Float[Tensor, "stack row latent"], log_variance: Float[Tensor, "stack row latent"]
) -> Float[Tensor, "stack row"]:
    """½ Σ (1 + log σ² − μ² − σ²): the KL as 003 prints it, and minus the KL as 001 and 002 do."""
    return 0.5 * (1 + log_variance - mu.square() - log_variance.exp()).sum(dim=-1)


@identity(
    "000-weights",
    "000, code",
    "Squared error averaged over 64 images and 784 pixels, plus w times their summed KL, is 1/392 of ours at β = 25088 w.",
)
def _weights_of_000() -> Outcome:
    batches, errors = Batches.of(64), []
    nll = gaussian_nll(batches.output, batches.x, torch.zeros(5, dtype=torch.float64)) - 392 * LOG_2PI
    for w in (8e-4, 5e-5, 1e-8):
        source = (batches.output - batches.x).square().mean(dim=(1, 2)) + w * batches.source_kl.sum(dim=1)
        errors.append((nll + 25088 * w * batches.q.kl).mean(dim=1) / source / 392 - 1)
    return _outcome(ROUNDING, *errors)


@identity(
    "001-weights",
    "001, code",
    "Cross-entropy summed over a batch of 128, plus the KL averaged over it, is 128 times ours at β = 1/128.",
)
def _weights_of_001() -> Outcome:
    batches = Batches.of(128)
    source = batches.source_bce.sum(dim=1) + batches.source_kl.mean(dim=1)
    return _outcome(ROUNDING, 128 * batches.ours(beta=1 / 128) / source - 1)


@identity(
    "002-weights",
    "002, code",
    "Cross-entropy and KL, both summed over a batch of 128, are 128 times ours at β = 1.",
)
def _weights_of_002() -> Outcome:
    batches = Batches.of(128)
    source = (batches.source_bce + batches.source_kl).sum(dim=1)
    return _outcome(ROUNDING, 128 * batches.ours(beta=1.0) / source - 1)


@identity(
    "erratum-003-sign",
    "003, KL Divergence: Mathematical Formulation",
    "The KL as printed is minus the KL: negative for every q but the prior, hence no divergence.",
)
def _lost_sign() -> Outcome:
    q = Gaussians(_normal(18, 1, 1000, 4), _normal(19, 1, 1000, 4))
    printed, true = _printed_kl(*q), kl_divergence(q.normal, Normal(torch.zeros_like(q.mu), 1.0)).sum(dim=-1)
    return _outcome(ROUNDING, printed + true, provided=(printed < 0).all())


@identity(
    "erratum-002-eq8",
    "002, Inference as Optimization, eq. 8",
    "log p(x) − KL(q ‖ p(z|x)) is E[log p(x|z) − (log q − log p(z))]; the printed + log p(z) is off by −2 E[log p(z)] > 0.",
)
def _added_prior() -> Outcome:
    model, x, q = _linear_gaussian()
    bound, likelihood = model.log_marginal(x) - model.gap(x, q), model.expected_log_likelihood(x, q)
    log_q = -q.normal.entropy().sum(dim=-1)
    log_prior = -0.5 * (LOG_2PI + q.mu.square() + q.log_variance.exp()).sum(dim=-1)
    printed, corrected = likelihood - (log_q + log_prior), likelihood - (log_q - log_prior)
    return _outcome(ROUNDING, corrected - bound, printed - bound + 2 * log_prior, provided=(printed - bound > 1).all())


@identity(
    "erratum-001-2.4",
    "001, Variational Lower Bound",
    "q = p(z) brings KL(q ‖ p(z)) to 0, yet its ELBO lies below that of q = p(z|x), which is log p(x): the KL alone is no aim.",
)
def _kl_alone() -> Outcome:
    _, x, _ = _linear_gaussian()
    model = LinearGaussian(2 * torch.linalg.qr(_normal(20, 6, 3)).Q, 0.5)  # orthogonal columns: p(z|x) has no covariances
    mean, precision = model.posterior(x)
    best = Gaussians(mean[None], -precision.diagonal().log().expand_as(mean)[None])
    prior = Gaussians(torch.zeros_like(best.mu), torch.zeros_like(best.mu))
    evidence, worse = model.log_marginal(x), model.elbo(x, prior)
    errors = prior.kl, model.elbo(x, best) - evidence, evidence - worse - model.gap(x, prior)
    return _outcome(ROUNDING, *errors, provided=(worse < evidence).all() and (prior.kl < best.kl).all())


@identity(
    "erratum-002-unclipped",
    "002, 4.1.4 Robustness, code",
    "Against a target y > 1 the cross-entropy falls by y − 1 per unit of a large logit, without end; up to y = 1 it is > 0.",
)
def _no_minimum() -> Outcome:
    logits = torch.tensor([40.0, 80.0, 160.0], dtype=torch.float64)
    large = _cross_entropy(logits, torch.tensor([1.2, 2.0], dtype=torch.float64))
    falls = torch.tensor([0.2, 1.0], dtype=torch.float64)[:, None] * logits.diff()
    moderate = torch.linspace(-20, 20, 41, dtype=torch.float64)
    within = _cross_entropy(moderate, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    return _outcome(ROUNDING, large.diff(dim=1) + falls, provided=(within > 0).all() and (large < 0).all())


def _cross_entropy(logits: Float[Tensor, " logit"], target: Float[Tensor, " target"]) -> Float[Tensor, "target logit"]:
    return bernoulli_nll(*(values[..., None] for values in torch.broadcast_tensors(logits, target[:, None])))
