"""What evaluation measures, as pure functions on tensors. The leading axis is `stack`, the cells that are measured together."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

VARIANCE_FLOOR = 1e-12


def squared_error(
    output: Float[Tensor, "stack batch feature"], target: Float[Tensor, "... batch feature"]
) -> Float[Tensor, "stack batch"]:
    """Mean squared error per dimension of each sample."""
    return (output - target).square().mean(dim=-1)


def mean_variance(mu: Float[Tensor, "stack row lane"], samples: list[bool]) -> Float[Tensor, "stack lane"]:
    """Variance of each latent's mean over the data.

    The scale of a code that no prior holds is arbitrary: where the arm does not sample, variances are relative to its largest.
    """
    variance = mu.var(dim=1)
    largest = variance.max(dim=-1, keepdim=True).values.clamp(min=VARIANCE_FLOOR)
    return torch.where(torch.tensor(samples, device=mu.device)[:, None], variance, variance / largest)


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


def active_units(variance: Float[Tensor, "stack lane"], threshold: float = 0.01) -> Int[Tensor, " stack"]:
    """How many latents' means vary over the data by more than the threshold (Burda, Grosse & Salakhutdinov 2016)."""
    return (variance > threshold).sum(dim=-1)


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
