"""The examples of transformers' BigBird page run unchanged: only the names of BigBird's classes come from us.

The page is made of the docstrings of the installed transformers and of two examples of its own. What they download is
replaced: the checkpoints by small ones with random weights, the article by a text of about the same length.
"""

import doctest
import io
import math
import re
import sys
from types import ModuleType

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from bigbird_plus.demo import document

doctest.register_optionflag("IGNORE_RESULT")  # stands in the examples

SENTENCE = "Plants create [MASK] through a process known as photosynthesis."
ARTICLE = f"{document()[:4200]} The highest values are very close to the theoretical maximum value."
SQUAD = {81514: {"context": ARTICLE, "question": "During daytime how high can the temperatures reach?"}}


@pytest.fixture(scope="module", autouse=True)
def hub(checkpoint, add_to_hub_cache):
    """The names that the page loads from."""
    for name in ("google/bigbird-roberta-base", "l-yohai/bigbird-roberta-base-mnli"):
        add_to_hub_cache(name, checkpoint)


@pytest.fixture
def run_example(monkeypatch):
    """Runs the example in a docstring, and gives back the variables it has set."""
    datasets = ModuleType("datasets")
    datasets.load_dataset = lambda *_, **__: SQUAD
    monkeypatch.setitem(sys.modules, "datasets", datasets)

    def run(docstring: str) -> dict:
        statements = [example.source for example in doctest.DocTestParser().get_examples(docstring)]
        variables = {}
        exec(with_our_classes("".join(statements)), variables)
        return variables

    return run


def with_our_classes(source: str) -> str:
    """`source` with `BigBird...` imported from `bigbird_plus`, and the other names from where they were."""

    def split_import(statement):
        names = statement[1].split(", ")
        ours = [name for name in names if name.startswith("BigBird")]
        others = [name for name in names if name not in ours]
        lines = [f"from bigbird_plus import {', '.join(ours)}"] if ours else []
        lines += [f"from transformers import {', '.join(others)}"] if others else []
        return "\n".join(lines)

    return re.sub(r"^from transformers import (.+)$", split_import, source, flags=re.MULTILINE)


def docstring_of(name: str) -> str:
    return getattr(transformers, name).forward.__doc__


def assert_is_ours(instance):
    assert type(instance).__module__.startswith("bigbird_plus."), type(instance)


def test_configuration(run_example):
    variables = run_example(transformers.BigBirdConfig.__doc__)
    assert_is_ours(variables["model"])
    assert variables["configuration"] is variables["model"].config
    assert variables["model"].num_parameters() == 127_468_800  # as google/bigbird-roberta-base, with its pooler


def test_pre_training(run_example):
    variables = run_example(docstring_of("BigBirdForPreTraining"))
    assert_is_ours(variables["model"])
    assert_is_ours(variables["tokenizer"])
    assert variables["prediction_logits"].shape == (1, 8, 50358)
    assert variables["seq_relationship_logits"].shape == (1, 2)


def test_masked_lm(run_example):
    variables = run_example(docstring_of("BigBirdForMaskedLM"))
    assert_is_ours(variables["model"])
    length = variables["inputs"]["input_ids"].shape[1]
    assert length > 11 * 64  # read sparsely
    assert variables["logits"].shape == (1, length, 50358)
    assert variables["mask_token_index"].shape == (1,)
    target = variables["labels"][0, variables["mask_token_index"]]
    assert variables["tokenizer"].decode(target).strip() == "maximum"
    log_probabilities = variables["logits"][0, variables["mask_token_index"]].log_softmax(-1)
    torch.testing.assert_close(variables["outputs"].loss, -log_probabilities[0, target[0]])


def test_sequence_classification(run_example):
    variables = run_example(docstring_of("BigBirdForSequenceClassification"))
    assert_is_ours(variables["model"])
    assert variables["logits"].shape == (1, 2)
    assert variables["model"].config.id2label[variables["predicted_class_id"]] in ("LABEL_0", "LABEL_1")
    assert math.isfinite(variables["loss"].item())


def test_multiple_choice(run_example):
    variables = run_example(docstring_of("BigBirdForMultipleChoice"))
    assert_is_ours(variables["model"])
    assert variables["logits"].shape == (1, 2)
    torch.testing.assert_close(variables["loss"], -variables["logits"].log_softmax(-1)[0, 0])


def test_token_classification(run_example):
    variables = run_example(docstring_of("BigBirdForTokenClassification"))
    assert_is_ours(variables["model"])
    length = variables["inputs"]["input_ids"].shape[1]
    assert variables["logits"].shape == (1, length, 2)
    assert len(variables["predicted_tokens_classes"]) == length
    best = variables["logits"].log_softmax(-1).amax(-1)
    torch.testing.assert_close(variables["loss"], -best.mean())


def test_question_answering(run_example):
    variables = run_example(docstring_of("BigBirdForQuestionAnswering"))
    assert_is_ours(variables["model"])
    length = variables["inputs"]["input_ids"].shape[1]
    assert length > 11 * 64  # read sparsely
    assert variables["outputs"].start_logits.shape == (1, length)
    question_end = variables["inputs"]["input_ids"][0].tolist().index(variables["tokenizer"].sep_token_id)
    assert not 0 < variables["answer_start_index"] <= question_end  # a question does not hold its answer
    assert math.isfinite(variables["loss"].item())


def test_every_example_is_run():
    with_example = {
        name
        for name in dir(transformers)
        if re.fullmatch(r"BigBird(Model|For\w+)", name)
        and isinstance(getattr(transformers, name), type)
        and doctest.DocTestParser().get_examples(docstring_of(name) or "")
    }
    heads = ("PreTraining", "MaskedLM", "SequenceClassification", "MultipleChoice")
    assert with_example == {f"BigBirdFor{head}" for head in (*heads, "TokenClassification", "QuestionAnswering")}


def test_pipeline_in_half_precision():
    fill = pipeline(task="fill-mask", model="google/bigbird-roberta-base", dtype=torch.float16)
    assert_is_ours(fill.model)
    assert_is_ours(fill.tokenizer)
    assert fill.model.dtype == torch.float16
    predictions = fill(SENTENCE)
    assert len(predictions) == 5
    assert all(0 < prediction["score"] < 1 for prediction in predictions)
    assert all(prediction["sequence"].startswith("Plants create") for prediction in predictions)


def test_auto_model_in_half_precision():
    tokenizer = AutoTokenizer.from_pretrained("google/bigbird-roberta-base")
    model = AutoModelForMaskedLM.from_pretrained("google/bigbird-roberta-base", dtype=torch.float16, device_map="auto")
    assert_is_ours(model)
    inputs = tokenizer(SENTENCE, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model(**inputs).logits
    masked = torch.where(inputs["input_ids"] == tokenizer.mask_token_id)[1]
    assert masked.tolist() == [3]
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()
    assert tokenizer.decode(logits[0, masked].argmax(dim=-1))


def test_command_line(run_command, monkeypatch):
    """The page pipes a sentence into `transformers run`, which knows no plugins and is gone from transformers 5."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(SENTENCE))
    shown = run_command("fill-mask", "--model", "google/bigbird-roberta-base")
    predictions = re.findall(r"│ 1 +│ (.+?) +│ (\S+) +│", shown)
    assert len(predictions) == 5
    assert all(0 < float(probability) < 1 for _, probability in predictions)
