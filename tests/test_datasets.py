"""Laws of the datasets, of their options, of the files they are read from, and of corruption."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from downloads import CLOSED_PORT

from pipeline import datasets
from pipeline.artifacts import ArtifactError, load_prepared, save_prepared
from pipeline.config import ConfigError, Data
from pipeline.datasets import Dataset, MissingFilesError
from pipeline.stages import prepare

NOWHERE = Path("no/such/folder")


def build(name: str, root: Path = NOWHERE, **options) -> SimpleNamespace:
    return as_tensors(datasets.build(Data(name=name, **options), root)[0])


def as_tensors(built: Dataset) -> SimpleNamespace:
    """The same, with tensors for arrays."""
    tensors = {
        field: {split: torch.tensor(rows) for split, rows in (getattr(built, field) or {}).items()} for field in ("x", "labels")
    }
    return SimpleNamespace(**{**vars(built), **tensors})


def rows(x: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in x.numpy()]


# ---------------------------------------- options


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "digit5k"}, r"data\.name: there is no dataset 'digit5k' \(did you mean 'digits5k'\?\)"),
        ({"name": "digits5k", "clases": [1]}, r"data\.clases: unknown option .*\(did you mean 'classes'\?\)"),
        ({"name": "digits5k", "classes": [3, 12]}, r"data\.classes\.1: .* less than or equal to 9, but got 12"),
        ({"name": "digits5k", "classes": [3, 3]}, r"data\.classes: no value may stand twice, but got \[3, 3\]"),
        ({"name": "digits5k", "classes": []}, r"data\.classes: .* at least 1 item"),
        ({"name": "digits5k", "seed": True}, r"data\.seed: .* valid integer, but got True"),
        ({"name": "mnist", "validation": 0}, r"data\.validation: .* greater than or equal to 2, but got 0"),
        ({"name": "digits5k", "binarise": "static"}, r"data\.binarise: .* 'none', 'fixed' or 'dynamic', but got 'static'"),
        ({"name": "mnist", "limit": 1.5}, r"data\.limit: .* valid integer, but got 1\.5"),
        ({"name": "uniform2d", "train": "9"}, r"data\.train: .* valid integer, but got '9'"),
        ({"name": "manifold", "noise_std": -1}, r"data\.noise_std: .* greater than or equal to 0, but got -1"),
        ({"name": "manifold", "noise_std": float("nan")}, r"data\.noise_std: .* finite number, but got nan"),
        ({"name": "manifold", "outlier_ratio": 1.1}, r"data\.outlier_ratio: .* less than or equal to 1, but got 1\.1"),
        ({"name": "manifold", "axes": {"manifold_dm": (1,)}}, r"data\.axes\.manifold_dm: unknown .*'manifold_dim'"),
        ({"name": "manifold", "axes": {"manifold_dim": (1, "2")}}, r"data\.axes\.manifold_dim: .* but got '2'"),
        ({"name": "manifold", "train": 9, "axes": {"train": (9, 10)}}, r"data\.axes\.train: .* not both"),
        ({"name": "manifold", "axes": {"seed": (0, 1)}}, r"data\.axes\.seed: .* a cell's own axis"),
    ],
)
def test_a_wrong_section_gets_one_line_with_key_rule_and_value(section, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        datasets.check(Data(**section))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "digits5k", "validation": 9}, r"data\.validation: must be 10 to 3990, .* got 9"),
        ({"name": "digits5k", "classes": [3], "test": 500}, r"data\.test: must be 1 to 499, .* got 500"),
        ({"name": "digits5k", "limit": 3501}, r"data\.limit: must be at most the 3500 rows .* got 3501"),
        ({"name": "manifold", "manifold_dim": 51}, r"data\.manifold_dim: must be at most ambient_dim = 50, but got 51"),
        ({"name": "manifold", "manifold_dim": 4, "hidden": 31}, r"data\.hidden: must be at least .* = 32, but got 31"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(section, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        datasets.build(Data(**section), NOWHERE)


def test_every_dataset_passes_its_own_check_with_no_options():
    for name in datasets.DATASETS:
        datasets.check(Data(name=name))


def test_axes_make_one_dataset_a_point():
    built = datasets.build(Data(name="uniform2d", validation=7, axes={"train": (5, 6), "test": (3, 4)}), NOWHERE)
    assert [[len(d.x[split]) for split in datasets.SPLITS] for d in built] == [[5, 7, 3], [5, 7, 4], [6, 7, 3], [6, 7, 4]]


def test_the_environment_outranks_the_setting_and_relative_folders_start_at_the_base(monkeypatch, tmp_path):
    monkeypatch.delenv(datasets.DATA_ROOT_VARIABLE, raising=False)
    assert datasets.data_root(None, tmp_path) == tmp_path / "data/raw"
    assert datasets.data_root("mine", tmp_path) == tmp_path / "mine"
    monkeypatch.setenv(datasets.DATA_ROOT_VARIABLE, "/elsewhere")
    assert datasets.data_root("mine", tmp_path) == Path("/elsewhere")


# ---------------------------------------- generated


@pytest.mark.parametrize("name", ["uniform2d", "manifold", "digits5k"])
def test_the_seed_decides_every_byte(name):
    first, same, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    for split in datasets.SPLITS:
        assert torch.equal(first.x[split], same.x[split])
        assert not torch.equal(first.x[split], other.x[split])


@pytest.mark.parametrize("name", ["uniform2d", "manifold"])
def test_more_training_rows_keep_the_first_ones_and_the_other_splits(name):
    small, large = build(name, train=50), build(name, train=80)
    assert torch.equal(small.x["train"], large.x["train"][:50])
    assert torch.equal(small.x["test"], large.x["test"])
    assert not torch.equal(small.x["test"][:50], small.x["train"])


def test_uniform2d_fills_the_unit_square_and_names_its_quadrants():
    square = build("uniform2d")
    x, labels = square.x["train"], square.labels["train"]
    assert x.min() >= 0 and x.max() < 1 and square.unit_range
    assert torch.equal(labels % 2, (x[:, 0] > 0.5).long()) and torch.equal(labels // 2, (x[:, 1] > 0.5).long())
    assert labels.bincount(minlength=4).min() > 0.2 * len(x)
    assert square.class_names[int(labels[x.sum(dim=1).argmax()])] == "upper right"


@pytest.mark.parametrize("dimension", range(1, 9))
def test_the_network_of_the_manifold_has_full_rank_everywhere(dimension):
    network, step = datasets.relu_network(0, dimension, 8 * dimension, 50), 1e-6
    z = np.random.default_rng(1).standard_normal((200, dimension))
    jacobians = np.stack([(network(z + step * e) - network(z - step * e)) / (2 * step) for e in np.eye(dimension)], axis=1)
    values = np.linalg.svd(jacobians, compute_uv=False)
    assert values[:, -1].min() > 1e-3 * values[:, 0].max()


@pytest.mark.parametrize("dimension", [1, 2, 4, 8])
def test_neighbours_tell_the_dimension_of_the_manifold_and_pca_does_not(dimension):
    """Facco et al., "Estimating the intrinsic dimension of datasets by a minimal neighborhood information", 2017."""
    x = build("manifold", manifold_dim=dimension, noise_std=0, train=3000).x["train"].double()
    distances = torch.cdist(x, x).topk(3, largest=False).values
    estimate = len(x) / (distances[:, 2] / distances[:, 1]).log().sum()
    assert estimate == pytest.approx(dimension, rel=0.15)
    assert torch.linalg.matrix_rank(x - x.mean(dim=0)) > dimension


def test_the_signal_has_mean_zero_and_variance_one_over_all_features_and_noise_adds_its_own():
    clean, noisy = build("manifold", noise_std=0, test=5000), build("manifold", noise_std=0.5, test=5000)
    x, noise = clean.x["test"], noisy.x["test"] - clean.x["test"]
    assert x.mean(dim=0).abs().max() < 0.1 and x.var(dim=0).mean() == pytest.approx(1, abs=0.05)
    assert x.var(dim=0).max() > 1.2 * x.var(dim=0).min()
    assert noise.std() == pytest.approx(0.5, rel=0.01)


def test_outliers_replace_a_share_of_training_entries_and_a_larger_share_contains_it():
    clean, some, more = (build("manifold", outlier_ratio=ratio) for ratio in (0, 0.1, 0.3))
    hit, hit_too = ((other.x["train"] != clean.x["train"]) for other in (some, more))
    assert hit.float().mean() == pytest.approx(0.1, abs=0.01) and hit_too.float().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(hit & hit_too, hit) and torch.equal(some.x["train"][hit], more.x["train"][hit])
    assert some.x["train"][hit].abs().max() <= datasets.OUTLIER_SIZE
    assert all(torch.equal(clean.x[split], more.x[split]) for split in ("validation", "test"))


# ---------------------------------------- images


def test_digits_fall_into_disjoint_splits_with_equal_shares_of_each_class():
    digits = build("digits5k")
    every = [row for split in datasets.SPLITS for row in rows(digits.x[split])]
    assert len(every) == len(set(every)) == 5000
    assert Counter(every) == Counter(row for x in build("digits5k", seed=1).x.values() for row in rows(x))
    for split, share in {"train": 350, "validation": 50, "test": 100}.items():
        assert digits.labels[split].bincount().tolist() == [share] * 10
        assert digits.x[split].dtype == torch.uint8 and digits.x[split].max() == 255


def test_a_subset_of_classes_holds_their_images_under_their_names():
    full, pair = build("digits5k"), build("digits5k", classes=[7, 3])
    assert pair.class_names == ("3", "7") and [len(pair.x[split]) for split in datasets.SPLITS] == [700, 100, 200]
    for label, digit in enumerate((3, 7)):
        found = [row for split in datasets.SPLITS for row in rows(pair.x[split][pair.labels[split] == label])]
        wanted = [row for split in datasets.SPLITS for row in rows(full.x[split][full.labels[split] == digit])]
        assert Counter(found) == Counter(wanted)


def test_a_limit_keeps_the_first_training_rows_and_the_other_splits():
    full, few, some = build("digits5k"), build("digits5k", limit=100), build("digits5k", limit=300)
    assert torch.equal(few.x["train"], full.x["train"][:100]) and torch.equal(some.x["train"], full.x["train"][:300])
    assert torch.equal(few.labels["train"], full.labels["train"][:100]) and torch.equal(few.x["test"], full.x["test"])
    assert some.labels["train"].bincount().min() > 10


def test_binarised_pixels_are_black_or_white_as_their_grey_says():
    grey, fixed, dynamic = (build("digits5k", binarise=how) for how in ("none", "fixed", "dynamic"))
    assert torch.equal(dynamic.x["train"], grey.x["train"]) and dynamic.binarise == "dynamic"
    for split in datasets.SPLITS:
        assert fixed.x[split].unique().tolist() == [0, 255]
        assert torch.equal(fixed.x[split] * (grey.x[split] == 255), grey.x[split] * (grey.x[split] == 255))
        middle = (grey.x[split] > 100) & (grey.x[split] < 155)
        shares = [pixels.x[split][middle].float().mean().item() for pixels in (fixed, grey)]
        assert shares[0] == pytest.approx(shares[1], rel=0.1)
    assert all(torch.equal(dynamic.x[split], fixed.x[split]) for split in ("validation", "test"))


def test_binarised_digits_depend_on_the_seed_and_not_on_the_limit():
    full, few, other = (build("digits5k", binarise="fixed", **own) for own in ({}, {"limit": 100}, {"seed": 1}))
    assert torch.equal(few.x["train"], full.x["train"][:100]) and not torch.equal(other.x["test"], full.x["test"])


def test_downloaded_files_are_read_where_they_lie_and_split(raw):
    before = sorted(raw.rglob("*"))
    digits = build("mnist", raw, validation=40)
    assert [digits.labels[split].bincount().tolist() for split in datasets.SPLITS] == [[20] * 10, [4] * 10, [12] * 10]
    images = (raw / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert b"".join(rows(digits.x["test"])) == images
    assert sorted(raw.rglob("*")) == before


def test_downloaded_images_can_be_binarised(raw):
    for name in ("mnist", "fashion_mnist", "fashion_boots"):
        assert build(name, raw, binarise="fixed").x["train"].unique().tolist() == [0, 255]


def test_boots_are_one_class_of_fashion(raw):
    boots, fashion = build("fashion_boots", raw), build("fashion_mnist", raw, classes=[0, 9])
    assert boots.class_names == ("Ankle boot",) and fashion.class_names == ("T-shirt/top", "Ankle boot")
    assert torch.equal(boots.x["test"], fashion.x["test"][fashion.labels["test"] == 1])
    assert [len(boots.x[split]) for split in datasets.SPLITS] == [22, 2, 12]


def test_packed_files_are_as_good(raw):
    wanted = build("mnist", raw)
    for path in (raw / "MNIST/raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    checksums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in (raw / "MNIST/raw").iterdir()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.MNIST.resources", checksums)
        assert torch.equal(build("mnist", raw).x["train"], wanted.x["train"])


def test_without_network_and_files_one_error_says_what_to_put_where(raw, mirrors):
    mirrors(CLOSED_PORT)
    (raw / "FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingFilesError) as error:
        build("fashion_boots", raw)
    message = str(error.value)
    assert message.startswith(f"dataset 'fashion_boots': {raw}/FashionMNIST/raw lacks t10k-labels-idx1-ubyte.gz, and")
    assert "VAESWEEP_DATA_ROOT" in message and "t10k-images" not in message and "\n" not in message
    assert message.endswith("datasets that need no download: digits5k, manifold, uniform2d")


def test_an_interrupted_download_goes_on_and_then_needs_no_network(raw, served, mirrors, tmp_path):
    root, wanted = tmp_path / "empty", build("mnist", raw)
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    whole, broken = list(served)[:2]
    (folder / whole).write_bytes(served[whole])
    (folder / broken).write_bytes(served[broken][:20])
    kept = (folder / whole).stat().st_mtime_ns
    assert torch.equal(build("mnist", root).x["train"], wanted.x["train"])
    assert (folder / whole).stat().st_mtime_ns == kept
    mirrors(CLOSED_PORT)
    assert torch.equal(build("mnist", root).x["test"], wanted.x["test"])


# ---------------------------------------- prepared files and the stage


def test_what_is_saved_is_loaded(tmp_path, raw):
    data = Data(name="mnist", axes={"limit": (30, 60)})
    built = datasets.build(data, raw)
    save_prepared(tmp_path / "a", data, built)
    built = list(map(as_tensors, built))
    loaded = load_prepared(tmp_path / "a")
    assert loaded.points == [{"limit": 30}, {"limit": 60}] and loaded.features == 784 and loaded.image_shape == (28, 28)
    for index, one in enumerate(built):
        assert torch.equal(loaded.labels["train"][index], one.labels["train"])
        assert torch.equal((loaded.x["train"][index] * 255).round().to(torch.uint8), one.x["train"])
    assert loaded.unit_range and loaded.class_names == built[0].class_names and len(set(loaded.hashes)) == 2


def test_saving_again_leaves_the_same_bytes_and_no_stale_file(tmp_path):
    data = Data(name="manifold", train=20, axes={"manifold_dim": (1, 2)})
    save_prepared(tmp_path, data, datasets.build(data, NOWHERE))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "2.safetensors").write_bytes(b"of an older study")
    save_prepared(tmp_path, data, datasets.build(data, NOWHERE))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load_prepared(tmp_path).labels is None


def test_a_prepared_file_that_changed_is_refused(tmp_path):
    data = Data(name="uniform2d", train=20)
    save_prepared(tmp_path, data, datasets.build(data, NOWHERE))
    path = tmp_path / "0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"0\.safetensors: is damaged: its SHA-256 is not the one that was written"):
        load_prepared(tmp_path)


def test_prepared_data_say_how_they_are_binarised(tmp_path):
    data = Data(name="digits5k", binarise="dynamic")
    save_prepared(tmp_path, data, datasets.build(data, NOWHERE))
    loaded = load_prepared(tmp_path, data)
    assert loaded.binarise == "dynamic"
    assert set(loaded.x["test"][0].unique().tolist()) == {0, 1} and len(loaded.x["train"][0].unique()) > 200


def test_datasets_of_one_study_are_binarised_in_one_way(tmp_path):
    data = Data(name="digits5k", axes={"binarise": ("none", "fixed")})
    with pytest.raises(ConfigError, match=r"^data\.axes: .* binarised in the same way, but got \['fixed', 'none'\]$"):
        save_prepared(tmp_path, data, datasets.build(data, NOWHERE))


def test_datasets_of_one_study_have_one_number_of_features(tmp_path):
    data = Data(name="manifold", train=20, axes={"ambient_dim": (10, 50)})
    with pytest.raises(ConfigError, match=r"^data\.axes: .* same number of features, but got \[10, 50\]$"):
        save_prepared(tmp_path, data, datasets.build(data, NOWHERE))
    assert not any(tmp_path.iterdir())


STUDY = """
title: Small
data: {data}
model: {{hidden: [], likelihood: gaussian}}
grid: {{latent_dim: [1], arms: {{ae: {{}}}}}}
train: {{updates: 100}}
evaluate: {{}}
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "params.yaml").write_text("studies: [square, digits]\n")
    (tmp_path / "configs/square.yaml").write_text(STUDY.format(data="{name: uniform2d, train: 20}"))
    (tmp_path / "configs/digits.yaml").write_text(STUDY.format(data="{name: mnist}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(datasets.DATA_ROOT_VARIABLE, raising=False)
    return tmp_path


def test_prepare_writes_a_study_and_touches_no_data_root(workspace):
    prepare.run("square")
    assert len(load_prepared(workspace / "data/prepared/square").x["train"][0]) == 20
    assert not (workspace / "data/raw").exists()


def test_prepare_names_the_file_of_a_wrong_option(workspace):
    (workspace / "configs/square.yaml").write_text(STUDY.format(data="{name: uniform2d, trian: 20}"))
    with pytest.raises(ConfigError, match=r"^configs/square\.yaml: data\.trian: unknown option"):
        prepare.run("square")


def test_prepare_names_the_studies_that_need_no_download(workspace, mirrors):
    mirrors(CLOSED_PORT)
    with pytest.raises(MissingFilesError, match=r"^dataset 'mnist': .*studies that need none: square$"):
        prepare.run("digits")
