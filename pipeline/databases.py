"""What the stores of MLflow and Optuna have in common: SQLite files in one place, databases that may be away, passwords."""

from __future__ import annotations

import contextlib
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECONDS_TO_ANSWER = 5.0
THREAD = "database"  # the name of threads that talk to one
LOCAL_DISKS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "tmpfs", "xfs", "zfs"}
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def sqlite_uri(path: Path) -> str:
    """SQLAlchemy's URL of a SQLite file."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, as SQLite names it; None for other stores."""
    from sqlalchemy.engine import make_url

    database = make_url(uri).database if uri.startswith("sqlite") and "://" in uri else None
    return Path(database).resolve() if database and not database.startswith((":memory:", "file:")) else None


@contextlib.contextmanager
def quick_commits(uri: str) -> Iterator[None]:
    """Writes to SQLite through a write-ahead log, and leaves the database's file whole without the log.

    A commit then waits for no disk, and a UI that reads neither waits nor is waited for. A power cut may take the last commits,
    never the database. Hosts that share a network disk cannot share a log: there the store's own way stays.
    """
    database = sqlite_file(uri)
    if database is None or not _on_local_disk(database):
        yield
        return
    _write_ahead(str(database))
    yield
    if database.is_file():
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database, timeout=1)) as connection:
            _pragma(connection, "wal_checkpoint(TRUNCATE)")


def _on_local_disk(path: Path) -> bool:
    import psutil

    kinds = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    return next((kinds[folder] for folder in path.parents if folder in kinds), None) in LOCAL_DISKS


@cache
def _write_ahead(database: str) -> None:
    """Makes every later connection of this process to the database use the log."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def prepare(connection: Any, _: Any) -> None:
        if not isinstance(connection, sqlite3.Connection):
            return
        with contextlib.suppress(sqlite3.Error):  # it is locked just now, or no database, which its user finds out too
            if _pragma(connection, "database_list")[2] == database and _pragma(connection, "journal_mode=WAL") == ("wal",):
                _pragma(connection, "synchronous=NORMAL")

    event.listen(Engine, "connect", prepare)


def _pragma(connection: sqlite3.Connection, text: str) -> Any:
    return connection.execute(f"PRAGMA {text}").fetchone()


def check_answers(uri: str, seconds: float = SECONDS_TO_ANSWER) -> None:
    """Whether a database server can be reached, before its client tries for minutes. Raises OSError."""
    try:
        parts = urlsplit(uri)
        given = parts.port
    except ValueError as error:
        raise OSError(f"is no URL: {error}") from error
    port = PORTS.get(parts.scheme.split("+")[0])
    if port and parts.hostname:
        address = (parts.hostname, given or port)
        within(seconds, lambda: socket.create_connection(address).close())


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """Calls, and waits no longer than that, though looking up a name knows no limit of its own. Raises TimeoutError."""
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from error


def reason(error: BaseException) -> str:
    """What the system said, where it said something; else what the store's client says, in one line."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return str(link)
        link = link.__cause__ or link.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__


def without_password(text: str) -> str:
    """A line in which URLs keep their user and lose the password, which may hold any character."""
    text = re.sub(r"(://[^/\s:@]*):[^\n]*@", r"\1@", text)
    return re.sub(r"(?i)((?:password|passwd|pwd)(?:=|%3D))[^&;\s]*", r"\1***", text)
