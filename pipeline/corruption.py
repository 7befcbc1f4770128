"""Noise on rows, to train on and to evaluate under. A new kind is one function here, and its name in `config.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.randomness import Stream, uniforms

CORRUPTED_ROWS = 4096  # at a time, so that tables of random numbers stay small

Table = Callable[[int], Float[Tensor, "row feature"]]
"""Uniform numbers on (0, 1), one an entry; a number tells several such tables of the same entries apart."""


def sparse_abs_gaussian(x: Float[Tensor, "row feature"], level: float, table: Table) -> Float[Tensor, "row feature"]:
    """Adds |N(0, 1)| to a share `level` of the entries, the noise of source 002."""
    return torch.where(table(0) < level, x + _normal(table).abs(), x)


def gaussian(x: Float[Tensor, "row feature"], level: float, table: Table) -> Float[Tensor, "row feature"]:
    """Adds Gaussian noise of standard deviation `level` to every entry."""
    return x + level * _normal(table)


def salt_and_pepper(x: Float[Tensor, "row feature"], level: float, table: Table) -> Float[Tensor, "row feature"]:
    """Sets a share `level` of the entries to 0 or 1, either with probability one half."""
    return torch.where(table(0) < level, (table(1) < 0.5).to(x.dtype), x)


def erased_block(x: Float[Tensor, "row feature"], level: float, table: Table) -> Float[Tensor, "row feature"]:
    """Sets a square block of each row's square image to 0: a share `level` of its area, anywhere with equal probability."""
    width = math.isqrt(x.shape[1])
    if width**2 != x.shape[1]:
        raise ConfigError(f"noise 'erased_block': needs square images, but rows have {x.shape[1]} features")
    side = round(width * level**0.5)
    first = (torch.stack([table(axis)[:, :1] for axis in (0, 1)], dim=1) * (width - side + 1)).long()
    offset = torch.arange(width, device=x.device) - first
    down, across = ((offset >= 0) & (offset < side)).unbind(dim=1)
    return x.masked_fill((down[:, :, None] & across[:, None]).flatten(1), 0)


NOISES = {noise.__name__: noise for noise in (sparse_abs_gaussian, gaussian, salt_and_pepper, erased_block)}


def corrupt(x: Float[Tensor, "row feature"], kind: str, level: float, seed: int, clip: bool) -> Float[Tensor, "row feature"]:
    """`x` under noise of one of NOISES at a level; `clip` keeps unit-range data within [0, 1]; level 0 changes nothing.

    An entry's noise is a function of (seed, row, feature): it does not depend on the number of rows, and a higher level hits
    the entries of a lower one and more, so levels compare under common random numbers.
    """
    if level == 0:
        return x
    parts = enumerate(x.split(CORRUPTED_ROWS))
    noisy = torch.cat([NOISES[kind](part, level, _table(part, seed, CORRUPTED_ROWS * number)) for number, part in parts])
    return noisy.clamp(0, 1) if clip else noisy


def _table(x: Float[Tensor, "row feature"], seed: int, first: int) -> Table:
    seeds = torch.tensor([seed], device=x.device)
    return lambda number: uniforms(seeds, Stream.CORRUPTION, len(x), x.shape[1], number, first)[0]


def _normal(table: Table) -> Float[Tensor, "row feature"]:
    return torch.special.ndtri(table(1)).float()
