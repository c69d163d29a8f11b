"""`python -m bigbird_plus` runs scripts as Python itself does, with BigBird registered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bigbird_plus
from bigbird_plus import __main__ as runner

SCRIPT = """
import json, sys
import sibling

facts = {"argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "sibling": sibling.VALUE}
if "bigbird_plus" in sys.modules:
    from transformers import AutoConfig, BigBirdModel
    facts["model"] = BigBirdModel.__module__
    facts["config"] = AutoConfig.for_model("big_bird").__class__.__module__
print(json.dumps(facts))
sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a script and a module that it imports."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "script.py").write_text(SCRIPT)
    (scripts / "sibling.py").write_text("VALUE = 42")
    return scripts


def run(folder, *arguments) -> dict:
    root = str(Path(bigbird_plus.__file__).parents[1])
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 3, result.stderr
    return json.loads(result.stdout)


def assert_finds_ours(facts):
    for fact in ("config", "model"):
        assert facts.pop(fact).startswith("bigbird_plus.")


@pytest.mark.slow
def test_script_runs_as_with_python(folder):
    arguments = ["scripts/script.py", "--steps", "5", "-m"]
    plain = run(folder.parent, *arguments)
    ours = run(folder.parent, "-m", "bigbird_plus", *arguments)
    assert_finds_ours(ours)
    plain["argv"][0] = os.path.join(folder, "script.py")  # the one difference: absolute
    assert ours == plain
    assert ours["argv"][1:] == arguments[1:]
    assert ours["name"] == "__main__"
    assert ours["sibling"] == 42


@pytest.mark.slow
def test_module_runs_as_with_python(folder):
    plain = run(folder, "-m", "script", "--steps")
    ours = run(folder, "-m", "bigbird_plus", "-m", "script", "--steps")
    assert_finds_ours(ours)
    assert ours == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m bigbird_plus SCRIPT"),
        (["-m"], "usage: python -m bigbird_plus SCRIPT"),
        (["--steps", "5"], "usage: python -m bigbird_plus SCRIPT"),
        (["no_such_script.py"], "bigbird_plus: there is no script 'no_such_script.py'"),
        (["-m", "no_such_module"], "bigbird_plus: there is no module 'no_such_module'"),
        (["-m", "no_such_package.module"], "bigbird_plus: there is no module 'no_such_package.module'"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bigbird_plus", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runner.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bigbird_plus", "--help"])
    runner.main()
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m bigbird_plus SCRIPT")
    assert "from transformers is bigbird_plus's" in shown
