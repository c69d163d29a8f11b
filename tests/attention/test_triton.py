"""The Triton kernels against the definition: on a GPU, or on the CPU by Triton's interpreter, which takes its time."""

import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

from bigbird_plus import Sparsity
from bigbird_plus.attention import engines, ops
from bigbird_plus.attention.engines import Call, choose_engine
from bigbird_plus.attention.global_tokens import find_global_tokens
from bigbird_plus.attention.impl import reference

from ..peers import make_model, own_random_blocks, random_ids

triton = pytest.importorskip("bigbird_plus.attention.impl.triton")

pytestmark = [pytest.mark.gpu, pytest.mark.torch_only]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # the interpreter multiplies the bits of these as whole numbers
SMALL = Sparsity(num_attention_heads=2, block_size=16, num_random_blocks=1)
ONE_HEAD = Sparsity(num_attention_heads=1, block_size=16, num_random_blocks=1)
WIDE = Sparsity(
    num_attention_heads=2, block_size=16, num_random_blocks=1, num_sliding_window_blocks=5, num_global_blocks=3
)
CHOSEN = Sparsity(num_attention_heads=2, block_size=16, num_random_blocks=1, global_block_indices=(0, 4, -3))
OWN = Sparsity(2, 16, num_random_blocks=2, global_block_indices=(0, 1), random_blocks=own_random_blocks(2, 7, 2))


@pytest.fixture
def in_segments(monkeypatch):
    """Cuts long lists, as for long inputs."""
    monkeypatch.setattr(triton, "SHORTEST_SEGMENT", 3)


@pytest.fixture
def everywhere(monkeypatch):
    """Makes the kernels the default engine, also where there is no GPU."""
    monkeypatch.setitem(engines._engines, "triton", triton)
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "reason", lambda call: None)


def random_tensors(batch, length, dim, dtype=torch.float32, heads=2):
    """Queries, keys, values and the gradient of the context."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, heads, dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for _ in range(4)]


def padding(batch, length):
    """Holes everywhere, whole blocks without a token, and a last row without any."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[0, length // 2 : length // 2 + 40] = False
    mask[-1] = False
    return mask.to(DEVICE)


def results(function, tensors, dtype=None):
    """Context and gradients, in float64."""
    *inputs, grad = (tensor.detach().to(dtype or tensor.dtype) for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    context = function(*inputs)
    return [tensor.double() for tensor in (context.detach(), *torch.autograd.grad(context, inputs, grad))]


def check(tensors, of_kernels, of_definition):
    """No further from the definition in float64 than the definition itself in their dtype, up to a small factor."""
    exact = results(of_definition, tensors, torch.float64)
    definition, kernels = results(of_definition, tensors), results(of_kernels, tensors)
    for name, a, b, c in zip(("context", "query", "key", "value"), exact, definition, kernels, strict=True):
        roundings = 32 if tensors[0].dtype is torch.float32 else 4
        allowed = 2 * (b - a).abs().max() + roundings * torch.finfo(tensors[0].dtype).eps * a.abs().max()
        assert (c - a).abs().max() <= allowed, name


def check_pattern(pattern, block_size=16, dim=16, *, batch=1, mask=None, dtype=torch.float32):
    def kernels(query, key, value):
        return triton.forward(query, key, value, pattern, mask, scaling=0.3)

    def definition(query, key, value):
        return reference.block_sparse_attention(query, key, value, pattern, mask, scaling=0.3)[0]

    check(random_tensors(batch, pattern.num_blocks * block_size, dim, dtype), kernels, definition)


@pytest.mark.parametrize(
    "pattern",
    [SMALL.pattern(8), WIDE.pattern(11), CHOSEN.pattern(9), OWN.pattern(3), OWN.pattern(9)],
    ids=["small", "wide", "chosen", "own, short", "own"],
)
def test_evaluation(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_blocks_and_padding(dtype):
    check_pattern(SMALL.pattern(8, training=True), batch=2, mask=padding(2, 128), dtype=dtype)


def test_long_lists_in_segments(in_segments):
    assert triton._count_segments(CHOSEN.pattern(10), 2) == 4
    check_pattern(CHOSEN.pattern(10), batch=2, mask=padding(2, 160))


@pytest.mark.parametrize(("block_size", "dim"), [(48, 20), (32, 8), (64, 64)])
def test_other_sizes(block_size, dim):
    check_pattern(Sparsity(2, block_size, num_random_blocks=0).pattern(6), block_size, dim)


@pytest.mark.parametrize("padded", [False, True])
def test_decoders(padded):
    pattern, length = SMALL.causal_pattern(9), 9 * 16
    mask = padding(2, length) if padded else torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    mask[:, 0] = True
    places = torch.arange(length, device=DEVICE)

    def kernels(query, key, value):
        key_mask = mask if padded else None
        return triton.forward(query, key, value, pattern, key_mask, scaling=0.3)

    def definition(query, key, value):
        how = {"places": places, "offset": None, "key_mask": mask, "scaling": 0.3}
        return reference.causal_attention(query, key, value, pattern, **how)[0] * mask[:, None, :, None]

    check(random_tensors(2, length, 16), kernels, definition)


@pytest.mark.parametrize("segments", [False, True])
def test_documents_in_one_row(segments, request):
    """Each is a part of an input with the pattern: all of it, its beginning, or what is left without left padding."""
    if segments:
        request.getfixturevalue("in_segments")
    pattern, parts = SMALL.pattern(9, training=True), [(0, 9), (0, 4), (3, 8)]
    sizes = [(last - first) * 16 for first, last in parts]
    mask = torch.rand(1, sum(sizes), generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.8
    places = [sum(sizes[:index]) - first * 16 for index, (first, _) in enumerate(parts)]
    documents = torch.tensor(
        [(place, *part) for place, part in zip(places, parts, strict=True)], dtype=torch.int32, device=DEVICE
    )

    def kernels(query, key, value):
        return triton.forward_documents(query, key, value, pattern, mask, documents, scaling=0.3)

    def definition(*tensors):
        split = zip(*(tensor.split(sizes, dim=2) for tensor in tensors), mask.split(sizes, dim=1), parts, strict=True)
        contexts = [
            reference.block_sparse_attention(*qkv, pattern.cut(*part), key_mask, scaling=0.3)[0]
            for *qkv, key_mask, part in split
        ]
        return torch.cat(contexts, dim=2)

    check(random_tensors(1, sum(sizes), 16), kernels, definition)


def check_global_tokens(pattern, chosen, *, num_extra, mask=None):
    """`chosen` are the places of each document."""
    length = pattern.num_blocks * 16
    is_chosen = torch.zeros(len(chosen), length, dtype=torch.bool, device=DEVICE)
    for row, places in zip(is_chosen, chosen, strict=True):
        row[places] = True
    if mask is not None:
        is_chosen &= mask
        mask = torch.nn.functional.pad(mask, (0, num_extra), value=True)
    tokens = find_global_tokens(is_chosen, num_extra, len(chosen), length, torch.device(DEVICE))

    def kernels(query, key, value):
        return triton.forward(query, key, value, pattern, mask, tokens, scaling=0.3)

    def definition(query, key, value):
        return reference.block_sparse_attention(query, key, value, pattern, mask, tokens, scaling=0.3)[0]

    check(random_tensors(len(chosen), length + num_extra, 16, heads=1), kernels, definition)


def test_single_global_tokens(in_segments):
    """Some in a global block, some in one that a row reads twice, some in one that few read; more in one document than
    in another, among padding."""
    pattern = ONE_HEAD.pattern(6, training=True)
    random_blocks = pattern.random_blocks.copy()
    random_blocks[0, 1:-1, 0] = [1, 3, 1, 4]  # those of rows 1, 2 and 4 are in their windows
    mask = torch.rand(2, 96, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[1, 48:] = False
    chosen = [[2, 17, 18, 50, 61, 66, 95], [1, 21, 90]]
    pattern = replace(pattern, random_blocks=random_blocks)
    check_global_tokens(pattern, chosen, num_extra=2, mask=mask.to(DEVICE))


def test_extra_tokens_alone():
    check_global_tokens(replace(ONE_HEAD, global_block_indices=(0, 2, -1)).pattern(5), [[]], num_extra=3)


def test_more_single_global_tokens_than_a_block_has():
    check_global_tokens(ONE_HEAD.pattern(5), [[*range(20, 40), 70]], num_extra=0)


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_there(tmp_path):
    """The interpreter takes what the compiler does not. In a process of its own, for it is one or the other."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.attention.compile_kernels", "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bytes shared") == 3 + 5 + 5 + 2  # lists of decoders have no segments to merge


def test_results_do_not_vary(in_segments):
    tensors, pattern = random_tensors(1, 8 * 16, 16), SMALL.pattern(8, training=True)
    both = [results(lambda *qkv: triton.forward(*qkv, pattern, scaling=0.3), tensors) for _ in "12"]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


def test_what_has_kernels():
    call = Call(torch.device("cuda"), torch.bfloat16, head_dim=64, block_size=64)
    with mock.patch.object(triton, "_is_recent", lambda device: True):
        for changes, reason in (
            ({}, None),
            ({"dtype": torch.float32, "block_size": 80, "head_dim": 100}, None),
            ({"device": torch.device("cpu")}, "NVIDIA"),
            ({"dtype": torch.float64}, "float64"),
            ({"block_size": 40}, "multiples of 16, not 40"),
            ({"head_dim": 160}, "up to 128 numbers, not 160"),
            ({"has_global_tokens": True}, None),
        ):
            found = triton.reason(call._replace(**changes))
            assert found is None if reason is None else reason in found


def make_small_model(**overrides):
    settings = {"num_attention_heads": 1, "block_size": 16, "num_random_blocks": 1, "num_hidden_layers": 1}
    model = make_model(**{**settings, **overrides}).to(DEVICE)
    model.freeze_pooler()  # else it wants the state of the first place, even of padding, and nothing is packed
    return model


def states_and_gradients(run, model, implementation, *args, **kwargs):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    states = run(*args, **kwargs).last_hidden_state
    kept = kwargs["attention_mask"][..., None] if "attention_mask" in kwargs else 1
    (states * kept).sin().sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if p.grad is not None and "pooler" not in name]
    return torch.cat([(states * kept).flatten(), *(grad.flatten() for grad in grads)])


@pytest.mark.parametrize("overrides", [{}, {"pattern_per_document": True}, {"is_decoder": True}], ids=str)
def test_models_take_them_for_padded_batches(everywhere, overrides):
    """Batches without their padding in one go, documents with patterns of their own, and decoders."""
    model = make_small_model(**overrides).train()
    ids, mask = random_ids(3, 140).to(DEVICE), torch.ones(3, 140, dtype=torch.long, device=DEVICE)
    mask[1, 120:] = 0
    mask[2, :35] = 0
    with torch.inference_mode():  # what is kept of it serves training, too
        model(ids, attention_mask=mask)
    launched = mock.patch.object(triton, "attend", wraps=triton.attend)
    with mock.patch.dict(ops.KERNELS), launched as attention:
        ops.KERNELS["triton"] = ops.Kernels(triton.attend, triton.gradients)
        actual = states_and_gradients(model, model, "sdpa", ids, attention_mask=mask)
    assert attention.call_count == (2 if "pattern_per_document" in overrides else 1)
    assert (attention.call_args.args[3].documents is not None) == (not overrides)
    expected = states_and_gradients(model, model, "eager", ids, attention_mask=mask)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("is_decoder", [False, True])
def test_compiled_models_take_them_in_one_graph_for_all_lengths(everywhere, is_decoder):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = make_small_model(is_decoder=is_decoder, use_cache=False).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (128, 140):
        ids = random_ids(2, length).to(DEVICE)
        actual = states_and_gradients(compiled, model, "sdpa", ids)
        expected = states_and_gradients(model, model, "eager", ids)
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
        model.set_attn_implementation("sdpa")
    assert len(graphs) == 1
    assert any("triton" in node.args for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


def test_engines_by_name(everywhere):
    call = Call(torch.device(DEVICE), torch.float32, head_dim=64, block_size=64)
    assert choose_engine("sdpa", call).name == "triton"
    assert choose_engine("eager", call).name == "eager"
    assert choose_engine("flex_attention", call).name == "flex_attention"
    assert choose_engine("sdpa", call._replace(has_global_tokens=True)).name == "triton"
