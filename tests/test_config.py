import os

import pytest
from hypothesis import given
from ruamel.yaml import YAML
from test_grid import studies

from pipeline.config import CONFIG_FOLDER, ConfigError, Study, load_settings, load_strict, load_study
from pipeline.searches import load_listed, load_search

STUDY = """
title: A study
data: {name: uniform2d}
model: {hidden: [8], likelihood: gaussian}
grid:
  latent_dim: [1, 2]
  l2: [0, 1e-5]
  seed: [0, 1]
  arms:
    vae: {beta: [0.5, 1]}
    ae: {}
train: {updates: 100, learning_rate_schedule: {kind: cosine, end: 0}}
evaluate:
  noise:
    - {kind: gaussian, levels: [0, 2]}
    - {kind: salt_and_pepper, levels: [0, 0.5]}
"""


@pytest.fixture
def load(tmp_path):
    def load(text):
        (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
        return load_study("study", tmp_path)

    return load


def test_a_study_is_read_as_yaml_1_2(load):
    study = load(STUDY)
    assert study.grid.l2 == (0.0, 1e-5)
    assert study.size == 2 * 2 * 2 * (2 + 1)
    assert study.grid.seed == (0, 1) and study.train.batch_size == 128


def test_every_study_and_search_that_ships_is_valid():
    settings = load_settings()
    for path in CONFIG_FOLDER.glob("*.yaml"):
        (load_search if path.stem in settings.every_search else load_study)(path.stem)


MISTAKES = [
    ("updates: 100", "updats: 100", "train.updats: unknown key (did you mean 'updates'?)"),
    ("hidden: [8]", "hiden: [8]", "model.hiden: unknown key (did you mean 'hidden'?)"),
    ("beta: [0.5, 1]", "betta: [1]", "grid.arms.vae.betta: unknown key (did you mean 'beta'?)"),
    ("end: 0", "ende: 0", "train.learning_rate_schedule.ende: unknown key (did you mean 'end'?)"),
    (
        "evaluate:",
        "claims: [{id: a, source: x, says: y, test: {kind: difference, metric: test/mse, agianst: {arm: ae}}}]\nevaluate:",
        "claims.0.test.agianst: unknown key (did you mean 'against'?)",
    ),
    ("evaluate:", "evaluat:", "evaluat: unknown key (did you mean 'evaluate'?)"),
    ("beta: [0.5, 1]", "beta: [0.5, -4]", "grid.arms.vae.beta.1: Input should be greater than or equal to 0, but got -4"),
    ("ae: {}", "ae: {beta: [1]}", "grid: arm 'ae' has no penalty, so it has no axis 'beta'"),
    ("vae:", "vea:", "grid.arms.vea: Input should be 'vae'"),
    ("1e-5]", '"1e-5"]', "grid.l2.1: Input should be a valid number, but got '1e-5'"),
    ("l2: [0, 1e-5]", "l2: []", "grid.l2: must have a value"),
    ("l2: [0, 1e-5]", "l2: 0", "grid.l2: Input should be a valid array, but got 0"),
    ("l2: [0, 1e-5]", "l2: [0, .nan]", "grid.l2.1: Input should be a finite number, but got nan"),
    ("seed: [0, 1]", "seed: [0, 0]", "grid.seed: no value may stand twice, but got [0, 0]"),
    ("seed: [0, 1]", "seed: [0, 1.5]", "grid.seed.1: Input should be a valid integer"),
    ("updates: 100", "updates: 100.5", "train.updates: Input should be a valid integer"),
    ("updates: 100", "updates: 5", "train: updates must be at least history_points, 40, but got 5"),
    ("kind: salt_and_pepper", "kind: gaussian", "evaluate: each kind of noise may stand once"),
    ("name: uniform2d", "name: manifold, axes: {manifold_dim: [2, 2]}", "data: axes.manifold_dim: no value may stand twice"),
    ("kind: gaussian", "kind: gausian", "evaluate.noise.0.kind: Input should be"),
    ("[0, 0.5]", "[0, 1.5]", "evaluate.noise.1: levels of 'salt_and_pepper' are shares, at most 1"),
    ("likelihood: gaussian", "likelihood: bernoulli, sigma2: 1", "model.sigma2: unknown key"),
    ("seed: [0, 1]", f"seed: {list(range(6000))}", "the grid has 72000 cells, at most 20000 are allowed"),
    ("title: A study", "title: A study\ntitle: Another", "duplicate key"),
    ("title: A study\n", "", "title: is required"),
    ("title: A study", "title: [", "cannot be read: line 4: expected ',' or ']'"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES)
def test_a_mistake_gets_one_line_with_file_key_rule_and_value(load, tmp_path, right, wrong, message):
    assert STUDY.count(right) >= 1
    with pytest.raises(ConfigError) as caught:
        load(STUDY.replace(right, wrong, 1))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'study.yaml'}: ")
    assert message in text and "\n" not in text


def test_evaluate_is_required_and_the_message_says_what_to_write(load):
    with pytest.raises(ConfigError, match=r"evaluate: is required \(write `evaluate: \{\}` for its defaults\)"):
        load(STUDY[: STUDY.index("evaluate:")])


def test_an_unknown_study_gets_the_nearest_name(load, tmp_path):
    load(STUDY)
    with pytest.raises(ConfigError, match="no config 'stuby' \\(did you mean 'study'\\?\\)"):
        load_study("stuby", tmp_path)


@pytest.mark.parametrize("name", ["../secret", "a\x00b", "x" * 600, "a\nb", "<script>"])
def test_hostile_names_are_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        load_study(name, tmp_path)


def test_settings_and_a_searchs_file_must_name_the_same_study(tmp_path):
    (tmp_path / "kl.yaml").write_text((CONFIG_FOLDER / "kl_weight.yaml").read_text())
    (tmp_path / "digits.yaml").write_text((CONFIG_FOLDER / "digits.yaml").read_text())
    (tmp_path / "params.yaml").write_text("studies: [digits, pruning]\nsearches: {kl: pruning}\n")
    with pytest.raises(ConfigError, match="searches.kl: its file names study 'digits', but got 'pruning'"):
        load_listed(load_settings(tmp_path / "params.yaml"), tmp_path)


def test_removing_a_study_that_a_search_needs_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("studies: [pruning]\nsearches: {kl: digits}\n")
    with pytest.raises(ConfigError, match="searches.kl: its study must be listed in studies, but got 'digits'"):
        load_settings(tmp_path / "params.yaml")


@given(studies())
def test_a_study_survives_the_way_through_yaml(tmp_path_factory, study):
    path = tmp_path_factory.getbasetemp() / f"{os.getpid()}-round.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(study.model_dump(mode="json", exclude_unset=True), file)
    assert load_strict(Study, path) == study
