"""The report: equal tables give equal bytes, and whatever is missing or broken is said, never fatal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from ruamel.yaml import YAML

from pipeline import artifacts, config, drawing, figures, grid, intervals
from pipeline.stages import report

UNIFORM = """
title: "Plane | <b>bold</b> & more"
data: {name: uniform2d}
model: {hidden: [30, 30], likelihood: gaussian}
grid:
  latent_dim: [1, 2]
  l2: [0, 1e-2, 0.25]
  seed: [0, 1, 2, 3, 4]
  arms: {vae: {beta: [5e-4, 5e-3, 5e-2]}, ae: {}}
train: {updates: 400}
evaluate: {}
claims:
  - id: 004-a
    source: "004, 3.2 Results"
    says: More λ | worse <b>errors</b>.
    test: {kind: monotone, metric: test/mse, over: l2, direction: up, where: {arm: vae}}
  - {id: check, source: none, says: It does not fall., control: true, test: {kind: bound, metric: test/mse, above: 0}}
  - id: steadier
    source: ours
    says: λ costs the VAE less.
    test: {kind: interaction, metric: test/mse, where: {arm: vae, l2: 0.25}, against: {arm: ae}, base: {l2: 0}, direction: down}
  - id: density
    source: ours
    says: The density is high.
    test: {kind: bound, metric: test/iw_bound, above: -1.5, where: {arm: vae, beta: 5e-3, latent_dim: 2, l2: 0}}
"""
DIGITS = """
title: Rate, distortion and robustness on 5,000 real digits
data: {name: digits5k}
model: {hidden: [400, 256, 128], likelihood: bernoulli}
grid:
  latent_dim: [2, 8]
  l2: [0, 1e-5]
  seed: [0, 1, 2]
  arms: {vae: {beta: [1, 4]}, ae: {}}
train: {updates: 1200}
evaluate:
  noise:
    - {kind: sparse_abs_gaussian, levels: [0, 0.1, 0.3, 0.5]}
    - {kind: gaussian, levels: [0, 0.1, 0.3, 0.5]}
    - {kind: salt_and_pepper, levels: [0, 0.05, 0.1, 0.2]}
"""
PRUNING = """
title: Does a VAE use as many dimensions as its data have?
data: {name: manifold, features: 50, axes: {manifold_dim: [1, 2, 3, 6]}}
model: {hidden: [100, 100], likelihood: gaussian}
grid:
  latent_dim: [20]
  seed: [0, 1, 2]
  arms: {vae: {beta: [1]}, ae: {}}
train: {updates: 800}
evaluate: {}
"""
SEARCH = """
title: "Which | weight?"
study: digits
space: {beta: {low: 0.05, high: 20}, latent_dim: 8}
objectives:
  - {metric: validation/reconstruction, direction: down}
  - {metric: validation/kl, direction: down}
winner: {goal: {metric: validation/bce_elbo, direction: up}}
trials: 24
batch: 8
"""


def workspace(folder: Path, **studies: str) -> None:
    """Writes params.yaml, configs and every table of the given studies, as the stages would."""
    studies = studies or {"uniform2d": UNIFORM, "digits": DIGITS, "pruning": PRUNING}
    searches = {"kl_weight": "digits"} if "digits" in studies else {}
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for name, text in {**studies, **({"kl_weight": SEARCH} if searches else {})}.items():
        (folder / "configs" / f"{name}.yaml").write_text(text)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump({"studies": list(studies), "searches": searches}, file)
    for name in studies:
        _write_study(folder, name)
    for name in searches:
        _write_search(folder, name)


def _write_study(folder: Path, name: str) -> None:
    study = config.load_study(name, folder / "configs")
    rng, cells = np.random.default_rng(0), grid.cells(study)
    folders, image = artifacts.Folders(name), study.data.name == "digits5k"
    features = 784 if image else study.data.options.get("features", 2)
    points = grid.data_points(study.data)
    hashes = [f"{index:064x}" for index in range(len(points))]
    datasets = [
        {"point": point, "file": f"{k}.safetensors", "sha256": hashes[k], "rows": {"train": 80, "validation": 10, "test": 10}}
        for k, point in enumerate(points)
    ]
    describe = {"name": study.data.name, "options": study.data.options, "image_shape": [28, 28] if image else None}
    describe |= {
        "features": features,
        "unit_range": image,
        "labels": list("0123456789") if image else None,
        "datasets": datasets,
    }
    artifacts.write_json(folder / folders.prepared / "describe.json", describe)
    rows = [{"cell_id": f"{name}{index:08d}", **cell.row()} for index, cell in enumerate(cells)]
    done = {"status": "finished", "diverged_at": None, "updates": study.train.updates, "validation_loss": 100.0}
    manifest = [
        {**row, "dataset": cell.dataset, "data_hash": hashes[cell.dataset], **done, "unconverged": index % 17 == 3}
        | {"evaluated_update": study.train.updates - 10 * row["seed"]}
        for index, (row, cell) in enumerate(zip(rows, cells, strict=True))
    ]
    artifacts.write_table(folder / folders.train / "manifest.csv", pd.DataFrame(manifest))
    about = {"study": name, "title": study.title, "cells": len(cells), "parameters": 1_234_567, "device": "cpu"}
    about |= {"torch": "2.14.1+cpu", "precision": "float32", "engine_version": 1, "keep": study.train.keep}
    artifacts.write_json(folder / folders.train / "about.json", about)
    _write_metrics(folder / folders.evaluate, study, manifest, rng)
    _write_history(folder / folders.train, study, rows, rng)
    _write_noise(folder / folders.evaluate, study, rows, rng)
    _write_prune(folder / folders.prune, study, rows, rng)
    _write_codes(folder / folders.evaluate, study, rows, image)


def _beta(row: dict) -> float:
    return 0.0 if row["beta"] is None else row["beta"]


def _metrics(row: dict, study: config.Study, rng: np.random.Generator) -> dict:
    strength = np.log1p(_beta(row) * (1 if study.model.likelihood == "bernoulli" else 100))
    shrink = 1 / (1 + 3 * strength + 40 * row["l2"])
    capacity = row["latent_dim"] ** 0.5
    wobble = 1 + 0.01 * rng.normal()
    vae = row["arm"] != "ae"
    kl = 7 * capacity * shrink * wobble if vae else None
    return {
        "test/reconstruction": (150 - 40 * capacity * shrink) * wobble,
        "test/mse": 0.05 / (0.5 + capacity * shrink) * wobble,
        "test/kl": kl,
        "test/bce_elbo": None,
        "test/active_units": row["latent_dim"] * (1 if shrink > 0.2 else 0),
        "test/knn_accuracy": 0.9 * wobble if study.data.name == "digits5k" else None,
        "gap/mse": 0.001 * wobble,
        "test/iw_bound": -2 * wobble if study.data.name == "uniform2d" and vae else None,
        "test/near_0": 0.05 * shrink,
        "boots/axis_alignment": None,
    }


def _write_metrics(folder: Path, study: config.Study, manifest: list[dict], rng: np.random.Generator) -> None:
    columns = ["cell_id", *grid.cells(study)[0].row(), "unconverged"]
    table = [{**{key: row[key] for key in columns}, **_metrics(row, study, rng)} for row in manifest]
    artifacts.write_table(folder / "metrics.csv", pd.DataFrame(table))


def _write_history(folder: Path, study: config.Study, rows: list[dict], rng: np.random.Generator) -> None:
    updates = np.linspace(study.train.updates / 40, study.train.updates, 40).astype(int)
    table = []
    for row in rows:
        level = 90 + 8 * np.log1p(_beta(row)) + rng.normal()
        losses = level + 80 * np.exp(-6 * updates / study.train.updates) + 0.4 * rng.normal(size=40)
        table += [{"cell_id": row["cell_id"], "update": u, "validation_loss": v} for u, v in zip(updates, losses, strict=True)]
    artifacts.write_table(folder / "history.csv", pd.DataFrame(table))


def _write_noise(folder: Path, study: config.Study, rows: list[dict], rng: np.random.Generator) -> None:
    header = ["cell_id", *grid.cells(study)[0].row(), "noise", "level", "mse_clean", "mse_noisy"]
    table, pca = [], []
    for row in rows:
        for noise in study.evaluate.noise:
            for level in noise.levels:
                slope = 0.08 if row["arm"] == "ae" else 0.05 / (1 + 0.1 * _beta(row))
                base = 0.04 / row["latent_dim"] ** 0.3 + 0.003 * _beta(row)
                error = base + slope * level + 0.001 * rng.normal()
                table.append({**row, "noise": noise.kind, "level": level, "mse_clean": error, "mse_noisy": error + level})
    for latent_dim in study.grid.latent_dim:
        raw = {"raw_knn_accuracy": 0.94}
        pca.append({"latent_dim": latent_dim, "noise": None, "level": 0, "mse_clean": 0.06, "knn_accuracy": 0.5, **raw})
        for noise in study.evaluate.noise:
            pca += [
                {"latent_dim": latent_dim, "noise": noise.kind, "level": v, "mse_clean": 0.06 + 0.04 * v} for v in noise.levels
            ]
    noise = pd.DataFrame(table, columns=header)
    artifacts.write_table(folder / "noise.csv", noise)
    artifacts.write_table(folder / "pca.csv", pd.DataFrame(pca))
    same = [*study.data.axes, "latent_dim", "l2", "sigma2", "learning_rate", "noise", "level"]
    clean = artifacts.read_table(folder / "metrics.csv").rename(columns={"test/mse": "mse_clean"})
    both = [table.reindex(columns=header) for table in (clean.assign(noise="clean", level=0.0), noise)]
    artifacts.write_table(folder / "paired.csv", intervals.paired_table(pd.concat(both), same, "mse_clean"))


def _write_prune(folder: Path, study: config.Study, rows: list[dict], rng: np.random.Generator) -> None:
    columns, curves, counts = [], [], []
    for row in rows:
        latents, true = row["latent_dim"], row.get("manifold_dim", row["latent_dim"])
        used = rng.permutation(latents) < (min(latents, true + (true > 5)) if row["arm"] == "vae" else latents)
        norms = np.where(used, 2 + rng.random(latents), 0.05 * rng.random(latents) + (row["arm"] == "ae"))
        sums = norms * rng.random(latents) * 3
        kl = np.where(used, 2.5 + rng.random(latents), 0.01) if row["arm"] == "vae" else np.full(latents, np.nan)
        for k in range(latents):
            sizes = {
                "column_sum": sums[k],
                "column_l1": 4 * norms[k],
                "column_l2": norms[k],
                "cancels": sums[k] < 0.4 * norms[k],
            }
            carried = {"kl": kl[k], "mean_variance": float(used[k]), "active": bool(used[k])}
            columns.append({**row, "latent": k, **sizes, **carried})
        for criterion, values in {"column_sum": sums, "column_l2": norms, "kl": kl}.items():
            if not np.isnan(values).all():
                lost = np.concatenate([[0], np.cumsum(used[np.argsort(values)] * 0.1)])
                curves += [{**row, "criterion": criterion, "zeroed": k, "mse": 0.02 + v} for k, v in enumerate(lost)]
        elbows = {"elbow_column_sum": used.sum() - 1, "elbow_column_l2": used.sum()}
        elbows["elbow_kl"] = used.sum() if row["arm"] == "vae" else None
        counts.append({**row, "active_units": used.sum(), **elbows, "cancelled": 2})
    artifacts.write_table(folder / "columns.csv", pd.DataFrame(columns))
    artifacts.write_table(folder / "ablation.csv", pd.DataFrame(curves))
    artifacts.write_table(folder / "summary.csv", pd.DataFrame(counts))


def _write_codes(folder: Path, study: config.Study, rows: list[dict], image: bool) -> None:
    pictured = pd.DataFrame(rows).drop_duplicates(["arm", *study.data.axes, *grid.AXES])
    artifacts.write_table(folder / "pictured.csv", pictured)
    curve = {"variance_ratio": 0.3 / np.arange(1, 9), "mse": 0.07 * 0.8 ** np.arange(8)}
    artifacts.write_table(folder / "components.csv", pd.DataFrame({"components": range(1, 9), **curve}))
    draw, labels = torch.Generator().manual_seed(0), torch.arange(40) % 10
    for name, latent_dim in [("pca", 2), *pictured[["cell_id", "latent_dim"]].itertuples(index=False)]:
        x = torch.rand(40, 784 if image else 2, generator=draw)
        content = {"codes": torch.randn(40, latent_dim, generator=draw), "x": x, "reconstructions": 0.9 * x, "labels": labels}
        if image:
            content |= {
                "interpolation": x[:33].clone().unflatten(0, (3, 11)),
                "samples": x[:36].clone(),
                "manifold": x[:36].clone(),
            }
        artifacts.write_tensors(folder / "codes" / f"{name}.safetensors", content)


def _write_search(folder: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    beta = np.exp(rng.uniform(np.log(0.05), np.log(20), 24))
    rate = 25 / (1 + beta) ** 0.7
    distortion = 80 + 60 * np.exp(-rate / 10) + np.abs(rng.normal(size=24))
    front = [not any((rate < r) & (distortion < d)) for r, d in zip(rate, distortion, strict=True)]
    goals = {"validation/reconstruction": distortion, "validation/kl": rate}
    fixed = {"arm": "vae", "latent_dim": 8, "l2": 0.0, "sigma2": None, "learning_rate": 1e-3, "updates": 400}
    found = {"beta": beta, **goals, "on_front": front, "batch": np.arange(24) // 8, "best": np.arange(24) == 3}
    named = {"trial": range(24), "cell_id": [f"t{k:07d}" for k in range(24)], "state": "complete", "unconverged": False}
    table = pd.DataFrame({**named, **found}).assign(**fixed)
    table.loc[5, ["state", *goals, "on_front"]] = ["failed", np.nan, np.nan, False]
    path = folder / artifacts.Folders(name).search
    artifacts.write_table(path / "trials.csv", table)
    artifacts.write_table(path / "rungs.csv", pd.DataFrame(columns=["trial", "update", *goals]))
    weights = [{"goal": goal, "setting": "beta", "importance": 1.0} for goal in goals]
    artifacts.write_table(path / "importances.csv", pd.DataFrame(weights))
    sides = [
        {"side": side, "cell_id": f"{side}{seed}", "seed": seed, "beta": 1.0, **fixed, "test/reconstruction": 90.0 + seed,
         "test/kl": 8.0, "test/bce_elbo": -98.0 + shift * seed}
        for side, shift in (("search", 1.0), ("grid", 0.5)) for seed in (1, 2, 3)
    ]  # fmt: skip
    artifacts.write_table(path / "winner.csv", pd.DataFrame(sides))
    finals = [
        {
            "side": side,
            "place": place,
            "cell_id": f"{side}{place}{seed}",
            "seed": seed,
            "beta": beta,
            "score": score + seed,
            **fixed,
        }
        for side, place, beta, score in (("search", 0, 2.0, -110.0), ("search", 1, 3.0, -109.0), ("grid", 0, 1.0, -112.0))
        for seed in (6, 7, 8)
    ]
    finals[1]["score"] = np.nan
    artifacts.write_table(path / "finalists.csv", pd.DataFrame(finals))
    about = {"search": name, "title": "t", "study": "digits", "sampler": "tpe", "trials": 24, "updates": 400, "rungs": []}
    about |= {"device": "cpu", "updates_spent": 9600, "finalist_updates": 3600, "grid_cells": 6, "grid_updates": 9000}
    artifacts.write_json(path / "about.json", about)


TINY = """
title: "Bars | <b>bold</b> & `ticks`\\n# no heading"
data: {name: uniform2d}
model: {hidden: [4], likelihood: gaussian}
grid: {latent_dim: [2], seed: [0, 1, 2], arms: {vae: {beta: [0.01, 0.1]}, ae: {}}}
train: {updates: 100}
evaluate: {noise: [{kind: gaussian, levels: [0, 0.1]}]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where figures are made but not rendered: that is most of a report's time."""
    monkeypatch.chdir(tmp_path)
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: save(Figure(figsize=(0.1, 0.1)), path))
    return tmp_path


def _written() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("reports").rglob("*")) if path.is_file()}


def _text() -> str:
    return Path("reports/report.md").read_text(encoding="utf-8")


def _edit(name: str, table: str, change) -> None:
    path = Path("runs") / name / table
    artifacts.write_table(path, change(artifacts.read_table(path)))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a report on all three default studies, after checking that a second one has the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("full"))
        workspace(Path())
        report.run()
        first = _written()
        shutil.rmtree("reports")
        report.run()
        assert _written() == first
    return first


def test_every_section_is_there(full: dict[str, bytes]):
    text = full["reports/report.md"].decode()
    for heading in ("What was run", "Cells to be wary of", "Training", "The runs in MLflow", "Versions and data", "kl_weight"):
        assert f"\n## {heading}\n" in text
    for heading in ("Rate and distortion", "Robustness against the plain AE", "Which latent dimensions are used"):
        assert f"\n### {heading}\n" in text


def test_the_report_opens_with_the_ledger(here: Path):
    """Undecided, because some of these cells are unconverged; without them it is decided."""
    workspace(here, uniform2d=UNIFORM)
    report.run()
    assert _text().index("## The ledger") < _text().index("## What was run")
    row = next(line for line in _text().splitlines() if line.startswith("| [004-a](#claims-of-uniform2d) |"))
    assert "More λ \\| worse &lt;b&gt;errors&lt;/b&gt;." in row and re.search(
        r"\*undecided\*: .*of \d+ cells \d+ did not converge", row
    )
    assert "\n### Claims of uniform2d\n" in _text()
    for table in ("train/manifest.csv", "evaluate/metrics.csv"):
        _edit("uniform2d", table, lambda rows: rows.assign(unconverged=False))
    report.run()
    assert "They come out as they must." in _text() and "**supported**" in _text()


def test_an_interaction_is_told_as_a_change(here: Path):
    workspace(here, uniform2d=UNIFORM)
    report.run()
    assert "of arm ae, λ 0.25 (averaged over latents 1, 2), each as its change from λ 0." in _text()


def test_what_a_claim_compares_names_no_axis_that_its_cells_lack(here: Path):
    claims = """
  - {id: one, source: x, says: y, test: {kind: difference, metric: test/mse, where: {arm: vae, beta: 5e-3}, against: {arm: ae}, direction: up}}
  - {id: two, source: x, says: y, test: {kind: monotone, metric: test/mse, over: beta, direction: up, where: {l2: 0}}}
"""  # noqa: E501
    workspace(here, uniform2d=UNIFORM + claims.removeprefix("\n"))
    report.run()
    assert "of arm vae, β 0.005 (averaged over latents 1, 2, λ 0, 0.01, 0.25) against `test/mse` of arm ae (averaged" in _text()
    assert "`test/mse` of λ 0 (averaged over latents 1, 2), over β." in _text()


@pytest.mark.parametrize("l2", ["[0, 1e-5]", "[0]"])
def test_a_threshold_of_a_weight_is_told_only_of_several(here: Path, l2: str):
    workspace(here, digits=DIGITS.replace("[0, 1e-5]", l2))
    report.run()
    assert ("no unit is active in any seed from λ = 0 at β = 4 on" in _text()) == (l2 != "[0]")


def test_clean_and_corrupted_inputs_each_have_their_line(full: dict[str, bytes]):
    said = re.findall(r"^- `digits`: in squared error on (\w+) inputs, ", full["reports/report.md"].decode(), re.MULTILINE)
    assert said == ["clean", "corrupted"]


def test_the_likelihood_is_that_of_the_claims_own_cells(here: Path, monkeypatch: pytest.MonkeyPatch):
    drawn, draw = [], figures.likelihood_curves
    monkeypatch.setattr(figures, "likelihood_curves", lambda *data: drawn.append(data) or draw(*data))
    workspace(here, uniform2d=UNIFORM)
    report.run()
    ((curves, reached, published),) = drawn
    assert (len(reached), curves["cell_id"].nunique(), published) == (5, 5, 1.5)
    assert "### Towards the published log-likelihood" in _text()


def test_a_claim_that_cannot_be_read_leaves_the_old_report(here: Path):
    workspace(here, uniform2d=UNIFORM)
    report.run()
    before = {path: path.read_bytes() for path in (here / "reports").rglob("*.*")}
    (here / "configs" / "twin.yaml").write_text(UNIFORM)
    with (here / "params.yaml").open("a") as file:
        file.write("scales: {full: {studies: [twin]}}\n")
    with pytest.raises(config.ConfigError, match="uniform2d has a claim '004-a' too"):
        report.run()
    assert before == {path: path.read_bytes() for path in (here / "reports").rglob("*.*")}


def test_a_claim_of_a_study_that_does_not_run_is_listed(here: Path):
    workspace(here, tiny=TINY)
    (here / "configs" / "uniform2d.yaml").write_text(UNIFORM)
    with (here / "params.yaml").open("a") as file:
        file.write("scales: {full: {studies: [uniform2d]}}\n")
    report.run()
    assert "- 004-a (`uniform2d`): More λ" in _text() and "<summary>1 not run</summary>" in _text()


def test_identities_and_errata_are_shown(full: dict[str, bytes]):
    text = full["reports/report.md"].decode()
    assert "\n## Identities and errata\n" in text and "**fails**" not in text
    assert "003, KL Divergence: Mathematical Formulation: The KL divergence has lost its sign." in text


def test_every_picture_is_shown_once_small_and_described(full: dict[str, bytes]):
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", full["reports/report.md"].decode())
    on_disk = {path.removeprefix("reports/"): content for path, content in full.items() if path.endswith(".png")}
    assert sorted(path for _, path in shown) == sorted(on_disk) and len(shown) <= 24
    assert all(len(alternative) > 20 for alternative, _ in shown)
    assert max(map(len, on_disk.values())) < 150_000


def test_tables_are_narrow(full: dict[str, bytes]):
    lines = full["reports/report.md"].decode().splitlines()
    widths = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines if line.startswith("|")}
    assert max(widths) <= 9


def test_a_removed_study_leaves_no_trace(here: Path):
    workspace(here, stays=TINY, gone=TINY)
    report.run()
    assert "`gone`" in _text() and any("gone" in name for name in _written())
    workspace(here, stays=TINY)
    report.run()
    assert "gone" not in _text() and not any("gone" in name for name in _written())


def test_diverged_and_missing_cells_are_listed(here: Path):
    workspace(here, tiny=TINY)
    manifest = artifacts.read_table(Path("runs/tiny/train/manifest.csv"))
    diverged, lost = manifest["cell_id"][0], manifest["cell_id"][4]

    def diverge(table: pd.DataFrame) -> pd.DataFrame:
        table["diverged_at"] = table["diverged_at"].astype(float)
        table.loc[table["cell_id"] == diverged, ["status", "diverged_at"]] = ["diverged", 37]
        return table[table["cell_id"] != lost]

    _edit("tiny", "train/manifest.csv", diverge)
    _edit("tiny", "evaluate/metrics.csv", lambda table: table[~table["cell_id"].isin([diverged, lost])])
    report.run()
    assert "| `tiny` | diverged | VAE, β = 0.01 | 0 | 37 |" in _text()
    assert "| `tiny` | missing | VAE, β = 0.1 | 1 | – |" in _text()
    assert "VAE, β = 0.01 (2 seeds)" in _text()
    assert "| `uniform2d` | 9 | 3 | 100 | 1,234,567 | 1 | 1 | 1 |" in _text()


def test_a_study_whose_cells_all_diverged_still_gives_a_report(here: Path):
    workspace(here, tiny=TINY)
    _edit("tiny", "train/manifest.csv", lambda table: table.assign(status="diverged", diverged_at=3, unconverged=False))
    evaluated = ("metrics", "noise", "pca", "paired", "pictured", "components")
    for name in (*(f"evaluate/{t}.csv" for t in evaluated), "prune/columns.csv", "prune/ablation.csv", "prune/summary.csv"):
        _edit("tiny", name, lambda table: table.iloc[:0])
    _edit("tiny", "train/history.csv", lambda table: table.assign(validation_loss=np.inf))
    report.run()
    assert "No cell was evaluated" in _text() and "| `tiny` | diverged | plain AE | 0, 1, 2 | 3 |" in _text()


@pytest.mark.parametrize("left", ["grid", "search", "neither"])
def test_a_side_that_diverged_on_every_seed_still_gives_a_report(here: Path, left: str):
    workspace(here, digits=DIGITS)
    _edit("kl_weight", "search/winner.csv", lambda rows: rows[rows["side"] == left])
    report.run()
    lost = "On seeds 1, 2, 3, 4, 5 it diverged, so nothing is known of it on the test set."
    assert (lost in _text()) == (left != "search")
    unmeasured = "no setting of the grid was measured on these seeds to compare it with."
    assert (unmeasured in _text()) == (left == "search")


UP = "{metric: validation/bce_elbo, direction: up}"
DOWN = "{metric: validation/reconstruction, direction: down}"


@pytest.mark.parametrize(
    ("goal", "column", "label"),
    [
        (UP, "test/bce_elbo", "−(cross-entropy + KL) (nats)"),
        (DOWN, "test/reconstruction", "reconstruction (nats)"),
    ],
)
@pytest.mark.parametrize(
    ("gains", "winner", "interval", "with_up", "with_down"),
    [
        ((2.0, 2.5, 3.0), "14 ± 4", "2.5 [1.3, 3.7]", "beats", "loses to"),
        ((-2.0, -2.5, -3.0), "8.5 ± 1.2", "−2.5 [−3.7, −1.3]", "loses to", "beats"),
        ((-1.0, 2.0, 2.0), "12 ± 7", "1 [−3, 5]", "does not differ from", "does not differ from"),
    ],
)
def test_a_winners_gain_is_winner_minus_grid_by_seed(
    here: Path, goal, column, label, gains, winner, interval, with_up, with_down
):
    workspace(here, digits=DIGITS)
    (here / "configs" / "kl_weight.yaml").write_text(SEARCH.replace(UP, goal))

    def decide(sides: pd.DataFrame) -> pd.DataFrame:
        values = [10.0, 11.0, 12.0]
        gained = [value + gain for value, gain in zip(values, gains, strict=True)]
        return sides.assign(**{column: gained + values})[::-1]

    _edit("kl_weight", "search/winner.csv", decide)
    report.run()
    verdict = f"{with_up if goal == UP else with_down} the grid's best"
    assert f"On the test set, with seeds 1, 2, 3, it {verdict}: {interval} in {label}." in _text()
    assert f"`kl_weight`: {verdict} in {label}, {interval}, on the test set." in _text()
    (row,) = (line for line in _section().splitlines() if line.startswith(f"| {label} |"))
    assert row == f"| {label} | {winner} | 11.0 ± 2.5 | {interval} |"


def test_seeds_that_only_one_side_has_are_no_part_of_the_gain(here: Path):
    workspace(here, digits=DIGITS)
    _edit("kl_weight", "search/winner.csv", lambda sides: sides[(sides["side"] != "search") | (sides["seed"] != 3)])
    report.run()
    assert "On the test set, with seeds 1, 2, it does not differ from the grid's best: 0.8 [−2.4, 3.9]" in _text()


@pytest.mark.parametrize(("goal", "order"), [(UP, ["3", "1", "2"]), (DOWN, ["1", "3", "2"])])
def test_finalists_are_ranked_by_their_means_and_one_without_a_value_is_last(here: Path, goal: str, order: list[str]):
    workspace(here, digits=DIGITS)
    (here / "configs" / "kl_weight.yaml").write_text(SEARCH.replace(UP, goal))
    report.run()
    rows = {beta: row for row in _section().splitlines() for beta in re.findall(r"^\| (?:search|grid) \| VAE, β = (\d)", row)}
    assert list(rows) == order
    assert rows["3"].startswith("| search") and rows["3"].endswith("| −102.0 ± 2.5 |")
    assert rows["1"].startswith("| grid") and rows["1"].endswith("| −105.0 ± 2.5 |")
    assert rows["2"].startswith("| search") and rows["2"].endswith("| no value on 1 of 3 seeds |")
    highest = f"{'highest' if goal == UP else 'lowest'} {'−(cross-entropy + KL)' if goal == UP else 'reconstruction'} (nats)"
    chosen = f"of the 2 best trials the one with the {highest} on validation data, in the mean over seeds 6, 7, 8."
    assert chosen in _section()
    assert re.search(rf"The grid's best is [^.]*\S+, with the {re.escape(highest)} on validation data\.", _section())


def _section() -> str:
    """The report's section about the search."""
    return _text().partition("\n## kl_weight\n")[2].partition("\n## ")[0]


def _of_grid(trials: pd.DataFrame) -> pd.DataFrame:
    """The first four trials as cells of the grid."""
    first = trials.index < 4
    return trials.assign(
        state=trials["state"].mask(first, "grid"), **{name: trials[name].mask(first) for name in ("trial", "batch")}
    )


def test_a_searchs_cost_stands_beside_the_whole_grids(here: Path):
    workspace(here, digits=DIGITS)
    _edit("kl_weight", "search/trials.csv", _of_grid)
    path = Path("runs/kl_weight/search/about.json")
    spent = {"updates_spent": 4000, "finalist_updates": 3500, "grid_updates": 9000, "updates": 400}
    artifacts.write_json(path, artifacts.read_json(path) | spent)
    report.run()
    assert (
        "*Outcome:* 19 trials were trained to the end, 0 left at a rung, 1 failed; 4 cells that `digits` had trained count as "
        "trials. 20 trials cost as much as 10 trainings to the end, the finalists of both sides 8.75 more; the 6 cells of "
        "`digits` cost 22.5."
    ) in _text()


@pytest.mark.parametrize("size", [4, 23])
def test_the_fronts_table_is_the_front(here: Path, size: int):
    workspace(here, digits=DIGITS)
    _edit("kl_weight", "search/trials.csv", _of_grid)

    def choose(trials: pd.DataFrame) -> pd.DataFrame:
        chosen = trials.dropna(subset="validation/kl").iloc[:: 6 if size == 4 else 1].index
        return trials.assign(on_front=trials.index.isin(chosen))

    _edit("kl_weight", "search/trials.csv", choose)
    report.run()
    edge = artifacts.read_table(Path("runs/kl_weight/search/trials.csv")).query("on_front").sort_values("validation/kl")
    assert len(edge) == size and set(edge["state"]) == {"grid", "complete"}
    shown = edge.iloc[:: 1 if size == 4 else 3]
    names = ["beta", "validation/reconstruction", "validation/kl"]
    wanted = [
        [{"grid": "grid", "complete": "search"}[state], *map(intervals.plain, numbers)]
        for state, numbers in zip(shown["state"], shown[names].itertuples(index=False), strict=True)
    ]
    said = "The front:" if size == 4 else "The front (one in 3 of its 23 trials):"
    header, _, *rows = _section().partition(f"{said}\n\n")[2].partition("\n\n")[0].splitlines()
    assert header == "| of | β | reconstruction (nats) | KL (nats) |"
    assert [line.strip("| ").split(" | ") for line in rows] == wanted


def test_a_figure_that_no_report_shows_any_more_goes_and_what_others_put_there_stays(here: Path):
    workspace(here, tiny=TINY)
    report.run()
    folder = Path("reports/figures")
    drawing.save(Figure(), folder / "gone-noise.png")
    (folder / ".all-training.png.x1.tmp").write_bytes(b"begun")
    Image.new("RGB", (2, 2)).save(folder / "mine.png")
    (folder / "notes.txt").write_text("mine")
    kept = set(folder.iterdir()) - {folder / "gone-noise.png", folder / ".all-training.png.x1.tmp"}
    report.run()
    assert set(folder.iterdir()) == kept


def test_empty_files_still_give_a_report(here: Path):
    workspace(here, tiny=TINY)
    for path in [*Path("runs/tiny").rglob("*.csv")]:
        artifacts.write_table(path, pd.DataFrame())
    report.run()
    assert "| `tiny` | missing | plain AE | 0, 1, 2 |\n" in _text()


@pytest.mark.parametrize(
    "arms",
    ["vae: {beta: [0.01, 0.1]}", "ae: {}", "ae_code_l2: {beta: [1]}, kl_only: {beta: [1, 2]}", "kl_only: {beta: [1]}"],
)
def test_any_choice_of_arms_gives_a_report(here: Path, arms: str):
    workspace(here, tiny=TINY.replace("vae: {beta: [0.01, 0.1]}, ae: {}", arms))
    report.run()
    assert ("There is no plain AE to compare with." in _text()) == (arms != "kl_only: {beta: [1]}")


@pytest.mark.parametrize("seeds", ["[0]", "[0, 1]"])
def test_few_seeds_are_no_error(here: Path, seeds: str):
    workspace(here, tiny=TINY.replace("[0, 1, 2]", seeds))
    report.run()
    assert "nan" not in _text().lower()
    assert ("does not measurably differ in" in _text()) == (seeds != "[0]")  # of one seed nothing is told


def test_more_axes_than_figures_have_are_fixed_and_said(here: Path):
    wide = TINY.replace("latent_dim: [2]", 'latent_dim: [2], sigma2: [1, "learned"], learning_rate: [1e-3, 1e-2]')
    workspace(here, tiny=wide.replace("name: uniform2d", "name: uniform2d, axes: {outliers: [0, 0.5]}"))
    report.run()
    assert "outliers = 0" in _text() and "σ² = 1" in _text() and "| `tiny` | missing" not in _text()


def test_free_text_cannot_break_the_markdown(here: Path):
    workspace(here, tiny=TINY)
    report.run()
    assert r"**Bars \| &lt;b&gt;bold&lt;/b&gt; &amp; \`ticks\` \# no heading**" in _text()


def test_a_verdict_follows_its_interval(here: Path):
    workspace(here, tiny=TINY.replace("levels: [0, 0.1]", "levels: [0, 0.1, 0.3]"))
    intervals = {0.0: (-0.3, -0.1), 0.1: (0.1, 0.3), 0.3: (-0.1, 0.2)}

    def decide(table: pd.DataFrame) -> pd.DataFrame:
        low, high = (table["level"].map(lambda level, side=side: intervals[level][side]) for side in (0, 1))
        return table.assign(difference=(low + high) / 2, low=low, high=high)

    _edit("tiny", "evaluate/paired.csv", decide)
    report.run()
    assert "beats at 0; loses at 0.1; does not differ at 0.3" in _text() and "0.3: 0.05 [−0.10, 0.20]" in _text()


def test_nothing_of_the_machine_is_in_the_report(here: Path):
    workspace(here, tiny=TINY)
    report.run()
    assert str(here) not in _text() and not re.search(r"20\d\d-\d\d-\d\d", _text())


def test_a_missing_table_names_the_stage_to_run(here: Path):
    workspace(here, tiny=TINY)
    Path("runs/tiny/prune/columns.csv").unlink()
    with pytest.raises(artifacts.ArtifactError, match=r"columns\.csv: is missing; run the stage"):
        report.run()
