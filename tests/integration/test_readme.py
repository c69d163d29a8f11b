"""The README's Python runs from top to bottom, and its commands exist."""

import re
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import bigbird_plus
from bigbird_plus.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def write_bert(folder) -> Path:
    """A small BERT, as the Hub has it."""
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "plants", "create", "light", "they", "need", "."]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    return folder


def test_python(checkpoint, add_to_hub_cache, tmp_path, monkeypatch):
    for name in ("google/bigbird-roberta-base", "google/bigbird-base-trivia-itc"):
        add_to_hub_cache(name, checkpoint)
    add_to_hub_cache("google-bert/bert-base-uncased", write_bert(tmp_path / "bert"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Ruth lit the lamp. " * 2000, encoding="utf-8")
    variables = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)), variables)
    assert type(variables["fill"].model) is bigbird_plus.BigBirdForMaskedLM
    assert type(variables["tokenizer"]) is bigbird_plus.BigBirdTokenizerFast
    assert type(variables["model"]) is bigbird_plus.BigBirdModel
    assert variables["model"].config._attn_implementation == "sdpa"
    assert variables["context"].shape == (1, 12, 4000, 64)
    assert type(variables["fill_long"].model) is bigbird_plus.BigBirdForMaskedLM
    assert [one.keys() for one in variables["found"]] == [{"score", "start", "end", "answer"}] * 2
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
