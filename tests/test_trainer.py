import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from pipeline import trainer as training
from pipeline.config import Data, Schedule, TrainNoise
from pipeline.corruption import corrupt
from pipeline.datasets import build
from pipeline.devices import _multiplies_bf16
from pipeline.model import StackedAutoencoder
from pipeline.objective import gaussian_nll, kl_per_latent
from pipeline.randomness import Stream, uniforms
from pipeline.trainer import HISTORY, PLAIN, TRAIN_NOISE_SEED, StackTrainer, Traits, factor, still_falling, unconverged

ARMS = ["vae", "ae", "ae_code_l2", "ae_as_published", "kl_only"]


def train(cells, x, validation=None, stop_at=None, traits=PLAIN):
    trainer = StackTrainer(cells, [x], [x[:50] if validation is None else validation], traits=traits)
    for update in trainer.run():
        if update == stop_at:
            break
    return trainer


def same(one, other):
    assert one.record == other.record
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def seen(cell, x, traits):
    """All inputs and targets of a cell: clean, or corrupted as `train.noise` says."""
    if not cell.train_noise:
        return x, x
    noise = cell.train.noise
    noisy = corrupt(x, noise.kind, cell.train_noise, TRAIN_NOISE_SEED, clip=noise.clip and traits.unit_range)
    return noisy, noisy if noise.target == "noisy" else x


def loop(cell, x, updates, traits):
    """The same training in plain PyTorch: one module, autograd, Adam, and λ as a term of the loss."""
    trainer = StackTrainer([dataclasses.replace(cell, train_noise=0.0)], [x], [x[:50]])
    seed, share, (inputs, targets) = torch.tensor([cell.seed]), cell.model.dropout, seen(cell, x, traits)
    module = trainer.model.cell(0)
    adam = torch.optim.Adam(module.parameters(), lr=cell.learning_rate)
    weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]
    for update in range(updates):
        rows, epsilon = trainer.batches.block(update // 16 * 16)
        batch, target = inputs[rows[0, update % 16]], targets[rows[0, update % 16]]
        if traits.dynamic:
            batch = target = (uniforms(seed, Stream.BINARISE, *batch.shape, update)[0] < batch).float()
        mu, log_variance = module.encode(batch)
        noise = epsilon[0, update % 16, :, : cell.latent_dim] * (0.5 * log_variance).exp() * cell.arm.samples
        output = module.decoder(mu + noise)
        if share:
            output = output * (uniforms(seed, Stream.DROPOUT, *batch.shape, update)[0] >= share) / (1 - share)
        if cell.model.likelihood == "bernoulli":
            bce = torch.nn.functional.binary_cross_entropy_with_logits
            r = bce(output, target, reduction="none").sum(-1).mean()
        else:
            log_sigma2 = module.log_sigma2 if cell.sigma2 == "learned" else torch.tensor(cell.sigma2).log()
            r = gaussian_nll(output[None], target[None], log_sigma2[None]).mean()
        kl, code_l2 = kl_per_latent(mu[None], log_variance[None]).sum(-1), 0.5 * mu.square().sum(-1)
        penalties = {"kl": kl, "code_l2": code_l2, "none": torch.zeros(1)}
        beta = (cell.beta or 0.0) * (min(1.0, update / (cell.anneal * cell.train.updates)) if cell.anneal else 1.0)
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


def assert_stack_equals_loop(cells, x, atol=2e-5, traits=PLAIN):
    trainer = train(cells, x, traits=traits)
    for row, cell in enumerate(cells):
        state = trainer.finish()[row].weights
        for name, reference in loop(cell, x, cell.train.updates, traits).items():
            torch.testing.assert_close(state[name], reference, atol=atol, rtol=2e-4, msg=f"{cell.arm_name} {name}")


def test_the_stack_equals_the_loop_for_every_arm(make_cell, pixels):
    knobs = {"beta": 0.5, "train": {"updates": 24, "keep": "last"}}
    varied = [{"latent_dim": 3 + index % 2, "seed": index, "anneal": index % 3 / 4} for index in range(len(ARMS))]
    assert_stack_equals_loop([make_cell(arm, **own, **knobs) for arm, own in zip(ARMS, varied, strict=True)], pixels)


def test_the_stack_equals_the_loop_with_its_own_knobs(make_cell, pixels):
    budget = {"updates": 24, "keep": "last", "learning_rate_schedule": Schedule(kind="cosine", end=0.1)}
    knobs = itertools.product((0.0, 1e-2), (0.3, "learned"), (1e-3, 3e-3))
    model = {"likelihood": "gaussian", "activation": "tanh"}
    cells = [make_cell(l2=l2, sigma2=s, learning_rate=rate, seed=1, train=budget, model=model) for l2, s, rate in knobs]
    assert_stack_equals_loop(cells, pixels)


@pytest.mark.parametrize(("target", "clip"), itertools.product(("clean", "noisy"), (True, False)))
def test_the_stack_equals_the_loop_with_noise_on_the_training_images(make_cell, pixels, target, clip):
    budget = {"updates": 24, "keep": "last", "noise": TrainNoise(kind="sparse_abs_gaussian", target=target, clip=clip)}
    cells = [make_cell(train_noise=level, seed=1, train=budget) for level in (0.0, 0.2, 0.5)]
    assert_stack_equals_loop(cells, pixels, traits=Traits(unit_range=True))


OUTPUT = {"likelihood": "gaussian", "activation": "tanh", "decoder_activation": "identity", "output": "relu", "dropout": 0.3}


def test_the_stack_equals_the_loop_with_an_activation_and_dropout_after_the_decoder(make_cell, pixels):
    budget = {"updates": 24, "keep": "last", "shuffle": False}
    cells = [make_cell(arm, seed=seed, model=OUTPUT, train=budget) for arm, seed in itertools.product(("vae", "ae"), (0, 1))]
    assert_stack_equals_loop(cells, pixels)


def test_the_stack_equals_the_loop_on_images_drawn_in_every_update(make_cell, pixels):
    cells = [make_cell(seed=seed, train={"updates": 24, "keep": "last"}) for seed in (0, 1, 1)]
    assert_stack_equals_loop(cells, pixels, traits=Traits(unit_range=True, dynamic=True))


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


MODELS = [{}, {"hidden": (80, 64), "activation": "tanh"}, {"likelihood": "gaussian", "hidden": ()}, LARGE, OUTPUT]
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


NOISE = TrainNoise(kind="gaussian", target="clean")
TRAITS = pytest.mark.parametrize("traits", [PLAIN, Traits(unit_range=True), Traits(unit_range=True, dynamic=True)])


def varied(make_cell, traits, **knobs):
    """Cells of two seeds that differ in noise and in how β rises."""
    levels = (0.0,) if traits.dynamic else (0.0, 0.3)
    knobs = {"model": OUTPUT, **knobs, "train": {"noise": NOISE, **knobs.get("train", {})}}
    axes = itertools.product(levels, (0.0, 0.5), (1, 3))
    return [make_cell(train_noise=level, anneal=anneal, seed=seed, **knobs) for level, anneal, seed in axes]


@TRAITS
@pytest.mark.parametrize("model", [OUTPUT, {**OUTPUT, **LARGE}])
def test_neither_noise_nor_dropout_nor_drawn_pixels_depend_on_company(make_cell, pixels, traits, model):
    cells = varied(make_cell, traits, model=model, train={"updates": 10})
    whole = train(cells, pixels, traits=traits).finish()
    for cell, result in list(zip(cells, whole, strict=True))[::3]:
        same(train([cell], pixels, traits=traits).finish()[0], result)
    same(train(cells[::-1], pixels, traits=traits).finish()[0], whole[-1])


def test_cells_of_all_levels_of_noise_see_the_same_rows(make_cell, pixels):
    cells = [make_cell(train_noise=level, train={"noise": NOISE}) for level in (0.5, 0.0, 0.2)]
    trainer = StackTrainer(cells, [pixels], [pixels[:50]])
    rows, epsilon = trainer.batches.block(0)
    x, target = trainer.train.take(rows[:, 3][trainer.batches.feed])
    assert all(torch.equal(part, x[1]) for part in target) and len(epsilon) == 1
    assert (x[0] - x[1]).std() == pytest.approx(0.5, rel=0.1) and (x[2] - x[1]).std() == pytest.approx(0.2, rel=0.1)


def test_noise_is_drawn_once_for_each_level_and_never_clipped_outside_the_unit_range(make_cell, pixels):
    cells = [make_cell(train_noise=level, seed=seed, train={"noise": NOISE}) for level, seed in ((0.3, 0), (0.3, 1), (0.0, 1))]
    free, clipped = (StackTrainer(cells, [pixels], [pixels], traits=Traits(unit_range=unit)) for unit in (False, True))
    assert free.train.rows == [200, 200] and free.train.version == [1, 1, 0]
    assert free.train.x.min() < 0 and clipped.train.x.min() == 0 and clipped.train.x.max() == 1
    assert not torch.equal(free.train.x[200:], free.validation.x[200:])
    assert torch.equal(free.train.x[:200], pixels)


def test_dropout_drops_its_share_and_keeps_the_mean_and_leaves_validation_alone(make_cell, pixels):
    trainer = StackTrainer([make_cell(seed=seed, model=OUTPUT) for seed in (0, 0, 1)], [pixels], [pixels[:50]])
    dropped = torch.stack([trainer._dropped(torch.ones(3, 32, 17), update) for update in range(40)])
    assert torch.equal(dropped.unique(), torch.tensor([0, 1 / 0.7])) and dropped.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(dropped[:, 0], dropped[:, 1]) and not torch.equal(dropped[:, 0], dropped[:, 2])
    assert len(dropped[:, 0].unique(dim=0)) == 40
    assert torch.equal(trainer._validate(), trainer._validate())


def test_parts_of_the_validation_set_have_the_loss_of_the_whole(make_cell, pixels, monkeypatch):
    cells = [make_cell(train_noise=level, train={"noise": NOISE}) for level in (0.0, 0.3)]
    trainer = StackTrainer(cells, [pixels], [pixels])
    whole = trainer._validate()
    monkeypatch.setattr(training, "VALIDATION_ROWS", 33)
    torch.testing.assert_close(trainer._validate(), whole)


def test_drawn_pixels_are_white_as_often_as_they_are_grey(make_cell, pixels):
    trainer = StackTrainer([make_cell()], [pixels], [pixels[:50]], traits=Traits(unit_range=True, dynamic=True))
    grey, total = torch.linspace(0, 1, 17).expand(2, 32, 17), torch.zeros(17)
    for trainer.update in range(100):
        drawn = trainer._black_and_white(grey)
        assert set(drawn.unique().tolist()) == {0, 1}
        total += drawn[0].mean(dim=0) / 100
    torch.testing.assert_close(total, grey[0, 0], atol=0.04, rtol=0)
    assert total[0] == 0 and total[-1] == pytest.approx(1)


def test_permuting_the_stack_permutes_the_results(make_cell, pixels):
    cells = [make_cell(seed=seed, learning_rate=rate) for seed, rate in itertools.product(range(3), (1e-3, 1e-2))]
    for one, other in zip(train(cells, pixels).finish(), reversed(train(cells[::-1], pixels).finish()), strict=True):
        same(one, other)


@pytest.mark.parametrize("model", [{}, OUTPUT])
def test_ae_equals_vae_at_beta_zero_without_sampling(make_cell, pixels, monkeypatch, model):
    knobs = {"model": model, "train_noise": 0.3, "train": {"noise": NOISE}}
    ae = train([make_cell("ae", **knobs)], pixels).finish()[0]
    monkeypatch.setitem(__import__("pipeline.grid").grid.ARMS, "vae", make_cell("vae").arm._replace(samples=False))
    vae = train([make_cell("vae", beta=0.0, anneal=0.5, **knobs)], pixels).finish()[0]
    assert all(torch.equal(ae.weights[name], vae.weights[name]) for name in ae.weights)


@TRAITS
def test_resumed_equals_uninterrupted(make_cell, pixels, traits):
    cells = varied(make_cell, traits, l2=1e-3, train={"updates": 60})
    whole = train(cells, pixels, traits=traits).finish()
    half = train(cells, pixels, stop_at=30, traits=traits)
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    rest = StackTrainer(cells, [pixels], [pixels[:50]], traits=traits)
    rest.restore(state, half.update)
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


def test_without_shuffling_rows_come_as_they_are_for_every_seed(make_cell):
    cells = [make_cell(seed=seed, train={"batch_size": 25, "shuffle": False}) for seed in (0, 1)]
    batches = StackTrainer(cells, [torch.rand(200, 17)], [torch.rand(10, 17)]).batches
    rows = torch.cat([batches.block(first)[0] for first in (0, 16)], dim=1)
    assert torch.equal(rows.flatten(1), torch.arange(200).repeat(2, 4))


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


def test_steps_multiply_by_their_ratio():
    schedule = Schedule(kind="steps", at=(0.5, 0.75), ratio=0.1)
    factors = [factor(schedule, update, 100) for update in (0, 49, 50, 74, 75, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("zero", [0.0, 100.0, -62.0, -1e4])
def test_still_falling_tells_a_slope_from_a_plateau_wherever_zero_lies(zero):
    def falls(losses):
        return still_falling([loss - zero for loss in losses])

    assert falls([100.0 - step for step in range(40)])
    assert not falls([60 + 40 * 0.9**step for step in range(40)][::-1] + [99.99 - step / 100 for step in range(20)])
    assert not falls([100 + 20 * 0.7**step for step in range(40)])
    assert not falls([float(step) for step in range(1, 41)])
    assert not falls([5.0] * 40)
    assert not falls([5.0] * 20 + [math.nan] * 20) and not falls([math.nan] * 40)


@pytest.mark.parametrize(("last", "falling"), [(0.9, False), (1.1, True)])
def test_still_falling_draws_the_line_at_one_in_a_hundred_and_sees_through_noise(last, falling):
    tenths = [100.0, 50.0, 20.0, 8.0, 4.0, 2.0, 1.5, 1.2, 1.0, 1.0 - last]
    noise = np.random.default_rng(0).permutation(np.tile([0.4, -0.4], 200)).reshape(10, 40)
    noise -= noise.mean(axis=1, keepdims=True)
    assert still_falling((np.repeat(tenths, 40) + noise.ravel()).tolist()) == falling


def test_a_diverged_cell_is_not_called_unconverged():
    falling = {"validation_loss": [9.0, 8.0, None, None]}
    assert not unconverged({"status": "diverged", "history": falling})
    assert unconverged({"status": "finished", "history": {"validation_loss": [9.0, 8.0, 7.0, 6.0]}})
    assert not unconverged(
        {"status": "finished", "history": {"validation_loss": [9.0] * 20}, "unconverged": True}
    )  # an old cell


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
    x, validation = (torch.tensor(data.x[split]).float() / 255 for split in ("train", "validation"))
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
    ("model", "precision"), [({}, "float32"), ({"likelihood": "gaussian"}, "float32"), (LARGE, "bf16"), (OUTPUT, "float32")]
)


def every_arm(make_cell, model):
    sigma2 = "learned" if model.get("likelihood") == "gaussian" else None
    own = {"sigma2": sigma2, "l2": 1e-3, "anneal": 0.5, "train_noise": 0.3}
    return [make_cell(arm, **own, model=model, train={"clip_norm": 5.0, "noise": NOISE}) for arm in ARMS]


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
