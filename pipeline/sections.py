"""Sections of the report: what the tables of one study say in sentences, tables and figures.

Every verdict is computed from an interval over seeds. A study without an analysis (no noise, no known dimension) has no such
section.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from pipeline import claims, config, drawing, figures, intervals, ledger, measures, portraits
from pipeline import markdown as md
from pipeline.results import Gallery, StudyResults, reconstructing

TRUTH = "manifold_dim"
METRICS = ("test/reconstruction", "test/mse", "test/kl", "test/active_units", "test/knn_accuracy")
COUNTS = {
    "active_units": "active units",
    "elbow_column_sum": "elbow of |column sum|",
    "elbow_column_l2": "elbow of L2 norm",
    "elbow_kl": "elbow of KL",
}
BOUND = "test/iw_bound"
LONGEST_TABLE = 16
MOST_SERIES = 3
SAME_ERROR = 1.05
NONE_NEAR = 0.001  # share of values that is none
CANCELLING = (
    "Columns are those of the first decoder layer, one for each latent dimension. A column's sum *cancels* where it is below a "
    "tenth of the column's L1 norm: the criterion of the column sum then takes a used dimension for an unused one."
)


def study_section(
    results: StudyResults,
    entries: Sequence[claims.Entry],
    studies: Mapping[str, config.Study],
) -> str:
    """All that is known about one study; `entries` are its lines of the ledger, `studies` all that claims speak of."""
    return md.join(
        f"## {results.name}",
        f"**{md.escape(results.study.title)}**",
        _grid_in_words(results),
        ledger.study_section(entries, studies, _claims_figure(results, entries)),
        _metrics_section(results),
        _rate_section(results),
        _likelihood_section(results),
        portraits.section(results),
        _noise_section(results),
        _training_noise_section(results),
        _data_axes_section(results),
        _prune_section(results),
    )


def headlines(results: StudyResults) -> list[str]:
    """For each kind of analysis one sentence: how often which verdict was reached, over all settings."""
    found = [_clean_headline(results), _noise_headline(results), *_count_headlines(results)]
    return [f"`{results.name}`: {sentence}" for sentence in found if sentence]


def _claims_figure(results: StudyResults, entries: Sequence[claims.Entry]) -> str:
    panels = ledger.panels(entries)
    if not panels:
        return ""
    caption = "What decides each claim: thin lines are seeds, points their means with 95% intervals; dashed: the claimed bound."
    return results.gallery.show("claims", figures.claim_panels(panels), caption)


# The grid and its metrics


def _grid_in_words(results: StudyResults) -> str:
    study, axes = results.study, results.study.grid
    arms = " and ".join(_arm_in_words(name, arm) for name, arm in axes.arms.items())
    data = [f"{md.words(key)} {md.value(option)}" for key, option in study.data.options.items()]
    data += [f"{md.words(axis)} {md.values(points)}" for axis, points in study.data.axes.items()]
    widths = "-".join(map(str, [results.describe["features"], *study.model.hidden]))
    variance = f"; σ² {md.values(axes.sigma2)}" if study.model.likelihood == "gaussian" else ""
    return (
        f"*Grid:* {arms}; latent dimension {md.values(axes.latent_dim)}; λ {md.values(axes.l2)}{variance}; "
        f"{len(axes.seed)} seeds. *Data:* {'; '.join([f'`{study.data.name}`', *data])}. *Network:* {widths}-latent and its "
        f"mirror image, {_network_in_words(study.model)}. {_training_in_words(study)}"
    )


def _network_in_words(model: config.Model) -> str:
    decoder = f" ({model.decoder_activation} in the decoder)" if model.decoder_activation else ""
    end = (", then ReLU" if model.output == "relu" else "") + (f", dropout {model.dropout:g}" if model.dropout else "")
    return f"{model.activation}{decoder}, {model.likelihood.capitalize()} likelihood{end}"


def _arm_in_words(name: str, arm: config.ArmAxes) -> str:
    if config.ARMS[name].penalty == "none":
        return drawing.arm_label(name)
    rises = f", which rises over the first {md.values(arm.anneal)} of training" if any(arm.anneal) else ""
    return f"{drawing.arm_label(name)} with β {md.values(arm.beta)}{rises}"


def _training_in_words(study: config.Study) -> str:
    train, rate = study.train, md.values(study.grid.learning_rate)
    noise = f" {_noise_in_words(train.noise, study.grid.train_noise)}" if train.noise else ""
    order = "" if train.shuffle else ", rows never shuffled"
    schedule = _schedule_in_words(train.learning_rate_schedule)
    return (
        f"*Training:* {md.count(train.updates)} updates of {train.batch_size} samples{order}, Adam at {rate}{schedule}.{noise}"
    )


def _schedule_in_words(schedule: config.Schedule) -> str:
    if schedule.kind == "constant":
        return ""
    if schedule.kind == "steps":
        return f", × {schedule.ratio:g} at {md.values(schedule.at)} of the updates"
    return f", {schedule.kind} from × {schedule.start:g} to × {schedule.end:g}"


def _noise_in_words(noise: config.TrainNoise, levels: Sequence[float]) -> str:
    clipped = "clipped to [0, 1]" if noise.clip else "not clipped"
    return f"*Noise in training:* {_noise(noise.kind)}, levels {md.values(levels)}, {clipped}; the target is {noise.target}."


def _metrics_section(results: StudyResults) -> str:
    if results.metrics.empty:
        return "No cell was evaluated: all of them diverged or are missing."
    known = [metric for metric in METRICS if metric in results.metrics and results.metrics[metric].notna().any()]
    axes = [axis for axis in results.axes if results.metrics[axis].nunique() > 1]
    summary = intervals.summarise(results.metrics, [*axes, "arm", "beta"], known)
    summary = summary.sort_values(axes, kind="stable") if axes else summary
    full, notes = _metrics_table(results, summary, axes, known), _metrics_notes(summary)
    if len(summary) <= LONGEST_TABLE or "l2" not in axes:
        return md.join("### Metrics", full, notes)
    least = summary[summary["l2"] == summary["l2"].min()]
    short = _metrics_table(results, least, [axis for axis in axes if axis != "l2"], known)
    intro = f"At the smallest λ, {md.value(least['l2'].iloc[0])}:"
    return md.join("### Metrics", intro, short, notes, md.folded(f"All {len(summary)} settings", full))


def _metrics_table(results: StudyResults, summary: pd.DataFrame, axes: list[str], metrics: list[str]) -> str:
    rows = []
    for _, row in summary.iterrows():
        label = drawing.arm_label(row["arm"], row["beta"])
        label += f" †{row['unconverged']}" if row["unconverged"] else ""
        label += f" ({row['cells']} seeds)" if row["cells"] < len(results.study.grid.seed) else ""
        rows.append([label, *(md.value(row[axis]) for axis in axes), *(_mean(row, metric) for metric in metrics)])
    return md.table(["arm", *map(md.words, axes), *(measures.MEASURES[metric].label for metric in metrics)], rows)


def _metrics_notes(summary: pd.DataFrame) -> str:
    notes = (
        "On the test set. Reconstruction is at a sampled code where the arm samples; squared error is per dimension, at the "
        "code's mean."
    )
    return notes + (" †n: n of the setting's cells are unconverged." if summary["unconverged"].any() else "")


def _clean_headline(results: StudyResults) -> str:
    clean = results.paired[results.paired["noise"] == "clean"] if len(results.paired) else results.paired
    return _tally(clean, "squared error on clean inputs")


def _tally(paired: pd.DataFrame, where: str) -> str:
    """Of the VAE's comparisons, those that have an interval; empty if none has."""
    told = paired[(paired["arm"] == "vae") & paired["low"].notna()] if len(paired) else paired
    if told.empty:
        return ""
    verdicts = [intervals.comparison(_difference(row)) for _, row in told.iterrows()]
    beats, loses = verdicts.count("beats"), verdicts.count("loses to")
    return (
        f"in {where}, the VAE beats the plain AE of the same seed in {beats} of {len(verdicts)} comparisons, loses to it in "
        f"{loses}, and does not measurably differ in {len(verdicts) - beats - loses}."
    )


# Rate and distortion


def _rate_section(results: StudyResults) -> str:
    table, fixed = results.slice(results.metrics, keep=("latent_dim", "l2"))
    penalised = table[table["arm"] != intervals.CONTROL] if len(table) else table
    if penalised.empty or penalised.groupby("arm")["beta"].nunique().max() < 2:
        return ""
    summary = intervals.summarise(table, ["arm", "latent_dim", "beta", "l2"], ["test/reconstruction", "test/mse", "test/kl"])
    findings = [*_weight_findings(table, "beta"), *_weight_findings(table, "l2"), *_threshold_findings(table)]
    return md.join("### Rate and distortion", _note(fixed), md.bullets(findings), _rate_figure(results, summary))


def _rate_figure(results: StudyResults, summary: pd.DataFrame) -> str:
    if summary["l2"].nunique() > 2:
        picture = figures.heat_map(summary, {"test/mse": "Squared error", "test/kl": "KL (nats)"})
        caption = "Squared error per dimension and KL over β and λ, means over seeds; the column AE is the plain AE."
        return results.gallery.show("beta-lambda", picture, caption)
    caption = "KL against reconstruction on the test set, with 95% intervals over seeds"
    least = f" of λ = {md.value(summary['l2'].min())}" if summary["l2"].nunique() > 1 else ""
    caption += f"; the level line is the plain AE{least}." if intervals.CONTROL in set(summary["arm"]) else "."
    return results.gallery.show("rate-distortion", figures.rate_distortion(summary), caption)


def _weight_findings(table: pd.DataFrame, weight: str) -> list[str]:
    """What raising β or λ from its smallest to its largest value does, seed by seed, with the other at its smallest."""
    other = {"beta": "l2", "l2": "beta"}[weight]
    found = []
    for latent_dim, group in table[table["arm"] == "vae"].groupby("latent_dim"):
        group = group[group[other] == group[other].min()]
        low, high = group[weight].min(), group[weight].max()
        if low < high:
            setting = f"VAE, {drawing.latents(latent_dim)}, {md.words(other)} = {md.value(group[other].iloc[0])}"
            changes = " and ".join(_change(group, weight, metric) for metric in ("test/kl", "test/reconstruction"))
            found.append(f"{setting}: raising {md.words(weight)} from {md.value(low)} to {md.value(high)} {changes}.")
    return found


def _change(group: pd.DataFrame, weight: str, metric: str) -> str:
    by_seed = [
        group[group[weight] == edge].groupby("seed")[metric].mean() for edge in (group[weight].max(), group[weight].min())
    ]
    difference = intervals.paired_difference(*by_seed)
    name = {"test/kl": "the KL", "test/reconstruction": "the reconstruction term"}[metric]
    return f"{intervals.change(difference)} {name} ({intervals.with_bounds(difference)} nats)"


def _threshold_findings(table: pd.DataFrame) -> list[str]:
    """From which λ on a VAE has no active unit, or reconstructs no value near 0, in any seed."""
    effects = {"test/active_units": (0.0, "no unit is active"), "test/near_0": (NONE_NEAR, "no reconstructed value is near 0")}
    found = []
    for metric, (most, effect) in effects.items():
        for latent_dim, group in table[table["arm"] == "vae"].dropna(subset=[metric]).groupby("latent_dim"):
            starts = {beta: _first_l2(cells, metric, most) for beta, cells in group.groupby("beta")}
            told = [f"{md.value(start)} at β = {md.value(beta)}" for beta, start in starts.items() if start is not None]
            if told:
                found.append(f"VAE, {drawing.latents(latent_dim)}: {effect} in any seed from λ = {', '.join(told)} on.")
    return found


def _first_l2(cells: pd.DataFrame, metric: str, most: float) -> float | None:
    """The smallest of several λ from which on the metric is at most `most` in every seed."""
    if cells["l2"].nunique() < 2:
        return None
    highest = cells.groupby("l2")[metric].max()
    above = highest.index[highest > most].max() if (highest > most).any() else -math.inf
    below = highest.index[highest.index > above]
    return below.min() if len(below) else None


# Robustness


def _noise_section(results: StudyResults) -> str:
    noise, fixed = results.slice(reconstructing(results.noise))
    if noise.empty:
        return ""
    pca = results.slice(results.pca)[0] if len(results.pca) else None
    summary = intervals.summarise(noise, ["noise", "level", "latent_dim", "arm", "beta"], ["mse_clean"])
    picture = figures.robustness(summary, None if pca is None else pca.dropna(subset=["noise"]))
    caption = (
        "Squared error against the clean input over noise level, with 95% bands over seeds; dashed: PCA of as many dimensions."
    )
    return md.join(
        "### Robustness against the plain AE",
        _note(fixed),
        results.gallery.show("robustness", picture, caption),
        _paired_part(results),
        _pca_part(results, noise, pca),
    )


def _paired_part(results: StudyResults) -> str:
    paired = results.slice(reconstructing(_corrupted(results)))[0]
    if paired.empty:
        return "There is no plain AE to compare with."
    rows = []
    for (kind, latent_dim, arm, beta), group in paired.groupby(
        ["noise", "latent_dim", "arm", "beta"], sort=False, dropna=False
    ):
        strongest = group.sort_values("level").iloc[-1]
        there = f"{md.value(strongest['level'])}: {intervals.with_bounds(_difference(strongest))}"
        label = drawing.arm_label(arm, beta) + (f" †{strongest['unconverged']}" if strongest["unconverged"] else "")
        rows.append([_noise(kind), md.value(latent_dim), label, _verdicts_by_level(group), there])
    caption = "Error minus that of the plain AE with the same latent dimension, λ and seed, with 95% intervals over seeds."
    picture = results.gallery.show("paired", figures.paired_differences(paired), caption)
    header = ["noise", "latents", "arm", "against the plain AE, by noise level", "difference at the strongest level"]
    return md.join(picture, md.table(header, rows))


def _corrupted(results: StudyResults) -> pd.DataFrame:
    return results.paired[results.paired["noise"] != "clean"] if len(results.paired) else results.paired


def _verdicts_by_level(group: pd.DataFrame) -> str:
    levels: dict[str, list[str]] = {}
    for _, row in group.sort_values("level").iterrows():
        levels.setdefault(intervals.comparison(_difference(row)), []).append(md.value(row["level"]))
    return "; ".join(f"{word.removesuffix(' from').removesuffix(' to')} at {', '.join(at)}" for word, at in levels.items())


def _pca_part(results: StudyResults, noise: pd.DataFrame, pca: pd.DataFrame | None) -> str:
    """PCA beside the arms: on clean inputs, and at the strongest level of each kind of noise."""
    if pca is None or pca.empty:
        return ""
    strongest = noise[noise.groupby("noise")["level"].transform("max") == noise["level"]]
    clean, _ = results.slice(reconstructing(results.metrics))
    clean = clean.assign(noise="clean", level=0.0).rename(columns={"test/mse": "mse_clean"})
    by = ["noise", "level", "latent_dim", "arm", "beta"]
    summary = intervals.summarise(pd.concat([clean, strongest])[[*by, "seed", "mse_clean"]], by, ["mse_clean"])
    summary["label"] = [drawing.arm_label(arm, beta) for arm, beta in zip(summary["arm"], summary["beta"], strict=True)]
    labels = list(dict.fromkeys(summary["label"]))[:5]
    reference = pca.assign(noise=pca["noise"].fillna("clean"), level=pca["level"].fillna(0.0))
    rows = [_pca_row(key, group, labels, reference) for key, group in summary.groupby(by[:3], sort=False)]
    intro = "Squared error against the clean input, beside PCA of the same dimension (which has no seeds):"
    return md.join(intro, md.table(["noise, level", "latents", "PCA", *labels], rows), _neighbour_sentence(pca))


def _pca_row(key: tuple, group: pd.DataFrame, labels: list[str], reference: pd.DataFrame) -> list[str]:
    kind, level, latent_dim = key
    of_label = {row["label"]: _mean(row, "mse_clean") for _, row in group.iterrows()}
    same = (reference["noise"] == kind) & (reference["level"] == level) & (reference["latent_dim"] == latent_dim)
    error = intervals.plain(reference[same]["mse_clean"].iloc[0]) if same.any() else "–"
    where = "clean" if kind == "clean" else f"{_noise(kind)}, {md.value(level)}"
    return [where, md.value(latent_dim), error, *(of_label.get(label, "–") for label in labels)]


def _neighbour_sentence(pca: pd.DataFrame) -> str:
    known = pca.dropna(subset=["knn_accuracy"]) if "knn_accuracy" in pca else pca.iloc[:0]
    if known.empty:
        return ""
    of_codes = ", ".join(
        f"{intervals.plain(row['knn_accuracy'])} ({drawing.latents(row['latent_dim'])})" for _, row in known.iterrows()
    )
    raw = intervals.plain(known["raw_knn_accuracy"].iloc[0])
    return f"k-NN accuracy, for comparison: PCA's codes {of_codes}; the raw inputs {raw}."


def _noise_headline(results: StudyResults) -> str:
    paired = _corrupted(results)
    return _tally(paired[paired["level"] > 0] if len(paired) else paired, "squared error on corrupted inputs")


# Published log-likelihoods


def _likelihood_section(results: StudyResults) -> str:
    """How near training came to the log-likelihood that a claim says can be reached."""
    tests = [claim.test for claim in results.study.claims if isinstance(claim.test, config.Bound)]
    test = next((test for test in tests if test.metric == BOUND and test.above is not None), None)
    if test is None or results.metrics.empty:
        return ""
    cells = results.metrics[[config.chooses(test.sides[0], row) for row in results.metrics.to_dict("records")]]
    curves = results.history.merge(cells[["cell_id", "seed"]], on="cell_id")
    reached = intervals.seed_interval(-cells.groupby("seed")[BOUND].mean())
    draws = results.study.evaluate.importance_samples
    caption = (
        f"−ELBO of validation images over training, a line for each seed; points: its bound for test images by {draws:,} "
        f"importance samples, {intervals.with_half_width(reached)} nats after {results.study.train.updates:,} updates; dashed: "
        "as published."
    )
    picture = figures.likelihood_curves(curves, (-cells[BOUND]).tolist(), -test.above)
    return md.join("### Towards the published log-likelihood", results.gallery.show("likelihood", picture, caption))


# Noise in training, and properties of the data


def _training_noise_section(results: StudyResults) -> str:
    """Errors on inputs as noisy as in training, from clean and from noisy images."""
    columns = [f"matched/mse_{target}" for target in ("clean", "noisy")]
    if not set(columns) <= set(results.metrics) or results.metrics["train_noise"].nunique() < 2:
        return ""
    table, fixed = results.slice(results.metrics, keep=("latent_dim", "train_noise"))
    targets = [table.assign(target=column.removeprefix("matched/mse_"), mse=table[column]) for column in columns]
    summary = intervals.summarise(pd.concat(targets), ["target", "train_noise", "latent_dim", "arm", "beta"], ["mse"])
    caption = "Squared error on test inputs as noisy as those of training, with 95% bands over seeds."
    picture = results.gallery.show(
        "training-noise", figures.noise_curves(summary, "mse", "squared error per dimension"), caption
    )
    return md.join("### Noise in training", _note(fixed), picture)


def _data_axes_section(results: StudyResults) -> str:
    """The error over two properties of the data, beside the plain AE's."""
    axes = list(results.study.data.axes)
    if len(axes) != 2 or results.metrics.empty or intervals.CONTROL not in set(results.metrics["arm"]):
        return ""
    table, fixed = results.slice(results.metrics, keep=axes)
    summary = intervals.summarise(table, [*axes, "arm", "beta"], ["test/mse"])
    caption = "Squared error on clean test data over two properties of the training data, means over seeds."
    picture = figures.outlier_map(summary, axes[1], axes[0], "test/mse", "Squared error")
    return md.join("### Over the data's properties", _note(fixed), results.gallery.show("data-axes", picture, caption))


# Pruning


def _prune_section(results: StudyResults) -> str:
    if results.counts.empty or results.columns.empty:
        return ""
    heading = md.join("### Which latent dimensions are used", CANCELLING)
    if TRUTH not in results.counts:
        counts, fixed = _few_series(*results.slice(results.counts))
        return md.join(heading, _note(fixed), _counts_table(counts, "latent_dim"))
    cancelled = [_cancel_sentence(*item) for item in _by_arm(results.columns)]
    tables = [
        _few_series(*results.slice(t, keep=("latent_dim", TRUTH))) for t in (results.columns, results.counts, results.ablation)
    ]
    columns, counts, ablation = (table for table, _ in tables)
    return md.join(
        heading,
        _note(tables[0][1]),
        md.bullets([*_ablation_findings(ablation), *cancelled]),
        _prune_figures(results.gallery, columns, counts, ablation),
        _counts_table(counts, TRUTH),
    )


def _few_series(table: pd.DataFrame, fixed: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """With many arms and β, only the β nearest to 1 of each arm."""
    if table[["arm", "beta"]].drop_duplicates().shape[0] <= MOST_SERIES:
        return table, fixed
    distance = table["beta"].astype(float).map(lambda beta: 0.0 if math.isnan(beta) else abs(math.log(max(beta, 1e-12))))
    return table[distance == distance.groupby(table["arm"]).transform("min")], [*fixed, "the β nearest to 1 of each arm"]


def _prune_figures(gallery: Gallery, columns: pd.DataFrame, counts: pd.DataFrame, ablation: pd.DataFrame) -> str:
    summary = intervals.summarise(counts, ["arm", "beta", TRUTH], list(COUNTS))
    curves = intervals.summarise(ablation, ["arm", "beta", "latent_dim", TRUTH, "criterion", "zeroed"], ["mse"])
    used = "Dimensions counted as used against the true dimension of the data, with 95% intervals over seeds."
    scree = "Columns of the first decoder layer, and what each dimension carries, sorted within each cell; means over seeds."
    taken = (
        "Squared error as dimensions are taken away in each criterion's order, with 95% bands; ring: the true number is left. "
        "What is taken away stands at the prior's mean, or at its code's where no prior holds that."
    )
    return md.join(
        gallery.show("dimensions", figures.used_dimensions(summary, TRUTH, COUNTS), used),
        gallery.show("scree", figures.scree(columns, TRUTH), scree),
        gallery.show("ablation", figures.ablation(curves, TRUTH), taken),
    )


def _counts_table(counts: pd.DataFrame, axis: str) -> str:
    """How many latents are used by which measure, a line for each arm, β and value of an axis."""
    counted = {**COUNTS, "cancelled": "cancelling columns"}
    summary = intervals.summarise(counts, ["arm", "beta", axis], list(counted))
    rows = [
        [drawing.arm_label(row["arm"], row["beta"]), md.value(row[axis]), *(_mean(row, name) for name in counted)]
        for _, row in summary.iterrows()
    ]
    return md.table(["arm", "true dimension" if axis == TRUTH else md.words(axis), *counted.values()], rows)


def _ablation_findings(ablation: pd.DataFrame) -> list[str]:
    """How often the error stays as it was with only the true number of dimensions left."""
    found = []
    for label, rows in _by_arm(ablation):
        kept = [
            f"{_kept(group)} by {figures.CRITERIA.get(name, name)}" for name, group in rows.groupby("criterion", sort=False)
        ]
        found.append(
            f"{label}: with only the true number of dimensions kept, the error grows by at most 5% in {', '.join(kept)}."
        )
    return found


def _kept(group: pd.DataFrame) -> str:
    whole = group[group["zeroed"] == 0].set_index("cell_id")["mse"]
    pruned = group[group["zeroed"] == group["latent_dim"] - group[TRUTH]].set_index("cell_id")["mse"]
    return f"{int((pruned <= SAME_ERROR * whole.reindex(pruned.index)).sum())} of {len(pruned)} cells"


def _cancel_sentence(label: str, columns: pd.DataFrame) -> str:
    cancels, active = columns["cancels"].astype(bool), columns["active"].astype(bool)
    counts = f"{md.count(cancels.sum())} of {md.count(len(columns))} columns"
    return f"{label}: the column sum cancels in {counts}, {md.count((cancels & active).sum())} of them of active units."


def _count_headlines(results: StudyResults) -> list[str]:
    if results.counts.empty or TRUTH not in results.counts:
        return []
    found = []
    for label, rows in _by_arm(results.counts):
        hits = [f"{name} in {int((rows[m] == rows[TRUTH]).sum())}" for m, name in COUNTS.items() if rows[m].notna().any()]
        found.append(f"{label}: of {len(rows)} cells, the true dimension is told by {', '.join(hits)}.")
    return found


# Shared parts


def _by_arm(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    for (arm, beta), rows in table.groupby(["arm", "beta"], dropna=False, sort=False):
        yield drawing.arm_label(arm, beta), rows


def _difference(row: pd.Series) -> intervals.Interval:
    return intervals.Interval(row["difference"], row["low"], row["high"], int(row["seeds"]))


def _mean(row: pd.Series, metric: str) -> str:
    return intervals.with_half_width(
        intervals.Interval(row[metric], row[f"{metric} low"], row[f"{metric} high"], row.get("cells", 0))
    )


def _noise(kind: str) -> str:
    return md.escape(figures.NOISE_LABELS.get(kind, kind))


def _note(fixed: list[str]) -> str:
    return f"This section is about {', '.join(fixed)}; the tables in `runs/` have the rest." if fixed else ""
