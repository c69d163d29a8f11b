"""Every head trains with `Trainer` as it is."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainingArguments,
    default_data_collator,
)

import bigbird_plus
from tests import fresh
from tests.peers import TASK_MODELS, few_are_quick
from tests.training import resumable
from tests.training.common import labelled_rows, make_trainer, tiny_model, trained_weights

LABELS = {
    "BigBirdForPreTraining": ["labels", "next_sentence_label"],
    "BigBirdForQuestionAnswering": ["start_positions", "end_positions"],
}


def assert_same_weights(weights, others, **tolerance):
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", TASK_MODELS)
def test_every_head_learns_and_its_labels_are_found(name, tmp_path):
    rows = labelled_rows(name)
    trainer = make_trainer(tiny_model(name), rows, tmp_path, eval_dataset=rows, max_steps=4, learning_rate=3e-3)
    assert trainer.label_names == LABELS.get(name, ["labels"])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.02


@pytest.mark.parametrize("name", TASK_MODELS)
def test_bfloat16_moves_the_float32_weights_as_float32_does(name, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.05}
    start = {key: value.clone() for key, value in tiny_model(name).state_dict().items()}
    exact = trained_weights(name, tmp_path, **settings)
    mixed = trained_weights(name, tmp_path, bf16=True, **settings)
    assert all(weight.dtype is torch.float32 for weight in mixed.values())
    moves = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in (exact, mixed)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.98
    assert moves[0].norm() > 1e-3


@pytest.mark.parametrize("name", TASK_MODELS)
def test_accumulated_gradients_have_the_scale_of_those_of_one_batch(name, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    at_once = trained_weights(name, tmp_path, **settings)
    in_parts = trained_weights(
        name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    assert_same_weights(in_parts, at_once, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", TASK_MODELS)
def test_gradient_checkpointing_changes_nothing(name, use_reentrant, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    plain = trained_weights(name, tmp_path, **settings)
    checkpointed = trained_weights(
        name,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    )
    assert_same_weights(checkpointed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", few_are_quick(TASK_MODELS))
def test_torch_compile_changes_nothing(name, tmp_path):
    """The graph, forward and backward; inductor's own code for it is torch's, and takes a minute to make."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "settings": {"num_hidden_layers": 1}}
    plain = trained_weights(name, tmp_path, **settings)
    torch._dynamo.reset()
    compiled = trained_weights(name, tmp_path, torch_compile_backend="aot_eager", **settings)
    compiled = {key.removeprefix("_orig_mod."): value for key, value in compiled.items()}
    assert_same_weights(compiled, plain, atol=2e-6, rtol=1e-4)


def group_by_length():
    """The argument for it, which has another name in newer transformers."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"group_by_length": True} if "group_by_length" in fields else {"train_sampling_strategy": "group_by_length"}


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self, collator):
        self.collator = collator
        self.batches = []

    def __call__(self, rows):
        self.batches.append(self.collator(rows))
        return self.batches[-1]


def test_inputs_of_like_lengths_are_grouped_and_padded_to_blocks(demo_tokenizer, tmp_path):
    texts = ["word " * (3 if row % 2 else 100 + row) for row in range(64)]
    rows = [{**demo_tokenizer(text), "labels": row % 2} for row, text in enumerate(texts)]
    collator = Recorder(DataCollatorWithPadding(demo_tokenizer, pad_to_multiple_of=8))
    model = tiny_model("BigBirdForSequenceClassification", vocab_size=len(demo_tokenizer), sep_token_id=4)
    trainer = make_trainer(model, rows, tmp_path, data_collator=collator, max_steps=16, **group_by_length())
    assert np.isfinite(trainer.train().training_loss)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in collator.batches)
    lengths = [batch["attention_mask"].sum(1) for batch in collator.batches[:16]]
    alike = [bool(of_batch.min() > 90 or of_batch.max() < 20) for of_batch in lengths]
    assert sum(alike) > 8  # two of sixteen by chance


@pytest.mark.parametrize("name", TASK_MODELS)
def test_evaluation_gathers_what_each_head_says_of_inputs_of_all_lengths(name, tmp_path):
    lengths, seen = (96, 40, 131), []
    rows = [row for length in lengths for row in labelled_rows(name, count=2, length=length, seed=length)]
    settings = {"per_device_eval_batch_size": 2, "compute_metrics": lambda prediction: seen.append(prediction) or {}}
    trainer = make_trainer(tiny_model(name), rows, tmp_path, eval_dataset=rows, **settings)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    predictions, label_ids = seen[0].predictions, seen[0].label_ids
    if isinstance(predictions, tuple):  # of two heads, or of the first and the last token
        assert len(predictions) == len(label_ids) == 2
        predictions = predictions[0]
    with torch.no_grad():
        expected = trainer.model.eval()(**default_data_collator(rows[2:4])).to_tuple()[1].numpy()
    found = predictions[2:4]
    assert len(predictions) == len(rows)
    places = tuple(slice(size) for size in expected.shape)  # the others are filled up to the longest
    np.testing.assert_allclose(found[places], expected, atol=1e-5)


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def test_evaluation_with_metrics_stops_a_run_that_gets_no_better(tmp_path):
    name = "BigBirdForSequenceClassification"
    trainer = make_trainer(
        tiny_model(name),
        labelled_rows(name),
        tmp_path,
        eval_dataset=labelled_rows(name, seed=5),
        compute_metrics=accuracy,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        learning_rate=0.0,
        max_steps=50,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best; two more are waited for
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = resumable.train(tmp_path / "whole")
    process = fresh.start(resumable.train_until_killed, tmp_path / "killed", folder=tmp_path)
    process.join()
    assert process.exitcode == -9
    assert (tmp_path / "killed" / "checkpoint-3").is_dir()
    assert not (tmp_path / "killed" / "checkpoint-6").exists()
    resumed = resumable.train(tmp_path / "killed", resume=True)
    assert_same_weights(resumed, whole, atol=0, rtol=0)


@pytest.fixture(scope="session")
def demo_tokenizer():
    return bigbird_plus.BigBirdTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())


class TestCollators:
    def test_masked_language_modelling(self, demo_tokenizer):
        torch.manual_seed(0)
        rows = [demo_tokenizer("In the beginning God created the heaven and the earth. " * n) for n in (3, 9)]
        batch = DataCollatorForLanguageModeling(demo_tokenizer, pad_to_multiple_of=32)(rows)
        special = {demo_tokenizer.cls_token_id, demo_tokenizer.sep_token_id, demo_tokenizer.pad_token_id}
        counted = batch["labels"] != -100
        assert counted.any()
        assert not special & set(batch["labels"][counted].tolist())
        assert batch["input_ids"].shape[1] % 32 == 0
        model = tiny_model("BigBirdForMaskedLM", vocab_size=len(demo_tokenizer))
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()
        assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0

    def test_token_classification_leaves_padding_out(self, demo_tokenizer):
        rows = [demo_tokenizer("And God said " * n) for n in (1, 25)]
        rows = [{**row, "labels": [1] * len(row["input_ids"])} for row in rows]
        batch = DataCollatorForTokenClassification(demo_tokenizer, pad_to_multiple_of=8)(rows)
        assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
        model = tiny_model("BigBirdForTokenClassification", vocab_size=len(demo_tokenizer))
        alone = [model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss for row in rows]
        lengths = torch.tensor([float(len(row["input_ids"])) for row in rows])
        assert lengths.max() <= 80  # more would be read in another pattern than the short one by itself
        torch.testing.assert_close(model(**batch).loss, (torch.stack(alone) * lengths).sum() / lengths.sum())
