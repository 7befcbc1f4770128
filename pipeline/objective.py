"""The objective in nats per sample: likelihoods, KL and penalties, as pure functions that reduce no more than they must.

    loss = mean over batch [ w · R(x, x̂) + β · P(μ, log σ²) ] + λ · Σ over weight matrices ‖W‖²

The last term reaches the optimiser as its gradient 2λW (Adam's coupled weight decay), and the history as its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.grid import Cell

LOG_2PI = math.log(2 * math.pi)
CACHED_ELEMENTS = 2**17  # of one tensor, a few of which a core's cache holds
UNROLLED = 32  # floats that torch's kernels take in one step: two of the widest registers of a CPU


class _BernoulliNll(torch.autograd.Function):
    """Cross-entropy from logits, log(1 + exp(logit)) − target · logit, with its gradient made in the same pass.

    log(1 + exp(x)) = max(x, 0) − log σ(|x|), because torch's sigmoid is the fastest exponential on a CPU. There, a few cells at
    a time stay in cache; and sigmoid rounds differently in what is left over at its end, so cells with a remainder go alone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        value = logits.new_empty(logits.shape[:-1])
        ctx.slope = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        elements = logits[0].numel()
        cells = 1 if elements % UNROLLED else max(1, CACHED_ELEMENTS // elements)
        cells = cells if logits.device.type == "cpu" else len(logits)
        for part in (slice(first, first + cells) for first in range(0, len(logits), cells)):
            x, t = logits[part], target[part]
            if ctx.slope is not None:
                torch.sigmoid(x, out=ctx.slope[part]).sub_(t)
            softplus = x.clamp(min=0).sub_(x.abs().sigmoid_().log_())
            torch.sum(softplus.addcmul_(x, t, value=-1), dim=-1, out=value[part])
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.slope.mul_(grad[..., None]), None


def bernoulli_nll(
    logits: Float[Tensor, "stack batch feature"], target: Float[Tensor, "stack batch feature"]
) -> Float[Tensor, "stack batch"]:
    """−log p(x|z) for p(x|z) = Π Bernoulli(x_j; sigmoid(logit_j)). For targets in (0, 1) a cross-entropy, no likelihood."""
    return _BernoulliNll.apply(logits, target)


def gaussian_nll(
    mean: Float[Tensor, "stack batch feature"],
    target: Float[Tensor, "stack batch feature"],
    log_sigma2: Float[Tensor, " stack"],
) -> Float[Tensor, "stack batch"]:
    """−log N(x; mean, σ² I) = ½‖x − mean‖²/σ² + (D/2) log(2πσ²)."""
    log_sigma2 = log_sigma2[:, None]
    squared = (mean - target).square().sum(dim=-1)
    return 0.5 * squared * torch.exp(-log_sigma2) + 0.5 * mean.shape[-1] * (LOG_2PI + log_sigma2)


def kl_per_latent(
    mu: Float[Tensor, "stack batch lane"], log_variance: Float[Tensor, "stack batch lane"]
) -> Float[Tensor, "stack batch lane"]:
    """KL(N(μ, σ²) ‖ N(0, 1)) = ½ (μ² + σ² − 1 − log σ²) ≥ 0, for each latent (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mu.square() + torch.expm1(log_variance) - log_variance)


class Terms(NamedTuple):
    """Means over a batch, one value a cell, in nats per sample."""

    loss: Float[Tensor, " stack"]
    reconstruction: Float[Tensor, " stack"]
    penalty: Float[Tensor, " stack"]


class Objective:
    """What each cell of a stack minimises, as one tensor a knob: which terms, how strongly, and with what noise."""

    def __init__(self, cells: list[Cell], device: torch.device | str = "cpu"):
        def knob(values: Sequence[float | bool]) -> Float[Tensor, " stack"]:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.bernoulli = cells[0].model.likelihood == "bernoulli"
        self.samples = knob([cell.arm.samples for cell in cells])[:, None, None]
        self.reconstruction_weight = knob([cell.arm.reconstruction_weight for cell in cells])
        self.beta = knob([cell.beta or 0.0 for cell in cells])
        self.rise = knob([(cell.anneal or 0.0) * cell.train.updates for cell in cells])
        self.anneals = any(cell.anneal for cell in cells)
        self.kl = knob([cell.arm.penalty == "kl" for cell in cells])[:, None, None].bool()
        self.penalised = knob([cell.arm.penalty != "none" for cell in cells])[:, None]
        self.has_variance = knob([cell.arm.samples or cell.arm.penalty == "kl" for cell in cells])[:, None, None].bool()
        self.learns_sigma2 = knob([cell.sigma2 == "learned" for cell in cells]).bool()

    def posterior(self, mu: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), [stack, batch, lane]; log σ² is 0 where an arm never trains that head."""
        return mu, torch.where(self.has_variance, log_variance, 0.0)

    def sample(self, mu: Tensor, log_variance: Tensor, epsilon: Tensor) -> Tensor:
        """z = μ + σ ⊙ ε where the arm samples, else z = μ. All [stack, batch, lane]; ε is masked already."""
        return mu + torch.exp(0.5 * log_variance) * epsilon * self.samples

    def reconstruction(self, output: Tensor, target: Tensor, log_sigma2: Tensor) -> Float[Tensor, "stack batch"]:
        """R = −log p(x|z). `output` is what `decode` returns."""
        if self.bernoulli:
            return bernoulli_nll(output, target)
        return gaussian_nll(output, target, torch.where(self.learns_sigma2, log_sigma2, log_sigma2.detach()))

    def penalty(self, mu: Tensor, log_variance: Tensor) -> Float[Tensor, "stack batch"]:
        """P: the KL; or ½‖μ‖², which is the KL at unit variance; or 0, as the arm says."""
        return kl_per_latent(mu, torch.where(self.kl, log_variance, 0.0)).sum(dim=-1) * self.penalised

    def beta_at(self, update: int) -> Float[Tensor, " stack"]:
        """β in update number `update` (0-based): it rises from 0 over the first `rise` updates."""
        return self.beta * torch.where(update < self.rise, update / self.rise, 1.0) if self.anneals else self.beta

    def terms(self, reconstruction: Tensor, penalty: Tensor, beta: Float[Tensor, " stack"]) -> Terms:
        """Batch means, and the loss at these β, without its λ term."""
        r, p = reconstruction.mean(dim=1), penalty.mean(dim=1)
        return Terms(self.reconstruction_weight * r + beta * p, r, p)
