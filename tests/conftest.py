"""Small cells for tests of the engine; a small study, trained, for tests of the stages."""

import os
import shutil
from collections import Counter
from pathlib import Path

# Before torch is imported. Measured: threads that spin while they wait make two test processes on two cores ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from downloads import mirrors, raw, served  # noqa: F401, fixtures
from hypothesis import settings
from tiny import SEARCH, drive, write

from pipeline.config import Model, Train
from pipeline.grid import Cell

settings.register_profile("unhurried", deadline=None)  # no test is timed: machines are slow and noisy
settings.load_profile("unhurried")


def pytest_terminal_summary(terminalreporter):
    """Says what was not tested for want of something on this machine."""
    reasons = Counter(report.longrepr[-1].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.items():
        if reason.startswith("NOT TESTED"):
            terminalreporter.write_line(f"{reason}: {count} skipped")


@pytest.fixture
def make_cell():
    def make(
        arm="vae",
        *,
        beta=1.0,
        latent_dim=2,
        l2=0.0,
        sigma2=None,
        learning_rate=1e-3,
        seed=0,
        dataset=0,
        model=None,
        train=None,
        anneal=0.0,
        train_noise=0.0,
    ):
        config = {"hidden": (30, 20), "likelihood": "bernoulli", **(model or {})}
        sigma2 = sigma2 if sigma2 is not None or config["likelihood"] == "bernoulli" else 1.0
        budget = Train(**{"updates": 40, "batch_size": 32, "history_points": 10, **(train or {})})
        beta, anneal = (None, None) if arm == "ae" else (beta, anneal)
        own = {"anneal": anneal, "train_noise": train_noise}
        return Cell(arm, beta, latent_dim, l2, sigma2, learning_rate, seed, dataset, Model(**config), budget, **own)

    return make


@pytest.fixture
def pixels():
    """200 rows of 17 values in [0, 1]: a width that fills no vector register."""
    return torch.rand(200, 17, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace in which the tiny study is prepared and trained; copied for each test."""
    from pipeline import tracking
    from pipeline.stages import prepare, train

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tracking, "MlflowTracker", tracking.MemoryTracker)
        Path("configs").mkdir()
        Path("params.yaml").write_text("studies: [tiny]\nsearches: {hunt: tiny}\n")
        write()
        write(SEARCH, "hunt")
        prepare.run("tiny")
        train.run("tiny", drive)
    return folder


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    from pipeline import tracking

    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tracking, "MlflowTracker", tracking.MemoryTracker)
    return tmp_path / "work"
