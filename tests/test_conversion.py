"""Checkpoints of BERT, RoBERTa and its kin, and of Google: made small, written to files, converted, compared."""

import json
import random
import re
import warnings
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

import bigbird_plus
from bigbird_plus import BigBirdConfig, convert_checkpoint
from bigbird_plus.attention import common

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
# Other encoders of transformers
# -------------------------------------------------------------------------------------------------------------------

ENCODERS = {
    "Electra": {"embedding_size": 12},
    "DistilBert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "Albert": {"embedding_size": 12, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    "Longformer": {"attention_window": 400, "max_position_embeddings": 514, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    "Esm": {"position_embedding_type": "rotary", "mask_token_id": 4, "pad_token_id": 1, "eos_token_id": 2},
}
ENCODER_SOURCES = [
    "ElectraForMaskedLM",
    "ElectraForCausalLM",
    "ElectraForSequenceClassification",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForMultipleChoice",
    "LongformerForMaskedLM",
    "LongformerForSequenceClassification",
    "EsmModel",
    "EsmForMaskedLM",
    "EsmForSequenceClassification",
    "EsmForTokenClassification",
]


def make_encoder(folder, name, **settings):
    """Writes a small model, and returns it."""
    family, head = re.match("(Electra|DistilBert|Albert|Longformer|Esm)(.*)", name).groups()
    config = {
        "vocab_size": 120,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "is_decoder": head == "ForCausalLM",
        "num_labels": 3,
    }
    if family == "DistilBert":
        config = {"vocab_size": 120, "num_labels": 3}
    config = getattr(transformers, f"{family}Config")(**{**config, **ENCODERS[family], **settings})
    model = scale_weights(getattr(transformers, name)(config))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("layer_norm.weight"):
            parameter.data += 1
    model.save_pretrained(folder)
    return model.eval()


def use_one_projection(model):
    """Gives the global attention of a Longformer the projections of its local one."""
    for module in model.modules():
        for name in ("query", "key", "value"):
            if hasattr(module, f"{name}_global"):
                getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())


@torch.no_grad()
def first_output(model, inputs):
    """Logits or states, those of padding set to zero."""
    output, mask = model(**inputs)[0], inputs["attention_mask"]
    return output * mask[..., None] if output.shape[: mask.dim()] == mask.shape else output


@pytest.mark.filterwarnings("ignore:query_global, key_global", "ignore:The source has no weights for pooler")
@pytest.mark.parametrize("name", ENCODER_SOURCES)
def test_other_encoders(tmp_path, name):
    source = make_encoder(tmp_path / "source", name)
    if name == "LongformerForSequenceClassification":
        use_one_projection(source)
        source.save_pretrained(tmp_path / "source")
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target", block_size=8)
    assert type(model).__name__ == "BigBird" + re.sub(r"^.*?(?=Model|For)", "", name)
    model.config.block_size = 32  # so that all is read
    inputs = make_inputs(source, 150, multiple_choice=name == "AlbertForMultipleChoice")
    expected = first_output(source, inputs)
    tolerance = 1e-5 * max(1, expected.abs().max().item())
    torch.testing.assert_close(first_output(model, inputs), expected, rtol=0, atol=tolerance)
    model.config.block_size = 8
    assert (first_output(model, inputs) - expected).abs().max() > 1e-3


def test_projections_that_lead_from_nothing(tmp_path):
    """Embeddings of an ELECTRA can have the width of its states."""
    source = make_encoder(tmp_path / "source", "ElectraForMaskedLM", embedding_size=32)
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    inputs = make_inputs(source, 150)
    assert model.config.embedding_size is None
    torch.testing.assert_close(first_output(model, inputs), first_output(source, inputs), rtol=0, atol=1e-4)


def test_the_window_and_global_attention_of_longformer(tmp_path):
    source = make_encoder(tmp_path / "source", "LongformerForMaskedLM")
    with pytest.warns(UserWarning, match=r"query_global, key_global and value_global .* left out"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target")
    use_one_projection(source)
    source.save_pretrained(tmp_path / "source")
    model = convert_checkpoint(tmp_path / "source", tmp_path / "other")
    assert (model.config.num_sliding_window_blocks, model.config.num_random_blocks) == (9, 0)  # 4 * 64 >= 200
    inputs = make_inputs(source, 150)
    inputs["global_attention_mask"] = (torch.arange(150) % 40 == 0).long().expand(2, -1)
    torch.testing.assert_close(first_output(model, inputs), first_output(source, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({"token_dropout": True}, None),
        ({"token_dropout": True, "position_embedding_type": "absolute", "emb_layer_norm_before": True}, 4096),
        ({"position_embedding_type": "absolute", "emb_layer_norm_before": True}, 4096),
    ],
)
def test_kinds_of_esm(tmp_path, settings, longest):
    """Mask tokens in either row, of which one is padded. (transformers 4 takes padding for tokens that are no mask, so
    the source is shown the row without.)"""
    source = make_encoder(tmp_path / "source", "EsmForMaskedLM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_checkpoint(tmp_path / "source", tmp_path / "target")
    model = bigbird_plus.BigBirdForMaskedLM.from_pretrained(tmp_path / "target").eval()
    assert model.config.longest_input == longest
    inputs = make_inputs(source, 150)
    inputs["input_ids"][0, ::3] = source.config.mask_token_id
    inputs["input_ids"][1, 7] = source.config.mask_token_id
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = torch.zeros(2, 150, 120)
        expected[0], expected[1, :50] = source(ids[:1]).logits, source(ids[1:, :50]).logits
    torch.testing.assert_close(first_output(model, inputs), expected, rtol=0, atol=2e-5)
    with mock.patch.object(common, "CHUNK_BYTES", 10_000):  # some tokens after others
        torch.testing.assert_close(first_output(model, inputs), expected, rtol=0, atol=2e-5)
    found = model.bert.embeddings(ids[:1], position_ids=torch.arange(150)[None])
    torch.testing.assert_close(found, source.esm.embeddings(ids[:1]))


def test_token_dropout_of_several_documents_in_a_row(tmp_path):
    source = make_encoder(tmp_path / "source", "EsmForMaskedLM", token_dropout=True)
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    ids = random_ids(1, 150, low=5)
    ids[0, 10:60:2] = source.config.mask_token_id
    positions = torch.cat((torch.arange(60), torch.arange(90)))[None]
    with torch.no_grad():
        expected = torch.cat((source(ids[:, :60]).logits, source(ids[:, 60:]).logits), dim=1)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=2e-5)


# -------------------------------------------------------------------------------------------------------------------
# GENA-LM
# -------------------------------------------------------------------------------------------------------------------

GENA_SPARSE = {
    "sparse_config_cls": "deepspeed.ops.sparse_attention:BigBirdSparsityConfig",
    "sparse_attention": {
        "num_heads": 4,
        "block": 8,
        "different_layout_per_head": True,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 2,
        "num_random_blocks": 2,
    },
}
GENA_ROTARY = {"position_embedding_type": "rotary", "rotary_base": 10000, "rotary_dim": 4}
GENA_KINDS = {
    "bigbird-base-sparse": {"last_layer_norm": False, **GENA_ROTARY, **GENA_SPARSE},
    "bigbird-base-lastln": {"last_layer_norm": True, "position_embedding_type": "absolute", **GENA_SPARSE},
    "bert-base": {"position_embedding_type": "absolute"},
}


def deepspeed_layout(seed, num_blocks=128):
    """What BigBirdSparsityConfig makes of the settings above: in each head and row two blocks out of all, the window,
    and the first two blocks."""
    draw, layout = random.Random(seed), torch.zeros(4, num_blocks, num_blocks, dtype=torch.int64)
    for head, block in np.ndindex(4, num_blocks):
        layout[head, block, draw.sample(range(num_blocks), 2)] = 1
        layout[head, block, max(0, block - 1) : block + 2] = 1
    layout[:, :2] = layout[:, :, :2] = 1
    return layout


def make_gena(folder, kind, *, head="ForMaskedLM"):
    """Writes a small checkpoint with the names and keys of GENA-LM's, and returns both."""
    config = {
        "architectures": [f"Bert{head}"],
        "model_type": "bert",
        "vocab_size": 120,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 1024,
        "type_vocab_size": 2,
        "pad_token_id": 3,
        "pre_layer_norm": True,
        **GENA_KINDS[kind],
    }
    shapes = {"bert.embeddings.word_embeddings": (120, 32), "bert.embeddings.token_type_embeddings": (2, 32)}
    if config["position_embedding_type"] == "absolute":
        shapes["bert.embeddings.position_embeddings"] = (1024, 32)
    layers = {"cls.predictions.transform.dense": (32, 32), "bert.pooler.dense": (32, 32)}
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"]
    norms += ["bert.encoder.last_layer_ln"] if config.get("last_layer_norm", True) else []
    if head == "ForSequenceClassification":
        layers["classifier"] = (2, 32)
    for number in range(2):
        name = f"bert.encoder.layer.{number}"
        layers |= {f"{name}.attention.self.{part}": (32, 32) for part in ("query", "key", "value")}
        layers |= {f"{name}.attention.output.dense": (32, 32)}
        layers |= {f"{name}.intermediate.dense": (64, 32), f"{name}.output.dense": (32, 64)}
        norms += [f"{name}.pre_attention_ln", f"{name}.post_attention_ln"]
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = {f"{name}.weight": 0.6 * noise(*shape) for name, shape in shapes.items()}
    for name, shape in layers.items():
        weights |= {f"{name}.weight": noise(*shape) * shape[1] ** -0.5, f"{name}.bias": 0.1 * noise(shape[0])}
    for name in norms:
        weights |= {f"{name}.weight": 1 + 0.1 * noise(32), f"{name}.bias": 0.1 * noise(32)}
    weights["cls.predictions.bias"] = 0.1 * noise(120)
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["bert.embeddings.position_ids"] = torch.arange(1024)[None]
    for number in range(2):
        name = f"bert.encoder.layer.{number}.attention.self"
        weights[f"{name}.rotary_emb.inv_freq"] = torch.ones(2)
        if "sparse_attention" in config:
            weights[f"{name}.sparse_self_attention.master_layout"] = deepspeed_layout(seed=number)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return config, weights


def gena_layout(weights, length):
    """Which token reads which, `[heads or 1, length, length]`, in all layers: DeepSpeed's SparseSelfAttention cuts the
    layout of the layer that is the first to read an input of a length, and keeps it for all of its instances."""
    layout = weights.get("bert.encoder.layer.0.attention.self.sparse_self_attention.master_layout")
    if layout is None:
        return torch.ones(1, length, length, dtype=torch.bool)
    return layout.bool().repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :length, :length]


def gena_states(config, weights, ids):
    """What GENA-LM's layers compute, densely, of `[batch, length]` ids."""
    length = ids.shape[1]
    layout = gena_layout(weights, length)

    def linear(name, states):
        return torch.nn.functional.linear(states, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, states):
        return torch.nn.functional.layer_norm(states, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def rotate(heads):
        angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, 4, 2) / 4)
        cos, sin = torch.cat((angles, angles), dim=-1).cos(), torch.cat((angles, angles), dim=-1).sin()
        turned, rest = heads[..., :4], heads[..., 4:]
        half = torch.cat((-turned[..., 2:], turned[..., :2]), dim=-1)
        return torch.cat((turned * cos + half * sin, rest), dim=-1)

    table = weights["bert.embeddings.word_embeddings.weight"]
    states = table[ids] + weights["bert.embeddings.token_type_embeddings.weight"][0]
    if config["position_embedding_type"] == "absolute":
        states = states + weights["bert.embeddings.position_embeddings.weight"][:length]
    states = norm("bert.embeddings.LayerNorm", states)
    for number in range(2):
        name = f"bert.encoder.layer.{number}"
        entering = norm(f"{name}.pre_attention_ln", states)
        query, key, value = (
            linear(f"{name}.attention.self.{part}", entering).unflatten(-1, (4, 8)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        if config["position_embedding_type"] == "rotary":
            query, key = rotate(query), rotate(key)
        scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~layout, -torch.inf)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        states = states + linear(f"{name}.attention.output.dense", context)
        wide = torch.nn.functional.gelu(
            linear(f"{name}.intermediate.dense", norm(f"{name}.post_attention_ln", states))
        )
        states = states + linear(f"{name}.output.dense", wide)
    return norm("bert.encoder.last_layer_ln", states) if config.get("last_layer_norm", True) else states


def gena_logits(config, weights, ids):
    states = gena_states(config, weights, ids)
    name = "cls.predictions.transform"
    states = torch.nn.functional.linear(states, weights[f"{name}.dense.weight"], weights[f"{name}.dense.bias"])
    norm = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
    states = torch.nn.functional.layer_norm(torch.nn.functional.gelu(states), (32,), *norm, 1e-12)
    return states @ weights["bert.embeddings.word_embeddings.weight"].T + weights["cls.predictions.bias"]


@pytest.mark.parametrize("kind", GENA_KINDS)
def test_gena(tmp_path, kind):
    """At all lengths, those that are no multiple of the block among them: there the source would refuse."""
    config, weights = make_gena(tmp_path / "source", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_checkpoint(tmp_path / "source", tmp_path / "target", 1024)
    model = bigbird_plus.BigBirdForMaskedLM.from_pretrained(tmp_path / "target").eval()
    ids = random_ids(2, 1000, low=5)
    for length in (32, 44, 100, 300, 480, 1000):
        if kind == "bert-base":
            model.set_attention_type("original_full")  # the source is no sparse one
        expected = gena_logits(config, weights, ids[:, :length])
        with torch.no_grad():
            actual = model(ids[:, :length]).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["bigbird-base-sparse", "bigbird-base-lastln"])
def test_gena_beyond_its_own_lengths(tmp_path, kind):
    """The random blocks of the source repeat, and so do its positions, unless they are rotary."""
    config, weights = make_gena(tmp_path / "source", kind)
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target", 2048)
    ids = random_ids(1, 1500, low=5)
    name = "bert.encoder.layer.0.attention.self.sparse_self_attention.master_layout"
    layout = torch.zeros(4, 256, 256, dtype=torch.int64)
    layout[:, :128, :128] = layout[:, 128:, 128:] = weights[name]
    layout[:, 128:130] = layout[:, :, 128:130] = 0  # the global blocks do not repeat
    block = torch.arange(256)
    layout[:, (block[:, None] - block).abs() <= 1] = 1
    layout[:, :2] = layout[:, :, :2] = 1
    weights[name] = layout
    if kind == "bigbird-base-lastln":
        weights["bert.embeddings.position_embeddings.weight"] = weights[
            "bert.embeddings.position_embeddings.weight"
        ].repeat(2, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, gena_logits(config, weights, ids), rtol=0, atol=2e-5)


def test_a_classifier_of_gena_and_what_is_refused(tmp_path):
    config, weights = make_gena(tmp_path / "source", "bigbird-base-sparse", head="ForSequenceClassification")
    model = convert_checkpoint(tmp_path / "source", tmp_path / "target")
    assert (model.config.block_size, model.config.num_random_blocks) == (8, 2)
    assert list(model.config.global_block_indices) == [0, 1]
    ids = random_ids(2, 200, low=5)
    first = gena_states(config, weights, ids)[:, 0]
    pooled = (first @ weights["bert.pooler.dense.weight"].T + weights["bert.pooler.dense.bias"]).tanh()
    expected = pooled @ weights["classifier.weight"].T + weights["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)

    with pytest.raises(ValueError, match="block_size cannot be chosen"):
        convert_checkpoint(tmp_path / "source", tmp_path / "other", block_size=16)
    config["sparse_attention"]["num_global_blocks"] = 3
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"master_layout .* is no layout .*'num_global_blocks': 3"):
        convert_checkpoint(tmp_path / "source", tmp_path / "other")
    config["sparse_config_cls"] = "deepspeed.ops.sparse_attention:FixedSparsityConfig"
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sparse_config_cls is .*FixedSparsityConfig"):
        convert_checkpoint(tmp_path / "source", tmp_path / "other")


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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("T5Config", r"'t5'.*bert, roberta, xlm-roberta, camembert, distilbert"),
        ("MPNetConfig", r"'mpnet', .*relative_attention_bias"),
        ("ModernBertConfig", r"'modernbert', .*GeGLU.*local_rope_theta"),
    ],
)
def test_other_model_types(tmp_path, config, message):
    getattr(transformers, config)().save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize(
    ("source", "settings", "arguments", "message"),
    [
        ("ElectraForPreTraining", {}, {}, "ElectraForPreTraining.* Choose one with architecture"),
        ("ElectraForMultipleChoice", {}, {}, "ElectraForMultipleChoice"),
        ("DistilBertForMultipleChoice", {}, {}, "DistilBertForMultipleChoice"),
        (
            "DistilBertForMaskedLM",
            {},
            {"architecture": "BigBirdForCausalLM"},
            "distilbert has no DistilBertForCausalLM",
        ),
        ("ElectraForMaskedLM", {"hidden_act": "relu"}, {}, "hidden_act='relu'.*'gelu'"),
        ("LongformerForSequenceClassification", {}, {}, "query_global, key_global and value_global .* differ"),
        ("AlbertModel", {}, {"embedding_size": 32}, "embedding_size cannot be chosen"),
    ],
)
def test_parts_for_which_there_is_no_counterpart(tmp_path, source, settings, arguments, message):
    make_encoder(tmp_path / "source", source, **settings)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", **arguments)
    assert not (tmp_path / "target").exists()


def test_a_target_that_is_not_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for target in (tmp_path / "folder", tmp_path / "folder" / "file"):
        with pytest.raises(ValueError, match=f"{re.escape(str(target))} is not empty"):
            convert_checkpoint("bert-base-uncased", target)
