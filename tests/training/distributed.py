"""Programs of which each process runs a copy. They write what they saw to files for the tests to read."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, default_data_collator

from bigbird_plus.trainer import ContextParallelTrainer
from tests.peers import TASK_MODELS
from tests.training.common import labelled_rows, make_trainer, tiny_model

STEPS = 3
ROWS = 4  # in a step, over all processes
WORD_MODELS = ("BigBirdForPreTraining", "BigBirdForMaskedLM", "BigBirdForCausalLM")
SHARED = "BigBirdForMaskedLM"


def train_every_head(folder, processes=1, names=TASK_MODELS, **settings):
    """Losses and weights of each head after a few steps, for `processes` that share the rows of a step.

    The model is saved in a folder of its name.
    """
    results = {}
    for name in names:
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
        trainer.save_model(f"{folder}/{name}")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = trainer.accelerator.get_state_dict(trainer.model)
        results[name] = {
            "processes": trainer.args.world_size,
            "losses": [float(loss) for loss in losses],
            "weights": {key: value.detach().clone() for key, value in weights.items()},
            "units": [type(unit.module).__name__ for unit in FullyShardedDataParallel.fsdp_modules(trainer.model)],
        }
    return results


def data_parallel(folder):
    """Plain DDP. A parameter without a gradient would end it with an error."""
    return train_every_head(folder, processes=2, ddp_find_unused_parameters=False)


class ShardingTrainer(Trainer):
    """accelerate leaves CPUs alone. This tells it what it finds out on GPUs: that it is to shard with FSDP 1."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1, auto_wrap_policy="transformer_based_wrap", use_orig_params=True
        )
        for state in (PartialState(), self.accelerator.state):
            state.distributed_type = DistributedType.FSDP
            state.device = torch.device("cpu")  # and not "cpu:0", which FSDP takes for another one


def sharded_by_accelerate(folder):
    """FSDP 1 for the models that FSDP 2 by accelerate fails on. Later trainers in this process are sharded, too."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    FlatParamHandle.to_cpu = nullcontext  # frees what it has moved, which on a CPU is what it shall return
    return train_every_head(folder, processes=2, names=WORD_MODELS, trainer_class=ShardingTrainer)


def fully_sharded(folder):
    """FSDP 2 in a loop of one's own."""
    return {name: shard_by_hand(name) for name in WORD_MODELS}


def shard_by_hand(name):
    """What is found with the units that the model names."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (processes,))
    model = tiny_model(name)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = slice(rank * ROWS // processes, (rank + 1) * ROWS // processes)
    losses = torch.tensor(train_by_hand(model, name, part))
    torch.distributed.all_reduce(losses)
    return {
        "losses": (losses / processes).tolist(),
        "units": [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)],
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "weights": {key: value.full_tensor() for key, value in model.state_dict().items()},
    }


def train_by_hand(model, name, part=slice(None)):
    """The losses of a few steps of gradient descent, on a part of the rows of each step."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    rows = labelled_rows(name, count=ROWS * STEPS)
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
        make_trainer(tiny_model(SHARED), [], folder, **settings)
    return str(error.value)


def train_shared(folder, **settings):
    """Losses in training and in evaluation, and weights, of documents that are long enough to be shared."""
    rows = labelled_rows(SHARED, count=ROWS * STEPS)
    settings |= {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "eval_dataset": rows[:ROWS]}
    trainer = make_trainer(tiny_model(SHARED), rows, folder, gradient_accumulation_steps=2, **settings)
    trainer.train()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": {key: value.detach().clone() for key, value in trainer.model.state_dict().items()},
    }


def run(folder):
    """All in turn: what the first process has found."""
    torch.distributed.init_process_group("gloo")
    programs = (data_parallel, fully_sharded, shared_documents, sharded_by_accelerate)
    results = {program.__name__: program(f"{folder}/{program.__name__}") for program in programs}
    if torch.distributed.get_rank() == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()
