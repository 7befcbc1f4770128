import math

import pytest
import torch

from pipeline import evaluation
from pipeline.artifacts import Prepared, TrainedStack
from pipeline.config import ConfigError, Data, Evaluate, Grid, Model, Study, Train
from pipeline.evaluation import MEASUREMENTS, Measured, Reference, measured, noise_curves
from pipeline.measures import MEASURES, RADIUS, find
from pipeline.model import StackedAutoencoder
from pipeline.stages.prune import CRITERIA, _analyse

ROWS = 80
NOISE = Evaluate(noise=({"kind": "gaussian", "levels": (0.0, 0.5)},))


def make_data(features=12, *, image_shape=None, names=("a", "b", "c"), unit_range=True, binarise="none", normal=False):
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn if normal else torch.rand
    x = {split: [draw(ROWS, features, generator=generator)] for split in ("train", "validation", "test")}
    x = {split: [rows.round() for rows in parts] for split, parts in x.items()} if binarise != "none" else x
    labels = {split: [torch.arange(ROWS) % len(names)] for split in x} if names else None
    return Prepared(x, labels, ["hash"], [{}], features, image_shape, unit_range, binarise, names, {})


@pytest.fixture
def make_stack(make_cell):
    """A stack of untrained cells on made data."""

    def make(data, *cells, evaluate=None, weights=None):
        cells = [make_cell(**{"model": {"hidden": (8,)}, **cell}) for cell in cells]
        grid = Grid(latent_dim=(2,), arms={"ae": {}})
        budget = Train(updates=10, history_points=10)
        likelihood = cells[0].model.likelihood
        model = Model(hidden=(8,), likelihood=likelihood)
        study = Study(title="t", data=Data(name="made"), model=model, grid=grid, train=budget, evaluate=evaluate or Evaluate())
        net = StackedAutoencoder(cells, data.features).initialise()
        return Measured(TrainedStack([str(row) for row in range(len(cells))], net, 0), Reference(data, 0, study.evaluate))

    return make


def groups():
    return {name.split("/")[0] for name in MEASURES}


def test_every_measure_of_the_catalogue_is_measured_and_no_other(make_stack):
    registered = [name for names in MEASUREMENTS for name in names]
    stack = make_stack(make_data(), {}, {"arm": "ae"}, evaluate=NOISE)
    noise = {f"noise/{column}" for _, _, columns in noise_curves(stack) for column in columns}
    prune = {"prune/active_units", "prune/cancelled"} | {f"prune/elbow_{criterion}" for criterion in CRITERIA}
    assert len(registered) == len(set(registered)) and not noise & prune & set(registered)
    assert {*registered, *noise, *prune} == set(MEASURES)
    assert set(measured(stack)) - set(registered) == {RADIUS + name for name in "abc"}
    assert all(find(name) for name in measured(stack))


def test_columns_hold_a_number_a_cell_or_nothing(make_stack):
    cells = ({}, {"arm": "ae"}, {"latent_dim": 1, "arm": "kl_only"})
    found = measured(make_stack(make_data(), *cells, evaluate=Evaluate(active_threshold=1e-6)))
    assert {len(values) for values in found.values()} == {3}
    known = {name for name, values in found.items() if any(value is not None and not math.isnan(value) for value in values)}
    absent = {"test/elbo", "test/iw_bound", "test/sharpness", "decoder/folds", "boots/axis_alignment"}
    assert set(found) - known == absent | {"matched/mse_clean", "matched/mse_noisy"}
    for name in (
        "test/kl",
        "test/kl_share",
        "test/bce_elbo",
        "units/active",
        "units/mixed",
        "units/passive",
        "test/posterior_variance",
    ):
        assert [math.isnan(value) for value in found[name]] == [False, True, False]
    assert [math.isnan(value) for value in found["latent/on_lines"]] == [False, False, True]
    assert [math.isnan(value) for value in found["latent/dependence"]] == [False, False, True]
    assert all(isinstance(value, int) for value in found["test/active_units"])


def test_permuting_the_stack_permutes_every_measure(make_stack):
    cells = [{}, {"arm": "ae", "seed": 1}, {"latent_dim": 1, "seed": 2}, {"arm": "ae_as_published", "seed": 1}]
    data = make_data(16, image_shape=(4, 4))
    forth, back = (measured(make_stack(data, *order)) for order in (cells, cells[::-1]))
    for name, values in forth.items():
        assert [value or 0 for value in back[name][::-1]] == pytest.approx(
            [value or 0 for value in values], nan_ok=True, rel=1e-4
        )


def rescaled(stack, factor):
    """The same autoencoder in other units of its code."""
    state = stack.model.cell_state(0)
    decoder = next(name for name in state if name.startswith("decoder") and name.endswith("weight"))
    state |= {"mean.weight": state["mean.weight"] * factor, "mean.bias": state["mean.bias"] * factor}
    stack.model.load_cell(0, state | {decoder: state[decoder] / factor})
    return stack


def test_the_scale_of_a_plain_code_changes_nothing(make_stack):
    plain, scaled = (measured(rescaled(make_stack(make_data(), {"arm": "ae"}, {}), factor)) for factor in (1, 50))
    for name, values in plain.items():
        expected = values[0] if values[0] is not None else math.nan
        assert scaled[name][0] is None or scaled[name][0] == pytest.approx(expected, nan_ok=True, rel=1e-3, abs=1e-5), name


def test_a_latent_of_a_plain_autoencoder_is_ablated_to_its_mean_wherever_that_is(make_stack):
    here, there = (make_stack(make_data(), {"arm": "ae"}, {}) for _ in range(2))
    state, shift = there.model.cell_state(0), torch.tensor([3.0, -2.0])
    first = next(name.removesuffix(".weight") for name in state if name.startswith("decoder") and name.endswith(".weight"))
    bias = state[f"{first}.bias"] - state[f"{first}.weight"] @ shift
    there.model.load_cell(0, state | {"mean.bias": state["mean.bias"] + shift, f"{first}.bias": bias})
    curves = [[row["mse"] for row in _analyse(stack)["ablation"] if row["cell_id"] == "0"] for stack in (here, there)]
    assert len(curves[0]) == 3 * 3 and curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_a_summary_has_the_elbow_of_the_kl_also_where_no_arm_has_one(make_stack):
    sampling, plain = (_analyse(make_stack(make_data(), {"arm": arm}, {"arm": arm}))["summary"] for arm in ("vae", "ae"))
    assert [row.keys() for row in plain] == [row.keys() for row in sampling]
    assert all(row["elbow_kl"] is not None for row in sampling) and all(row["elbow_kl"] is None for row in plain)


@pytest.mark.parametrize("cell", [{"arm": "ae"}, {"arm": "ae_as_published"}, {"beta": 0.0}], ids=str)
def test_units_are_active_whatever_the_scale_of_a_code_that_no_prior_holds(make_stack, cell):
    stacks = [rescaled(make_stack(make_data(), cell, {}), factor) for factor in (1e-3, 1, 1e3)]
    small, whole, large = (measured(stack)["test/active_units"][0] for stack in stacks)
    assert small == whole == large > 0


def test_a_gaussian_likelihood_and_black_and_white_images_have_bounds_and_grey_ones_a_score(make_stack):
    gaussian = {"model": {"hidden": (8,), "likelihood": "gaussian"}}
    for data, cell, bounded in (
        (make_data(), {}, False),
        (make_data(binarise="fixed"), {}, True),
        (make_data(), gaussian, True),
    ):
        found = measured(make_stack(data, cell))
        assert (found["test/bce_elbo"] == [None]) == bounded
        assert (found["test/elbo"] == found["test/iw_bound"] == [None]) == (not bounded)
        if bounded:
            assert found["test/elbo"][0] == pytest.approx(-found["test/reconstruction"][0] - found["test/kl"][0], rel=1e-5)


def test_the_importance_weighted_bound_rises_with_draws_towards_log_p_of_a_linear_vae(make_stack):
    data = make_data(3, normal=True, unit_range=False, names=None)
    cell = {"model": {"hidden": (), "likelihood": "gaussian"}}
    bounds = {}
    for draws in (1, 8, 512):
        stack = make_stack(data, cell, {**cell, "arm": "ae"}, evaluate=Evaluate(importance_samples=draws))
        found = measured(stack)
        bounds[draws], elbo = found["test/iw_bound"][0], found["test/elbo"][0]
        assert math.isnan(found["test/iw_bound"][1])
    state = stack.model.cell_state(0)
    weight, bias = state["decoder.0.weight"], state["decoder.0.bias"]
    marginal = torch.distributions.MultivariateNormal(bias, weight @ weight.T + torch.eye(3))
    x, mu, variance = data.x["test"][0], stack.codes["test"][0], stack.log_variance[0].exp()
    squared = (x - mu @ weight.T - bias).square().sum(dim=1) + variance @ weight.square().sum(dim=0)
    exact_elbo = -(0.5 * squared + 1.5 * math.log(2 * math.pi)).mean() - stack.kl[0].sum()
    gap = (marginal.log_prob(x).mean() - exact_elbo).item()
    assert bounds[1] == pytest.approx(elbo, rel=1e-5) and elbo < bounds[8] < bounds[512]
    assert bounds[512] - elbo == pytest.approx(gap, rel=0.05)


def test_the_kl_share_compares_the_kl_with_the_misfit(make_stack):
    data = make_data()
    cell = {"model": {"hidden": (8,), "likelihood": "gaussian"}, "sigma2": 0.3}
    stack = make_stack(data, cell)
    squared = (stack.decode(stack.z) - data.x["test"][0]).square().sum(dim=-1).mean().item()
    kl = stack.kl.sum().item()
    assert measured(stack)["test/kl_share"][0] == pytest.approx(kl / (kl + squared / 0.6), rel=1e-4)
    grey = make_stack(data, {})
    assert 0 < measured(grey)["test/kl_share"][0] < 1


def test_units_of_posteriors_add_up(make_stack):
    stack = make_stack(make_data(), {"latent_dim": 3}, {"latent_dim": 4})
    stack.log_variance = torch.tensor([0.0, -8.0, -0.7, 0.0]).expand(2, ROWS, 4)
    found = measured(stack)
    assert found["units/passive"] == [1, 2] and found["units/mixed"] == [1, 1] and found["units/active"] == [1, 1]
    signal = stack.codes["test"][0, :, :3].var(dim=0)
    noise = torch.tensor([1, math.exp(-8), math.exp(-0.7)])
    assert found["test/posterior_variance"][0] == pytest.approx((noise / (noise + signal)).mean().item(), rel=1e-4)


def test_a_collapsed_latent_is_not_blown_up(make_stack):
    stack = make_stack(make_data(), {}, {"arm": "ae"})
    codes = torch.randn(2, ROWS, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3])
    stack.codes = {"train": codes, "test": codes}
    assert (stack.standard.std(dim=1)[:, 0] - 1).abs().max() < 1e-5
    assert (stack.standard.std(dim=1)[:, 1] < 0.02).all()
    assert all(value < 0.4 for value in measured(stack)["latent/utilisation"])


def test_codes_interpolate_between_neighbouring_rows_of_different_classes(make_stack):
    stack = make_stack(make_data(), {})
    assert stack.reference.pairs[:3].tolist() == [[0, 1], [1, 2], [2, 3]]
    first = stack.decode(stack.codes["test"])[:, stack.reference.pairs]
    torch.testing.assert_close(stack.paths[:, :, 0], first[:, :, 0])
    torch.testing.assert_close(stack.paths[:, :, -1], first[:, :, 1])
    assert make_stack(make_data(names=None), {}).reference.pairs.shape == (ROWS - 1, 2)


def test_codes_interpolate_between_two_named_classes(make_stack):
    pairs = make_stack(make_data(), {}, evaluate=Evaluate(between=("c", "a"))).reference.pairs
    assert set(map(tuple, (pairs % 3).tolist())) == {(2, 0)}
    with pytest.raises(ConfigError, match=r"evaluate.between: must name two of the classes \['a', 'b', 'c'\], but got 'd'"):
        measured(make_stack(make_data(), {}, evaluate=Evaluate(between=("a", "d"))))


def test_samples_come_from_the_prior_or_from_the_gaussian_that_fits_the_codes(make_stack):
    stack = make_stack(make_data(), {}, {"arm": "ae"})
    draws = torch.randn(2, 4000, 2, generator=torch.Generator().manual_seed(0))
    codes, train = stack.from_prior(draws), stack.codes["train"]
    torch.testing.assert_close(codes[0], draws[0])
    torch.testing.assert_close(codes[1].std(dim=0), train[1].std(dim=0), rtol=0.05, atol=0)
    torch.testing.assert_close(codes[1].mean(dim=0), train[1].mean(dim=0), rtol=0, atol=0.05)


def test_what_noise_leaves_is_a_share_of_the_mean_images_error(make_stack):
    stack = make_stack(make_data(), {}, {"arm": "ae"}, evaluate=NOISE)
    (_, none, clean), (kind, level, noisy) = noise_curves(stack)
    assert (none, kind, level) == (0.0, "gaussian", 0.5)
    assert clean["mse_clean"] == clean["mse_noisy"] == pytest.approx(measured(stack)["test/mse"])
    assert all(math.isnan(value) for value in clean["left"])
    changed = stack.reference.noisy("gaussian", 0.5, True) != stack.x["test"]
    of_mean = ((stack.x["train"].mean(dim=0) - stack.x["test"]).square() * changed).mean().item()
    assert clean["rise"] == pytest.approx([math.nan, math.nan], nan_ok=True), "an untrained cell explains no variance"
    reconstructed = stack.decode(stack.encode(stack.reference.noisy("gaussian", 0.5, True))[0])
    left = ((reconstructed - stack.x["test"]).square() * changed).mean(dim=(1, 2))
    torch.testing.assert_close(torch.tensor(noisy["left"]), left / of_mean)


@pytest.mark.parametrize("cell", [{}, {"model": {"hidden": (8,), "likelihood": "gaussian"}}], ids=["bernoulli", "gaussian"])
def test_parts_of_rows_measure_what_the_whole_does(make_stack, monkeypatch, cell):
    """More test rows than pass through a stack at a time are no other rows."""
    found = []
    for rows in (ROWS, 33):
        monkeypatch.setattr(evaluation, "ROWS", rows)
        stack = make_stack(make_data(), cell, {**cell, "arm": "ae"}, evaluate=NOISE)
        found.append({**measured(stack), **{f"{kind} {level}": curve["left"] for kind, level, curve in noise_curves(stack)}})
    for name, values in found[0].items():
        for whole, parts in zip(values, found[1][name], strict=True):
            assert parts is whole or parts == pytest.approx(whole, rel=1e-4, abs=1e-6, nan_ok=True), name


def test_noise_raises_the_error_by_a_share_of_what_is_explained_of_clean_input(make_stack):
    stack = make_stack(make_data(), {}, {"arm": "ae"}, evaluate=NOISE)
    variance = stack.x["test"].var(dim=0, correction=0).mean().item()
    stack.mse = torch.tensor([0.25 * variance, 2 * variance])
    _, (_, _, noisy) = noise_curves(stack)
    assert noisy["rise"][0] == pytest.approx((noisy["mse_clean"][0] - 0.25 * variance) / (0.75 * variance))
    assert math.isnan(noisy["rise"][1])


def normals(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def given(stack, codes):
    """The stack, as if it had encoded both splits so."""
    codes = torch.nn.functional.pad(codes, (0, stack.model.lanes - codes.shape[-1]))
    stack.codes = {split: codes for split in ("train", "test")}
    return stack


def test_dependence_is_of_active_latents_and_a_latent_after_the_first(make_stack):
    x = normals(1, ROWS, 2)
    x[..., 1] = 0.8 * x[..., 0] + 0.6 * x[..., 1]
    idle, third = 1e-6 * normals(1, ROWS, 1), x[..., :1] + 1e-3 * normals(1, ROWS, 1)
    cells = [make_stack(make_data(), {"latent_dim": dim, "arm": "ae"}) for dim in (2, 3, 3, 2)]
    codes = [x, torch.cat([x, idle], dim=-1), torch.cat([x, third], dim=-1), torch.cat([x[..., :1], idle], dim=-1)]
    two, with_idle, three, lone = (measured(given(*each))["latent/dependence"][0] for each in zip(cells, codes, strict=True))
    assert two == pytest.approx(-0.5 * math.log(1 - 0.8**2), abs=0.2) and with_idle == pytest.approx(two)
    assert three > two and math.isnan(lone)


TURNS = (torch.eye(3), torch.tensor([[3.0, 0, 0], [1.0, 0.2, 0], [0, 0, 1e-3]]), torch.diag(torch.tensor([1.0, 0, 0])))


@pytest.mark.parametrize("turn", TURNS)
def test_every_linear_decoder_has_the_same_sensitivity(make_stack, turn):
    """However many latents it has, how they are scaled and rotated, and how small its outputs are."""
    stack = given(make_stack(make_data(), {"latent_dim": 3, "arm": "ae"}), normals(1, ROWS, 3) @ turn)
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.1], [0.3, 1.0, 1.0, 0.0], [0.0, 0.4, 2.0, 1.0]])
    stack.decode = lambda z: 0.01 * z[..., :3] @ weight
    assert MEASUREMENTS[("decoder/sensitivity",)](stack).item() == pytest.approx(0.1, rel=0.2)


def test_cells_are_measured_under_the_noise_that_they_were_trained_with(make_stack):
    train = {"noise": {"kind": "gaussian", "clip": False}}
    stack = make_stack(make_data(), {"train": train}, {"train": train, "train_noise": 0.5})
    found = measured(stack)
    assert found["matched/mse_clean"][0] == found["matched/mse_noisy"][0] == pytest.approx(found["test/mse"][0])
    noisy = stack.reference.noisy("gaussian", 0.5, False)
    assert noisy.min() < 0
    output = stack.decode(stack.encode(noisy)[0])[1]
    expected = [(output - target).square().mean().item() for target in (stack.x["test"], noisy)]
    assert [found["matched/mse_clean"][1], found["matched/mse_noisy"][1]] == pytest.approx(expected)


def test_folds_are_counted_for_one_latent_in_the_plane_and_boots_for_two(make_stack):
    found = measured(make_stack(make_data(2), {"latent_dim": 1}, {}))
    assert found["decoder/folds"][0] >= 0 and math.isnan(found["decoder/folds"][1])
    boots = make_data(784, names=("Ankle boot",), image_shape=(28, 28))
    found = measured(make_stack(boots, {"latent_dim": 1}, {"arm": "ae"}))
    assert math.isnan(found["boots/axis_alignment"][0]) and 0 <= found["boots/axis_alignment"][1] <= 1
    assert all(value > 0 for value in found["test/sharpness"])
