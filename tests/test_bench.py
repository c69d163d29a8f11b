"""`bigbird-plus bench`: what it measures and reports. How fast anything is, is not tested."""

import json
import math
import os
import statistics
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from matplotlib.image import imread
from rich.console import Console

from bigbird_plus import bench
from bigbird_plus.int8 import Int8Linear, has_int8

MIB = 2**20
BUILT_IN, DENSE = "built-in BigBird", "dense sdpa"


def can_measure_memory() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_command(run_command, tmp_path, monkeypatch):
    """A small run: figures, picture and table, and they agree."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--lengths", "768", "--layers", "1", "--repeats", "3", "--plot", "out.png", "--json", "out.json"]
    shown = run_command("bench", *arguments)
    picture = imread("out.png")
    assert min(picture.shape[:2]) >= 400
    assert 0.01 < (picture[..., :3] < 0.9).any(-1).mean() < 0.5  # lines and text on white
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["settings"]["lengths"] == [768]
    assert report["settings"]["dtype"] == "float32"
    assert report["environment"]["transformers"] == transformers.__version__
    assert int(report["environment"]["CPU threads of torch"]) > 0
    assert report["environment"]["CPU"]

    rows = {row["contestant"]: row for row in report["results"]}
    assert list(rows) == ["bigbird_plus", BUILT_IN, DENSE]
    ours = rows["bigbird_plus"]
    for name, row in rows.items():
        assert name in shown
        assert row["fits"]
        assert len(row["seconds_of_repeats"]) == 3
        assert row["seconds_per_layer"] == statistics.median(row["seconds_of_repeats"]) > 0
        assert row["time_ratio"] == row["seconds_per_layer"] / ours["seconds_per_layer"]
        assert f"{row['seconds_per_layer'] * 1e3:,.1f}" in shown
        if can_measure_memory():
            assert row["peak_bytes"] > 768 * bench.INTERMEDIATE * 4  # the widest states alone
            assert row["memory_ratio"] == row["peak_bytes"] / ours["peak_bytes"]
        else:
            assert row["peak_bytes"] is None
    (products,) = report["matrix_products"]
    assert min(products["seconds"].values()) > 0
    assert products["ratio"] == ours["seconds_per_layer"] / min(products["seconds"].values())


def everybody():
    """All contestants, in inference and in training."""
    for train in (False, True):
        for name in sorted({*bench.CONTESTANTS, *bench.Settings((1,), train=train, models=True).contestants}):
            yield name, train


@pytest.mark.parametrize(("name", "train"), list(everybody()))
def test_contestants_run(name, train):
    """Each is of the same width, and has positions enough for a length that is no multiple of anybody's blocks."""
    settings = bench.Settings((767,), train=train, layers=1)
    model = bench.build(name, 767, settings)
    assert model.config.hidden_size == bench.HIDDEN
    assert model.training is train
    states = []
    model.register_forward_hook(lambda module, inputs, output: states.append(output.last_hidden_state))
    bench.step_of(model, 767, settings)()
    assert states[0].shape == (1, 767, bench.HIDDEN)
    assert states[0].isfinite().all()
    assert states[0].requires_grad is train
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not has_int8(), reason="this torch has no oneDNN operators for integers")
def test_int8_takes_part_where_it_runs(monkeypatch):
    """Among whole models in inference on a CPU, in float32; not without torch's operators."""
    assert bench.Settings((1,), models=True).contestants[:2] == ("bigbird_plus", "bigbird_plus, int8")
    model = bench.build(bench.OURS_INT8, 1, bench.Settings((1,), layers=1))
    assert sum(type(module) is Int8Linear for module in model.modules()) == 6
    others = [{"models": False}, {"train": True}, {"dtype": "bfloat16"}]
    for other in others:
        assert bench.OURS_INT8 not in bench.Settings((1,), **{"models": True, **other}).contestants
    monkeypatch.setattr(bench, "has_int8", lambda: False)
    assert bench.OURS_INT8 not in bench.Settings((1,), models=True).contestants


def test_graphs_take_part_where_there_is_cuda(monkeypatch):
    """Of those that ask a GPU nothing: ours and dense attention."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="graphs is for inference"):
        bench.Settings((1,), device="cuda", graphs=True, train=True)
    settings = bench.Settings((1,), device="cuda", graphs=True)
    assert settings.contestants == ("bigbird_plus", BUILT_IN, DENSE, "bigbird_plus, graph", "dense sdpa, graph")
    assert bench.Settings((1,), device="cuda", graphs=True, models=True).contestants[-1] == "bigbird_plus, graph"
    model = bench.build("dense sdpa, graph", 1, bench.Settings((1,), layers=1))
    assert model.config.attention_type == "original_full"


def test_a_graph_is_captured_once_behind_a_warm_up_on_its_stream():
    happened, stream = [], mock.Mock()

    @contextmanager
    def within(*names):
        happened.append(names)
        yield
        happened.append("end")

    graph = mock.Mock(replay=lambda: happened.append("replay"))
    with (
        mock.patch.object(torch.cuda, "CUDAGraph", lambda: graph),
        mock.patch.object(torch.cuda, "Stream", lambda: stream),
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(torch.cuda, "stream", within),
        mock.patch.object(torch.cuda, "graph", lambda graph, stream: within(graph, stream)),
    ):
        call = bench.captured(lambda: happened.append("step"))
        call()
        call()
    assert happened == [(stream,), "step", "end", (graph, stream), "step", "end", "replay", "replay"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("length", [768, 1024])
def test_built_in_big_bird_is_sparse(length, train):
    settings = bench.Settings((length,), train=train, layers=1)
    model = bench.build(BUILT_IN, length, settings)
    bench.step_of(model, length, settings)()
    assert type(model).__module__.startswith("transformers.")
    assert model.attention_type == "block_sparse"


def test_paired_seconds_takes_turns_and_leaves_the_first_out():
    calls, done = [], []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.paired_seconds(functions, 3, "cpu", lambda: done.append(1))
    assert calls == ["a", "b", "b", "a"] * 2
    assert len(done) == 8
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
    assert min(map(min, seconds.values())) >= 0


def test_ratio():
    assert bench.ratio(3.0, 2.0) == 1.5
    assert bench.ratio(None, 2.0) is None
    assert bench.ratio(3.0, None) is None
    assert bench.ratio(3.0, 0) is None


@pytest.mark.parametrize("train", [False, True])
def test_products_are_those_of_a_layer(train):
    products = []

    def product(a, b):
        products.append(2 * math.prod(a.shape) * b.shape[0])
        return torch.nn.functional.linear(a, b)

    settings = bench.Settings((10,), batch=2, train=train)
    bench.products_of_layer(product, 10, settings)()
    tokens, d = 20, bench.HIDDEN
    assert sum(products) == 2 * tokens * 12 * d * d * (3 if train else 1)
    assert len(products) == (18 if train else 6)


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_paths_compute_the_same(dtype):
    settings = bench.Settings((8,), dtype)
    a, b = torch.randn(2, 8, 32, **settings.factory)
    paths = bench.product_paths(settings)
    assert "products, torch" in paths
    for product in paths.values():
        torch.testing.assert_close(product(a, b).double(), a.double() @ b.double().t(), atol=0.1, rtol=0.02)


def test_peak_memory():
    """64 MiB are seen, also if they are freed before the end, and memory in use before is not."""
    before = torch.ones(32 * MIB)

    def call():
        torch.ones(16 * MIB)  # float32
        return before[0].item()

    peak = bench.peak_memory(call)
    if can_measure_memory():
        assert 60 * MIB <= peak < 90 * MIB
    else:
        assert peak is None


def test_peak_memory_counts_memory_used_anew():
    """What was taken and freed before counts again."""
    parts = [torch.ones(2**16) for _ in range(256)]  # 64 MiB, of pieces that the allocator keeps
    del parts
    peak = bench.peak_memory(lambda: [torch.ones(2**16) for _ in range(256)])
    assert peak >= 60 * MIB if can_measure_memory() else peak is None


def test_want_of_memory():
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**60, dtype=torch.uint8)
    assert bench._is_want_of_memory(info.value)
    assert bench._is_want_of_memory(bench.BrokenProcessPool())
    assert not bench._is_want_of_memory(RuntimeError("shapes do not match"))


def report(models=False) -> dict:
    """Of times and peaks that are made up: ours linear, the built-in BigBird's quadratic until it does not fit."""
    other = bench.MODERNBERT if models else DENSE
    settings = bench.Settings((1024, 2048), models=models, layers=2)
    peaks, seconds = {}, {}
    for length in settings.lengths:
        size = length // 1024
        peaks |= {(length, name): (True, size * MIB) for name in settings.contestants}
        seconds[length] = {name: [1.0 * size, 9.0, 0.5 * size] for name in settings.contestants}
        seconds[length]["products, torch"] = [0.5 * size]
        peaks[length, other] = (True, None)
    peaks[2048, BUILT_IN] = (False, None)
    del seconds[2048][BUILT_IN]
    seconds[1024][BUILT_IN] = [3.0] * 3
    seconds[2048][other] = [4.0] * 3
    paths = {"products, torch": None}
    return {
        "settings": bench.asdict(settings),
        "engine": bench._engine(settings),
        "environment": {"CPU": "a processor", "torch": "2.x", "transformers": "5.x"},
        "results": bench.summary(settings, peaks, seconds),
        "matrix_products": [bench._products_summary(length, seconds[length], paths) for length in settings.lengths],
    }


def test_summary():
    rows = {(row["length"], row["contestant"]): row for row in report()["results"]}
    ours = rows[2048, "bigbird_plus"]
    assert (ours["seconds_per_layer"], ours["time_ratio"], ours["time_growth"]) == (2.0, 1.0, 1.0)
    assert (ours["peak_bytes"], ours["memory_ratio"], ours["memory_growth"]) == (2 * MIB, 1.0, 1.0)
    assert ours["tokens_per_second"] == 2048 / (2.0 * 12)
    assert rows[1024, BUILT_IN]["time_ratio"] == 3.0
    missing = rows[2048, BUILT_IN]
    assert not missing["fits"]
    assert missing["seconds_per_layer"] is missing["time_ratio"] is missing["memory_growth"] is None
    dense = rows[2048, DENSE]
    assert (dense["time_ratio"], dense["time_growth"], dense["peak_bytes"]) == (2.0, 2.0, None)
    assert report()["matrix_products"][1]["ratio"] == 2.0


def test_table_and_notes_fit_a_terminal():
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(bench.as_table(report()))
    shown = console.export_text()
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "tokens ms/layer ratio growth peak MiB ratio growth" in lines
    assert "2,048 built-in BigBird * - - - - - -" in lines
    assert "2,048 dense sdpa 4,000.0 2.00 2.00 - - -" in lines
    assert "2,048 products, torch 1,000.0 0.50" in lines
    assert "…" not in shown
    notes = "\n".join(bench.notes(report()))
    assert "bigbird_plus at 2,048 tokens: 2.00 times products, torch." in notes
    assert "*: does not fit" in notes
    assert "reads sparsely by the engine merged. Not triton: the kernels are for" in notes
    assert "CUDA graph" not in notes
    with_graphs = {**report(), "settings": {**report()["settings"], "graphs": True}}
    assert any("captured as a CUDA graph" in line for line in bench.notes(with_graphs))


def test_models_table():
    """Of whole models: 12 layers, ModernBERT 22; in parentheses as a multiple of ours."""
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(bench.as_models_table(report(models=True)))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "tokens a second" in lines
    assert "model at 1,024 at 2,048" in lines
    assert "bigbird_plus 85 (1.00) 85 (1.00)" in lines
    assert "built-in BigBird 28 (0.33) - (-)" in lines
    assert "ModernBERT 47 (0.55) 23 (0.27)" in lines
    (note,) = (line for line in bench.notes(report(models=True)) if line.startswith("tokens a second"))
    assert note.endswith("ModernBERT 22, reckoned from 2, of which ModernBERT reads 1 in full.")


def test_plot_draws_speed_and_memory_and_leaves_out_what_is_missing(tmp_path, monkeypatch):
    figures, make = [], bench.import_figure()
    monkeypatch.setattr(bench, "import_figure", lambda: lambda **how: figures.append(make(**how)) or figures[0])
    bench.plot(report(models=True), tmp_path / "out.svg")
    speed, memory = figures[0].axes
    lines = {line.get_label(): line for line in speed.get_lines()}
    contestants = bench.Settings((1024,), models=True).contestants
    assert list(lines) == list(contestants)
    assert [round(value) for value in lines["bigbird_plus"].get_ydata()] == [85, 85]
    assert list(lines[BUILT_IN].get_xdata()) == [1024]
    peaks = {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}
    expected = {name: [1.0, 2.0] for name in contestants} | {BUILT_IN: [1.0], bench.MODERNBERT: []}
    assert peaks == expected
    assert "a processor" in figures[0].get_supxlabel()
    assert "<svg" in (tmp_path / "out.svg").read_text()
