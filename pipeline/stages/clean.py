"""`clean`: removes cells that no listed study or search uses any more, and the checkpoints of such cells."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from pipeline.artifacts import CellStore, Folders, read_table
from pipeline.config import load_settings


def run(dry_run: bool = False) -> tuple[int, int]:
    """Returns how many cells go and how many bytes they take. Raises ArtifactError while training holds the store."""
    store, used = CellStore(), set(_used())
    with store.lock("clean"):
        superseded = [key for key in store if key not in used]
        size = sum(store.size(key) for key in superseded)
        if not dry_run:
            for key in superseded:
                store.remove(key)
            for keys in list(store.checkpoints()):
                if not used.issuperset(keys):
                    store.remove_checkpoint(keys)
    return len(superseded), size


def _used() -> Iterator[str]:
    """Ids that stand in the tables of the listed studies and searches."""
    settings = load_settings()
    tables = [Folders(name).train / "manifest.csv" for name in settings.studies]
    tables += [Folders(name).search / "trials.csv" for name in settings.searches]
    for path in tables:
        table = read_table(path) if path.is_file() else pd.DataFrame({"cell_id": []})
        yield from table["cell_id"]
