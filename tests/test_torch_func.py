"""Transforms of torch.func and second derivatives, which take torch's own operators only: by the definition."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from .peers import make_model, random_ids

pytestmark = pytest.mark.torch_only
SPARSE = random_ids(2, 130)
MASK = (torch.arange(130) < torch.tensor([[130], [100]])).long()


@pytest.fixture(params=["block_sparse", "original_full"])
def model(request):
    return make_model(attention_type=request.param, num_hidden_layers=1).double()


def loss_of(model, mask=None):
    def loss(parameters, ids):
        states = functional_call(model, parameters, (ids,), {"attention_mask": mask}).last_hidden_state
        return states.sin().sum() if mask is None else (states.sin() * mask[..., None]).sum()

    return loss


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mask", [None, MASK])
def test_grad(model, mask):
    loss = loss_of(model, mask)
    expected = torch.autograd.grad(loss(dict(model.named_parameters()), SPARSE), list(model.encoder.parameters()))
    actual = grad(loss)(parameters_of(model), SPARSE)
    for (name, _), wanted in zip(model.encoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(actual[f"encoder.{name}"], wanted)


def test_gradients_of_each_sample(model):
    loss, parameters = loss_of(model), parameters_of(model)
    per_sample = vmap(grad(loss), (None, 0))(parameters, SPARSE[:, None])
    for row in range(2):
        expected = grad(loss)(parameters, SPARSE[row : row + 1])
        for name, wanted in expected.items():
            torch.testing.assert_close(per_sample[name][row], wanted)


def test_jvp(model):
    loss, parameters = loss_of(model), parameters_of(model)
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    _, actual = jvp(lambda parameters: loss(parameters, SPARSE), (parameters,), (direction,))
    gradient = grad(loss)(parameters, SPARSE)
    torch.testing.assert_close(actual, sum((gradient[name] * direction[name]).sum() for name in parameters))


def test_of_embeddings(model):
    """The parameters are plain ones here, for which linear layers have a faster product."""
    embeds = torch.randn(1, 130, 32, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    model, direction = model.float(), torch.randn(1, 130, 32, generator=torch.Generator().manual_seed(1))

    def loss(embeds):
        return model(inputs_embeds=embeds).last_hidden_state.sin().sum()

    expected = torch.autograd.grad(loss(embeds.requires_grad_()), embeds)[0]
    torch.testing.assert_close(grad(loss)(embeds.detach()), expected, atol=1e-4, rtol=1e-4)
    _, actual = jvp(loss, (embeds.detach(),), (direction,))
    torch.testing.assert_close(actual, (expected * direction).sum(), atol=1e-3, rtol=1e-3)


def test_second_derivatives():
    """Of sparse attention: torch has none of its own flash attention on a CPU."""
    results = []
    for implementation in ("sdpa", "eager"):
        model = make_model(num_hidden_layers=1)
        model.set_attn_implementation(implementation)
        weights = list(model.encoder.parameters())
        first = torch.autograd.grad(model(SPARSE).last_hidden_state.sin().sum(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(one.square().sum() for one in first), weights))
    largest = max(expected.norm() for expected in results[1])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm() + 1e-5 * largest  # all but zero for the keys' bias
