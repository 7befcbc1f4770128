import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pipeline import metrics
from pipeline.metrics import fit_pca, knn_accuracy, pca_reconstruction

generator = torch.Generator().manual_seed(0)


def test_squared_error_is_a_mean_over_dimensions():
    output, target = torch.rand(3, 5, 4, generator=generator), torch.rand(5, 4, generator=generator)
    expected = torch.nn.functional.mse_loss(output, target.expand(3, -1, -1), reduction="none").mean(-1)
    torch.testing.assert_close(metrics.squared_error(output, target), expected)


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


def normal(*shape):
    return torch.randn(*shape, generator=generator)


def test_the_lowest_cross_entropy_is_that_of_the_targets_themselves():
    x = torch.rand(7, 5, generator=generator)
    expected = torch.nn.functional.binary_cross_entropy(x, x, reduction="none").sum(dim=1)
    torch.testing.assert_close(metrics.bernoulli_entropy(x), expected)
    assert metrics.bernoulli_entropy(x.round()).tolist() == [0.0] * 7


def test_edge_energy_agrees_with_scipy_and_smoothing_lowers_it():
    image = torch.rand(1, 12, 9, generator=generator)
    expected = np.square(ndimage.laplace(image[0].numpy())[1:-1, 1:-1]).mean()
    assert metrics.edge_energy(image).item() == pytest.approx(expected, rel=1e-5)
    ramp = torch.arange(9.0).expand(1, 12, 9)
    assert metrics.edge_energy(ramp).item() == 0


def test_latents_are_active_mixed_or_passive():
    steady_one, steady_zero, half = torch.full((100,), 1.0), torch.full((100,), 0.01), torch.full((100,), 0.5)
    switching = torch.arange(100.0) % 2
    found = metrics.posterior_units(torch.stack([steady_one, steady_zero, half, switching], dim=1)[None])
    assert [kind.tolist() for kind in found] == [[1], [2], [1]]


def test_sliced_wasserstein_of_one_latent_is_scipys_distance_and_of_normal_draws_nearly_0():
    codes = 2 + 3 * torch.rand(1, 800, 1, generator=generator)
    quantiles = stats.norm.ppf((np.arange(800) + 0.5) / 800)
    expected = stats.wasserstein_distance(codes[0, :, 0].numpy(), quantiles)
    assert metrics.sliced_wasserstein(codes).item() == pytest.approx(expected, rel=1e-4)
    assert (metrics.sliced_wasserstein(normal(4, 1000, 3)) < 0.06).all()
    shifted = metrics.sliced_wasserstein(normal(1, 1000, 2) + torch.tensor([3.0, 0.0]))
    assert shifted.item() == pytest.approx(3 * 2 / np.pi, rel=0.15)  # the mean of |cos| over directions


def henze_zirkler(x):
    """The statistic by its sums, one pair of rows at a time."""
    rows, d = x.shape
    inverse = np.linalg.inv(np.cov(x.T, bias=True).reshape(d, d))
    b = ((2 * d + 1) * rows / 4) ** (1 / (d + 4)) / np.sqrt(2)
    pairs = [np.exp(-(b**2) / 2 * (u - v) @ inverse @ (u - v)) for u in x for v in x]
    single = [np.exp(-(b**2) / (2 * (1 + b**2)) * (u - x.mean(0)) @ inverse @ (u - x.mean(0))) for u in x]
    return rows * (np.mean(pairs) - 2 * (1 + b**2) ** (-d / 2) * np.mean(single) + (1 + 2 * b**2) ** (-d / 2))


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_non_normality_is_the_statistic_over_a_critical_value_that_one_normal_sample_in_20_exceeds(latents):
    x = normal(2, 60, latents) ** 3
    first, second = metrics.non_normality(x).tolist()
    assert first / second == pytest.approx(
        henze_zirkler(x[0].double().numpy()) / henze_zirkler(x[1].double().numpy()), rel=1e-4
    )
    rejected = (metrics.non_normality(normal(400, 100, latents)) > 1).float().mean().item()
    assert 0.02 < rejected < 0.09
    assert metrics.non_normality(torch.rand(1, 500, latents, generator=generator)).item() > 1


def test_non_normality_is_invariant_to_affine_maps():
    x, matrix = normal(1, 100, 3) ** 3, normal(3, 3)
    torch.testing.assert_close(metrics.non_normality(x @ matrix + 5), metrics.non_normality(x), rtol=1e-3, atol=0)


def test_kurtosis_is_0_for_normal_codes_and_that_of_a_square_however_it_is_turned():
    square = 12**0.5 * (torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) - 0.5)
    turned = square @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    assert metrics.kurtosis(torch.stack([normal(4000, 2), square, turned])).tolist() == pytest.approx([0, -1.2, -1.2], abs=0.1)
    lone = normal(500, 1)
    assert metrics.kurtosis(lone[None]).item() == pytest.approx(stats.kurtosis(lone.numpy()).item(), abs=1e-4)
    still = torch.stack([normal(4000, 2), torch.full((4000, 2), 0.1)])
    assert metrics.kurtosis(still).isnan().tolist() == [False, True]


@pytest.mark.parametrize("latents", [1, 2, 5])
def test_utilisation_is_1_for_the_prior_and_least_for_a_point(latents):
    assert metrics.utilisation(normal(20, 500, latents)).mean().item() == pytest.approx(1, abs=0.02)
    point = metrics.utilisation(torch.full((1, 2000, latents), 0.3)).item()
    assert point == pytest.approx(0.01 if latents > 1 else 0.1, rel=0.05)
    half = normal(1, 2000, latents).abs()
    assert metrics.utilisation(half).item() == pytest.approx(0.25 if latents > 1 else 0.5, rel=0.05)


def test_codes_along_two_lines_are_told_from_round_clouds_wherever_the_lines_lie():
    along = normal(1, 500, 1)[0]
    lines = torch.cat([torch.cat([along, 0.02 * along.flip(0)], dim=1), torch.cat([0.5 + 0.02 * along, along], dim=1)])[None]
    turned = lines @ torch.tensor([[2.0, 1.0], [-0.5, 0.3]]) + 7
    assert metrics.on_lines(torch.cat([lines, turned])).min() > 0.6
    assert metrics.on_lines(normal(20, 1000, 2)).abs().max() < 0.03
    heavy = normal(20, 1000, 2) * normal(20, 1000, 1).exp()
    assert metrics.on_lines(heavy).abs().max() < 0.05


def test_total_correlation_is_that_of_the_gaussian_copula_whatever_the_margins():
    x = normal(1, 5000, 2)
    x[..., 1] = 0.8 * x[..., 0] + 0.6 * x[..., 1]
    expected = -0.5 * np.log(1 - 0.8**2)
    assert metrics.total_correlation(x).item() == pytest.approx(expected, rel=0.05)
    torch.testing.assert_close(metrics.total_correlation(x.exp()), metrics.total_correlation(x))
    independent = metrics.total_correlation(normal(100, 60, 6))
    assert abs(independent.mean().item()) < 4 * independent.std().item() / 10
    x[..., 1] = 0.0
    assert abs(metrics.total_correlation(x).item()) < 0.01


def test_trustworthiness_and_silhouette_agree_with_scikit_learn():
    x, codes, labels = normal(80, 6), normal(3, 80, 2), torch.arange(80) % 3
    codes[0] = x[:, :2]
    distances = torch.cdist(codes, codes)
    found = metrics.trustworthiness(metrics.neighbour_ranks(torch.cdist(x, x)), distances, 5).tolist()
    assert found == pytest.approx([trustworthiness(x.numpy(), code.numpy(), n_neighbors=5) for code in codes], rel=1e-5)
    codes = codes + labels[:, None]
    found = metrics.silhouette(torch.cdist(codes, codes), labels).tolist()
    assert found == pytest.approx([silhouette_score(code.numpy(), labels.numpy()) for code in codes], rel=1e-4)


def test_class_radii_are_mean_norms():
    codes, labels = normal(2, 50, 3), torch.arange(50) % 2
    found = metrics.class_radii(codes, labels, 3)
    torch.testing.assert_close(found[:, 1], codes[:, labels == 1].norm(dim=-1).mean(dim=1))
    assert found[:, 2].isnan().all()


def test_folds_are_turning_points_of_the_busier_coordinate():
    t = torch.linspace(0, 1, 400)
    wave, ripple = (0.5 * torch.sin(3 * torch.pi * t), 0.01 * torch.sin(60 * t))
    lines = torch.stack([torch.stack(pair, dim=-1) for pair in ((t, wave), (wave, ripple), (t, ripple))])
    assert metrics.folds(lines).tolist() == [3, 3, 0]


def test_roughness_is_1_for_even_steps_and_the_number_of_steps_for_a_jump():
    even = torch.linspace(0, 1, 11)[:, None] * torch.ones(3)
    jump = (torch.arange(11) > 5).float()[:, None] * torch.ones(3)
    torch.testing.assert_close(metrics.roughness(torch.stack([even, jump])[:, None]), torch.tensor([1.0, 10.0]))


def test_the_nearest_distance_agrees_with_scikit_learn():
    x, data = normal(2, 30, 4), normal(50, 4)
    neighbours = NearestNeighbors(n_neighbors=1).fit(data.numpy())
    expected = np.stack([neighbours.kneighbors(rows.numpy())[0][:, 0] for rows in x])
    np.testing.assert_allclose(metrics.nearest_distance(x, data).numpy(), expected, rtol=1e-3)


def test_sample_quality_agrees_with_its_definition():
    real, fake, k = normal(40, 3), 0.5 + 0.8 * normal(30, 3), 3
    among = torch.cdist(real, fake)
    radius = [torch.cdist(x, x).sort(dim=1).values[:, k] for x in (real, fake)]
    balls = among < radius[0][:, None]
    expected = {
        "precision": balls.any(dim=0).float().mean().item(),
        "recall": (among < radius[1]).any(dim=1).float().mean().item(),
        "density": balls.sum().item() / (k * 30),
        "coverage": balls.any(dim=1).float().mean().item(),
    }
    expected["f1"] = stats.hmean([expected["precision"], expected["recall"]])
    found = metrics.sample_quality(real, fake[None], k)._asdict()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)


def test_samples_that_are_the_data_are_perfect_and_far_ones_worthless():
    real = normal(200, 4)
    quality = metrics.sample_quality(real, torch.stack([real, real + 100, real * 0]), 5)
    assert [measure[0].item() for measure in quality] == pytest.approx([1] * 5, abs=0.25)
    assert quality.precision[0] == quality.recall[0] == quality.coverage[0] == 1
    assert [measure[1].item() for measure in quality] == [0] * 5
    assert quality.recall[2] == quality.f1[2] == 0


def boot(top, arch, sole):
    """A leg over the right half from row `top` to the arch, and a heel below it down to row `sole`."""
    image = torch.zeros(28, 28)
    image[top:arch, 14:], image[arch - 4 : arch, :14], image[arch:sole, 24:] = 1, 1, 0.8
    return image


def test_a_boots_shaft_reaches_from_its_top_to_the_arch_and_its_heel_from_there_down():
    boots = torch.stack([boot(3, 20, 20), boot(8, 20, 26), 0.2 * boot(8, 20, 26)])
    assert metrics.boot_heights(boots).tolist() == [[17, 0], [12, 6], [12, 6]]


def test_axis_alignment_is_1_where_each_latent_governs_one_attribute_and_0_where_both_govern_both():
    side = torch.linspace(-1, 1, 9)
    grid = torch.cartesian_prod(side, side)
    diagonal = torch.stack([grid.sum(dim=1), grid.diff(dim=1)[:, 0]], dim=1)
    constant = grid * torch.tensor([1.0, 0.0])
    attributes = torch.stack([grid.exp(), grid.flip(1), diagonal, constant])
    torch.testing.assert_close(metrics.axis_alignment(grid, attributes), torch.tensor([1.0, 1.0, 0.0, 0.5]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("count", "most"), [(3, 5), (5, 5), (7, 3), (1000, 500)])
def test_evenly_spaced_indices_are_distinct_and_as_many_as_may_be(count, most):
    found = metrics.evenly(count, most).tolist()
    assert len(set(found)) == min(count, most) and max(found) < count
