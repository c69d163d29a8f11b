"""What processes send each other as they share a document: `bigbird-plus bench --context-parallel N`.

Bytes are counted as they are sent. Beside them stand those of ring attention and of gathering all keys and values,
which follow from the sizes: keys and values of all other processes go through each of them.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch import multiprocessing

from .bench import HEADS, HIDDEN, INTERMEDIATE, NO_DROPOUT, Settings, peak_memory
from .configuration_big_bird import BigBirdConfig
from .environment import describe_environment
from .modeling_big_bird import BigBirdModel
from .parallel import context_parallel


def measure(settings: Settings, size: int) -> dict:
    """Shares documents over `size` processes of this machine, by gloo, or on GPUs by NCCL.

    Returns:
        What `--json` writes. `results`, a dictionary for each length: `bytes_sent` (of a layer, by each process: those
        with global blocks send more), `bytes_of_ring` and `bytes_of_all_gather` (computed), `seconds_per_layer` (the
        median) and `peak_bytes` (the most of any process, beyond its model; None where it is not told).

    Raises:
        ValueError: if there are too few processes, or GPUs.
    """
    if size < 2:
        raise ValueError(f"--context-parallel must be at least 2, but is {size}.")
    if settings.device == "cuda" and torch.cuda.device_count() < size:
        raise ValueError(f"--context-parallel {size} needs as many GPUs, but there are {torch.cuda.device_count()}.")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_measure_here, (settings, size, folder), nprocs=size, start_method="spawn")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    results = []
    for length, of_ranks in zip(settings.lengths, zip(*found, strict=True), strict=True):
        peaks = [one["peak_bytes"] for one in of_ranks]
        results.append(
            {
                "length": length,
                "bytes_sent": [one["bytes_sent"] for one in of_ranks],
                **computed_bytes(settings, length, size),
                "seconds_per_layer": max(one["seconds_per_layer"] for one in of_ranks),
                "peak_bytes": None if None in peaks else max(peaks),
            }
        )
    return {"environment": describe_environment(), "processes": size, "results": results}


def computed_bytes(settings: Settings, length: int, size: int) -> dict[str, int]:
    """What a process sends in a layer if it hands on all keys and values, and in training their gradients: in a ring
    with the keys and values once more, or without if they were kept."""
    tokens = -(-length // size) * settings.batch
    once = 2 * tokens * HIDDEN * settings.factory["dtype"].itemsize * (size - 1)
    ring, kept = (3, 2) if settings.train else (1, 1)
    return {"bytes_of_ring": ring * once, "bytes_of_all_gather": kept * once}


def as_table(report: dict) -> Table:
    """The results, to be printed."""
    table = Table(title=f"One document over {report['processes']} processes", box=box.SIMPLE_HEAD)
    columns = ("tokens", "sent a layer", "by a ring", "by all-gather", "ms a layer", "peak memory")
    for column in columns:
        table.add_column(column, justify="right")
    for row in report["results"]:
        peak = "?" if row["peak_bytes"] is None else _in_mebibytes(row["peak_bytes"])
        sent = " to ".join(_in_mebibytes(count) for count in sorted({min(row["bytes_sent"]), max(row["bytes_sent"])}))
        others = [_in_mebibytes(row[key]) for key in ("bytes_of_ring", "bytes_of_all_gather")]
        table.add_row(f"{row['length']:,}", sent, *others, f"{row['seconds_per_layer'] * 1e3:.1f}", peak)
    return table


def _in_mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"


def _measure_here(rank: int, settings: Settings, size: int, folder: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    device = torch.device(f"cuda:{rank}" if settings.device == "cuda" else settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(Path(folder, "store")), size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    config = BigBirdConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=settings.layers,
        tiled_positions=True,
        **NO_DROPOUT,
    )
    model = BigBirdModel(config, add_pooling_layer=False).train(settings.train)
    model.to(device=device, dtype=settings.factory["dtype"])
    found = [_measure_length(model, length, settings, device) for length in settings.lengths]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _measure_length(model: BigBirdModel, length: int, settings: Settings, device: torch.device) -> dict:
    ids = torch.full((settings.batch, length), 100, device=device)

    def step() -> int:
        with torch.set_grad_enabled(settings.train), context_parallel(dist.group.WORLD) as processes:
            states = model(ids).last_hidden_state
        if settings.train:
            states.float().square().sum().backward()
            model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return processes.bytes_sent

    peak, times = peak_memory(step, device.type), []
    for _ in range(settings.repeats):
        dist.barrier()
        start = time.perf_counter()
        sent = step()
        times.append((time.perf_counter() - start) / settings.layers)
    return {
        "bytes_sent": sent // settings.layers,
        "seconds_per_layer": statistics.median(times),
        "peak_bytes": peak,
    }
