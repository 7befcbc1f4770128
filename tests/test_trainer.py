import dataclasses
import itertools

import pytest
import torch

from pipeline.config import Data, Schedule
from pipeline.datasets import build
from pipeline.executors import _multiplies_bf16
from pipeline.model import StackedAutoencoder
from pipeline.objective import gaussian_nll, kl_per_latent
from pipeline.trainer import HISTORY, StackTrainer, factor, still_falling

ARMS = ["vae", "ae", "ae_code_l2", "ae_as_published", "kl_only"]


def train(cells, x, validation=None, stop_at=None):
    trainer = StackTrainer(cells, [x], [x[:50] if validation is None else validation])
    for update in trainer.run():
        if update == stop_at:
            break
    return trainer


def same(one, other):
    assert one.record == other.record
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def loop(cell, x, updates):
    """The same training in plain PyTorch: one module, autograd, Adam, and λ as a term of the loss."""
    trainer = StackTrainer([cell], [x], [x[:50]])
    module = trainer.model.cell(0)
    adam = torch.optim.Adam(module.parameters(), lr=cell.learning_rate)
    weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]
    for update in range(updates):
        rows, epsilon = trainer.batches.block(update // 16 * 16)
        batch = x[rows[0, update % 16]]
        mu, log_variance = module.encode(batch)
        noise = epsilon[0, update % 16, :, : cell.latent_dim] * (0.5 * log_variance).exp() * cell.arm.samples
        output = module.decoder(mu + noise)
        if cell.model.likelihood == "bernoulli":
            bce = torch.nn.functional.binary_cross_entropy_with_logits
            r = bce(output, batch, reduction="none").sum(-1).mean()
        else:
            log_sigma2 = module.log_sigma2 if cell.sigma2 == "learned" else torch.tensor(cell.sigma2).log()
            r = gaussian_nll(output[None], batch[None], log_sigma2[None]).mean()
        kl, code_l2 = kl_per_latent(mu[None], log_variance[None]).sum(-1), 0.5 * mu.square().sum(-1)
        penalties = {"kl": kl, "code_l2": code_l2, "none": torch.zeros(1)}
        beta = (cell.beta or 0.0) * factor(cell.train.beta_schedule, update, cell.train.updates)
        l2 = cell.l2 * sum(weight.square().sum() for weight in weights)
        loss = cell.arm.reconstruction_weight * r + beta * penalties[cell.arm.penalty].mean() + l2
        adam.zero_grad()
        loss.backward()
        if cell.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), cell.train.clip_norm)
        for group in adam.param_groups:
            group["lr"] = cell.learning_rate * factor(cell.train.learning_rate_schedule, update, cell.train.updates)
        adam.step()
    return module.state_dict()


def assert_stack_equals_loop(cells, x, atol=2e-5):
    trainer = train(cells, x)
    for row, cell in enumerate(cells):
        state = trainer.finish()[row].weights
        for name, reference in loop(cell, x, cell.train.updates).items():
            torch.testing.assert_close(state[name], reference, atol=atol, rtol=2e-4, msg=f"{cell.arm_name} {name}")


def test_the_stack_equals_the_loop_for_every_arm(make_cell, pixels):
    budget = {"updates": 24, "keep": "last", "beta_schedule": Schedule(kind="linear", start=0.0)}
    cells = [make_cell(arm, beta=0.5, latent_dim=3 + index % 2, seed=index, train=budget) for index, arm in enumerate(ARMS)]
    assert_stack_equals_loop(cells, pixels)


def test_the_stack_equals_the_loop_with_its_own_knobs(make_cell, pixels):
    budget = {"updates": 24, "keep": "last", "learning_rate_schedule": Schedule(kind="cosine", end=0.1)}
    knobs = itertools.product((0.0, 1e-2), (0.3, "learned"), (1e-3, 3e-3))
    model = {"likelihood": "gaussian", "activation": "tanh"}
    cells = [make_cell(l2=l2, sigma2=s, learning_rate=rate, seed=1, train=budget, model=model) for l2, s, rate in knobs]
    assert_stack_equals_loop(cells, pixels)


def test_clipping_is_per_cell(make_cell, pixels):
    budget = {"updates": 24, "keep": "last", "clip_norm": 5.0}
    knobs = ((0, 1.0, 0.0), (1, 50.0, 0.0), (2, 1.0, 0.5))
    assert_stack_equals_loop([make_cell(seed=seed, beta=beta, l2=l2, train=budget) for seed, beta, l2 in knobs], pixels)


LARGE = {"hidden": (310, 250)}  # wide enough for a CPU to take it cell by cell


def test_the_stack_equals_the_loop_for_a_large_network(make_cell, pixels):
    """Up to what Adam, with steps of 1e-3, makes of a gradient that is zero but for rounding."""
    for activation, batch_size in itertools.product(("relu", "tanh"), (3, 110)):
        budget = {"updates": 12, "keep": "last", "batch_size": batch_size}
        knobs = {"model": {**LARGE, "activation": activation}, "train": budget}
        assert_stack_equals_loop([make_cell(latent_dim=3, seed=seed, l2=1e-3, **knobs) for seed in (0, 1)], pixels, atol=5e-4)


MODELS = [{}, {"hidden": (80, 64), "activation": "tanh"}, {"likelihood": "gaussian", "hidden": ()}, LARGE]
BATCHES = [(17, 32), (17, 25), (16, 33), (16, 3)]  # features and rows, for what they leave over in registers and cache lines


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("features", "rows"), BATCHES)
def test_a_cell_does_not_depend_on_its_neighbours(make_cell, pixels, model, features, rows):
    """Bit for bit, in any company and order, alone too."""
    x, knobs = pixels[:, :features].contiguous(), {"model": model, "train": {"batch_size": rows}}
    wanted = make_cell(latent_dim=3, l2=1e-3, seed=3, **knobs)
    alone = train([wanted], x).finish()[0]
    company = [make_cell(arm, latent_dim=4, seed=seed, **knobs) for arm, seed in itertools.product(ARMS, (1, 3))]
    same(train([*company[:4], wanted, *company[4:]], x).finish()[4], alone)
    same(train([wanted, *company[:2]], x).finish()[0], alone)


def test_permuting_the_stack_permutes_the_results(make_cell, pixels):
    cells = [make_cell(seed=seed, learning_rate=rate) for seed, rate in itertools.product(range(3), (1e-3, 1e-2))]
    for one, other in zip(train(cells, pixels).finish(), reversed(train(cells[::-1], pixels).finish()), strict=True):
        same(one, other)


def test_ae_equals_vae_at_beta_zero_without_sampling(make_cell, pixels, monkeypatch):
    ae = train([make_cell("ae")], pixels).finish()[0]
    monkeypatch.setitem(__import__("pipeline.grid").grid.ARMS, "vae", make_cell("vae").arm._replace(samples=False))
    vae = train([make_cell("vae", beta=0.0)], pixels).finish()[0]
    assert all(torch.equal(ae.weights[name], vae.weights[name]) for name in ae.weights)


def test_resumed_equals_uninterrupted(make_cell, pixels):
    cells = [make_cell(seed=seed, l2=1e-3, train={"updates": 60}) for seed in range(3)]
    whole = train(cells, pixels).finish()
    half = train(cells, pixels, stop_at=30)
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    rest = StackTrainer(cells, [pixels], [pixels[:50]])
    rest.restore(state)
    assert list(rest.run()) == list(range(36, 61, 6))
    for one, other in zip(rest.finish(), whole, strict=True):
        same(one, other)


def test_a_diverged_cell_is_marked_and_the_others_go_on_untouched(make_cell, pixels):
    good = [make_cell(seed=seed) for seed in range(3)]
    bad = make_cell(seed=1, learning_rate=1e30)
    results = train([*good[:2], bad, good[2]], pixels).finish()
    assert results[2].record["status"] == "diverged" and results[2].weights is None
    assert 0 < results[2].record["diverged_at"] < 40
    assert set(results[2].record["history"]["validation_loss"]) == {None}
    for one, other in zip([*results[:2], results[3]], train(good, pixels).finish(), strict=True):
        same(one, other)


def test_best_weights_are_those_of_the_lowest_validation_loss(make_cell, pixels):
    """A large network on 16 rows overfits, so that the best point is not the last."""
    budget = {"updates": 600, "history_points": 30, "batch_size": 16}
    record = (
        train([make_cell("ae", learning_rate=1e-2, latent_dim=8, train=budget)], pixels[:16], pixels[100:]).finish()[0].record
    )
    losses = record["history"]["validation_loss"]
    assert record["validation_loss"] == min(losses) < losses[-1]
    assert record["evaluated_update"] == record["history"]["update"][losses.index(min(losses))]


def test_every_epoch_uses_every_row_once(make_cell):
    cell = make_cell(train={"batch_size": 25})
    batches = StackTrainer([cell], [torch.rand(200, 17)], [torch.rand(10, 17)]).batches
    stream = torch.cat([batches.block(first)[0][0].flatten() for first in (0, 16, 32)])
    for epoch in range(6):
        assert torch.equal(stream[200 * epoch :][:200].sort().values, torch.arange(200))


def test_datasets_of_a_stack_stay_apart(make_cell, pixels):
    cells = [dataclasses.replace(make_cell(seed=1), dataset=dataset) for dataset in (0, 1)]
    parts = [pixels[:120], pixels[120:]]
    validation = [pixels[:20], pixels[20:40]]
    trainer = StackTrainer(cells, parts, validation)
    list(trainer.run())
    for dataset, result in enumerate(trainer.finish()):
        alone = dataclasses.replace(cells[dataset], dataset=0)
        same(result, train([alone], parts[dataset], validation[dataset]).finish()[0])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_go_from_start_to_end(kind):
    schedule = Schedule(kind=kind, start=0.2, end=1.0, over=0.5)
    factors = [factor(schedule, update, 100) for update in range(101)]
    assert factors[0] == pytest.approx(0.2) and factors[50:] == pytest.approx([1.0] * 51)
    assert factors == sorted(factors)


def test_still_falling_tells_a_slope_from_a_plateau():
    assert still_falling([100.0 - step for step in range(40)])
    assert not still_falling([100 + 20 * 0.7**step for step in range(40)])
    assert not still_falling([float(step) for step in range(1, 41)])


def test_history_has_the_objectives_terms(make_cell, pixels):
    record = train([make_cell(beta=2.0)], pixels).finish()[0].record["history"]
    assert set(record) == {"update", *HISTORY}
    for part in ("train", "validation"):
        terms = zip(record[f"{part}_loss"], record[f"{part}_reconstruction"], record[f"{part}_penalty"], strict=True)
        assert all(loss == pytest.approx(r + 2 * p, rel=1e-5) for loss, r, p in terms)


def test_the_recorded_loss_holds_the_weights_penalty(make_cell, pixels):
    cell = make_cell(l2=0.01, train={"keep": "last"})
    trainer = train([cell], pixels)
    result = trainer.finish()[0]
    history = {name: values[-1] for name, values in result.record["history"].items()}
    norm = sum(value.square().sum().item() for name, value in result.weights.items() if name.endswith("weight"))
    data_terms = history["validation_reconstruction"] + history["validation_penalty"]
    assert history["validation_loss"] == pytest.approx(data_terms + 0.01 * norm, rel=1e-5)


def test_an_untrained_variance_head_cannot_overflow_into_an_arm_that_ignores_it(make_cell, pixels):
    cells = [make_cell("ae"), make_cell("ae_code_l2")]
    trainer = StackTrainer(cells, [pixels], [pixels[:50]])
    trainer.model.layers[trainer.model.depth].bias.data[..., trainer.model.lanes :] = 500.0
    list(trainer.run())
    results = trainer.finish()
    assert [result.record["status"] for result in results] == ["finished", "finished"]
    assert set(results[0].record["history"]["validation_penalty"]) == {0.0}


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_BF16 = pytest.mark.skipif(not _multiplies_bf16("cpu"), reason="needs a CPU with bf16 products")


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=NO_BF16), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def test_bf16_products_leave_the_final_metrics_unmoved(make_cell, tmp_path, device):
    """Paired over seeds: the 95% interval of each metric's change lies within a stated share of the metric."""
    data = build(Data(name="digits5k"), tmp_path)[0]
    x, validation = (data.x[split].float() / 255 for split in ("train", "validation"))
    model, budget = {"hidden": (64, 32)}, {"updates": 150, "batch_size": 64}
    cells = [make_cell(latent_dim=4, seed=seed, model=model, train=budget) for seed in range(8)]
    measured = {}
    for precision in ("float32", "bf16"):
        trainer = StackTrainer(cells, [x], [validation], device, precision)
        list(trainer.run())
        judge = StackTrainer(cells, [x], [validation], device)
        for row, result in enumerate(trainer.finish()):
            judge.model.load_cell(row, result.weights)
        measured[precision] = judge._validate().cpu()
    change = measured["bf16"] / measured["float32"] - 1
    interval = change.mean(dim=0).abs() + 2.365 * change.std(dim=0) / len(cells) ** 0.5  # t of 7 degrees of freedom
    assert (change != 0).all()
    assert (interval < torch.tensor([0.01, 0.01, 0.1])).all(), interval  # loss, reconstruction, KL


KINDS = pytest.mark.parametrize(
    ("model", "precision"), [({}, "float32"), ({"likelihood": "gaussian"}, "float32"), (LARGE, "bf16")]
)


def every_arm(make_cell, model):
    sigma2 = "learned" if model.get("likelihood") == "gaussian" else None
    return [make_cell(arm, sigma2=sigma2, l2=1e-3, model=model, train={"clip_norm": 5.0}) for arm in ARMS]


@KINDS
def test_an_update_keeps_to_its_device(make_cell, pixels, monkeypatch, model, precision):
    """Meta tensors refuse the company of others as a GPU's do, without a GPU; they have no `unique`, which seeds need."""
    monkeypatch.setattr(StackedAutoencoder, "initialise", lambda model: model)
    trainer = StackTrainer(every_arm(make_cell, model), [pixels], [pixels], "meta", precision)
    assert trainer._step(*trainer.batches.block(0)).is_meta
    assert trainer._validate().is_meta


@pytest.mark.gpu
@NO_GPU
@KINDS
def test_updates_do_not_wait_for_the_gpu(make_cell, pixels, model, precision):
    trainer = StackTrainer(every_arm(make_cell, model), [pixels], [pixels], "cuda", precision)
    trainer._step(*trainer.batches.block(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in (0, 16):  # over the end of an epoch
            trainer._step(*trainer.batches.block(first))
    finally:
        torch.cuda.set_sync_debug_mode("default")
