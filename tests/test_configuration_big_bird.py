"""`BigBirdConfig`: the documented fields, the configurations of public checkpoints, and clear errors."""

import copy
import inspect
import json
import pickle

import pytest
import torch
import transformers

from bigbird_plus import BigBirdConfig, BigBirdForMaskedLM, BigBirdModel
from bigbird_plus.configuration_big_bird import FLAGS

from .peers import tiny_settings

DOCUMENTED = {
    "vocab_size": 50358,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 4096,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 66,
    "attention_type": "block_sparse",
    "use_bias": True,
    "rescale_embeddings": False,
    "block_size": 64,
    "num_random_blocks": 3,
    "classifier_dropout": None,
}
OURS_ALONE = {"eval_random_blocks": False, "num_sliding_window_blocks": 3, "num_global_blocks": 2}

# What is odd about the configurations of public checkpoints, with sizes small enough to build the model.
PUBLIC = {
    "keys of old versions": {"gradient_checkpointing": False, "position_embedding_type": "absolute"},
    "checkpointing in the file": {"gradient_checkpointing": True, "hidden_act": "gelu_fast"},
    "head size 20": {"hidden_size": 220, "num_attention_heads": 11, "num_hidden_layers": 1},
    "head size 30": {"hidden_size": 300, "num_attention_heads": 10, "num_hidden_layers": 1},
    "block of 128": {"block_size": 128},
    "padding is 3": {"pad_token_id": 3, "sep_token_id": 66},
    "many token types": {"type_vocab_size": 164, "vocab_size": 90, "bos_token_id": 101, "sep_token_id": 102},
    "never long enough to be sparse": {"max_position_embeddings": 512, "vocab_size": 69, "block_size": 64},
    "other special ids": {"pad_token_id": 0, "bos_token_id": 104, "eos_token_id": 105, "sep_token_id": 105},
    "decoder": {"is_decoder": True, "type_vocab_size": 16, "intermediate_size": 37},
}


def reload(config, folder, **overrides):
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder, **overrides)


def test_defaults_are_the_documented_ones():
    ours, theirs = BigBirdConfig(), transformers.BigBirdConfig()
    for field, value in DOCUMENTED.items():
        assert getattr(ours, field) == value == getattr(theirs, field), field
    assert {field: getattr(ours, field) for field in OURS_ALONE} == OURS_ALONE
    assert ours.model_type == theirs.model_type == "big_bird"


def test_positional_arguments_keep_the_documented_order():
    order = [name for name in DOCUMENTED if name != "is_decoder"]
    parameters = inspect.signature(BigBirdConfig).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order
    assert BigBirdConfig(100, 32, 3, 4).num_attention_heads == 4


def test_what_the_library_reads_is_declared():
    config = BigBirdConfig()
    assert (config.is_decoder, config.add_cross_attention, config.tie_word_embeddings) == (False, False, True)
    assert config.num_labels == 2


@pytest.mark.parametrize("oddity", PUBLIC)
def test_public_checkpoints(tmp_path, oddity):
    settings = tiny_settings(**PUBLIC[oddity])
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "big_bird", "architectures": ["BigBirdForMaskedLM"], **settings})
    )
    config = BigBirdConfig.from_pretrained(tmp_path)
    again = reload(config, tmp_path / "again")
    for field, value in settings.items():
        assert getattr(config, field) == value == getattr(again, field), field
    model = BigBirdForMaskedLM(config).eval()
    ids = torch.randint(4, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    assert model(ids).logits.shape == (1, 40, settings["vocab_size"])
    assert model.bert.embeddings.word_embeddings.padding_idx == settings.get("pad_token_id", 0)


def test_checkpointing_in_the_file_switches_it_on():
    config = BigBirdConfig(**tiny_settings(gradient_checkpointing=True))
    assert BigBirdModel(config).is_gradient_checkpointing


def test_unknown_keys_survive_a_round_trip(tmp_path):
    config = BigBirdConfig(foo={"bar": [1, 2]}, position_embedding_type="absolute", tokenizer_class="BertTokenizer")
    again = reload(config, tmp_path)
    assert (again.foo, again.position_embedding_type) == ({"bar": [1, 2]}, "absolute")
    assert again.tokenizer_class == "BertTokenizer"
    assert json.loads((tmp_path / "config.json").read_text())["foo"] == {"bar": [1, 2]}


def test_every_field_survives_a_round_trip(tmp_path):
    values = tiny_settings(
        attention_type="original_full",
        use_bias=False,
        rescale_embeddings=True,
        is_decoder=True,
        add_cross_attention=True,
        use_cache=False,
        tie_word_embeddings=False,
        sep_token_id=7,
        classifier_dropout=0.25,
        hidden_act="relu",
        layer_norm_eps=1e-6,
        initializer_range=0.1,
        eval_random_blocks=True,
        num_sliding_window_blocks=5,
        num_global_blocks=4,
    )
    again = reload(BigBirdConfig(**values), tmp_path)
    assert {field: getattr(again, field) for field in values} == values


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    settings = tiny_settings(attention_type="original_full", num_random_blocks=2)
    reload(BigBirdConfig(**settings), tmp_path)
    theirs = transformers.BigBirdConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BigBirdConfig.from_pretrained(tmp_path / "theirs")
    for field in (*DOCUMENTED, *settings):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_overrides_on_loading(tmp_path):
    config = reload(BigBirdConfig(**tiny_settings()), tmp_path, attention_type="original_full", num_labels=5)
    assert (config.attention_type, config.num_labels, len(config.id2label)) == ("original_full", 5, 5)
    config, unused = BigBirdConfig.from_pretrained(tmp_path, block_size=16, nothing=1, return_unused_kwargs=True)
    assert config.block_size == 16
    assert unused == {"nothing": 1}


def test_labels_keep_their_names(tmp_path):
    config = reload(BigBirdConfig(id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0}), tmp_path)
    assert config.num_labels == 3
    assert config.id2label[2] == "yes"


def test_equality_looks_at_our_fields():
    assert BigBirdConfig(**tiny_settings()) == BigBirdConfig(**tiny_settings())
    assert BigBirdConfig(hidden_size=24) != BigBirdConfig(hidden_size=48)
    assert BigBirdConfig(eval_random_blocks=True) != BigBirdConfig()
    assert BigBirdConfig() != "big_bird"
    with pytest.raises(TypeError, match="unhashable"):
        hash(BigBirdConfig())


class Renamed(BigBirdConfig):
    model_type = "renamed_big_bird"


class Extended(BigBirdConfig):
    def __init__(self, extra=1, **kwargs):
        self.extra = extra
        super().__init__(**kwargs)


@pytest.mark.parametrize("config", [Renamed(hidden_size=24), Extended(extra=5, hidden_size=24)])
def test_subclasses(tmp_path, config):
    assert config.hidden_size == 24
    assert config.block_size == 64
    again = reload(config, tmp_path)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()
    assert again != type(config)(hidden_size=48)
    with pytest.raises(ValueError, match="block_size"):
        type(config)(block_size=0)


def test_a_subclass_takes_positional_arguments():
    assert Renamed(100, 24).hidden_size == 24


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies(copied):
    config = BigBirdConfig(**tiny_settings(foo=[1]))
    again = copied(config)
    assert again == config
    again.foo.append(2)
    assert config.foo == [1]


WRONG = [
    ("attention_type", "sparse"),
    ("attention_type", None),
    ("block_size", 0),
    ("block_size", 64.0),
    ("block_size", True),
    ("num_random_blocks", -1),
    ("num_random_blocks", None),
    ("num_sliding_window_blocks", 4),
    ("num_sliding_window_blocks", -3),
    ("num_sliding_window_blocks", 0),
    ("num_global_blocks", -2),
    ("num_global_blocks", 1.5),
    ("hidden_size", -1),
    ("hidden_size", "768"),
    ("num_attention_heads", 0),
    ("num_hidden_layers", -1),
    ("intermediate_size", 0),
    ("vocab_size", 0),
    ("type_vocab_size", 0),
    ("max_position_embeddings", 0),
    ("hidden_act", "gelu_old"),
    ("hidden_act", None),
    ("hidden_dropout_prob", 1.5),
    ("hidden_dropout_prob", "0.1"),
    ("attention_probs_dropout_prob", -0.1),
    ("attention_probs_dropout_prob", None),
    ("classifier_dropout", 2),
    ("classifier_activation", "gelu_old"),
    ("layer_norm_eps", -1e-12),
    ("initializer_range", -0.02),
    ("initializer_range", float("nan")),
    ("layer_norm_eps", float("inf")),
    ("layer_norm_eps", None),
    ("hidden_act", 5),
    ("hidden_act", ["gelu"]),
    ("hidden_act", torch.nn.ReLU),
    ("classifier_activation", {}),
    ("chunk_size_feed_forward", -3),
    ("chunk_size_feed_forward", None),
    ("random_plan_positions", "4096"),
    ("random_blocks", [0]),
    ("random_blocks", "0,a"),
    ("mask_token_id", "<mask>"),
    ("num_extra_global_tokens", 1.0),
    ("global_block_indices", "0"),
    ("global_block_indices", [0.5]),
    ("global_block_indices", 3),
    ("pad_token_id", 50358),
    ("pad_token_id", -50359),
    ("pad_token_id", "0"),
    ("pad_token_id", [0]),
    ("pad_token_id", 1.5),
    ("pad_token_id", True),
    ("bos_token_id", "<s>"),
    ("eos_token_id", ["</s>"]),
    ("sep_token_id", [66]),
    *((field, value) for field in FLAGS for value in ("false", 1, None)),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        BigBirdConfig(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"token_dropout": True}, ["mask_token_id"]),
        ({"token_dropout": True, "mask_token_id": 4, "is_decoder": True}, ["token_dropout", "is_decoder"]),
        ({"random_blocks": ";".join(12 * [",,"]), "is_decoder": True}, ["random_blocks", "is_decoder"]),
    ],
)
def test_fields_that_do_not_go_together(fields, names):
    with pytest.raises(ValueError) as error:
        BigBirdConfig(**fields)
    assert all(name in str(error.value) for name in names)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match=r"hidden_size \(100\).*num_attention_heads \(12\)"):
        BigBirdConfig(hidden_size=100)


@pytest.mark.parametrize(
    "value",
    [
        {"num_random_blocks": 0},
        {"num_hidden_layers": 0},
        {"num_global_blocks": 0},
        {"pad_token_id": None},
        {"bos_token_id": None},
        {"eos_token_id": [1, 2]},
        {"layer_norm_eps": 0},
        {"hidden_act": torch.tanh},
    ],
)
def test_borderline_values_are_fine(value):
    field, expected = next(iter(value.items()))
    assert getattr(BigBirdConfig(**value), field) == expected


@pytest.mark.parametrize("pad_token_id", [None, -1, -120, 119])
def test_padding_is_where_the_built_in_model_has_it(pad_token_id):
    settings = tiny_settings(pad_token_id=pad_token_id)
    ours, theirs = (
        BigBirdModel(BigBirdConfig(**settings)),
        transformers.BigBirdModel(transformers.BigBirdConfig(**settings)),
    )
    expected = theirs.embeddings.word_embeddings.padding_idx
    assert ours.embeddings.word_embeddings.padding_idx == expected
    assert expected is None or not ours.embeddings.word_embeddings.weight[expected].any()


def test_a_model_checks_what_was_changed_since():
    config = BigBirdConfig(**tiny_settings())
    config.num_sliding_window_blocks = 2
    with pytest.raises(ValueError, match="num_sliding_window_blocks"):
        BigBirdModel(config)
