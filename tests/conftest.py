"""Tests run offline, in a Hub cache of their own, and each worker of pytest-xdist on one core."""

import os
import shutil
import tempfile
from pathlib import Path

# Before anything imports torch, transformers or the Hub's client, which read these once.
HF_HOME = tempfile.mkdtemp(prefix="bigbird-plus-tests-")
os.environ |= {"HF_HOME": HF_HOME, "HF_HUB_OFFLINE": "1"}
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from bigbird_plus.demo import write_untrained_checkpoint  # noqa: E402

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("tests")


def pytest_unconfigure():
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as the public repositories have it: a small BigBird with random weights, and the public vocabulary."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_untrained_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def add_to_hub_cache():
    """`add_to_hub_cache(name, folder)` makes the files of a folder load under a name of the Hub."""

    def add(name: str, folder: Path) -> None:
        repository = Path(HF_HOME, "hub", f"models--{name.replace('/', '--')}")
        revision = "0" * 40
        shutil.copytree(folder, repository / "snapshots" / revision, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)

    return add
