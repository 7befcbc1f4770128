"""How often a fault is made: a few times in `make test`, as often as SECURITY.md says in `make faults`."""

import os
import signal

import pytest
from project import LONG

ALL = bool(os.environ.get("ALL_FAULTS"))


def times(few: int, many: int) -> int:
    return many if ALL else few


UPDATES = times(300, 1200)
SHORTER = LONG.replace("updates: 2000, history_points: 200", f"updates: {UPDATES}, history_points: {UPDATES // 10}")
"""A study that is long enough where its training is not met by chance."""

killed_by = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM][: times(1, 2)], ids=lambda number: number.name)
