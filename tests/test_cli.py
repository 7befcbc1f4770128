import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from project import PARAMS, write_project
from ruamel.yaml import YAML
from tiny import SEARCH, STUDY

from pipeline import cli
from pipeline.artifacts import read_json
from pipeline.cli import main
from pipeline.stages import code
from pipeline.stages.search import Step
from pipeline.trials import Standing

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_and_stands_in_the_readme(name):
    assert main.commands[name].help
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
    assert f"vaesweep {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_help_imports_nothing_heavy():
    heavy = {"torch", "mlflow", "optuna", "pandas", "numpy", "ray"}
    calls = "import sys; from click.testing import CliRunner; from pipeline.cli import main; CliRunner().invoke(main, {!r})"
    for command in ([], ["--help"], ["train", "--help"]):
        code = f"{calls.format(command)}; print(*sorted(set(sys.modules) & {heavy}))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_configs_are_checked_without_torch():
    code = "import sys, pipeline.datasets, pipeline.searches; print('torch' in sys.modules, 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


@pytest.mark.parametrize(
    ("command", "name", "told"),
    [
        *((command, "digitz", "did you mean 'digits'?") for command in ("prepare", "train", "evaluate", "prune", "plan")),
        *(
            (command, "kl_weight", "is a search, which `vaesweep search kl_weight` runs")
            for command in ("prepare", "train", "evaluate", "prune", "plan")
        ),
        ("search", "kl_weigth", "lists no search 'kl_weigth' (did you mean 'kl_weight'?); there are: kl_weight, bound"),
        ("search", "digits", "lists no search 'digits'; there are: kl_weight, bound"),
    ],
)
def test_a_wrong_name_is_one_line_and_a_non_zero_exit(command, name, told):
    result = CliRunner().invoke(main, [command, name])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1 and told in result.output


def test_debug_shows_the_error_itself():
    result = CliRunner().invoke(main, ["--debug", "prepare", "digitz"])
    assert type(result.exception).__name__ == "ConfigError"


def standing(complete=0, pruned=0, failed=0, best=None, front=0):
    return Standing(36, complete, pruned, failed, 4, best, front)


@pytest.mark.parametrize(
    ("at", "left", "told"),
    [
        (standing(), None, "0/36 trials, 0 of them pruned; training"),
        (standing(8, 16), 12.4, "24/36 trials, 16 of them pruned; training; 12 s left"),
        (standing(8, 16, 3), None, "24/36 trials, 16 of them pruned, 3 failed; training"),
        (standing(8, best=-123.456789, front=1), 0.0, "8/36 trials, 0 of them pruned; best -123.457; training; 0 s left"),
        (standing(8, best=0.0, front=2), None, "8/36 trials, 0 of them pruned; best 0; training"),
        (standing(8, front=5), None, "8/36 trials, 0 of them pruned; 5 on the front; training"),
    ],
)
def test_a_search_is_told_in_one_line(at, left, told):
    assert cli._in_words("hunt", Step(at, "training", 0.5), left) == f"search hunt: {told}"


def test_without_a_terminal_a_search_is_told_where_it_does_something_else_and_now_and_then(monkeypatch, capsys):
    """A quarter of its work was done before."""
    clock = [100.0]
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def steps():
        for seconds, doing, share in (
            (0.0, "a", 0.25),
            (1.0, "a", 0.26),
            (2.0, "b", 0.27),
            (16.0, "b", 0.5),
            (18.0, "b", 0.75),
            (26.0, "c", 0.75),
            (27.0, "c", 0.8),
            (30.0, "d", 1.0),
        ):
            clock[0] = 100.0 + seconds
            yield Step(standing(front=3), doing, share)

    cli._show_search("hunt", steps())
    said = capsys.readouterr()
    told = [line.partition("; 3 on the front; ")[2] for line in said.err.splitlines()]
    assert told == ["a", "b", "b; 9 s left", "c; 13 s left", "d"] and not said.out


def test_a_search_that_does_one_thing_for_long_says_its_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def steps():
        for second in range(41):
            clock[0] = float(second)
            yield Step(standing(), "training", second / 100)

    cli._show_search("hunt", steps())
    told = [line.rpartition("; ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["training", "85 s left", "70 s left"]


def stages():
    return YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]


def test_every_stage_depends_on_its_own_code():
    """A stage that does not would stay as it is when its program changes."""
    assert {"code", *code.STAGES} == {name.removesuffix("-alone") for name in stages()}
    for name, stage in ((name.removesuffix("-alone"), stage) for name, stage in stages().items()):
        wanted = ["pipeline"] if name == "code" else [f"code/{name}.json"]
        assert [dep for dep in stage.get("do", stage)["deps"] if dep.startswith(("code", "pipeline"))] == wanted
        assert name == "code" or f"code/{name}.json" in stages()["code"]["outs"]


def test_code_digests_what_a_stage_imports_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path / "work"))
    code.run()
    digests = {name: read_json(Path("code") / f"{name}.json") for name in code.STAGES}
    metrics = (ROOT / "pipeline" / "metrics.py").read_bytes()
    assert {name for name in digests if "pipeline.metrics" in digests[name]} == {"evaluate", "prune", "report", "search"}
    assert digests["evaluate"]["pipeline.metrics"] == hashlib.sha256(metrics).hexdigest()
    assert {"pipeline.mlp", "pipeline"} <= set(digests["prepare"]), "an import of an import counts too, and its package"
    assert {"pipeline.trainer", "pipeline.stages.train"} <= set(digests["train"]) and "pipeline.figures" not in digests["train"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tiny", STUDY.replace("hidden", "hiden"), "configs/tiny.yaml: model.hiden: unknown key"),
        ("hunt", SEARCH.replace("trials", "trails"), "configs/hunt.yaml: trails: unknown key"),
        ("other", STUDY.replace("limit: 300", "limitt: 300"), "configs/other.yaml: data.limitt: unknown option"),
        ("other", "", "params.yaml: studies: there is no config 'other'"),
        ("another", SEARCH.replace("trials", "trails"), "configs/another.yaml: trails: unknown key"),
    ],
)
def test_a_wrong_config_of_any_scale_is_told_before_any_stage_runs(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(write_project(tmp_path / "work"))
    if text:
        Path("configs", f"{name}.yaml").write_text(text)
    scales = {"other": "{more: {studies: [other]}}", "another": "{more: {studies: [tiny], searches: {another: tiny}}}"}
    if name in scales:
        Path("params.yaml").write_text(PARAMS.replace("scales: {}", f"scales: {scales[name]}"))
    result = CliRunner().invoke(main, ["code"])
    assert result.exit_code == 1 and message in result.output and not Path("code").exists()


def test_every_stage_is_one_plain_command():
    for name, stage in stages().items():
        assert re.fullmatch(rf"vaesweep {name.removesuffix('-alone')}( \$\{{[a-z.]+\}})?", stage.get("do", stage)["cmd"])


def test_the_lock_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock and "http" not in re.sub(r"^\S+==.*|^\s+#.*", "", lock, flags=re.MULTILINE)
