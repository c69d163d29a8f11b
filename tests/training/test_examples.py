"""The scripts in `examples/`, run as a user runs them, at a tiny size, from the demo checkpoint or from scratch."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import bigbird_plus

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = str(bigbird_plus.demo_checkpoint())
SHAPE = {"vocab-size": 120, "hidden-size": 32, "layers": 2, "heads": 2, "positions": 256, "block-size": 8}
QUICK = ["--max-steps", "2", "--batch-size", "2", "--gradient-accumulation", "1", "--max-length", "128", "--cpu"]


HAS_SENTENCE_TRANSFORMERS = importlib.util.find_spec("sentence_transformers") is not None
HAS_VECTORS_OF_TOKENS = HAS_SENTENCE_TRANSFORMERS and importlib.util.find_spec(
    "sentence_transformers.multi_vector_encoder"
)
LEFT_OUT = {"common"} if HAS_SENTENCE_TRANSFORMERS else {"common", "retrieval"}  # one of the clients
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in LEFT_OUT)


def load_example(name):
    """The module of an example, which is no package: like Python, the folder is put on the path for it."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def text_file(tmp_path):
    """Paragraphs of made-up prose with some hundred different words."""
    draw = random.Random(0)
    syllables = ["ba", "ko", "ri", "me", "su", "ta", "lo", "ni", "ve", "du"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=40)) + "." for _ in range(60)), encoding="utf-8")
    return str(path)


@pytest.fixture
def classification_data(tmp_path):
    rows = [
        {"text": "And God said, " * (3 + row) + word, "label": word} for row in range(3) for word in ("yea", "nay")
    ]
    return write_lines(tmp_path / "documents.jsonl", rows)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_every_argument(path, capsys):
    with pytest.raises(SystemExit) as stop:
        load_example(path.stem).parse_args(["--help"])
    assert stop.value.code == 0
    expected = {"--length", "--check"} if path.stem == "context_parallel" else {"--output-dir", "--seed", "--cpu"}
    assert expected <= set(capsys.readouterr().out.replace(",", " ").split())


def test_pretraining_from_scratch_then_on_long_inputs(text_file, tmp_path, capsys):
    main = load_example("pretrain_mlm").main
    short, long = str(tmp_path / "short"), str(tmp_path / "long")
    data = ["--train-data", text_file, "--eval-data", text_file, "--cpu", "--batch-size", "2", "--warmup-steps", "1"]
    shape = [f"--{name}={value}" for name, value in SHAPE.items()]
    steps = ["--steps", "30", "--stop-after", "3"]
    main([*data, *shape, "--max-length", "32", "--shift-positions", *steps, "--output-dir", short])
    assert "step 3/30" in capsys.readouterr().out
    main([*data, "--model", short, "--max-length", "256", "--steps", "2", "--output-dir", long, "--save-bfloat16"])
    assert capsys.readouterr().out.count("held-out loss") == 1

    tokenizer = AutoTokenizer.from_pretrained(long)
    assert isinstance(tokenizer, (bigbird_plus.BigBirdTokenizer, bigbird_plus.BigBirdTokenizerFast))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4, 5, 6]) == [
        "<pad>", "</s>", "<s>", "[CLS]", "[SEP]", "[MASK]", "<unk>",
    ]  # fmt: skip
    assert len(tokenizer) == 120
    with safe_open(f"{long}/model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118, no mapping
    assert len(pipeline("fill-mask", model=long)("ba ko [MASK]", top_k=3)) == 3


def test_pretraining_says_what_is_missing(text_file, tmp_path):
    with pytest.raises(SystemExit, match="--vocab-size"):
        load_example("pretrain_mlm").main(["--train-data", text_file, "--output-dir", str(tmp_path)])


def test_classification(classification_data, tmp_path, capsys):
    output = str(tmp_path / "model")
    data = ["--train-data", classification_data, "--eval-data", classification_data]
    load_example("finetune_classification").main([*data, "--model", DEMO, "--output-dir", output, *QUICK])
    assert "accuracy" in capsys.readouterr().out
    assert {answer["label"] for answer in pipeline("text-classification", model=output)(["yea", "nay"])} <= {
        "yea",
        "nay",
    }


@pytest.fixture
def data_set(tmp_path):
    """A data set with two splits, which `datasets` loads by the name of its folder as it loads those of the hub."""

    def write(rows):
        for split in ("train", "test", "validation"):
            write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
        return str(tmp_path / "data")

    (tmp_path / "data").mkdir()
    return write


@pytest.fixture
def hub_model(add_to_hub_cache):
    """The demo checkpoint under a name of the Hub."""
    add_to_hub_cache("someone/small-bigbird", bigbird_plus.demo_checkpoint())
    return "someone/small-bigbird"


DOCUMENTS = [{"text": "And God said, " + word, "label": word} for word in ("yea", "nay")] * 2
TAGGED = [{"tokens": ["And", "Abraham", "went"], "tags": ["O", "PER", "O"]}] * 4
ANSWERED = [
    {
        "id": str(number),
        "question": "Who went?",
        "context": "And Abraham went.",
        "answers": {"text": ["Abraham"], "answer_start": [4]},
    }
    for number in range(4)
]


@pytest.mark.parametrize(
    ("script", "rows", "arguments", "printed"),
    [
        ("finetune_classification", DOCUMENTS, [], "accuracy"),
        ("finetune_token_classification", TAGGED, [], "accuracy"),
        ("finetune_qa", ANSWERED, ["--stride", "32"], "exact match"),
        ("lora", DOCUMENTS, ["--eval-data", "{data}", "--gradient-checkpointing"], "accuracy"),
    ],
)
def test_names_of_data_sets_and_of_models(script, rows, arguments, printed, data_set, hub_model, tmp_path, capsys):
    data = data_set(rows)
    arguments = [argument.format(data=data) for argument in arguments]
    output = tmp_path / "output"
    load_example(script).main(
        [*QUICK, "--train-data", data, *arguments, "--model", hub_model, "--output-dir", str(output)]
    )
    assert printed in capsys.readouterr().out
    assert list(output.glob("*.safetensors"))


def test_pretraining_on_a_data_set_from_a_named_model(data_set, hub_model, tmp_path, capsys):
    data = data_set([{"text": "And God said, Let there be light."}] * 40)
    arguments = ["--train-data", data, "--model", hub_model, "--output-dir", str(tmp_path / "output"), "--cpu"]
    load_example("pretrain_mlm").main([*arguments, "--max-length", "64", "--steps", "1", "--batch-size", "2"])
    assert "step 1/1" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["finetune_classification", "lora"])
def test_tables_in_files(script, tmp_path, capsys):
    data = tmp_path / "documents.csv"
    data.write_text("text,label\nAnd God said,0\nLet there be light,1\n")
    arguments = ["--train-data", str(data), "--eval-data", str(data), "--output-dir", str(tmp_path / "output")]
    load_example(script).main([*QUICK, *arguments, "--model", DEMO])
    assert "accuracy" in capsys.readouterr().out


def test_token_classification(tmp_path, capsys):
    rows = [{"tokens": ["And", "Abraham", "went", "unto", "Hebron"], "tags": ["O", "PER", "O", "O", "LOC"]}] * 4
    data = write_lines(tmp_path / "words.jsonl", rows)
    output = str(tmp_path / "model")
    load_example("finetune_token_classification").main(
        ["--train-data", data, "--eval-data", data, "--model", DEMO, "--output-dir", output, *QUICK]
    )
    assert "accuracy" in capsys.readouterr().out
    model = bigbird_plus.BigBirdForTokenClassification.from_pretrained(output)
    assert model.config.id2label == {0: "LOC", 1: "O", 2: "PER"}


def test_lora_writes_an_adapter_and_a_merged_model(classification_data, tmp_path, capsys):
    output, merged = tmp_path / "adapter", tmp_path / "merged"
    load_example("lora").main(
        [
            *QUICK,
            "--train-data",
            classification_data,
            "--model",
            DEMO,
            "--output-dir",
            str(output),
            "--merge-into",
            str(merged),
        ]
    )
    assert "trainable params" in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(DEMO, dtype=torch.float32, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer("And God said, Let there be light", return_tensors="pt")
    from_adapter = PeftModel.from_pretrained(base, output).eval()(**inputs).logits
    from_merged = AutoModelForSequenceClassification.from_pretrained(merged).eval()(**inputs).logits
    assert (from_adapter - from_merged).abs().max() < 1e-5


if HAS_SENTENCE_TRANSFORMERS:

    @pytest.mark.parametrize("pooling", ["cls", "tokens"] if HAS_VECTORS_OF_TOKENS else ["cls"])
    def test_retrieval(pooling, tmp_path, capsys):
        output = tmp_path / "embedder"
        quick = ["--cpu", "--max-length", "400", "--steps", "1", "--batch-size", "2", "--pooling", pooling]
        load_example("retrieval").main([*quick, "--output-dir", str(output)])
        assert "accuracy" in capsys.readouterr().out
        assert list(output.rglob("*.safetensors"))


class TestQuestionAnswering:
    CONTEXT = "And the name of the wife of Abram was Sarai. " + "And it came to pass. " * 60 + "His son was Isaac."

    @pytest.fixture
    def squad_file(self, tmp_path):
        questions = [
            {"id": "1", "question": "Who was the wife?", "answers": [self.answer("Sarai")]},
            {"id": "2", "question": "Who was the son?", "answers": [self.answer("Isaac")]},
        ]
        data = {"data": [{"title": "", "paragraphs": [{"context": self.CONTEXT, "qas": questions}]}]}
        path = tmp_path / "squad.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return str(path)

    def answer(self, text):
        return {"text": text, "answer_start": self.CONTEXT.index(text)}

    def test_every_part_knows_its_answer_and_the_way_back(self, squad_file):
        example, tokenizer = load_example("finetune_qa"), AutoTokenizer.from_pretrained(DEMO)
        args = example.parse_args(
            ["--train-data", squad_file, "--output-dir", "", "--max-length", "128", "--stride", "32"]
        )
        questions = example.read_questions(squad_file, "train")
        inputs, places = example.cut_into_parts(questions, tokenizer, args)
        assert len(inputs) > 4
        found = {}
        for row, (number, offsets) in zip(example.add_answers(inputs, places, questions), places, strict=True):
            if row["start_positions"]:
                first, last = offsets[row["start_positions"]][0], offsets[row["end_positions"]][1]
                found[questions[number]["id"]] = self.CONTEXT[first:last].strip()
        assert found == {"1": "Sarai", "2": "Isaac"}

    def test_best_span_of_all_parts_is_the_answer(self, squad_file):
        example, tokenizer = load_example("finetune_qa"), AutoTokenizer.from_pretrained(DEMO)
        args = example.parse_args(
            ["--train-data", squad_file, "--output-dir", "", "--max-length", "128", "--stride", "32"]
        )
        questions = example.read_questions(squad_file, "train")
        inputs, places = example.cut_into_parts(questions, tokenizer, args)
        example.add_answers(inputs, places, questions)
        logits = [
            [[5.0 * (i == row[key] > 0) for i in range(len(row["input_ids"]))] for row in inputs]
            for key in ("start_positions", "end_positions")
        ]
        assert self.best(example, logits, places, questions) == {"1": "Sarai", "2": "Isaac"}
        assert example.score({"1": "the Sarai!", "2": "Isaac begat"}, questions) == {
            "exact_match": 50.0,
            "f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        }

    @staticmethod
    def best(example, logits, places, questions):
        import numpy as np

        return example.best_answers(*([np.array(row) for row in rows] for rows in logits), places, questions, 30)

    def test_script(self, squad_file, tmp_path, capsys):
        output = tmp_path / "reader"
        load_example("finetune_qa").main(
            [
                *QUICK,
                "--train-data",
                squad_file,
                "--eval-data",
                squad_file,
                "--model",
                DEMO,
                "--output-dir",
                str(output),
                "--stride",
                "32",
            ]
        )
        assert "exact match" in capsys.readouterr().out
        answers = json.loads((output / "predictions.json").read_text())
        assert answers.keys() == {"1", "2"}
        assert all(answer in self.CONTEXT for answer in answers.values())
