"""Configs that are wrong or hostile: refused early, in one line that names file, key, rule and value."""

import html
import itertools
import json
import os
import re
import resource
import subprocess
import time
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from project import PARAMS, environment, ran, write_clone, write_project
from tiny import SEARCH, STUDY, drive

from pipeline import datasets
from pipeline import markdown as md
from pipeline.cli import main
from pipeline.config import MAX_BYTES, ConfigError, load_settings, load_study
from pipeline.searches import load_search
from pipeline.stages import evaluate, prune, report, search, train

CLAIM = """claims:
  - {id: a, source: x, says: y, test: {kind: monotone, metric: test/mse, over: latent_dim, direction: up, where: {arm: vae}}}
"""
CLAIMED = STUDY + CLAIM

STUDIES = [
    ("beta: [1]", "beta: [.nan]", "grid.arms.vae.beta.0: Input should be a finite number, but got nan"),
    ("beta: [1]", "beta: [.inf]", "grid.arms.vae.beta.0: Input should be a finite number, but got inf"),
    ("beta: [1]", "beta: [-1]", "grid.arms.vae.beta.0: Input should be greater than or equal to 0, but got -1"),
    ("beta: [1]", 'beta: ["1e-3"]', "grid.arms.vae.beta.0: Input should be a valid number, but got '1e-3'"),
    ("beta: [1]", "beta: []", "grid.arms.vae.beta: must have a value"),
    ("beta: [1]", "beta: [1, 1]", "beta: no value may stand twice, but got [1, 1]"),
    ("beta: [1]", "beta: [1, 1.0]", "no value may stand twice"),
    ("beta: [1]", "beta: 1", "grid.arms.vae.beta: Input should be a valid array, but got 1"),
    ("beta: [1]", "beta: [yes]", "grid.arms.vae.beta.0: Input should be a valid number, but got 'yes'"),
    ("beta: [1]", "beta: [true]", "grid.arms.vae.beta.0: Input should be a valid number, but got True"),
    ("beta: [1]", "beta: [null]", "grid.arms.vae.beta.0: Input should be a valid number, but got None"),
    ("beta: [1]", "bet: [1]", "grid.arms.vae.bet: unknown key (did you mean 'beta'?)"),
    ("beta: [1]", "anneal: [1.5]", "grid.arms.vae.anneal.0: Input should be less than or equal to 1, but got 1.5"),
    ("ae: {}", "ae: {beta: [1]}", "grid: arm 'ae' has no penalty, so it has no axis 'beta'"),
    ("ae: {}", "ae: {anneal: [0.5]}", "grid: arm 'ae' has no penalty, so it has no axis 'anneal'"),
    ("ae: {}", "autoencoder: {}", "grid.arms.autoencoder: Input should be 'vae', 'ae'"),
    ("ae: {}", "ae: 3", "grid.arms.ae: Input should be an object, but got 3"),
    ("latent_dim: [2, 3]", "latent_dim: [0]", "grid.latent_dim.0: Input should be greater than 0, but got 0"),
    ("latent_dim: [2, 3]", "latent_dim: [2.5]", "grid.latent_dim.0: Input should be a valid integer"),
    ("latent_dim: [2, 3]", "latent_dim: [2, 2]", "grid.latent_dim: no value may stand twice, but got [2, 2]"),
    ("latent_dim: [2, 3]", "latent_dims: [2]", "grid.latent_dims: unknown key (did you mean 'latent_dim'?)"),
    ("latent_dim: [2, 3]", "latent_dim: {2: 3}", "grid.latent_dim: Input should be a valid array"),
    ("seed: [0, 1]", "seed: [-1]", "grid.seed.0: Input should be greater than or equal to 0, but got -1"),
    ("seed: [0, 1]", "seed: [4294967296]", "grid.seed.0: Input should be less than 4294967296"),
    ("seed: [0, 1]", f"seed: [{', '.join(map(str, range(6000)))}]", "has 24000 cells, at most 20000 are allowed"),
    (
        "seed: [0, 1]",
        f"seed: {list(range(1000))}\n  l2: {list(range(250))}",
        "the grid has 1000000 cells, at most 20000 are allowed",
    ),
    ("seed: [0, 1]", "seed: [0, 1]\n  l2: [-1e-5]", "grid.l2.0: Input should be greater than or equal to 0, but got -1e-05"),
    ("seed: [0, 1]", "seed: [0, 1]\n  sigma2: [1]", "a Bernoulli likelihood has no σ², so the grid has no axis 'sigma2'"),
    (
        "seed: [0, 1]",
        "seed: [0, 1]\n  train_noise: [0.5]",
        "train.noise says what kind of noise grid.train_noise has levels of",
    ),
    ("seed: [0, 1]", "seed: [0, 1]\n  learning_rate: [0]", "grid.learning_rate.0: Input should be greater than 0, but got 0"),
    ("name: digits5k", "nam: digits5k", "data.name: is required"),
    ("name: digits5k", "name: ../../etc", "data.name: String should match pattern"),
    ("name: digits5k", "name: 5", "data.name: Input should be a valid string, but got 5"),
    ("limit: 300", "axes: {limit: [300, 300]}", "data: axes.limit: no value may stand twice, but got [300, 300]"),
    ("limit: 300", "axes: {limit: []}", "data.axes.limit: must have a value"),
    ("name: digits5k", "name: digits6k", "data.name: there is no dataset 'digits6k' (did you mean 'digits5k'?)"),
    ("test: 60", "test: 1", "data.test: Input should be greater than or equal to 2, but got 1"),
    ("limit: 300", "limitt: 300", "data.limitt: unknown option of dataset 'digits5k' (did you mean 'limit'?)"),
    ("limit: 300", "limit: .nan", "data.limit: "),
    ("limit: 300", "binarise: sometimes", "data.binarise: Input should be 'none', 'fixed' or 'dynamic', but got 'sometimes'"),
    ("limit: 300", "axes: {limitt: [300]}", "data.axes.limitt: unknown option of dataset 'digits5k'"),
    ("limit: 300", "axes: {seed: [1, 2]}", "data.axes.seed: this name is a cell's own axis"),
    ("hidden: [16]", "hidden: [0]", "model.hidden.0: Input should be greater than 0, but got 0"),
    ("hidden: [16]", "hidden: 16", "model.hidden: Input should be a valid array, but got 16"),
    ("hidden: [16]", "hidden: [2000000]", "model.hidden.0: Input should be less than or equal to 1000000, but got 2000000"),
    ("hidden: [16]", "hiden: [16]", "model.hiden: unknown key (did you mean 'hidden'?)"),
    (
        "likelihood: bernoulli",
        "likelihood: gauss",
        "model.likelihood: Input should be 'bernoulli' or 'gaussian', but got 'gauss'",
    ),
    ("likelihood: bernoulli", "likelihood: bernoulli, output: relu", "output and dropout act on the mean of a Gaussian"),
    ("likelihood: bernoulli", "likelihood: gaussian, dropout: 1", "model.dropout: Input should be less than 1, but got 1"),
    ("likelihood: bernoulli", "likelihood: bernoulli, bias: 1", "model.bias: Input should be a valid boolean, but got 1"),
    ("updates: 30", "updates: 0", "train.updates: Input should be greater than 0, but got 0"),
    ("updates: 30", "updates: 5", "train: updates must be at least history_points, 10, but got 5"),
    ("updates: 30", "updates: 1e2", "train.updates: Input should be a valid integer, but got 100.0"),
    ("batch_size: 32", "batch_size: -32", "train.batch_size: Input should be greater than 0, but got -32"),
    ("batch_size: 32", "keep: newest", "train.keep: Input should be 'best' or 'last', but got 'newest'"),
    ("batch_size: 32", "clip_norm: 0", "train.clip_norm: Input should be greater than 0, but got 0"),
    ("updates: 30", f"updates: 1{400 * '0'}", "train.updates: "),
    ("updates: 30", "updates: 2147483648", "train.updates: Input should be less than 2147483648"),
    ("latent_dim: [2, 3]", f"latent_dim: [1{30 * '0'}]", "grid.latent_dim.0: Input should be less than or equal to 1000000"),
    ("batch_size: 32", "noise: {kind: gaussian}", "train.noise says what kind of noise grid.train_noise has levels of"),
    ("batch_size: 32", "learning_rate_schedule: {kind: steps}", "kind 'steps', and it alone, needs `at`"),
    ("levels: [0, 0.3]", "levels: [-0.3]", "evaluate.noise.0.levels.0: Input should be greater than or equal to 0"),
    ("levels: [0, 0.3]", "levels: [1.0e+39]", "evaluate.noise.0.levels.0: Input should be less than or equal to 1000000"),
    ("kind: gaussian, levels: [0, 0.3]", "kind: erased_block, levels: [2]", "levels of 'erased_block' are shares, at most 1"),
    ("title: A tiny study", "title: ''", "title: String should have at least 1 character"),
    ("title: A tiny study", f"title: {'x' * 600}", "title: String should have at most 200 characters"),
    ("title: A tiny study", 'title: "a\\e[2Jb"', "title: must be readable text, but holds '\\x1b'"),
    ("title: A tiny study", 'title: "a\\0b"', "title: must be readable text, but holds '\\x00'"),
    ("title: A tiny study", 'title: "a\\u202eb"', "title: must be readable text, but holds '\\u202e'"),
    ("title: A tiny study", "title: A tiny study\ntitel: b", "titel: unknown key (did you mean 'title'?)"),
    (
        "title: A tiny study",
        "title: !!python/object/apply:os.system [ls]",
        "cannot be read: line 2: could not determine a constructor",
    ),
    ("title: A tiny study", "? [a, b]\n: c", "cannot be read"),
    ("title: A tiny study", "title: &a [*a]", "cannot be read"),
    ("title: A tiny study", f"title: &a [{'*a,' * 3_000} x]", "it holds more than 50000 values"),
    ("title: A tiny study", "title: " + 600 * "[" + 600 * "]", "cannot be read"),
    (
        "title: A tiny study",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(9 * ['*' + a])}]\n" for a, b in itertools.pairwise("abcdefg")),
        "it holds more than 50000 values",
    ),
    (
        "title: A tiny study",
        "a: &a {k: 1}\n"
        + "".join(f"{b}: &{b} {{<<: [{', '.join(9 * ['*' + a])}]}}\n" for a, b in itertools.pairwise("abcdefghijklmnop")),
        "it holds more than 50000 values",
    ),
    ("title: A tiny study", "title: A tiny study\n# " + 300_000 * "x", "it has 300"),
    ("kind: monotone", f"kind: count, number: 1{400 * '0'}", "claims.0.test"),
    ("id: a", "id: a/b", "claims.0.id: String should match pattern"),
    ("id: a", "id: 'x\ny'", "claims.0.id: String should match pattern"),
    ("id: a", f"id: {'x' * 65}", "claims.0.id: String should match pattern"),
    ("metric: test/mse", "metric: test/msee", "claims.0 (a): there is no metric 'test/msee' (did you mean 'test/mse'?)"),
    (
        "over: latent_dim",
        "over: latent",
        "axis 'latent' must have at least 2 values for a test of kind 'monotone', but got no such",
    ),
    (
        "over: latent_dim",
        "over: beta",
        "axis 'beta' must have at least 2 values for a test of kind 'monotone', but got only [1.0]",
    ),
    ("direction: up", "directoin: up", "claims.0.test.directoin: unknown key (did you mean 'direction'?)"),
    ("kind: monotone", "kind: rising", "claims.0.test.kind: must be one of"),
    ("direction: up", "direction: upwards", "direction: Input should be 'up' or 'down', but got 'upwards'"),
    ("where: {arm: vae}", "where: {arm: vea}", "axis 'arm' has the values ['vae', 'ae'], but got 'vea'"),
    ("where: {arm: vae}", "where: {latent_dim: 7}", "axis 'latent_dim' has the values [2, 3], but got 7"),
]
SEARCHES = [
    ("low: 0.1, high: 10", "low: 10, high: 0.1", "low"),
    ("low: 0.1, high: 10", "low: 0, high: 10", "low"),
    ("low: 0.1, high: 10", "low: .nan, high: 10", "space.beta"),
    ("trials: 5", "trials: 0", "trials: Input should be greater than 0, but got 0"),
    ("batch: 2", "batch: two", "batch: Input should be a valid integer"),
    ("batch: 2", "batch: 2\nrungs: [0.5]", "rungs are where `halving` or `pruner` let trials leave"),
    (
        "direction: down}\n  - {metric: validation/kl",
        "direction: down}\n  - {metric: test/kl",
        "a search never sees the test set",
    ),
    ("metric: validation/kl", "metric: validation/kll", "there is no metric 'validation/kll' to search by"),
    ("test_seeds: [1, 2]", "test_seeds: [0]", "winner: `validation_seeds` and `test_seeds` must be others than `seed`"),
    ("validation_seeds: [3]", "validation_seeds: [2]", "others than `seed` and each other, but share 2"),
    ("study: tiny", "study: tinny", "configs/hunt.yaml: study: there is no config 'tinny' (did you mean 'tiny'?)"),
]
SETTINGS = [
    ("reports: reports", "reports: /", "reports: must be a folder below the project's, but got '/'"),
    ("reports: reports", "reports: ../elsewhere", "reports: must be a folder below the project's, but got '../elsewhere'"),
    ("studies: [tiny]", "studies: [../tiny]", "studies.0: String should match pattern"),
    ("studies: [tiny]", "studies: [tiny, tiny]", "studies: no value may stand twice"),
    ("studies: [tiny]", "studies: []", "studies: must have a value"),
    ("device: cpu", 'device: cpu, data_root: "a\\0b"', "data_root: must be readable text, but holds '\\x00'"),
    ("device: cpu", "device: gpu", "device: Input should be 'auto', 'cpu' or 'cuda', but got 'gpu'"),
    ("device: cpu", "device: cpu, stack_size: 0", "stack_size: Input should be greater than 0, but got 0"),
    ("{hunt: tiny}", "{tiny: tiny}", "two studies or searches share the name 'tiny'"),
]
WRONG = [
    *(("tiny", CLAIMED, ["prepare", "tiny"], *row) for row in STUDIES),
    *(("hunt", SEARCH, ["search", "hunt"], *row) for row in SEARCHES),
    *(("params", PARAMS, ["prepare", "tiny"], *row) for row in SETTINGS),
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path / "work"))


@pytest.mark.parametrize(("file", "text", "command", "right", "wrong", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_config_is_refused_in_one_line_before_any_data_is_touched(
    project, monkeypatch, file, text, command, right, wrong, message
):
    path = Path("params.yaml" if file == "params" else f"configs/{file}.yaml")
    assert right in text
    path.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    monkeypatch.setattr(datasets, "build", lambda *_: pytest.fail("data were built"))
    start = time.monotonic()
    result = CliRunner().invoke(main, command)
    assert time.monotonic() - start < 2
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1, result.output
    assert result.output.startswith(f"vaesweep: {path}: ")
    assert message in result.output


def test_there_are_sixty_wrong_configs_and_one_is_refused_within_two_seconds_of_a_real_start(tmp_path, figure):
    folder = write_project(tmp_path / "work", STUDY.replace("limit: 300", "limitt: 300"))
    ran(folder, "vaesweep", "--help")
    start = time.monotonic()
    done = ran(folder, "vaesweep", "train", "tiny")
    took = time.monotonic() - start
    assert done.returncode == 1 and "data.limitt: unknown option" in done.stderr
    assert len(WRONG) >= 60 and took < 2
    figure(f"{len(WRONG)} configs refused in one line; a whole process took {took:.1f} s")


def test_aliases_that_stand_for_much_text_are_refused_without_the_memory(tmp_path, figure):
    text = f"a: &a {60_000 * 'x'}\nb: [{9_000 * '*a, '}]\n" + STUDY
    folder = write_project(tmp_path / "work", text)
    assert len(text) < MAX_BYTES
    ran(folder, "vaesweep", "--help")
    start = time.monotonic()
    process = subprocess.Popen(
        ["vaesweep", "train", "tiny"],
        cwd=folder,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode, took = os.waitstatus_to_exitcode(status), time.monotonic() - start
    assert process.returncode == 1 and len(error.splitlines()) == 1 and "its values have more than" in error, error
    assert took < 2 and usage.ru_maxrss < 900_000, (took, usage.ru_maxrss)
    figure(f"540 MB of text refused in {took:.1f} s, {usage.ru_maxrss / 1000:.0f} MB of memory")


HOSTILE = [
    "../x",
    "a\0b",
    "x" * 600,
    "a\nb",
    "a|b",
    "<script>alert(1)</script>",
    "javascript:alert(1)",
    ".hidden",
    "-rf",
    "a b",
    "",
]


PLACES = {
    "tiny": [(CLAIMED, "name: digits5k", "name: {}"), (CLAIMED, "id: a", "id: {}")],
    "hunt": [(SEARCH, "study: tiny", "study: {}")],
    "params": [
        (PARAMS, "studies: [tiny]", "studies: [tiny, {}]"),
        (PARAMS, "{hunt: tiny}", "{{hunt: {}}}"),
        (PARAMS, "{hunt: tiny}", "{{hunt: tiny, {}: tiny}}"),
        (PARAMS, "searches_alone: []", "searches_alone: [{}]"),
        (PARAMS, "scales: {}", "scales: {{{}: {{studies: [tiny]}}}}"),
    ],
}
LOADERS = {"tiny": lambda: load_study("tiny"), "hunt": lambda: load_search("hunt"), "params": load_settings}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_wherever_a_name_stands(project, name, figure):
    """For its pattern, also where a file of that name lies."""
    with suppress(OSError, ValueError):  # the system itself refuses NUL and 600 characters
        path = Path("configs", f"{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUDY)
    with pytest.raises(ConfigError):
        load_study(name)
    for file, places in PLACES.items():
        path = Path("params.yaml" if file == "params" else f"configs/{file}.yaml")
        right = path.read_text()
        for text, before, after in places:
            assert before in text
            path.write_text(text.replace(before, after.format(quote(name)), 1))
            with pytest.raises(ConfigError, match="String should match pattern") as refused:
                LOADERS[file]()
            assert str(refused.value).isprintable()
        path.write_text(right)
    figure(f"a name, refused for its pattern at {sum(map(len, PLACES.values()))} places, and as a file's")


def test_a_name_that_a_shell_would_run_is_refused_before_dvc_puts_it_into_a_command(tmp_path, figure):
    folder, name = write_clone(tmp_path / "clone"), "x; touch PWNED"
    (folder / "configs" / f"{name}.yaml").write_text(STUDY)
    (folder / "params.yaml").write_text(PARAMS.replace("studies: [tiny]", f"studies: [tiny, {quote(name)}]"))
    done = ran(folder, "dvc", "repro")
    assert done.returncode != 0 and "params.yaml: studies.1: String should match pattern" in done.stderr, done
    assert not list(folder.rglob("PWNED"))
    figure("refused by the first stage; nothing was run")


TEXTS = [
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "a | b || c",
    "`code` **bold** # head",
    "<a href='javascript:alert(1)'>x</a>",
    "&lt;script&gt; &#106;avascript:",
    "$x^2$ ![](http://example.com/pixel.png)",
    "costs $\\foo$",
    "</details><iframe src=x>",
    "```\nfence\n```",
    "- item\n\n# heading",
]
INERT = {
    *(
        "h1",
        "h2",
        "h3",
        "h4",
        "p",
        "em",
        "strong",
        "code",
        "pre",
        "ul",
        "ol",
        "li",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ),
    *("a", "img", "details", "summary", "br", "hr", "blockquote"),
}


class Active(HTMLParser):
    """What of a page could act or call out: other tags than a report needs, handlers, addresses that are not its own."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        own = ("#", "figures/", "../")
        wrong = [
            f"{name}={value}"
            for name, value in attrs
            if name.startswith("on") or (name in ("href", "src") and not value.startswith(own))
        ]
        self.found += wrong + [tag] * (tag not in INERT)


def shown(text):
    """Markdown as CommonMark with tables, HTML allowed, has it."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_free_text_is_shown_as_it_is_and_nothing_in_the_report_is_active(workspace, monkeypatch, figure):
    hostile = [
        CLAIM.splitlines()[1]
        .replace("id: a", f"id: a{n}")
        .replace("source: x", f"source: {quote(text)}")
        .replace("says: y", f"says: {quote(text)}")
        for n, text in enumerate(TEXTS)
    ]
    study = (
        STUDY.replace("title: A tiny study", f"title: {quote(TEXTS[0] + TEXTS[1] + TEXTS[3])}")
        + "claims:\n"
        + "\n".join(hostile)
        + "\n"
    )
    Path("configs/tiny.yaml").write_text(study, encoding="utf-8")
    title = quote("hunt " + "".join(TEXTS[:4]))
    Path("configs/hunt.yaml").write_text(SEARCH.replace("title: A tiny search", f"title: {title}"))
    train.run("tiny", drive)
    for stage in (evaluate, prune):
        stage.run("tiny")
    search.run("hunt", drive)
    report.run()
    text = Path("reports/report.md").read_text(encoding="utf-8")
    page = shown(text)
    assert page.count("<td") > 100 and Active(page).found == []
    for start in ("", "hunt "):
        assert html.escape(start + TEXTS[0], quote=False) + html.escape(TEXTS[1], quote=False) in page
    figure(f"{len(TEXTS)} texts in titles, sources and claims: no active content")


METRICS = ["radius/x` <img src=x onerror=alert(1)> `", "radius/\n\n<script>alert(1)</script>", "radius/\x1b[2Jx"]


@pytest.mark.parametrize("metric", METRICS, ids=["picture", "script", "escape"])
def test_a_hostile_metric_is_refused_or_shown_as_it_is(workspace, metric, figure):
    test = f"{{kind: bound, metric: {quote(metric)}, above: 0}}"
    Path("configs/tiny.yaml").write_text(f"{STUDY}claims:\n  - {{id: a, source: x, says: y, test: {test}}}\n")
    Path("params.yaml").write_text("studies: [tiny]\n")
    try:
        load_study("tiny")
    except ConfigError as refused:
        assert "claims.0" in str(refused) and str(refused).isprintable()
        figure("refused in one line")
        return
    for stage in (evaluate, prune):
        stage.run("tiny")
    report.run()
    text = Path("reports/report.md").read_text(encoding="utf-8")
    assert Active(shown(text)).found == [] and "\x1b" not in text
    figure("shown as it is")


ESCAPES = {
    "key": ("tiny", "title: A tiny study", 'title: A tiny study\n"\\e[2Jx": 1'),
    "key of a data axis": ("tiny", "limit: 300", 'axes: {"\\e[2Jx": [1]}'),
    "key of a choice": ("tiny", "where: {arm: vae}", 'where: {"\\e[2Jx": 1}'),
    "metric": ("tiny", "metric: test/mse", 'metric: "test/\\e[2Jx"'),
    "goal": ("hunt", "metric: validation/reconstruction", 'metric: "validation/\\e[2Jx"'),
    "space": ("hunt", "beta: {low", '"\\e[2Jx": {low'),
    "storage": ("hunt", "batch: 2", 'batch: 2\nstorage: "sqlite:////no/\\e[2Jx/optuna.db"'),
    "scheme": ("hunt", "batch: 2", 'batch: 2\nstorage: "\\e[2Jx://y"'),
    "listed": ("params", "{hunt: tiny}", '{"\\e[2Jx": tiny}'),
}


@pytest.mark.parametrize(("file", "right", "wrong"), ESCAPES.values(), ids=ESCAPES)
def test_no_text_of_a_config_steers_the_terminal_that_shows_its_error(workspace, file, right, wrong, figure):
    Path("params.yaml").write_text(PARAMS)
    Path("configs/tiny.yaml").write_text(CLAIMED)
    path = Path("params.yaml" if file == "params" else f"configs/{file}.yaml")
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    result = CliRunner().invoke(main, ["search", "hunt"] if file == "hunt" else ["train", "tiny"], color=True)  # a terminal
    assert result.exit_code == 1
    assert result.output.removesuffix("\n").isprintable(), ascii(result.output)
    figure("shown in readable characters")


def quote(text):
    return json.dumps(text)  # YAML too


@given(st.text(st.characters(exclude_categories=("C",)), max_size=80))  # a config holds no control characters
def test_escaped_text_renders_as_the_text_alone(text):
    page = shown(md.table(["x"], [[md.escape(text)]]))
    (cell,) = re.findall(r"<td>(.*)</td>", page, re.DOTALL)
    assert html.unescape(cell) == " ".join(text.split())
    assert set(re.findall(r"<(\w+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td"}
