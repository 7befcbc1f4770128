"""Laws of the noise."""

import typing

import pytest
import torch

from pipeline import corruption
from pipeline.config import ConfigError, Noise


@pytest.fixture
def grey() -> torch.Tensor:
    return torch.rand(200, 49, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def test_the_config_knows_exactly_these_noises():
    assert set(corruption.NOISES) == set(typing.get_args(Noise.model_fields["kind"].annotation))


@pytest.mark.parametrize("kind", corruption.NOISES)
def test_corruption_depends_on_seed_row_and_feature_alone(grey, kind):
    noisy = corruption.corrupt(grey, kind, 0.3, seed=1, clip=True)
    assert torch.equal(noisy[:20], corruption.corrupt(grey[:20], kind, 0.3, seed=1, clip=True))
    assert not torch.equal(noisy, corruption.corrupt(grey, kind, 0.3, seed=2, clip=True))
    assert noisy.dtype == grey.dtype and noisy.min() >= 0 and noisy.max() <= 1
    assert torch.equal(corruption.corrupt(grey, kind, 0.0, seed=1, clip=True), grey)


@pytest.mark.parametrize("kind", ["sparse_abs_gaussian", "salt_and_pepper"])
def test_sparse_noise_hits_its_share_of_entries_and_a_higher_level_hits_them_too(grey, kind):
    low, high = (corruption.corrupt(grey, kind, level, seed=0, clip=False) for level in (0.2, 0.5))
    hit, hit_too = low != grey, high != grey
    assert hit.float().mean() == pytest.approx(0.2, abs=0.02) and hit_too.float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(hit & hit_too, hit) and torch.equal(low[hit], high[hit])


def test_sparse_abs_gaussian_only_adds_and_as_much_as_a_half_normal(grey):
    added = (corruption.corrupt(grey, "sparse_abs_gaussian", 1.0, seed=0, clip=False) - grey).double()
    assert added.min() >= 0
    assert added.mean() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.03) and added.square().mean() == pytest.approx(
        1, abs=0.06
    )


def test_gaussian_noise_grows_with_its_level_in_one_direction(grey):
    once, thrice = (corruption.corrupt(grey, "gaussian", level, seed=0, clip=False) - grey for level in (0.1, 0.3))
    assert once.std() == pytest.approx(0.1, rel=0.03) and once.mean().abs() < 0.005
    torch.testing.assert_close(thrice, 3 * once, rtol=0, atol=1e-6)


def test_a_block_of_its_share_is_erased_and_a_higher_level_erases_it_too():
    images = torch.ones(300, 28 * 28)
    erased = {
        level: corruption.corrupt(images, "erased_block", level, seed=0, clip=True) == 0 for level in (0.1, 0.25, 0.3, 1.0)
    }
    assert torch.equal(erased[0.25].sum(dim=1), torch.full((300,), 14 * 14)) and erased[1.0].all()
    for low, high in ((0.1, 0.25), (0.25, 0.3)):
        assert torch.equal(erased[low] & erased[high], erased[low])
    sides = [erased[0.25].view(-1, 28, 28).any(dim=axis) for axis in (1, 2)]
    assert all((side.sum(dim=1) == 14).all() and (side.long().diff(dim=1) != 0).sum(dim=1).max() <= 2 for side in sides)
    corners = [side.long().argmax(dim=1) for side in sides]
    assert all(corner.unique().tolist() == list(range(15)) for corner in corners) and not torch.equal(*corners)


def test_a_block_is_refused_where_images_are_not_square():
    with pytest.raises(ConfigError, match="^noise 'erased_block': needs square images, but rows have 17 features$"):
        corruption.corrupt(torch.ones(3, 17), "erased_block", 0.1, seed=0, clip=True)


def test_corruption_part_by_part_is_that_of_the_whole(grey, monkeypatch):
    whole = {kind: corruption.corrupt(grey, kind, 0.3, seed=1, clip=True) for kind in corruption.NOISES}
    monkeypatch.setattr(corruption, "CORRUPTED_ROWS", 33)
    assert all(torch.equal(corruption.corrupt(grey, kind, 0.3, seed=1, clip=True), noisy) for kind, noisy in whole.items())


def test_salt_is_as_likely_as_pepper(grey):
    noisy = corruption.corrupt(grey, "salt_and_pepper", 1.0, seed=0, clip=False)
    assert set(noisy.unique().tolist()) == {0, 1} and noisy.mean() == pytest.approx(0.5, abs=0.02)
