"""Adapters of PEFT on every head: only they learn, and what they learned survives saving, loading and merging."""

import subprocess
import sys
from contextlib import nullcontext

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import constants
from transformers import TorchAoConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

import bigbird_plus
from tests.peers import TASK_MODELS, few_are_quick, make_pair, random_inputs
from tests.training.common import LENGTH, labelled_rows, make_trainer, tiny_model

PEFT_IS_RECENT = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


def outputs(model, name, length=LENGTH):
    """All floating point outputs of a model for the same two inputs."""
    inputs = random_inputs(name, 2, length, padded=False, labels=False)
    with torch.no_grad():
        values = model.eval()(**inputs).to_tuple()
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def trained(model, name, folder, **settings):
    """`model` after a few steps."""
    settings = {"max_steps": 3, "learning_rate": 1e-2, **settings}
    rows = labelled_rows(name)
    trainer = make_trainer(model, rows, folder, eval_dataset=rows, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    return model


def learn(model, inputs, steps=4):
    """The losses of a few steps of a model's trainable parameters."""
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_close(values, others, tolerance=1e-5):
    assert len(values) == len(others) > 0
    for value, other in zip(values, others, strict=True):
        torch.testing.assert_close(value, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TASK_MODELS)
def test_lora_trains_adapters_alone_and_survives_saving_and_merging(name, tmp_path):
    model = get_peft_model(tiny_model(name), LoraConfig(r=4, init_lora_weights="gaussian"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untrained = outputs(model, name)
    trained(model, name, tmp_path)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("query.lora_" in key or "value.lora_" in key for key in changed)

    expected = outputs(model, name)
    assert max((a - b).abs().max() for a, b in zip(expected, untrained, strict=True)) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")
    assert_close(outputs(loaded, name), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is getattr(bigbird_plus, name)
    assert_close(outputs(merged, name), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(outputs(type(merged).from_pretrained(tmp_path / "merged"), name), expected)


METHODS = {
    "dora": LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, use_dora=True),
    "adalora": AdaLoraConfig(task_type=TaskType.TOKEN_CLS, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
    "ia3": IA3Config(task_type=TaskType.TOKEN_CLS),
    "rank-stabilised lora on all linear layers": LoraConfig(
        task_type=TaskType.TOKEN_CLS, r=2, use_rslora=True, target_modules=["query", "key", "value", "dense"]
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_adapters_find_their_layers_too(method, tmp_path):
    name = "BigBirdForTokenClassification"
    model = get_peft_model(tiny_model(name), METHODS[method])
    base = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    assert base
    trained(model, name, tmp_path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    expected = outputs(model, name)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter")
    assert_close(outputs(loaded, name), expected)
    assert_close(outputs(loaded.merge_and_unload(), name), expected)


MATRIX_HEADS = {
    "BigBirdForSequenceClassification": TaskType.SEQ_CLS,
    "BigBirdForTokenClassification": TaskType.TOKEN_CLS,
    "BigBirdForQuestionAnswering": TaskType.QUESTION_ANS,
    "BigBirdForMaskedLM": None,
}
MATRIX_METHODS = {
    "lora": (LoraConfig, {"r": 2}),
    "dora": (LoraConfig, {"r": 2, "use_dora": True}),
    "ia3": (IA3Config, {}),
    "vera": (VeraConfig, {"r": 4}),
    "oft": (OFTConfig, {"oft_block_size": 4}),
    "fourierft": (FourierFTConfig, {"n_frequency": 10}),
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 16}),
    "loha": (LoHaConfig, {"r": 2}),
    # PEFT cannot both adapt a layer and train it whole: these adapt the heads, too, and name no task
    "lora on all linear layers": (LoraConfig, {"r": 2, "target_modules": "all-linear"}),
    "dora on all linear layers": (LoraConfig, {"r": 2, "target_modules": "all-linear", "use_dora": True}),
}


def adapter_config(method, name):
    """The configuration of an adapter of `MATRIX_METHODS`, made for the head `name`."""
    config_class, settings = MATRIX_METHODS[method]
    task_type = None if settings.get("target_modules") == "all-linear" else MATRIX_HEADS[name]
    return config_class(task_type=task_type, **settings)


@pytest.mark.parametrize("name", MATRIX_HEADS)
@pytest.mark.parametrize("method", few_are_quick(MATRIX_METHODS, quick=("lora", "ia3")))
def test_every_adapter_on_every_head_learns_as_on_the_built_in_model_and_is_saved_and_merged(method, name, tmp_path):
    inputs = random_inputs(name, 2, 40)
    unlabelled = random_inputs(name, 2, 40, labels=False)

    def result(model):
        with torch.no_grad():
            return [model.eval()(**unlabelled)[0]]

    ours, theirs = make_pair(name, num_hidden_layers=1)
    model = get_peft_model(ours, adapter_config(method, name))
    model.save_pretrained(tmp_path / "new")
    peer = PeftModel.from_pretrained(theirs, tmp_path / "new", is_trainable=True)
    untrained = result(model)
    losses = learn(model, inputs)  # before each of 4 steps: the last three tell of what three steps did
    assert losses[-1] < losses[0]
    torch.testing.assert_close(learn(peer, inputs), losses, atol=1e-4, rtol=1e-4)
    expected = result(model)
    assert (expected[0] - untrained[0]).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_pair(name, num_hidden_layers=1)[0], tmp_path / "adapter")
    assert_close(result(loaded), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is getattr(bigbird_plus, name)
    assert_close(result(merged), expected, tolerance=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(result(type(merged).from_pretrained(tmp_path / "merged")), expected, tolerance=1e-4)


PROMPTED = {
    "BigBirdForSequenceClassification": TaskType.SEQ_CLS,
    "BigBirdForQuestionAnswering": TaskType.QUESTION_ANS,
}


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_and_prefix_tuning_learn_virtual_tokens(method, name, tmp_path):
    model = get_peft_model(tiny_model(name), method(task_type=PROMPTED[name], num_virtual_tokens=4))
    learning = [key for key, value in model.named_parameters() if value.requires_grad]
    assert any("prompt_encoder" in key for key in learning)
    assert not any(".encoder.layer" in key for key in learning)
    prompt = model.prompt_encoder["default"].embedding.weight
    before = prompt.detach().clone()
    inputs = {
        **random_inputs(name, 2, LENGTH, padded=False),
        "attention_mask": torch.ones(2, LENGTH, dtype=torch.long),
    }
    losses = learn(model, inputs)
    assert losses[-1] < losses[0]
    assert not torch.equal(prompt, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert_close([loaded.eval()(**inputs)[0]], [model.eval()(**inputs)[0]])


def test_prompt_and_prefix_tuning_of_token_classification(tmp_path):
    """PEFT leaves labels to the caller here: with a prompt, the model has logits for the virtual tokens, too."""
    name, ones = "BigBirdForTokenClassification", torch.ones(2, LENGTH, dtype=torch.long)
    inputs = {**random_inputs(name, 2, LENGTH, padded=False), "attention_mask": ones}
    prefixed = get_peft_model(tiny_model(name), PrefixTuningConfig(task_type=TaskType.TOKEN_CLS, num_virtual_tokens=4))
    assert prefixed(**inputs).logits.shape == (2, LENGTH, 2)
    prompted = get_peft_model(tiny_model(name), PromptTuningConfig(task_type=TaskType.TOKEN_CLS, num_virtual_tokens=4))
    inputs["labels"] = torch.nn.functional.pad(inputs["labels"], (4, 0), value=-100)
    output = prompted(**inputs)
    assert output.logits.shape == (2, LENGTH + 4, 2)
    output.loss.backward()
    assert prompted.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


def test_positions_are_resized_before_adapters_come():
    """A resize afterwards would leave the adapter out."""
    model = get_peft_model(tiny_model("BigBirdForMaskedLM"), LoraConfig(r=2, target_modules=["position_embeddings"]))
    with pytest.raises(ValueError, match="Resize them before adapters"):
        model.base_model.model.resize_position_embeddings(512)


def test_several_adapters_share_a_model(tmp_path):
    name = "BigBirdForTokenClassification"
    model = get_peft_model(tiny_model(name), LoraConfig(r=2, init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=4, init_lora_weights=False))
    first = outputs(model, name)
    model.set_adapter("second")
    second = outputs(model, name)
    assert (first[0] - second[0]).abs().max() > 1e-3
    with model.disable_adapter():
        assert_close(outputs(model, name), outputs(tiny_model(name), name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert_close(outputs(loaded, name), first)
    loaded.set_adapter("second")
    assert_close(outputs(loaded, name), second)


@pytest.mark.skipif(not PEFT_IS_RECENT, reason="this transformers takes newer versions of PEFT only")
def test_adapters_of_transformers_own_interface(tmp_path):
    name = "BigBirdForMaskedLM"
    model = tiny_model(name)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    expected = outputs(model, name)
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_model(name)
    other.load_adapter(str(tmp_path / "adapter"))
    assert_close(outputs(other, name), expected)


def test_registration_is_undone():
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert table["big_bird"] == ["query", "value"]
    bigbird_plus.unregister()
    try:
        assert "big_bird" not in table
    finally:
        bigbird_plus.register()
    assert table["big_bird"] == ["query", "value"]


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_and_prefix_tuning_of_a_decoder(method):
    name = "BigBirdForCausalLM"
    model = get_peft_model(tiny_model(name), method(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    ones = torch.ones(2, LENGTH, dtype=torch.long)
    losses = learn(model, {**random_inputs(name, 2, LENGTH, padded=False), "attention_mask": ones})
    assert losses[-1] < losses[0]
    ids = random_inputs(name, 2, 20, padded=False)["input_ids"]
    # an older PEFT calls the prefix by a name that is not that of the cache any more
    fits = PEFT_IS_RECENT or method is PromptTuningConfig
    with nullcontext() if fits else pytest.raises(ValueError, match="past_key_values and cache"):
        assert model.eval().generate(input_ids=ids, attention_mask=ones[:, :20], max_new_tokens=3).shape == (2, 23)


HEADS = {
    "BigBirdForSequenceClassification": (TaskType.SEQ_CLS, "classifier"),
    "BigBirdForTokenClassification": (TaskType.TOKEN_CLS, "classifier"),
    "BigBirdForQuestionAnswering": (TaskType.QUESTION_ANS, "qa_outputs"),
}


@pytest.mark.parametrize("name", HEADS)
def test_new_heads_learn_beside_the_adapters_when_the_task_is_named(name):
    task, head = HEADS[name]
    model = get_peft_model(tiny_model(name), LoraConfig(task_type=task, r=2))
    learning = {key for key, value in model.named_parameters() if value.requires_grad and "lora_" not in key}
    assert learning
    assert all(f"{head}.modules_to_save" in key for key in learning)


def test_the_whole_head_for_question_answering_learns_by_its_name(tmp_path):
    name = "BigBirdForQuestionAnswering"
    model = get_peft_model(tiny_model(name), LoraConfig(r=2, modules_to_save=["qa_classifier"]))
    learning = {key for key, value in model.named_parameters() if value.requires_grad}
    for part in ("intermediate.dense", "output.dense", "qa_outputs"):
        assert any(key.endswith(f".{part}.weight") for key in learning)
    expected = outputs(trained(model, name, tmp_path), name)
    model.save_pretrained(tmp_path / "adapter")
    assert_close(outputs(PeftModel.from_pretrained(tiny_model(name), tmp_path / "adapter"), name), expected)


def test_lora_learns_on_a_base_loaded_in_int8(tmp_path):
    """As QLoRA does it. (`Trainer` refuses such bases in transformers 4.)"""
    torchao = pytest.importorskip("torchao", reason="needs torchao")
    name = "BigBirdForSequenceClassification"
    tiny_model(name).save_pretrained(tmp_path / "base")

    def load():
        how = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])
        return getattr(bigbird_plus, name).from_pretrained(tmp_path / "base", quantization_config=how)

    base = load()
    assert isinstance(base.bert.encoder.layer[0].attention.self.query.weight, torchao.utils.TorchAOBaseTensor)
    assert_close(outputs(base, name), outputs(tiny_model(name), name), tolerance=0.1)
    model = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
    losses = learn(model, random_inputs(name, 4, LENGTH, padded=False))
    assert losses[-1] < losses[0] - 0.02
    model.save_pretrained(tmp_path / "adapter")
    assert_close(outputs(PeftModel.from_pretrained(load(), tmp_path / "adapter"), name), outputs(model, name))


def test_lora_learns_on_a_base_quantized_to_int8(tmp_path):
    """torch's own weight-only form: int8 weights with a scale a row, as `bitsandbytes` and `torchao` keep them."""
    name = "BigBirdForSequenceClassification"
    torchao = pytest.importorskip("torchao", reason="needs torchao")
    model = tiny_model(name)
    torchao.quantization.quantize_(model.bert.encoder, torchao.quantization.Int8WeightOnlyConfig())
    exact = outputs(tiny_model(name), name)
    assert_close(outputs(model, name), exact, tolerance=0.1)
    trained(get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4)), name, tmp_path)


def test_without_peft_all_the_rest_works(tmp_path):
    """In a new interpreter: transformers asks once what is installed."""
    program = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import bigbird_plus, transformers
from tests.training.common import labelled_rows, make_trainer, tiny_model

assert not transformers.utils.is_peft_available()
trainer = make_trainer(tiny_model("BigBirdForMaskedLM"), labelled_rows("BigBirdForMaskedLM"), sys.argv[1])
trainer.train()
trainer.save_model()
assert type(transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])) is bigbird_plus.BigBirdForMaskedLM
bigbird_plus.unregister()
bigbird_plus.register()
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
