"""The stacked autoencoder: the cells of a stack as one network whose parameters have a leading `stack` axis.

Parameters and gradients live in two buffers each, one row a cell, so that the optimiser, a checkpoint and a cell that is taken
out each touch whole rows. Layers are views into them, and their backward pass writes gradients straight into the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.config import Model
from pipeline.grid import Cell
from pipeline.randomness import Stream, uniforms

ROW_ALIGNMENT = 16  # floats in a cache line: no vectorised kernel ever ends inside a row
CELL_BY_CELL = 2**15  # weights of a layer from which on a CPU takes one cell after another: activations then stay in its cache
LARGE_PRODUCT = 2**23  # multiplications that repay a call of oneDNN, whose kernels use AVX-512 where MKL does not (AMD)
_onednn = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None


class Activation(NamedTuple):
    """An activation as a module, in place, and from the gradient of its output and that output to that of its input."""

    module: type[nn.Module]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, torch.relu_, lambda grad, output: torch.ops.aten.threshold_backward(grad, output, 0)),
    "tanh": Activation(nn.Tanh, torch.tanh_, torch.ops.aten.tanh_backward),
    "identity": Activation(nn.Identity, lambda x: x, lambda grad, output: grad),
}


class Layer(NamedTuple):
    """Views of one layer: weight [stack, in, out], bias [stack, 1, out], and their gradients (no bias gradient: no bias).

    Products are made transposed: `batch` then lies innermost, and kernels are up to eight times as fast on narrow layers.
    """

    weight: Tensor
    bias: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None

    def forward(self, x: Float[Tensor, "stack batch in"]) -> Float[Tensor, "stack batch out"]:
        return torch.baddbmm(self.bias.mT, self.weight.mT, x.mT).mT

    def backward(self, grad: Float[Tensor, "stack batch out"]) -> Float[Tensor, "stack batch in"]:
        return torch.bmm(self.weight, grad.mT).mT

    def write_gradients(self, x: Float[Tensor, "stack batch in"], grad: Float[Tensor, "stack batch out"]) -> None:
        if x.is_cuda:
            torch.bmm(x.mT, grad, out=self.weight_grad)
        else:
            self.weight_grad.copy_(torch.bmm(x.mT, grad))
        if self.bias_grad is not None:
            torch.sum(grad, dim=1, keepdim=True, out=self.bias_grad)


class CellLayer:
    """One cell's layer on a CPU, in oneDNN's kernels where they repay their call: [in, out] and [batch, in]."""

    def __init__(self, layer: Layer, row: int):
        self.weight, self.bias = layer.weight.detach()[row], layer.bias.detach()[row, 0]
        self.weight_t = self.weight.mT
        self.weight_grad = layer.weight_grad[row]
        self.bias_grad = None if layer.bias_grad is None else layer.bias_grad[row, 0]

    def _large(self, batch: int) -> bool:
        return _onednn is not None and batch * self.weight.numel() >= LARGE_PRODUCT

    def forward(self, x: Float[Tensor, "batch in"]) -> Float[Tensor, "batch out"]:
        if self._large(len(x)):
            return _onednn(x, self.weight_t, self.bias, "none", [], "")
        return torch.addmm(self.bias, x, self.weight)

    def backward(self, grad: Float[Tensor, "batch out"]) -> Float[Tensor, "batch in"]:
        if self._large(len(grad)):
            return _onednn(grad, self.weight, None, "none", [], "")
        return torch.mm(grad, self.weight_t)

    def write_gradients(self, x: Float[Tensor, "batch in"], grad: Float[Tensor, "batch out"]) -> None:
        if self._large(len(x)):
            self.weight_grad.copy_(_onednn(x.mT, grad.mT, None, "none", [], ""))
        else:
            torch.mm(x.mT, grad, out=self.weight_grad)
        if self.bias_grad is not None:
            torch.sum(grad, dim=0, out=self.bias_grad)


class Mlp:
    """Linear layers of every cell with activations between them.

    The backward pass overwrites the gradient rows instead of returning gradients. Where layers are large, a CPU takes one cell
    after another; no product then has a stack axis.
    """

    def __init__(self, layers: list[Layer], activation: Activation):
        self.layers, self.activation = layers, activation
        weights = [layer.weight for layer in layers]
        self.cell_by_cell = not weights[0].is_cuda and max(weight[0].numel() for weight in weights) >= CELL_BY_CELL
        rows = range(len(weights[0])) if self.cell_by_cell else ()
        self.parts = {row: [CellLayer(layer, row) for layer in layers] for row in rows} or {...: layers}

    def __call__(self, x: Float[Tensor, "stack batch in"]) -> Float[Tensor, "stack batch out"]:
        return _MlpFunction.apply(x, self.layers[0].weight, self)

    def forward(self, x: Tensor, layers: list[Any]) -> list[Tensor]:
        """The input of every layer, and the output."""
        values = [x]
        for layer in layers[:-1]:
            values.append(self.activation.apply_(layer.forward(values[-1])))
        return [*values, layers[-1].forward(values[-1])]

    def backward(self, grad: Tensor, inputs: list[Tensor], layers: list[Any], *, to_x: bool) -> Tensor | None:
        """Writes the gradients of all parameters, and returns that of x where it is asked for."""
        for number in reversed(range(len(layers))):
            layers[number].write_gradients(inputs[number], grad)
            if number:
                grad = self.activation.backward(layers[number].backward(grad), inputs[number])
        return layers[0].backward(grad) if to_x else None

    def joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if self.cell_by_cell else parts[0]


class _MlpFunction(torch.autograd.Function):
    """`anchor` is a parameter: the output requires gradients although x may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, mlp: Mlp) -> Tensor:
        outputs, ctx.mlp, ctx.inputs = [], mlp, []
        for cells, layers in mlp.parts.items():
            *inputs, output = mlp.forward(x[cells], layers)
            ctx.inputs.append(inputs)
            outputs.append(output)
        return mlp.joined(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        mlp, to_x = ctx.mlp, ctx.needs_input_grad[0]
        work = zip(mlp.parts.items(), ctx.inputs, strict=True)
        grads = [mlp.backward(grad[cells], inputs, layers, to_x=to_x) for (cells, layers), inputs in work]
        return mlp.joined(grads) if to_x else None, None, None


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

    def __init__(self, cells: list[Cell], features: int, device: torch.device | str = "cpu"):
        self.cells, self.features, self.config = cells, features, cells[0].model
        self.lanes = cells[0].lanes
        encoder = [features, *self.config.hidden]
        self.depth = len(self.config.hidden)
        self.shapes = [*itertools.pairwise(encoder), (encoder[-1], 2 * self.lanes)]
        self.shapes += itertools.pairwise([self.lanes, *reversed(encoder)])
        stack = len(cells)
        self.weights = Buffer.zeros(stack, sum(_aligned(i * o) for i, o in self.shapes), device)
        self.biases = Buffer.zeros(stack, 1 + sum(_aligned(o) for _, o in self.shapes), device)
        self.layers = list(self._layers())
        self._log_sigma2 = self.biases.view(self.biases.value.shape[1] - ROW_ALIGNMENT)
        activation = ACTIVATIONS[self.config.activation]
        self.encoder, self.decoder = (
            Mlp(part, activation) for part in (self.layers[: self.depth + 1], self.layers[self.depth + 1 :])
        )
        dims = torch.tensor([cell.latent_dim for cell in cells], device=device)
        self.mask = (torch.arange(self.lanes, device=device) < dims[:, None]).float()[:, None]

    def _layers(self) -> Any:
        weight_start = bias_start = 0
        for fan_in, fan_out in self.shapes:
            weight, weight_grad = self.weights.view(weight_start, fan_in, fan_out)
            bias, bias_grad = self.biases.view(bias_start, 1, fan_out)
            yield Layer(weight, bias, weight_grad, bias_grad if self.config.bias else None)
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
        """What the likelihood is made from: logits (Bernoulli) or means (Gaussian)."""
        return self.decoder(z)

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
        self.encoder = _mlp(widths, config, last=True)
        self.mean = nn.Linear(widths[-1], latent_dim, bias=config.bias)
        self.log_variance = nn.Linear(widths[-1], latent_dim, bias=config.bias)
        self.decoder = _mlp([latent_dim, *reversed(widths)], config, last=False)
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


def _mlp(widths: list[int], config: Model, *, last: bool) -> nn.Sequential:
    """Linear maps with activations between them; `last`: after the last one too."""
    modules: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        modules += [nn.Linear(fan_in, fan_out, bias=config.bias), ACTIVATIONS[config.activation].module()]
    return nn.Sequential(*(modules if last else modules[:-1]))
