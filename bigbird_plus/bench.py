"""Time and peak memory of BigBird and others, side by side: what `bigbird-plus bench` shows.

Times are paired: in one process the contestants take turns, there and back, the first turn warms up, and the median of
the others counts. Peak memory is that of a process of its own for each contestant and length, above what the model
itself takes.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .attention.engines import Call, choose_engine
from .configuration_big_bird import BigBirdConfig
from .cpu import has_onednn, onednn_product
from .environment import describe_environment
from .int8 import has_int8
from .modeling_big_bird import BigBirdModel
from .quantization import quantize

HIDDEN, INTERMEDIATE, HEADS = 768, 3072, 12  # the base size
WARM_UP = 768  # tokens: few, but more than transformers' BigBird takes for too few, after which it stays dense
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DTYPES = ("float32", "bfloat16", "float16")
OURS, OURS_INT8, MODERNBERT = "bigbird_plus", "bigbird_plus, int8", "ModernBERT"


def _dense(**sizes):
    config = BigBirdConfig(**sizes, **NO_DROPOUT, attention_type="original_full", attn_implementation="sdpa")
    return BigBirdModel(config, add_pooling_layer=False)


def _built_in(**sizes):
    config = transformers.BigBirdConfig(**sizes, **NO_DROPOUT, attention_type="block_sparse")
    return transformers.BigBirdModel(config, add_pooling_layer=False)


def _longformer(**sizes):
    return transformers.LongformerModel(
        transformers.LongformerConfig(**sizes, **NO_DROPOUT, attention_window=512), add_pooling_layer=False
    )


def _modernbert(**sizes):
    sizes = {**sizes, "intermediate_size": 1152}  # of its base size; its feed-forward part has three matrices
    return transformers.ModernBertModel(transformers.ModernBertConfig(**sizes, attn_implementation="sdpa"))


def _ours(**sizes):
    return BigBirdModel(BigBirdConfig(**sizes, **NO_DROPOUT), add_pooling_layer=False)


BUILT_IN = {"built-in BigBird": _built_in}
CONTESTANTS = {OURS: _ours, **BUILT_IN, "dense sdpa": _dense}
MODELS = {
    OURS: _ours,
    OURS_INT8: lambda **sizes: quantize(_ours(**sizes)),
    **BUILT_IN,
    "Longformer": _longformer,
    MODERNBERT: _modernbert,
}
GRAPHS = {f"{name}, graph": name for name in (OURS, "dense sdpa")}
"""Those that take part a second time, captured, where that is asked for."""

LAYERS = {MODERNBERT: 22}
"""Of the published model of the base size, where they are not 12."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        lengths: tokens of a document.
        dtype: of weights and states, one of `DTYPES`.
        train: whether a step is forward and backward, and not forward alone.
        device: `"cpu"` or `"cuda"`.
        layers: layers of each model; times are divided by them.
        batch: documents.
        repeats: turns that count.
        models: whether other models for long documents take part, in place of dense attention.
        graphs: whether inference captured as CUDA graphs takes part, too.

    Raises:
        ValueError: if one of them cannot be.
    """

    lengths: tuple[int, ...]
    dtype: str = "float32"
    train: bool = False
    device: str = "cpu"
    layers: int = 2
    batch: int = 1
    repeats: int = 5
    models: bool = False
    graphs: bool = False

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths must be different positive numbers, but are {self.lengths}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but is {self.dtype!r}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', but is {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is 'cuda', but torch finds no CUDA device here: take device 'cpu'.")
        if self.graphs and self.device != "cuda":
            raise ValueError(f"graphs needs a CUDA device, but device is {self.device!r}: take 'cuda', or no graphs.")
        if self.graphs and self.train:
            raise ValueError("graphs is for inference, but train is True: leave one of them out.")
        for name in ("layers", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}.")

    @property
    def contestants(self) -> tuple[str, ...]:
        """Names of those that take part."""
        names = MODELS if self.models else CONTESTANTS
        graphs = [name for name, captured in GRAPHS.items() if self.graphs and captured in names]
        return (*(name for name in names if name != OURS_INT8 or self._runs_int8), *graphs)

    @property
    def _runs_int8(self) -> bool:
        is_inference_on_cpu = self.device == "cpu" and not self.train
        return is_inference_on_cpu and self.dtype == "float32" and has_int8()

    @property
    def factory(self) -> dict:
        """Dtype and device, for tensors and modules."""
        return {"dtype": getattr(torch, self.dtype), "device": self.device}


def benchmark(settings: Settings) -> dict:
    """Measures everything, with a progress bar on standard error.

    Returns:
        What `--json` writes. `results`, a dictionary for each length and contestant: `seconds_per_layer` (the median),
        `seconds_of_repeats` (of a layer, too), `peak_bytes`, and of both the ratio to bigbird_plus at this length
        (`time_ratio`, `memory_ratio`) and the growth from the first length, as a multiple of linear growth
        (`time_growth`, `memory_growth`); `tokens_per_second` of a whole model of the base size, reckoned from a
        layer. `engine`: what reads sparsely, and why others were passed over. `matrix_products`, for each length:
        `seconds` of a layer's matrix products by torch's default path and by oneDNN's, and `ratio`, our time of a
        layer to the faster of them. None stands for what could not be measured; `fits` is false where that is for
        want of memory.
    """
    steps = len(settings.contestants) * len(settings.lengths)
    paths = product_paths(settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("memory", total=steps)
        peaks = {}
        for length in settings.lengths:
            for name in settings.contestants:
                progress.update(task, description=f"memory, {length:,} tokens: {name}")
                peaks[length, name] = peak_in_child(name, length, settings)
                progress.advance(task)
        fitting = [key for key, (fits, _) in peaks.items() if fits]
        turns = (len(fitting) + len(paths) * len(settings.lengths)) * (settings.repeats + 1)
        progress.update(task, total=steps + turns)
        seconds = {}
        for length in settings.lengths:
            progress.update(task, description=f"time, {length:,} tokens")
            names = [name for name in settings.contestants if (length, name) in fitting]
            seconds[length] = _seconds_per_layer(names, paths, length, settings, lambda: progress.advance(task))
    return {
        "settings": asdict(settings),
        "engine": _engine(settings),
        "environment": describe_environment(),
        "results": summary(settings, peaks, seconds),
        "matrix_products": [_products_summary(length, seconds[length], paths) for length in settings.lengths],
    }


# Time


def paired_seconds(calls: dict[str, Callable], repeats: int, device: str, advance: Callable) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of them: all take turns, and the first turn does not count. Every other turn
    goes in the opposite order, since each finds memory and caches as the one before has left them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        order = list(calls.items())
        for name, call in order if turn % 2 == 0 else reversed(order):
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
            advance()
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds_per_layer(names, paths, length, settings, advance) -> dict[str, list[float]]:
    calls = {name: call_of(name, build(name, length, settings), length, settings) for name in names}
    calls |= {path: products_of_layer(product, length, settings) for path, product in paths.items()}
    seconds = paired_seconds(calls, settings.repeats, settings.device, advance)
    for name in names:
        seconds[name] = [each / settings.layers for each in seconds[name]]
    return seconds


def build(name: str, length: int, settings: Settings) -> torch.nn.Module:
    """A contestant for documents of `length` tokens: base size, random weights, hardly any vocabulary."""
    positions = (length // 512 + 2) * 512  # whole windows of Longformer, which counts from 2, and whole blocks
    model = {**CONTESTANTS, **MODELS}[GRAPHS.get(name, name)](
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_hidden_layers=settings.layers,
        max_position_embeddings=positions,
        vocab_size=128,
        pad_token_id=0,
    )
    return model.to(**settings.factory).train(settings.train)


def call_of(name: str, model: torch.nn.Module, length: int, settings: Settings) -> Callable[[], None]:
    """The step of a contestant, captured if its name says so."""
    step = step_of(model, length, settings)
    return captured(step) if name in GRAPHS else step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph, which the first call captures."""
    graph = cache(partial(_capture, step))
    return lambda: graph().replay()


def _capture(step):
    """Behind a warm-up, which loads kernels and makes what is kept: while a graph is captured nothing can."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def step_of(model: torch.nn.Module, length: int, settings: Settings) -> Callable[[], None]:
    """What is timed: a forward pass, in training also the backward pass of a mean-square loss."""
    states = torch.randn(settings.batch, length, HIDDEN, **settings.factory)

    def infer():
        with torch.no_grad():
            model(inputs_embeds=states)

    def train():
        model(inputs_embeds=states).last_hidden_state.square().mean().backward()
        model.zero_grad(set_to_none=True)

    return train if settings.train else infer


# The limit: a layer's matrix products alone


def product_paths(settings: Settings) -> dict[str, Callable]:
    """Ways to compute `a b^T` that this torch has for the device and the dtype."""
    paths: dict[str, Callable] = {"products, torch": torch.nn.functional.linear}
    if settings.device == "cpu" and has_onednn():
        one = torch.ones(1, 1, **settings.factory)
        try:
            onednn_product(one, one, None)
        except RuntimeError:  # not in this dtype, on this processor
            return paths
        paths["products, oneDNN"] = lambda a, b: onednn_product(a, b, None)
    return paths


def product_shapes(tokens: int, train: bool) -> list[tuple[int, int, int]]:
    """`(rows, columns, inner)` of a layer's products: four d x d, d x 4d and 4d x d, and their two gradients each."""
    weights = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)]
    shapes = [(tokens, wide, narrow) for narrow, wide in weights]
    if train:
        shapes += [(tokens, narrow, wide) for narrow, wide in weights]
        shapes += [(wide, narrow, tokens) for narrow, wide in weights]
    return shapes


def products_of_layer(product: Callable, length: int, settings: Settings) -> Callable[[], None]:
    """All products of a layer, on operands that lie in memory as the product wants them."""
    shapes = product_shapes(settings.batch * length, settings.train)
    sides = {(size, inner) for rows, columns, inner in shapes for size in (rows, columns)}
    operands = {side: torch.randn(side, **settings.factory) for side in sides}

    def run():
        with torch.no_grad():
            for rows, columns, inner in shapes:
                product(operands[rows, inner], operands[columns, inner])

    return run


# Memory


def peak_in_child(name: str, length: int, settings: Settings) -> tuple[bool, int | None]:
    """Whether a contestant's step fits in memory, and the bytes it takes beyond the model, or None; see `peak_memory`.

    It runs in a process of its own.
    """
    with ProcessPoolExecutor(1, mp_context=_fresh_processes()) as pool:
        try:
            return True, pool.submit(_peak_of_step, name, length, settings).result()
        except (RuntimeError, MemoryError) as error:
            if not _is_want_of_memory(error):
                raise
            return False, None


def _fresh_processes():
    """A context for processes in which nothing has been computed. Where the system can, they come from one that has
    imported torch, which else takes each of them seconds."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # importing transformers can print, which this package keeps quiet
    return context


def _is_want_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, or the system ended the process."""
    kinds = (BrokenProcessPool, MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _peak_of_step(name: str, length: int, settings: Settings) -> int | None:
    transformers.logging.set_verbosity_error()
    if settings.device == "cpu":
        _leave_memory_to_others()
    model = build(name, length, settings)
    step_of(model, min(length, WARM_UP), settings)()
    return peak_memory(call_of(name, model, length, settings), settings.device)


def peak_memory(call: Callable, device: str = "cpu") -> int | None:
    """Bytes that `call` needs at the worst moment, beyond those in use before it.

    On the CPU they are the process's resident bytes, which Linux tells; elsewhere the answer is None.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    except OSError:
        return None
    before = _kilobytes("/proc/self/status", "VmRSS")
    call()
    return (_kilobytes("/proc/self/status", "VmHWM") - before) * 1024


def _return_freed_memory() -> None:
    """Gives what the allocator keeps back to the system, so that using it again counts."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return


def _leave_memory_to_others() -> None:
    """Lets allocations fail that the machine has no memory for, before the system ends processes."""
    try:
        import resource

        available = _kilobytes("/proc/meminfo", "MemAvailable")
        used = _kilobytes("/proc/self/status", "VmData")
    except (ImportError, OSError):  # not Linux
        return
    limit = int(used + 0.8 * available) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _kilobytes(file: str, name: str) -> int:
    """A number of one of Linux's files of names and kilobytes."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# The report


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their ratio, or None without one of them."""
    return numerator / denominator if numerator is not None and denominator else None


def summary(settings: Settings, peaks: dict, seconds: dict) -> list[dict]:
    """`results` of `benchmark`.

    Args:
        settings: what was measured.
        peaks: `(fits, bytes or None)` of each `(length, contestant)`.
        seconds: of each length, seconds of each repeat of each contestant that fits.
    """
    medians = {
        (length, name): statistics.median(seconds[length][name]) if name in seconds[length] else None
        for length, name in peaks
    }
    first = settings.lengths[0]
    results = []
    for (length, name), (fits, peak) in peaks.items():
        median, per_token = medians[length, name], first / length
        time_growth = ratio(median, medians[first, name])
        memory_growth = ratio(peak, peaks[first, name][1])
        results.append(
            {
                "contestant": name,
                "length": length,
                "fits": fits,
                "seconds_per_layer": median,
                "seconds_of_repeats": seconds[length].get(name, []),
                "tokens_per_second": ratio(settings.batch * length, median and median * LAYERS.get(name, 12)),
                "peak_bytes": peak,
                "time_ratio": ratio(median, medians[length, OURS]),
                "memory_ratio": ratio(peak, peaks[length, OURS][1]),
                "time_growth": None if time_growth is None else time_growth * per_token,
                "memory_growth": None if memory_growth is None else memory_growth * per_token,
            }
        )
    return results


def _products_summary(length: int, seconds: dict[str, list[float]], paths) -> dict:
    medians = {path: statistics.median(seconds[path]) for path in paths}
    ours = statistics.median(seconds[OURS]) if OURS in seconds else None
    return {"length": length, "seconds": medians, "ratio": ratio(ours, min(medians.values()))}


def _title(report: dict) -> str:
    settings = report["settings"]
    step = "training step" if settings["train"] else "inference"
    return f"{step}, {settings['dtype']}, {settings['device']}, batch of {settings['batch']}"


def as_models_table(report: dict) -> Table:
    """Tokens a second of whole models of the base size, a row for each, with their ratio to ours at each length."""
    table = Table(title=f"tokens a second\n{_title(report)}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for length in report["settings"]["lengths"]:
        table.add_column(f"at {length:,}", justify="right", no_wrap=True)
    speeds = {(row["contestant"], row["length"]): row["tokens_per_second"] for row in report["results"]}
    for name in dict.fromkeys(name for name, _ in speeds):
        cells = []
        for length in report["settings"]["lengths"]:
            speed = speeds[name, length]
            cells.append(f"{_number(speed, 1, 0)} ({_number(ratio(speed, speeds[OURS, length]), 1, 2)})")
        table.add_row(name, *cells)
    return table


def as_table(report: dict) -> Table:
    """The figures, with the matrix products below each length."""
    table = Table(title=_title(report), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("tokens", "", "ms/layer", "ratio", "growth", "peak MiB", "ratio", "growth"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for products in report["matrix_products"]:
        length = products["length"]
        rows = [row for row in report["results"] if row["length"] == length]
        for row in rows:
            table.add_row(f"{length:,}", *_cells(row))
        ours = next(row["seconds_per_layer"] for row in rows if row["contestant"] == OURS)
        for path, seconds in products["seconds"].items():
            times = (_number(seconds, 1e3, 1), _number(ratio(seconds, ours), 1, 2))
            table.add_row(f"{length:,}", path, *times, "", "", "", "", style="dim")
        table.add_section()
    return table


def _cells(row: dict) -> list[str]:
    columns = (
        ("seconds_per_layer", 1e3, 1),
        ("time_ratio", 1, 2),
        ("time_growth", 1, 2),
        ("peak_bytes", 2**-20, 1),
        ("memory_ratio", 1, 2),
        ("memory_growth", 1, 2),
    )
    mark = "" if row["fits"] else " *"
    return [row["contestant"] + mark, *(_number(row[name], unit, digits) for name, unit, digits in columns)]


def _number(value: float | None, unit: float, digits: int) -> str:
    return "-" if value is None else f"{value * unit:,.{digits}f}"


def _engine(settings: Settings) -> dict:
    """What computes our block-sparse attention, and why others were passed over."""
    device, dtype = torch.device(settings.device), settings.factory["dtype"]
    call = Call(device, dtype, HIDDEN // HEADS, BigBirdConfig().block_size, needs_gradients=settings.train)
    choice = choose_engine("sdpa", call)
    return {"name": choice.name, "passed_over": choice.passed_over}


def notes(report: dict) -> list[str]:
    """What to know about the table."""
    lines = [
        "ratio: to bigbird_plus at this length. growth: from the first length, 1 if linear. peak: what a step takes "
        "beyond the model. products: the matrix products of a layer alone. -: not measured."
    ]
    engine = report["engine"]
    passed_over = "".join(f" Not {name}: {reason}." for name, reason in engine["passed_over"].items())
    lines.append(f"{OURS} reads sparsely by the engine {engine['name']}.{passed_over}")
    for products in report["matrix_products"]:
        if products["ratio"] is not None:
            path = min(products["seconds"], key=products["seconds"].get)
            lines.append(f"{OURS} at {products['length']:,} tokens: {products['ratio']:.2f} times {path}.")
    if not all(row["fits"] for row in report["results"]):
        lines.append("*: does not fit in this machine's free memory.")
    if report["settings"]["graphs"]:
        lines.append("graph: captured as a CUDA graph, whose kernels are launched as a whole, without Python.")
    layers = report["settings"]["layers"]
    if report["settings"]["models"]:
        lines.append(
            f"tokens a second: in parentheses as a multiple of {OURS}; of models with 12 layers, ModernBERT 22, "
            f"reckoned from {layers}, of which ModernBERT reads {-(-layers // 3)} in full."
        )
    return lines


def import_figure():
    """matplotlib's `Figure`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'bigbird-plus[plot]'.") from error
    return Figure


def plot(report: dict, path: str | Path) -> None:
    """Writes a picture: speed and memory against length, a line for each contestant, and the machine."""
    figure = import_figure()(figsize=(10, 4.2), layout="constrained")
    panels = (("tokens_per_second", 1, "tokens a second"), ("peak_bytes", 2**-20, "memory of a step (MiB)"))
    lengths = report["settings"]["lengths"]
    for axes, (name, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for contestant in dict.fromkeys(row["contestant"] for row in report["results"]):
            rows = [row for row in report["results"] if row["contestant"] == contestant and row[name] is not None]
            points = [row["length"] for row in rows], [row[name] * unit for row in rows]
            axes.plot(*points, marker="o", linewidth=3 if contestant == OURS else 1.5, label=contestant)
        axes.set(xscale="log", yscale="log", xlabel="tokens of a document", title=label)
        axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
        axes.set_xticks([], minor=True)
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    facts = report["environment"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    machine = facts["accelerator" if report["settings"]["device"] == "cuda" else "CPU"]
    figure.supxlabel(f"{_title(report)}; {machine}; {versions}", fontsize=8, color="gray")
    figure.savefig(path, dpi=110)
