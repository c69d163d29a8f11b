"""A program whose processes share documents, and each of which has them alone besides."""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bigbird_plus
from tests.peers import TASK_MODELS, make_model, own_random_blocks, random_ids, random_inputs

# In version 4.56 of transformers, split layers with a bias fail where gradients are wanted.
TRAINS_TENSOR_PARALLELISM = find_spec("transformers.distributed.tensor_parallel") is not None
LENGTH = 203  # 26 blocks, the last one not full
STEPS = 3


def compare(model, inputs, group, autocast=False):
    """The largest differences between what processes find together and the first one alone; None on others."""
    lower = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with lower, bigbird_plus.context_parallel(group) as processes:
        shared = answer(model, inputs, processes)
    objective(shared).backward()
    average_gradients(model, processes)
    found = gradients(model)
    is_same = is_same_everywhere(objective(shared), group)
    if dist.get_rank():
        return None
    model.zero_grad(set_to_none=True)
    with lower:
        alone = answer(model, inputs)
    objective(alone).backward()
    expected = gradients(model)
    return {
        "outputs": max(difference(shared[key], alone[key]) for key in alone),
        "gradients": relative_difference(found, expected),
        "is_same_everywhere": is_same,
    }


def answer(model, inputs, processes=None):
    """What a model returns, of whole documents, by name."""
    outputs = model(**inputs)
    found = {key: tensor for key, tensor in outputs.items() if isinstance(tensor, torch.Tensor)}
    length = inputs["input_ids"].shape[-1]
    if model.config.sparse_prediction:  # logits are of words here and there
        return {"loss": outputs.loss}
    if processes is not None:
        is_part = {key: tensor.dim() == 3 and key != "hidden_states" for key, tensor in found.items()}
        found = {key: processes.gather(tensor) if is_part[key] else tensor for key, tensor in found.items()}
    assert all(tensor.dim() < 3 or tensor.shape[1] == length for tensor in found.values())
    return found


def objective(outputs):
    """The loss, or something that depends on all states."""
    return outputs["loss"] if "loss" in outputs else sum(tensor.square().mean() for tensor in outputs.values())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def average_gradients(model, processes):
    for grad in gradients(model).values():
        dist.all_reduce(grad, group=processes.group)
        grad /= processes.size


def difference(one, other):
    assert one.shape == other.shape
    return float((one - other).detach().abs().max())


def relative_difference(found, expected):
    scale = max(float(grad.abs().max()) for grad in expected.values())
    return max(difference(found[name], grad) for name, grad in expected.items()) / scale


def is_same_everywhere(tensor, group):
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor.detach(), group=group)
    return all(torch.equal(other, found[0]) for other in found)


def train(model, inputs, group=None):
    """Losses and weights of a few steps of gradient descent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        with bigbird_plus.context_parallel(group) if group is not None else nullcontext() as processes:
            loss = model(**inputs).loss
        loss.backward()
        if processes is not None:
            average_gradients(model, processes)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def compare_training(group, **settings):
    """The same of three optimizer steps."""
    name = "BigBirdForMaskedLM"
    inputs = labelled(name, mask=right_padding)
    found_losses, found_weights = train(make(name, training=True, **settings), inputs, group)
    if dist.get_rank():
        return None
    losses, weights = train(make(name, training=True, **settings), inputs)
    return {
        "losses": max(abs(one - other) for one, other in zip(losses, found_losses, strict=True)),
        "weights": max(difference(found_weights[key], weight) for key, weight in weights.items()),
    }


def compare_with_data_parallelism(wrap):
    """The same of gradients where two pairs of processes have a document each, in a model that `wrap` has prepared."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    name = "BigBirdForMaskedLM"
    inputs = labelled(name)
    rows = [{key: tensor[row : row + 1] for key, tensor in inputs.items()} for row in range(2)]
    model = make(name, training=True)
    wrapped = wrap(model)
    with bigbird_plus.context_parallel(mesh["cp"]):
        loss = wrapped(**rows[mesh.get_local_rank("dp")]).loss
    loss.backward()
    found = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in gradients(model).items()}
    alone = make(name, training=True)
    (sum(alone(**row).loss for row in rows) / 2).backward()
    return {"gradients": relative_difference(found, gradients(alone))}


def fully_sharded(model):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compare_tensor_parallelism(name, folder, **settings):
    """The same of a model that transformers has loaded in shares."""
    made = make(name, **settings)
    path = Path(folder, name)
    if dist.get_rank() == 0:
        made.save_pretrained(path)
    dist.barrier()
    model = type(made).from_pretrained(path, tp_plan="auto", dtype=torch.float64)
    inputs = labelled(name, mask=right_padding)
    inference = {
        "heads": [layer.attention.self.heads for layer in model.bert.encoder.layer],
        "in_inference": difference(*(without_gradients(one, inputs) for one in (model, made))),
    }
    if not TRAINS_TENSOR_PARALLELISM:
        return inference
    shared, alone = (one.train("training" in settings)(**inputs) for one in (model, made))
    shared.loss.backward()
    alone.loss.backward()
    found = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in gradients(model).items()}
    return inference | {
        "outputs": max(difference(shared[key], alone[key]) for key in ("loss", "logits")),
        "gradients": relative_difference(found, gradients(made)),
    }


@torch.no_grad()
def without_gradients(model, inputs):
    return model.eval()(**inputs).logits


def right_padding(batch, length):
    return (torch.arange(length) < length - 30 * torch.arange(batch)[:, None]).long()


def left_padding(batch, length):
    return right_padding(batch, length).flip(-1)


def chosen_tokens(batch, length):
    """Some here and there, more in the first document."""
    chosen = torch.zeros(batch, length, dtype=torch.long)
    chosen[0, [1, 30, 31, 100, 150, length - 1]] = 1
    chosen[-1, 50] = 1
    return chosen


def make(name="BigBirdModel", *, training=False, dtype=torch.float64, checkpointing=False, **settings):
    model = make_model(name, **settings).to(dtype).train(training)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def plain(length=LENGTH, batch=2, documents=None, **masks):
    """Inputs of `BigBirdModel`."""
    if documents is not None:
        batch, length = len(documents), sum(documents[0])
        masks["position_ids"] = lambda *shape: torch.stack([positions_of(row) for row in documents])
    made = {("attention_mask" if key == "mask" else key): mask(batch, length) for key, mask in masks.items()}
    return {"input_ids": random_ids(batch, length), **made}


def positions_of(lengths):
    """Those of a row of documents."""
    return torch.cat([torch.arange(length) for length in lengths])


def labelled_documents(name):
    """A row of documents, labelled for a model."""
    inputs = random_inputs(name, 1, sum(ROW), padded=False) | {"position_ids": positions_of(ROW)[None]}
    of_documents = "labels" if name == "BigBirdForSequenceClassification" else "next_sentence_label"
    return {key: torch.arange(len(ROW)) % 2 if key == of_documents else value for key, value in inputs.items()}


def labelled(name, mask=None):
    inputs = random_inputs(name, 2, LENGTH, padded=False)
    if mask is not None:
        inputs["attention_mask"] = mask(2, LENGTH)
    return inputs


# Settings of a model and of its inputs.
ENCODERS = {
    "eval": ({}, {}),
    "training": ({"training": True}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "eager": ({"attn_implementation": "eager"}, {}),
    "gathered": ({"attn_implementation": "gather", "training": True}, {}),
    "checkpointing": ({"checkpointing": True, "training": True}, {}),
    "right padding": ({"training": True}, {"mask": right_padding}),
    "left padding": ({}, {"mask": left_padding}),
    "short": ({}, {"length": 61}),
    "very short": ({}, {"length": 3}),
    "full": ({"attention_type": "original_full"}, {"mask": right_padding}),
    "chosen tokens": ({"training": True}, {"global_attention_mask": chosen_tokens}),
    "chosen tokens, padded": ({}, {"global_attention_mask": chosen_tokens, "mask": right_padding}),
    "extra tokens": ({"num_extra_global_tokens": 3, "training": True}, {}),
    "extra tokens, short": ({"num_extra_global_tokens": 3}, {"length": 61}),
    "extra and chosen tokens": ({"num_extra_global_tokens": 9}, {"global_attention_mask": chosen_tokens}),
    "one layout": ({"different_layout_per_head": False, "training": True}, {}),
    "wide window": ({"num_sliding_window_blocks": 7, "num_random_blocks": 1}, {}),
    "four global blocks": ({"num_global_blocks": 4, "num_random_blocks": 1}, {}),
    "no global blocks": ({"num_global_blocks": 0, "num_random_blocks": 1}, {}),
    "global indices": ({"global_block_indices": [0, 5, -3], "num_random_blocks": 1}, {}),
    "own random blocks": ({"num_random_blocks": 2, "random_blocks": own_random_blocks(4, 20, 2)}, {}),
    "token dropout": ({"token_dropout": True, "mask_token_id": 4}, {"mask": right_padding}),
}
DECODERS = {
    "decoder": ({"is_decoder": True}, {}),
    "decoder, padded": ({"is_decoder": True, "training": True}, {"mask": right_padding}),
    "decoder, padded left": ({"is_decoder": True, "training": True}, {"mask": left_padding}),
    "decoder, short": ({"is_decoder": True}, {"length": 61}),
    "decoder without random blocks": ({"is_decoder": True, "num_random_blocks": 0}, {}),
}
# Two processes share the third document, four the first one, too. Documents of up to 88 tokens are left whole.
ROW = [130, 7, 96, 41, 1]
DOCUMENTS = {
    "documents in training": ({"training": True, "checkpointing": True}, {"documents": [ROW]}),
    "documents in two rows": ({"position_embedding_type": "rotary"}, {"documents": [[100, 175], ROW]}),
    "documents, extra and chosen tokens": (
        {"num_extra_global_tokens": 3},
        {"documents": [ROW], "global_attention_mask": chosen_tokens},
    ),
    "documents, full": ({"attention_type": "original_full"}, {"documents": [ROW]}),
    "documents of a decoder": ({"is_decoder": True, "training": True}, {"documents": [ROW]}),
    "documents of a full decoder": ({"is_decoder": True, "attention_type": "original_full"}, {"documents": [ROW]}),
    "fewer documents than processes": ({"num_extra_global_tokens": 3}, {"documents": [[5, 3]]}),
    "patterns per document": ({"pattern_per_document": True, "training": True}, {"mask": right_padding}),
    "patterns per document, padded left": ({"pattern_per_document": True}, {"mask": left_padding}),
}
MODELS = {**ENCODERS, **DECODERS, **DOCUMENTS}
SHARED_BY_FOUR = (
    "training",
    "right padding",
    "very short",
    "extra and chosen tokens",
    "decoder, padded",
    "decoder, padded left",
    "documents in training",
    "documents, extra and chosen tokens",
    "fewer documents than processes",
    "patterns per document",
)

DOCUMENT_MODELS = ("BigBirdForPreTraining", "BigBirdForCausalLM", "BigBirdForSequenceClassification")


def findings(group, folder):
    """All that is found, by name. Four processes, which take longer, look at less."""
    is_many = dist.get_world_size(group) > 2
    for name, (settings, inputs) in MODELS.items():
        if not is_many or name in SHARED_BY_FOUR:
            yield name, compare(make(**settings), plain(**inputs), group)
    if is_many:
        yield "DDP", compare_with_data_parallelism(DistributedDataParallel)
        yield "FSDP2", compare_with_data_parallelism(fully_sharded)
        return
    for name in TASK_MODELS:
        how = {"is_decoder": name == "BigBirdForCausalLM", "training": True}
        inputs = labelled(name, None if name == "BigBirdForMultipleChoice" else right_padding)
        yield name, compare(make(name, **how), inputs, group)
    for name in DOCUMENT_MODELS:
        how = {"is_decoder": name == "BigBirdForCausalLM", "training": True}
        yield f"{name}, documents", compare(make(name, **how), labelled_documents(name), group)
    sparse = make("BigBirdForMaskedLM", sparse_prediction=True)
    yield "sparse prediction", compare(sparse, labelled("BigBirdForMaskedLM"), group)
    yield "autocast", compare(make(training=True, dtype=torch.float32), plain(), group, autocast=True)
    yield "steps", compare_training(group)
    yield "tensor parallelism", compare_tensor_parallelism("BigBirdForMaskedLM", folder, training=True)
    yield "tensor parallelism of a decoder", compare_tensor_parallelism("BigBirdForCausalLM", folder, is_decoder=True)
    yield "steps in float32", compare_training(group, dtype=torch.float32)


def survives(group):
    """Whether this process learns of another's end by an error."""
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    try:
        with bigbird_plus.context_parallel(group):
            make()(**plain())
    except RuntimeError:
        return True
    return False


def run(rank, size, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # transformers looks for them
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found = dict(findings(dist.group.WORLD, folder))
    dist.barrier()
    found["error where another ended"] = survives(dist.group.WORLD)
    if rank == 0:
        torch.save(found, Path(folder, f"{size}.pt"))


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for size in (2, 4):
        multiprocessing.start_processes(run, (size, sys.argv[1]), nprocs=size, start_method="fork")
        Path(sys.argv[1], "store").unlink()
