"""Products of a stack, against torch's own in float64: whichever library makes them, float32 stays float32."""

import itertools

import pytest
import torch

from pipeline.mlp import LEAST_PRODUCT, Layer, fast_products

BATCHES, SHAPES = (128, 64, 37, 25, 6), ((2, 30), (30, 30), (30, 4), (30, 2), (17, 5), (128, 16))


def layer(stack: int, fan_in: int, fan_out: int, *, wide: bool = False) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(stack, rows, fan_out, generator=generator) for rows in (fan_in, 1))
    found = Layer(weight, bias, torch.empty_like(weight), torch.empty_like(bias), wide)
    return found, torch.randn(stack, 128, fan_in, generator=generator), torch.randn(stack, 128, fan_out, generator=generator)


def passes(layer: Layer, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of x, and of weight and bias."""
    with fast_products(x.shape[1] * layer.weight[0].numel()):
        output, x_grad = layer.forward(x), layer.backward(grad)
        layer.write_gradients(x, grad)
    return [output, x_grad, layer.weight_grad.clone(), layer.bias_grad.clone()]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_equals_linear_algebra(shape, wide):
    found, x, grad = layer(3, *shape, wide=wide)
    weight, x64, grad64 = (part.double() for part in (found.weight, x, grad))
    wanted = [x64 @ weight + found.bias, grad64 @ weight.mT, x64.mT @ grad64, grad64.sum(dim=1, keepdim=True)]
    for one, other in zip(passes(found, x, grad), wanted, strict=True):
        assert (one - other).abs().max() < 2**-18 * other.abs().max()


@pytest.mark.parametrize(("shape", "batch"), list(itertools.product(SHAPES, BATCHES)))
def test_a_product_depends_neither_on_how_many_there_are_nor_on_its_place(shape, batch):
    """On both sides of the size from which torch asks another library, and at every place in memory."""
    found, x, grad = layer(48, *shape)
    x, grad = x[:, :batch].contiguous(), grad[:, :batch].contiguous()
    whole = passes(found, x, grad)
    for stack in (2, 3, 5, 16):
        for first in range(0, 48, stack):
            part = slice(first, first + stack)
            views = [view[part].clone() for view in (*found[:4], x, grad)]
            for one, all_ in zip(passes(Layer(*views[:4]), *views[4:]), whole, strict=True):
                assert torch.equal(one, all_[part])


def test_the_switch_of_the_products_is_put_back():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products(LEAST_PRODUCT + 1):
        raise ZeroDivisionError
    assert switch.fp32_precision == before
