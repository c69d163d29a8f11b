"""A program whose processes share documents, and each of which has them alone besides."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

import bigbird_plus
from tests.peers import make_model, random_ids, random_inputs

LENGTH = 203  # 26 blocks, the last one not full


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def compare(model, inputs, group, asks=lambda outputs, processes: outputs):
    """The largest differences between what processes find together and one alone."""
    model.zero_grad()
    alone = asks(model(**inputs), None)
    objective(alone).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    with bigbird_plus.context_parallel(group) as processes:
        shared = asks(model(**inputs), processes)
    objective(shared).backward()
    found = gradients(model)
    for grad in found.values():
        dist.all_reduce(grad, group=group)
        grad /= processes.size
    scale = max(grad.abs().max() for grad in expected.values())
    differences = [(shared[key] - alone[key]).abs().max() for key in alone if isinstance(alone[key], torch.Tensor)]
    return {
        "outputs": float(max(differences)),
        "gradients": float(max((found[name] - grad).abs().max() for name, grad in expected.items()) / scale),
        "bytes_sent": processes.bytes_sent,
    }


def objective(outputs):
    """The loss, or something that depends on all states."""
    if outputs.get("loss") is not None:
        return outputs["loss"]
    return sum(tensor.square().mean() for tensor in outputs.values() if tensor is not None)


def states(outputs, processes):
    """Of `BigBirdModel`, whole."""
    outputs = {"states": outputs.last_hidden_state, "pooler_output": outputs.get("pooler_output")}
    if processes is not None:
        outputs["states"] = processes.gather(outputs["states"])
    return outputs


def encoder(training=False, length=LENGTH, batch=2, dtype=torch.float64, mask=None, **settings):
    model = make_model(**settings).to(dtype).train(training)
    inputs = {"input_ids": random_ids(batch, length)}
    if mask is not None:
        inputs["attention_mask"] = mask(batch, length)
    return model, inputs


def right_padding(batch, length):
    return (torch.arange(length) < length - 30 * torch.arange(batch)[:, None]).long()


def left_padding(batch, length):
    return right_padding(batch, length).flip(-1)


CASES = {
    "eval": {},
    "training": {"training": True},
    "float32": {"dtype": torch.float32},
    "eager": {"attn_implementation": "eager"},
    "gathered": {"attn_implementation": "gather", "training": True},
    "right padding": {"mask": right_padding, "training": True},
    "left padding": {"mask": left_padding},
    "short": {"length": 61},
    "very short": {"length": 3},
    "full": {"attention_type": "original_full", "mask": right_padding},
    "extra tokens": {"num_extra_global_tokens": 3, "training": True},
    "extra tokens, full": {"num_extra_global_tokens": 3, "length": 61},
    "one layout": {"different_layout_per_head": False, "training": True},
    "wide window": {"num_sliding_window_blocks": 7, "num_random_blocks": 1},
    "four global blocks": {"num_global_blocks": 4, "num_random_blocks": 1},
    "no global blocks": {"num_global_blocks": 0, "num_random_blocks": 1},
    "global indices": {"global_block_indices": [0, 5, -3], "num_random_blocks": 1},
    "decoder": {"is_decoder": True},
    "decoder, padded": {"is_decoder": True, "mask": right_padding},
    "decoder, short": {"is_decoder": True, "length": 61},
    "decoder without random blocks": {"is_decoder": True, "num_random_blocks": 0},
}


def run(rank, size, folder, names):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    results = {}
    for name in names or CASES:
        model, inputs = encoder(**CASES[name])
        results[name] = compare(model, inputs, dist.group.WORLD, states)
        if rank == 0:
            print(name, results[name], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        size = int(sys.argv[1])
        multiprocessing.start_processes(run, (size, folder, sys.argv[2:]), nprocs=size, start_method="fork")
