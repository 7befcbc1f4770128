"""Faults within training: a cell that goes non-finite, and a stack that does not fit into memory."""

import pytest
import torch
from scale import times
from tiny import drive

from pipeline import executors, tracking
from pipeline.artifacts import CellStore, Folders, load_prepared, read_table
from pipeline.config import load_study
from pipeline.executors import Inline
from pipeline.grid import Runtime, cells, identify
from pipeline.stages import evaluate, prune, report, train
from pipeline.trainer import StackTrainer

RUNTIME = Runtime(device="cpu", torch=torch.__version__)


def planted(monkeypatch, cell, step, value):
    """Makes the loss of one cell non-finite at one update."""
    terms = StackTrainer._terms

    def spoilt(self, x, target, epsilon, update=None):
        found = terms(self, x, target, epsilon, update)
        here = torch.tensor([other == cell for other in self.cells])
        return found._replace(loss=torch.where(here, value, found.loss)) if update == step else found

    monkeypatch.setattr(StackTrainer, "_terms", spoilt)


def results(store, keys):
    return {key: (store.record(key), store.weights_path(key).read_bytes()) for key in keys}


NAN, INFINITY = float("nan"), float("inf")
PLACES = [(3, 13, NAN), (0, 0, INFINITY), (7, 29, NAN), (3, 14, INFINITY), (4, 1, NAN)][: times(2, 5)]


@pytest.mark.parametrize(("index", "step", "value"), PLACES)
def test_a_cell_that_goes_non_finite_leaves_the_others_as_they_are(workspace, monkeypatch, index, step, value, figure):
    store = CellStore()
    before = results(store, store)
    wanted = identify(cells(load_study("tiny")), load_prepared(Folders("tiny").prepared).hashes, RUNTIME)
    key, cell = list(wanted.items())[index]
    for known in before:
        store.remove(known)
    planted(monkeypatch, cell, step, value)
    tracker = tracking.MemoryTracker()
    monkeypatch.setattr(tracking, "MlflowTracker", lambda: tracker)
    monkeypatch.setattr(train, "local_executor", Inline)
    for stage in (lambda: train.run("tiny", drive), *(lambda stage=stage: stage.run("tiny") for stage in (evaluate, prune))):
        stage()
    others = before.keys() - {key}
    assert results(store, others) == {other: before[other] for other in others} and len(others) == 7
    record = store.record(key)
    assert (record["status"], record["diverged_at"]) == ("diverged", step) and not store.weights_path(key).exists()
    assert tracker.runs["tiny"][key].status == "FAILED" and tracker.runs["tiny"][key].tags["diverged_at"] == str(step)
    (workspace / "params.yaml").write_text("studies: [tiny]\n")
    report.run()
    rows = [line for line in (workspace / "reports/report.md").read_text().splitlines() if "| diverged |" in line]
    assert any(f"| {step} |" in row for row in rows)
    assert read_table(Folders("tiny").train / "manifest.csv")["status"].value_counts()["diverged"] == 1
    figure(f"cell {index} at update {step}: 7 of 7 others bit-identical; FAILED in MLflow, in the report")


def test_a_stack_that_runs_out_of_memory_is_halved_and_goes_on(workspace, tmp_path, monkeypatch, figure):
    """From its checkpoint, and the next run knows what fits."""
    data = load_prepared(Folders("tiny").prepared)
    study = load_study("tiny")
    longer = study.model_copy(update={"train": study.train.model_copy(update={"updates": 60})})
    wanted = identify(cells(longer), data.hashes, RUNTIME)
    whole, store = CellStore(tmp_path / "whole"), CellStore(tmp_path / "store")
    list(Inline(whole, RUNTIME).run(wanted, data))
    step, steps = StackTrainer._step, []

    def limited(self, *arguments):
        steps.append((len(self.cells), self.update))
        if len(self.cells) > 2 and self.update >= 20:
            raise torch.OutOfMemoryError("planted")
        return step(self, *arguments)

    monkeypatch.setattr(StackTrainer, "_step", limited)
    monkeypatch.setattr(executors, "PAUSE_SECONDS", float("inf"))
    list(Inline(store, RUNTIME, stack_size=4, checkpoint_seconds=0.0).run(wanted, data))
    assert results(store, wanted) == results(whole, wanted)
    assert min(update for size, update in steps if size == 2) == 18, "halves go on from the last checkpoint"
    for key in wanted:
        store.remove(key)
    steps.clear()
    list(Inline(store, RUNTIME, stack_size=4).run(wanted, data))
    assert {size for size, _ in steps} == {2}
    with pytest.raises(executors.VaesweepError, match="one cell alone does not fit"):
        monkeypatch.setattr(StackTrainer, "_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
        list(Inline(CellStore(tmp_path / "none"), RUNTIME).run(wanted, data))
    figure("halved, from update 18 of 60, bit-identical; the next run starts with halves")
