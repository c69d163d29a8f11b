"""The processes that share a document, and how they talk.

There is one collective operation, each process sending each other some rows of a tensor, and its gradient is the same
backwards. Whatever else is needed is made of it, so that all of it has gradients, and so that `torch.distributed` can
run it with any backend (gloo and NCCL among them).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """Those that share each document.

    Attributes:
        group: of `torch.distributed`.
        rank: the place of this process in it.
        size: how many there are.
        bytes_sent: how many bytes this process has sent to others so far, gradients included.
    """

    def __init__(self, group):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = 0

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends each process, in order, so many of the `rows`, and returns the rows that come, in the order of the
        processes. To be called by all of them at the same time, and with so many received as are sent."""
        return _Exchange.apply(rows, sent, received, self)

    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The tensors of all processes one behind the other in a dimension, in which they need not be of one size: of
        hidden states, `[batch, tokens, hidden_size]`, those of the whole documents."""
        sizes = self._sizes(tensor.shape[dim], tensor.device)
        return self._of_all(tensor.movedim(dim, 0), sizes).movedim(0, dim)

    def take_own(self, tensor: Tensor, count: int) -> Tensor:
        """The part of this process, which is of so many tokens, of the whole `[batch, length]`.

        Raises:
            ValueError: if there are not as many tokens as all processes have.
        """
        sizes = self._sizes(count, tensor.device)
        if tensor.dim() != 2 or tensor.shape[1] != sum(sizes):
            raise ValueError(f"labels must have the shape [batch, {sum(sizes)}], but have {list(tensor.shape)}.")
        first = sum(sizes[: self.rank])
        return tensor[:, first : first + count]

    def _sizes(self, own: int, device: torch.device) -> list[int]:
        return self._of_all(torch.tensor([own], device=device), [1] * self.size).tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, which have one shape."""
        return self._of_all(tensor[None], [1] * self.size).sum(0)

    def _of_all(self, rows: Tensor, sizes: list[int]) -> Tensor:
        copies = rows.expand(self.size, *rows.shape).flatten(0, 1)
        return self.exchange(copies, [len(rows)] * self.size, sizes)

    def share_first(self, rows: Tensor) -> Tensor:
        """The first of the rows of the first process, `[1, ...]`, for all."""
        is_first = self.rank == 0
        rows = rows[:1].expand(self.size, *rows.shape[1:]) if is_first else rows[:0]
        return self.exchange(rows, [int(is_first)] * self.size, [1] + [0] * (self.size - 1))


_active: Processes | None = None


def active_processes() -> Processes | None:
    """Those within whose `sharing` this is; None outside."""
    return _active


@contextmanager
def sharing(processes: Processes) -> Iterator[Processes]:
    """Within it, models take each document for one that the processes share."""
    global _active
    outer, _active = _active, processes
    try:
        yield processes
    finally:
        _active = outer


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sent, received, processes):
        ctx.arguments = received, sent, processes
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=processes.group)
        others = sum(sent) - sent[processes.rank]
        processes.bytes_sent += others * rows[:1].numel() * rows.element_size()
        return result

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.arguments), None, None, None
