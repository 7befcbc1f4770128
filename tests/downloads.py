"""Small files in the layout of MNIST, a data root that holds them, and a web server of this machine."""

from __future__ import annotations

import gzip
import hashlib
import threading
import typing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline import datasets

CLOSED_PORT = "http://127.0.0.1:9/"


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_files(per_class: int, seed: int = 0) -> dict[str, bytes]:
    """Small files in the layout of MNIST: twice as many training images as test images, every image distinct."""
    generator, files = np.random.default_rng(seed), {}
    for part, count in (("train", 2 * per_class), ("t10k", per_class)):
        files[f"{part}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (10 * count, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.repeat(np.arange(10), count))
    return files


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """A data root with small MNIST and Fashion-MNIST files whose contents are pinned, and no way to download others."""
    pins, root = {}, tmp_path / "raw data"
    for number, collection in enumerate(("MNIST", "FashionMNIST")):
        folder = root / collection / "raw"
        folder.mkdir(parents=True)
        files = idx_files(per_class=12, seed=number)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        pins[collection] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(datasets, "SHA256", pins)
    return root


@pytest.fixture
def mirrors(monkeypatch) -> typing.Callable[[str], None]:
    """Sets where torchvision downloads from, and which packed files it expects there."""
    from torchvision.datasets import MNIST, FashionMNIST

    def use(address: str, packed: dict[str, bytes] | None = None) -> None:
        monkeypatch.setenv("no_proxy", "*")
        for source in (MNIST, FashionMNIST):
            monkeypatch.setattr(source, "mirrors", [address])
            if packed is not None:
                checksums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
                monkeypatch.setattr(source, "resources", checksums)

    return use


@pytest.fixture
def served(raw, tmp_path, mirrors):
    """The small MNIST files, packed, on a web server of this machine."""
    folder, packed = tmp_path / "mirror", {}
    folder.mkdir()
    for path in (raw / "MNIST/raw").iterdir():
        packed[f"{path.name}.gz"] = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(packed[f"{path.name}.gz"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    mirrors(f"http://127.0.0.1:{server.server_port}/", packed)
    yield packed
    server.shutdown()
    server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass
