import dataclasses
import math
import weakref

import pandas as pd
import psutil
import pytest
import torch

from pipeline import executors
from pipeline.artifacts import CellStore, Prepared
from pipeline.config import Settings, TrainNoise, VaesweepError
from pipeline.devices import find_runtime
from pipeline.executors import Inline, Interrupted, Workers, bytes_per_cell, choose_stack_size, plan_stacks
from pipeline.grid import Runtime, identify
from pipeline.trainer import StackTrainer

RUNTIME = Runtime(device="cpu", torch=torch.__version__)
GPU = Runtime(device="cuda", torch=torch.__version__)


@pytest.fixture
def data(pixels):
    x = {"train": [pixels], "validation": [pixels[:50]], "test": [pixels[:20]]}
    return Prepared(x, None, ["hash"], [{}], 17, None, True, "none", None, {})


@pytest.fixture
def wanted(make_cell):
    return identify([make_cell(seed=seed, latent_dim=dim) for seed in range(3) for dim in (2, 3)], ["hash"], RUNTIME)


@pytest.fixture(params=[Inline, Workers])
def executor(request):
    return request.param


def results(store, keys):
    return {key: (store.record(key), store.weights_path(key).read_bytes()) for key in keys}


def test_every_wanted_cell_is_trained_once(executor, tmp_path, data, wanted):
    store = CellStore(tmp_path)
    advances = list(executor(store, RUNTIME).run(wanted, data))
    assert sorted(store) == sorted(wanted)
    assert advances[-1] == (6, 6, 240, 240)
    assert [a.updates_done for a in advances] == sorted(a.updates_done for a in advances)
    assert list(executor(store, RUNTIME).run(wanted, data)) == []


def test_only_missing_cells_are_trained(executor, tmp_path, data, wanted):
    store, keys = CellStore(tmp_path), list(wanted)
    list(executor(store, RUNTIME).run({key: wanted[key] for key in keys[:4]}, data))
    before = {key: store.weights_path(key).stat().st_mtime_ns for key in keys[:4]}
    assert list(executor(store, RUNTIME).run(wanted, data))[-1].cells == 2
    assert before == {key: store.weights_path(key).stat().st_mtime_ns for key in keys[:4]}


def test_training_processes_know_the_datas_traits(tmp_path, data, make_cell):
    """Clipped noise on unit-range data, and pixels drawn in every update."""
    noise = TrainNoise(kind="gaussian")
    noisy = identify([make_cell(train_noise=level, train={"noise": noise}) for level in (0.0, 0.5)], ["hash"], RUNTIME)
    drawn = identify([make_cell(seed=seed) for seed in (1, 2)], ["hash"], RUNTIME)
    dynamic = dataclasses.replace(data, binarise="dynamic")
    inline, processes, plain = (CellStore(tmp_path / name) for name in ("inline", "processes", "plain"))
    for kind, store in ((Inline, inline), (Workers, processes)):
        list(kind(store, RUNTIME, stack_size=1).run(noisy, data))
        list(kind(store, RUNTIME, stack_size=1).run(drawn, dynamic))
    assert results(inline, [*noisy, *drawn]) == results(processes, [*noisy, *drawn])
    list(Inline(plain, RUNTIME).run(drawn, data))
    list(Inline(plain, RUNTIME).run(noisy, dataclasses.replace(data, unit_range=False)))
    changed = {key for key in [*noisy, *drawn] if plain.record(key) != inline.record(key)}
    assert changed == {list(noisy)[1], *drawn}


def test_targets_outside_the_unit_range_are_refused_unless_noise_that_is_not_clipped_makes_them(tmp_path, data, make_cell):
    noise = TrainNoise(kind="sparse_abs_gaussian", clip=False)
    wanted = identify([make_cell(train_noise=0.5, train={"noise": noise})], ["hash"], RUNTIME)
    list(Inline(CellStore(tmp_path / "a"), RUNTIME).run(wanted, data))
    assert CellStore(tmp_path / "a").record(next(iter(wanted)))["status"] == "finished"
    wide = dataclasses.replace(data, x={split: [2 * x for x in parts] for split, parts in data.x.items()})
    with pytest.raises(VaesweepError, match=r"'bernoulli' needs data in \[0, 1\], but 'None' spans \[.*, 2\]"):
        list(Inline(CellStore(tmp_path / "b"), RUNTIME).run(wanted, wide))


def test_noise_that_is_drawn_once_does_not_go_with_pixels_that_are_drawn_in_every_update(tmp_path, data, make_cell):
    noise = TrainNoise(kind="gaussian")
    wanted = identify([make_cell(train_noise=0.5, train={"noise": noise})], ["hash"], RUNTIME)
    with pytest.raises(VaesweepError, match=r"^data\.binarise: 'dynamic' draws in every update, .* use 'fixed'$"):
        list(Inline(CellStore(tmp_path), RUNTIME).run(wanted, dataclasses.replace(data, binarise="dynamic")))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_neither_the_stack_size_nor_the_executor_changes_a_bit(executor, tmp_path, data, wanted, size):
    whole, parts = CellStore(tmp_path / "whole"), CellStore(tmp_path / "parts")
    list(Inline(whole, RUNTIME).run(wanted, data))
    list(executor(parts, RUNTIME, stack_size=size).run(wanted, data))
    assert results(whole, wanted) == results(parts, wanted)


def test_interrupted_anywhere_ends_bit_identical(tmp_path, data, wanted, monkeypatch):
    whole, broken = CellStore(tmp_path / "whole"), CellStore(tmp_path / "broken")
    list(Inline(whole, RUNTIME, stack_size=2).run(wanted, data))
    monkeypatch.setattr(executors, "PAUSE_SECONDS", 0.0)
    interruptions, stood_at = 0, set()
    while True:
        stood_at |= {place.update for place in broken.progress().values()}
        answers = iter([None] * 5 + [15] * 100)
        try:
            list(Inline(broken, RUNTIME, stack_size=2, stop=lambda answers=answers: next(answers)).run(wanted, data))
            break
        except Interrupted as error:
            interruptions += 1
            assert error.exit_code == 143
    assert interruptions > 3 and {16, 32} & stood_at, "also between two history points"
    assert results(whole, wanted) == results(broken, wanted)
    assert not broken.progress()


def test_interrupted_workers_leave_stacks_that_wait_and_go_on_where_they_were(tmp_path, data, make_cell):
    wanted = identify(
        [make_cell(seed=seed, train={"updates": 400, "history_points": 40}) for seed in range(16)], ["hash"], RUNTIME
    )
    whole, broken = CellStore(tmp_path / "whole"), CellStore(tmp_path / "broken")
    list(Workers(whole, RUNTIME, stack_size=2).run(wanted, data))
    advances = []
    with pytest.raises(Interrupted) as error:
        for advance in Workers(broken, RUNTIME, stack_size=2, stop=lambda: 2 if advances else None).run(wanted, data):
            advances.append(advance)
    assert error.value.exit_code == 130
    assert not list(broken) and 4 <= len(broken.progress()) < 16, "a stack that waits has no checkpoint"
    first = next(Workers(broken, RUNTIME, stack_size=2).run(wanted, data))
    assert first.updates_done > advances[0].updates_done
    list(Workers(broken, RUNTIME, stack_size=2).run(wanted, data))
    assert results(whole, wanted) == results(broken, wanted)


def test_training_processes_wait_for_the_next_rung_and_end_with_their_executor(tmp_path, data, wanted):
    trained = Workers(CellStore(tmp_path), RUNTIME, stack_size=2)
    seen = []
    for rung in (8, 20, None):
        list(trained.run(wanted, data, until=rung))
        seen.append({process.pid for process in _training_processes()})
    assert len(seen[0]) >= 1 and seen[0] == seen[1] == seen[2]
    assert list(trained.run(identify([next(iter(wanted.values()))], ["other"], RUNTIME), dataclasses.replace(data)))
    assert not seen[0] & {process.pid for process in _training_processes()}, "other data need other processes"
    del trained
    assert not psutil.wait_procs(_training_processes(), timeout=20)[1]


def test_stacks_of_unequal_cells_are_halved_until_processes_end_together(make_cell, monkeypatch):
    monkeypatch.setattr(executors, "workers", lambda device: 2)
    sizes = {5: 4, 9: 6, 17: 6}  # of equal lanes, so that no two share a stack
    cells = [
        make_cell(seed=seed, latent_dim=dim, model={"hidden": (400, 256)})
        for dim, count in sizes.items()
        for seed in range(count)
    ]
    wanted = identify(cells, ["hash"], RUNTIME)
    groups = plan_stacks(wanted, 784, "cpu")
    assert sorted(key for keys in groups for key in keys) == sorted(wanted)
    loads = [0, 0]
    for keys in groups:
        loads[loads.index(min(loads))] += len(keys)
    assert loads == [8, 8]
    assert plan_stacks(wanted, 784, "cpu", 16) == sorted(plan_stacks(wanted, 784, "cpu", 16), key=len, reverse=True)
    alike = identify([make_cell(seed=seed) for seed in range(16)], ["hash"], RUNTIME)
    assert [len(keys) for keys in plan_stacks(alike, 784, "cpu")] == [8, 8]


def test_a_killed_worker_is_one_line_and_its_cells_are_trained_again(tmp_path, data, make_cell):
    wanted = identify([make_cell(seed=seed, train={"updates": 20000}) for seed in range(4)], ["hash"], RUNTIME)
    with pytest.raises(VaesweepError, match="a training process was killed"):
        for _ in Workers(CellStore(tmp_path), RUNTIME, stack_size=2).run(wanted, data):
            _training_processes()[0].kill()


def test_a_killed_worker_that_waited_for_work_does_not_hold_up_the_end(tmp_path, data, make_cell):
    budgets = [{"updates": updates} for updates in (40, 6000) for _ in range(2)]
    wanted = identify([make_cell(seed=seed, train=train) for seed, train in enumerate(budgets)], ["hash"], RUNTIME)
    with pytest.raises(VaesweepError, match="a training process was killed"):
        killed = None
        for advance in Workers(CellStore(tmp_path), RUNTIME, stack_size=2).run(wanted, data):
            if advance.updates_done > 5000 and not killed:
                killed = min(_training_processes(), key=lambda process: sum(process.cpu_times()[:2]))
                killed.kill()
    assert not _training_processes()


def _training_processes():
    """The children of the fork server, which is a child of this process."""
    return [grandchild for child in psutil.Process().children() for grandchild in child.children()]


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before(tmp_path, data, wanted, monkeypatch):
    monkeypatch.setattr(executors, "PAUSE_SECONDS", math.inf)
    store, whole = CellStore(tmp_path / "a"), CellStore(tmp_path / "b")
    answers = iter([None] * 8 + [15] * 100)
    with pytest.raises(Interrupted):
        list(Inline(store, RUNTIME, stop=lambda: next(answers), checkpoint_seconds=0.0).run(wanted, data))
    ((path, update),) = {place.path: place.update for place in store.progress().values()}.items()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert {place.update for place in store.progress().values()} == {update - 4}
    list(Inline(store, RUNTIME).run(wanted, data))
    list(Inline(whole, RUNTIME).run(wanted, data))
    assert results(store, wanted) == results(whole, wanted)


def test_a_damaged_cell_is_trained_anew(tmp_path, data, wanted, capsys):
    store, (first, second, *_) = CellStore(tmp_path), wanted
    list(Inline(store, RUNTIME).run(wanted, data))
    before = results(store, wanted)
    content = store.weights_path(first).read_bytes()
    store.weights_path(first).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "cells" / second / "record.json").write_text("{")
    assert list(Inline(store, RUNTIME).run(wanted, data))[-1].cells == 2
    assert results(store, wanted) == before
    assert capsys.readouterr().err.count("was damaged on disk: it is trained anew\n") == 2


def test_survivors_of_several_stacks_go_on_as_one_and_end_bit_identical(executor, tmp_path, data, wanted):
    """Three stacks train to a rung, every second cell leaves, the rest is stacked anew, and a lone cell at the end."""
    whole, halved, keys = CellStore(tmp_path / "whole"), CellStore(tmp_path / "halved"), list(wanted)
    for pair in zip(keys[::2], keys[1::2], strict=True):
        list(Inline(whole, RUNTIME).run({key: wanted[key] for key in pair}, data))
    rungs = {8: keys, 20: keys[::2], None: keys[:1]}
    for rung, alive in rungs.items():
        advances = list(executor(halved, RUNTIME, stack_size=2).run({key: wanted[key] for key in alive}, data, until=rung))
        assert advances[-1].updates_done == advances[-1].updates == (rung or 40) * len(alive)
        assert all(halved.progress()[key].update == rung for key in alive if rung)
        halved.release(ended=set(keys) - set(alive))
    assert results(whole, keys[:1]) == results(halved, keys[:1])
    assert list(halved) == keys[:1] and not (set(halved.progress()) & set(keys[:1]))


def test_cells_that_stand_at_a_rung_already_are_not_trained_again(tmp_path, data, wanted):
    store = CellStore(tmp_path)
    list(Inline(store, RUNTIME).run(wanted, data, until=20))
    assert (
        list(Inline(store, RUNTIME).run(wanted, data, until=20))
        == list(Inline(store, RUNTIME).run(wanted, data, until=8))
        == []
    )


def test_a_cell_stopped_at_its_very_end_is_still_stored_by_the_next_run(tmp_path, data, wanted, monkeypatch):
    monkeypatch.setattr(executors, "PAUSE_SECONDS", math.inf)
    store, answers = CellStore(tmp_path), iter([None] * 9 + [15] * 100)
    with pytest.raises(Interrupted):
        list(Inline(store, RUNTIME, stop=lambda: next(answers)).run(wanted, data, until=40))
    assert {place.update for place in store.progress().values()} == {40} and not list(store)
    list(Inline(store, RUNTIME).run(wanted, data, until=40))
    assert sorted(store) == sorted(wanted)


def test_a_stack_that_does_not_fit_is_halved(tmp_path, data, wanted, monkeypatch, capsys):
    sizes, large, step = [], [], StackTrainer._step

    def limited(self, *arguments):
        sizes.append(self.wanted)
        if self.wanted > 2:
            large.append(weakref.ref(self))
            raise torch.OutOfMemoryError("planted")
        assert all(trainer() is None for trainer in large), "the stack that did not fit still takes its memory"
        return step(self, *arguments)

    monkeypatch.setattr(StackTrainer, "_step", limited)
    store = CellStore(tmp_path)
    list(Inline(store, RUNTIME, stack_size=4).run(wanted, data))
    assert sorted(store) == sorted(wanted) and {3, 1, 2} >= set(sizes)
    tried, store = len(large), CellStore(tmp_path)
    for key in wanted:
        store.remove(key)
    list(Inline(store, RUNTIME, stack_size=4).run(wanted, data))
    assert len(large) == tried, "the next run knows what does not fit"
    assert "3 cells at once do not fit into memory: they are trained in halves" in capsys.readouterr().err


def test_a_diverged_cell_is_kept_as_such_and_not_trained_again(executor, tmp_path, data, make_cell):
    wanted = identify([make_cell(learning_rate=1e30), make_cell()], ["hash"], RUNTIME)
    store = CellStore(tmp_path)
    list(executor(store, RUNTIME).run(wanted, data))
    assert [store.record(key)["status"] for key in wanted] == ["diverged", "finished"]
    assert not store.weights_path(next(iter(wanted))).exists()
    assert list(executor(store, RUNTIME).run(wanted, data)) == []
    assert isinstance(store.history(wanted), pd.DataFrame)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto, cpu, cuda = (Settings(studies=("digits",), device=device) for device in ("auto", "cpu", "cuda"))
    assert find_runtime(auto).device == find_runtime(cpu).device == "cpu"
    with pytest.raises(VaesweepError, match="device: is 'cuda', but torch sees no CUDA device"):
        find_runtime(cuda)


def test_a_precision_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    settings = Settings(studies=("digits",), device="cpu", precision="bf16")
    with pytest.raises(VaesweepError, match="precision: is 'bf16', but this CPU has no bf16 products; use 'float32'"):
        find_runtime(settings)
    assert find_runtime(settings.model_copy(update={"precision": "float32"})).precision == "float32"


def test_small_cells_train_in_larger_stacks(make_cell):
    large, small = make_cell(model={"hidden": (400, 256, 128)}), make_cell()
    assert 8 <= choose_stack_size(large, 784, "cpu") <= 32 < choose_stack_size(small, 2, "cpu")
    assert bytes_per_cell(large.model, 784, 2, 128) > 6 * 4 * 800_000
    masked = large.model.model_copy(update={"dropout": 0.1})
    assert bytes_per_cell(masked, 784, 2, 128) >= bytes_per_cell(large.model, 784, 2, 128) + 3 * 4 * 784 * 128


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_takes_the_same_path(tmp_path, data, wanted):
    store = CellStore(tmp_path)
    list(Inline(store, GPU).run(wanted, data))
    assert all(store.record(key)["status"] == "finished" for key in wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cell_does_not_depend_on_its_neighbours_on_a_gpu(tmp_path, data, wanted):
    whole, parts = CellStore(tmp_path / "whole"), CellStore(tmp_path / "parts")
    list(Inline(whole, GPU).run(wanted, data))
    list(Inline(parts, GPU, stack_size=2).run(wanted, data))
    assert results(whole, wanted) == results(parts, wanted)
