"""The kernels of the normalised sum against torch's own operators: on a GPU, or on the CPU by Triton's interpreter."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bigbird_plus import layer_norm as module
from bigbird_plus import modeling_big_bird
from bigbird_plus.layer_norm import definition, norm_of_product, norm_of_sum

from .peers import make_model, random_ids

kernels = pytest.importorskip("bigbird_plus.layer_norm_kernels")

pytestmark = [pytest.mark.gpu, pytest.mark.torch_only]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("states", "residual", "bias", "weight", "shift")


@pytest.fixture
def everywhere(monkeypatch):
    """Takes the kernels for small inputs, too, and where there is no GPU."""
    monkeypatch.setattr(module, "_kernels", lambda device: kernels)
    monkeypatch.setattr(module, "FEWEST_NUMBERS", 0)


def make_inputs(shape, dtypes):
    """States, residual, bias, weight and shift, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    width = shape[-1:]
    shapes = (shape, shape, width, width, width, shape)
    tensors = [torch.randn(size, generator=generator) for size in shapes]
    tensors[1] += 3  # a mean that is not zero
    return [tensor.to(DEVICE, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def results(function, tensors, dtype=None):
    """The result of a function of five tensors, one of which may be None, and their gradients."""
    *inputs, grad = (None if t is None else t.detach().clone().to(dtype or t.dtype) for t in tensors)
    given = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, given, grad)]


def check(tensors, dtype):
    """No further from the definition in float64 than the definition itself, but for a small factor, in its dtypes."""
    exact = results(lambda *inputs: definition(*inputs, 1e-5, torch.float64), tensors, torch.float64)
    expected = results(lambda *inputs: definition(*inputs, 1e-5, dtype), tensors)
    actual = results(lambda *inputs: module._NormOfSum.apply(*inputs, 1e-5, dtype, kernels), tensors)
    names = ["result", *(name for name, tensor in zip(NAMES, tensors, strict=False) if tensor is not None)]
    for name, a, b, c in zip(names, exact, expected, actual, strict=True):
        assert c.dtype is b.dtype, name
        allowed = 1.5 * (b - a).abs().max() + 8 * torch.finfo(c.dtype).eps * a.abs().max()
        assert (c - a).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 11, 96), (3, 2560), (1, 1)])
def test_kernels(dtype, has_bias, shape):
    tensors = make_inputs(shape, [dtype] * 6)
    if not has_bias:
        tensors[2] = None
    check(tensors, dtype)


def test_autocast_mixes_dtypes():
    half = torch.bfloat16
    check(make_inputs((2, 7, 48), [half, *[torch.float32] * 5]), torch.float32)


def test_inputs_need_not_be_contiguous():
    tensors = make_inputs((5, 4, 32), [torch.float32] * 6)
    for place in (0, 1, 5):
        tensors[place] = tensors[place].transpose(0, 1)
    check(tensors, torch.float32)


def test_second_derivatives():
    tensors = make_inputs((3, 32), [torch.float32] * 6)

    def differentiate(function):
        *inputs, grad = (tensor.detach().clone().requires_grad_() for tensor in tensors)
        grads = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        return torch.autograd.grad(sum(tensor.sin().sum() for tensor in grads), [*inputs, grad], allow_unused=True)

    actual = differentiate(lambda *inputs: module._NormOfSum.apply(*inputs, 1e-5, torch.float32, kernels))
    expected = differentiate(lambda *inputs: definition(*inputs, 1e-5, torch.float32))
    torch.testing.assert_close(actual, expected)


def make_parts(width=32):
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(width), nn.Linear(48, width)
    return (
        norm.to(DEVICE),
        layer.to(DEVICE),
        torch.randn(2, 5, 48, device=DEVICE),
        torch.randn(2, 5, width, device=DEVICE),
    )


def test_only_gradients_that_are_wanted(everywhere):
    norm, layer, states, residual = make_parts()
    norm.weight.requires_grad_(False)
    layer.weight.requires_grad_(False)
    norm_of_product(norm, layer, states, residual).sin().sum().backward()
    grads = norm.bias.grad, layer.bias.grad
    assert norm.weight.grad is None and layer.weight.grad is None
    norm.zero_grad()
    layer.zero_grad()
    norm(layer(states) + residual).sin().sum().backward()
    torch.testing.assert_close(grads, (norm.bias.grad, layer.bias.grad))


class Watched(nn.LayerNorm):
    """One that does something else."""

    def forward(self, states):
        return 2 * super().forward(states)


def with_hook(norm):
    norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    return norm


def with_parametrization(norm):
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.eval(),
        lambda norm: norm.double(),
        lambda norm: nn.Identity(),
        lambda norm: Watched(32).to(DEVICE),
        lambda norm: nn.LayerNorm(32, elementwise_affine=False),
        lambda norm: nn.LayerNorm((5, 32)).to(DEVICE),
        with_hook,
        with_parametrization,
    ],
)
def test_other_norms_are_called(everywhere, monkeypatch, change):
    norm, layer, states, residual = make_parts()
    norm = change(norm)
    if any(parameter.dtype is torch.float64 for parameter in norm.parameters()):
        layer, states, residual = layer.double(), states.double(), residual.double()
    monkeypatch.setattr(kernels, "forward", mock.Mock(side_effect=AssertionError))
    projected = layer(states)
    expected = norm(projected + residual)
    torch.testing.assert_close(norm_of_sum(norm, projected, residual), expected)
    torch.testing.assert_close(norm_of_product(norm, layer, states, residual), expected)


def test_small_inputs_and_transforms_take_torchs_operators(everywhere, monkeypatch):
    norm, layer, states, residual = make_parts()
    monkeypatch.setattr(kernels, "forward", mock.Mock(side_effect=AssertionError))
    expected = norm(layer(states) + residual)
    torch.testing.assert_close(
        torch.func.vmap(lambda *pair: norm_of_product(norm, layer, *pair))(states, residual), expected
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(residual, torch.ones_like(residual))
        assert torch.autograd.forward_ad.unpack_dual(norm_of_product(norm, layer, states, dual)).tangent is not None
    monkeypatch.setattr(module, "FEWEST_NUMBERS", residual.numel() + 1)
    torch.testing.assert_close(norm_of_product(norm, layer, states, residual), expected)


@pytest.mark.parametrize(("dropout", "has_bias"), [(0.0, True), (0.5, False)])
def test_layers_train_with_them(everywhere, monkeypatch, dropout, has_bias):
    """The same states and gradients as without them, of the same dropout; the bias is theirs if there is none."""
    model = make_model(num_hidden_layers=1, block_size=16, num_random_blocks=1, hidden_dropout_prob=dropout)
    model.to(DEVICE).train()
    monkeypatch.setattr(modeling_big_bird, "trains_as_one", lambda *parts: False)  # which CPUs do
    ids = random_ids(2, 40).to(DEVICE)

    def run():
        model.zero_grad()
        torch.manual_seed(1)
        states = model(ids).last_hidden_state
        states.sin().sum().backward()
        return [states.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as launched:
        actual = run()
    assert [call.args[2] is not None for call in launched.call_args_list] == [has_bias] * 2
    monkeypatch.setattr(module, "_kernels", lambda device: None)
    torch.testing.assert_close(actual, run(), atol=1e-5, rtol=1e-4)


def test_replaced_projections_are_called(everywhere):
    norm, layer, states, residual = make_parts()
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with mock.patch.object(kernels, "forward", wraps=kernels.forward) as launched:
        actual = norm_of_product(norm, layer, states, residual)
    assert launched.call_args.args[2] is None
    torch.testing.assert_close(actual, norm(layer(states) + residual))


def test_compiled_layers_leave_it_to_the_compiler(everywhere, monkeypatch):
    norm, layer, states, residual = make_parts()
    monkeypatch.setattr(kernels, "forward", mock.Mock(side_effect=AssertionError))
    compiled = torch.compile(norm_of_product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(norm, layer, states, residual), norm(layer(states) + residual))
