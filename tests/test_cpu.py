"""Linear layers by oneDNN: the same numbers as torch's, wherever they are taken."""

import pytest
import torch
from torch import nn

from bigbird_plus import cpu as module
from bigbird_plus.cpu import TanhGELU, linear, prefers_onednn

tanh_gelu = TanhGELU()

pytestmark = [
    pytest.mark.torch_only,
    pytest.mark.skipif(not module.has_onednn(), reason="this torch has no oneDNN"),
]


@pytest.fixture
def on_amd(monkeypatch):
    monkeypatch.setattr(module, "_vendor_is_amd", lambda: True)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(24, 40)


def reference(layer, states, activation):
    double = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double())
    return double if activation is None else activation(double)


@pytest.mark.parametrize("activation", [None, tanh_gelu, torch.tanh])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24), (3, 1, 2, 24)])
def test_inference(on_amd, layer, activation, shape):
    states = torch.randn(shape)
    assert prefers_onednn(states)
    with torch.no_grad():
        actual = linear(layer, states, activation)
    torch.testing.assert_close(actual.double(), reference(layer, states, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, tanh_gelu, torch.tanh])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("vendor", [False, True])
def test_residual(monkeypatch, layer, activation, grad, vendor):
    monkeypatch.setattr(module, "_vendor_is_amd", lambda: vendor)
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
    monkeypatch.setattr(module, "_vendor_is_amd", lambda: False)
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
def test_gradients(on_amd, layer, activation):
    states = torch.randn(2, 7, 24, requires_grad=True)
    weights = torch.randn(2, 7, 40)
    inputs = (states, layer.weight, layer.bias)
    actual = torch.autograd.grad((linear(layer, states, activation) * weights).sum(), inputs)
    expected = torch.autograd.grad((reference(layer, states, activation) * weights).sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_weights_and_missing_biases_get_no_gradient(on_amd):
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


def test_whoever_watches_or_replaces_a_layer_is_called(on_amd, layer):
    states = torch.randn(3, 24)
    calls = []
    handle = layer.register_forward_hook(lambda *args: calls.append(1))
    linear(layer, states)
    handle.remove()
    layer.forward = lambda states: states[..., :1]
    assert linear(layer, states).shape == (3, 1)
    assert calls == [1]
    assert linear(nn.Sequential(nn.Linear(24, 2)), states).shape == (3, 2)


def test_not_taken_where_it_does_not_belong(on_amd, layer):
    states = torch.randn(3, 24)
    assert not prefers_onednn(states.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_onednn(states)
        assert linear(layer, states).dtype is torch.bfloat16
    assert linear(layer, torch.empty(0, 24)).shape == (0, 40)
