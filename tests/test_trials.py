"""The trials of a search in Optuna's storage. Values come from a formula here: nothing is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from pathlib import Path

import pytest

from pipeline.artifacts import CellStore
from pipeline.grid import Runtime
from pipeline.searches import Search
from pipeline.storages import SearchError, open_storage
from pipeline.trials import Trials, _ordinal

ONE = ({"metric": "validation/elbo", "direction": "up"},)
TWO = ({"metric": "validation/mse", "direction": "down"}, {"metric": "validation/kl", "direction": "down"})
FRONT = {"objectives": TWO, "winner": {"goal": ONE[0]}}
HALVED = {"rungs": (0.25, 0.5), "halving": 2}
KINDS = ("tpe", "nsga2", "gp", "qmc", "random", "grid")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def a_search(**changes) -> Search:
    recipe = {
        "title": "A search",
        "data": {"name": "uniform2d"},
        "model": {"hidden": (8,), "likelihood": "gaussian"},
        "train": {"updates": 100},
        "space": {"beta": {"low": 0.1, "high": 4.0}, "latent_dim": {"low": 1, "high": 8}},
        "objectives": ONE,
        "trials": 12,
        "batch": 4,
    }
    return Search.model_validate(recipe | changes)


def trials_of(search: Search, storage, store: str = "store") -> Trials:
    runtime = Runtime(device="cpu", torch="2.0", precision="float32")
    return Trials("hunt", search, search.model, search.train, "data", runtime, storage, CellStore(Path(store)))


def measured(batch, count: int) -> dict:
    betas = {key: cell.beta or 0.0 for key, cell in batch.cells.items()}
    return {key: [-abs(betas[key] - 1) - cell.latent_dim / 10, betas[key]][:count] for key, cell in batch.cells.items()}


def search_through(search: Search, storage, batches: int = 99, slowly: float = 0.0) -> Trials:
    """Every batch to its end, as the stage would."""
    trials, count = trials_of(search, storage), len(search.objectives)
    with trials.searcher:
        while batches and (batch := trials.next()):
            for update in trials.rungs:
                time.sleep(slowly)
                decision = trials.decision(batch, update) or trials.decide(batch, update, measured(batch, count))
                trials.leave(batch, update, decision)
            values = measured(batch, count)
            trials.finish(batch, values, {key: {"score": found[0], "updates": 100} for key, found in values.items()})
            batches -= 1
    return trials


def drawn(trials: Trials) -> list[dict]:
    return [trial.params for trial in trials.own()]


@pytest.mark.parametrize("objectives", [{}, FRONT], ids=["one objective", "two"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_reaches_the_target_and_draws_the_same_again(kind, objectives):
    search = a_search(sampler={"kind": kind, "seed": 3}, **objectives)
    found = []
    for name in ("one.db", "other.db"):
        with open_storage(f"sqlite:///{name}") as storage:
            trials = search_through(search, storage)
            assert trials.standing().complete == search.trials
            found.append(drawn(trials))
    assert found[0] == found[1]
    if kind != "nsga2":  # which may cross two parents into one of them
        assert len({str(params) for params in found[0]}) == search.trials
    assert all(0.1 <= params["beta"] <= 4 and 1 <= params["latent_dim"] <= 8 for params in found[0])


@pytest.mark.parametrize("kind", ["tpe", "gp"])
@pytest.mark.parametrize(("batch", "at_random"), [(1, 10), (4, 8), (8, 8), (12, 12)])
def test_samplers_learn_from_the_first_whole_batches(kind, batch, at_random):
    """Opposite directions give the same trials as long as these are random."""
    goal, found = ONE[0], []
    for direction in ("up", "down"):
        search = a_search(sampler={"kind": kind}, batch=batch, trials=13, objectives=({**goal, "direction": direction},))
        with open_storage(f"sqlite:///{direction}.db") as storage:
            found.append(drawn(search_through(search, storage)))
    same = [one == other for one, other in zip(*found, strict=True)]
    assert same.index(False) == at_random


@pytest.mark.parametrize("url", ["sqlite:///optuna.db", "journal.log"])
def test_a_later_process_goes_on_to_the_same_trials(url):
    search = a_search()
    with open_storage("sqlite:///whole.db") as storage:
        whole = drawn(search_through(search, storage))
    for _ in range(3):
        with open_storage(url) as storage:
            trials = search_through(search, storage, batches=1)
            found = drawn(trials)
    assert found == whole


def test_a_batch_is_halved_by_rank_and_optuna_knows_the_rungs():
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(a_search(**HALVED), storage)
        assert (trials.standing().complete, trials.standing().pruned) == (3, 9)
        for trial in trials.own():
            assert set(trial.intermediate_values) <= {25, 50} and 25 in trial.intermediate_values
        for first in (0, 4, 8):
            batch = [trial.intermediate_values for trial in trials.own() if trial.user_attrs["first"] == first]
            for rung, next_rung in ((25, 50), (50, None)):
                went_on, left = set(), set()
                for trial in (trial for trial in trials.own() if trial.user_attrs["first"] == first):
                    values = trial.intermediate_values
                    if rung in values:
                        further = next_rung in values if next_rung else trial.state.name == "COMPLETE"
                        (went_on if further else left).add(values[rung])
                assert min(went_on) >= max(left) and len(batch) == 4


def test_two_objectives_at_a_rung_are_attributes():
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(a_search(**FRONT, **HALVED), storage)
        assert trials.standing().ended == 12
        assert all(len(trial.user_attrs["at update 25"]) == 2 for trial in trials.own())


@pytest.mark.parametrize("directions", [("down", "down"), ("up", "down"), ("down", "up"), ("up", "up")])
def test_the_front_is_all_that_nothing_dominates(directions):
    objectives = tuple({**goal, "direction": direction} for goal, direction in zip(TWO, directions, strict=True))
    space = {"beta": {"values": (0.5, 1.0, 2.0, 4.0)}, "latent_dim": {"low": 1, "high": 8}}  # many are equal in one objective
    changes = {"winner": FRONT["winner"], "sampler": {"kind": "random"}, "trials": 40, "batch": 20, "space": space}
    search = a_search(objectives=objectives, **changes)
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(search, storage)
        signs = [1 if direction == "down" else -1 for direction in directions]
        points = {t.number: [sign * value for sign, value in zip(signs, t.values, strict=True)] for t in trials.own()}
        free = {
            number
            for number, point in points.items()
            if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points.values())
        }
        assert {trial.number for trial in trials.front()} == free and 0 < len(free) < 40
        assert trials.standing().front == len(free) == sum(trials.table()["on_front"])


@pytest.mark.parametrize("kind", ["median", "percentile"])
def test_a_pruner_compares_with_earlier_batches(kind):
    pruner = {"kind": kind, "startup": 4}
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(a_search(pruner=pruner, rungs=(0.5,), sampler={"kind": "random"}, trials=24), storage)
        first = [trial for trial in trials.own() if trial.user_attrs["batch"].startswith("0-")]
        assert {trial.state.name for trial in first} == {"COMPLETE"}
        assert trials.standing().pruned > 0 and trials.standing().ended == 24


@pytest.mark.parametrize("kind", ["successive_halving", "hyperband"])
def test_a_pruner_that_halves_prunes_at_rungs(kind):
    search = a_search(pruner={"kind": kind, "factor": 2}, rungs=(0.25, 0.5), sampler={"kind": "random"}, trials=32)
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(search, storage)
        left = {max(trial.intermediate_values) for trial in trials.own("PRUNED")}
        assert left == {25, 50} and trials.standing().complete > 0 and trials.standing().ended == 32


@pytest.mark.parametrize("kind", ["qmc", "random"])
@pytest.mark.parametrize("log", [False, True])
def test_half_of_what_is_drawn_lies_below_the_middle_of_its_scale(kind, log):
    space = {
        "beta": {"low": 0.1, "high": 10.0, "log": log},
        "latent_dim": {"low": 1, "high": 64, "log": log},
    }
    search = a_search(space=space, sampler={"kind": kind}, trials=64, batch=64)
    with open_storage("sqlite:///optuna.db") as storage:
        found = drawn(search_through(search, storage))
    for name, middle in {"beta": 1.0 if log else 5.05, "latent_dim": 8.0 if log else 32.5}.items():
        assert 24 <= sum(params[name] < middle for params in found) <= 40, name


def test_a_range_that_is_not_logarithmic_may_begin_at_0_and_a_list_hold_it():
    space = {"beta": {"low": 0.0, "high": 4.0, "log": False}, "latent_dim": 2, "l2": {"values": (0.0, 1e-3)}}
    search = a_search(space=space, sampler={"kind": "grid", "points": 3}, trials=6, batch=3)
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(search, storage)
        cells = [trials.cell(params) for params in drawn(trials)]
        assert sorted((cell.beta, cell.l2) for cell in cells) == [(b, l2) for b in (0.0, 2.0, 4.0) for l2 in (0.0, 1e-3)]
        of_grid = {key: cell for key, cell in ((trials._key(cell), cell) for cell in cells)}
        assert {key: params["l2"] for key, params in trials.inside(of_grid).items()} == {
            key: cell.l2 for key, cell in of_grid.items()
        }
        assert set(trials.table()["l2"]) == {0.0, 1e-3}


def test_a_trial_without_a_value_fails_and_another_takes_its_place():
    search = a_search(sampler={"kind": "random"})
    with open_storage("sqlite:///optuna.db") as storage:
        trials = trials_of(search, storage)
        with trials.searcher:
            batch = trials.next()
            values = measured(batch, 1)
            lost = next(iter(values))
            values[lost] = [None]
            trials.finish(batch, values, {key: {"score": 0.0, "updates": 100} for key in values})
        search_through(search, storage)
        assert (trials.standing().complete, trials.standing().failed) == (12, 1)


def test_a_searcher_that_has_gone_leaves_its_batch_to_the_next():
    search = a_search()
    with open_storage("sqlite:///optuna.db") as storage:
        gone = trials_of(search, storage)
        with pytest.raises(KeyboardInterrupt), gone.searcher:
            left = [member.cell for member in gone.next().running]
            raise KeyboardInterrupt
        trials = trials_of(search, storage)
        with trials.searcher:
            assert [member.cell for member in trials.next().running] == left
        assert trials.standing().running == len(left)


def test_a_study_is_refused_where_an_axis_has_left_the_space():
    space = {"latent_dim": 2, "beta": {"low": 0.1, "high": 4.0}}
    with open_storage("sqlite:///optuna.db") as storage:
        search_through(a_search(space={**space, "sigma2": 0.5}), storage, batches=1)
        with pytest.raises(SearchError, match="space.sigma2 0.5 there, not given here"):
            trials_of(a_search(space=space, trials=20), storage).standing()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (FRONT, "directions maximize there, minimize, minimize here"),
        ({"space": {"beta": {"low": 0.1, "high": 5.0}, "latent_dim": 2}}, "space.beta 0.1 to 4, log there, 0.1 to 5, log here"),
        ({"winner": {"goal": TWO[0]}}, "winner.goal validation/elbo up there, validation/mse down here"),
        ({"sampler": {"kind": "qmc"}}, "sampler kind tpe, seed 0 there, kind qmc, seed 0 here"),
        (HALVED, "rungs none there, 0.25, 0.5 here"),
        ({"batch": 6}, "batch 4 there, 6 here"),
    ],
)
def test_a_study_that_asks_something_else_is_refused(changes, told):
    with open_storage("sqlite:///optuna.db") as storage:
        search_through(a_search(), storage, batches=1)
        with pytest.raises(SearchError) as error:
            trials_of(a_search(**changes), storage).standing()
        assert f"exists and asks something else: {told}; give this search another `name`" in str(error.value)
        same = a_search(trials=20, title="Another", winner={"finalists": 2, "test_seeds": (7,), "validation_seeds": (8,)})
        assert trials_of(same, storage).standing().complete == 4


def test_a_study_without_trials_can_still_ask_something_else():
    with open_storage("sqlite:///optuna.db") as storage:
        assert trials_of(a_search(), storage).study
        assert search_through(a_search(**HALVED), storage).standing().reached


def test_two_machines_that_ask_at_one_moment_enter_no_trial_twice():
    search = a_search(sampler={"kind": "random"})
    with open_storage("sqlite:///optuna.db") as storage:
        one, other = trials_of(search, storage, "one"), trials_of(search, storage, "other")
        with one.searcher, other.searcher:
            enter, others = one._enter, []

            def enter_and_let_the_other_ask(drawn, place):
                enter(drawn, place)
                if not others:
                    others.append(other.next())

            one._enter = enter_and_let_the_other_ask
            batches = [one.next(), *others]
            assert sorted(member.ordinal for batch in batches for member in batch.running) == list(range(5))
        assert len(drawn(one)) == 5


def test_a_third_machine_asks_while_two_draw_the_same_and_all_reach_the_target():
    search = a_search(sampler={"kind": "random"})
    with open_storage("sqlite:///optuna.db") as storage:
        one, other, third = (trials_of(search, storage, name) for name in ("one", "other", "third"))
        with one.searcher, other.searcher, third.searcher:
            batches, asked, enter = [one.next()], [], other._enter
            other._known = lambda: one._known() if asked else []  # it drew before the first one's trials were there

            def enter_and_let_the_third_ask(drawn, place):
                enter(drawn, place)
                if len(third._all()) == 8:
                    asked.append(third.next())

            other._enter = enter_and_let_the_third_ask
            assert other.next() is None
            assert sorted(member.ordinal for batch in [*batches, *asked] for member in batch.running) == list(range(8))
        standing = search_through(search, storage).standing()  # the rest; the others still live
        assert (standing.ended, standing.running) == (4, 8)


def test_what_is_drawn_does_not_show_that_every_batch_was_taken_over_at_a_rung():
    """From 25 trials on, TPE weighs them by their order."""
    search = a_search(**HALVED, trials=44)
    with open_storage("sqlite:///whole.db") as storage:
        whole = drawn(search_through(search, storage))
    with open_storage("sqlite:///optuna.db") as storage:
        while not (trials := trials_of(search, storage)).standing().reached:
            with contextlib.suppress(KeyboardInterrupt), trials.searcher:
                batch = trials.next()
                trials.leave(batch, 25, trials.decide(batch, 25, measured(batch, 1)))
                raise KeyboardInterrupt
            assert set(trials.rungs_table()["trial"]) <= set(map(_ordinal, trials.own("COMPLETE", "PRUNED")))
            search_through(search, storage, batches=1)
        assert [trial.params for trial in sorted(trials.own(), key=_ordinal)] == whole


def test_a_batch_is_a_generation_of_nsga2_also_where_most_of_it_leaves():
    search = a_search(sampler={"kind": "nsga2"}, batch=8, trials=24, **FRONT, **HALVED)
    with open_storage("sqlite:///optuna.db") as storage:
        found = [trial.system_attrs["NSGAIISampler:generation"] for trial in search_through(search, storage).own()]
    assert found == [0] * 8 + [1] * 8 + [2] * 8


def test_two_machines_that_take_over_the_same_batch_prune_nobody_untrained():
    search = a_search(**HALVED)
    with open_storage("sqlite:///optuna.db") as storage:
        gone = trials_of(search, storage, "gone")
        with pytest.raises(KeyboardInterrupt), gone.searcher:
            gone.next()
            raise KeyboardInterrupt
        takers = [trials_of(search, storage, name) for name in ("one", "other")]
        with takers[0].searcher, takers[1].searcher:
            for taker in takers:
                taker.searcher.lives = lambda searcher: not searcher.endswith(gone.searcher.id)
            enter, others = takers[0]._enter, []

            def enter_and_let_the_other_take_over(drawn, place):
                enter(drawn, place)
                if not others:
                    others.append(takers[1].next())

            takers[0]._enter = enter_and_let_the_other_take_over
            batches = [takers[0].next(), *others]
            assert sorted(member.ordinal for batch in batches for member in batch.running) == list(range(4))
            for taker, batch in zip(takers, batches, strict=True):
                assert taker.decision(batch, 25) is None
                decision = taker.decide(batch, 25, measured(batch, 1))
                assert taker.decision(batch, 25) == decision
                taker.leave(batch, 25, decision)
        assert all(25 in trial.intermediate_values for trial in takers[0].own("PRUNED"))


def test_two_machines_enter_the_grid_once():
    search = a_search()
    with open_storage("sqlite:///optuna.db") as storage:
        one, other = trials_of(search, storage, "one"), trials_of(search, storage, "other")
        params = {"a": {"beta": 1.0, "latent_dim": 2}, "b": {"beta": 2.0, "latent_dim": 3}}
        with one.searcher, other.searcher:
            other.grid = list  # it looked before the first one had entered them
            for trials in (one, other):
                trials.add_from_grid("study", params, {"a": [1.0], "b": [2.0]})
        assert len(one._all()) == 4 and [trial.values for trial in one.grid()] == [[1.0], [2.0]]
        assert len(one.front()) == 1


def test_a_searcher_that_was_taken_for_dead_ends_nothing_twice():
    search = a_search(**HALVED)
    with open_storage("sqlite:///optuna.db") as storage:
        late, taker = trials_of(search, storage, "one"), trials_of(search, storage, "other")
        with late.searcher, taker.searcher:
            batch = late.next()
            taker.searcher.lives = lambda searcher: False
            taken = taker.next()
            assert [member.cell for member in taken.running] == [member.cell for member in batch.running]
            assert taker.still_ours(taken) and not late.still_ours(dataclasses.replace(batch))
            for trials, whose in ((taker, taken), (late, batch)):
                decision = trials.decide(whose, 25, measured(whose, 1))
                trials.leave(whose, 25, decision)
                trials.finish(whose, measured(whose, 1), {key: {"score": 0.0, "updates": 100} for key in whose.cells})
        assert (taker.standing().ended, taker.standing().failed, taker.standing().running) == (4, 0, 0)


def test_who_was_trained_beyond_a_rung_goes_on_and_who_diverged_fails():
    with open_storage("sqlite:///optuna.db") as storage:
        trials = trials_of(a_search(**HALVED), storage)
        with trials.searcher:
            batch = trials.next()
            _beyond, diverged, *others = batch.cells
            decision = trials.decide(batch, 25, {others[0]: [1.0], others[1]: [2.0]}, {diverged})
            assert decision == {"of": [0, 1, 2, 3], "go on": [0, 3], "fail": [1], "values": {"2": [1.0], "3": [2.0]}}


@pytest.fixture
def silent():
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@127.0.0.1:1/optuna",
        "postgresql://me:secret@127.0.0.1:{silent}/optuna",
        "postgresql://me:secret@192.0.2.1/optuna",
        "postgresql://me:se/cr@et:secret@127.0.0.1:1/optuna",
        "postgresql://127.0.0.1:1/optuna?user=me&password=secret",
        "sqlite:////no/such/f.db",
        "x://y",
        "sqlite:x/no/such",
    ],
)
def test_a_storage_that_is_away_is_one_line_within_seconds_and_no_password(url, silent):
    url = url.format(silent=silent)
    start = time.monotonic()
    with pytest.raises(SearchError) as error, open_storage(url):
        pass
    assert time.monotonic() - start < 7
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert str(error.value).startswith(url[:15])


def test_a_setting_that_some_arms_lack_has_an_importance_too():
    space = {"arm": {"values": ["vae", "ae"]}, "beta": {"low": 0.1, "high": 4.0}, "latent_dim": {"low": 2, "high": 8}}
    with open_storage("sqlite:///optuna.db") as storage:
        trials = search_through(a_search(space=space, trials=24, batch=8), storage)
        assert set(trials.importances()["setting"]) == {"arm", "beta", "latent_dim"}


def test_a_search_whose_trials_fail_too_often_ends_with_what_has_finished():
    search = a_search(trials=8, batch=4)
    with open_storage("sqlite:///optuna.db") as storage:
        trials, finished = trials_of(search, storage), 0
        with trials.searcher:
            while batch := trials.next():
                good = {} if finished else {key: [1.0] for key in list(batch.cells)[:1]}
                trials.finish(batch, good, {key: {"updates": 100, "score": 1.0} for key in batch.cells})
                finished += len(good)
        assert trials.exhausted and trials.standing().complete == finished == 1
        assert trials.standing().failed == 3 * 8 - 1 and len(trials.finalists()) == 1
