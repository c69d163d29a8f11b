"""Programs of which each process runs a copy. They write what they saw to files for the tests to read."""

import pytest
import torch
from transformers import default_data_collator

from bigbird_plus.trainer import ContextParallelTrainer
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


def shared_documents(folder):
    """Documents that both processes share. (accelerate takes `cp_size` on GPUs alone, and is told not to ask.)"""
    from accelerate import ParallelismConfig

    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    settings = {"parallelism_config": ParallelismConfig(cp_size=2), "ddp_find_unused_parameters": False}
    settings["trainer_class"] = ContextParallelTrainer
    refused = [
        refusal(folder, **settings, **more) for more in ({"compute_metrics": len}, {"label_smoothing_factor": 0.1})
    ]
    return train_shared(folder, **settings) | {"refused": refused}


def refusal(folder, **settings):
    """What the error says that such a trainer raises."""
    with pytest.raises(ValueError) as error:
        make_trainer(tiny_model(SHARDED), [], folder, **settings)
    return str(error.value)


def train_shared(folder, **settings):
    """Losses in training and in evaluation, and weights, of documents that are long enough to be shared."""
    rows = labelled_rows(SHARDED, count=ROWS * STEPS)
    settings |= {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "eval_dataset": rows[:ROWS]}
    trainer = make_trainer(tiny_model(SHARDED), rows, folder, gradient_accumulation_steps=2, **settings)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": {key: value.detach().clone() for key, value in trainer.model.state_dict().items()},
    }


def run(folder):
    """All in turn: what the first process has found."""
    torch.distributed.init_process_group("gloo")
    results = {"ddp": data_parallel(folder), "fsdp": fully_sharded(folder), "shared": shared_documents(folder)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()
