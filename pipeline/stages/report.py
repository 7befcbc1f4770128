"""Report: every table becomes `reports/report.md` and its figures. From files alone; equal tables give equal bytes."""

from __future__ import annotations

import html
import math
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import artifacts, claims, config, figures, grid

FOLDER = Path("reports")
TRUTH = "manifold_dim"
PACKAGES = ("dvc", "matplotlib", "mlflow", "numpy", "optuna", "pandas", "scikit-learn", "scipy", "seaborn", "torch", "torchvision")
METRICS = {
    "test/reconstruction": "reconstruction (nats)",
    "test/mse": "squared error",
    "test/kl": "KL (nats)",
    "test/active_units": "active units",
    "test/knn_accuracy": "k-NN accuracy",
}
COUNTS = {
    "active_units": "active units",
    "elbow_column_sum": "elbow of |column sum|",
    "elbow_column_l2": "elbow of L2 norm",
    "elbow_kl": "elbow of KL",
}
LONGEST_TABLE = 16


@dataclass(frozen=True)
class Results:
    """A study and every table that its stages wrote."""

    name: str
    study: config.Study
    describe: dict[str, Any]
    about: dict[str, Any]
    manifest: pd.DataFrame
    history: pd.DataFrame
    metrics: pd.DataFrame
    noise: pd.DataFrame
    pca: pd.DataFrame
    paired: pd.DataFrame
    best: pd.DataFrame
    columns: pd.DataFrame
    ablation: pd.DataFrame
    counts: pd.DataFrame

    @property
    def data_axes(self) -> list[str]:
        return list(self.study.data.axes)

    @property
    def axes(self) -> list[str]:
        """Columns that, beside arm and β, tell settings apart."""
        return [*self.data_axes, *(axis for axis in grid.AXES if axis != "beta")]


@dataclass(frozen=True)
class SearchResults:
    """A search and its tables."""

    name: str
    search: config.Search
    about: dict[str, Any]
    trials: pd.DataFrame


def run() -> None:
    """Writes the report of all studies and searches in `params.yaml`. Raises ArtifactError where a table is missing."""
    settings = config.load_settings()
    studies = [_load_study(name) for name in settings.studies]
    searches = [_load_search(name) for name in settings.searches]
    shutil.rmtree(FOLDER / "figures", ignore_errors=True)  # or a removed study's pictures would stay
    parts = [_head(studies, searches)]
    parts += [_study(results, searches) for results in studies]
    parts += [_search(results) for results in searches]
    parts += [_problems(studies), _training(studies), _tracking(studies), _versions(studies)]
    artifacts.write_bytes(FOLDER / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())


def _load_study(name: str) -> Results:
    folders = artifacts.Folders(name)
    evaluate = {key: folders.evaluate / f"{key}.csv" for key in ("metrics", "noise", "pca", "paired", "best")}
    prune = {"columns": folders.prune / "columns.csv", "ablation": folders.prune / "ablation.csv", "counts": folders.prune / "summary.csv"}
    train = {"manifest": folders.train / "manifest.csv", "history": folders.train / "history.csv"}
    return Results(
        name=name,
        study=config.load_study(name),
        describe=artifacts.read_json(folders.prepared / "describe.json"),
        about=artifacts.read_json(folders.train / "about.json"),
        **{key: artifacts.read_table(path) for key, path in (train | evaluate | prune).items()},
    )


def _load_search(name: str) -> SearchResults:
    folder = artifacts.Folders(name).search
    about = artifacts.read_json(folder / "about.json")
    return SearchResults(name, config.load_search(name), about, artifacts.read_table(folder / "trials.csv"))


# Head


def _head(studies: list[Results], searches: list[SearchResults]) -> str:
    header = ["study", "dataset", "cells", "seeds", "updates", "parameters", "diverged", "unconverged", "missing"]
    short = [sentence for results in studies for sentence in _headlines(results)]
    return _join(
        "# vaesweep: what the sweeps show",
        "## What was run",
        _table(header, [_run_row(results) for results in studies]),
        *(f"Search `{s.name}`: {len(s.trials)} trials of {_count(s.search.train.updates)} updates on `{s.search.study}`." for s in searches),
        "A cell is one trained model; parameters are those of the largest cell. *Diverged* cells went non-finite and are in no "
        "table below; the validation loss of *unconverged* ones still fell by more than 1% over the last tenth of the budget; "
        "*missing* ones are in the grid but not in the tables. All are listed [below](#cells-to-be-wary-of).",
        "**How to read the numbers.** The unit is the seed: `mean ± half-width` and `mean [low, high]` are 95% t intervals over "
        "seeds, rounded to the digits that the interval supports. Arms share initial weights, batches and noise seed by seed, so "
        "differences are paired. Verdicts (*beats*, *raises*, *does not differ*, …) are computed: they say whether the interval "
        "of the paired difference excludes zero, with no correction for the number of comparisons.",
        _join("## In short", _bullets(short)) if short else "",
    )


def _run_row(results: Results) -> list[str]:
    study, manifest = results.study, results.manifest
    return [
        f"[`{results.name}`](#{results.name})",
        f"`{study.data.name}`",
        _count(study.size),
        str(len(study.grid.seed)),
        _count(study.train.updates),
        _count(results.about["parameters"]),
        str(int((manifest["status"] == "diverged").sum())) if len(manifest) else "0",
        str(int(manifest["unconverged"].astype(bool).sum())) if len(manifest) else "0",
        str(len(_missing(results))),
    ]


def _headlines(results: Results) -> list[str]:
    """One sentence for each kind of analysis: how often which verdict was reached."""
    name = f"`{results.name}`"
    found = []
    rows = results.paired
    rows = rows[(rows["arm"] == "vae") & (rows["noise"] != "clean")] if len(rows) else rows
    if len(rows):
        verdicts = [claims.verdict(_paired_interval(row)) for _, row in rows.iterrows()]
        beats, loses = verdicts.count("beats"), verdicts.count("loses to")
        found.append(
            f"{name}: in {len(rows)} comparisons on inputs with noise of level 0 and up, the VAE beats the plain AE of the same "
            f"seed in {beats}, loses in {loses}, and does not differ or cannot be told in {len(rows) - beats - loses}."
        )
    if len(results.counts) and TRUTH in results.counts:
        for label, rows in _by_arm(_slice(results, results.counts)[0]):
            known = [m for m in COUNTS if rows[m].notna().any()]
            found.append(f"{name}, {label}: " + "; ".join(_hit_rate(rows, m) for m in known) + ".")
    return found


def _hit_rate(rows: pd.DataFrame, measure: str) -> str:
    hits = int((rows[measure] == rows[TRUTH]).sum())
    return f"{COUNTS[measure]} equal the true dimension in {hits} of {len(rows)} cells"


# A study


def _study(results: Results, searches: list[SearchResults]) -> str:
    front = next((s for s in searches if s.search.study == results.name), None)
    return _join(
        f"## {results.name}",
        f"**{_escape(results.study.title)}**",
        _grid_in_words(results),
        _metrics_section(results),
        _rate_section(results, front),
        _plane_section(results),
        _noise_section(results),
        _prune_section(results),
    )


def _grid_in_words(results: Results) -> str:
    study, axes = results.study, results.study.grid
    arms = [
        f"{figures.arm_label(name)} with β {_values(arm.beta)}" if config.ARMS[name].penalty != "none" else figures.arm_label(name)
        for name, arm in axes.arms.items()
    ]
    data = "".join(f", {_words(axis)} {_values(values)}" for axis, values in study.data.axes.items())
    options = "".join(f", {_words(key)} {_escape(value)}" for key, value in study.data.options.items())
    widths = "-".join(map(str, [results.describe["features"], *study.model.hidden]))
    variance = f", σ² {_values(axes.sigma2)}" if study.model.likelihood == "gaussian" else ""
    return (
        f"The grid: {' and '.join(arms)}; latent dimension {_values(axes.latent_dim)}; λ {_values(axes.l2)}{variance}; "
        f"{len(axes.seed)} seeds. Data: `{study.data.name}`{options}{data}. Network: {widths}-latent and its mirror image, "
        f"{study.model.activation}, {study.model.likelihood.capitalize()} likelihood. Training: {_count(study.train.updates)} "
        f"updates of {study.train.batch_size} samples, Adam at {_values(axes.learning_rate)}."
    )


def _metrics_section(results: Results) -> str:
    if results.metrics.empty:
        return "No cell was evaluated: all diverged or are missing."
    known = [metric for metric in METRICS if metric in results.metrics and results.metrics[metric].notna().any()]
    axes = [axis for axis in results.axes if results.metrics[axis].nunique(dropna=False) > 1]
    summary = claims.summarise(results.metrics, [*axes, "arm", "beta"], known)
    full = _metrics_table(results, summary, axes, known)
    notes = "Test set; squared error is per dimension, with the code at its mean."
    if summary["unconverged"].any():
        notes += " †n: n of the setting's cells are unconverged."
    if len(summary) <= LONGEST_TABLE or "l2" not in axes:
        return _join("### Metrics", full, notes)
    least = summary[summary["l2"] == summary["l2"].min()]
    folded = f"<details><summary>All {len(summary)} settings</summary>\n\n{full}\n\n</details>"
    short = _metrics_table(results, least, [axis for axis in axes if axis != "l2"], known)
    return _join("### Metrics", f"At the smallest λ, {figures.number(least['l2'].iloc[0])}:", short, notes, folded)


def _metrics_table(results: Results, summary: pd.DataFrame, axes: list[str], metrics: list[str]) -> str:
    rows = []
    for _, row in summary.iterrows():
        label = figures.arm_label(row["arm"], row["beta"]) + (f" †{row['unconverged']}" if row["unconverged"] else "")
        label += f" ({row['cells']} seeds)" if row["cells"] < len(results.study.grid.seed) else ""
        rows.append([label, *(_cell(row[axis]) for axis in axes), *(_mean(row, metric) for metric in metrics)])
    return _table(["arm", *map(_words, axes), *(METRICS[metric] for metric in metrics)], rows)


# Rate and distortion


def _rate_section(results: Results, front: SearchResults | None) -> str:
    table, fixed = _slice(results, results.metrics, keep=("latent_dim", "l2"))
    penalised = table[table["arm"] != claims.CONTROL] if len(table) else table
    if penalised.empty or penalised.groupby("arm")["beta"].nunique().max() < 2:
        return ""
    summary = claims.summarise(table, ["arm", "latent_dim", "beta", "l2"], ["test/reconstruction", "test/mse", "test/kl"])
    findings = [*_weight_findings(table, "beta"), *_weight_findings(table, "l2"), *_collapse_findings(table)]
    return _join("### Rate and distortion", _bullets(findings), _rate_figure(results, summary, front), _note(fixed))


def _rate_figure(results: Results, summary: pd.DataFrame, front: SearchResults | None) -> str:
    if summary["l2"].nunique() > 2:
        picture = figures.heat_map(summary, {"test/mse": "Squared error", "test/kl": "KL (nats)"})
        caption = "Squared error per dimension and KL over β and λ, means over seeds; the first column is the plain AE."
        return _figure(f"{results.name}-beta-lambda", picture, caption)
    trials = None
    caption = "KL against reconstruction on the test set, with 95% intervals over seeds; the line is the plain AE's reconstruction."
    if front is not None and front.trials["rate"].notna().any():
        trials = front.trials.dropna(subset=["rate", "distortion"]).assign(latent_dim=front.search.latent_dim)
        budget = _count(front.search.train.updates)
        caption += f" Grey: the trials of `{front.name}` (validation set, one seed, {budget} updates)."
    return _figure(f"{results.name}-rate-distortion", figures.rate_distortion(summary, trials), caption)


def _weight_findings(table: pd.DataFrame, weight: str) -> list[str]:
    """What raising β or λ from its smallest to its largest value does, paired by seed, the other at its smallest."""
    other, symbol = ("l2", "β") if weight == "beta" else ("beta", "λ")
    rows = table[table["arm"] == "vae"]
    found = []
    for latent_dim, group in rows.groupby("latent_dim"):
        group = group[group[other] == group[other].min()]
        low, high = group[weight].min(), group[weight].max()
        if low < high:
            changes = [_change(group, weight, metric) for metric in ("test/kl", "test/reconstruction")]
            held = f"{'λ' if other == 'l2' else 'β'} = {_cell(group[other].iloc[0])}"
            found.append(
                f"VAE, {_latents(latent_dim)}, {held}: raising {symbol} from {_cell(low)} to {_cell(high)} " + " and ".join(changes) + "."
            )
    return found


def _change(group: pd.DataFrame, weight: str, metric: str) -> str:
    by_seed = [group[group[weight] == edge].groupby("seed")[metric].mean() for edge in (group[weight].max(), group[weight].min())]
    difference = claims.paired_difference(*by_seed)
    name = {"test/kl": "the KL", "test/reconstruction": "the reconstruction term"}[metric]
    return f"{claims.change(difference)} {name} ({claims.with_bounds(difference)} nats)"


def _collapse_findings(table: pd.DataFrame) -> list[str]:
    """From which λ on a VAE has no active unit in any seed."""
    rows = table[table["arm"] == "vae"].dropna(subset=["test/active_units"])
    found = []
    for latent_dim, group in rows.groupby("latent_dim"):
        collapsed = []
        for beta, cells in group.groupby("beta"):
            dead = cells.groupby("l2")["test/active_units"].max() == 0
            if dead.any():
                collapsed.append(f"λ = {_cell(dead[dead].index.min())} at β = {_cell(beta)}")
        if collapsed:
            found.append(f"VAE, {_latents(latent_dim)}: the smallest λ without an active unit in any seed is {', '.join(collapsed)}.")
    return found


def _plane_section(results: Results) -> str:
    """Input, code and reconstruction of the VAE that is best on validation, for data of two dimensions."""
    best = results.best
    if results.describe["features"] != 2 or results.describe["image_shape"] or best.empty or not (best["arm"] == "vae").any():
        return ""
    row = best[best["arm"] == "vae"].sort_values("latent_dim", kind="stable").iloc[-1]
    path = artifacts.Folders(results.name).evaluate / "codes" / f"{row['cell_id']}.safetensors"
    tensors = {name: tensor.numpy() for name, tensor in artifacts.read_tensors(path).items()}
    inputs = tensors["x"]
    picture = figures.plane(inputs, tensors["codes"][: len(inputs)], tensors["reconstructions"][: len(inputs)])
    caption = f"Test points, their codes and reconstructions: the VAE with {_latents(row['latent_dim'])} that is best on validation."
    return _figure(f"{results.name}-plane", picture, caption)


# Robustness


def _noise_section(results: Results) -> str:
    if results.noise.empty:
        return ""
    noise, fixed = _slice(results, results.noise)
    pca = _slice(results, results.pca)[0] if len(results.pca) else None
    summary = claims.summarise(noise, ["noise", "level", "latent_dim", "arm", "beta"], ["mse_clean"])
    picture = figures.robustness(summary, None if pca is None else pca.dropna(subset=["noise"]))
    caption = "Squared error against the clean input over the noise level, with 95% bands over seeds; PCA of the same dimension, dashed."
    return _join(
        "### Robustness against the plain AE",
        _figure(f"{results.name}-robustness", picture, caption),
        _paired_part(results),
        _pca_part(noise, pca),
        _note(fixed),
    )


def _paired_part(results: Results) -> str:
    paired = _slice(results, results.paired)[0] if len(results.paired) else results.paired
    paired = paired[paired["noise"] != "clean"] if len(paired) else paired
    if paired.empty:
        return "The study has no plain AE to compare with." if "ae" not in results.study.grid.arms else ""
    caption = "Error minus that of the plain AE with the same latent dimension, λ and seed, with 95% intervals over seeds."
    rows = []
    for (kind, latent_dim, arm, beta), group in paired.groupby(["noise", "latent_dim", "arm", "beta"], sort=False, dropna=False):
        strongest = group.sort_values("level").iloc[-1]
        verdicts = _verdicts_by_level(group)
        difference = claims.with_bounds(_paired_interval(strongest))
        rows.append([_noise(kind), _cell(latent_dim), figures.arm_label(arm, beta), verdicts, _cell(strongest["level"]), difference])
    header = ["noise", "latents", "arm", "against the plain AE, by noise level", "strongest level", "difference there"]
    return _join(_figure(f"{results.name}-paired", figures.paired_differences(paired), caption), _table(header, rows))


def _verdicts_by_level(group: pd.DataFrame) -> str:
    levels: dict[str, list[str]] = {}
    for _, row in group.sort_values("level").iterrows():
        levels.setdefault(claims.verdict(_paired_interval(row)), []).append(_cell(row["level"]))
    return "; ".join(f"{word.removesuffix(' from').removesuffix(' to').removesuffix(' told')} at {', '.join(at)}" for word, at in levels.items())


def _pca_part(noise: pd.DataFrame, pca: pd.DataFrame | None) -> str:
    """PCA beside the arms: error on clean inputs, and at the strongest level of each kind of noise."""
    if pca is None or pca.empty:
        return ""
    strongest = noise.loc[noise.groupby("noise")["level"].transform("max") == noise["level"]]
    summary = claims.summarise(strongest, ["noise", "level", "latent_dim", "arm", "beta"], ["mse_clean"])
    summary["label"] = [figures.arm_label(arm, beta) for arm, beta in zip(summary["arm"], summary["beta"], strict=True)]
    labels = list(dict.fromkeys(summary["label"]))[:5]
    rows = []
    for (kind, level, latent_dim), group in summary.groupby(["noise", "level", "latent_dim"], sort=False):
        of_label = {row["label"]: _mean(row, "mse_clean") for _, row in group.iterrows()}
        match = pca[(pca["noise"] == kind) & (pca["level"] == level) & (pca["latent_dim"] == latent_dim)]["mse_clean"]
        reference = claims.plain(match.iloc[0]) if len(match) else "–"
        rows.append([f"{_noise(kind)}, {_cell(level)}", _cell(latent_dim), reference, *(of_label.get(label, "–") for label in labels)])
    return _join("Squared error at the strongest level, beside PCA of the same dimension:", _table(["noise, level", "latents", "PCA", *labels], rows))


# Pruning


def _prune_section(results: Results) -> str:
    if results.counts.empty or results.columns.empty:
        return ""
    cancelled = _cancel_sentence(results.columns)
    if TRUTH not in results.counts:
        return _join("### Which latent dimensions are used", cancelled)
    columns, fixed = _slice(results, results.columns, keep=("latent_dim", TRUTH))
    counts, ablation = (_slice(results, table, keep=("latent_dim", TRUTH))[0] for table in (results.counts, results.ablation))
    return _join(
        "### Which latent dimensions are used",
        _bullets([*_ablation_findings(ablation), cancelled]),
        _prune_figures(results.name, columns, counts, ablation),
        _counts_table(counts),
        _note(fixed),
    )


def _prune_figures(name: str, columns: pd.DataFrame, counts: pd.DataFrame, ablation: pd.DataFrame) -> str:
    summary = claims.summarise(counts, ["arm", "beta", TRUTH], list(COUNTS))
    curves = claims.summarise(ablation, ["arm", "beta", "latent_dim", TRUTH, "criterion", "zeroed"], ["mse"])
    return _join(
        _figure(f"{name}-dimensions", figures.used_dimensions(summary, TRUTH, COUNTS),
                "Dimensions counted as used against the true dimension of the data, with 95% intervals over seeds."),
        _figure(f"{name}-scree", figures.scree(columns, TRUTH),
                "Columns of the first decoder layer and what each dimension carries, sorted in each cell, means over seeds; "
                "one line for each true dimension."),
        _figure(f"{name}-ablation", figures.ablation(curves, TRUTH),
                "Squared error as dimensions are zeroed in each criterion's order, with 95% bands over seeds; a ring where as many "
                "are left as the data have."),
    )  # fmt: skip


def _counts_table(counts: pd.DataFrame) -> str:
    summary = claims.summarise(counts, ["arm", "beta", TRUTH], [*COUNTS, "cancelled"])
    rows = [
        [figures.arm_label(row["arm"], row["beta"]), _cell(row[TRUTH]), *(_mean(row, m) for m in (*COUNTS, "cancelled"))]
        for _, row in summary.iterrows()
    ]
    return _table(["arm", "true dimension", *COUNTS.values(), "cancelling columns"], rows)


def _ablation_findings(ablation: pd.DataFrame) -> list[str]:
    """How often zeroing all but the true number of dimensions leaves the error as it was."""
    found = []
    for label, rows in _by_arm(ablation):
        kept = []
        for criterion, group in rows.groupby("criterion", sort=False):
            whole = group[group["zeroed"] == 0].set_index("cell_id")["mse"]
            pruned = group[group["zeroed"] == group["latent_dim"] - group[TRUTH]].set_index("cell_id")["mse"]
            share = int((pruned <= 1.05 * whole.reindex(pruned.index)).sum())
            kept.append(f"{share} of {len(pruned)} by {figures.CRITERIA.get(criterion, criterion)}")
        found.append(f"{label}: keeping only the true number of dimensions raises the error by at most 5% in {', '.join(kept)} (cells).")
    return found


def _cancel_sentence(columns: pd.DataFrame) -> str:
    cancels, active = columns["cancels"].astype(bool), columns["active"].astype(bool)
    return (
        f"A column's sum cancels (below a tenth of its L1 norm) in {_count(cancels.sum())} of {_count(len(columns))} columns of the "
        f"first decoder layer; {_count((cancels & active).sum())} of these belong to active units, which the criterion of the "
        f"column sum would take for unused."
    )


# Search


def _search(results: SearchResults) -> str:
    trials, search = results.trials, results.search
    finished = trials.dropna(subset=["rate", "distortion"])
    intro = (
        f"{len(finished)} of {search.trials} wanted trials finished, {int((trials['state'] == 'failed').sum())} failed. Each trained "
        f"{_latents(search.latent_dim)} for {_count(search.train.updates)} updates on `{search.study}`, with one seed: no intervals. "
        f"Sampler: {_escape(results.about.get('sampler', search.sampler.kind))}. Rate and distortion are those of the validation set."
    )
    heading = [f"## {results.name}", f"**{_escape(search.title)}**", intro]
    if finished.empty:
        return _join(*heading, "No trial finished, so there is no front.")
    front = finished[finished["on_front"].astype(bool)].sort_values("rate")
    caption = "Validation KL against validation reconstruction of every finished trial, coloured by β, and the Pareto front."
    return _join(*heading, _figure(f"{results.name}-front", figures.search_front(finished), caption), _front_table(front))


def _front_table(front: pd.DataFrame) -> str:
    step = max(1, math.ceil(len(front) / 10))
    columns = ["beta", "l2", "rate", "distortion"]
    rows = [[claims.plain(row[column]) for column in columns] for _, row in front.iloc[::step].iterrows()]
    every = "" if step == 1 else f" (one in {step} of its {len(front)} trials)"
    return _join(f"The front, by rising rate{every}:", _table(["β", "λ", "KL (nats)", "reconstruction (nats)"], rows))


# Cells, training, tracking, versions


def _problems(studies: list[Results]) -> str:
    rows = [row for results in studies for row in _problem_rows(results)]
    heading = "## Cells to be wary of"
    if not rows:
        return _join(heading, "None: no cell diverged, is unconverged, or is missing.")
    more = f"… and {len(rows) - 40} settings more; `runs/<study>/train/manifest.csv` has them all." if len(rows) > 40 else ""
    return _join(heading, _table(["study", "what", "setting", "seeds", "updates"], rows[:40]), more)


def _problem_rows(results: Results) -> list[list[str]]:
    manifest, rows = results.manifest, []
    if len(manifest):
        diverged = manifest[manifest["status"] == "diverged"].assign(at=lambda t: t["diverged_at"])
        unconverged = manifest[manifest["unconverged"].astype(bool)].assign(at=lambda t: t["updates"])
        rows += _grouped(results, "diverged", diverged) + _grouped(results, "unconverged", unconverged)
    missing = pd.DataFrame(_missing(results))
    return rows + (_grouped(results, "missing", missing.assign(at=math.nan)) if len(missing) else [])


def _grouped(results: Results, what: str, cells: pd.DataFrame) -> list[list[str]]:
    varying = [axis for axis in results.axes if axis in cells and len(_axis_values(results.study, axis)) > 1]
    rows = []
    for _, group in cells.groupby(["arm", "beta", *varying], dropna=False, sort=False):
        first = group.iloc[0]
        setting = [figures.arm_label(first["arm"], first["beta"]), *(f"{_words(axis)} {_cell(first[axis])}" for axis in varying)]
        updates = ", ".join(dict.fromkeys(_cell(value) for value in group["at"].dropna())) or "–"
        rows.append([f"`{results.name}`", what, ", ".join(setting), ", ".join(map(_cell, sorted(group["seed"]))), updates])
    return rows


def _missing(results: Results) -> list[dict[str, Any]]:
    """Cells of the grid that are not in the manifest, or finished but were not evaluated."""
    expected = [cell.row() for cell in grid.cells(results.study)]
    columns = list(expected[0])
    manifest = results.manifest
    accounted = set()
    if len(manifest):
        evaluated = set(results.metrics["cell_id"]) if len(results.metrics) else set()
        known = manifest[(manifest["status"] == "diverged") | manifest["cell_id"].isin(evaluated)]
        accounted = {_identity(row, columns) for row in known.to_dict("records")}
    return [{**row, "beta": math.nan if row["beta"] is None else row["beta"]} for row in expected if _identity(row, columns) not in accounted]


def _identity(row: dict[str, Any], columns: list[str]) -> tuple[str, ...]:
    return tuple(_cell(row[column]) for column in columns)


def _training(studies: list[Results]) -> str:
    curves = pd.concat([_curves(results) for results in studies if len(results.history)] or [pd.DataFrame()])
    rows = []
    for results in studies:
        finished = results.manifest[results.manifest["status"] == "finished"] if len(results.manifest) else results.manifest
        kept = {"best": "best on validation", "last": "last"}[results.study.train.keep]
        updates = f"{_cell(finished['evaluated_update'].min())} to {_cell(finished['evaluated_update'].max())}" if len(finished) else "–"
        about = results.about
        rows.append([f"`{results.name}`", kept, updates, *(_escape(about[key]) for key in ("device", "torch", "precision", "engine_version"))])
    header = ["study", "weights evaluated", "from updates", "device", "torch", "precision", "engine version"]
    caption = "Validation loss: a line is a setting's mean over seeds, with its 95% band. It holds β · penalty, so only lines of one β compare."
    picture = _figure("training", figures.training_curves(curves, ["setting"]), caption) if len(curves) else ""
    return _join("## Training", _table(header, rows), picture)


def _curves(results: Results) -> pd.DataFrame:
    cells = results.manifest[["cell_id", "arm", "beta", *results.axes, "seed"]]
    table = results.history[["cell_id", "update", "validation_loss"]].merge(cells, on="cell_id")
    summary = claims.summarise(table, ["arm", "beta", *results.axes, "update"], ["validation_loss"])
    summary["panel"] = [f"{results.name}, {_latents(count)}" for count in summary["latent_dim"]]
    summary["setting"] = [_values(row) for row in summary[results.axes].itertuples(index=False)]
    return summary


def _tracking(studies: list[Results]) -> str:
    first = studies[0].name
    return _join(
        "## The runs in MLflow",
        "`make ui` opens MLflow. A study is an experiment, a cell a run; a filter for the search box:",
        f"```text\ntags.study = '{first}' and params.arm = 'vae'\n```",
    )


def _versions(studies: list[Results]) -> str:
    hashes = []
    for results in studies:
        for dataset in results.describe["datasets"]:
            point = ", ".join(f"{_words(axis)} {_escape(value)}" for axis, value in dataset["point"].items())
            rows = " / ".join(_count(dataset["rows"][split]) for split in ("train", "validation", "test"))
            hashes.append([f"`{results.name}`", point or "–", rows, f"`{dataset['sha256'][:16]}`"])
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    return _join(
        "## Versions and data",
        f"This report was written under {', '.join(versions)}.",
        _table(["study", "data", "rows: train / validation / test", "SHA-256 (first 16 digits)"], hashes),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


# Words, numbers and markdown


def _slice(results: Results, table: pd.DataFrame, keep: Sequence[str] = ("latent_dim",)) -> tuple[pd.DataFrame, list[str]]:
    """Fixes every axis not in `keep` at its first value, so that lines in a figure are one setting each; says what was fixed."""
    fixed = []
    for axis in results.axes:
        if axis in keep or axis not in table or table[axis].nunique() < 2:
            continue
        value = table[axis].dropna().min() if pd.api.types.is_numeric_dtype(table[axis]) else table[axis].dropna().iloc[0]
        table = table[table[axis] == value]
        fixed.append(f"{_words(axis)} {_cell(value)}")
    return table, fixed


def _by_arm(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    for (arm, beta), rows in table.groupby(["arm", "beta"], dropna=False, sort=False):
        yield figures.arm_label(arm, beta), rows


def _paired_interval(row: pd.Series) -> claims.Interval:
    return claims.Interval(row["difference"], row["low"], row["high"], int(row["seeds"]))


def _mean(row: pd.Series, metric: str) -> str:
    return claims.with_half_width(claims.Interval(row[metric], row[f"{metric} low"], row[f"{metric} high"], 0))


def _axis_values(study: config.Study, axis: str) -> tuple:
    return study.data.axes[axis] if axis in study.data.axes else getattr(study.grid, axis)


def _cell(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "–"
    try:
        return figures.number(float(value))
    except ValueError:
        return _escape(value)


def _values(values: Iterable[Any]) -> str:
    return ", ".join(map(_cell, values))


def _words(axis: str) -> str:
    return {"latent_dim": "latents", "l2": "λ", "sigma2": "σ²", "beta": "β"}.get(axis) or _escape(axis.replace("_", " "))


def _noise(kind: str) -> str:
    return _escape(figures.NOISE_LABELS.get(kind, kind))


def _latents(count: Any) -> str:
    return f"{int(count)} latent{'s' if count != 1 else ''}"


def _count(value: Any) -> str:
    return f"{int(value):,}"


def _note(fixed: list[str]) -> str:
    return f"Shown at {', '.join(fixed)}." if fixed else ""


def _escape(text: Any) -> str:
    """Free text that markdown shows as it is, on one line."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", plain)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def _figure(name: str, picture: Any, caption: str) -> str:
    path = Path("figures") / f"{name}.png"
    figures.save(picture, FOLDER / path)
    alt = re.sub(r"[\[\]`|\n]", "", caption)
    return f"![{alt}]({path.as_posix()})\n\n*{caption}*"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
