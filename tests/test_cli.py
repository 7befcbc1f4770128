import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from pipeline.artifacts import read_json
from pipeline.cli import main
from pipeline.stages import code

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
    monkeypatch.chdir(tmp_path)
    code.run()
    digests = {name: read_json(Path("code") / f"{name}.json") for name in code.STAGES}
    metrics = (ROOT / "pipeline" / "metrics.py").read_bytes()
    assert {name for name in digests if "pipeline.metrics" in digests[name]} == {"evaluate", "prune", "report", "search"}
    assert digests["evaluate"]["pipeline.metrics"] == hashlib.sha256(metrics).hexdigest()
    assert {"pipeline.mlp", "pipeline"} <= set(digests["prepare"]), "an import of an import counts too, and its package"
    assert {"pipeline.trainer", "pipeline.stages.train"} <= set(digests["train"]) and "pipeline.figures" not in digests["train"]


def test_every_stage_is_one_plain_command():
    for name, stage in stages().items():
        assert re.fullmatch(rf"vaesweep {name.removesuffix('-alone')}( \$\{{[a-z.]+\}})?", stage.get("do", stage)["cmd"])


def test_the_lock_names_no_index():
    lock = (ROOT / "requirements.lock").read_text()
    assert "--hash=sha256:" in lock and "http" not in re.sub(r"^\S+==.*|^\s+#.*", "", lock, flags=re.MULTILINE)
