"""How often a fault is made: a few times in `make test`, as often as SECURITY.md says in `make faults`."""

import os
import signal

import pytest

ALL = bool(os.environ.get("ALL_FAULTS"))


def times(few: int, many: int) -> int:
    return many if ALL else few


killed_by = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM][: times(1, 2)], ids=lambda number: number.name)
