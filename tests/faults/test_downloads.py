"""Downloaded files that are truncated, flipped, or not what they say."""

import gzip

import pytest
import torch
from downloads import CLOSED_PORT
from scale import times
from test_datasets import build

from pipeline.datasets import MissingFilesError

DAMAGES = {
    "truncated": lambda content: content[:-1],
    "a bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "wrong count": lambda content: content[:7] + bytes([content[7] ^ 1]) + content[8:],
    "wrong dimensions": lambda content: content[:11] + bytes([content[11] ^ 4]) + content[12:],
    "wrong magic": lambda content: b"\1" + content[1:],
    "half of it": lambda content: content[: len(content) // 2],
    "a bit flipped in its midst": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 16]) + content[len(content) // 2 + 1 :]
    ),
    "empty": lambda content: b"",
}


ITSELF = "the packing itself"
PACKINGS = {
    "extracted": lambda content, damage: damage(content),
    "packed": lambda content, damage: gzip.compress(damage(content)),
    ITSELF: lambda content, damage: damage(gzip.compress(content)),
}
CASES = [(packing, damage) for packing in PACKINGS for damage in DAMAGES if packing != ITSELF or "wrong" not in damage]
FILES = ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


@pytest.mark.parametrize("file", FILES[: times(1, 4)])
@pytest.mark.parametrize(("packing", "damage"), CASES)
def test_a_damaged_file_is_refused_by_name_and_fetched_anew_where_there_is_a_network(
    raw, served, mirrors, damage, packing, file, figure
):
    wanted, path = build("mnist", raw), raw / "MNIST/raw" / file
    content = PACKINGS[packing](path.read_bytes(), DAMAGES[damage])
    if packing != "extracted":
        path.unlink()
        path = path.with_name(f"{file}.gz")
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.MNIST.mirrors", [CLOSED_PORT])
        with pytest.raises(
            MissingFilesError, match=rf"^dataset 'mnist': .* lacks {file}.gz \({path.name}: unreadable, or its SHA"
        ):
            build("mnist", raw)
    build("fashion_mnist", raw)
    assert torch.equal(build("mnist", raw).x["train"], wanted.x["train"])
    figure("refused by name, fetched anew")
