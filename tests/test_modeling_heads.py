"""The task models: what they hold, what they train, and that their files are transformers' files."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bigbird_plus
from bigbird_plus._compat import CACHE

from . import fresh
from .peers import MODELS, TASK_MODELS, make_model, make_pair, random_ids, random_inputs, tiny_settings

SPARSE = 131  # a length at which a block-sparse model reads sparsely
LANGUAGE_MODELS = ["BigBirdForPreTraining", "BigBirdForMaskedLM", "BigBirdForCausalLM"]
USES_POOLER = ["BigBirdForPreTraining", "BigBirdForMultipleChoice"]


def reload(model, folder, **arguments):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **arguments)


def logits(model, length=SPARSE):
    """The first thing that a model returns for some fixed input."""
    with torch.no_grad():
        inputs = random_inputs(type(model).__name__, 2, length, labels=False)
        return model.eval()(**inputs)[0]


def assert_same_logits(model, expected):
    """Weights at other addresses can round otherwise."""
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What they hold and take
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_have_the_names_and_shapes_of_transformers(name):
    ours, theirs = make_pair(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", MODELS)
def test_arguments_come_in_the_documented_order(name):
    ours, theirs = (
        [
            p.name
            for p in inspect.signature(getattr(package, name).forward).parameters.values()
            if p.kind != p.VAR_KEYWORD
        ]
        for package in (bigbird_plus, transformers)
    )
    theirs = [{CACHE: "past_key_values"}.get(argument, argument) for argument in theirs]
    assert [argument for argument in ours if argument in theirs] == theirs
    if "head_mask" in theirs:  # version 5 of transformers has dropped arguments
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", TASK_MODELS)
def test_a_pooling_layer_that_is_not_used_is_frozen(tmp_path, name):
    model = make_model(name)
    for candidate in (model, reload(model, tmp_path), copy.deepcopy(model)):
        frozen = {key for key, parameter in candidate.named_parameters() if not parameter.requires_grad}
        has_idle_pooler = name not in USES_POOLER and candidate.bert.pooler is not None
        assert frozen == ({"bert.pooler.weight", "bert.pooler.bias"} if has_idle_pooler else set())


@pytest.mark.parametrize("how", ["alone", "in an encoder-decoder", "to a device"])
def test_a_frozen_pooling_layer_stays_frozen_however_it_is_loaded(how, tmp_path):
    """Some versions of transformers make new parameters of what they load."""
    model = make_model("BigBirdForCausalLM", is_decoder=True, add_cross_attention=how == "in an encoder-decoder")
    if how == "in an encoder-decoder":
        pair = reload(transformers.EncoderDecoderModel(encoder=make_model(), decoder=model), tmp_path)
        assert pair.encoder.pooler.weight.requires_grad
        loaded = pair.decoder
    else:
        loaded = reload(model, tmp_path, **({"device_map": {"": "cpu"}} if how == "to a device" else {}))
    for candidate in (loaded, copy.deepcopy(loaded), loaded.train()):
        assert not any(parameter.requires_grad for parameter in candidate.bert.pooler.parameters())
        assert all(parameter.requires_grad for parameter in candidate.bert.encoder.parameters())


@pytest.mark.parametrize("name", TASK_MODELS)
@pytest.mark.parametrize("length", [40, SPARSE])
def test_all_that_is_not_frozen_gets_a_gradient(name, length):
    model = make_model(name).train()
    model(**random_inputs(name, 2, length)).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_question_answering_has_two_labels_and_no_pooling_layer():
    config = bigbird_plus.BigBirdConfig(**make_model().config.to_diff_dict())
    config.num_labels = 5
    model = bigbird_plus.BigBirdForQuestionAnswering(config)
    assert model.qa_classifier.qa_outputs.out_features == 2
    assert model.bert.pooler is None
    output = model(random_ids(1, 40))
    assert "pooler_output" not in output
    assert output.pooler_output is None


@pytest.mark.parametrize(("value", "expected"), [(None, 0.25), (0.5, 0.5), (0.0, 0.0)])
def test_dropout_of_classifiers(value, expected):
    settings = {"hidden_dropout_prob": 0.25, "classifier_dropout": value}
    assert make_model("BigBirdForSequenceClassification", **settings).classifier.dropout.p == expected
    assert make_model("BigBirdForTokenClassification", **settings).dropout.p == expected


@pytest.mark.parametrize("name", ["BigBirdForMaskedLM", "BigBirdForTokenClassification"])
def test_labels_of_minus_100_do_not_count(name):
    model = make_model(name)
    inputs = random_inputs(name, 2, 40, padded=False)
    labels = inputs.pop("labels")
    labels[:, 10:] = -100
    output = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :10].flatten(0, 1), labels[:, :10].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_multiple_choice_takes_a_row_for_each_choice():
    model = make_model("BigBirdForMultipleChoice")
    inputs = random_inputs("BigBirdForMultipleChoice", 2, SPARSE)
    assert inputs["input_ids"].shape == (2, 3, SPARSE)
    with torch.no_grad():
        together = model(**inputs, output_hidden_states=True)
        alone = [
            model(inputs["input_ids"][:, i : i + 1], attention_mask=inputs["attention_mask"][:, i : i + 1]).logits
            for i in range(3)
        ]
    assert together.logits.shape == (2, 3)
    assert together.hidden_states[0].shape == (6, SPARSE, 32)
    torch.testing.assert_close(together.logits, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", TASK_MODELS)
@pytest.mark.parametrize("length", [40, SPARSE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
def test_low_precision(name, length, dtype):
    model = make_model(name, is_decoder=name == "BigBirdForCausalLM").train()
    inputs = random_inputs(name, 2, length)
    exact = model(**inputs).loss.item()
    if dtype == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
    else:
        loss = model.to(dtype)(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.05)
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


def test_losses_leave_the_configuration_alone():
    """transformers' own model decides on the kind of its problem with its first labels, for ever."""
    model = make_model("BigBirdForSequenceClassification", num_labels=3)
    ids = random_ids(2, 40)
    one = model(ids, labels=torch.tensor([0, 2])).loss
    several = model(ids, labels=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])).loss
    assert model.config.problem_type is None
    assert one.item() == model(ids, labels=torch.tensor([0, 2])).loss.item()
    assert several.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(tmp_path, name):
    model = make_model(name)
    again, info = reload(model, tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_logits(again, model)
    assert again.config.architectures == [name]


@pytest.mark.parametrize("name", TASK_MODELS)
def test_a_head_starts_from_a_backbone_alone(tmp_path, name):
    """What the file lacks is initialised and reported: all of the head."""
    backbone = make_model()
    backbone.save_pretrained(tmp_path)
    model, info = getattr(bigbird_plus, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(key.startswith("bert.") for key in info["missing_keys"])
    head = {key: value for key, value in model.named_parameters() if not key.startswith("bert.")}
    assert head
    tied = {"cls.predictions.decoder.weight"}
    assert set(head) - tied <= set(info["missing_keys"])
    for key, value in head.items():
        assert value.device.type == "cpu", key
        if key.endswith("bias"):
            assert (value == 0).all(), key
    for key, value in model.bert.state_dict().items():
        assert torch.equal(value, backbone.state_dict()[key]), key


@pytest.mark.parametrize("name", TASK_MODELS)
def test_a_backbone_starts_from_a_head(tmp_path, name):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    backbone = bigbird_plus.BigBirdModel.from_pretrained(tmp_path, add_pooling_layer=model.bert.pooler is not None)
    assert_same_logits(backbone, model.bert)


# ---------------------------------------------------------------------------------------------------------------------
# Tied weights and the bias of the predictions
# ---------------------------------------------------------------------------------------------------------------------


def check_tying(model, tied):
    predictions = model.cls.predictions
    assert (predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight) == tied
    assert predictions.decoder.bias is predictions.bias
    assert predictions.bias.requires_grad


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_and_the_bias_is_kept(tmp_path, name, tied):
    model = make_model(name, tie_word_embeddings=tied)
    check_tying(model, tied)
    again = reload(model, tmp_path)
    check_tying(again, tied)
    assert model.cls.predictions.bias.abs().max() > 0.1
    assert torch.equal(again.cls.predictions.bias, model.cls.predictions.bias)
    assert_same_logits(again, model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kept", ["bias", "decoder.bias", "both"])
def test_files_name_the_bias_as_they_like(tmp_path, tied, kept):
    """Those of the Hub have both names, transformers 4 writes the one, and 5 can write another."""
    model = make_model("BigBirdForMaskedLM", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    for name in {"bias": ["decoder.bias"], "decoder.bias": ["bias"], "both": []}[kept]:
        del tensors[f"cls.predictions.{name}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = type(model).from_pretrained(tmp_path)
    check_tying(again, tied)
    assert_same_logits(again, model)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_untied_models_write_the_bias_under_both_names(tmp_path, name):
    """Version 4 of transformers' own model reads the one, version 5 the other."""
    model = make_model(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("whole", "given"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        for key in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
            assert torch.equal(tensors[key], model.cls.predictions.bias), key


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [150, 100])
def test_resized_vocabularies_keep_weights_and_bias_in_step(tmp_path, tied, size):
    model = make_model("BigBirdForMaskedLM", tie_word_embeddings=tied)
    ids = random_ids(2, 40, high=100)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        after = model(ids).logits
        check_tying(model, tied)
        again = reload(model, tmp_path)
        check_tying(again, tied)
        torch.testing.assert_close(again(ids).logits, after, atol=1e-5, rtol=0)
    assert model.config.vocab_size == again.config.vocab_size == size
    assert model.cls.predictions.bias.shape == (size,)
    assert after.shape[-1] == size
    shared = min(size, 120)
    torch.testing.assert_close(after[..., :shared], before[..., :shared])


def test_training_moves_tied_weights_together(tmp_path):
    model = make_model("BigBirdForMaskedLM").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = random_inputs("BigBirdForMaskedLM", 2, SPARSE)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    check_tying(model, tied=True)
    assert_same_logits(reload(model, tmp_path), model)


# ---------------------------------------------------------------------------------------------------------------------
# Distributed training
# ---------------------------------------------------------------------------------------------------------------------


def train_in_parallel(folder):
    """Two steps of every model; a parameter without a gradient would stop the second."""
    distributed.init_process_group("gloo")
    rank, gradients = distributed.get_rank(), {}
    for name in TASK_MODELS:
        inputs = random_inputs(name, 2, SPARSE, seed=rank)
        model = DistributedDataParallel(make_model(name, is_decoder=name == "BigBirdForCausalLM").train())
        for _ in range(2):
            model.zero_grad()
            model(**inputs).loss.backward()
        gradients[name] = [p.grad for p in model.parameters() if p.requires_grad]
    torch.save(gradients, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.distributed
def test_distributed_training_needs_no_search_for_unused_parameters(tmp_path):
    fresh.run_in_parallel(train_in_parallel, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in TASK_MODELS:
        alone = []
        for rank in range(2):
            model = make_model(name, is_decoder=name == "BigBirdForCausalLM").train()
            model(**random_inputs(name, 2, SPARSE, seed=rank)).loss.backward()
            alone.append([p.grad for p in model.parameters() if p.requires_grad])
        for first, second, *grads in zip(*(result[name] for result in results), *alone, strict=True):
            assert torch.equal(first, second), name
            torch.testing.assert_close(first, sum(grads) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("package", [bigbird_plus, transformers])
def test_the_pooling_layer_that_question_answering_is_asked_for_learns(package, tmp_path):
    model = package.BigBirdForQuestionAnswering(package.BigBirdConfig(**tiny_settings()), add_pooling_layer=True)
    for candidate in (model, reload(model, tmp_path, add_pooling_layer=True)):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1)
        before = candidate.bert.pooler.weight.detach().clone()
        output = candidate(**random_inputs("BigBirdForQuestionAnswering", 2, 40))
        (output.loss + output.pooler_output.square().sum()).backward()
        optimizer.step()
        assert candidate.bert.pooler.weight.grad.abs().sum() > 0
        assert not torch.equal(candidate.bert.pooler.weight, before)


def test_question_answering_loads_a_trained_pooling_layer(tmp_path):
    """From a file of the built-in model, and on padding before the text, too, it makes the same of it."""
    _, theirs = make_pair("BigBirdModel")
    theirs.save_pretrained(tmp_path)
    model = bigbird_plus.BigBirdForQuestionAnswering.from_pretrained(tmp_path, add_pooling_layer=True)
    inputs = {"input_ids": random_ids(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    inputs["attention_mask"][1, :20] = 0
    types = torch.zeros(2, 40, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(**inputs, token_type_ids=types).pooler_output
        actual = model.eval()(**inputs, token_type_ids=types, question_lengths=torch.tensor([5, 5])).pooler_output
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class WithinAnother(bigbird_plus.BigBirdPreTrainedModel):
    """A model of a user's, with one of ours as a part."""

    def __init__(self, config):
        super().__init__(config)
        self.part = bigbird_plus.BigBirdForMaskedLM(config)
        self.post_init()


def test_an_idle_pooling_layer_stays_frozen_however_the_model_came_about(tmp_path):
    model = make_model("BigBirdForMaskedLM")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    others = {
        "loaded with little memory": type(model).from_pretrained(tmp_path, low_cpu_mem_usage=True),
        "loaded to a device": type(model).from_pretrained(tmp_path, device_map="cpu"),
        "loaded in another dtype": type(model).from_pretrained(tmp_path, dtype=torch.bfloat16),
        "filled": empty,
        "pickled": pickle.loads(pickle.dumps(model)),
        "copied": copy.deepcopy(model).double(),
        "part of another model": reload(WithinAnother(model.config), tmp_path / "whole").part,
    }
    for case, other in others.items():
        assert type(other.bert.pooler) is nn.Linear, case
        assert other.bert.pooler_is_idle, case
        assert not any(parameter.requires_grad for parameter in other.bert.pooler.parameters()), case
        assert all(p.requires_grad for key, p in other.named_parameters() if "pooler" not in key), case


def test_who_unfreezes_an_idle_pooling_layer_keeps_it_so():
    model = make_model("BigBirdForMaskedLM")
    model.requires_grad_(True)
    model.resize_token_embeddings(130)
    model.tie_weights()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Wrapped(nn.Module):
    """A linear layer as tools put it into the place of another: with the same weights, without its attributes."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, states):
        return self.inner(states)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [40, SPARSE])
def test_every_linear_layer_may_be_wrapped(name, length):
    """Those of the very type `nn.Linear`, which is what tools look for: all."""
    model, expected_model = make_model(name), make_model(name)
    linear = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {type(module) for module in linear.values()} == {nn.Linear}
    for key, module in linear.items():
        if not key.endswith("predictions.decoder"):  # tools leave the projection to the vocabulary alone: it is tied
            model.set_submodule(key, Wrapped(module))
    inputs = random_inputs(name, 3, length)
    outputs = [one(**inputs) for one in (model, expected_model)]
    for output in outputs:
        (output.pooler_output.square().sum() if name == "BigBirdModel" else output.loss).backward()
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    gradients = {key: parameter.grad for key, parameter in expected_model.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key.replace(".inner.", ".")], msg=key)
