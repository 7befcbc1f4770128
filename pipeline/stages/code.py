"""`code`: whether all configs are sound, before anything is spent, and what each stage's program is made of.

DVC follows no imports, so a stage depends on the digests of all files that its own imports, directly or not, and of the
packages that these lie in. And DVC puts the names of `params.yaml` into command lines, which this stage, as all others depend
on it, checks before.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import grimp

from pipeline.artifacts import write_json
from pipeline.config import PARAMS_FILE, load_known, load_settings
from pipeline.datasets import check_config
from pipeline.searches import load_listed, load_search

STAGES = ("prepare", "train", "evaluate", "prune", "search", "report")


def run() -> None:
    """Writes `code/<stage>.json`: the SHA-256 of every module's file, by module. Raises ConfigError."""
    settings = load_settings()
    load_listed(settings)
    studies = load_known(settings)
    searches = {name: load_search(name, named_by=f"{PARAMS_FILE}: searches")[0] for name in settings.known_searches}
    data = {name: found.data for name, found in [*studies.items(), *searches.items()] if found.data}
    for name, section in data.items():
        check_config(name, section)
    graph = grimp.build_graph("pipeline", cache_dir=None)
    for stage in STAGES:
        own = f"pipeline.stages.{stage}"
        modules = {own, *graph.find_upstream_modules(own)}
        packages = {".".join(parts[:n]) for parts in (module.split(".") for module in modules) for n in range(1, len(parts))}
        write_json(Path("code") / f"{stage}.json", {module: _digest(module) for module in modules | packages})


def _digest(module: str) -> str:
    return hashlib.sha256(Path(find_spec(module).origin).read_bytes()).hexdigest()
