"""evaluate's evaluators, on our models."""

import datasets
from evaluate import EvaluationModuleInfo, Metric, evaluator
from transformers import AutoTokenizer

import bigbird_plus
from tests.peers import make_pair

TEXTS = ["In the beginning God created", "And God said,", "And there was light. " * 3, "And it was so."]


class Accuracy(Metric):
    """The metric of that name, which evaluate would download."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return EvaluationModuleInfo(description="", citation="", features=features, module_name="accuracy")

    def _compute(self, predictions, references):
        hits = [one == other for one, other in zip(predictions, references, strict=True)]
        return {"accuracy": sum(hits) / len(hits)}


def test_text_classification_as_with_transformers():
    tokenizer = AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())
    settings = {"vocab_size": len(tokenizer), "attention_type": "original_full"}
    model, theirs = make_pair("BigBirdForSequenceClassification", **settings)
    labels = [theirs(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in TEXTS]
    labels[0] = 1 - labels[0]
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": labels})
    found = evaluator("text-classification").compute(
        model, data=rows, metric=Accuracy(), tokenizer=tokenizer, label_mapping=model.config.label2id
    )
    assert found["accuracy"] == 0.75
