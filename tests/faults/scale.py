"""How often a fault is made: a few times in `make test`, as often as SECURITY.md says in `make faults`."""

import os
import signal

import pytest
from project import lasting

ALL = bool(os.environ.get("ALL_FAULTS"))


def times(few: int, many: int) -> int:
    return many if ALL else few


UPDATES = times(300, 1200)
SHORTER = lasting(UPDATES)
"""A study that is long enough where its training is not met by chance."""

killed_by = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM][: times(1, 2)], ids=lambda number: number.name)
