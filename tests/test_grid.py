import dataclasses
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ARMS, ArmAxes, Study, TrainNoise
from pipeline.grid import Runtime, balanced, cell_id, cells, identify, parameter_count, stacks
from pipeline.model import Autoencoder

RUNTIME = Runtime(device="cpu", torch="2.14.1+cu130")


def distinct(values, most=3):
    return st.lists(values, min_size=1, max_size=most, unique=True)


positive = st.floats(1e-6, 10, allow_nan=False)


@st.composite
def studies(draw):
    arms = {
        name: {"beta": draw(distinct(positive)), "anneal": draw(distinct(st.floats(0, 1), 2))}
        if ARMS[name].penalty != "none"
        else {}
        for name in draw(distinct(st.sampled_from(sorted(ARMS))))
    }
    grid = {
        "latent_dim": draw(distinct(st.integers(1, 40))),
        "l2": draw(distinct(positive)),
        "learning_rate": draw(distinct(positive, 2)),
        "seed": draw(distinct(st.integers(0, 9))),
        "train_noise": [0, draw(positive)],
    }
    return Study.model_validate_json(
        json.dumps(
            {
                "title": draw(st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=50)),
                "data": {"name": "manifold", "axes": {"manifold_dim": draw(distinct(st.integers(1, 8)))}},
                "model": {"hidden": [4], "likelihood": "gaussian"},
                "grid": {**grid, "sigma2": [1, "learned"], "arms": arms},
                "train": {"updates": 100, "noise": {"kind": "gaussian"}},
                "evaluate": {},
            }
        )
    )


@given(studies())
def test_the_grids_size_is_the_product_of_the_axes_that_each_arm_has(study):
    found = cells(study)
    assert len(found) == study.size
    per_arm = len(study.data.axes["manifold_dim"]) * len(study.grid.latent_dim) * len(study.grid.l2) * 2 * len(study.grid.seed)
    per_arm *= len(study.grid.train_noise) * len(study.grid.learning_rate)
    own = sum(len(arm.beta) * len(arm.anneal) if ARMS[name].penalty != "none" else 1 for name, arm in study.grid.arms.items())
    assert len(found) == per_arm * own


@settings(max_examples=10)
@given(studies())
def test_every_cell_has_an_id_of_its_own_and_keeps_it(study):
    hashes = [str(number) for number in range(len(study.data.axes["manifold_dim"]))]
    keys = list(identify(cells(study), hashes, RUNTIME))
    assert len(set(keys)) == study.size
    again = Study.model_validate_json(study.model_dump_json(exclude_unset=True))
    assert keys == list(identify(cells(again), hashes, RUNTIME))
    assert not set(keys) & identify(cells(study), [f"other {text}" for text in hashes], RUNTIME).keys()


@settings(max_examples=40)
@given(studies(), st.integers(1, 20))
def test_stacks_hold_every_cell_once_and_mix_only_what_may_mix(study, size):
    hashes = [str(number) for number in range(len(study.data.axes["manifold_dim"]))]
    wanted = identify(cells(study), hashes, RUNTIME)
    assert len(wanted) == study.size
    found = stacks(wanted, size)
    assert sorted(itertools.chain(*found)) == sorted(wanted)
    for stack in found:
        assert len(stack) <= size
        assert len({wanted[key].lanes for key in stack}) == 1
        assert all(wanted[key].latent_dim <= wanted[key].lanes < 2 * max(2, wanted[key].latent_dim) for key in stack)


@given(st.integers(1, 200), st.integers(1, 40))
def test_balanced_runs_are_few_and_differ_by_at_most_one(count, size):
    runs = list(balanced([str(number) for number in range(count)], size))
    lengths = [len(run) for run in runs]
    assert list(itertools.chain(*runs)) == [str(number) for number in range(count)]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert len(runs) == -(-count // size) and lengths == sorted(lengths, reverse=True)


def test_everything_that_decides_a_result_changes_the_id(make_cell):
    cell = make_cell()
    base = cell_id(cell, "hash", RUNTIME)
    changes = [
        dataclasses.replace(cell, arm_name="ae_code_l2"),
        *(dataclasses.replace(cell, **{field: 3.0}) for field in ("beta", "l2", "learning_rate", "anneal", "train_noise")),
        dataclasses.replace(cell, train_noise=3.0, train=cell.train.model_copy(update={"noise": TrainNoise(kind="gaussian")})),
        *(dataclasses.replace(cell, **{field: 3}) for field in ("latent_dim", "seed")),
        dataclasses.replace(cell, model=cell.model.model_copy(update={"hidden": (7,)})),
        dataclasses.replace(cell, train=cell.train.model_copy(update={"updates": 41})),
    ]
    sized = dataclasses.replace(cell, data={"train": 500})  # an axis of the data, by the name of a study's section
    changes.append(dataclasses.replace(sized, train=cell.train.model_copy(update={"updates": 42})))
    ids = [cell_id(change, "hash", RUNTIME) for change in changes]
    ids += [cell_id(cell, "other", RUNTIME)]
    ids += [cell_id(cell, "hash", dataclasses.replace(RUNTIME, **{f: "x.y"})) for f in ("device", "torch", "precision")]
    assert len({base, *ids}) == 1 + len(ids)


def test_what_does_not_decide_a_result_leaves_the_id(make_cell):
    cell = make_cell(beta=1.0)
    base = cell_id(cell, "hash", RUNTIME)
    for axis in ("manifold_dim", "train"):
        assert cell_id(dataclasses.replace(cell, dataset=3, data={axis: 2}), "hash", RUNTIME) == base
    assert cell_id(cell, "hash", Runtime(device="cpu", torch="2.14.9")) == base
    noisy = cell.train.model_copy(update={"noise": TrainNoise(kind="gaussian")})
    assert cell_id(dataclasses.replace(cell, train=noisy), "hash", RUNTIME) == base


@pytest.mark.parametrize("beta", ["1", "1.0", "1e0", "0.1e1"])
def test_one_number_is_one_beta_however_it_is_written(make_cell, beta):
    axes = ArmAxes.model_validate_json(f'{{"beta": [{beta}]}}')
    assert cell_id(make_cell(beta=axes.beta[0]), "hash", RUNTIME) == cell_id(make_cell(beta=1.0), "hash", RUNTIME)


def test_parameters_are_counted_as_torch_counts_them(make_cell):
    for bias, hidden in itertools.product((True, False), ((), (30, 20))):
        model = make_cell(model={"hidden": hidden, "bias": bias}).model
        plain = Autoencoder(model, 17, 3)
        assert parameter_count(model, 17, 3) == sum(parameter.numel() for parameter in plain.parameters())
