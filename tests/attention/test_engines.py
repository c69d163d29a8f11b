"""Which engine runs a call, by name or by itself; engines of one's own; and what all are to torch.compile."""

from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import bigbird_plus
from bigbird_plus import Sparsity, block_sparse_attention, register_engine
from bigbird_plus.attention import engines, ops
from bigbird_plus.attention.engines import Call, choose_engine
from bigbird_plus.attention.impl import flash_cpu, gather, reference
from bigbird_plus.attention.ops import Reading

from ..peers import make_model, random_ids

CPU = Call(torch.device("cpu"), torch.float32, head_dim=64, block_size=64)


class Watched:
    """An engine that counts its calls and has another do the work."""

    def __init__(self, reason=None):
        self.calls, self._reason = 0, reason

    def reason(self, call):
        return self._reason

    def forward(self, query, key, value, pattern, key_mask=None, global_tokens=None, *, scaling):
        self.calls += 1
        return gather.forward(query, key, value, pattern, key_mask, global_tokens, scaling=scaling)


@pytest.fixture
def own(monkeypatch):
    """Registers an engine, and takes it back afterwards."""
    tables = (engines._engines, AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(table) for table in tables]
    yield register_engine
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def test_the_first_that_can():
    choice = choose_engine("sdpa", CPU)
    assert (choice.name, choice.engine) == ("merged", flash_cpu)
    assert all("NVIDIA" in reason for reason in choice.passed_over.values())
    elsewhere = choose_engine("sdpa", CPU._replace(device=torch.device("meta")))
    assert (elsewhere.name, elsewhere.engine) == ("gather", gather)
    assert "CPU" in elsewhere.passed_over["merged"]
    assert choose_engine("flash_attention_2", CPU).name == "merged"


def test_flex_attention_where_it_can():
    assert choose_engine("flex_attention", CPU).name == "flex_attention"
    for change, reason in (
        ({"needs_gradients": True}, "gradients"),
        ({"is_causal": True}, "decoders"),
        ({"has_global_tokens": True}, "global tokens"),
        ({"dtype": torch.float64}, "float64"),
    ):
        choice = choose_engine("flex_attention", CPU._replace(**change))
        assert choice.name == "merged"
        assert reason in choice.passed_over["flex_attention"]
    with pytest.raises(ValueError, match="block_size is 8"):
        choose_engine("flex_attention", CPU._replace(block_size=8))


@pytest.mark.parametrize("name", ["eager", "merged", "gather"])
def test_models_take_engines_by_name(name):
    model, ids = make_model(), random_ids(2, 130)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        for again in (ids, ids[:, :50]):  # sparse and full
            model.set_attn_implementation("sdpa")
            expected = model(again).last_hidden_state
            model.set_attn_implementation(name)
            torch.testing.assert_close(model(again).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_one_that_cannot_run_says_why(own):
    own("never", Watched("the moon is full"))
    model = make_model()
    model.set_attn_implementation("never")
    with pytest.raises(ValueError, match=r"attn_implementation='never' cannot run this: the moon is full.*'sdpa'"):
        model(random_ids(1, 130))
    assert model(random_ids(1, 50)).last_hidden_state.isfinite().all()  # in full, for which nobody asks it


def test_an_engine_of_ones_own(own):
    engine = Watched()
    own("mine", engine)
    model, ids = make_model(num_hidden_layers=3), random_ids(2, 130)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        model.set_attn_implementation("mine")
        torch.testing.assert_close(model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    assert engine.calls == 3
    block_sparse_attention(*torch.randn(3, 1, 2, 130, 8), block_size=8, implementation="mine")
    assert engine.calls == 4


def test_names_that_are_taken_and_things_that_are_no_engine(own):
    for name in ("eager", "sdpa", "merged", "flash_attention_2"):
        with pytest.raises(ValueError, match=f"name must be new.*{name}"):
            own(name, Watched())
    with pytest.raises(ValueError, match="engine must have the functions"):
        own("nothing", object())


def test_unregistering_takes_the_names_back():
    bigbird_plus.unregister()
    try:
        assert "merged" not in AttentionInterface._global_mapping
    finally:
        bigbird_plus.register()
    assert "merged" in AttentionInterface._global_mapping


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_operator_passes_torch_checks(training, padded):
    tensors = [t.transpose(1, 2).requires_grad_() for t in torch.randn(3, 2, 2, 120, 8)]
    mask = torch.arange(120) < torch.tensor([[120], [90]]) if padded else None
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):  # as graphs have it
        pattern = Sparsity(2, 8).pattern(15, training=training)
    arguments = (*tensors, *ops._as_arguments("merged", Reading(pattern, 0.3, mask)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.bigbird_plus.attention.default, arguments, test_utils=checks)


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiled_attention_and_its_gradients(is_causal):
    torch._dynamo.reset()
    sparsity = Sparsity(2, 8)
    tensors = torch.randn(3, 2, 2, 120, 8, dtype=torch.float64).requires_grad_()

    def attend(tensors, forward=flash_cpu.forward):
        pattern = sparsity.causal_pattern(15) if is_causal else sparsity.pattern(15, training=True)
        return forward(*tensors, pattern, scaling=0.3)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for context in (compiled(tensors), attend(tensors, reference.forward)):
        results.append((context, torch.autograd.grad(context.sin().sum(), tensors)[0]))
    torch.testing.assert_close(*results)
    torch._dynamo.reset()
