"""Checkpoints that are written here and read by transformers alone, in a process without the package, and the other
way round."""

import subprocess
import sys

import pytest
import torch

import bigbird_plus
from tests.peers import MODELS, make_pair, random_inputs

SHAPES = {"full": 40, "sparse": 128}
SCRIPT = """
import sys, torch, transformers
for name in sys.argv[1:]:
    model, info = getattr(transformers, name).from_pretrained(f"{name}/ours", output_loading_info=True)
    assert not any(info.values()), (name, info)
    model.eval().save_pretrained(f"{name}/theirs")
    for kind in ("sparse", "full"):  # a short input switches it to full attention for ever
        with torch.no_grad():
            outputs = model(**torch.load(f"{name}/{kind}.inputs"), return_dict=False)
        torch.save([value for value in outputs if isinstance(value, torch.Tensor)], f"{name}/{kind}.outputs")
assert "bigbird_plus" not in sys.modules
"""


def settings_of(name):
    return {"is_decoder": name == "BigBirdForCausalLM", "use_cache": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model, written by us, read by transformers, and written again; and what it makes of some inputs."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        model, _ = make_pair(name, **settings_of(name))
        model.save_pretrained(folder / name / "ours")
        for kind, length in SHAPES.items():
            torch.save(random_inputs(name, 2, length, padded=False, labels=False), folder / name / f"{kind}.inputs")
    subprocess.run([sys.executable, "-c", SCRIPT, *MODELS], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_ours_and_we_read_theirs(name, folder):
    model, info = getattr(bigbird_plus, name).from_pretrained(folder / name / "theirs", output_loading_info=True)
    assert not any(info.values())
    kinds = ["full"] if name == "BigBirdForCausalLM" else list(SHAPES)  # their sparse decoder reads the future
    for kind in kinds:
        with torch.no_grad():
            outputs = model.eval()(**torch.load(folder / name / f"{kind}.inputs"), return_dict=False)
        expected = torch.load(folder / name / f"{kind}.outputs")
        found = [value for value in outputs if isinstance(value, torch.Tensor)]
        assert len(found) == len(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
