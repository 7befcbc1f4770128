"""Which latent dimensions are used: decoder columns, KL and active units per dimension, the elbow, and ablation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CANCELLING = 0.1  # a column whose |sum| is below this share of its L1 norm is hidden from the sum by its own signs
VARIANCE_FLOOR = 1e-12
CLEAR_DROP = 2.0  # an elbow is a drop by at least this factor


def mean_variance(mu: Float[Tensor, "stack row lane"], held: Bool[Tensor, " stack"]) -> Float[Tensor, "stack lane"]:
    """Variance of each latent's mean over the data.

    The scale of a code that no prior holds is arbitrary: there, variances are relative to the largest.
    """
    variance = mu.var(dim=1)
    largest = variance.max(dim=-1, keepdim=True).values.clamp(min=VARIANCE_FLOOR)
    return torch.where(held[:, None], variance, variance / largest)


def active(variance: Float[Tensor, "stack lane"], threshold: float) -> Bool[Tensor, "stack lane"]:
    """Latents whose means vary over the data by more than the threshold (Burda, Grosse & Salakhutdinov 2016)."""
    return variance > threshold


class Columns(NamedTuple):
    """How strongly each latent enters the decoder, [stack, lane] each."""

    column_sum: Float[Tensor, "stack lane"]
    column_l1: Float[Tensor, "stack lane"]
    column_l2: Float[Tensor, "stack lane"]
    cancels: Bool[Tensor, "stack lane"]


def decoder_columns(weight: Float[Tensor, "stack lane hidden"], scale: Float[Tensor, "stack lane"]) -> Columns:
    """Sizes of the columns of the decoder's first matrix W (x = f(Wz + b)); `weight` holds them as rows.

    |column sum| is the criterion of Saleh 2019 (source 002, section 4.2.2); a sum can cancel, so both norms stand beside it.
    `scale` is each latent's standard deviation where its scale is arbitrary, else 1.
    """
    scaled = weight * scale[..., None]
    total, l1 = scaled.sum(dim=-1).abs(), scaled.abs().sum(dim=-1)
    return Columns(total, l1, scaled.norm(dim=-1), total < CANCELLING * l1)


def elbow(values: Float[np.ndarray, " latent"]) -> int:
    """How many values stand before the largest drop, as a ratio of neighbours in decreasing order.

    Without a clear drop (by a factor of 2) every dimension counts as used.
    """
    ordered = np.sort(np.asarray(values, dtype=float))[::-1]
    if len(ordered) < 2 or ordered[0] <= 0:
        return len(ordered) if len(ordered) and ordered[0] > 0 else 0
    floor = ordered[0] * 1e-6
    ratios = np.maximum(ordered[:-1], floor) / np.maximum(ordered[1:], floor)
    return int(ratios.argmax()) + 1 if ratios.max() >= CLEAR_DROP else len(ordered)


def ablation_masks(importance: Float[Tensor, "stack lane"], dims: list[int]) -> Float[Tensor, "zeroed stack lane"]:
    """Masks that take 0, 1, … dimensions of each cell away, the least important first, up to the largest of `dims`.

    Unused lanes count as the least important and are zero in every mask.
    """
    lanes = importance.shape[-1]
    dim = torch.tensor(dims, device=importance.device)[:, None]
    used = torch.arange(lanes, device=importance.device) < dim
    rank: Int[Tensor, "stack lane"] = importance.masked_fill(~used, -1.0).argsort(dim=-1, stable=True).argsort(dim=-1)
    zeroed = torch.arange(max(dims) + 1, device=importance.device)[:, None, None]
    return (rank >= lanes - dim + zeroed).float()
