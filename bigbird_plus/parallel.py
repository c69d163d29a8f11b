"""Documents that several processes share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .attention.processes import Processes, active_processes, sharing


@contextmanager
def context_parallel(mesh_or_group) -> Iterator[Processes]:
    """Within it, processes share each document: exactly, each computing a run of its blocks.

    Every process passes the same whole inputs to the model. Inputs may be of any length; shards differ by a block at
    most. Of hidden states and of logits of tokens each process gets those of its own tokens,
    `processes.gather(tensor)` are those of all. All else is that of whole documents on every process: `pooler_output`,
    the loss, the logits of documents, and the two of question answering.

    Rows of several documents are shared, too, and batches with `config.pattern_per_document`: long documents are cut
    where shares end, short ones, which are read in full, are not.

    Gradients are right once they are averaged over the processes, as DDP and FSDP do: the mean over processes of
    `parameter.grad` is the gradient of one process that has the documents alone. `backward` may be called outside, but
    by all processes.

    Dropout draws on each process for its own tokens. Give each a seed of its own.

    Args:
        mesh_or_group: a `DeviceMesh` of one dimension, or a process group of `torch.distributed`, of any backend with
            `all_to_all_single` (gloo, NCCL).

    Returns:
        The `Processes`: `gather`, `rank`, `size`, `bytes_sent`.

    Raises:
        ValueError: for a mesh of more dimensions. Within it, models raise one for what cannot be shared: caches,
            cross-attention, probabilities, compiled graphs, and dropout of the probabilities where inputs are short
            enough to be read in full.
    """
    group = mesh_or_group
    if isinstance(mesh_or_group, DeviceMesh):
        if mesh_or_group.ndim != 1:
            raise ValueError(
                f"mesh_or_group must be a mesh of one dimension, but has {mesh_or_group.ndim}. Give one of them: "
                "mesh['cp']."
            )
        group = mesh_or_group.get_group()
    with sharing(Processes(group)) as processes:
        yield processes


def whole(tensor: Tensor) -> Tensor:
    """Of tokens `[batch, length, ...]`, which processes may share, those of whole documents."""
    processes = active_processes()
    return tensor if processes is None else processes.gather(tensor)


def own_labels(labels: Tensor | None, states: Tensor) -> Tensor | None:
    """Of `[batch, length]` those of the tokens whose states these are: of all, unless processes share them."""
    processes = active_processes()
    return labels if processes is None or labels is None else processes.take_own(labels, states.shape[1])


def mean_of_all(total: Tensor, count: Tensor) -> Tensor:
    """The mean over what processes share, of which this one has `count` numbers that make `total`."""
    pair = torch.stack((total, count.to(total.dtype)))
    processes = active_processes()
    total, count = pair if processes is None else processes.total(pair)
    return total / count
