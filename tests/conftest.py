"""Small cells for tests of the engine."""

import pytest
import torch
from hypothesis import settings

from pipeline.config import Model, Train
from pipeline.grid import Cell

settings.register_profile("unhurried", deadline=None)  # no test is timed: machines are slow and noisy
settings.load_profile("unhurried")


@pytest.fixture
def make_cell():
    def make(
        arm="vae",
        *,
        beta=1.0,
        latent_dim=2,
        l2=0.0,
        sigma2=None,
        learning_rate=1e-3,
        seed=0,
        dataset=0,
        model=None,
        train=None,
        anneal=0.0,
        train_noise=0.0,
    ):
        config = {"hidden": (30, 20), "likelihood": "bernoulli", **(model or {})}
        sigma2 = sigma2 if sigma2 is not None or config["likelihood"] == "bernoulli" else 1.0
        budget = Train(**{"updates": 40, "batch_size": 32, "history_points": 10, **(train or {})})
        beta, anneal = (None, None) if arm == "ae" else (beta, anneal)
        own = {"anneal": anneal, "train_noise": train_noise}
        return Cell(arm, beta, latent_dim, l2, sigma2, learning_rate, seed, dataset, Model(**config), budget, **own)

    return make


@pytest.fixture
def pixels():
    """200 rows of 17 values in [0, 1]: a width that fills no vector register."""
    return torch.rand(200, 17, generator=torch.Generator().manual_seed(0))
