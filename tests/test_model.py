import math

import pytest
import torch

from pipeline.model import Autoencoder, StackedAutoencoder


@pytest.mark.parametrize("hidden", [(), (30, 20)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_stack_computes_what_its_cells_compute(make_cell, pixels, hidden, likelihood):
    model = {"hidden": hidden, "likelihood": likelihood, "activation": "tanh"}
    stack = StackedAutoencoder([make_cell(latent_dim=dim, seed=dim, model=model) for dim in (3, 4)], 17).initialise()
    for row in range(2):
        plain = stack.cell(row)
        mu, log_variance = stack.encode(pixels.expand(2, -1, -1))
        dim = stack.cells[row].latent_dim
        torch.testing.assert_close((mu[row, :, :dim], log_variance[row, :, :dim]), plain.encode(pixels))
        assert not mu[row, :, dim:].any() and not log_variance[row, :, dim:].any()
        torch.testing.assert_close(stack.reconstruct(mu)[row], plain(pixels))


def test_an_output_activation_makes_the_mean_of_the_likelihood_everywhere(make_cell, pixels):
    model = {"likelihood": "gaussian", "output": "relu", "decoder_activation": "tanh", "dropout": 0.5}
    stack = StackedAutoencoder([make_cell(latent_dim=4, seed=seed, model=model) for seed in (0, 1)], 17).initialise()
    mean = stack.decode(stack.encode(pixels.expand(2, -1, -1))[0])
    assert mean.min() == 0 < mean.max() and torch.equal(mean, stack.reconstruct(stack.encode(pixels.expand(2, -1, -1))[0]))
    for row in range(2):
        plain = stack.cell(row)
        torch.testing.assert_close(plain(pixels), mean[row])
        torch.testing.assert_close(plain.decoder(plain.encode(pixels)[0]), mean[row])
        assert [type(module).__name__ for module in plain.decoder[1::2]] == ["Tanh", "Tanh", "ReLU"]


def test_weights_follow_torchs_default_bounds(make_cell):
    stack = StackedAutoencoder([make_cell(latent_dim=dim) for dim in (3, 4)], 17).initialise()
    for row in range(2):
        for module in stack.cell(row).modules():
            if isinstance(module, torch.nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for values in (module.weight, module.bias):
                    assert values.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_initial_weights_do_not_depend_on_company(make_cell):
    alone = StackedAutoencoder([make_cell(latent_dim=3, seed=5)], 17).initialise().cell_state(0)
    beside = StackedAutoencoder([make_cell(latent_dim=4), make_cell("ae", latent_dim=3, seed=5)], 17).initialise().cell_state(1)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_a_cell_state_survives_the_round_trip(make_cell):
    cells = [make_cell(latent_dim=3, seed=seed, sigma2=0.5, model={"likelihood": "gaussian"}) for seed in (0, 1)]
    source, target = StackedAutoencoder(cells, 17).initialise(), StackedAutoencoder(cells, 17)
    for row in range(2):
        target.load_cell(row, source.cell_state(row))
    assert torch.equal(source.weights.value, target.weights.value)
    assert torch.equal(source.biases.value, target.biases.value)


def test_a_network_without_biases_has_none(make_cell, pixels):
    stack = StackedAutoencoder([make_cell(model={"bias": False})] * 2, 17).initialise()
    assert not stack.biases.value.any()
    assert not any(name.endswith("bias") for name in Autoencoder(stack.config, 17, 2).state_dict())
    stack.decode(stack.encode(pixels.expand(2, -1, -1))[0]).sum().backward()
    assert stack.weights.grad.any() and not stack.biases.grad.any()
