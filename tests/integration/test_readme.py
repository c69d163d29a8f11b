"""The README's Python runs from top to bottom, and its commands exist."""

import re
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import bigbird_plus
from bigbird_plus.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_python(checkpoint, add_to_hub_cache):
    add_to_hub_cache("google/bigbird-roberta-base", checkpoint)
    variables = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)), variables)
    assert type(variables["fill"].model) is bigbird_plus.BigBirdForMaskedLM
    assert type(variables["tokenizer"]) is bigbird_plus.BigBirdTokenizerFast
    assert type(variables["model"]) is bigbird_plus.BigBirdModel
    assert variables["model"].config._attn_implementation == "sdpa"
    assert variables["context"].shape == (1, 12, 4000, 64)
    assert type(transformers.AutoConfig.for_model("big_bird")) is bigbird_plus.BigBirdConfig  # registered again


@pytest.mark.parametrize("command", sorted(set(re.findall(r"bigbird-plus ([a-z-]+)", README))))
def test_commands_exist(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_pictures_exist():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (Path(__file__).parents[2] / picture).is_file()


def test_threshold_is_the_one_named():
    assert bigbird_plus.Sparsity(num_attention_heads=12).full_attention_length == 704
