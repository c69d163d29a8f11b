"""torch.export, ONNX and int8: graphs that serve every batch size and length, and layers of another kind."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bigbird_plus
from bigbird_plus import demo

from . import fresh
from .peers import MODELS, few_are_quick, make_model, own_random_blocks, random_ids, random_inputs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx", "ignore::FutureWarning")

SHORTEST = 89  # that the models of these tests read sparsely
SHAPES = ((1, 137), (3, 200), (2, 256))


def small_model(name="BigBirdModel", **fields):
    return make_model(name, num_hidden_layers=1, is_decoder=name == "BigBirdForCausalLM", **fields)


def example(name, batch=2, length=101):
    return random_inputs(name, batch, length, labels=False)


def axes(inputs, shortest):
    """Free batch sizes and lengths."""
    batch, length = Dim("batch"), Dim("length", min=shortest, max=256)
    return {name: {0: batch, tensor.dim() - 1: length} for name, tensor in inputs.items()}


@torch.no_grad()
def exported(model, name="BigBirdModel", shortest=SHORTEST, **how):
    inputs = example(name)
    return torch.export.export(model, (), inputs, dynamic_shapes=axes(inputs, shortest), **how)


@torch.no_grad()
def tensors_of(model, inputs):
    """What a model or an exported one returns, without the cache."""
    return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def runner(program):
    module = program.module()
    return lambda inputs: tensors_of(module, inputs)


def onnx_runner(exportable, folder, **how):
    torch.onnx.export(exportable, dynamo=True, verbose=False, **how).save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(inputs):
        arrays = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
        return [torch.from_numpy(array) for array in arrays]

    return run


class FirstOutput(nn.Module):
    """What tracers take: tensors by position, and one that comes out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask).to_tuple()[0]


def traced_runner(model, name, folder):
    """As `onnx_runner`, by the tracer that torch.onnx.export was before, and is with `dynamo=False`."""

    inputs = example(name)
    free = {key: {0: "batch", tensor.dim() - 1: "length"} for key, tensor in inputs.items()}
    how = {"input_names": list(inputs), "dynamic_axes": free, "opset_version": 18, "dynamo": False}
    torch.onnx.export(FirstOutput(model).eval(), tuple(inputs.values()), folder / "traced.onnx", **how)
    session = onnxruntime.InferenceSession(folder / "traced.onnx", providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {key: inputs[key].numpy() for key in inputs})[0])


def check(model, name, *runners, shapes=SHAPES):
    """All of them return what the model does."""
    for shape in shapes:
        inputs = example(name, *shape)
        expected = tensors_of(model, inputs)
        for run in runners:
            torch.testing.assert_close(run(inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", few_are_quick(MODELS))
def test_sparse_graphs_serve_all_longer_inputs(name, tmp_path):
    model = small_model(name)
    program = exported(model, name)
    run, run_onnx = runner(program), onnx_runner(program, tmp_path)
    check(model, name, run, run_onnx, shapes=(*SHAPES, (2, SHORTEST)))
    for length in (
        20,
        SHORTEST - 9,
    ):  # read in full by the model, which the graph cannot: better no numbers than others
        with pytest.raises(AssertionError, match=f"{SHORTEST}"):
            run(example(name, 2, length))
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            run_onnx(example(name, 2, length))


@pytest.mark.parametrize("name", few_are_quick(MODELS))
def test_full_graphs_serve_all_inputs(name):
    model = small_model(name, attention_type="original_full")
    check(model, name, runner(exported(model, name, 1)), shapes=(*SHAPES, (2, 7)))


def test_full_graph_from_the_model_to_onnx(tmp_path):
    name = "BigBirdForCausalLM"
    model, inputs = small_model(name, attention_type="original_full"), example(name)
    run = onnx_runner(model, tmp_path, kwargs=inputs, dynamic_shapes=axes(inputs, 1))
    check(model, name, run, shapes=(*SHAPES, (2, 7)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
class TestTracerOfOnnx:
    @pytest.mark.parametrize("name", few_are_quick(MODELS))
    def test_full_graphs_serve_all_inputs(self, name, tmp_path):
        model = small_model(name, attention_type="original_full", use_cache=False)
        run = traced_runner(model, name, tmp_path)
        for shape in (*SHAPES, (2, 7)):
            inputs = example(name, *shape)
            torch.testing.assert_close(run(inputs), tensors_of(model, inputs)[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", few_are_quick(MODELS))
    def test_sparse_models_are_refused(self, name, tmp_path):
        with pytest.raises(ValueError, match=r"dynamo=True.*set_attention_type\('original_full'\)"):
            traced_runner(small_model(name), name, tmp_path)


def test_random_blocks_are_written_into_the_graph():
    fields = {"eval_random_blocks": True, "random_plan_positions": 128, "different_layout_per_head": False}
    model = small_model(**fields)
    check(model, "BigBirdModel", runner(exported(model)))
    own = small_model(num_random_blocks=2, random_blocks=own_random_blocks(4, 20, 2))
    check(own, "BigBirdModel", runner(exported(own, shortest=33)), shapes=((1, 137), (3, 200), (2, 33)))
    without = small_model(**{**fields, "num_random_blocks": 0})
    inputs = example("BigBirdModel", 2, 200)
    assert (tensors_of(without, inputs)[0] - tensors_of(model, inputs)[0]).abs().max() > 1e-2


def test_extra_tokens_and_blocks_by_index(tmp_path):
    model = small_model(num_extra_global_tokens=3, global_block_indices=[0, 4, -1], num_random_blocks=1)
    program = exported(model, shortest=65)
    check(model, "BigBirdModel", runner(program), onnx_runner(program, tmp_path))


@pytest.mark.slow
def test_strict_export():
    model = small_model(eval_random_blocks=True)
    check(model, "BigBirdModel", runner(exported(model, strict=True)))


@pytest.mark.parametrize("name", ["BigBirdModel", "BigBirdForCausalLM"])
def test_without_a_mask_and_with_a_fixed_batch(name):
    model = small_model(name)
    length = {1: Dim("length", min=SHORTEST, max=256)}
    program = torch.export.export(model, (random_ids(1, 128),), dynamic_shapes=[length])
    ids = random_ids(1, 149)
    actual, expected = program.module()(ids)[0], model(ids)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_program_runs_without_the_package(tmp_path):
    model = small_model("BigBirdForTokenClassification", eval_random_blocks=True, return_dict=False)
    torch.export.save(exported(model, "BigBirdForTokenClassification"), tmp_path / "model.pt2")
    inputs = example("BigBirdForTokenClassification", 3, 133)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(**torch.load('inputs.pt'))[0], 'logits.pt')\n"
        "assert 'bigbird_plus' not in sys.modules\n"
    )
    fresh.run(script, folder=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(**inputs)[0], rtol=1e-4, atol=1e-4)


def test_export_tells_the_shortest_length():
    with pytest.raises(torch._dynamo.exc.UserError, match=rf"Dim\('length', min={SHORTEST}"):
        exported(small_model(), shortest=1)


@pytest.mark.slow
def test_int8_keeps_the_predictions():
    folder = bigbird_plus.demo_checkpoint()
    model = AutoModelForMaskedLM.from_pretrained(folder).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text, _ = demo.mask_words(demo.document(), tokenizer.mask_token, count=40)
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=2048)
    is_masked = inputs["input_ids"] == tokenizer.mask_token_id
    assert is_masked.sum() >= 35

    @torch.no_grad()
    def predictions(attention_type):
        model.set_attention_type(attention_type)
        return model(**inputs).logits[is_masked]

    exact = {attention_type: predictions(attention_type) for attention_type in ("block_sparse", "original_full")}
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert layers and all(type(layer.weight) is not nn.Parameter for layer in layers)
    for attention_type, logits in exact.items():
        quantized = predictions(attention_type)
        assert not torch.equal(quantized, logits)
        assert (quantized.argmax(-1) == logits.argmax(-1)).float().mean() >= 0.95
