"""The search stage: what is trained, and what is not; survivors, the grid, diverged trials.

`workspace` holds a tiny study, prepared and trained.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import HALVED, SEARCH, STUDY, drive, write

from pipeline import search_figures
from pipeline.artifacts import CellStore, Folders, load_prepared, read_json, read_table
from pipeline.config import Settings, load_study
from pipeline.devices import find_runtime
from pipeline.executors import Inline, Interrupted, Workers, plan_stacks
from pipeline.grid import cells, identify
from pipeline.searches import load_search
from pipeline.stages import search, train
from pipeline.storages import SearchError, open_storage, storage_url
from pipeline.trials import Trials


def searched(name: str = "hunt") -> pd.DataFrame:
    search.run(name, drive)
    return read_table(Folders(name).search / "trials.csv")


def own(trials: pd.DataFrame, state: str = "complete") -> pd.DataFrame:
    return trials[trials["state"] == state]


def written() -> dict[str, tuple[int, int]]:
    """When the store's records were written, by cell."""
    records = {path.parent.name: path.stat() for path in (CellStore().root / "cells").glob("*/record.json")}
    return {key: (about.st_ino, about.st_mtime_ns) for key, about in records.items()}


def test_search_reaches_its_target_count_and_a_second_start_trains_nothing(workspace):
    trials = searched()
    assert dict(trials["state"].value_counts()) == {"complete": 5, "grid": 1}
    pd.testing.assert_frame_equal(searched(), trials)


def test_the_front_is_all_that_nothing_dominates(workspace):
    write(SEARCH.replace("trials: 5", "trials: 8").replace("latent_dim: 3", "latent_dim: {low: 2, high: 16}"), "hunt")
    trials = searched()
    points = trials[["validation/reconstruction", "validation/kl"]].to_numpy()
    free = [not any((other <= one).all() and (other < one).any() for other in points) for one in points]
    assert trials["on_front"].tolist() == free
    assert 0 < sum(free) < len(free)


def test_a_search_sees_the_test_set_only_to_measure_its_winner(workspace, monkeypatch):
    trials, winner = searched(), read_table(Folders("hunt").search / "winner.csv")

    def without_test(*given):
        data = load_prepared(*given)
        return replace(data, x={**data.x, "test": [torch.full_like(x, math.nan) for x in data.x["test"]]})

    (workspace / "optuna.db").unlink()
    monkeypatch.setattr(search, "load_prepared", without_test)
    pd.testing.assert_frame_equal(searched(), trials)
    names = ["test/reconstruction", "test/kl", "test/bce_elbo"]
    assert winner[names].notna().all(axis=None)
    assert read_table(Folders("hunt").search / "winner.csv")[names].isna().all(axis=None)


def test_an_interrupted_search_goes_on_with_the_same_trials(workspace):
    for _ in range(2):
        shown = []
        with pytest.raises(Interrupted):
            search.run(
                "hunt",
                lambda name, advances, shown=shown: shown.extend(advances),
                lambda shown=shown: 15 if len(shown) > 4 else None,
            )
    trials = searched()
    for path in (workspace / "optuna.db", workspace / ".vaesweep"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    train.run("tiny", drive)
    pd.testing.assert_frame_equal(searched(), trials)


def test_an_emptied_store_costs_a_search_its_training_and_nothing_else(workspace):
    trials = searched()
    shutil.rmtree(workspace / ".vaesweep")
    pd.testing.assert_frame_equal(searched(), trials)


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_search_whose_trials_were_deleted_ends_with_the_same_ones_and_trains_nothing(workspace, monkeypatch, kind):
    write(HALVED.replace("kind: random", f"kind: {kind}"), "hunt")
    trials = searched()
    (workspace / "optuna.db").unlink()

    def nothing(self, groups, *_):
        assert not groups
        return iter(())

    for executor in (Inline, Workers):
        monkeypatch.setattr(executor, "_train", nothing)
    pd.testing.assert_frame_equal(searched(), trials)


def test_a_search_finds_the_grid_where_dvc_restored_it_and_the_store_is_empty(workspace):
    shutil.rmtree(workspace / ".vaesweep")
    assert len(own(searched(), "grid")) == 1
    assert set(read_table(Folders("hunt").search / "winner.csv")["side"]) == {"search", "grid"}


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("rungs: [0.3, 0.6]", "rungs: [0.3, 0.31]", "rungs: each must be another one of the 10 history points of 30 updates"),
        ("rungs: [0.3, 0.6]", "rungs: [0.3, 0.99]", "rungs: each must be another one of the 10 history points of 30 updates"),
        ("validation/bce_elbo", "validation/iw_bound", "objectives: arm 'vae' on 'digits5k' has no validation/iw_bound"),
    ],
)
def test_what_data_or_budget_cannot_give_is_refused_and_leaves_no_study_behind(workspace, right, wrong, message):
    write(HALVED.replace(right, wrong), "hunt")
    with pytest.raises(SearchError, match=re.escape(message)):
        search.run("hunt", drive)
    write(HALVED, "hunt")
    assert len(own(searched())) == 4


def test_a_broken_search_storage_is_one_line(workspace):
    (workspace / "optuna.db").write_text("this is no database, whatever its name says " * 50)
    with pytest.raises(SearchError, match="optuna.db: .*not a database"):
        search.run("hunt", drive)


def test_the_environment_overrides_the_files_storage(workspace, monkeypatch):
    write(SEARCH + "storage: of_file.log\n", "hunt")
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///of_environment.db")
    trials = searched()
    assert (workspace / "of_environment.db").is_file() and not (workspace / "of_file.log").exists()
    monkeypatch.delenv("OPTUNA_STORAGE")
    pd.testing.assert_frame_equal(searched(), trials)
    assert (workspace / "of_file.log").is_file() and not (workspace / "optuna.db").exists()


@pytest.mark.parametrize("storage", ["sqlite:////no/such/folder/optuna.db", "postgresql://127.0.0.1:1/optuna"])
def test_where_the_storage_is_away_nothing_is_trained(workspace, monkeypatch, storage):
    before = written()
    monkeypatch.setenv("OPTUNA_STORAGE", storage)
    with pytest.raises(SearchError, match=re.escape(storage[:20])):
        searched()
    assert written() == before and not Folders("hunt").search.exists()


def test_where_the_study_asks_something_else_nothing_is_trained(workspace):
    trials, before = searched(), written()
    write(SEARCH.replace("high: 10", "high: 9"), "hunt")
    with pytest.raises(SearchError, match="exists and asks something else: space.beta 0.1 to 10, log there"):
        searched()
    assert written() == before
    pd.testing.assert_frame_equal(read_table(Folders("hunt").search / "trials.csv"), trials)


@pytest.mark.parametrize(("latent_dim", "beside"), [("2", 2), ("{low: 3, high: 4}", 4)])
def test_a_lone_survivor_is_bit_identical_to_the_same_trial_in_a_stack_of_two(workspace, latent_dim, beside):
    write(HALVED.replace("{low: 2, high: 4}", latent_dim).replace("halving: 2", "halving: 3"), "hunt")
    trials = searched()
    assert (len(own(trials)), len(own(trials, "pruned"))) == (2, 10)  # of each batch of 6 two, then one
    halved, apart = CellStore(), CellStore(workspace / "apart")
    found, study = load_search("hunt")
    data, runtime = load_prepared(Folders("tiny").prepared), find_runtime(Settings(studies=("tiny",)))
    with open_storage(storage_url(found)) as storage:
        known = Trials("hunt", found, study.model, study.train, data.hashes[0], runtime, storage, halved)
        survivors = identify([known.cell(trial.params) for trial in known.own("COMPLETE")], data.hashes, runtime)
    for key, cell in survivors.items():
        pair = identify([cell, replace(cell, beta=2.5, latent_dim=beside)], data.hashes, runtime)
        assert [set(keys) for keys in plan_stacks(pair, data.features, "cpu", 2)] == [set(pair)]
        for _ in Inline(apart, runtime, stack_size=2).run(pair, data):
            pass
        assert apart.weights_path(key).read_bytes() == halved.weights_path(key).read_bytes()
        assert apart.record(key) == halved.record(key)


def test_a_given_up_cell_that_is_trained_again_keeps_its_checkpoints_from_others(workspace):
    data, store = load_prepared(Folders("tiny").prepared), CellStore()
    runtime = find_runtime(Settings(studies=("tiny",), device="cpu"))
    mine, others = ({"seed": 5}, {"seed": 6})
    wanted, elsewhere = (
        identify([replace(cells(load_study("tiny"))[0], **change)], data.hashes, runtime) for change in (mine, others)
    )
    (key,) = wanted
    drive("", Inline(store, runtime).run(wanted, data, 15))
    store.save_unfinished(key, {"history": {"update": [15]}})
    store.release()
    assert key not in store.progress()
    drive("", Inline(store, runtime).run(wanted, data, 15))
    drive("", Inline(store, runtime).run(elsewhere, data, 15))
    assert store.progress()[key].update == 15


@pytest.mark.parametrize("seeds", ["validation_seeds: [3], test_seeds: [1, 2]", "validation_seeds: [1], test_seeds: [2, 3]"])
def test_the_grids_best_are_chosen_on_seeds_on_which_they_are_not_compared(workspace, seeds):
    write(SEARCH.replace("validation_seeds: [3], test_seeds: [1, 2]", seeds), "hunt")
    (hunted, study), data = load_search("hunt"), load_prepared(Folders("tiny").prepared)
    settings = Settings(studies=("tiny",), device="cpu")
    with open_storage("sqlite:///optuna.db") as storage:
        hunt = search.Hunt("hunt", hunted, study, data, settings, CellStore(), storage, lambda: None)
        assert {cell.seed for cell in hunt.grid.values()} == {0, 1}
        score = {(2, 0): 1.5, (3, 0): 2.0, (2, 1): 9.0, (3, 1): 3.0}  # by latents and seed
        hunt.grid_values = {
            key: [0.0] * hunt.chooses + [score[cell.latent_dim, cell.seed] - (cell.arm_name == "ae")]
            for key, cell in hunt.grid.items()
        }
        best = hunt.final._best_of_grid()
    assert [(cell.arm_name, cell.latent_dim) for cell in best] == [("vae", 3), ("vae", 2)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("lost", [0, 1, 3])
def test_of_the_finalists_the_best_on_other_seeds_wins_that_has_a_value_on_each(workspace, monkeypatch, sign, lost):
    measured = search.Hunt.values

    def worth(setting):
        return sign * (setting.beta + setting.latent_dim)

    def on_seed_3(hunt, wanted):
        """A setting is worth this; but those of the search that are worth most, so many as are lost, have no value."""
        found = {key: worth(cell) for key, cell in wanted.items() if cell.seed == 3}
        nothing = sorted(map(worth, hunt.final.finalists["search"]), reverse=True)[:lost] if found else []
        return measured(hunt, wanted) | {key: [None if value in nothing else value] for key, value in found.items()}

    monkeypatch.setattr(search.Hunt, "values", on_seed_3)
    write(HALVED.replace("finalists: 2", "finalists: 3"), "hunt")
    trials = searched()
    finalists = own(trials).nlargest(3, "score")
    ranked = finalists.assign(worth=worth(finalists)).sort_values("worth", ascending=False)
    assert ranked["final"][lost:].tolist() == pytest.approx(ranked["worth"][lost:].tolist())
    assert trials["final"].count() == 3 - lost
    assert trials.index[trials["best"]].tolist() == [ranked.index[lost] if lost < 3 else finalists.index[0]]
    compared = read_table(Folders("hunt").search / "winner.csv").groupby("side")["latent_dim"].unique()
    assert compared["search"].tolist() == [trials.loc[trials["best"], "latent_dim"].item()]
    assert compared["grid"].tolist() == [3 if sign > 0 else 2]


def test_a_search_that_was_interrupted_among_its_finalists_ends_as_another_does(workspace):
    def tables():
        return {path.name: path.read_bytes() for path in Folders("hunt").search.glob("*.csv")}

    def told(steps):
        return {step.doing for step in steps}

    write(HALVED, "hunt")
    searched()
    whole, seen = tables(), []
    shutil.rmtree(workspace / ".vaesweep")
    (workspace / "optuna.db").unlink()
    train.run("tiny", drive)
    for doing in ("finalists on other seeds", "winner and grid on other seeds"):
        with pytest.raises(Interrupted):
            search.run("hunt", lambda name, steps: seen.extend(steps), lambda doing=doing: 15 if doing in told(seen) else None)
    searched()
    assert tables() == whole


def test_what_the_grid_has_trained_begins_the_search_and_is_not_trained_again(workspace):
    text = HALVED.replace("low: 0.1, high: 10", "values: [1, 3]").replace("low: 2, high: 4", "values: [2, 3]")
    text = text.replace("kind: random, seed: 0", "kind: grid").replace("trials: 12", "trials: 4")
    write(text[: text.index("rungs")], "hunt")
    before = written()
    trials = searched()
    assert len(before) == 8 and before.items() <= written().items()
    hashes, runtime = load_prepared(Folders("tiny").prepared).hashes, find_runtime(Settings(studies=("tiny",)))
    grid = identify(cells(load_study("tiny")), hashes, runtime)
    inside = {key for key, cell in grid.items() if cell.arm_name == "vae" and cell.seed == 0}
    assert set(own(trials, "grid")["cell_id"]) == inside and len(inside) == 2
    assert len(own(trials)) == 4 and inside < set(own(trials)["cell_id"])  # the two others were trained
    others = {key for name in ("finalists", "winner") for key in read_table(Folders("hunt").search / f"{name}.csv")["cell_id"]}
    assert set(CellStore()) - set(before) <= (set(trials["cell_id"]) - inside) | others
    about = read_json(Folders("hunt").search / "about.json")
    assert (about["updates_spent"], about["grid_cells"], about["grid_updates"]) == (2 * 30, 8, 8 * 30)
    before = written()
    write(STUDY.replace("[1]}", "[1, 3]}"))  # and what the search has trained is not trained again by the grid
    new = identify(cells(load_study("tiny")), hashes, runtime).keys() - grid.keys()
    train.run("tiny", drive)
    assert set(drive.cells) == {len(new - before.keys())} and 0 < len(new - before.keys()) <= len(new) - 2
    assert before.items() <= written().items()


@pytest.mark.parametrize("kind", ["median", "percentile", "successive_halving", "hyperband"])
def test_every_pruner_prunes_in_a_search(workspace, kind):
    write(HALVED.replace("halving: 2", f"pruner: {{kind: {kind}}}").replace("trials: 12", "trials: 24"), "hunt")
    trials = searched()
    pruned, complete = own(trials, "pruned"), own(trials)
    assert len(pruned) > 0 and len(complete) > 0 and len(pruned) + len(complete) == 24
    assert set(pruned["updates"]) <= {9, 18} and set(complete["updates"]) == {30}
    assert set(pruned["cell_id"]) & set(CellStore()) == set()


def test_a_trial_that_diverges_has_failed_and_another_takes_its_place(workspace):
    write(HALVED.replace("latent_dim: {low: 2, high: 4}", "latent_dim: 3\n  learning_rate: {values: [0.001, 1.0e+30]}"), "hunt")
    trials = searched()
    assert len(own(trials)) + len(own(trials, "pruned")) == 12
    assert len(failed := own(trials, "failed")) > 0 and set(failed["learning_rate"]) == {1e30}
    assert set(own(trials)["learning_rate"]) == {0.001}


@pytest.mark.parametrize("text", [SEARCH, HALVED], ids=["two objectives", "one, halved"])
def test_every_figure_of_a_search_shows_its_trials(workspace, text):
    write(text, "hunt")
    trials, folder = searched(), Folders("hunt").search
    found, _ = load_search("hunt")
    rungs, importances = (read_table(folder / f"{name}.csv") for name in ("rungs", "importances"))
    drawn = search_figures.all_of(found, trials, rungs, importances)
    two = len(found.objectives) == 2
    assert set(drawn) - {"importances"} == {"history", "slices", *(["front"] if two else ["rungs"])}
    assert {path.stem for path in (folder / "pictures").glob("*.png")} == set(drawn)
    for kind, figure in drawn.items():
        assert figure.axes[0].get_ylabel() or kind == "importances"  # whose bars are named
        assert figure.axes[-1].get_xlabel()
    points = [len(line.get_xdata()) for line in drawn["slices"].axes[0].lines]
    assert sum(points) == len(trials.dropna(subset=[found.objectives[0].name])) + 1  # the winner has a star too


def test_the_hypervolume_is_the_area_that_a_front_dominates():
    assert search_figures.hypervolume(np.array([[0.0, 0.0]])) == 1
    assert search_figures.hypervolume(np.array([[1.0, 1.0]])) == 0
    assert search_figures.hypervolume(np.array([[0.5, 0.25], [0.25, 0.5], [0.6, 0.6]])) == pytest.approx(0.375 + 0.125)
