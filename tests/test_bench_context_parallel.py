"""What processes send each other, counted."""

import pytest
import torch
from rich.console import Console

from bigbird_plus import bench_context_parallel
from bigbird_plus.bench import Settings
from tests.peers import make_model


@pytest.fixture
def alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("train", [False, True])
def test_a_process_alone_sends_nothing(train, alone):
    settings = Settings((203,), train=train, repeats=1)
    model = make_model()
    found = bench_context_parallel._measure_length(model.train(train), 203, settings, torch.device("cpu"))
    assert found["bytes_sent"] == 0
    assert found["seconds_per_layer"] > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_others_send_all_keys_and_values():
    inference = bench_context_parallel.computed_bytes(Settings((2**20,), dtype="bfloat16"), 2**20, 8)
    assert inference["bytes_of_ring"] == inference["bytes_of_all_gather"] == 7 * 2**17 * 2 * 768 * 2
    training = bench_context_parallel.computed_bytes(Settings((2**20,), dtype="bfloat16", train=True), 2**20, 8)
    assert training["bytes_of_ring"] == 3 * inference["bytes_of_ring"]
    assert training["bytes_of_all_gather"] == 2 * inference["bytes_of_ring"]


def test_the_table_shows_mebibytes():
    row = {"length": 65536, "bytes_sent": [2**21, 2**20, 2**20], "bytes_of_ring": 2**30, "bytes_of_all_gather": 2**31}
    row |= {"seconds_per_layer": 0.5, "peak_bytes": None}
    console = Console(width=120, record=True)
    console.print(bench_context_parallel.as_table({"processes": 3, "results": [row]}))
    text = console.export_text()
    for shown in ("65,536", "1.00 MiB to 2.00 MiB", "1,024.00 MiB", "2,048.00 MiB", "500.0", "?"):
        assert shown in text


def test_refuses_a_single_process():
    with pytest.raises(ValueError, match="--context-parallel must be at least 2"):
        bench_context_parallel.measure(Settings((1024,)), 1)
