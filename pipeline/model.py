"""The stacked autoencoder: the cells of a stack as one network whose parameters have a leading `stack` axis.

Parameters and gradients live in two buffers each, one row a cell, so that the optimiser, a checkpoint and a cell that is taken
out each touch whole rows. Layers are views into them, and their backward pass writes gradients straight into the rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.config import Model
from pipeline.grid import Cell, layer_shapes
from pipeline.mlp import ACTIVATIONS, Layer, Mlp, is_wide
from pipeline.randomness import Stream, uniforms

ROW_ALIGNMENT = 32  # floats that torch's kernels take in one step, so that none ends inside a row; two cache lines


class WrittenGrad(torch.autograd.Function):
    """A value whose gradient is written to its place instead of returned."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.grad.copy_(grad)
        return None, None


class Buffer(NamedTuple):
    """Values and gradients, one row a cell."""

    value: Float[Tensor, "stack column"]
    grad: Float[Tensor, "stack column"]

    @classmethod
    def zeros(cls, stack: int, columns: int, device: torch.device | str) -> Buffer:
        columns = _aligned(columns)
        return cls(torch.zeros(stack, columns, device=device), torch.zeros(stack, columns, device=device))

    def view(self, start: int, *shape: int) -> tuple[Tensor, Tensor]:
        """A leaf view of `shape` in each row from column `start` on, and the same view of the gradients."""
        stop = start + math.prod(shape)
        value, grad = (part[:, start:stop].view(len(part), *shape) for part in self)
        return value.detach().requires_grad_(), grad


def _aligned(columns: int) -> int:
    return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


class StackedAutoencoder:
    """The autoencoders of a stack of cells with equal `lanes` and equal `model`.

    A cell whose latent dimension is below `lanes` has zeros in its unused lanes. They stay zero without a mask on means or
    variances: an unused lane has mean 0 and log-variance 0, hence no KL and no KL gradient, and `mask` keeps ε out of it.
    """

    def __init__(self, cells: list[Cell], features: int, device: torch.device | str = "cpu", precision: str = "float32"):
        """`precision` is that of wide layers' products: float32 or bf16."""
        self.cells, self.features, self.config = cells, features, cells[0].model
        self.lanes, self.depth = cells[0].lanes, len(cells[0].model.hidden)
        self.shapes = layer_shapes(self.config, features, self.lanes)
        self.wide = is_wide(self.shapes)
        self.dtype = torch.bfloat16 if self.wide and precision == "bf16" else torch.float32
        stack = len(cells)
        self.weights = Buffer.zeros(stack, sum(_aligned(i * o) for i, o in self.shapes), device)
        self.biases = Buffer.zeros(stack, 1 + sum(_aligned(o) for _, o in self.shapes), device)
        self.layers = list(self._layers())
        self._log_sigma2 = self.biases.view(self.biases.value.shape[1] - ROW_ALIGNMENT)
        self.encoder = Mlp(self.layers[: self.depth + 1], ACTIVATIONS[self.config.activation])
        self.decoder = Mlp(self.layers[self.depth + 1 :], ACTIVATIONS[_decoder_activation(self.config)])
        self.output = ACTIVATIONS[self.config.output].module()
        dims = torch.tensor([cell.latent_dim for cell in cells], device=device)
        self.mask = (torch.arange(self.lanes, device=device) < dims[:, None]).float()[:, None]

    def _layers(self) -> Any:
        weight_start = bias_start = 0
        for fan_in, fan_out in self.shapes:
            weight, weight_grad = self.weights.view(weight_start, fan_in, fan_out)
            bias, bias_grad = self.biases.view(bias_start, 1, fan_out)
            bias_grad = bias_grad if self.config.bias else None
            yield Layer(weight, bias, weight_grad, bias_grad, self.wide, self.dtype)
            weight_start += _aligned(fan_in * fan_out)
            bias_start += _aligned(fan_out)

    @property
    def log_sigma2(self) -> Float[Tensor, " stack"]:
        """log σ² of a Gaussian likelihood, one a cell."""
        return WrittenGrad.apply(*self._log_sigma2)

    def encode(
        self, x: Float[Tensor, "stack batch feature"]
    ) -> tuple[Float[Tensor, "stack batch lane"], Float[Tensor, "stack batch lane"]]:
        """Means and log-variances of q(z|x)."""
        mu, log_variance = self.encoder(x).split(self.lanes, dim=-1)
        return mu, log_variance

    def decode(self, z: Float[Tensor, "stack batch lane"]) -> Float[Tensor, "stack batch feature"]:
        """What the likelihood is made from: logits (Bernoulli) or means (Gaussian), after `output` and before dropout."""
        return self.output(self.decoder(z))

    def reconstruct(self, z: Float[Tensor, "stack batch lane"]) -> Float[Tensor, "stack batch feature"]:
        """The mean of p(x|z), in the units of the data."""
        output = self.decode(z)
        return output.sigmoid() if self.config.likelihood == "bernoulli" else output

    @torch.no_grad()
    def initialise(self) -> StackedAutoencoder:
        """Draws weights and biases from U(−1/√fan_in, 1/√fan_in), torch's default, by (seed, layer, row, column)."""
        seeds, index = torch.tensor([cell.seed for cell in self.cells], device=self.mask.device).unique(return_inverse=True)
        for purpose, parts in enumerate(self._parts()):
            for part in parts:
                part.draw(seeds, index, purpose)
        for row, cell in enumerate(self.cells):
            if isinstance(cell.sigma2, float):
                self._log_sigma2[0][row] = math.log(cell.sigma2)
        return self

    def _parts(self) -> Any:
        """The linear maps of a plain autoencoder, in order, as views: a weight part and, where there is one, a bias part."""
        dims = [cell.latent_dim for cell in self.cells]
        for number, layer in enumerate(self.layers):
            halves = 2 if number == self.depth else 1
            weights, biases = layer.weight.chunk(halves, dim=-1), layer.bias.chunk(halves, dim=-1)
            for weight, bias in zip(weights, biases, strict=True):
                fan_in = dims if number == self.depth + 1 else [weight.shape[1]] * len(dims)
                rows = dims if number == self.depth + 1 else None
                columns = dims if number == self.depth else None
                parts = [Part(weight, fan_in, rows, columns)]
                yield [*parts, Part(bias, fan_in, None, columns, bias=True)] if self.config.bias else parts

    @torch.no_grad()
    def cell_state(self, row: int) -> dict[str, Tensor]:
        """The state dict of one cell's `Autoencoder`, without unused lanes."""
        state = {}
        for name, parts in zip(_names(self.config), self._parts(), strict=True):
            for part in parts:
                view = part.of(row)
                state[f"{name}.bias" if part.bias else f"{name}.weight"] = (view[0] if part.bias else view.T).clone()
        if self.config.likelihood == "gaussian":
            state["log_sigma2"] = self._log_sigma2[0][row].clone()
        return state

    @torch.no_grad()
    def load_cell(self, row: int, state: dict[str, Tensor]) -> None:
        """Puts the state dict of an `Autoencoder` into one row; the inverse of `cell_state`."""
        for name, parts in zip(_names(self.config), self._parts(), strict=True):
            for part in parts:
                value = state[f"{name}.bias" if part.bias else f"{name}.weight"]
                part.of(row).copy_(value[None] if part.bias else value.T)
        if self.config.likelihood == "gaussian":
            self._log_sigma2[0][row] = state["log_sigma2"]

    def cell(self, row: int) -> Autoencoder:
        """One cell as a plain module."""
        cell = self.cells[row]
        module = Autoencoder(self.config, self.features, cell.latent_dim)
        module.load_state_dict(self.cell_state(row))
        return module


class Part(NamedTuple):
    """The weight or bias of one linear map of every cell; `rows` and `columns` say how much of it each cell uses."""

    view: Tensor
    fan_in: list[int]
    rows: list[int] | None
    columns: list[int] | None
    bias: bool = False

    def of(self, row: int) -> Tensor:
        """What one cell uses."""
        rows = self.rows[row] if self.rows else None
        return self.view[row, :rows, : self.columns[row] if self.columns else None]

    def draw(self, seeds: Tensor, index: Tensor, purpose: int) -> None:
        unit = uniforms(seeds, Stream.WEIGHTS, self.view.shape[1], self.view.shape[2], 2 * purpose + self.bias)
        unit = unit.mul_(2).sub_(1).float()
        for row, fan_in in enumerate(self.fan_in):
            part = self.of(row)
            part.copy_(unit[index[row], : part.shape[0], : part.shape[1]] / math.sqrt(fan_in))


def _names(config: Model) -> list[str]:
    """Names of the linear maps in `Autoencoder`, in the order of `StackedAutoencoder._parts`."""
    depth = len(config.hidden)
    encoder = [f"encoder.{2 * number}" for number in range(depth)]
    return [*encoder, "mean", "log_variance", *(f"decoder.{2 * number}" for number in range(depth + 1))]


class Autoencoder(nn.Module):
    """One cell as a plain module: the reference for the stack, and what a cell's weights load into.

    With no hidden layer it is the linear autoencoder. `log_sigma2` belongs to a Gaussian likelihood.
    """

    def __init__(self, config: Model, features: int, latent_dim: int):
        super().__init__()
        widths = [features, *config.hidden]
        self.likelihood = config.likelihood
        self.encoder = _mlp(widths, config.bias, config.activation, last=config.activation)
        self.mean = nn.Linear(widths[-1], latent_dim, bias=config.bias)
        self.log_variance = nn.Linear(widths[-1], latent_dim, bias=config.bias)
        self.decoder = _mlp([latent_dim, *reversed(widths)], config.bias, _decoder_activation(config), last=config.output)
        if config.likelihood == "gaussian":
            self.log_sigma2 = nn.Parameter(torch.zeros(()))

    def encode(self, x: Float[Tensor, "batch feature"]) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Means and log-variances of q(z|x)."""
        hidden = self.encoder(x)
        return self.mean(hidden), self.log_variance(hidden)

    def forward(self, x: Float[Tensor, "batch feature"]) -> Float[Tensor, "batch feature"]:
        """The reconstruction at z = μ, in the units of the data."""
        return self.mean_path()(x)

    def mean_path(self) -> nn.Sequential:
        """x to its reconstruction at z = μ, made of torch's own modules alone."""
        path = [*self.encoder, self.mean, *self.decoder]
        return nn.Sequential(*path, *([nn.Sigmoid()] if self.likelihood == "bernoulli" else []))


def _decoder_activation(config: Model) -> str:
    """The name of the activation between the decoder's layers."""
    return config.decoder_activation or config.activation


def _mlp(widths: list[int], bias: bool, between: str, *, last: str) -> nn.Sequential:
    """Linear maps with one activation between them, and another after the last one."""
    maps = [nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in itertools.pairwise(widths)]
    activations = [ACTIVATIONS[between].module() for _ in maps[1:]] + [ACTIVATIONS[last].module() for _ in maps[:1]]
    return nn.Sequential(*itertools.chain.from_iterable(zip(maps, activations, strict=True)))
