import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from pipeline.metrics import active_units, fit_pca, knn_accuracy, mean_variance, pca_reconstruction, squared_error

generator = torch.Generator().manual_seed(0)


def test_squared_error_is_a_mean_over_dimensions():
    output, target = torch.rand(3, 5, 4, generator=generator), torch.rand(5, 4, generator=generator)
    expected = torch.nn.functional.mse_loss(output, target.expand(3, -1, -1), reduction="none").mean(-1)
    torch.testing.assert_close(squared_error(output, target), expected)


def test_active_units_count_latents_that_vary():
    scales = torch.tensor([1.0, 0.5, 0.05, 0.0])
    mu = torch.randn(1, 2000, 4, generator=generator) * scales
    assert active_units(mean_variance(mu, [True])).tolist() == [2]


def test_a_code_without_prior_is_measured_against_its_largest_variance():
    mu = torch.randn(1, 2000, 3, generator=generator) * torch.tensor([1.0, 0.5, 0.01])
    for scale in (1e-3, 1.0, 1e3):
        assert active_units(mean_variance(mu * scale, [False])).tolist() == [2]


def test_knn_accuracy_agrees_with_scikit_learn_and_a_silent_latent_adds_nothing():
    x, labels = torch.randn(200, 3, generator=generator), torch.arange(200) % 4
    x = x + labels[:, None]
    reference = KNeighborsClassifier(5).fit(x[:150].numpy(), labels[:150]).score(x[150:].numpy(), labels[150:])
    assert knn_accuracy(x[:150], labels[:150], x[150:], labels[150:], 5) == reference
    collapsed = torch.cat([x, 1e-4 * torch.randn(200, 5, generator=generator)], dim=1)
    assert knn_accuracy(collapsed[:150], labels[:150], collapsed[150:], labels[150:], 5) == reference


def test_pca_error_is_the_sum_of_the_eigenvalues_left_out():
    x = torch.randn(500, 6, generator=generator) * torch.arange(1.0, 7.0)
    left_out = PCA().fit(x.numpy()).explained_variance_[2:].sum() * 499 / 500
    error = (pca_reconstruction(fit_pca(x, 2), x) - x).square().sum(1).mean().item()
    np.testing.assert_allclose(error, left_out, rtol=1e-4)
