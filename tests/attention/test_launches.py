"""What a single document asks of a GPU, counted on one that is none: kernels of a layer, of attention, and waiting."""

from collections import Counter

import pytest
import torch

from bigbird_plus import Sparsity, cpu
from bigbird_plus.attention import engines
from bigbird_plus.attention.ops import Reading

from ..peers import make_model, random_ids, random_inputs
from .pretended_gpu import PretendedGPU, make_pretend

triton = pytest.importorskip("bigbird_plus.attention.impl.triton")

BLOCKS = 64
"""Of 4,096 tokens in the public models; here a block is of 16."""

SIZES = {"block_size": 16, "num_random_blocks": 1, "num_attention_heads": 2, "max_position_embeddings": 16 * BLOCKS}


class Kernel:
    """Is launched, and computes nothing."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launched[self.name] += 1

        return launch


@pytest.fixture
def launched(monkeypatch):
    """The kernels of ours that were launched."""
    counts = Counter()
    for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "merge_kernel"):
        monkeypatch.setattr(triton, name, Kernel(name, counts))
    return counts


@pytest.fixture
def gpu(monkeypatch, launched):
    make_pretend(monkeypatch)
    monkeypatch.setitem(engines._engines, "triton", triton)
    monkeypatch.setattr(triton, "reason", lambda call: None)
    monkeypatch.setattr(cpu, "is_plain", lambda layer: type(layer) is torch.nn.Linear)  # but for its parameters
    monkeypatch.setattr(cpu, "_has_product_with_gelu", lambda layer, states: True)
    return PretendedGPU()


def run(gpu, model, inputs):
    gpu.counts.clear()
    gpu.launched.clear()
    names, tensors = zip(*inputs.items(), strict=True)
    with torch.no_grad(), gpu:
        return model(**dict(zip(names, gpu.put(*tensors), strict=True)))


def of_a_layer(gpu, launched, has_mask) -> Counter:
    """What the second of two layers launches."""
    ids, counts = random_ids(1, 16 * BLOCKS), []
    inputs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if has_mask else {})}
    for layers in (1, 2):
        model = gpu.move(make_model("BigBirdForMaskedLM", num_hidden_layers=layers, **SIZES))
        run(gpu, model, inputs)  # makes lists
        launched.clear()
        run(gpu, model, inputs)
        counts.append(gpu.launched + launched)
    return counts[1] - counts[0]


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_layer_launches_six_products_attention_and_two_sums_that_are_normalized(gpu, launched, has_mask):
    """As many as with dense attention: nothing is copied, masked, filled with zeros or put together."""
    counts = of_a_layer(gpu, launched, has_mask)
    assert counts.pop("forward_kernel") == 1
    assert counts.pop("addmm") == 5
    assert counts.pop("_addmm_activation") == 1
    assert set(counts) <= {"add", "native_layer_norm"}
    assert counts.total() <= 4


def test_attention_of_64_blocks_is_one_launch_and_its_gradients_are_two(launched):
    """The lists of global blocks are not cut in segments, which would have to be merged."""
    states = torch.zeros(1, 16 * BLOCKS, 12, 16)
    reading = Reading(Sparsity(12, 16, num_random_blocks=1).pattern(BLOCKS), 1.0)
    output, log_sum_exp = triton.attend(states, states, states, reading)
    assert launched == {"forward_kernel": 1}
    launched.clear()
    triton.gradients(states, states, states, states, output, log_sum_exp, reading)
    assert launched == {"query_gradient_kernel": 1, "key_gradient_kernel": 1}


@pytest.mark.parametrize(
    "name",
    [
        "BigBirdModel",
        "BigBirdForPreTraining",
        "BigBirdForMaskedLM",
        "BigBirdForSequenceClassification",
        "BigBirdForTokenClassification",
        "BigBirdForQuestionAnswering",
    ],
)
def test_a_model_waits_once_if_there_is_a_mask_labels_or_not(gpu, name):
    model = gpu.move(make_model(name, num_hidden_layers=1, **SIZES))
    for labels in (False, True):
        inputs = random_inputs(name, 2, 256, labels=labels)
        masks = [None, torch.ones(2, 256, dtype=torch.long), inputs.pop("attention_mask")]
        for mask in masks:
            run(gpu, model, inputs if mask is None else {**inputs, "attention_mask": mask})
            assert gpu.counts["waited for"] == (mask is not None)


def test_global_tokens_and_documents_are_waited_for_once_more(gpu):
    model = gpu.move(make_model(num_hidden_layers=1, **SIZES))
    inputs = random_inputs("BigBirdModel", 2, 256, labels=False)
    chosen = (inputs["input_ids"] % 50 == 7).long()
    run(gpu, model, {**inputs, "global_attention_mask": chosen})
    assert gpu.counts["waited for"] == 2
    positions = torch.arange(256).expand(2, -1)
    run(gpu, model, {**inputs, "position_ids": positions})
    assert gpu.counts["waited for"] == 2
