"""The perceptrons of a stack: batched products, and a backward pass that writes gradients to their places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDE = 2**15  # weights
LEAST_PRODUCT = 16**3  # multiplications; torch gives oneDNN larger products only


class Activation(NamedTuple):
    """An activation as a module; in place; and, in place, the gradient of its input from that of its output, and the output."""

    module: type[nn.Module]
    forward_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


def _threshold_backward_(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _tanh_backward_(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward.grad_input(grad, output, grad_input=grad)


ACTIVATIONS = {
    "relu": Activation(nn.ReLU, torch.relu_, _threshold_backward_),
    "tanh": Activation(nn.Tanh, torch.tanh_, _tanh_backward_),
    "identity": Activation(nn.Identity, lambda x: x, lambda grad, output: grad),
}


class Layer(NamedTuple):
    """Views of one layer: weight [stack, in, out], bias [stack, 1, out], and their gradients (no bias gradient: no bias).

    Of one cell, they and what passes through them lack `stack`. Products and their operands are rounded to `dtype`. Products of
    narrow layers are made transposed: `batch` then lies innermost, and kernels are up to eight times as fast.
    """

    weight: Tensor
    bias: Tensor
    weight_grad: Tensor
    bias_grad: Tensor | None
    wide: bool = False
    dtype: torch.dtype = torch.float32

    def of(self, cells: Any) -> Layer:
        """The same layer of some cells, or of one."""
        views = [view if view is None else view.detach()[cells] for view in self[:4]]
        return Layer(*views, self.wide, self.dtype)

    def forward(self, x: Float[Tensor, "*stack batch in"]) -> Float[Tensor, "*stack batch out"]:
        output = self._product(x, self.weight) if self.wide else self._product(self.weight.mT, x.mT).mT
        return output.add_(self.bias)

    def backward(self, grad: Float[Tensor, "*stack batch out"]) -> Float[Tensor, "*stack batch in"]:
        return self._product(grad, self.weight.mT) if self.wide else self._product(self.weight, grad.mT).mT

    def write_gradients(self, x: Float[Tensor, "*stack batch in"], grad: Float[Tensor, "*stack batch out"]) -> None:
        self._product(x.mT, grad, out=self.weight_grad)
        if self.bias_grad is not None:
            torch.sum(grad, dim=-2, keepdim=True, out=self.bias_grad)

    def _product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        if self.dtype == torch.float32:
            return multiply(a, b, out=out)
        product = multiply(a.to(self.dtype), b.to(self.dtype)).float()
        return product if out is None else out.copy_(product)


def is_wide(shapes: list[tuple[int, int]]) -> bool:
    """Whether layers of these shapes are large enough to keep a processor busy one cell at a time."""
    return any(fan_in * fan_out >= WIDE for fan_in, fan_out in shapes)


class Mlp:
    """Linear layers of every cell with activations between them, all wide or none.

    The backward pass overwrites the gradient rows instead of returning gradients. On a CPU, wide layers take one cell after
    another: activations then stay in its cache, and a cell's numbers do not depend on how many cells there are.
    """

    def __init__(self, layers: list[Layer], activation: Activation):
        self.anchor, self.activation = layers[0].weight, activation
        self.smallest = min(layer.weight[0].numel() for layer in layers)
        self.one_by_one = layers[0].wide and self.anchor.device.type == "cpu"
        cells = range(len(self.anchor)) if self.one_by_one else [...]
        self.parts = [(part, [layer.of(part) for layer in layers]) for part in cells]

    def __call__(self, x: Float[Tensor, "stack batch in"]) -> Float[Tensor, "stack batch out"]:
        return _MlpFunction.apply(x, self.anchor, self)

    def forward(self, x: Tensor, layers: list[Layer]) -> list[Tensor]:
        """The input of every layer, and the output."""
        values = [x]
        for layer in layers[:-1]:
            values.append(self.activation.forward_(layer.forward(values[-1])))
        return [*values, layers[-1].forward(values[-1])]

    def backward(self, grad: Tensor, inputs: list[Tensor], layers: list[Layer], *, to_x: bool) -> Tensor | None:
        """Writes the gradients of all parameters, and returns that of x where it is asked for."""
        for number in reversed(range(len(layers))):
            layers[number].write_gradients(inputs[number], grad)
            if number:
                grad = self.activation.backward_(layers[number].backward(grad), inputs[number])
        return layers[0].backward(grad) if to_x else None

    def kernels(self, batch: int) -> contextlib.AbstractContextManager[None]:
        on_cpu = self.anchor.device.type == "cpu"
        return fast_products(batch * self.smallest) if on_cpu else contextlib.nullcontext()

    def joined(self, parts: list[Tensor]) -> Tensor:
        """One tensor of what each part has."""
        return torch.stack(parts) if self.one_by_one else parts[0]


class _MlpFunction(torch.autograd.Function):
    """`anchor` is a parameter: the output requires gradients although x may not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, mlp: Mlp) -> Tensor:
        outputs, ctx.mlp, ctx.inputs = [], mlp, []
        with mlp.kernels(x.shape[1]):
            for cells, layers in mlp.parts:
                *inputs, output = mlp.forward(x[cells], layers)
                ctx.inputs.append(inputs)
                outputs.append(output)
        return mlp.joined(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        mlp, to_x = ctx.mlp, ctx.needs_input_grad[0]
        work = zip(mlp.parts, ctx.inputs, strict=True)
        with mlp.kernels(grad.shape[1]):
            grads = [mlp.backward(grad[cells], inputs, layers, to_x=to_x) for (cells, layers), inputs in work]
        return mlp.joined(grads) if to_x else None, None, None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split among threads, and so depend on their number in the last bit; small ones only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fast_products(smallest: int) -> contextlib.AbstractContextManager[None]:
    """Has oneDNN make float32 products on a CPU: two to three times as fast where MKL leaves AVX-512 unused (AMD).

    torch grants oneDNN these only with permission to round to bf16; hence only on a CPU that makes no use of it. And torch goes
    by the size of a whole stack's product, on which a cell's result must not depend; hence only where one cell's, `smallest`,
    is large enough.
    """
    return _onednn() if smallest > LEAST_PRODUCT and _onednn_keeps_float32() else contextlib.nullcontext()


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    switch = torch.backends.mkldnn.matmul
    before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@cache
def _onednn_keeps_float32() -> bool:
    """Multiplies what bf16 cannot hold."""
    number, size = 1 + 2**-12, 256
    factor = torch.full((2, size, size), number)
    with _onednn():
        product = torch.bmm(factor, factor)
    return torch.backends.mkldnn.is_available() and bool((product / (size * number**2) - 1).abs().max() < 2**-20)
