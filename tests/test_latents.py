import numpy as np
import pytest
import torch

from pipeline.latents import ablation_masks, active, decoder_columns, elbow, mean_variance


def test_latents_that_vary_are_active():
    scales = torch.tensor([1.0, 0.5, 0.05, 0.0])
    mu = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0)) * scales
    assert active(mean_variance(mu, torch.tensor([True])), 0.01).tolist() == [[True, True, False, False]]


def test_a_code_without_prior_is_measured_against_its_largest_variance():
    mu = torch.randn(1, 2000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.5, 0.01])
    for scale in (1e-3, 1.0, 1e3):
        assert active(mean_variance(mu * scale, torch.tensor([False])), 0.01).tolist() == [[True, True, False]]


def test_a_cancelling_column_is_seen_by_its_norms_and_not_by_its_sum():
    weight = torch.tensor([[[1.0, -1.0, 2.0, -2.0], [0.1, 0.1, 0.1, 0.1]]])
    columns = decoder_columns(weight, torch.ones(1, 2))
    assert columns.column_sum[0, 0] < columns.column_sum[0, 1]
    assert columns.column_l1[0].tolist() == pytest.approx([6.0, 0.4])
    assert columns.column_l2[0].tolist() == pytest.approx([10**0.5, 0.2])
    assert columns.cancels[0].tolist() == [True, False]


def test_scaling_a_code_and_its_columns_inversely_changes_nothing():
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.1, 1.0, 7.0]] * 2)
    plain, scaled = decoder_columns(weight, torch.ones(2, 3)), decoder_columns(weight / scale[..., None], scale)
    torch.testing.assert_close(plain.column_l2, scaled.column_l2)


@pytest.mark.parametrize(
    ("values", "used"),
    [([3, 2.5, 0.01, 0.02], 2), ([0.01, 3, 0.02, 2.5], 2), ([1, 1.1, 0.9], 3), ([5, 0, 0], 1), ([0, 0], 0), ([2], 1)],
)
def test_the_elbow_stands_before_the_largest_drop(values, used):
    assert elbow(np.array(values, dtype=float)) == used


def test_ablation_zeroes_the_least_important_first_and_never_an_unused_lane_back_in():
    importance = torch.tensor([[3.0, 1.0, 2.0, 9.0], [1.0, 5.0, 0.0, 9.0]])
    masks = ablation_masks(importance, [3, 2])
    assert masks[:, 0].tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert masks[:3, 1].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
