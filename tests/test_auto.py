"""Registration with the Auto classes: everything leads to this package, and back again."""

import json
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

import bigbird_plus
from bigbird_plus import auto

from .peers import tiny_settings


@pytest.fixture
def registered():
    yield
    bigbird_plus.register()


def snapshot():
    return [dict(table) for table in auto.tables()]


def test_every_auto_class_builds_our_model():
    config = bigbird_plus.BigBirdConfig(**tiny_settings())
    assert type(AutoConfig.for_model("big_bird")) is bigbird_plus.BigBirdConfig
    classes = auto.auto_classes()
    assert len(classes) >= 9
    for auto_class, model_class in classes.items():
        assert type(auto_class.from_config(config)) is model_class, auto_class


def test_no_auto_class_that_knows_the_built_in_model_is_left_out():
    known = {
        name
        for name in dir(transformers)
        if name.startswith("AutoModel")
        and "big_bird" in getattr(getattr(getattr(transformers, name), "_model_mapping", None), "_model_mapping", {})
    }
    assert known == {name for name in auto.AUTO_MODELS if hasattr(transformers, name)}


def test_registering_twice_changes_nothing(registered):
    before = snapshot()
    bigbird_plus.register()
    assert snapshot() == before


def test_unregistering_restores_every_table(registered):
    ours = snapshot()
    bigbird_plus.unregister()
    bigbird_plus.unregister()
    assert type(AutoConfig.for_model("big_bird")) is transformers.BigBirdConfig
    theirs = snapshot()
    assert theirs != ours
    bigbird_plus.register()
    assert snapshot() == ours
    bigbird_plus.unregister()
    assert snapshot() == theirs


def test_unregistering_leaves_what_a_fresh_transformers_has():
    script = """
from transformers.models.auto import configuration_auto, tokenization_auto
import transformers
transformers.AutoModel, transformers.pipeline
tables = configuration_auto.CONFIG_MAPPING._extra_content, tokenization_auto.TOKENIZER_MAPPING._extra_content
before = [dict(table) for table in tables]
import bigbird_plus
bigbird_plus.unregister()
assert before == [dict(table) for table in tables], tables
model = transformers.AutoModel.from_config(transformers.BigBirdConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=37))
assert type(model).__module__.startswith("transformers."), type(model)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_folder_leads_to_our_classes(checkpoint):
    assert type(AutoModelForMaskedLM.from_pretrained(checkpoint)) is bigbird_plus.BigBirdForMaskedLM
    assert type(AutoTokenizer.from_pretrained(checkpoint)) is bigbird_plus.BigBirdTokenizerFast


def test_a_checkpoint_keeps_a_tokenizer_of_another_kind(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    bigbird_plus.BigBirdConfig(**tiny_settings()).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__.startswith("Bert")
    assert tokenizer("hello")["input_ids"] == [2, 5, 3]


def test_the_built_in_classes_stay_at_hand():
    assert transformers.BigBirdModel is not bigbird_plus.BigBirdModel
    assert transformers.BigBirdModel.__module__.startswith("transformers.")
