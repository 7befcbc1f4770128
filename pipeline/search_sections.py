"""The report's section about a search: what it tried, what it found, and what its winner gains over the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from pipeline import drawing, intervals, search_figures
from pipeline import markdown as md
from pipeline.results import SearchResults
from pipeline.searches import Axis, Goal, Search

CAPTIONS = {
    "front": "Both objectives on validation data, one seed: finished trials, the grid's cells (joined over β), and the front.",
    "history": "Progress over trials, in the order in which they were drawn; the grid's cells stand first.",
    "rungs": "Values at the rungs, where trials leave, and at the end.",
    "importances": "Which settings explain the objectives' variance over finished trials and the grid's cells (fANOVA).",
    "slices": "Finished trials and the grid's cells over each varied setting.",
}
ALWAYS_SHOWN = ("front", "history", "importances")
LONGEST_FRONT = 10


def section(results: SearchResults) -> str:
    """All that is known about one search."""
    shown = {kind: results.gallery.show(kind, picture, CAPTIONS[kind]) for kind, picture in _figures(results).items()}
    folded = [content for kind, content in shown.items() if kind not in ALWAYS_SHOWN]
    return md.join(
        f"## {results.name}",
        f"**{md.escape(results.search.title)}**",
        _asked(results),
        _came_of_it(results),
        _gain(results),
        *(shown[kind] for kind in ALWAYS_SHOWN if kind in shown),
        _front_table(results) if len(results.search.objectives) == 2 else "",
        md.folded("Finalists, rungs and slices", md.join(_finalists(results), *folded)),
    )


def line(results: SearchResults) -> str:
    """A sentence for the head of the report."""
    link, own = f"[`{results.name}`](#{results.name.lower()})", results.own
    where = f" on `{results.search.study}`" if results.search.study else ""
    return f"Search {link}: {len(own)} trials of up to {md.count(results.about['updates'])} updates{where}."


def headline(results: SearchResults) -> str:
    """What the winner gains, for the report's summary."""
    goal, sides = results.search.chooses, results.winner
    difference = _paired(sides, goal)
    if difference is None:
        return ""
    return (
        f"`{results.name}`: {_verdict(difference, goal)} in {goal.label}, {intervals.with_bounds(difference)}, on the test set."
    )


def _figures(results: SearchResults) -> dict:
    return search_figures.all_of(results.search, results.trials, results.rungs, results.importances)


def _asked(results: SearchResults) -> str:
    search, about = results.search, results.about
    objectives = " and ".join(_objective(goal) for goal in search.objectives)
    batches = f"batches of {search.batch}"
    rungs = " and ".join(map(md.count, about["rungs"]))
    if search.halving:
        batches += f", of which one in {search.halving} goes on at update {rungs}"
    pruner = f", Optuna's {search.pruner.kind.replace('_', ' ')} pruner at update {rungs}" if search.pruner else ""
    return (
        f"*Objectives:* {objectives}, on validation data, one seed. *Space:* {_space(search)}. *Trials:* {search.trials}, "
        f"drawn by `{search.sampler.kind}` in {batches}{pruner}; {md.count(about['updates'])} updates to the end."
    )


def _objective(goal: Goal) -> str:
    return f"{'highest' if goal.maximised else 'lowest'} {goal.label}"


def _space(search: Search) -> str:
    return "; ".join(_axis(name, item) for name, item in search.space if isinstance(item, Axis))


def _axis(name: str, item: Axis) -> str:
    if item.values is not None:
        values = [drawing.arm_label(str(value)) if name == "arm" else md.value(value) for value in item.values]
        return f"{md.words(name)} {' or '.join(values)}"
    return f"{md.words(name)} {md.value(item.low)} to {md.value(item.high)}{' (log-uniform)' if item.log else ''}"


def _came_of_it(results: SearchResults) -> str:
    states, about = results.trials["state"].value_counts(), results.about
    counts = f"{states.get('complete', 0)} trials were trained to the end, {states.get('pruned', 0)} left at a rung"
    counts += f", {states['failed']} failed" if states.get("failed") else ""
    begun = f"; {states['grid']} cells that `{results.search.study}` had trained count as trials" if states.get("grid") else ""
    spent, finals, of_grid = (
        intervals.plain(about[name] / about["updates"]) for name in ("updates_spent", "finalist_updates", "grid_updates")
    )
    cost = f"{len(results.own)} trials cost as much as {spent} trainings to the end, the finalists of both sides {finals} more"
    grid = f"; the {about['grid_cells']} cells of `{results.search.study}` cost {of_grid}" if about["grid_cells"] else ""
    return f"*Outcome:* {counts}{begun}. {cost}{grid}. What was trained for the test alone is not counted."


def _gain(results: SearchResults) -> str:
    """Winner against the grid's best setting: the measure that chose them first, paired by seed."""
    search, sides = results.search, results.winner
    winner = sides[sides["side"] == "search"]
    chosen = results.trials[results.trials["best"].astype(bool)]
    named = f"The winner is {_setting(chosen)}, {_chosen(results, 'search', 'trials')}"
    if winner.empty:
        lost = f"On seeds {md.values(search.winner.test_seeds)} it diverged"
        return f"{named}. {lost}, so nothing is known of it on the test set."
    if "grid" not in set(sides["side"]):
        rows = [
            [_label(goal), intervals.with_half_width(intervals.seed_interval(winner[goal.on_test]))] for goal in _goals(search)
        ]
        other = "no setting of the grid was measured on these seeds" if results.about["grid_cells"] else "there is no grid"
        return md.join(f"{named}; {other} to compare it with.", md.table(["test set", "winner"], rows))
    grid = sides[sides["side"] == "grid"]
    seeds = sorted(set(winner["seed"]) & set(grid["seed"]))
    difference = _paired(sides, search.chooses)
    verdict = f"On the test set, with seeds {md.values(seeds)}, it {_verdict(difference, search.chooses)}"
    same = "" if set(winner["updates"]) == set(grid["updates"]) else " Their budgets differ."
    rows = [
        [
            _label(goal),
            *(intervals.with_half_width(intervals.seed_interval(side[goal.on_test])) for side in (winner, grid)),
            intervals.with_bounds(_paired(sides, goal)),
        ]
        for goal in _goals(search)
    ]
    return md.join(
        f"{named}. The grid's best is {_setting(grid)}, {_chosen(results, 'grid', 'settings')}. "
        f"{verdict}: {intervals.with_bounds(difference)} in {search.chooses.label}.{same}",
        md.table(["test set, with 95% intervals over seeds", "winner", "grid's best", "difference"], rows),
    )


def _finalists(results: SearchResults) -> str:
    """The finalists of both sides, the best in the mean first, those without a value on some seed last."""
    goal, ranked = results.search.chooses, []
    for (side, _), cells in results.finalists.groupby(["side", "place"]):
        score = intervals.seed_interval(cells["score"])
        lost = len(cells) - score.seeds
        said = f"no value on {lost} of {len(cells)} seeds" if lost else intervals.with_half_width(score)
        rank = math.inf if lost else -score.mean if goal.maximised else score.mean
        ranked.append((rank, [side, _setting(cells), said]))
    rows = [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
    seeds = md.values(results.search.winner.validation_seeds)
    return md.table(["of", "finalist", f"{_label(goal)} on validation data, seeds {seeds}"], rows)


def _chosen(results: SearchResults, side: str, kind: str) -> str:
    """How the best of a side was chosen."""
    scores = results.finalists[results.finalists["side"] == side].pivot(index="place", columns="seed", values="score")
    highest = f"the {_objective(results.search.chooses)} on validation data"
    if len(scores) > 1 and not scores.dropna().empty:
        seeds = md.values(results.search.winner.validation_seeds)
        return f"of the {len(scores)} best {kind} the one with {highest}, in the mean over seeds {seeds}"
    return f"with {highest}"


def _goals(search: Search) -> list[Goal]:
    return list(dict.fromkeys([search.chooses, *search.objectives]))


def _label(goal: Goal) -> str:
    return md.escape(goal.label)


def _paired(sides: pd.DataFrame, goal: Goal) -> intervals.Interval | None:
    """Winner minus the grid's best, by seed."""
    if sides.empty:
        return None
    by_seed = {side: rows.set_index("seed")[goal.on_test] for side, rows in sides.groupby("side")}
    return intervals.paired_difference(by_seed["search"], by_seed["grid"]) if {"search", "grid"} <= set(by_seed) else None


def _verdict(difference: intervals.Interval, goal: Goal) -> str:
    lower_is_better = intervals.Interval(-difference.mean, -difference.high, -difference.low, difference.seeds)
    return f"{intervals.comparison(lower_is_better if goal.maximised else difference)} the grid's best"


def _setting(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    others = {"latent_dim": drawing.latents(first["latent_dim"]), "l2": f"λ = {md.value(first['l2'])}"}
    others["learning_rate"] = f"learning rate {intervals.plain(first['learning_rate'])}"
    if "sigma2" in first and pd.notna(first["sigma2"]):
        others["sigma2"] = f"σ² = {md.value(first['sigma2'])}"
    unusual = [axis for axis in ("anneal", "train_noise") if first.get(axis, 0) > 0]
    others |= {axis: f"{md.words(axis)} {md.value(first[axis])}" for axis in unusual}
    beta = first["beta"] if pd.isna(first["beta"]) else float(f"{first['beta']:.3g}")
    return ", ".join([drawing.arm_label(first["arm"], beta), *others.values()])


def _front_table(results: SearchResults) -> str:
    search, varied = results.search, list(results.search.space.varied)
    edge = results.trials[results.trials["on_front"].astype(bool)].sort_values(search.objectives[1].name)
    step = max(1, -(-len(edge) // LONGEST_FRONT))
    rows = [
        [row["state"], *(_cell(row[name]) for name in varied), *(intervals.plain(row[goal.name]) for goal in search.objectives)]
        for _, row in edge.iloc[::step].iterrows()
    ]
    header: Sequence[str] = ["of", *map(md.words, varied), *(_label(goal) for goal in search.objectives)]
    every = "" if step == 1 else f" (one in {step} of its {len(edge)} trials)"
    return md.join(
        f"The front{every}:", md.table(header, [["grid" if row[0] == "grid" else "search", *row[1:]] for row in rows])
    )


def _cell(value: object) -> str:
    return intervals.plain(float(value)) if isinstance(value, (int, float)) else md.value(value)
