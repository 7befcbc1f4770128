"""Where Optuna keeps trials, and which processes share it: storages that may be away, and who of the searchers still lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import databases
from pipeline.artifacts import CellStore, main_checkout
from pipeline.config import VaesweepError
from pipeline.searches import Search

if TYPE_CHECKING:
    import optuna

STORAGE_VARIABLE = "OPTUNA_STORAGE"
FIRST_STARTS = 10  # tries to open a storage whose tables others may be making
BUSY_SECONDS = 120.0  # that SQLite waits for another process
BEAT_SECONDS = 5.0
TURN = "turn"  # the file that is locked by whoever draws
SILENT_SECONDS = 60.0  # of a searcher on another machine, after which its trials are taken over


class SearchError(VaesweepError):
    """A search that cannot begin, cannot go on, or cannot reach its target count."""


def storage_url(search: Search) -> str:
    """Where trials are kept: `OPTUNA_STORAGE`, else what the file says, else `optuna.db` in the main checkout."""
    named = os.environ.get(STORAGE_VARIABLE) or search.storage
    return named or databases.sqlite_uri(main_checkout() / "optuna.db")


@contextlib.contextmanager
def open_storage(url: str) -> Iterator[optuna.storages.BaseStorage]:
    """Optuna's storage at an SQLAlchemy URL, or in a journal's file. Raises SearchError within 5 s where it is away.

    What the storage refuses later is a SearchError too.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        with _one_line_errors(
            url, SQLAlchemyError, optuna.exceptions.OptunaError, OSError, ImportError, RuntimeError, ValueError
        ):
            stack.enter_context(databases.quick_commits(url))
            storage = optuna.storages.get_storage(_connect(url))
        with _one_line_errors(url, SQLAlchemyError, optuna.exceptions.StorageInternalError):
            yield storage


def _connect(url: str) -> optuna.storages.BaseStorage:
    import optuna

    if "://" not in url:
        backend = optuna.storages.journal.JournalFileBackend(str(main_checkout() / url))
        return optuna.storages.JournalStorage(backend)
    if url.startswith("sqlite"):
        return _first_or_later(url, {"timeout": BUSY_SECONDS})
    return databases.within(databases.SECONDS_TO_ANSWER, lambda: _on_a_server(url))


def _on_a_server(url: str) -> optuna.storages.BaseStorage:
    databases.check_answers(url)
    limit = {"connect_timeout": int(databases.SECONDS_TO_ANSWER)} if url.startswith("postgresql") else {}
    return _first_or_later(url, limit)


def _first_or_later(url: str, arguments: Mapping[str, Any]) -> optuna.storages.BaseStorage:
    """Tries again where processes that start on an empty database at one moment all make its tables, and only one can."""
    import optuna
    from sqlalchemy.exc import DBAPIError, IntegrityError

    tries = 0
    while True:
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": dict(arguments)})
        except DBAPIError as error:
            tries += 1
            made_meanwhile = isinstance(error, IntegrityError) or "already exists" in str(error)
            if tries == FIRST_STARTS or not made_meanwhile:
                raise
        time.sleep(0.1)


@contextlib.contextmanager
def _one_line_errors(url: str, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        root: BaseException = error  # Optuna's own errors say little; what caused them names the reason
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__
        raise SearchError(databases.without_password(f"{url}: {databases.reason(root)}")) from error


class Searcher:
    """This process among those that share a study: a file that is locked while it lives, and a beat in the storage.

    Who shares its cell store sees by the lock, at once, that it has gone; others by a beat that stands still while they watch,
    so that no two clocks are compared.
    """

    def __init__(self, study: optuna.Study, store: CellStore):
        self.study, self.folder = study, store.root / "searchers" / study.study_name
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._seen: dict[str, tuple[Any, float]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Searcher:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.turn():  # in which others look for files that nobody has locked
            self._file = (self.folder / self.id).open("w")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self.study.set_user_attr(self._beats(self.id), 0)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One at a time of those that share the cell store."""
        with (self.folder / TURN).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def __exit__(self, failure: object, *_: object) -> None:
        """A searcher that was interrupted leaves its file, unlocked, so that the next one sees at once that it has gone."""
        self._ended.set()
        self._thread.join(databases.SECONDS_TO_ANSWER)
        if failure is None:
            self.forget(self.id)
        self._file.close()

    def forget(self, searcher: str) -> None:
        """Removes the file of a searcher that has no trial running any more."""
        (self.folder / searcher).unlink(missing_ok=True)

    def forget_gone(self, busy: Container[str]) -> None:
        """Removes the files of searchers that have gone, but of those that have left trials running."""
        for path in self.folder.iterdir():
            if path.name not in busy and path.name != TURN and _is_locked(path) is False:
                path.unlink(missing_ok=True)

    @staticmethod
    def _beats(searcher: str) -> str:
        return f"beats of {searcher}"

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            with contextlib.suppress(Exception):  # a storage that is away is met by the search itself
                self.study.set_user_attr(self._beats(self.id), count)

    def lives(self, searcher: str) -> bool:
        """Whether another searcher still works, as far as this one can tell."""
        locked = _is_locked(self.folder / searcher)
        if locked is not None:
            return locked
        beat, now = self.study.user_attrs.get(self._beats(searcher)), time.monotonic()
        if searcher not in self._seen or self._seen[searcher][0] != beat:
            self._seen[searcher] = (beat, now)
        return now - self._seen[searcher][1] < SILENT_SECONDS


def _is_locked(path: Path) -> bool | None:
    """Whether the process that locked a file lives; None where there is no such file here."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return None
