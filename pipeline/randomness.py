"""Counter-based random numbers: every number is a function of its coordinates, so nothing depends on order or company.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written in int64 tensor operations, so
that CPU and GPU give the same words.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a number is for: the second word of the key."""

    WEIGHTS = 1
    ORDER = 2
    EPSILON = 3
    EVALUATION = 4
    CORRUPTION = 5
    DROPOUT = 6
    BINARISE = 7


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for each counter and key, all int64 tensors of one broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps into int64 with the right 64 bits, and the mask drops the copied sign.
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & MASK) ^ c1 ^ k0,
            high & MASK,
            ((low >> 32) & MASK) ^ c3 ^ k1,
            low & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _words(seeds: Int[Tensor, " seed"], stream: Stream, a: Tensor, b: Tensor, c: int | Tensor = 0) -> tuple[Tensor, ...]:
    """Words for each seed over the broadcast shape of `a` and `b`; the leading axis is `seed`."""
    a, b, c = torch.broadcast_tensors(a, b, c if isinstance(c, Tensor) else torch.full_like(a, c))
    k0 = seeds.view(-1, *[1] * a.dim())
    return philox((a, b, c, torch.zeros_like(a)), (k0, torch.full_like(k0, int(stream))))


def _unit(words: Tensor) -> Tensor:
    """Words as float64 in the open interval (0, 1)."""
    return (words.double() + 0.5) * 2.0**-32


def normals(
    seeds: Int[Tensor, " seed"], stream: Stream, first_step: int, steps: int, rows: int, lanes: int
) -> Float[Tensor, "seed step row lane"]:
    """Standard normal numbers for each (seed, step, row, lane), by Box and Muller. `first_step` and `steps` are multiples of 4.

    Computed in float64 and then rounded, because vectorised and scalar code differ in the last bit of a logarithm.
    """
    device = seeds.device
    row = torch.arange(rows, device=device).view(1, -1, 1)
    lane = torch.arange(lanes, device=device).view(1, 1, -1)
    quad = torch.arange(first_step // 4, (first_step + steps) // 4, device=device).view(-1, 1, 1)
    words = _words(seeds, stream, row, lane, quad)
    pairs = []
    for first, second in ((0, 1), (2, 3)):
        radius = _unit(words[first]).log_().mul_(-2).sqrt_()
        angle = _unit(words[second]).mul_(2 * torch.pi)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=2).float().flatten(1, 2)


def uniforms(
    seeds: Int[Tensor, " seed"], stream: Stream, rows: int, columns: int, purpose: int, first_row: int = 0
) -> Float[Tensor, "seed row column"]:
    """Uniform numbers on (0, 1) for each (seed, row, column), float64; `purpose` tells several such tables apart."""
    device = seeds.device
    row = torch.arange(first_row, first_row + rows, device=device).view(-1, 1)
    quad = torch.arange(-(-columns // 4), device=device).view(1, -1)
    words = torch.stack(_words(seeds, stream, row, quad, purpose), dim=-1)
    return _unit(words.flatten(2)[..., :columns])


def permutations(seeds: Int[Tensor, " seed"], epoch: int, rows: int) -> Int[Tensor, "seed row"]:
    """A random order of `rows` rows for each seed, in one epoch."""
    row = torch.arange(rows, device=seeds.device)
    words = _words(seeds, Stream.ORDER, row, torch.full_like(row, epoch))
    return ((words[0] << 31) | (words[1] >> 1)).argsort(dim=-1, stable=True)
