"""Tests run offline, in a Hub cache of their own, and each worker of pytest-xdist on one core."""

import json
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
import torch  # noqa: E402
import transformers  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before our kernels are defined: Triton's interpreter runs them on the CPU

from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM  # noqa: E402
from bigbird_plus.cli import main  # noqa: E402
from bigbird_plus.demo import DATA  # noqa: E402

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run, whatever ran before it."""
    torch.manual_seed(0)


def pytest_unconfigure():
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as the public repositories have it: a small BigBird with random weights, and the public vocabulary."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = BigBirdConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BigBirdForMaskedLM(config).save_pretrained(folder)
    shutil.copyfile(DATA / "spiece.model", folder / "spiece.model")
    settings = {"tokenizer_class": "BigBirdTokenizer", "model_max_length": config.max_position_embeddings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def run_command(capsys, quiet_transformers):
    """`run_command("env")`: what the command prints, which must succeed."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert not exit_info.value.code, printed.err
        return printed.out

    return run


@pytest.fixture
def quiet_transformers():
    """The command silences transformers for its process; here the process goes on."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


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
