"""The linear engines that run everywhere against the definition: outputs and gradients."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbird_plus import Sparsity
from bigbird_plus.attention import common
from bigbird_plus.attention.global_tokens import find_global_tokens
from bigbird_plus.attention.impl import flash_cpu, gather, reference

from ..peers import own_random_blocks

pytestmark = pytest.mark.torch_only

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def case(window=3, num_global=2, r=3, *, block=4, extra_blocks=1, heads=2, batch=2, head_dim=8, **others):
    """One input: its pattern, its sizes, its padding."""
    sparsity = Sparsity(
        num_attention_heads=heads,
        block_size=block,
        num_random_blocks=r,
        num_sliding_window_blocks=window,
        num_global_blocks=num_global,
        global_block_indices=others.get("indices"),
        different_layout_per_head=others.get("different_layouts", True),
    )
    if others.get("own_rows"):
        blocks = own_random_blocks(sparsity.num_layouts, others["own_rows"], r)
        sparsity = replace(sparsity, random_blocks=blocks)
    num_blocks = sparsity.full_attention_length // block + extra_blocks
    pattern = sparsity.pattern(num_blocks, layer_idx=1, training=others.get("training", False))
    return {
        "pattern": sparsity.causal_pattern(num_blocks, layer_idx=1) if others.get("causal") else pattern,
        "shape": (batch, heads, num_blocks * block + others.get("extra", 0), head_dim),
        "padding": others.get("padding", "none"),
        "extra": others.get("extra", 0),
        "chosen": others.get("chosen", 0),
        "seed": others.get("seed", 0),
        "at_once": others.get("at_once", common.CHUNK_BYTES),
    }


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 3))
    indices = draw(st.none() | st.lists(st.integers(-12, 30), max_size=4))
    return case(
        window=draw(st.sampled_from([1, 3, 5, 7])),
        num_global=draw(st.integers(0, 4)) if indices is None else 2,
        indices=indices,
        different_layouts=draw(st.booleans()),
        own_rows=draw(st.sampled_from([0, 0, 5, 11])),
        extra=draw(st.sampled_from([0, 0, 1, 5])),
        chosen=draw(st.sampled_from([0, 0, 0.05, 0.5])),
        r=draw(st.integers(0, 3)),
        block=draw(st.sampled_from([1, 2, 3, 8, 16])),
        extra_blocks=draw(st.integers(1, 6)),
        heads=draw(st.integers(1, 3)),
        batch=batch,
        head_dim=draw(st.sampled_from([8, 20, 30, 64])),
        training=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "right", "left", "anywhere", "everything"])),
        seed=draw(st.integers(0, 99)),
        at_once=draw(st.sampled_from([common.CHUNK_BYTES, 10_000, 1])),
    )


def padding_mask(kind, batch, length, generator):
    """Which tokens are real; of the last row, none if `kind` is "everything"."""
    if kind == "none":
        return None
    if kind == "anywhere":
        return torch.rand(batch, length, generator=generator) < 0.7
    real = torch.randint(1, length + 1, (batch, 1), generator=generator)
    mask = torch.arange(length) < real
    if kind == "everything":
        mask[-1] = False
    return mask.flip(1) if kind == "left" else mask


def mask_and_tokens(case, generator):
    """Which tokens are real, and which of them are global."""
    batch, _, length, _ = case["shape"]
    length -= case["extra"]
    mask, chosen = padding_mask(case["padding"], batch, length, generator), None
    if case["chosen"]:
        chosen = torch.rand(batch, length, generator=generator) < case["chosen"]
        chosen = chosen if mask is None else chosen & mask
    tokens = find_global_tokens(chosen, case["extra"], batch, length, torch.device("cpu"))
    return mask if mask is None else torch.nn.functional.pad(mask, (0, case["extra"]), value=True), tokens


def run(function, tensors, dtype, pattern, mask, weight, tokens=None):
    """Output and gradients of an engine, in float64. The gradient is that of a weighted sum."""
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    output = function(*tensors, pattern, mask, tokens, scaling=tensors[0].shape[-1] ** -0.5)
    output = output[0] if isinstance(output, tuple) else output
    assert output.dtype is dtype
    grads = torch.autograd.grad((output * weight.to(dtype)).sum(), tensors)
    return [tensor.detach().double() for tensor in (output, *grads)]


def check_against_definition(case, dtype, *, engine):
    """No further from the definition in float64 than the definition itself in `dtype`, up to a small factor."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors = [torch.randn(case["shape"], generator=generator).to(dtype).double() for _ in range(3)]
    weight = torch.randn(case["shape"], generator=generator).to(dtype)
    mask, tokens = mask_and_tokens(case, generator)
    arguments = (case["pattern"], mask, weight, tokens)
    exact = run(reference.forward, tensors, torch.float64, *arguments)
    definition = run(reference.forward, tensors, dtype, *arguments)
    with mock.patch.object(common, "CHUNK_BYTES", case["at_once"]):
        actual = run(engine.forward, tensors, dtype, *arguments)
    for name, a, b, c in zip(("output", "query", "key", "value"), exact, definition, actual, strict=True):
        size = a.abs().max().clamp(min=1)
        # float32 scores, weights and sums are each rounded, where a reduced dtype rounds the result alone
        roundings = 16 if dtype in (torch.float32, torch.float64) else 4
        allowed = 4 * (b - a).abs().max() + (roundings * torch.finfo(dtype).eps + 1e-13) * size
        assert (c - a).abs().max() <= allowed, name


@pytest.mark.parametrize("engine", [flash_cpu, gather], ids=["flash_cpu", "gather"])
@given(case=cases(), dtype=st.sampled_from(DTYPES))
@example(case=case(extra_blocks=1, batch=3), dtype=torch.float32)
@example(case=case(7, 0, 0, extra_blocks=1, batch=1), dtype=torch.float64)
@example(case=case(7, 1, 0, extra_blocks=1), dtype=torch.float64)
@example(case=case(1, 0, 0, block=16, padding="everything"), dtype=torch.float16)
@example(case=case(5, 3, 2, padding="anywhere", training=True, batch=3), dtype=torch.float64)
@example(case=case(r=1, chosen=0.2, extra=3, padding="left", training=True, batch=3), dtype=torch.float64)
@example(case=case(r=1, indices=[0, 4, 7, -3, 40], chosen=0.2, training=True, batch=2), dtype=torch.float64)
@example(case=case(r=1, chosen=0.2, extra=3, padding="left", training=True, batch=3, at_once=1), dtype=torch.float64)
@example(case=case(extra_blocks=9, padding="right", training=True, batch=3, at_once=20_000), dtype=torch.float64)
@example(case=case(r=2, indices=[], extra=1, different_layouts=False, training=True), dtype=torch.float32)
@example(case=case(r=2, indices=[0, 1], own_rows=9, extra_blocks=1, padding="right"), dtype=torch.float32)
@example(case=case(r=2, indices=[0, 1], own_rows=9, extra_blocks=9, batch=3), dtype=torch.float64)
@settings(max_examples=100)
def test_agrees_with_the_definition(case, dtype, engine):
    check_against_definition(case, dtype, engine=engine)


@pytest.mark.parametrize("engine", [flash_cpu, gather], ids=["flash_cpu", "gather"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_agrees_with_the_definition_at_the_published_sizes(dtype, training, engine):
    published = case(block=64, extra_blocks=5, heads=2, batch=1, head_dim=64, training=training, padding="right")
    check_against_definition(published, dtype, engine=engine)


@pytest.mark.parametrize("engine", [flash_cpu, gather], ids=["flash_cpu", "gather"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
def test_rows_of_padding_only_are_zero_with_zero_gradients(dtype, training, engine):
    settings = case(training=training, batch=3)
    mask = torch.ones(3, settings["shape"][2], dtype=torch.bool)
    mask[1] = False
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(settings["shape"], generator=generator) for _ in range(3)]
    results = run(engine.forward, tensors, dtype, settings["pattern"], mask, torch.ones(()))
    for result in results:
        assert result.isfinite().all()
        assert (result[1] == 0).all()
        assert (result[0] != 0).any()


@pytest.mark.parametrize("engine", [flash_cpu, gather], ids=["flash_cpu", "gather"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_stay_finite(dtype, engine):
    settings = case(training=True)
    generator = torch.Generator().manual_seed(0)
    tensors = [30 * torch.randn(settings["shape"], generator=generator) for _ in range(3)]
    mask = torch.arange(settings["shape"][2]) < torch.tensor([[40], [3]])
    results = run(engine.forward, tensors, dtype, settings["pattern"], mask, torch.ones(()))
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("engine", [flash_cpu, gather], ids=["flash_cpu", "gather"])
def test_gradients_are_those_of_finite_differences(engine):
    settings = case(3, 2, 1, block=2, extra_blocks=2, indices=[0, 5], extra=2, training=True)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(settings["shape"], dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    mask = torch.arange(settings["shape"][2]) < torch.tensor([[18], [5]])
    mask[:, -2:] = True
    tokens = find_global_tokens(mask[:, :-2] & (torch.arange(18) % 4 == 1), 2, 2, 18, torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda *qkv: engine.forward(*qkv, settings["pattern"], mask, tokens, scaling=0.3), tensors, fast_mode=True
    )


def test_strided_inputs_and_gradients():
    """Projections come as `[batch, length, heads, dim]`, seen from another side."""
    settings = case(training=True, batch=2)
    batch, heads, length, dim = settings["shape"]
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, length, 3, heads, dim, generator=generator).requires_grad_()
    packed = [tensor.transpose(1, 2) for tensor in fused.unbind(2)]
    output = flash_cpu.forward(*packed, settings["pattern"], None, scaling=0.3)
    expected = reference.forward(*packed, settings["pattern"], None, scaling=0.3)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    grads = [torch.autograd.grad(result.square().sum(), fused)[0] for result in (output, expected)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_the_value_can_need_no_gradient():
    settings = case()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(settings["shape"], generator=generator) for _ in range(3))
    query.requires_grad_()
    flash_cpu.forward(query, key, value, settings["pattern"], None, scaling=0.3).sum().backward()
    assert query.grad.isfinite().all()
    assert value.grad is None


def test_deterministic_algorithms_are_enough():
    case = torch.randn(3, 2, 4, 120, 16, requires_grad=True)
    pattern = Sparsity(num_attention_heads=4, block_size=8).pattern(15, training=True)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            context = flash_cpu.forward(*case, pattern, None, scaling=0.25)
            results.append((context, torch.autograd.grad(context.sin().sum(), case)[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_second_derivatives_are_those_of_the_definition():
    case = torch.randn(3, 1, 1, 120, 8, dtype=torch.float64, requires_grad=True)
    pattern, results = Sparsity(1, 8).pattern(15), []
    for engine in (flash_cpu, reference):
        context = engine.forward(*case, pattern, scaling=0.25)
        (grad,) = torch.autograd.grad(context.sin().sum(), case, create_graph=True)
        results.append((grad, *torch.autograd.grad(grad.cos().sum(), case)))
    torch.testing.assert_close(*results)
