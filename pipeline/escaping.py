"""Free text in markdown: shown as it is, whoever wrote it."""

from __future__ import annotations

import html
import re
from typing import Any


def escape(text: Any) -> str:
    """Free text that markdown shows as it is, on one line."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", plain)
