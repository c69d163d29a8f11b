"""Arguments and settings off the beaten track mean what they mean in transformers' BigBird."""

import pytest
import torch
import transformers

import bigbird_plus

from ..peers import MODELS, TASK_MODELS, make_pair, random_ids, random_inputs, scale_weights, tiny_settings
from .comparison import LOSS_TOLERANCE, OUTPUT_TOLERANCE, assert_equal_gradients, assert_equal_outputs

SPARSE, FULL = 131, 40  # lengths at which a block-sparse model reads sparsely, and in full


def compare(name, inputs, **settings):
    ours, theirs = make_pair(name, **settings)
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), theirs(**inputs), inputs)


@pytest.mark.parametrize("length", [SPARSE, FULL])
@pytest.mark.parametrize(
    "setting",
    [
        {"use_bias": False},
        {"rescale_embeddings": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_fast"},
        {"layer_norm_eps": 1e-2},
        {"chunk_size_feed_forward": 13},
        {"type_vocab_size": 5},
        {"pad_token_id": 3},
    ],
    ids=str,
)
def test_settings(setting, length):
    if "chunk_size_feed_forward" in setting:
        length = 143 if length == SPARSE else 39
        setting = {**setting, "block_size": 11} if length == 143 else setting
    compare("BigBirdForMaskedLM", random_inputs("BigBirdForMaskedLM", 2, length), **setting)


def test_an_activation_can_be_a_function():
    inputs = random_inputs("BigBirdForSequenceClassification", 2, SPARSE)
    ours, _ = make_pair("BigBirdForSequenceClassification")
    ours = type(ours)(type(ours.config)(**{**ours.config.to_dict(), "hidden_act": torch.nn.functional.silu})).eval()
    _, theirs = make_pair("BigBirdForSequenceClassification", hidden_act="silu")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert_equal_outputs(ours(**inputs), theirs(**inputs), inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [SPARSE, FULL])
def test_embeddings_token_types_and_positions_of_ones_own(name, length):
    inputs = random_inputs(name, 2, length)
    generator = torch.Generator().manual_seed(1)
    shape = inputs["input_ids"].shape
    inputs["inputs_embeds"] = torch.randn(*shape, 32, generator=generator)
    inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    inputs["position_ids"] = torch.randint(0, 256, shape, generator=generator)
    del inputs["input_ids"]
    compare(name, inputs)


@pytest.mark.parametrize("length", [SPARSE, FULL])
def test_rescaled_embeddings_of_ones_own(length):
    embeddings = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(1))
    given = embeddings.clone()
    ours, theirs = make_pair("BigBirdModel", rescale_embeddings=True)
    with torch.no_grad():
        output = ours(inputs_embeds=given)
        assert torch.equal(given, embeddings)  # transformers scales the caller's tensor in place
        assert_equal_outputs(output, theirs(inputs_embeds=embeddings), {"inputs_embeds": embeddings})


@pytest.mark.parametrize("name", MODELS)
def test_tuples(name):
    inputs = random_inputs(name, 2, SPARSE) | {"output_hidden_states": True}
    ours, theirs = make_pair(name)
    with torch.no_grad():
        outputs = ours(**inputs)
        tuples = [model(**inputs, return_dict=False) for model in (ours, theirs)]
    assert [type(output) for output in tuples] == [tuple, tuple]
    assert len(tuples[0]) == len(tuples[1])
    for ours_, theirs_, named in zip(*tuples, outputs.to_tuple(), strict=True):
        assert type(ours_) is type(theirs_)
        if isinstance(ours_, torch.Tensor):
            assert ours_.shape == theirs_.shape
            assert torch.equal(ours_, named)
        else:
            assert len(ours_) == len(theirs_)


def test_the_configuration_can_ask_for_tuples_and_more():
    ours, _ = make_pair("BigBirdForMaskedLM", return_dict=False, output_hidden_states=True)
    output = ours(random_ids(1, FULL))
    assert isinstance(output, tuple)
    assert len(output[1]) == 3
    assert ours(random_ids(1, FULL), return_dict=True, output_hidden_states=False).hidden_states is None


# ---------------------------------------------------------------------------------------------------------------------
# Masks of heads and of pairs of tokens
# ---------------------------------------------------------------------------------------------------------------------


def mask_heads_by_weights(model, head_mask):
    """What a head mask does, done to the weights that read the heads' output."""
    for layer, factors in zip(model.base_model.encoder.layer, head_mask, strict=True):
        layer.attention.output.dense.weight.data *= factors.repeat_interleave(8)


@pytest.mark.parametrize("attention_type", ["original_full", "block_sparse"])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_head_mask(attention_type, per_layer, training):
    head_mask = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 2.0]])
    ours, theirs = make_pair("BigBirdForMaskedLM", attention_type=attention_type)
    inputs = random_inputs("BigBirdForMaskedLM", 2, SPARSE)
    mask_heads_by_weights(theirs, head_mask if per_layer else head_mask[:1].expand(2, -1))
    ours.train(training)
    theirs.train(training)
    output = ours(**inputs, head_mask=head_mask if per_layer else head_mask[0])
    expected = theirs(**inputs)
    assert_equal_outputs(output, expected, inputs)
    unmasked = ours(**inputs)
    assert (unmasked.logits - output.logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", TASK_MODELS)
def test_head_mask_reaches_every_model(name):
    inputs = random_inputs(name, 2, SPARSE, labels=False)
    ours, _ = make_pair(name)
    with torch.no_grad():
        ones, zeros, none = (ours(**inputs, head_mask=mask)[0] for mask in (torch.ones(4), torch.zeros(4), None))
    assert torch.equal(ones, none)
    assert (zeros - none).abs().max() > 1e-3


def test_head_mask_of_full_attention_scales_the_probabilities_that_are_returned():
    ours, _ = make_pair("BigBirdModel", attention_type="original_full")
    with torch.no_grad():
        ids = random_ids(1, FULL)
        attentions = ours(ids, head_mask=torch.tensor([1.0, 0.0, 0.5, 1.0]), output_attentions=True).attentions
    assert attentions[0].sum(-1).mean((0, 2)).tolist() == pytest.approx([1, 0, 0.5, 1])


def test_two_dimensional_and_three_dimensional_masks_agree():
    ours, theirs = make_pair("BigBirdModel", attention_type="original_full")
    inputs = random_inputs("BigBirdModel", 2, FULL)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(**inputs).last_hidden_state
        for pairs in (mask[:, None].expand(2, FULL, FULL), mask[:, None, None].bool().expand(2, 1, FULL, FULL)):
            output = ours(**{**inputs, "attention_mask": pairs}).last_hidden_state
            assert (output - expected)[mask.bool()].abs().max() <= OUTPUT_TOLERANCE


def test_a_mask_for_each_head():
    """Heads that may read nothing but the first token give its value, whatever the others do."""
    ours, _ = make_pair("BigBirdModel", attention_type="original_full", attn_implementation="eager")
    mask = torch.ones(1, 4, FULL, FULL, dtype=torch.bool)
    mask[:, 2, :, 1:] = False
    with torch.no_grad():
        attentions = ours(random_ids(1, FULL), attention_mask=mask, output_attentions=True).attentions[0]
    assert (attentions[0, 2, :, 0] == 1).all()
    assert (attentions[0, 1, :, 0] < 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------

REGRESSION = torch.tensor([0.5, -1.0])
SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 1}, REGRESSION),
        ({"num_labels": 1, "problem_type": "regression"}, REGRESSION[:, None]),
        ({"num_labels": 3, "problem_type": "regression"}, SEVERAL),
        ({"num_labels": 3}, torch.tensor([0, 2])),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([2, 1])),
        ({"num_labels": 3}, SEVERAL),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, SEVERAL),
        ({"num_labels": 3}, torch.tensor([0, -100])),
    ],
    ids=str,
)
def test_losses_of_sequence_classification(settings, labels):
    name = "BigBirdForSequenceClassification"
    inputs = random_inputs(name, 2, SPARSE, labels=False) | {"labels": labels}
    ours, theirs = make_pair(name, **settings)
    losses = [model(**inputs).loss for model in (ours, theirs)]
    assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    for loss in losses:
        loss.backward()
    assert_equal_gradients(ours, theirs)


def test_the_dtype_of_labels_tells_several_labels_from_one():
    ours, _ = make_pair("BigBirdForSequenceClassification", num_labels=3)
    inputs = random_inputs("BigBirdForSequenceClassification", 2, FULL, labels=False)
    output = ours(**inputs, labels=SEVERAL)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, SEVERAL)
    assert output.loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("given", [("labels",), ("labels", "next_sentence_label"), ("next_sentence_label",)])
def test_losses_of_pretraining(given):
    inputs = random_inputs("BigBirdForPreTraining", 2, SPARSE)
    kept = {name: value for name, value in inputs.items() if "label" not in name or name in given}
    ours, theirs = make_pair("BigBirdForPreTraining")
    losses = [model(**kept).loss for model in (ours, theirs)]
    if "labels" in given:
        assert abs(losses[0] - losses[1]) <= LOSS_TOLERANCE
    else:
        assert losses == [None, None]


@pytest.mark.parametrize(
    ("start", "end"), [([3, 9], [9, 12]), ([3, 500], [9, 900]), ([SPARSE, 4], [4, SPARSE]), ([-1, 5], [-3, 6])]
)
@pytest.mark.parametrize("column", [False, True])
def test_answers_outside_the_input_do_not_count(start, end, column):
    name = "BigBirdForQuestionAnswering"
    inputs = random_inputs(name, 2, SPARSE, labels=False) | {"question_lengths": torch.tensor([[3], [2]])}
    positions = [torch.tensor(places) for places in (start, end)]
    inputs |= dict(zip(("start_positions", "end_positions"), positions, strict=True))
    if column:
        inputs |= {key: inputs[key][:, None] for key in ("start_positions", "end_positions")}
    compare(name, inputs)


@pytest.mark.parametrize("length", [SPARSE, FULL])
@pytest.mark.parametrize("token_types", [False, True])
def test_question_lengths(length, token_types):
    name = "BigBirdForQuestionAnswering"
    inputs = random_inputs(name, 2, length) | {"question_lengths": torch.tensor([[5], [11]])}
    if token_types:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    compare(name, inputs)
    ours, _ = make_pair(name)
    with torch.no_grad():
        column, row = (ours(**inputs | {"question_lengths": torch.tensor(v)}) for v in ([[5], [11]], [5, 11]))
    assert torch.equal(column.start_logits, row.start_logits)
    assert (column.start_logits[1, 1:11] < -9e5).all()
    assert (column.start_logits[1, 11:] > -9e5).all()
    assert column.start_logits[1, 0] > -9e5


def test_a_question_without_separator_is_only_the_first_token():
    inputs = {"input_ids": random_ids(2, FULL, high=60)}
    compare("BigBirdForQuestionAnswering", inputs)


def test_question_answering_with_pooling_layer():
    ours = scale_weights(
        bigbird_plus.BigBirdForQuestionAnswering(bigbird_plus.BigBirdConfig(**tiny_settings()), add_pooling_layer=True)
    ).eval()
    theirs = transformers.BigBirdForQuestionAnswering(
        transformers.BigBirdConfig(**tiny_settings()), add_pooling_layer=True
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = random_inputs("BigBirdForQuestionAnswering", 2, SPARSE)
    with torch.no_grad():
        output = ours(**inputs)
        assert_equal_outputs(output, theirs(**inputs), inputs)
    assert output.pooler_output.shape == (2, 32)
