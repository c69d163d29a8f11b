"""The command `bigbird-plus`. A command reads its arguments, calls the library and prints what comes back."""

import json
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import transformers
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    pipeline,
)

from . import bench as benchmarks
from . import bench_context_parallel
from .attention.pattern import Sparsity
from .configuration_big_bird import BigBirdConfig
from .conversion import convert_checkpoint
from .demo import attention_in_use, demo_checkpoint, document, mask_words
from .environment import describe_environment
from .heatmap import check_index, layer_attention
from .heatmap import plot_attention as draw_attention
from .pipelines import SummarizationPipeline
from .quantization import quantize_checkpoint

app = typer.Typer(help="BigBird for transformers: long documents in linear time.", add_completion=False)

ModelOption = Annotated[str, typer.Option("--model", help="A local folder, or a name on the Hub.")]


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Wrong input gives one line on standard error, and exit status 2."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    usage_error: Any = typer.BadParameter.__base__  # typer has no public name for the class of all of them
    try:
        status = app(arguments, standalone_mode=False)
    except usage_error as error:
        _refuse(f"{error.format_message().rstrip('.')}. See bigbird-plus --help.")
    except (OSError, ValueError, ImportError) as error:
        _refuse(str(error))
    except typer.Abort:
        status = 130
    sys.exit(status)


def _refuse(message: str) -> None:
    _tell("Error:", message)
    sys.exit(2)


def _tell(kind: str, message: str) -> None:
    print(kind, textwrap.shorten(message, width=300, placeholder=" ..."), file=sys.stderr)


@app.command()
def demo() -> None:
    """Fill in words of a long document: offline, by a small model that comes with the package."""
    model = AutoModelForMaskedLM.from_pretrained(demo_checkpoint())
    _fill_in_document(model, AutoTokenizer.from_pretrained(demo_checkpoint()))


def _fill_in_document(model, tokenizer) -> None:
    text, words = mask_words(document(), tokenizer.mask_token, count=6)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3)
    fill(text)  # the first call is slower
    start = time.perf_counter()
    predictions: list = fill(text)
    seconds = time.perf_counter() - start

    table = Table("text", "word left out", "predictions (probability)", title="The Book of Ruth, with words left out")
    for word, best in zip(words, predictions, strict=True):
        before = "..." + word.string[max(0, word.start() - 30) : word.start()]
        table.add_row(Text(before + tokenizer.mask_token), Text(word[0]), _in_one_line(best))
    length = len(tokenizer(text).input_ids)
    attention_type, engine, passed_over = attention_in_use(model, length)
    facts = {
        "weights": "small, and trained on other books of the King James Bible",
        "model": f"{type(model).__module__.split('.')[0]}.{type(model).__name__}, loaded by path",
        "attention type": attention_type,
        "engine": engine,
        **{f"not {name}, as": reason for name, reason in passed_over.items()},
        "document": f"{length:,} tokens",
        "speed": f"{length / seconds:,.0f} tokens per second on {fill.device}",
    }
    console = Console()
    console.print(table, _as_table(facts))


@app.command()
def fill_mask(
    model: ModelOption,
    text: Annotated[str | None, typer.Argument(help="With [MASK] for a word. Default: standard input.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Predictions for each mask.")] = 5,
) -> None:
    """Predict the words that a text has [MASK] for."""
    tokenizer = _load(AutoTokenizer, model)
    text = _read_text(sys.stdin).strip() if text is None else _checked_text("The text", text)
    if tokenizer.mask_token is None or tokenizer.mask_token not in text:
        raise ValueError(f"The text must have {tokenizer.mask_token or 'a mask token'} in the place of a word.")
    bigbird = _load_model(AutoModelForMaskedLM, model, tokenizer)
    fill = pipeline("fill-mask", model=bigbird, tokenizer=tokenizer, top_k=top_k)
    if top_k > fill.model.config.vocab_size:
        raise ValueError(f"--top-k must be at most {fill.model.config.vocab_size}, all there are, but is {top_k}.")
    predictions: list = fill(text)
    predictions = predictions if isinstance(predictions[0], list) else [predictions]
    table = Table("mask", "word", "probability")
    for number, best in enumerate(predictions, start=1):
        for prediction in best:
            table.add_row(str(number), Text(prediction["token_str"].strip()), f"{prediction['score']:.2g}")
    Console().print(table)


@app.command()
def plot_attention(
    output: Annotated[Path, typer.Argument(help="The picture to write.")] = Path("attention.png"),
    model: Annotated[str | None, typer.Option(help="Whose: a local folder, or a name on the Hub.")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Tokens of the input. Default: as many as the model reads.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Default: the first; with --heatmap, the last.")] = None,
    head: Annotated[int | None, typer.Option(help="Default: the first; with --heatmap, the mean of all.")] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Show what is read in evaluation, not in training.")
    ] = False,
    heatmap: Annotated[
        bool, typer.Option("--heatmap", help="Show how much the tokens of a text read of each other (in evaluation).")
    ] = False,
    document: Annotated[
        typer.FileText | None,
        typer.Option(encoding="utf-8", help="The text for --heatmap: a file. Default: standard input."),
    ] = None,
) -> None:
    """Draw which blocks of an input read which, and why; or who reads whom in a text."""
    _check_folder(output)
    output = output if output.suffix else output.with_name(f"{output.name}.png")
    if heatmap:
        axes = _draw_heatmap(model, document or sys.stdin, length, layer, head)
    elif document is not None:
        raise ValueError("--document is for --heatmap, which is not given.")
    else:
        axes = _draw_pattern(model, length, layer or 0, head or 0, training=not evaluation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        axes.figure.savefig(output, dpi=150)
    print(_printable(output))


def _draw_pattern(model: str | None, length: int | None, layer: int, head: int, training: bool):
    config = BigBirdConfig() if model is None else _load_config(model)
    if length is None:
        length = config.max_position_embeddings
    elif model is not None:
        _check_length("--length", length, config)
    check_index("layer", layer, config.num_hidden_layers)
    check_index("head", head, config.num_attention_heads)
    sparsity = Sparsity.from_config(config)
    if length <= sparsity.full_attention_length:
        raise ValueError(
            f"--length must be more than {sparsity.full_attention_length}, but is {length}: "
            "shorter inputs are read in full."
        )
    pattern = sparsity.pattern(-(-length // sparsity.block_size), layer_idx=layer, training=training)
    axes = pattern.plot(head=head)
    axes.set_title(f"{length:,} tokens in blocks of {sparsity.block_size}")
    return axes


def _draw_heatmap(model: str | None, file: TextIO, length: int | None, layer: int | None, head: int | None):
    if model is None:
        raise ValueError("--heatmap needs --model: a local folder, or a name on the Hub.")
    config, tokenizer, text = _load_config(model), _load(AutoTokenizer, model), _read_text(file)
    if not text.strip():
        raise ValueError("The text for --heatmap is empty. Give a file by --document, or standard input.")
    input_ids = tokenizer(text, truncation=length is not None, max_length=length, return_tensors="pt").input_ids
    _check_length("--length, or else the text,", input_ids.shape[1], config)
    bigbird = _load_model(AutoModel, model, tokenizer)
    probabilities = layer_attention(bigbird, input_ids, layer, head)
    axes = draw_attention(probabilities, tokenizer.convert_ids_to_tokens(input_ids[0]))
    of_layer = config.num_hidden_layers - 1 if layer is None else layer
    axes.set_title(f"layer {of_layer}, {'mean of all heads' if head is None else f'head {head}'}")
    return axes


def _check_length(what: str, length: int, config: BigBirdConfig) -> None:
    if config.longest_input is not None and length > config.longest_input:
        raise ValueError(f"{what} must have at most the model's {config.longest_input} tokens, but has {length}.")


@app.command()
def bench(
    lengths: Annotated[str, typer.Option(help="Tokens of the inputs.")] = "512,4096,16384",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="Measure training steps, not inference.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    layers: Annotated[int, typer.Option(help="Layers of each model.")] = 3,
    batch: Annotated[int, typer.Option(help="Inputs in a batch.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns, whose median counts.")] = 3,
    models: Annotated[
        bool, typer.Option("--models", help="Show tokens a second: int8, Longformer and ModernBERT, too.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Measure captured CUDA graphs, too.")] = False,
    context_parallel: Annotated[
        int | None, typer.Option(help="Instead: what so many processes send as they share a document.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture to write: speed and memory against length.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file to write: all figures.")] = None,
) -> None:
    """Compare speed and memory with the built-in BigBird and dense attention, or with other long-document models."""
    numbers = tuple(_number(text, "--lengths") for text in lengths.split(","))
    settings = benchmarks.Settings(numbers, dtype, train, device, layers, batch, repeats, models, graphs)
    for file in filter(None, (plot, json_file)):
        _check_folder(file)
    if plot is not None and context_parallel is not None:
        raise ValueError("--plot does not draw what --context-parallel measures. Leave one of them out.")
    if plot is not None:
        benchmarks.import_figure()  # an error now, not after the measurements
    console = Console()
    if context_parallel is not None:
        report = bench_context_parallel.measure(settings, context_parallel)
        console.print(bench_context_parallel.as_table(report))
    else:
        report = benchmarks.benchmark(settings)
        console.print(benchmarks.as_models_table(report) if models else benchmarks.as_table(report))
        for line in benchmarks.notes(report):
            console.print(Text(line))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        benchmarks.plot(report, plot)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A local folder, a name on the Hub, or a TensorFlow checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    max_position_embeddings: Annotated[int, typer.Option(min=1, help="Longest input, in tokens.")] = 4096,
    architecture: Annotated[str | None, typer.Option(help="Class of the new model, as BigBirdForMaskedLM.")] = None,
) -> None:
    """Make a BigBird of a checkpoint of BERT, RoBERTa or another encoder, or of one of Google's."""
    model = convert_checkpoint(source, target, max_position_embeddings, architecture=architecture)
    longest = model.config.longest_input
    length = "any length" if longest is None else f"up to {longest:,} tokens"
    print(f"{_printable(target)}: {type(model).__name__} for inputs of {length}")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A BigBird or BigBird-Pegasus: a local folder, or a name on the Hub.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Turn the linear layers of an encoder into int8 ones, for inference on CPUs."""
    model = quantize_checkpoint(source, target)
    print(f"{_printable(target)}: {type(model).__name__}, its encoder in int8")


@app.command()
def qa(
    model: ModelOption,
    question: Annotated[str, typer.Option(help="What to look for.")],
    document: Annotated[typer.FileText, typer.Option(encoding="utf-8", help="A text file; - is standard input.")],
    top_k: Annotated[int, typer.Option(min=1, help="Answers to show.")] = 1,
    no_answer: Annotated[bool, typer.Option("--no-answer", help="There may be no answer.")] = False,
) -> None:
    """Find the answer to a question in a document of any length."""
    question, context = _checked_text("--question", question), _read_text(document)
    tokenizer = _load(AutoTokenizer, model)
    answer = pipeline(  # type: ignore[call-overload]  # which names the tasks of transformers alone
        "extractive-question-answering",
        model=_load_model(AutoModelForQuestionAnswering, model, tokenizer),
        tokenizer=tokenizer,
    )
    found = answer(question=question, context=context, top_k=top_k, handle_impossible_answer=no_answer)
    table = Table("answer", "characters", "score")
    for best in [found] if isinstance(found, dict) else found:
        place = f"{best['start']} to {best['end']}"
        table.add_row(Text(best["answer"] or "(no answer)"), place, f"{best['score']:.2g}")
    Console().print(table)


@app.command()
def summarize(
    document: Annotated[typer.FileText, typer.Argument(encoding="utf-8", help="A text file; - is standard input.")],
    model: ModelOption,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest summary, in tokens.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of the search for the best summary.")] = None,
) -> None:
    """Write a summary of a long document. By default as long, and found, as the model's generation config says."""
    text, tokenizer = _read_text(document), _load(AutoTokenizer, model)
    summary = SummarizationPipeline(_load_model(AutoModelForSeq2SeqLM, model, tokenizer), tokenizer)
    excess = summary.excess(text)
    if excess:
        _tell("Note:", f"the model does not read the last {excess:,} tokens of the document")
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    found = summary(text, truncation=True, **{name: value for name, value in options.items() if value is not None})
    print(found[0]["summary_text"])


@app.command()
def env() -> None:
    """Show versions, devices and which attention runs."""
    Console().print(_as_table(describe_environment()))


def _number(text: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{option} must be whole numbers with commas between them, not {text!r}.")
    return int(text)


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder to write {file} to.")
    if file.is_dir():
        raise ValueError(f"{file} is a folder. Give the name of a file to write.")


def _read_text(file: TextIO) -> str:
    try:
        text = file.read()
        text.encode()  # standard input may let bytes through that are no UTF-8
    except UnicodeError as error:
        raise ValueError(f"{file.name} is no text in UTF-8: {error}") from error
    return text


def _checked_text(what: str, text: str) -> str:
    """The text of an argument. (Python lets bytes through that are no UTF-8, as half characters, which no tokenizer
    takes.)"""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no text in UTF-8: {text!r}") from error
    return text


def _printable(path: Path) -> str:
    """The path; a file may have a name that is no text."""
    return str(path).encode(errors="replace").decode()


def _load(auto_class, name: str, **settings):
    """What transformers has under a name, or an error that begins with it. Broken files raise errors of many kinds:
    safetensors', pickle's, and of tokenizers a plain `Exception`."""
    try:
        return auto_class.from_pretrained(name, **settings)
    except Exception as error:
        raise ValueError(f"--model {name}: {error}") from error


def _load_model(auto_class, name: str, tokenizer):
    """The model, if its weights and the tokenizer fit it. Weights that are new or not used are told in one line."""
    model, report = _load(auto_class, name, output_loading_info=True, ignore_mismatched_sizes=True)
    mismatched = [one if isinstance(one, str) else one[0] for one in report["mismatched_keys"]]  # or with their shapes
    if mismatched:
        shape = list(model.state_dict()[mismatched[0]].shape)
        raise ValueError(f"--model {name}: {mismatched[0]} has not the shape {shape} that config.json gives it.")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"--model {name}: its tokenizer has {len(tokenizer)} pieces, but vocab_size is {model.config.vocab_size}."
        )
    notes = {"new, and not trained": report["missing_keys"], "not used": report["unexpected_keys"]}
    told = "; ".join(f"{what}: {', '.join(_modules(weights))}" for what, weights in notes.items() if weights)
    if told:
        _tell("Note:", f"weights of {type(model).__name__} in {name} that are {told}")
    return model


def _modules(weights) -> list[str]:
    return sorted({weight.rpartition(".")[0] for weight in weights})


def _load_config(name: str) -> BigBirdConfig:
    config = _load(AutoConfig, name)
    if not isinstance(config, BigBirdConfig):
        raise ValueError(f"--model must be a BigBird, but {name} is a {config.model_type}.")
    return config


def _in_one_line(predictions: list[dict]) -> Text:
    return Text(", ".join(f"{best['token_str'].strip()} ({best['score']:.2g})" for best in predictions))


def _as_table(facts: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


if __name__ == "__main__":
    main()
