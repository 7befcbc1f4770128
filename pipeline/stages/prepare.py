"""`prepare`: fetches or generates a study's data, verifies it, splits it, and writes it with a description."""

from __future__ import annotations

import contextlib

from pipeline import datasets
from pipeline.artifacts import Folders, main_checkout, save_prepared
from pipeline.config import CONFIG_FOLDER, ConfigError, load_settings, load_study
from pipeline.searches import load_search


def run(name: str) -> None:
    """Writes `data/prepared/<name>/`. Raises ConfigError, naming the study's file, and DatasetError."""
    settings = load_settings()
    study = None if name in settings.searches_alone else load_study(name)
    data = study.data if study else load_search(name)[0].data
    try:
        built = datasets.build(data, datasets.data_root(settings.data_root, main_checkout()))
        if study:
            study.evaluate.between_of(built[0].class_names or ())
        save_prepared(Folders(name).prepared, data, built)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG_FOLDER / name}.yaml: {error}") from None
    except datasets.MissingFilesError as error:
        raise datasets.MissingFilesError(f"{error}; studies that need none: {', '.join(_offline_studies())}") from error


def _offline_studies() -> list[str]:
    """The studies in `configs/` whose data comes with the packages or is generated."""
    found = []
    for path in sorted(CONFIG_FOLDER.glob("*.yaml")):
        with contextlib.suppress(ConfigError):
            if load_study(path.stem).data.name in datasets.without_download():
                found.append(path.stem)
    return found
