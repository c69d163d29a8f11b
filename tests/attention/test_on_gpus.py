"""What a call asks of a GPU beside its kernels, counted on one that is none."""

import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bigbird_plus import BigBirdConfig, Sparsity
from bigbird_plus.attention import common, engines, plan
from bigbird_plus.attention.common import may_wait_for
from bigbird_plus.attention.impl.triton_lists import make_lists
from bigbird_plus.attention.parts import Tokens
from bigbird_plus.attention.plan import make_plan

from .pretended_gpu import PretendedGPU, make_pretend

BATCH, LENGTH = 2, 256
PLACES = torch.arange(LENGTH)
MASKS = {
    "none": None,
    "all ones": torch.ones(BATCH, LENGTH, dtype=torch.long),
    "padded": (torch.tensor([[LENGTH], [200]]) > PLACES).long(),
    "left": (torch.tensor([[0], [30]]) <= PLACES).long(),
}


class Lists:
    """An engine that makes the lists of blocks, and computes nothing."""

    @staticmethod
    def reason(call):
        return None

    @staticmethod
    def forward(query, key, value, pattern, key_mask, global_tokens, *, scaling):
        make_lists(pattern, 1, query.device)
        return query

    forward_documents = forward


@pytest.fixture
def gpu(monkeypatch):
    make_pretend(monkeypatch)
    monkeypatch.setitem(engines._engines, "triton", Lists)
    return PretendedGPU()


def plan_on(gpu, mask, **overrides):
    config = BigBirdConfig(
        **{"block_size": 16, "num_random_blocks": 1, "num_attention_heads": 2, "hidden_size": 32, **overrides}
    )
    (places,) = gpu.put(PLACES)
    attention_mask = None if mask is None else gpu.put(mask)[0]
    with torch.no_grad(), gpu:
        return make_plan(config, "block_sparse", Tokens(BATCH, places, torch.float32, attention_mask))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_a_plan_waits_once_if_there_is_a_mask(gpu, name, is_decoder):
    made = plan_on(gpu, MASKS[name], is_decoder=is_decoder)
    assert gpu.counts["waited for"] == (name != "none")
    assert gpu.counts["blocking copies"] == 0
    if name in ("none", "all ones"):
        assert made.parts[0].key_mask is None
        assert made.packing is None
        assert made.computed is None
    elif not is_decoder:
        assert made.packing is not None


def test_states_leave_without_waiting(gpu):
    made = plan_on(gpu, MASKS["padded"])
    states = torch.randn(BATCH, LENGTH, 4)
    gpu.counts.clear()
    with torch.no_grad(), gpu:
        left = made.leave(made.enter(*gpu.put(states)))
    assert gpu.counts["waited for"] == 0
    torch.testing.assert_close(left.numbers, states * MASKS["padded"][..., None])


def test_masks_are_not_looked_at_while_graphs_are_captured_or_warmed_up():
    tensor = SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda", 0))
    with mock.patch.object(common, "_is_on_default_stream", lambda device: True):
        assert may_wait_for(tensor)
        with mock.patch.object(common, "is_tracing", lambda: True):
            assert not may_wait_for(tensor)
    with mock.patch.object(common, "_is_on_default_stream", lambda device: False):
        assert not may_wait_for(tensor)
    assert may_wait_for(torch.ones(1))


@pytest.mark.parametrize("name", MASKS)
def test_captured_is_what_was_warmed_up(gpu, monkeypatch, name):
    """Masks are used as they are, and there is none where none was given."""
    monkeypatch.setattr(plan, "may_wait_for", lambda tensor: False)
    warmed_up = plan_on(gpu, MASKS[name])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = plan_on(gpu, MASKS[name])
    for made in (warmed_up, captured):
        assert made.packing is None
        assert (made.parts[0].key_mask is None) == (name == "none")
    assert gpu.counts["waited for"] == 0
    assert gpu.counts["operators"] % 2 == 0  # as many in either


@pytest.mark.parametrize(("name", "most"), [("none", 2), ("all ones", 2), ("left", 20)])
def test_decoders_make_lists_once_and_move_left_padding_only(gpu, name, most):
    made = plan_on(gpu, MASKS[name], is_decoder=True, num_random_blocks=2)
    module = SimpleNamespace(layer_idx=3, heads=[0, 1], training=False, scaling=1.0)
    tensors = gpu.put(*(torch.randn(BATCH, 2, LENGTH, 16) for _ in range(3)))
    with torch.no_grad(), gpu:
        made.attend(module, *tensors)
        assert gpu.counts["blocking copies"] == 0
        gpu.counts.clear()
        context, _ = made.attend(module, *tensors)
    assert gpu.counts["operators"] <= most
    assert gpu.counts["waited for"] == 0
    real = torch.ones(BATCH, LENGTH) if MASKS[name] is None else MASKS[name]
    torch.testing.assert_close(context.numbers, tensors[0].numbers * real[:, None, :, None])


def test_lists_take_one_copy_from_memory_that_a_gpu_reads_itself():
    """By another thread, as graphs of torch.compile may own the memory of the first. Pretended tensors cannot be
    pinned: here nothing is copied."""
    pinned, copies, stream = [], [], mock.Mock()

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    def copy(tensor, device, non_blocking):
        is_elsewhere = threading.get_ident() != threading.main_thread().ident
        copies.append((tensor is pinned[-1], device.type, non_blocking, is_elsewhere))
        return tensor

    pattern = Sparsity(2, block_size=16, num_random_blocks=1).pattern(17)
    with (
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch.Tensor, "to", copy),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),
    ):
        reads, read_by = make_lists(pattern, 1, torch.device("cuda"))
    assert copies == [(True, "cuda", True, True)]
    assert stream.mock_calls == [mock.call.record_event(), mock.call.wait_event(stream.record_event.return_value)]
    assert all(tensor.data_ptr() % 16 == pinned[0].data_ptr() % 16 for tensor in (*reads.tensors, *read_by.tensors))
