"""The stages on a tiny study in a folder of its own, called as functions; `test_repro.py` runs them through DVC."""

import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from tiny import SEARCH, STUDY, drive, write

from pipeline import databases, tracking
from pipeline.artifacts import ArtifactError, CellStore, Folders, read_json, read_table, read_tensors
from pipeline.config import ConfigError, VaesweepError
from pipeline.executors import Inline, Interrupted
from pipeline.stages import clean, evaluate, plan, prepare, prune, search, train

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def test_train_writes_a_row_a_history_and_weights_for_every_cell(workspace):
    folder = Folders("tiny").train
    manifest, history = read_table(folder / "manifest.csv"), read_table(folder / "history.csv")
    assert len(manifest) == 8 and set(manifest["status"]) == {"finished"}
    assert set(history["cell_id"]) == set(manifest["cell_id"]) and len(history) == 80
    assert {path.stem for path in (folder / "weights").iterdir()} == set(manifest["cell_id"])
    assert read_json(folder / "about.json")["cells"] == 8


def test_adding_a_beta_trains_only_the_new_cells_and_removing_it_removes_its_rows(workspace):
    before = read_table(Folders("tiny").train / "manifest.csv")
    write(STUDY.replace("[1]}", "[1, 4]}"))
    train.run("tiny", drive)
    grown = read_table(Folders("tiny").train / "manifest.csv")
    assert set(drive.cells) == {4} and len(grown) == 12
    write()
    train.run("tiny", drive)
    assert drive.cells == []
    pd.testing.assert_frame_equal(read_table(Folders("tiny").train / "manifest.csv"), before)
    assert len(list((Folders("tiny").train / "weights").iterdir())) == 8


class Tracker(tracking.MemoryTracker):
    """Counts how often each run is written."""

    def __init__(self):
        super().__init__()
        self.written = Counter()

    def _write(self, experiment_id, run, change):
        super()._write(experiment_id, run, change)
        self.written[run.tags[tracking.KEY]] += 1

    def finished(self):
        return {key for key, run in dict(self.runs.get("tiny", {})).items() if run.status != tracking.WRITING}


@pytest.fixture
def tracker(workspace, monkeypatch):
    """What all publications of a test share, in a workspace in which nothing is trained, one stack after another."""
    shutil.rmtree(workspace / ".vaesweep")
    monkeypatch.setattr(train, "local_executor", Inline)
    tracker = Tracker()
    monkeypatch.setattr(tracking, "MlflowTracker", lambda: tracker)
    return tracker


def within_seconds(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def publishing():
    return [thread for thread in threading.enumerate() if thread.name == databases.THREAD]


def test_cells_are_published_while_others_train_and_never_again(tracker):
    write(STUDY.replace("seed: [0, 1]", "seed: [0]\n  learning_rate: [1.0e-3, 1.0e+30]"))
    seen = []

    def watch(name, advances):
        for advance in advances:
            if advance.cells_done < advance.cells:
                trained = set(CellStore())
                assert within_seconds(lambda trained=trained: tracker.finished() == trained)
                assert within_seconds(lambda: "tiny" in tracker.runs and "parent" in tracker.runs["tiny"])
                assert tracker.runs["tiny"]["parent"].status == tracking.WRITING
                seen.append(len(trained))

    train.run("tiny", watch)
    assert sorted(set(seen)) == [0, 4]
    assert not publishing()
    cells = read_table(Folders("tiny").train / "manifest.csv")
    assert Counter(cells["status"]) == {"finished": 4, "diverged": 4}
    assert tracker.written == Counter([*2 * ["parent"], *cells["cell_id"]]), "the parent as it begins and as it ends"
    assert tracker.finished() == {"parent", *cells["cell_id"]}


def test_a_grown_study_publishes_its_new_cells_and_its_parent(tracker):
    train.run("tiny", drive)
    evaluate.run("tiny")
    prune.run("tiny")
    before, trained = tracker.written.copy(), set(CellStore())
    write(STUDY.replace("[1]}", "[1, 4]}"))
    train.run("tiny", lambda name, advances: drive(name, advances) or within_seconds(lambda: len(tracker.finished()) == 12))
    assert tracker.written - before == Counter([*2 * ["parent"], *set(CellStore()).difference(trained)])


def test_an_interrupted_training_publishes_what_it_has_trained_and_the_next_one_the_rest(tracker):
    asked = []

    def watch(name, advances):
        for advance in advances:
            if advance.cells_done == 4:
                asked.append(within_seconds(lambda: len(tracker.finished()) == 4))

    with pytest.raises(Interrupted):
        train.run("tiny", watch, lambda: 15 if asked else None)
    assert not publishing()
    assert len(tracker.finished()) == 5 and len(list(CellStore())) == 4
    assert tracker.runs["tiny"]["parent"].status == "KILLED"
    train.run("tiny", drive)
    assert set(drive.cells) == {4}
    cells = read_table(Folders("tiny").train / "manifest.csv")["cell_id"]
    assert tracker.written == Counter([*4 * ["parent"], *cells]), "RUNNING, KILLED, RUNNING, FINISHED"
    assert tracker.finished() == {"parent", *cells}


def test_a_store_that_is_away_costs_one_line(tracker, monkeypatch, capsys):
    tried = []

    def away():
        tried.append(threading.current_thread().name)
        raise tracking.TrackingError("MLflow is on holiday")

    monkeypatch.setattr(tracker, "_session", away)
    train.run("tiny", lambda name, advances: drive(name, advances) or within_seconds(lambda: tried))
    assert set(tried) == {databases.THREAD, "MainThread"}
    assert len(read_table(Folders("tiny").train / "manifest.csv")) == 8
    assert capsys.readouterr().err == "not in MLflow yet: MLflow is on holiday; `vaesweep sync` uploads it later\n"


def test_a_thread_that_fails_leaves_everything_to_the_end(tracker, monkeypatch):
    session, failures = tracker._session, []

    def fails_in_threads():
        assert threading.current_thread() is threading.main_thread()
        return session()

    monkeypatch.setattr(tracker, "_session", fails_in_threads)
    monkeypatch.setattr(threading, "excepthook", failures.append)
    train.run("tiny", drive)
    assert [failure.exc_type for failure in failures] == [AssertionError]
    cells = read_table(Folders("tiny").train / "manifest.csv")["cell_id"]
    assert tracker.written == Counter(["parent", *cells])


@pytest.fixture(scope="module")
def evaluated_once(trained, tmp_path_factory):
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tracking, "MlflowTracker", tracking.MemoryTracker)
        for stage in (evaluate, prune):
            stage.run("tiny")
    return folder


@pytest.fixture
def evaluated(evaluated_once, monkeypatch):
    """Where the tiny study is evaluated and pruned, for tests that only read."""
    monkeypatch.chdir(evaluated_once)
    return evaluated_once


def test_evaluate_measures_every_cell(evaluated):
    folder = Folders("tiny").evaluate
    metrics, noise = read_table(folder / "metrics.csv"), read_table(folder / "noise.csv")
    assert len(metrics) == 8 and len(noise) == 8 * 2
    vae = metrics["arm"] == "vae"
    total = metrics["test/reconstruction"] + metrics["test/kl"]
    pd.testing.assert_series_equal(metrics["test/bce_elbo"][vae], -total[vae], check_names=False)
    assert metrics.loc[~vae, ["test/kl", "test/bce_elbo"]].isna().all().all()
    assert metrics["test/iw_bound"].isna().all()  # a grey pixel's cross-entropy is no likelihood
    clean_noise = noise[noise["level"] == 0].set_index("cell_id")["mse_clean"]
    pd.testing.assert_series_equal(clean_noise, metrics.set_index("cell_id")["test/mse"], check_names=False)


def test_the_importance_weighted_bound_lies_above_the_elbo(workspace):
    write(STUDY.replace("bernoulli", "gaussian"))
    train.run("tiny", drive)
    evaluate.run("tiny")
    metrics = read_table(Folders("tiny").evaluate / "metrics.csv")
    vae = metrics["arm"] == "vae"
    gap = metrics["test/iw_bound"] - metrics["test/elbo"]
    assert (gap[vae] > 0).all() and (gap[vae] < 10).all() and gap[~vae].isna().all()


def test_evaluate_agrees_with_the_plain_module(evaluated):
    import torch

    from pipeline.artifacts import load_prepared
    from pipeline.config import load_study
    from pipeline.model import Autoencoder

    metrics = read_table(Folders("tiny").evaluate / "metrics.csv")
    x = load_prepared(Folders("tiny").prepared).x["test"][0]
    for row in metrics.to_dict("records"):
        cell = Autoencoder(load_study("tiny").model, 784, row["latent_dim"])
        cell.load_state_dict(read_tensors(Folders("tiny").train / "weights" / f"{row['cell_id']}.safetensors"))
        assert row["test/mse"] == pytest.approx((cell(x) - x).square().mean().item(), rel=1e-5)
        assert row["test/active_units"] <= row["latent_dim"]
        if row["arm"] == "ae":
            logits = cell.decoder(cell.encode(x)[0])
            bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean().item()
            assert row["test/reconstruction"] == pytest.approx(bce, rel=1e-5)


def test_evaluate_pairs_each_vae_with_the_plain_ae_of_its_seed(evaluated):
    folder = Folders("tiny").evaluate
    table, paired = read_table(folder / "metrics.csv"), read_table(folder / "paired.csv")
    by_seed = table.pivot(index=["latent_dim", "seed"], columns="arm", values="test/mse")
    expected = (by_seed["vae"] - by_seed["ae"]).groupby("latent_dim").mean()
    clean_rows = paired[paired["noise"] == "clean"].set_index("latent_dim")["difference"]
    pd.testing.assert_series_equal(clean_rows, expected, check_names=False, check_like=True)
    assert set(paired["seeds"]) == {2}


def test_best_cells_get_pictures_and_every_settings_first_seed_codes(evaluated):
    folder = Folders("tiny").evaluate
    best, pictured = read_table(folder / "best.csv"), read_table(folder / "pictured.csv")
    assert len(best) == 4
    for row in best.to_dict("records"):
        pictures = {path.stem for path in (folder / "pictures" / row["cell_id"]).iterdir()}
        assert pictures == {"reconstructions", "latent", "samples"} | ({"manifold"} if row["latent_dim"] == 2 else set())
    assert set(best["cell_id"]) <= set(pictured["cell_id"])
    assert len(pictured[pictured["seed"] == 0]) == 4
    for row in pictured.to_dict("records"):
        tensors = read_tensors(folder / "codes" / f"{row['cell_id']}.safetensors")
        assert tensors["codes"].shape == (60, row["latent_dim"]) and tensors["interpolation"].shape[1:] == (11, 784)
        assert len(tensors["x"]) == len(tensors["reconstructions"]) == 50 and ("manifold" in tensors) == (
            row["latent_dim"] == 2
        )


def test_principal_components_leave_less_and_less_error(evaluated):
    folder = Folders("tiny").evaluate
    components, pca = read_table(folder / "components.csv"), read_table(folder / "pca.csv")
    assert components["components"].tolist() == list(range(1, 33)) and (components["mse"].diff().dropna() < 0).all()
    clean = pca[pca["noise"].isna()].set_index("latent_dim")["mse_clean"]
    assert components.set_index("components")["mse"][[2, 3]].tolist() == pytest.approx(clean[[2, 3]].tolist(), rel=1e-5)


def test_prune_ablates_from_nothing_to_everything(evaluated):
    ablation, summary = (read_table(Folders("tiny").prune / f"{table}.csv") for table in ("ablation", "summary"))
    metrics = read_table(Folders("tiny").evaluate / "metrics.csv").set_index("cell_id")
    mse, columns = metrics["test/mse"], read_table(Folders("tiny").prune / "columns.csv")
    of_latents = columns.groupby("cell_id")["kl"].agg(lambda column: column.sum(skipna=False))
    pd.testing.assert_series_equal(of_latents[metrics.index], metrics["test/kl"], check_names=False, rtol=1e-5)
    for (cell_id, _), curve in ablation.groupby(["cell_id", "criterion"]):
        assert curve["zeroed"].tolist() == list(range(curve["latent_dim"].iloc[0] + 1))
        assert curve["mse"].iloc[0] == pytest.approx(mse[cell_id], rel=1e-5)
    everything = ablation[ablation["zeroed"] == ablation["latent_dim"]].groupby("cell_id")["mse"].nunique()
    assert set(everything) == {1} and len(summary) == 8
    assert summary.loc[summary["arm"] == "ae", "elbow_kl"].isna().all()


def test_clean_removes_what_no_listed_study_uses(workspace):
    write(STUDY.replace("[1]}", "[1, 4]}"))
    train.run("tiny", drive)
    write()
    with pytest.raises(ArtifactError, match="trials.csv: is missing"):
        clean.run()
    train.run("tiny", drive)
    search.run("hunt", drive)
    shutil.rmtree(Folders("tiny").train)  # as DVC does before it trains
    assert (
        clean.run(dry_run=True)[0] == 4 and len(list(CellStore())) == 12 + 5 + 2 + 2 + 2 + 1
    )  # study, trials, finalists of both sides, winner and grid's best on other seeds
    cells, size = clean.run()
    assert cells == 4 and size > 1000
    train.run("tiny", drive)
    tables = [
        Folders("tiny").train / "manifest.csv",
        *(Folders("hunt").search / f"{name}.csv" for name in ("trials", "finalists", "winner")),
    ]
    assert set(CellStore()) == {key for table in tables for key in read_table(table)["cell_id"]}


def test_clean_keeps_what_another_scale_has_trained(workspace):
    search.run("hunt", drive)
    write(STUDY.replace("[1]}", "[4]}"), "other")
    prepare.run("other")
    train.run("other", drive)
    settings = Path("params.yaml").read_text()
    Path("params.yaml").write_text(settings + "scales: {more: {studies: [other, never], searches: {neither: other}}}\n")
    assert clean.run() == (0, 0)
    shutil.move(Folders("other").prepared, "elsewhere")  # as DVC removes it before it prepares
    with pytest.raises(ArtifactError, match="data/prepared/other"):
        clean.run()
    shutil.move("elsewhere", Folders("other").prepared)
    Path("params.yaml").write_text(settings)
    assert clean.run()[0] == 4  # its VAEs: the plain AEs are those of the other study too


def test_clean_keeps_what_an_interrupted_search_of_another_scale_has_trained(workspace):
    write(SEARCH, "another")
    settings = "studies: [tiny]\nsearches: {another: tiny}\n"
    Path("params.yaml").write_text(settings)
    with pytest.raises(Interrupted):
        search.run("another", drive, lambda: 15)
    Path("params.yaml").write_text("studies: [tiny]\nscales: {more: {studies: [tiny], searches: {another: tiny}}}\n")
    with pytest.raises(ArtifactError, match="runs/another/search/trials.csv: is missing"):
        clean.run()


def test_plan_counts_cells_and_estimates_time_without_writing(workspace):
    write(STUDY.replace("[1]}", "[1, 4]}"))
    before = sorted(workspace.rglob("*"))
    text = plan.run("tiny")
    assert "12 (8 vae, 4 ae); 8 are trained already" in text
    assert "2 of 2" in text and "s of training" in text
    assert sorted(workspace.rglob("*")) == before


def test_a_changed_data_section_must_be_prepared_first(workspace):
    write(STUDY.replace("limit: 300", "limit: 301"))
    with pytest.raises(ArtifactError, match="run `vaesweep prepare tiny`"):
        train.run("tiny", drive)


def test_a_changed_grid_must_be_trained_first(workspace):
    write(STUDY.replace("seed: [0, 1]", "seed: [0]"))
    with pytest.raises(ArtifactError, match="run `vaesweep train` again"):
        evaluate.run("tiny")


def test_bernoulli_targets_outside_the_unit_range_are_refused(workspace):
    write(STUDY.replace("digits5k, limit: 300, validation: 60, test: 60", "manifold, train: 200, validation: 50, test: 50"))
    prepare.run("tiny")
    with pytest.raises(VaesweepError, match="'bernoulli' needs data in \\[0, 1\\], but 'manifold' spans"):
        train.run("tiny", drive)


def test_a_study_in_which_every_cell_diverges_ends_well(workspace):
    write(STUDY.replace("seed: [0, 1]", "seed: [0]\n  learning_rate: [1.0e+30]"))
    train.run("tiny", drive)
    evaluate.run("tiny")
    prune.run("tiny")
    assert set(read_table(Folders("tiny").train / "manifest.csv")["status"]) == {"diverged"}
    assert read_table(Folders("tiny").evaluate / "metrics.csv").empty


def test_classes_that_the_data_lack_are_refused_before_any_training(workspace):
    write(STUDY.replace("evaluate:", "evaluate:\n  between: ['3', 'seven']"))
    with pytest.raises(ConfigError, match=r"tiny.yaml: evaluate.between: must name two of the classes .*, but got 'seven'"):
        prepare.run("tiny")
