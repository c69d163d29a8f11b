"""Models in int8: products of integers that are exact, and models that say what they said before."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

import bigbird_plus
from bigbird_plus import BigBirdInt8Config, cpu, demo, int8, quantize
from bigbird_plus.attention import common
from bigbird_plus.cli import main
from bigbird_plus.int8 import Int8Linear

from .peers import make_model, random_ids
from .test_bigbird_pegasus import make_inputs
from .test_bigbird_pegasus import make_pair as make_pegasus_pair

pytestmark = pytest.mark.skipif(not int8.has_int8(), reason="this torch has no oneDNN operators for integers")


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def layers(model):
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


@pytest.mark.torch_only
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 17), (768, 96)])
@pytest.mark.parametrize("fits", [True, False])
def test_products_are_exact(rows, inputs, outputs, fits):
    """Of states of 8 bits with weights whose neighbours fit; with others the processor may ask for 7."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    weight[0], weight[1] = 127, -127
    if fits:
        even = weight[:, : inputs // 2 * 2].unflatten(1, (-1, 2))  # of one sign each, and 127 or 128 together
        even[..., 1] = even[..., 0].sign() * (
            127 + torch.randint(0, 2, even[..., 0].shape) - even[..., 0].long().abs()
        )
        even[:2] = torch.tensor([[[64]], [[-64]]])
    packed = int8._pack(weight)
    most = packed.most_of_states
    assert most == 255 or not fits
    states = torch.randint(0, most + 1, (rows, inputs), generator=generator, dtype=torch.uint8)
    states[0] = most
    expected = states.long() @ weight.long().t()
    assert torch.equal(int8._product(states, packed.weight, torch.ones(outputs)).long(), expected)
    assert torch.equal(packed.sums.long(), weight.long().sum(1))


@pytest.mark.torch_only
def test_layer():
    layer = nn.Linear(96, 40)
    states = torch.randn(3, 50, 96) + 0.5
    states[0, 0], states[0, 1] = 0, 1000 * states[0, 1]
    quantized = Int8Linear.of(layer)
    with torch.no_grad():
        found, expected = quantized(states), layer(states)
        assert torch.allclose(found[0, 0], layer.bias)
        assert relative_error(found[0, 1], expected[0, 1]) < 0.02
        assert relative_error(found[1:], expected[1:]) < 0.02
        assert torch.equal(quantized(states[2, 7:8]), found[2, 7:8]), "a token by itself"
        assert quantized(states[:0]).shape == (0, 50, 40)
        assert quantized(states.bfloat16()).dtype is torch.bfloat16
        assert quantized(torch.full((1, 96), torch.nan)).isnan().all()


@pytest.mark.torch_only
def test_layers_that_share_the_states(monkeypatch):
    """What each gets is, bit for bit, what it gets alone, and states are quantized once."""
    shared = [Int8Linear.of(nn.Linear(24, outputs, bias)) for outputs, bias in ((40, True), (40, False), (8, True))]
    states, calls = torch.randn(3, 50, 24), []
    monkeypatch.setattr(common, "CHUNK_BYTES", 2**14)
    expected = [layer(states) for layer in shared]
    quantized = int8._quantized
    monkeypatch.setattr(int8, "_quantized", lambda rows, most: calls.append(len(rows)) or quantized(rows, most))
    found = cpu.linears(shared, states)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert sum(calls) == 150 and len(calls) > 1
    seen = []
    shared[1].register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(cpu.linears(shared, states)[1], expected[1])
    assert seen == [1]


@pytest.mark.torch_only
def test_layer_keeps_its_weight():
    quantized = Int8Linear.of(nn.Linear(24, 40))
    states, weights = torch.randn(5, 24), quantized.state_dict()
    assert weights["weight"].dtype is torch.int8 and weights["weight"].shape == (40, 24)
    others = [copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), Int8Linear.of(nn.Linear(24, 40))]
    others[2].load_state_dict(weights)
    for other in [*others, quantized.to("cpu")]:
        assert torch.equal(other(states), quantized(states))
        assert torch.equal(other.state_dict()["weight"], weights["weight"])
    assert quantized.to("meta").weight.is_meta


@pytest.mark.parametrize(
    "name",
    ["BigBirdModel", "BigBirdForSequenceClassification", "BigBirdForQuestionAnswering", "BigBirdForCausalLM"],
)
def test_models(name, tmp_path):
    model = make_model(name, is_decoder=name == "BigBirdForCausalLM")
    ids = random_ids(1, 120)
    with torch.no_grad():
        expected = model(ids)[0]
        assert quantize(model) is model
        found = model(ids)[0]
        assert len(layers(model)) == 12
        assert 0 < relative_error(found, expected) < 0.1
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert len(layers(loaded)) == 12 and not loaded.training
        assert torch.equal(loaded(ids)[0], found)
        assert loaded.config.quantization_config.quant_method == "bigbird_int8"


@pytest.mark.parametrize("head", ["ForConditionalGeneration", "ForSequenceClassification"])
def test_pegasus(head, tmp_path):
    """Its encoder in int8; the decoder, and the head that shares its weights with embeddings, as they were."""
    _, model = make_pegasus_pair(head)
    inputs = make_inputs()
    inputs["input_ids"][:, -1] = model.config.eos_token_id  # which classifiers look for
    with torch.no_grad():
        expected = model(**inputs).logits
        found = quantize(model)(**inputs).logits
        assert len(layers(model.model.encoder)) == len(layers(model)) == 12
        assert 0 < relative_error(found, expected) < 0.1
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(loaded(**inputs).logits, found)
    if head == "ForConditionalGeneration":
        ids = loaded.generate(**inputs, max_new_tokens=3)
        assert torch.equal(ids, model.generate(**inputs, max_new_tokens=3))


def test_generation():
    """Of a decoder: token by token as all at once."""
    model, ids = quantize(make_model("BigBirdForCausalLM", is_decoder=True)), random_ids(1, 100)
    written = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(written).logits[0, 99:-1].argmax(-1), written[0, 100:])


def test_quantized_as_it_is_loaded(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, quantization_config=BigBirdInt8Config())
    ids = random_ids(1, 100)
    assert torch.equal(loaded(ids).last_hidden_state, quantize(model)(ids).last_hidden_state)
    asked = BigBirdInt8Config()
    for _ in range(2):
        loaded = AutoModelForMaskedLM.from_pretrained(bigbird_plus.demo_checkpoint(), quantization_config=asked)
        kept = ["layer.0.attention.self.query", "layer.0.attention.self.key"]
        assert loaded.config.quantization_config.kept_layers == kept, "few, whose weights have outliers"


def test_streamed_layers(monkeypatch):
    model = quantize(make_model(hidden_act="gelu_new"))
    ids = random_ids(1, 120)
    with torch.no_grad():
        whole = model(ids).last_hidden_state
        monkeypatch.setattr(common, "CHUNK_BYTES", 4096)
        assert torch.allclose(model(ids).last_hidden_state, whole, atol=1e-2)


@pytest.mark.torch_only
def test_activation():
    layer, gelu = Int8Linear.of(nn.Linear(24, 40)), cpu.TanhGELU()
    states, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    found = cpu.linear(layer, states, gelu, residual)
    assert torch.allclose(found, gelu(layer(states)) + residual, atol=1e-5)


def test_fill_mask():
    """On four random maskings of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())
    model = AutoModelForMaskedLM.from_pretrained(bigbird_plus.demo_checkpoint()).float().eval()
    ids = tokenizer(demo.document(), return_tensors="pt", truncation=True, max_length=2048).input_ids
    chosen = torch.rand(4, ids.shape[1], generator=torch.Generator().manual_seed(0)) < 0.15
    masked = torch.where(chosen, tokenizer.mask_token_id, ids)
    with torch.no_grad():
        before = model(masked, labels=torch.where(chosen, ids, -100))
        after = quantize(model)(masked, labels=torch.where(chosen, ids, -100))
    agree = (before.logits.argmax(-1) == after.logits.argmax(-1))[chosen]
    assert agree.float().mean() >= 0.985
    assert abs(after.loss / before.loss - 1) < 0.001


def test_layers_with_outliers(tmp_path):
    """Those whose weights int8 would spoil stay what they are, and whoever loads the model, or a part of it, knows."""
    model, ids = make_model("BigBirdForMaskedLM", intermediate_size=512), random_ids(1, 100)
    output = model.bert.encoder.layer[1].output
    with torch.no_grad():
        output.dense.weight.fill_diagonal_(1)
        expected = model(ids).logits
        found = quantize(model)(ids).logits
        assert type(output.dense) is nn.Linear and len(layers(model)) == 11
        assert 0 < relative_error(found, expected) < 0.1
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(loaded(ids).logits, found)
        assert loaded.config.quantization_config.kept_layers == ["layer.1.output.dense"]
        assert len(layers(AutoModel.from_pretrained(tmp_path))) == 11


@pytest.mark.torch_only
def test_weights_of_zeros_lose_nothing():
    layer = nn.Linear(24, 40)
    nn.init.zeros_(layer.weight)
    assert int8.rounding_error(layer) == 0


@pytest.mark.torch_only
def test_weights_of_earlier_files():
    """Their neighbours may not fit, for which the processor may want states of 7 bits."""
    weight = torch.full((8, 96), 127, dtype=torch.int8)
    quantized, states = Int8Linear.of(nn.Linear(96, 8, bias=False)), torch.randn(50, 96)
    quantized.load_state_dict({"weight": weight, "scale": torch.ones(8)})
    assert relative_error(quantized(states), states @ weight.float().t()) < 0.02
    assert quantized._packed.most_of_states == int8.most_of_states(any_weight=True)


def test_a_head_learns_on_it():
    model = quantize(make_model("BigBirdForSequenceClassification"))
    model(random_ids(1, 100), labels=torch.tensor([1])).loss.backward()
    has_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert has_gradient and all(name.startswith("classifier") for name in has_gradient)
    with pytest.raises(RuntimeError, match="gives no gradients to the states"):
        model(inputs_embeds=torch.randn(1, 100, 32, requires_grad=True))


@pytest.mark.torch_only
def test_graphs():
    layer, states = Int8Linear.of(nn.Linear(24, 40)), torch.randn(2, 5, 24)
    assert torch.equal(torch.compile(layer, backend="eager")(states), layer(states))
    with pytest.raises(RuntimeError, match="cannot be exported"):
        torch.export.export(layer, (states,))
    with pytest.raises(RuntimeError, match="cannot be exported or transformed"):
        torch.vmap(layer)(states)


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="must be a BigBird of bigbird_plus, not a transformers"):
        quantize(transformers.BertModel(transformers.BertConfig(num_hidden_layers=0)))
    model = quantize(make_model())
    with pytest.raises(ValueError, match="is quantized by now"):
        quantize(model)
    with pytest.raises(ValueError, match="compute on a CPU, not on meta"):
        quantize(make_model().to("meta"))
    monkeypatch.setattr("bigbird_plus.int8.has_int8", lambda: False)
    with pytest.raises(ValueError, match="operators for integers"):
        quantize(make_model())


def test_command(tmp_path, capsys):
    models = {"pegasus": make_pegasus_pair()[1], "model": make_model("BigBirdForMaskedLM")}
    for folder, model in models.items():
        model.save_pretrained(tmp_path / folder)
        with pytest.raises(SystemExit) as left:
            main(["quantize", str(tmp_path / folder), str(tmp_path / f"{folder}-int8")])
        assert not left.value.code
        assert f"-int8: {type(model).__name__}, its encoder in int8\n" in capsys.readouterr().out
    assert layers(AutoModelForMaskedLM.from_pretrained(tmp_path / "model-int8"))
    assert layers(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pegasus-int8"))
    for source, message in ((tmp_path / "model-int8", "is quantized by now"), (tmp_path / "none", "none")):
        with pytest.raises(SystemExit) as left:
            main(["quantize", str(source), str(tmp_path / "again")])
        assert left.value.code == 2 and message in capsys.readouterr().err
