"""Checkpoints of BERT, RoBERTa and its kin, and of Google: made small, written to files, converted, compared."""

import json
import re
import warnings

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

import bigbird_plus
from bigbird_plus import BigBirdConfig, convert_checkpoint

from .peers import random_ids, scale_weights, tiny_settings
from .tf_files import write_checkpoint

CONFIGS = {
    "Bert": transformers.BertConfig,
    "Roberta": transformers.RobertaConfig,
    "XLMRoberta": transformers.XLMRobertaConfig,
    "Camembert": transformers.CamembertConfig,
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForCausalLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
)
SOURCES = [
    *((family, head) for family in ("Bert", "Roberta") for head in HEADS),
    ("Bert", "ForPreTraining"),
    *(
        (family, head)
        for family in ("XLMRoberta", "Camembert")
        for head in ("ForMaskedLM", "ForSequenceClassification")
    ),
]


def make_source(folder, family, head, *, dtype=torch.float32, **settings):
    """Writes a small model with 512 positions, and returns it."""
    config = {
        "vocab_size": 120,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512 if family == "Bert" else 514,
        "type_vocab_size": 2 if family == "Bert" else 1,
        "is_decoder": head == "ForCausalLM",
        "sep_token_id": 4,
    }
    if head in ("ForSequenceClassification", "ForTokenClassification"):
        config["num_labels"] = 3
    model_class = getattr(transformers, (family + head).replace("BertForCausalLM", "BertLMHeadModel"))
    model = scale_weights(model_class(CONFIGS[family](**{**config, **settings}))).to(dtype)
    model.save_pretrained(folder)
    return model.eval()


def make_inputs(source, length, *, batch=2, padded=True, multiple_choice=False):
    """Ids without the source's special ones, and a mask: the rows after the first end with padding."""
    ids = random_ids(batch, length, low=5)
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, length - 100 :] = 0
        ids = ids.masked_fill(mask == 0, source.config.pad_token_id)
    return {
        "input_ids": ids[None] if multiple_choice else ids,
        "attention_mask": mask[None] if multiple_choice else mask,
    }


@torch.no_grad()
def outputs(model, inputs):
    """All outputs that are tensors, those of padding set to zero."""
    mask = inputs["attention_mask"]
    found = {name: output for name, output in model(**inputs).items() if isinstance(output, torch.Tensor)}
    by_token = {name for name, output in found.items() if output.shape[: mask.dim()] == mask.shape}
    return {name: output * mask[..., None] if name in by_token else output for name, output in found.items()}


def assert_same_outputs(ours, theirs, inputs):
    torch.testing.assert_close(outputs(ours, inputs), outputs(theirs, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "head"), SOURCES)
def test_short_inputs_get_the_logits_of_the_source_and_long_ones_are_read_sparsely(tmp_path, family, head):
    source = make_source(tmp_path / "source", family, head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_checkpoint(tmp_path / "source", tmp_path / "target")
    model = getattr(bigbird_plus, f"BigBird{head}").from_pretrained(tmp_path / "target").eval()
    multiple_choice = head == "ForMultipleChoice"
    assert_same_outputs(model, source, make_inputs(source, 400, multiple_choice=multiple_choice))

    inputs = make_inputs(source, 2000, batch=1, padded=False, multiple_choice=multiple_choice)
    sparse = outputs(model, inputs)
    model.config.block_size = 1024  # so that all of it is read
    full = outputs(model, inputs)
    for name, output in sparse.items():
        assert output.isfinite().all()
        assert not torch.allclose(output, full[name], atol=1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_positions_repeat_those_of_the_source(tmp_path, family):
    source = make_source(tmp_path / "source", family, "Model")
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target", 1300)
    theirs = source.embeddings.position_embeddings.weight[0 if family == "Bert" else 2 :]
    ours = model.embeddings.position_embeddings.weight
    assert model.config.max_position_embeddings == len(ours) == 1300
    torch.testing.assert_close(ours, torch.cat([theirs, theirs, theirs[:276]]), rtol=0, atol=0)


def test_padding_on_the_left(tmp_path):
    """BERT counts it, as BigBird does. RoBERTa does not, and needs position_ids."""
    for family in ("Bert", "Roberta"):
        source = make_source(tmp_path / family, family, "ForMaskedLM")
        model = convert_checkpoint(tmp_path / family, tmp_path / f"{family}-target")
        inputs = {name: tensor.flip(-1) for name, tensor in make_inputs(source, 300).items()}
        expected = outputs(source, inputs)
        if family == "Roberta":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-4)


def test_two_sentences(tmp_path):
    source = make_source(tmp_path / "source", "Bert", "ForPreTraining")
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    inputs = make_inputs(source, 120)
    assert_same_outputs(model, source, {**inputs, "token_type_ids": (torch.arange(120) > 50).long().expand(2, -1)})


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_projections_that_are_not_tied(tmp_path, family):
    source = make_source(tmp_path / "source", family, "ForMaskedLM", tie_word_embeddings=False)
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    model = bigbird_plus.BigBirdForMaskedLM.from_pretrained(tmp_path / "target").eval()
    assert_same_outputs(model, source, make_inputs(source, 200))


def test_decoders_with_cross_attention(tmp_path):
    source = make_source(tmp_path / "source", "Bert", "ForCausalLM", add_cross_attention=True)
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    states = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))
    assert_same_outputs(
        model, source, {**make_inputs(source, 200), "encoder_hidden_states": states, "use_cache": False}
    )


def test_a_masked_language_model_becomes_a_decoder(tmp_path):
    make_source(tmp_path / "source", "Roberta", "ForMaskedLM")
    source = transformers.RobertaForCausalLM.from_pretrained(tmp_path / "source", is_decoder=True).eval()
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target", architecture="BigBirdForCausalLM")
    assert model.config.is_decoder
    assert_same_outputs(model, source, {**make_inputs(source, 200), "use_cache": False})


def test_question_answering_has_a_new_head(tmp_path):
    source = make_source(tmp_path / "source", "Bert", "ForQuestionAnswering")
    with pytest.warns(UserWarning, match=r"no weights for qa_classifier\..* of BigBirdForQuestionAnswering"):
        model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert_same_outputs(model.bert, source.bert, make_inputs(source, 200))


def test_heads_of_another_kind_are_new(tmp_path):
    """The classifier of tokens has the names and shapes of that of texts, and is not taken for it."""
    make_source(tmp_path / "source", "Bert", "ForTokenClassification")
    with pytest.warns(UserWarning, match=r"no weights for classifier\.dense, classifier\.out_proj"):
        model = convert_checkpoint(
            tmp_path / "source", tmp_path / "target", architecture="BigBirdForSequenceClassification", num_labels=5
        )
    assert model.classifier.out_proj.weight.shape == (5, 32)
    assert model.config.classifier_activation == "tanh"


def test_part_of_a_pretrained_model(tmp_path):
    source = make_source(tmp_path / "source", "Bert", "ForPreTraining")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = convert_checkpoint(tmp_path / "source", tmp_path / "target", architecture="BigBirdForMaskedLM")
    inputs = make_inputs(source, 200)
    expected = outputs(source, inputs)["prediction_logits"]
    torch.testing.assert_close(outputs(model, inputs)["logits"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.bert.pooler.weight, source.bert.pooler.dense.weight, rtol=0, atol=0)


def test_what_the_configuration_says(tmp_path):
    make_source(
        tmp_path / "source",
        "Roberta",
        "ForSequenceClassification",
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        classifier_dropout=0.4,
        initializer_range=0.05,
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
        problem_type="multi_label_classification",
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "target", block_size=16, num_random_blocks=1)
    source, config = (AutoConfig.from_pretrained(tmp_path / name) for name in ("source", "target"))
    assert isinstance(config, BigBirdConfig)
    carried = (
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "initializer_range",
        "id2label",
        "label2id",
        "problem_type",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
    )
    assert {name: getattr(config, name) for name in carried} == {name: getattr(source, name) for name in carried}
    assert (config.attention_type, config.block_size, config.num_random_blocks) == ("block_sparse", 16, 1)
    assert (config.classifier_activation, config.max_position_embeddings) == ("tanh", 4096)
    assert config.type_vocab_size == 2


def test_special_ids_that_a_source_does_not_have(tmp_path):
    make_source(tmp_path / "source", "Bert", "Model", sep_token_id=None)
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    config = AutoConfig.from_pretrained(tmp_path / "target")
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.sep_token_id) == (
        0,
        None,
        None,
        None,
    )


def test_half_precision_stays(tmp_path):
    make_source(tmp_path / "source", "Bert", "ForMaskedLM", dtype=torch.bfloat16)
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    model = bigbird_plus.BigBirdForMaskedLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------------------------------
# Tokenizers, and names of the Hub
# -------------------------------------------------------------------------------------------------------------------


def write_vocabulary(folder, kind):
    """The files of a tokenizer as they are on the Hub."""
    config = {"tokenizer_class": f"{kind}Tokenizer", "model_max_length": 512}
    if kind == "Bert":
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "plants",
            "create",
            "energy",
            "##s",
            "through",
            "light",
        ]
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    elif kind == "Roberta":
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "en", "<mask>"]
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\ne n\n")
    else:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["Plants create energy through light."] * 9),
            model_prefix=str(folder / "sentencepiece.bpe"),
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / "sentencepiece.bpe.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", CONFIGS)
def test_tokenizers_come_along(tmp_path, family):
    make_source(tmp_path / "source", family, "ForMaskedLM", vocab_size=300, sep_token_id=None)
    write_vocabulary(tmp_path / "source", family)
    convert_checkpoint(tmp_path / "source", tmp_path / "target", 2048)
    source, target = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "target"))
    assert type(target) is type(source)
    assert target.model_max_length == 2048
    text = "Plants create energy through light, " * 3
    assert target(text)["input_ids"] == source(text)["input_ids"]
    assert target(text, "Really?")["input_ids"] == source(text, "Really?")["input_ids"]
    assert AutoConfig.from_pretrained(tmp_path / "target").sep_token_id == source.sep_token_id


def test_no_tokenizer_is_made_up(tmp_path):
    make_source(tmp_path / "source", "Bert", "Model")
    convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_has_a_tensorflow_checkpoint_beside(tmp_path):
    source = make_source(tmp_path / "source", "Bert", "ForMaskedLM")
    write_checkpoint(tmp_path / "source" / "bert_model.ckpt", {"x": np.zeros(1)})
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert_same_outputs(model, source, make_inputs(source, 150))


def test_names_of_the_hub(tmp_path, add_to_hub_cache):
    source = make_source(tmp_path / "source", "Bert", "ForMaskedLM")
    write_vocabulary(tmp_path / "source", "Bert")
    add_to_hub_cache("somebody/tiny-bert", tmp_path / "source")
    model = convert_checkpoint("somebody/tiny-bert", tmp_path / "target")
    assert_same_outputs(model, source, make_inputs(source, 50, padded=False))
    assert (tmp_path / "target" / "tokenizer_config.json").is_file()


# -------------------------------------------------------------------------------------------------------------------
# Google's checkpoints
# -------------------------------------------------------------------------------------------------------------------

GOOGLE_LAYER = {
    "attention.self.query": "attention/self/query",
    "attention.self.key": "attention/self/key",
    "attention.self.value": "attention/self/value",
    "attention.output.dense": "attention/output/dense",
    "intermediate.dense": "intermediate/dense",
    "output.dense": "output/dense",
    "attention.output.LayerNorm": "attention/output/LayerNorm",
    "output.LayerNorm": "output/LayerNorm",
}
GOOGLE_OTHERS = {
    "bert.embeddings.LayerNorm": "bert/encoder/LayerNorm",
    "bert.pooler": "bert/pooler/dense",
    "cls.predictions.transform.dense": "cls/predictions/transform",
    "cls.predictions.transform.LayerNorm": "cls/predictions/transform",
    "classifier.out_proj": "bert/classifier",
}


def google_variables(model, *, three_dimensional=False):
    """The weights of a BigBird, as Google's code names and shapes them, with some of an optimizer."""
    layers = {
        f"bert.encoder.layer.{i}.{ours}": f"bert/encoder/layer_{i}/{theirs}"
        for i in range(model.config.num_hidden_layers)
        for ours, theirs in GOOGLE_LAYER.items()
    }
    heads = (model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads)
    variables = {"global_step": np.array(1000, dtype="int64")}
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    for kind in ("word", "position", "token_type"):
        variables[f"bert/embeddings/{kind}_embeddings"] = weights[f"bert.embeddings.{kind}_embeddings.weight"]
    for ours, theirs in (layers | GOOGLE_OTHERS).items():
        if f"{ours}.weight" not in weights:
            continue
        weight, bias = weights[f"{ours}.weight"], weights[f"{ours}.bias"]
        if "LayerNorm" in ours:
            variables |= {f"{theirs}/gamma": weight, f"{theirs}/beta": bias}
            continue
        kernel = weight.T
        if three_dimensional and "/self/" in theirs:
            kernel, bias = kernel.reshape(-1, *heads), bias.reshape(heads)
        elif three_dimensional and "attention/output" in theirs:
            kernel = kernel.reshape(*heads, kernel.shape[-1])
        variables |= {f"{theirs}/kernel": kernel, f"{theirs}/bias": bias, f"{theirs}/kernel/adam_m": 0 * kernel}
    if "cls.predictions.bias" in weights:
        variables["cls/predictions/output_bias"] = weights["cls.predictions.bias"]
    if "cls.seq_relationship.weight" in weights:
        variables["cls/seq_relationship/output_weights"] = weights["cls.seq_relationship.weight"]
        variables["cls/seq_relationship/output_bias"] = weights["cls.seq_relationship.bias"]
    return variables


def google_source(name, **settings):
    model = getattr(bigbird_plus, name)(BigBirdConfig(**tiny_settings(**settings)))
    return scale_weights(model).eval()


@pytest.mark.parametrize("three_dimensional", [False, True])
def test_a_pretrained_checkpoint_of_google(tmp_path, three_dimensional):
    source = google_source("BigBirdForPreTraining")
    variables = google_variables(source, three_dimensional=three_dimensional)
    prefix = write_checkpoint(tmp_path / "model.ckpt-0", variables, num_shards=2)
    settings = {"block_size": 8} | ({} if three_dimensional else {"num_attention_heads": 4})
    convert_checkpoint(prefix, tmp_path / "target", **settings)
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "target").eval()
    assert isinstance(model, bigbird_plus.BigBirdForPreTraining)
    assert_same_outputs(model, source, make_inputs(source, 200))


def test_a_classifier_of_google(tmp_path):
    """Theirs is BERT's: a layer on top of the pooling layer, which is `tanh`."""
    source = google_source("BigBirdForSequenceClassification", classifier_activation="tanh", num_labels=3)
    source.classifier.dense.load_state_dict(source.bert.pooler.state_dict())
    write_checkpoint(tmp_path / "model.ckpt-9", google_variables(source))
    model = convert_checkpoint(tmp_path, tmp_path / "target", block_size=8, num_attention_heads=4)
    assert_same_outputs(model, source, make_inputs(source, 200))


@pytest.mark.parametrize("name", ["BigBirdForMaskedLM", "BigBirdModel"])
def test_parts_of_a_checkpoint_of_google(tmp_path, name):
    source = google_source("BigBirdForMaskedLM")
    prefix = write_checkpoint(tmp_path / "model.ckpt-0", google_variables(source))
    architecture = None if name == "BigBirdForMaskedLM" else name
    model = convert_checkpoint(
        prefix, tmp_path / "target", architecture=architecture, block_size=8, num_attention_heads=4
    )
    assert type(model).__name__ == name
    assert_same_outputs(model, source if architecture is None else source.bert, make_inputs(source, 200))


def test_the_vocabulary_of_google(tmp_path):
    source = google_source("BigBirdForMaskedLM", vocab_size=50358, hidden_size=8, num_hidden_layers=1)
    prefix = write_checkpoint(tmp_path / "model.ckpt-0", google_variables(source))
    convert_checkpoint(prefix, tmp_path / "target", num_attention_heads=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert isinstance(tokenizer, bigbird_plus.BigBirdTokenizerFast)
    assert tokenizer("Hello World!")["input_ids"] == [65, 18536, 2260, 101, 66]


def test_tensorflow_checkpoints_of_other_models(tmp_path):
    prefix = write_checkpoint(tmp_path / "model.ckpt-0", {"resnet/kernel": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"no checkpoint of BigBird.*word_embeddings"):
        convert_checkpoint(prefix, tmp_path / "target")


# -------------------------------------------------------------------------------------------------------------------
# Refusals
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head", "settings", "arguments", "message"),
    [
        ("Bert", "Model", {}, {"max_position_embeddings": 511}, "max_position_embeddings must be at least 512"),
        ("Roberta", "Model", {}, {"max_position_embeddings": 511}, "max_position_embeddings must be at least 512"),
        ("Bert", "Model", {}, {"hidden_size": 64}, "hidden_size cannot be chosen"),
        ("Bert", "ForTokenClassification", {}, {"num_labels": 5}, "num_labels cannot be chosen"),
        ("Bert", "Model", {}, {"block_size": 0}, "block_size must be a whole number"),
        (
            "Bert",
            "Model",
            {},
            {"architecture": "BigBirdForSpeech"},
            r"BigBirdForSpeech.* Choose one .*BigBirdForMaskedLM",
        ),
        ("Bert", "ForNextSentencePrediction", {}, {}, "BertForNextSentencePrediction"),
        ("Roberta", "ForMaskedLM", {}, {"architecture": "BigBirdForPreTraining"}, "has no RobertaForPreTraining"),
        ("Roberta", "ForMaskedLM", {"hidden_act": "relu"}, {}, "hidden_act='relu'"),
        ("Bert", "Model", {"position_embedding_type": "relative_key"}, {}, "'relative_key' position embeddings"),
    ],
)
def test_what_cannot_be_converted(tmp_path, family, head, settings, arguments, message):
    make_source(tmp_path / "source", family, head, **settings)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", **arguments)
    assert not (tmp_path / "target").exists()


def test_other_model_types(tmp_path):
    transformers.DistilBertConfig().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=r"'distilbert'.*bert, roberta, xlm-roberta, camembert"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target")


def test_a_target_that_is_not_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for target in (tmp_path / "folder", tmp_path / "folder" / "file"):
        with pytest.raises(ValueError, match=f"{re.escape(str(target))} is not empty"):
            convert_checkpoint("bert-base-uncased", target)
