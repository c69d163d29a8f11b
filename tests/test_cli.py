"""The command `bigbird-plus`, called as its entry point calls it."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

import bigbird_plus
from bigbird_plus.attention.pattern import KINDS_OF_READING
from bigbird_plus.cli import main
from bigbird_plus.demo import document, mask_words
from bigbird_plus.heatmap import layer_attention

from .peers import make_model, tiny_settings

SENTENCE = "Plants create [MASK] through a process known as photosynthesis."


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def refusal(capsys, *arguments) -> str:
    """The line on standard error with which a command refuses its input. Nothing else but notes is printed."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    *notes, line = printed.err.splitlines()
    assert all(note.startswith("Note: ") for note in notes)
    assert line.startswith("Error: ")
    return line


def test_demo(run_command):
    shown = run_command("demo")
    assert "King James" in shown
    assert "bigbird_plus.BigBirdForMaskedLM" in shown
    assert re.search(r"attention type +block_sparse", shown)
    assert re.search(r"engine +(merged|triton)", shown)
    tokens = re.search(r"document +([\d,]+) tokens", shown)[1]
    assert int(tokens.replace(",", "")) > 2000
    assert re.search(r"[\d,]+ tokens per second", shown)
    assert shown.count("[MASK]") == 6


def test_mask_words_can_be_undone():
    text, words = mask_words(document(), "[MASK]", count=5)
    assert text.count("[MASK]") == len(words) == 5
    for word in words:
        text = text.replace("[MASK]", word[0], 1)
    assert text == document()


def test_env(run_command):
    shown = run_command("env")
    assert re.search(rf"bigbird_plus +{re.escape(bigbird_plus.__version__)}\s", shown)
    assert re.search(rf"transformers +{re.escape(transformers.__version__)}\s", shown)
    assert re.search(r"AutoModel gives +bigbird_plus", shown)
    engine = re.search(r"block-sparse attention is +(merged|triton)", shown)[1]
    assert re.search(rf"block-sparse flash_attention_2 is +{engine}", shown)


def test_env_on_a_cpu_tells_training_apart(run_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = run_command("env")
    assert re.search(r"block-sparse flex_attention is +flex_attention, and merged in training", shown)
    assert re.search(r"not triton, as +the kernels are for NVIDIA's GPUs", shown)


def predictions(shown: str) -> list[tuple[str, str]]:
    """`(number of the mask, probability)` of each row of the table."""
    return re.findall(r"│ (\d+) +│ .+? +│ (\S+) +│", shown)


def test_fill_mask(run_command, checkpoint):
    rows = predictions(run_command("fill-mask", "--model", checkpoint, SENTENCE))
    assert [number for number, _ in rows] == ["1"] * 5
    probabilities = [float(probability) for _, probability in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < probabilities[-1] < 1


def test_fill_mask_with_two_masks_from_standard_input(run_command, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SENTENCE}\nAnimals [MASK] them.\n"))
    rows = predictions(run_command("fill-mask", "--model", checkpoint, "--top-k", "2"))
    assert [number for number, _ in rows] == ["1", "1", "2", "2"]


def colours_of(picture) -> dict[str, float]:
    """The colours of a picture that is large enough to be read, and the share of each."""
    pixels = np.rint(255 * imread(picture)[..., :3]).astype(int)
    assert min(pixels.shape[:2]) >= 400
    colours, counts = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_counts=True)
    return {f"#{colour:06x}": count / counts.sum() for colour, count in zip(colours, counts, strict=True)}


def texts_of(drawing) -> set[str]:
    """What is written in an SVG, whose letters are outlines: matplotlib notes the text before them."""
    return set(re.findall(r"<!-- (.+?) -->", drawing.read_text()))


@pytest.mark.parametrize(("flags", "kind"), [([], "random"), (["--evaluation"], "first block, repeated")])
def test_plot_attention(run_command, tmp_path, flags, kind):
    """A picture in the colours of the kinds of reading that its legend names."""
    kinds = {"none", "window", "global", kind}
    for name in ("attention.png", "attention.svg"):
        shown = run_command("plot-attention", tmp_path / name, "--length", "1000", *flags)
        assert shown == f"{tmp_path / name}\n"
    colours = colours_of(tmp_path / "attention.png")
    assert {colour for colour, share in colours.items() if share > 0.01} == {
        "#ffffff", *(KINDS_OF_READING[name] for name in kinds),
    }  # fmt: skip
    assert kinds | {"1,000 tokens in blocks of 64"} <= texts_of(tmp_path / "attention.svg")


def test_plot_attention_of_a_model(run_command, tmp_path, checkpoint):
    assert run_command("plot-attention", tmp_path / "a.svg", "--model", checkpoint, "--head", "1")
    assert "4,096 tokens in blocks of 64" in (tmp_path / "a.svg").read_text()


def test_plot_attention_as_long_as_the_model_reads(run_command, tmp_path):
    demo = bigbird_plus.demo_checkpoint()
    assert run_command("plot-attention", tmp_path / "a", "--model", demo) == f"{tmp_path / 'a.png'}\n"
    assert KINDS_OF_READING["random"] in colours_of(tmp_path / "a.png")
    run_command("plot-attention", tmp_path / "a.svg", "--model", demo)
    assert "2,048 tokens in blocks of 32" in (tmp_path / "a.svg").read_text()


@pytest.fixture
def plotted(monkeypatch):
    """What the command has drawn: pairs of probabilities and tokens."""
    calls = []

    def draw(*arguments):
        calls.append(arguments)
        return bigbird_plus.plot_attention(*arguments)

    monkeypatch.setattr("bigbird_plus.cli.draw_attention", draw)
    return calls


def demo_attention(length=None, **which):
    """What the demo checkpoint reads of (the beginning of) its document, and the document's tokens."""
    demo = bigbird_plus.demo_checkpoint()
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(demo), transformers.AutoModel.from_pretrained(demo)
    ids = tokenizer(document(), truncation=length is not None, max_length=length, return_tensors="pt").input_ids
    return layer_attention(model, ids, **which), tokenizer.convert_ids_to_tokens(ids[0])


def test_heatmap_of_a_file(run_command, tmp_path, plotted):
    picture, demo = tmp_path / "heatmap.png", bigbird_plus.demo_checkpoint()
    shown = run_command("plot-attention", picture, "--heatmap", "--model", demo, "--document", demo / "excerpt.txt")
    assert shown == f"{picture}\n"
    assert len(colours_of(picture)) > 50  # of a continuous scale
    ((probabilities, tokens),) = plotted
    expected, expected_tokens = demo_attention()
    assert tokens == expected_tokens
    assert torch.equal(probabilities, expected)


def test_heatmap_of_standard_input_for_one_head(run_command, tmp_path, monkeypatch, plotted):
    monkeypatch.setattr(sys, "stdin", io.StringIO(document()))
    options = ["--model", bigbird_plus.demo_checkpoint(), "--length", "500", "--layer", "1", "--head", "2"]
    run_command("plot-attention", tmp_path / "a.svg", "--heatmap", *options)
    assert "layer 1, head 2" in (tmp_path / "a.svg").read_text()
    ((probabilities, tokens),) = plotted
    expected, expected_tokens = demo_attention(length=500, layer=1, head=2)
    assert tokens == expected_tokens
    assert torch.equal(probabilities, expected)


def test_convert(run_command, tmp_path):
    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    arguments = ["--max-position-embeddings", "2048", "--architecture", "BigBirdModel"]
    shown = run_command("convert", tmp_path / "bert", tmp_path / "out", *arguments)
    assert shown == f"{tmp_path / 'out'}: BigBirdModel for inputs of up to 2,048 tokens\n"
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert isinstance(model, bigbird_plus.BigBirdModel)
    assert model.config.max_position_embeddings == 2048


@pytest.mark.parametrize("place", ["file", "standard input"])
def test_qa(run_command, tmp_path, checkpoint, monkeypatch, place):
    file = tmp_path / "document.txt"
    file.write_text(document(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(document().encode())))
    name = file if place == "file" else "-"
    arguments = ["--model", checkpoint, "--question", "Who?", "--document", name, "--top-k", "3", "--no-answer"]
    rows = re.findall(r"│ (.+?) +│ (\d+) to (\d+) +│ (\S+) +│", run_command("qa", *arguments))
    assert len(rows) == 3
    for answer, start, end, score in rows:
        found = document()[int(start) : int(end)]
        assert found.startswith(answer) if answer != "(no answer)" else found == ""
        assert float(score) > 0


def change_weights(folder, change):
    """Applies `change` to the weights of a checkpoint, a dictionary of tensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_new_and_unused_weights_are_told(capsys, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "changed")

    def change(weights):
        del weights["bert.encoder.layer.0.output.dense.bias"]
        weights["adapter.down.weight"] = torch.zeros(2)

    with pytest.raises(SystemExit):
        main(["fill-mask", "--model", str(checkpoint), SENTENCE])
    assert capsys.readouterr().err == ""
    change_weights(tmp_path / "changed", change)
    with pytest.raises(SystemExit) as exit_info:
        main(["fill-mask", "--model", str(tmp_path / "changed"), SENTENCE])
    assert not exit_info.value.code
    assert capsys.readouterr().err == (
        f"Note: weights of BigBirdForMaskedLM in {tmp_path / 'changed'} that are new, and not trained: "
        "bert.encoder.layer.0.output.dense; not used: adapter.down\n"
    )


def test_a_head_that_the_checkpoint_has_not_is_told(capsys, tmp_path, checkpoint):
    (tmp_path / "document.txt").write_text("A text.", encoding="utf-8")
    arguments = ["qa", "--model", str(checkpoint), "--question", "Who?", "--document", str(tmp_path / "document.txt")]
    with pytest.raises(SystemExit):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert "that are new, and not trained: qa_classifier.intermediate.dense" in line


@pytest.mark.parametrize("bytes_in_utf8", [True, False])
def test_a_picture_with_a_name_that_is_no_text(run_command, tmp_path, monkeypatch, bytes_in_utf8):
    """Files on Linux can have any. What is printed need be read by people only."""
    name = os.fsdecode("caf\xe9.png".encode("utf-8" if bytes_in_utf8 else "latin-1"))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", "surrogateescape"))  # as in a shell
    run_command("plot-attention", os.path.join(tmp_path, name), "--length", "1000")
    sys.stdout.flush()
    assert printed.getvalue().decode() == f"{tmp_path}/{name if bytes_in_utf8 else 'caf?.png'}\n"
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


@pytest.fixture(scope="module")
def places(tmp_path_factory, checkpoint) -> dict[str, Path]:
    """By name: checkpoints, most of which are of no use, an empty folder, and texts, most of which are none."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("bert", "empty"):
        (folder / name).mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    make_misfits(folder, checkpoint)
    shutil.copytree(checkpoint, folder / "broken")
    (folder / "broken" / "model.safetensors").write_text("no weights")
    texts = {"text": b"A text.", "nothing": b" \n", "latin": "Caf\xe9".encode("latin-1"), "long": b"word " * 5000}
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return {"checkpoint": checkpoint, **{path.name: path for path in folder.iterdir()}}


def make_misfits(folder, checkpoint):
    """Checkpoints of parts that do not fit: a vocabulary for a larger model, and weights for one as well."""
    make_model("BigBirdForMaskedLM", vocab_size=1000).save_pretrained(folder / "small")
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, folder / "small" / name)
    shutil.copytree(folder / "small", folder / "smaller")
    bigbird_plus.BigBirdConfig(**tiny_settings(vocab_size=990)).save_pretrained(folder / "smaller")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command. See bigbird-plus --help."),
        (["no-such-command"], "No such command 'no-such-command'"),
        (["fill-mask", SENTENCE], "Missing option '--model'"),
        (["fill-mask", "--model", "no/such-model", SENTENCE], "no/such-model"),
        (["fill-mask", "--model", "{checkpoint}", "--top-k", "0", SENTENCE], "--top-k"),
        (["fill-mask", "--model", "{checkpoint}", "--top-k", "99999", SENTENCE], "--top-k must be at most 50358"),
        (["fill-mask", "--model", "{broken}", SENTENCE], "--model {broken}: "),
        (["fill-mask", "--model", "{checkpoint}", ""], "The text must have [MASK]"),
        (["fill-mask", "--model", "{checkpoint}", "No mask here."], "The text must have [MASK]"),
        (["fill-mask", "--model", "{checkpoint}", "word " * 4096 + "[MASK]"], "max_position_embeddings is 4096"),
        (["fill-mask", "--model", "{empty}", SENTENCE], "{empty}"),
        (["fill-mask", "--model", "{smaller}", SENTENCE], "has not the shape [990"),
        (["fill-mask", "--model", "{small}", SENTENCE], "its tokenizer has 50358 pieces, but vocab_size is 1000"),
        (
            ["fill-mask", "--model", "{checkpoint}", "Caf\udce9 [MASK]"],
            "The text is no text in UTF-8: 'Caf\\udce9 [MASK]'",
        ),
        (["plot-attention", "a.png", "--length", "704"], "--length must be more than 704, but is 704"),
        (["plot-attention", "a.png", "--head", "12"], "head must be between 0 and 11, but is 12"),
        (["plot-attention", "{empty}/a.xyz"], "xyz"),
        (["plot-attention", "{empty}/no/folder/a.png"], "There is no folder to write {empty}/no/folder/a.png to"),
        (["plot-attention", "{empty}"], "is a folder"),
        (["plot-attention", ""], "is a folder"),
        (["plot-attention", "--layer", "12"], "layer must be between 0 and 11, but is 12"),
        (["plot-attention", "--layer", "-1"], "layer must be between 0 and 11, but is -1"),
        (["plot-attention", "--length", "-5"], "--length"),
        (["plot-attention", "--length", "99999999"], "--length"),
        (["plot-attention", "--model", "{checkpoint}", "--length", "5000"], "at most the model's 4096 tokens"),
        (["plot-attention", "--model", "{bert}"], "must be a BigBird"),
        (["plot-attention", "--document", "{text}"], "--document is for --heatmap"),
        (["plot-attention", "--heatmap", "--document", "{text}"], "--heatmap needs --model"),
        (["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "no.txt"], "--document"),
        (["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "{nothing}"], "is empty"),
        (["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "{latin}"], "is no text in UTF-8"),
        (["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "{long}"], "but has 5002"),
        (
            ["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "{text}", "--layer", "2"],
            "layer must be between 0 and 1, but is 2",
        ),
        (
            ["plot-attention", "--heatmap", "--model", "{checkpoint}", "--document", "{text}", "--head", "-1"],
            "head must be between 0 and 1, but is -1",
        ),
        (["convert", "{checkpoint}", "out"], "'big_bird'"),
        (["convert", "{bert}", "{bert}"], "is not empty"),
        (["qa", "--model", "{checkpoint}", "--question", "Who?", "--document", "no.txt"], "--document"),
        (["qa", "--model", "{checkpoint}", "--question", "", "--document", "{bert}/config.json"], "needs a question"),
        (["qa", "--model", "{checkpoint}", "--question", "Who?", "--document", "{nothing}"], "needs a context"),
        (["qa", "--model", "{checkpoint}", "--question", "Who?", "--document", "{latin}"], "is no text in UTF-8"),
        (
            ["qa", "--model", "{checkpoint}", "--question", "Caf\udce9?", "--document", "{text}"],
            "--question is no text in UTF-8",
        ),
        (["qa", "--model", "{small}", "--question", "Who?", "--document", "{text}"], "vocab_size is 1000"),
        (["bench", "--json", "{empty}"], "is a folder"),
        (["bench", "--lengths", "1024,many"], "--lengths must be whole numbers with commas between them, not 'many'"),
        (["bench", "--lengths", "0"], "lengths must be different positive numbers, but are (0,)"),
        (["bench", "--lengths", "1024,1024"], "lengths must be different positive numbers"),
        (["bench", "--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, but is 'int8'"),
        (["bench", "--device", "tpu"], "device must be 'cpu' or 'cuda', but is 'tpu'"),
        (["bench", "--graphs"], "graphs needs a CUDA device, but device is 'cpu'"),
        (["bench", "--layers", "0"], "layers must be positive, but is 0"),
        (["bench", "--repeats", "-1"], "repeats must be positive, but is -1"),
        (["bench", "--json", "no/folder/out.json"], "There is no folder to write no/folder/out.json to"),
    ],
)
def test_wrong_input(capsys, places, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message.format(**places) in refusal(capsys, *(argument.format(**places) for argument in arguments))


@pytest.mark.parametrize("arguments", [["plot-attention", "--length", "1000"], ["bench", "--plot", "out.png"]])
def test_without_matplotlib(capsys, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    assert "pip install 'bigbird-plus[plot]'" in refusal(capsys, *arguments)


def test_bench_without_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA device" in refusal(capsys, "bench", "--device", "cuda")
