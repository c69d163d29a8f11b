"""A file for each client. Those whose client is not installed (`pip install -e ".[test,clients]"`) are left out."""

from importlib.util import find_spec

CLIENTS = {
    "test_evaluate.py": "evaluate",
    "test_lightning.py": "lightning",
    "test_optuna.py": "optuna",
    "test_sentence_transformers.py": "sentence_transformers",
    "test_setfit.py": "setfit",
    "test_trl.py": "trl",
}
collect_ignore = [file for file, package in CLIENTS.items() if find_spec(package) is None]
