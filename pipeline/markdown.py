"""Markdown from values: tables, pictures, and settings in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import drawing
from pipeline.escaping import escape


def join(*parts: str) -> str:
    """Paragraphs, without the empty ones."""
    return "\n\n".join(part for part in parts if part)


def bullets(sentences: Iterable[str]) -> str:
    """A list, one sentence an item."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a bar within a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def folded(summary: str, content: str) -> str:
    """Content that a reader opens by a click."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def picture(path: str, caption: str) -> str:
    """A picture with its caption, which is its alternative text too."""
    alternative = re.sub(r"[\[\]`|\n]", "", caption)
    return f"![{alternative}]({path})\n\n*{caption}*"


def value(setting: Any) -> str:
    """A setting's value: a short number, escaped text, or a dash where there is none."""
    if setting is None or setting == "" or (isinstance(setting, float) and math.isnan(setting)):
        return "–"
    if str(setting) in ("True", "False"):
        return str(setting).lower()
    try:
        return drawing.number(float(setting))
    except (TypeError, ValueError):
        return escape(setting)


def values(settings: Iterable[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(map(value, settings))


def words(axis: str) -> str:
    """An axis as tables call it."""
    return escape(drawing.words(axis))


def count(number_of: Any) -> str:
    """A whole number with commas at the thousands."""
    return f"{int(number_of):,}"
