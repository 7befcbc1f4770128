"""`clean`: removes cells that no study or search of any scale uses any more, and the checkpoints of such cells."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.artifacts import CellStore, Folders, load_prepared, read_table
from pipeline.config import load_settings, load_study
from pipeline.devices import find_runtime
from pipeline.grid import cells, identify


def run(dry_run: bool = False) -> tuple[int, int]:
    """Returns how many cells go and how many bytes they take.

    Raises ArtifactError, and removes nothing, while training holds the store or where it is not known what a study uses.
    """
    store = CellStore()
    with store.lock("clean"):
        used = set(_used())
        ended = store.progress().keys() - used
        superseded = [key for key in store if key not in used]
        size = sum(store.size(key) for key in superseded)
        if not dry_run:
            for key in superseded:
                store.remove(key)
            store.remove_traces(used)
            store.remove_leftovers()
            store.release(ended=ended)
    return len(superseded), size


def _used() -> Iterator[str]:
    """Ids of every cell that a study of any scale wants, trained or not, of every trial of a search, and of what it compared.

    Of another scale than the one that runs, studies and searches of which nothing is left have none.
    """
    settings = load_settings()
    runtime = find_runtime(settings)
    for name in settings.known_studies:
        if name in settings.studies or Folders(name).prepared.exists() or Folders(name).runs.exists():
            study = load_study(name)
            yield from identify(cells(study), load_prepared(Folders(name).prepared, study.data).hashes, runtime)
    for name in settings.known_searches:
        if name in settings.every_search or Folders(name).runs.exists():
            for table in ("trials", "finalists", "winner"):
                yield from read_table(Folders(name).search / f"{table}.csv")["cell_id"]
