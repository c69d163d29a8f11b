"""Registration with the Auto classes: everything leads to this package, and back again."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

import bigbird_plus
from bigbird_plus import auto

from . import fresh
from .peers import MODELS, tiny_settings


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


def test_unregistering_leaves_what_a_fresh_transformers_has(tmp_path):
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
    fresh.run(script, folder=tmp_path)


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


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_of_transformers_makes_our_model(name):
    """With the same fields, in a configuration of ours that all parts share; the one that was given stays as it is."""
    theirs = transformers.BigBirdConfig(**tiny_settings(hidden_act="relu", num_labels=2), our_own=[1])
    before = theirs.to_dict()
    model = getattr(bigbird_plus, name)(theirs)
    assert theirs.to_dict() == before
    assert type(model.config) is bigbird_plus.BigBirdConfig
    assert model.config.our_own == [1]
    assert all(
        part.config is model.config for part in model.modules() if isinstance(part, transformers.PreTrainedModel)
    )
    expected = bigbird_plus.BigBirdConfig(**tiny_settings(hidden_act="relu"), our_own=[1])
    assert model.config.to_dict() == expected.to_dict()
    peer = getattr(transformers, name)(theirs)
    assert type(peer).__module__.startswith("transformers.")
    peer.load_state_dict(model.state_dict())


@pytest.mark.parametrize("config", [transformers.BertConfig(), {"hidden_size": 24}, None])
def test_any_other_configuration_is_refused(config):
    with pytest.raises(ValueError, match=f"must be a BigBirdConfig, but is a {type(config).__name__}"):
        bigbird_plus.BigBirdModel(config)


def test_auto_classes_take_configurations_of_transformers(checkpoint):
    config = transformers.BigBirdConfig(**tiny_settings())
    for auto_class, model_class in auto.auto_classes().items():
        assert type(auto_class.from_config(config)) is model_class, auto_class
    model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    config = transformers.BigBirdConfig.from_pretrained(checkpoint, block_size=32)
    model = AutoModelForMaskedLM.from_pretrained(checkpoint, config=config)
    assert type(model) is bigbird_plus.BigBirdForMaskedLM
    assert type(model.config) is bigbird_plus.BigBirdConfig
    assert model.config.block_size == 32
    assert model.config.name_or_path == str(checkpoint)
    assert type(AutoTokenizer.from_pretrained(checkpoint, config=config)) is bigbird_plus.BigBirdTokenizerFast
    ids = torch.arange(5)[None]
    expected = AutoModelForMaskedLM.from_pretrained(checkpoint, block_size=32)(ids).logits
    assert torch.equal(model(ids).logits, expected)


def test_the_built_in_classes_load_as_ever(checkpoint):
    """With everything of ours registered."""
    model = transformers.BigBirdModel.from_pretrained(checkpoint)
    assert type(model).__module__.startswith("transformers.")
    assert type(model.config).__module__.startswith("transformers.")


IMPORTS = """
import json
import transformers
from transformers import BigBirdConfig, BigBirdForSequenceClassification, BigBirdTokenizer, BigBirdTokenizerFast
from transformers.models.big_bird import BigBirdModel
from transformers.models.big_bird.configuration_big_bird import BigBirdConfig as Config
from transformers.models.big_bird.modeling_big_bird import BigBirdLayer, BigBirdPreTrainedModel
from transformers.models.big_bird.tokenization_big_bird import BigBirdTokenizer as Tokenizer

found = [BigBirdConfig, BigBirdForSequenceClassification, BigBirdTokenizer, BigBirdTokenizerFast, BigBirdModel, Config]
found += [BigBirdLayer, BigBirdPreTrainedModel, Tokenizer, transformers.BigBirdForMaskedLM]
found += [type(transformers.AutoModel.from_config(transformers.BigBirdConfig(num_hidden_layers=0, vocab_size=67)))]
"""


def test_replacing_the_built_in_classes(tmp_path):
    """And putting them back, whether they had been asked for before or not."""
    script = f"""
import transformers
asked = transformers.BigBirdForMaskedLM
import bigbird_plus
bigbird_plus.replace_builtin()
bigbird_plus.replace_builtin()
{IMPORTS}
assert all(one.__module__.startswith("bigbird_plus.") for one in found), found
slow_before = issubclass(BigBirdTokenizer, transformers.PreTrainedTokenizerFast)
bigbird_plus.unregister()
{IMPORTS}
assert all(one.__module__.startswith("transformers.") for one in found), found
assert asked is transformers.BigBirdForMaskedLM
assert slow_before == issubclass(BigBirdTokenizer, transformers.PreTrainedTokenizerFast)
bigbird_plus.register()
{IMPORTS}
assert [one.__module__.startswith("bigbird_plus.") for one in found] == [False] * 10 + [True], found
"""
    fresh.run(script, folder=tmp_path)


def test_the_trainer_is_not_imported_with_the_package(tmp_path):
    script = """
import sys
import bigbird_plus
assert "transformers.trainer" not in sys.modules
"""
    fresh.run(script, folder=tmp_path)


@pytest.mark.parametrize("first", ["peft", "bigbird_plus"])
def test_adapters_know_where_to_go(first, tmp_path):
    """In whatever order the two are imported; PEFT is not imported by ours."""
    script = f"""
import sys
import {first}
assert ("peft" in sys.modules) == ({first!r} == "peft")
import bigbird_plus, peft
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
assert table["big_bird"] == table["bert"]
config = bigbird_plus.BigBirdConfig(hidden_size=24, num_hidden_layers=1, vocab_size=67)
model = peft.get_peft_model(bigbird_plus.BigBirdForMaskedLM(config), peft.LoraConfig())
assert any("query.lora_A" in name for name, _ in model.named_parameters())
bigbird_plus.unregister()
assert "big_bird" not in table
bigbird_plus.register()
assert table["big_bird"] == table["bert"]
"""
    fresh.run(script, folder=tmp_path)


def test_adapters_do_not_know_what_is_not_registered(tmp_path):
    script = """
import bigbird_plus
bigbird_plus.unregister()
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
assert "big_bird" not in table
"""
    fresh.run(script, folder=tmp_path)


def test_importing_prints_nothing_and_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import bigbird_plus"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_classes_are_not_saved_with_models(tmp_path):
    """They are no single file. A subclass of one's own is transformers' matter, as with the built-in model."""
    for cls in (bigbird_plus.BigBirdModel, bigbird_plus.BigBirdForMaskedLM, bigbird_plus.BigBirdConfig):
        with pytest.raises(ValueError, match="Install bigbird_plus"):
            cls.register_for_auto_class()
    bigbird_plus.BigBirdModel(bigbird_plus.BigBirdConfig(**tiny_settings())).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())

    class Own(bigbird_plus.BigBirdModel):
        pass

    Own.register_for_auto_class()
    assert Own._auto_class == "AutoModel"
