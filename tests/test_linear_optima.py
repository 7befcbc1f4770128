"""Linear networks, whose optima are known: PCA for the autoencoder, probabilistic PCA for the VAE."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import multivariate_normal

from pipeline.config import Schedule
from pipeline.metrics import fit_pca, log_importance_weight
from pipeline.objective import gaussian_nll
from pipeline.trainer import StackTrainer

SPECTRUM = np.array([4.0, 2.5, 1.5, 0.8, 0.6, 0.3, 0.2, 0.1, 0.05, 0.02])
SIGMA2 = 0.45
BETAS = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def data():
    """2,000 centred rows whose sample covariance has exactly this spectrum, in random directions."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(2000, 10))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / len(raw))).T
    rotation, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    return torch.from_numpy(white * np.sqrt(SPECTRUM) @ rotation.T).float()


@pytest.fixture(scope="module")
def trained(data):
    from pipeline.config import Model, Train
    from pipeline.grid import Cell

    model = Model(hidden=(), activation="identity", likelihood="gaussian")
    schedule = Schedule(kind="cosine", end=0.0)
    budget = Train(updates=3000, batch_size=250, learning_rate_schedule=schedule, keep="last")
    ae = Cell("ae", None, 3, 0.0, 1.0, 1e-2, 0, 0, model, budget)
    vae = [Cell("vae", beta, 8, 0.0, SIGMA2, 1e-2, 0, 0, model, budget) for beta in BETAS]
    found = {}
    for cells in ([ae], vae):
        trainer = StackTrainer(cells, [data], [data[:500]])
        list(trainer.run())
        trainer.finish()
        found |= {(cell.arm_name, cell.beta): trainer.model.cell(row) for row, cell in enumerate(cells)}
    return found


def test_the_linear_autoencoder_finds_pca(trained, data):
    ae, pca = trained["ae", None], fit_pca(data, 3)
    error = (ae(data) - data).square().sum(1).mean().item()
    assert error == pytest.approx(SPECTRUM[3:].sum(), rel=0.01)
    angles = subspace_angles(ae.decoder[0].weight.detach().numpy(), pca.components_.T)
    assert math.degrees(angles.max()) < 2


def test_the_linear_vae_reaches_the_likelihood_of_probabilistic_pca(trained, data):
    """Tipping & Bishop 1999 at a fixed σ²: W Wᵀ = U (Λ − σ²I)₊ Uᵀ over the leading eigenvalues."""
    vae = trained["vae", 1.0]
    w, b = vae.decoder[0].weight.detach().double().numpy(), vae.decoder[0].bias.detach().double().numpy()
    reached = multivariate_normal(b, w @ w.T + SIGMA2 * np.eye(10)).logpdf(data.numpy()).mean()
    variances = np.maximum(SPECTRUM, SIGMA2)
    best = -0.5 * (10 * math.log(2 * math.pi) + np.log(variances).sum() + (SPECTRUM / variances).sum())
    assert best - 0.02 < reached < best + 1e-4
    assert best - 0.02 < elbo(vae, data) < best + 1e-4


def elbo(vae, data):
    """In closed form, because the decoder is linear: E‖x − Wz − b‖² = ‖x − Wμ − b‖² + Σ σ_j² ‖W_j‖²."""
    mu, log_variance = (part.detach().double() for part in vae.encode(data))
    w, b = vae.decoder[0].weight.detach().double(), vae.decoder[0].bias.detach().double()
    squared = (data - mu @ w.T - b).square().sum(1) + log_variance.exp() @ w.square().sum(0)
    kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (-0.5 * squared / SIGMA2 - 5 * math.log(2 * math.pi * SIGMA2) - kl).mean().item()


def test_importance_weighting_closes_the_gap_that_a_poor_posterior_leaves(trained, data):
    vae, generator = trained["vae", 1.0], torch.Generator().manual_seed(0)
    w, b = vae.decoder[0].weight.detach(), vae.decoder[0].bias.detach()
    covariance = (w @ w.T).double().numpy() + SIGMA2 * np.eye(10)
    exact = multivariate_normal(b.double().numpy(), covariance).logpdf(data.numpy()).mean()
    with torch.no_grad():
        mu, log_variance = vae.encode(data)
    log_variance = log_variance + 0.5  # wider than the true posterior
    bounds = {}
    for draws in (1, 16, 512):
        epsilon = torch.randn(draws, *mu.shape, generator=generator)
        z = mu + (0.5 * log_variance).exp() * epsilon
        nll = gaussian_nll(z @ w.T + b, data.expand(draws, -1, -1), torch.full((draws,), SIGMA2).log())
        weights = log_importance_weight(nll, z, epsilon, log_variance.expand(draws, -1, -1))
        bounds[draws] = (weights.logsumexp(dim=0) - math.log(draws)).mean().item()
    assert bounds[1] < exact - 0.3
    assert bounds[1] < bounds[16] < bounds[512]
    assert bounds[512] == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("beta", BETAS)
def test_the_linear_vae_switches_off_dimensions_below_beta_sigma2(trained, data, beta):
    mu, log_variance = trained["vae", beta].encode(data)
    kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).mean(0)
    expected = int((SPECTRUM[:8] > beta * SIGMA2).sum())
    assert int((kl > 0.05).sum()) == int((kl > 0.005).sum()) == expected
    assert int((mu.var(0) > 0.01).sum()) == expected


def test_cells_are_frozen(make_cell):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_cell().seed = 1
