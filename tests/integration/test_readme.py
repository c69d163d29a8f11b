"""The README and the guides: their Python runs, each piece by itself, and the commands, links and pictures exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import transformers
import typer
from transformers import AttentionInterface, AttentionMaskInterface

import bigbird_plus
from bigbird_plus.attention import engines
from bigbird_plus.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The code of a page in one language, each with its number of lines before it."""
    text = page.read_text(encoding="utf-8")
    return [(text[: one.start(2)].count("\n"), one[2]) for one in FENCE.finditer(text) if one[1] == language]


def write_bert(folder) -> Path:
    """A small BERT, as the Hub has it."""
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "plants", "create", "light", "they", "need", "."]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    return folder


@pytest.fixture(scope="module")
def hub(checkpoint, add_to_hub_cache, tmp_path_factory):
    """The names that the pages load from: BigBirds of one narrow layer, for inputs as long as the public ones'."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("hub") / "bigbird")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bigbird_plus.BigBirdForMaskedLM(bigbird_plus.BigBirdConfig(**sizes)).save_pretrained(folder)
    for name in ("google/bigbird-roberta-base", "google/bigbird-base-trivia-itc"):
        add_to_hub_cache(name, folder)
    add_to_hub_cache("google-bert/bert-base-uncased", write_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def own_registry():
    """Takes back what a page registers."""
    tables = (engines._engines, AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)
    bigbird_plus.unregister()
    bigbird_plus.register()


def pages_with_python() -> list:
    """Tracing a graph takes its time."""
    marks = {"export": pytest.mark.slow}
    pages = [page for page in PAGES if blocks(page, "python")]
    return [pytest.param(page, id=page.stem, marks=marks.get(page.stem, ())) for page in pages]


@pytest.mark.parametrize("page", pages_with_python())
@pytest.mark.filterwarnings("ignore")
def test_python(page, hub, own_registry, tmp_path, monkeypatch):
    """Each piece has its own imports and variables. Tracebacks name the page's own lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Ruth lit the lamp. " * 2000, encoding="utf-8")
    for before, source in blocks(page, "python"):
        exec(compile("\n" * before + source, page, "exec"), {"__name__": "__main__"})


def test_load_by_name(hub):
    """What the README says comes of its first piece."""
    variables = {}
    exec(blocks(ROOT / "README.md", "python")[0][1], variables)
    assert type(variables["fill"].model) is bigbird_plus.BigBirdForMaskedLM
    assert type(variables["tokenizer"]) is bigbird_plus.BigBirdTokenizerFast
    assert type(variables["model"]) is bigbird_plus.BigBirdModel


def shell_commands() -> list[list[str]]:
    """The words of each command that a page shows."""
    text = "\n".join(source for page in PAGES for _, source in blocks(page, "bash")).replace("\\\n", " ")
    lines = [part for line in text.splitlines() for part in line.split("&&")]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("words", [each for each in shell_commands() if each[0] == "bigbird-plus"], ids=" ".join)
def test_commands_take_the_arguments_that_are_shown(words):
    """They are parsed as they would be to run; only the files they name are not there."""
    group = typer.main.get_command(app)
    command = group.commands[words[1]]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    context = command.make_context(words[1], [word for word in words[2:] if word != "..."], resilient_parsing=True)
    assert context.command is command


def test_scripts_exist():
    """And the files and markers of tests that commands name."""
    named = {word for words in shell_commands() for word in words if re.match(r"(examples|tests)/", word)}
    named |= {
        word
        for page in PAGES
        for word in re.findall(r"`(?:\S+ )*((?:examples|tests|\.ci)/[\w/.]+)`", page.read_text())
    }
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / ".github").glob("*.md"))], ids=lambda page: page.stem)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8").replace("\n", " "))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_every_guide_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"examples/guides/{page.name}" not in readme] == []


def test_threshold_is_the_one_named():
    assert bigbird_plus.Sparsity(num_attention_heads=12).full_attention_length == 704
