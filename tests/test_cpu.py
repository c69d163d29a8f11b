"""Linear layers by oneDNN: the same numbers as torch's, wherever they are taken."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from bigbird_plus import cpu as module
from bigbird_plus import modeling_big_bird as modeling
from bigbird_plus.attention import common
from bigbird_plus.cpu import TanhGELU, linear, prefers_onednn

from .peers import make_model, make_pair, random_ids

tanh_gelu = TanhGELU()

pytestmark = [
    pytest.mark.torch_only,
    pytest.mark.skipif(not module.has_onednn(), reason="this torch has no oneDNN"),
]


@pytest.fixture
def by_onednn(monkeypatch):
    monkeypatch.setattr(module, "float32_is_onednn", lambda: True)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(24, 40)


def reference(layer, states, activation):
    double = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double())
    return double if activation is None else activation(double)


@pytest.mark.parametrize("activation", [None, tanh_gelu, torch.tanh])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24), (3, 1, 2, 24)])
def test_inference(by_onednn, layer, activation, shape):
    states = torch.randn(shape)
    assert prefers_onednn(states)
    with torch.no_grad():
        actual = linear(layer, states, activation)
    torch.testing.assert_close(actual.double(), reference(layer, states, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, tanh_gelu, torch.tanh])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("is_onednn", [False, True])
def test_residual(monkeypatch, layer, activation, grad, is_onednn):
    monkeypatch.setattr(module, "float32_is_onednn", lambda: is_onednn)
    states, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    before = residual.clone()
    with torch.set_grad_enabled(grad):
        actual = linear(layer, states, activation, residual)
    expected = reference(layer, states, activation) + residual
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("numbers_in_cache", [1, 100, 2**18])
def test_the_activation_in_place(monkeypatch, layer, numbers_in_cache):
    """As exact as torch's own, for numbers of every size."""
    monkeypatch.setattr(module, "float32_is_onednn", lambda: False)
    monkeypatch.setattr(module, "NUMBERS_IN_CACHE", numbers_in_cache)
    nn.init.eye_(layer.weight[:24])
    nn.init.zeros_(layer.bias)
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 6.0, 1e5, 3e38, -3e38, -1e20, -20.0, -6.0, -1.0])
    states = torch.cat((torch.randn(3, 7, 12), sizes * torch.ones(3, 7, 12)), dim=-1)
    with torch.no_grad():
        exact = tanh_gelu(layer(states).double())
        actual = linear(layer, states, tanh_gelu)
    torch.testing.assert_close(actual.double(), exact, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("activation", [None, tanh_gelu])
def test_gradients(by_onednn, layer, activation):
    states = torch.randn(2, 7, 24, requires_grad=True)
    weights = torch.randn(2, 7, 40)
    inputs = (states, layer.weight, layer.bias)
    actual = torch.autograd.grad((linear(layer, states, activation) * weights).sum(), inputs)
    expected = torch.autograd.grad((reference(layer, states, activation) * weights).sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_weights_and_missing_biases_get_no_gradient(by_onednn):
    layer = nn.Linear(24, 40, bias=False).requires_grad_(False)
    states = torch.randn(3, 24, requires_grad=True)
    linear(layer, states).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(states.grad, layer.weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


def test_reduced_precision_is_no_worse_than_the_default(layer):
    layer, states = layer.bfloat16(), torch.randn(6, 24).bfloat16()
    exact = reference(layer, states, tanh_gelu)
    with torch.no_grad():
        actual = linear(layer, states, tanh_gelu)
        default = tanh_gelu(layer(states))
    assert actual.dtype is torch.bfloat16
    assert (actual - exact).abs().max() <= (default - exact).abs().max() + 1e-2 * exact.abs().max()


def test_whoever_watches_or_replaces_a_layer_is_called(by_onednn, layer):
    states = torch.randn(3, 24)
    calls = []
    handle = layer.register_forward_hook(lambda *args: calls.append(1))
    linear(layer, states)
    handle.remove()
    layer.forward = lambda states: states[..., :1]
    assert linear(layer, states).shape == (3, 1)
    assert calls == [1]
    assert linear(nn.Sequential(nn.Linear(24, 2)), states).shape == (3, 2)


def test_not_taken_where_it_does_not_belong(by_onednn, layer):
    states = torch.randn(3, 24)
    assert not prefers_onednn(states.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_onednn(states)
        assert linear(layer, states).dtype is torch.bfloat16
    assert linear(layer, torch.empty(0, 24)).shape == (0, 40)


def two_layers(bias=True):
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias), nn.Linear(40, 16, bias)


def both_ways(states, first, second):
    """The feed-forward part, and what it stands for in double precision, with their inputs."""
    exact = [copy.deepcopy(layer).double() for layer in (first, second)]
    double = states.detach().double().requires_grad_(states.requires_grad)
    inputs = [states, *first.parameters(), *second.parameters()]
    doubles = [double, *exact[0].parameters(), *exact[1].parameters()]
    assert module.trains_as_one(first, tanh_gelu, second, states)
    found = module.feed_forward(first, second, states)
    return (found, inputs), (exact[1](tanh_gelu(exact[0](double))), doubles)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_onednn", [False, True])
@pytest.mark.parametrize("frozen", [(), ("states",), ("first",), ("second",), ("states", "first")])
def test_feed_forward(monkeypatch, bias, is_onednn, frozen):
    monkeypatch.setattr(module, "float32_is_onednn", lambda: is_onednn)
    monkeypatch.setattr(module, "NUMBERS_IN_CACHE", 100)  # two rows
    first, second = two_layers(bias)
    for name, layer in (("first", first), ("second", second)):
        layer.requires_grad_(name not in frozen)
    states = 3 * torch.randn(2, 7, 24)
    states.requires_grad_("states" not in frozen)
    (found, inputs), (exact, doubles) = both_ways(states, first, second)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    grad = torch.randn(2, 7, 16)
    wanted = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
    actual = torch.autograd.grad(found, [inputs[index] for index in wanted], grad)
    expected = torch.autograd.grad(exact, [doubles[index] for index in wanted], grad.double())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_derivative_of_the_activation():
    """For numbers of every size that occurs."""
    states = torch.tensor([[0.0, 1e-30, 1e-3, 0.5, 1.0, 3.0, 6.0, 1e5, -1e5, -20.0, -6.0, -3.0, -1.0]])
    exact = states.double().requires_grad_()
    expected = tanh_gelu(exact)
    activated = torch.empty_like(states)
    module._tanh_gelu_and_derivative(states, activated)
    torch.testing.assert_close(activated.double(), expected, rtol=5e-7, atol=5e-7)
    derivative = torch.autograd.grad(expected.sum(), exact)[0]
    torch.testing.assert_close(states.double(), derivative, rtol=2e-6, atol=2e-6)


def test_feed_forward_again_and_again():
    """Second derivatives; several gradients at once; a graph that is used twice."""
    first, second = two_layers()
    states = torch.randn(5, 24, requires_grad=True)
    results = []
    for found, inputs in both_ways(states, first, second):
        some = torch.autograd.grad(found[0].sum(), inputs, retain_graph=True)
        one = torch.autograd.grad(found[0, 1], inputs[0], retain_graph=True)[0]
        many = torch.autograd.grad(
            found, inputs[0], torch.eye(80).view(80, 5, 16).to(found), retain_graph=True, is_grads_batched=True
        )[0]
        assert torch.equal(torch.autograd.grad(found[0].sum(), inputs, retain_graph=True)[1], some[1])
        torch.testing.assert_close(many[1], one, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(found.sin().sum(), inputs, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs[:4])
        results.append([*some, many, *grads, *again])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_a_layer_trains_as_one_unless_somebody_watches(monkeypatch):
    """Hooks are called, and modules that stand in the place of others; with the same gradients."""
    model, ids, calls, seen, grads = make_model(), random_ids(1, 120), [], [], []
    monkeypatch.setattr(modeling, "feed_forward", lambda *args: calls.append(1) or module.feed_forward(*args))
    for watched in (None, "intermediate", "output", "intermediate.dense", "intermediate.intermediate_act_fn"):
        if watched:
            handle = model.encoder.layer[0].get_submodule(watched).register_forward_hook(lambda *args: seen.append(1))
        model(ids).last_hidden_state.sin().sum().backward()
        assert (len(calls), len(seen)) == ((1, 1) if watched else (2, 0))
        if watched:
            handle.remove()
        calls.clear()
        seen.clear()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for name, grad in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-4)


def test_not_as_one_where_it_does_not_belong(layer):
    second, states = nn.Linear(40, 24), torch.randn(3, 24)
    assert module.trains_as_one(layer, tanh_gelu, second, states)
    with torch.no_grad():
        assert not module.trains_as_one(layer, tanh_gelu, second, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert not module.trains_as_one(layer, tanh_gelu, second, states)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(states, states)
        assert not module.trains_as_one(layer, tanh_gelu, second, dual)
    assert not module.trains_as_one(layer, torch.tanh, second, states)
    assert not module.trains_as_one(nn.Sequential(layer), tanh_gelu, second, states)
    layer.requires_grad_(False), second.requires_grad_(False)
    assert not module.trains_as_one(layer, tanh_gelu, second, states)
    assert module.trains_as_one(layer, tanh_gelu, second, states.requires_grad_())
    assert not module.trains_as_one(layer.double(), tanh_gelu, second, states)


HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def no_half_precision(monkeypatch):
    """A processor without instructions for half precision, whichever this is."""
    for place in (module, common):
        monkeypatch.setattr(place, "EMULATED", set(HALF))
    monkeypatch.setattr(common, "CHUNK_BYTES", 2**11)  # 21 outputs of some rows at a time


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", [None, tanh_gelu, torch.tanh])
@pytest.mark.parametrize("with_residual", [False, True])
def test_half_precision_is_computed_in_float32(no_half_precision, layer, dtype, activation, with_residual):
    layer, states = layer.to(dtype), torch.randn(3, 7, 24).to(dtype)
    residual = torch.randn(3, 7, 40).to(dtype) if with_residual else None
    expected = reference(layer, states, activation) + (residual.double() if with_residual else 0)
    with torch.no_grad():
        actual = linear(layer, states, activation, residual)
    assert actual.dtype is dtype
    roundings = 1 if activation is None or activation is tanh_gelu else 3
    error = (actual.double() - expected).abs()
    assert (error <= roundings * torch.finfo(dtype).eps * expected.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_in_half_precision_are_computed_in_float32(no_half_precision, layer, dtype):
    layer, states = layer.to(dtype), torch.randn(3, 7, 24).to(dtype).requires_grad_()
    grad = torch.randn(3, 7, 40).to(dtype)
    inputs = [states, layer.weight, layer.bias]
    actual = torch.autograd.grad(linear(layer, states), inputs, grad)
    expected = torch.autograd.grad(reference(layer, states, None), inputs, grad.double())
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_without_instructions(no_half_precision, layer, dtype):
    states = torch.randn(2, 9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype):
        actual = linear(layer, states, tanh_gelu)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), reference(layer, states, tanh_gelu), rtol=0.01, atol=0.01)
    actual.float().sum().backward()
    assert layer.weight.grad.dtype is states.grad.dtype is torch.float32
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("length", [60, 203])
def test_a_model_in_half_precision(no_half_precision, monkeypatch, dtype, length):
    """No farther from float32 than the built-in model, in outputs and gradients; packed, streamed and whole."""
    monkeypatch.setattr(common, "CHUNK_BYTES", 2**14)
    ours, theirs = make_pair(attention_type="block_sparse" if length > 100 else "original_full")
    ids, mask = random_ids(2, length), torch.ones(2, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    exact = ours(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    exact_grad = torch.autograd.grad(exact.sin().sum(), ours.embeddings.word_embeddings.weight)[0]
    errors = []
    for model in (ours.to(dtype), theirs.to(dtype)):
        output = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        grad = torch.autograd.grad(output.sin().sum(), model.embeddings.word_embeddings.weight)[0]
        errors.append([(output - exact).norm(), (grad - exact_grad).norm()])
    assert errors[0][0] <= 1.1 * errors[1][0]
    assert errors[0][1] <= 1.1 * errors[1][1]
    with torch.inference_mode():
        streamed = ours(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (streamed - exact).norm() <= 1.1 * errors[1][0]


def test_few_rows_are_left_to_torch(no_half_precision, layer, monkeypatch):
    monkeypatch.setattr(module, "_converted_product", None)  # not callable
    layer = layer.bfloat16()
    with torch.no_grad():
        assert linear(layer, torch.randn(1, 7, 24).bfloat16()).shape == (1, 7, 40)
        with pytest.raises(TypeError):
            linear(layer, torch.randn(1, 8, 24).bfloat16())
