"""`python -m bigbird_plus script.py ...` runs a script as `python script.py ...` does, on this package's BigBird.

Importing the package registers it, and that is how Python comes here. Scripts that import `BigBirdModel` and its like
from transformers get ours as well.
"""

import importlib.util
import os
import runpy
import sys

from .auto import replace_builtin

USAGE = """\
usage: python -m bigbird_plus SCRIPT [ARGUMENT ...]
       python -m bigbird_plus -m MODULE [ARGUMENT ...]"""
HELP = f"""\
{USAGE}

Runs a Python script or module on bigbird_plus. The Auto classes and pipelines of transformers use it, and what the
script imports as BigBirdModel, BigBirdConfig, BigBirdTokenizer and so on from transformers is bigbird_plus's."""


def main() -> None:
    """Runs what `sys.argv` names. If that cannot be run, a line on standard error says so, with exit status 2."""
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(HELP)
    elif arguments[:1] == ["-m"] and len(arguments) > 1:
        _run_module(arguments[1:])
    elif arguments and not arguments[0].startswith("-"):
        _run_script(arguments)
    else:
        _refuse(USAGE)


def _run_script(arguments: list[str]) -> None:
    script = arguments[0]
    if not os.path.isfile(script):
        _refuse(f"bigbird_plus: there is no script {script!r}")
    replace_builtin()
    sys.argv = arguments
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))  # -m has put the working folder there
    runpy.run_path(os.path.abspath(script), run_name="__main__")  # absolute, as Python makes __file__


def _run_module(arguments: list[str]) -> None:
    module = arguments[0]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package above it
        found = None
    if found is None:
        _refuse(f"bigbird_plus: there is no module {module!r}")
    replace_builtin()
    sys.argv = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _refuse(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
