"""Programs of which each process runs a copy. They write what they saw to files for the tests to read."""

import torch
from transformers import default_data_collator

from tests.peers import TASK_MODELS
from tests.training.common import labelled_rows, make_trainer, tiny_model

STEPS = 3
ROWS = 4  # in a step, over all processes
SHARDED = "BigBirdForMaskedLM"


def train_every_head(folder, processes=1, **settings):
    """Losses and weights of each head after a few steps, for `processes` that share the rows of a step."""
    results = {}
    for name in TASK_MODELS:
        trainer = make_trainer(
            tiny_model(name),
            labelled_rows(name, count=ROWS * STEPS),
            folder,
            per_device_train_batch_size=ROWS // processes,
            max_steps=STEPS,
            optim="sgd",
            learning_rate=0.1,
            logging_steps=1,
            **settings,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[name] = {
            "processes": trainer.args.world_size,
            "losses": [float(loss) for loss in losses],
            "weights": {key: value.detach().clone() for key, value in trainer.model.state_dict().items()},
        }
    return results


def data_parallel(folder):
    """Plain DDP. A parameter without a gradient would end it with an error."""
    return train_every_head(folder, processes=2, ddp_find_unused_parameters=False)


def fully_sharded(folder):
    """FSDP2, with the units that the model names. (accelerate does the same on GPUs, and leaves CPUs alone.)"""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (processes,))
    model = tiny_model(SHARDED)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    losses = torch.tensor(train_by_hand(model, part))
    torch.distributed.all_reduce(losses)
    return {
        "processes": processes,
        "losses": (losses / processes).tolist(),
        "units": [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)],
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "weights": {key: value.full_tensor() for key, value in model.state_dict().items()},
    }


def train_by_hand(model, part=slice(None)):
    """The losses of a few steps of gradient descent, on a part of the rows of each step."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    rows = labelled_rows(SHARDED, count=ROWS * STEPS)
    losses = []
    for step in range(STEPS):
        loss = model(**default_data_collator(rows[step * ROWS : (step + 1) * ROWS][part])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(folder):
    """Both in turn: what the first process has found."""
    torch.distributed.init_process_group("gloo")
    results = {"ddp": data_parallel(folder), "fsdp": fully_sharded(folder)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()
