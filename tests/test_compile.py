"""torch.compile: whole graphs, one for all lengths of a kind."""

import pytest
import torch

from bigbird_plus.attention import engines, masks

from .peers import make_model, make_pair, own_random_blocks, random_ids, random_inputs

LENGTHS = (128, 130, 200, 88, 41)


class CountingBackend:
    """Runs the graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0
        self.devices = set()

    def __call__(self, graph, inputs):
        self.graphs += 1
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        self.devices |= {value.device.type for value in values if isinstance(value, torch.Tensor)}
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("attention_type", "training", "graphs"),
    [
        ("block_sparse", True, 2),  # with every transformers
        pytest.param("block_sparse", False, 2, marks=pytest.mark.slow),
        pytest.param("original_full", True, 1, marks=pytest.mark.slow),
        pytest.param("original_full", False, 1, marks=pytest.mark.slow),
    ],
)
def test_two_graphs_serve_all_lengths(attention_type, training, graphs):
    model, _ = make_pair("BigBirdForMaskedLM", attention_type=attention_type, num_hidden_layers=1)
    model.train(training)
    backend = CountingBackend()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        inputs = random_inputs("BigBirdForMaskedLM", 2, length)
        actual, expected = compiled(**inputs), model(**inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-4, atol=1e-4)
        if training:
            assert gradients_agree(model, actual.loss, expected.loss)
    assert backend.graphs == graphs


def gradients_agree(model, loss, other_loss):
    grads = []
    for each in (loss, other_loss):
        model.zero_grad()
        each.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    first, second = grads
    return all((first[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-5 for name, grad in second.items())


@pytest.mark.slow
def test_nothing_is_asked_of_a_gpu_that_graphs_cannot_hold(monkeypatch):
    """Where there is one, torch.compile stops at the question whether CUDA captures a graph."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", torch._dynamo.graph_break)
    model, ids = make_model(num_hidden_layers=1), random_ids(1, 120)
    compiled = torch.compile(model, fullgraph=True, backend=CountingBackend())
    actual = compiled(ids).last_hidden_state
    monkeypatch.undo()
    torch.testing.assert_close(actual, model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_nothing_is_on_a_cpu_that_keeps_graphs_from_being_captured(monkeypatch):
    """With the kernels, in inference: one graph without a mask, and one for all masks. Another device stands for a
    GPU; nothing is computed there."""
    triton = pytest.importorskip("bigbird_plus.attention.impl.triton")
    monkeypatch.setitem(engines._engines, "triton", triton)
    monkeypatch.setattr(triton, "reason", lambda call: None)
    monkeypatch.setattr(masks, "compute_dtype", lambda dtype, device: dtype)
    model = make_model("BigBirdForSequenceClassification", num_hidden_layers=1, block_size=16).to("meta")
    backend = CountingBackend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.zeros(1, 256, dtype=torch.long, device="meta")
    with torch.no_grad():
        for attention_mask in (None, torch.ones_like(ids), torch.zeros_like(ids)):
            compiled(ids, attention_mask=attention_mask)
    assert backend.graphs == 2
    assert backend.devices == {"meta"}


@pytest.mark.slow
def test_inductor():
    model, _ = make_pair("BigBirdModel", num_hidden_layers=1, num_random_blocks=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    ids = random_ids(1, 120)
    with torch.no_grad():
        actual, expected = (run(ids).last_hidden_state for run in (compiled, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"num_extra_global_tokens": 3}, {"random_blocks": own_random_blocks(4, 20, 1)}])
def test_extra_tokens_and_blocks_by_index(fields):
    fields = {"global_block_indices": [0, 4, -2], "num_random_blocks": 1, **fields}
    model = make_model(num_hidden_layers=1, **fields)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=CountingBackend())
    for length in (128, 131, 200, 40):
        ids = random_ids(2, length)
        actual, expected = (run(ids).last_hidden_state for run in (compiled, model))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
