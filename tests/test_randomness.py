import numpy as np
import torch
from scipy import stats

from pipeline.randomness import MASK, Stream, normals, permutations, philox, uniforms


def words(counter, key):
    as_tensors = [tuple(torch.tensor([word]) for word in part) for part in (counter, key)]
    return [int(word) for word in philox(*as_tensors)]


def test_philox_gives_the_published_answers():
    """Known-answer vectors of Random123 for philox4x32-10."""
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((MASK,) * 4, (MASK,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert words(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_normals_depend_on_their_coordinates_alone():
    wide = normals(torch.tensor([0, 3, 7]), Stream.EPSILON, 8, 16, 128, 8)
    narrow = normals(torch.tensor([3]), Stream.EPSILON, 12, 4, 50, 3)
    assert torch.equal(wide[1, 4:8, :50, :3], narrow[0])


def test_uniforms_depend_on_their_coordinates_alone():
    whole = uniforms(torch.tensor([0, 3]), Stream.DROPOUT, 50, 9, 7)
    part = uniforms(torch.tensor([3]), Stream.DROPOUT, 20, 6, 7, first_row=30)
    assert torch.equal(whole[1, 30:, :6], part[0])
    assert len(torch.cat([whole, uniforms(torch.tensor([0, 3]), Stream.DROPOUT, 50, 9, 8)]).unique()) == 4 * 450


def test_normals_are_normal_and_independent():
    draws = normals(torch.arange(4), Stream.EPSILON, 0, 16, 64, 8)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    correlations = np.corrcoef(draws.movedim(1, 0).flatten(1).numpy()) - np.eye(16)
    assert np.abs(correlations).max() < 5 / np.sqrt(draws[:, 0].numel())


def test_streams_and_seeds_differ():
    seeds = torch.tensor([0, 1])
    one, other = (uniforms(seeds, stream, 5, 7, 0) for stream in (Stream.WEIGHTS, Stream.CORRUPTION))
    assert len(torch.cat([one, other]).flatten().unique()) == 2 * 2 * 35


def test_permutations_are_permutations_and_change_with_the_epoch():
    orders = torch.cat([permutations(torch.tensor([0, 1]), epoch, 1000) for epoch in (0, 1)])
    assert torch.equal(orders.sort(dim=1).values, torch.arange(1000).expand(4, -1))
    assert len(orders.unique(dim=0)) == 4
