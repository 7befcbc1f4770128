import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_help_and_stands_in_the_readme(name):
    assert main.commands[name].help
    assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
    assert f"vaesweep {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_help_imports_nothing_heavy():
    heavy = {"torch", "mlflow", "optuna", "pandas", "numpy", "ray"}
    code = f"import sys, pipeline.cli; print(*sorted(set(sys.modules) & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "prune", "search", "plan"])
def test_a_wrong_name_is_one_line_and_a_non_zero_exit(command):
    result = CliRunner().invoke(main, [command, "digitz"])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1 and "digits" in result.output


def test_debug_shows_the_error_itself():
    result = CliRunner().invoke(main, ["--debug", "prepare", "digitz"])
    assert type(result.exception).__name__ == "ConfigError"


def test_a_stages_deps_are_what_its_file_imports():
    """DVC follows no imports, so a dependency that is missing from dvc.yaml would leave a stage stale."""
    graph = grimp.build_graph("pipeline")
    for name, stage in YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"].items():
        imported = graph.find_upstream_modules(f"pipeline.stages.{name}") | {f"pipeline.stages.{name}"}
        deps = {dep for dep in stage.get("do", stage)["deps"] if dep.endswith(".py")}
        assert deps == {f"{module.replace('.', '/')}.py" for module in imported}, name


def test_every_stage_is_one_plain_command():
    for name, stage in YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"].items():
        assert re.fullmatch(rf"vaesweep {name}( \$\{{[a-z.]+\}})?", stage.get("do", stage)["cmd"])


def test_the_lock_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock and "http" not in re.sub(r"^\S+==.*|^\s+#.*", "", lock, flags=re.MULTILINE)
