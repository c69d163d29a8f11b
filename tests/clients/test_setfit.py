"""setfit: a classifier of few examples, on our embeddings."""

import numpy
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from setfit import SetFitModel, Trainer, TrainingArguments

from .test_sentence_transformers import embedder

TEXTS = ["And God said", "And God made", "And Ruth said", "And Ruth went"] * 2
LABELS = [0, 0, 1, 1] * 2


def test_trained_saved_and_loaded(tmp_path):
    body = embedder(tmp_path / "body", pattern_per_document=True)
    body.save_pretrained(str(tmp_path / "body"))
    model = SetFitModel.from_pretrained(str(tmp_path / "body"), device="cpu")
    arguments = TrainingArguments(
        str(tmp_path / "run"), batch_size=8, max_steps=3, num_epochs=1, report_to="none", save_strategy="no"
    )
    rows = Dataset.from_dict({"text": TEXTS, "label": LABELS})
    trainer = Trainer(model, arguments, train_dataset=rows, metric=lambda found, labels: numpy.mean(found == labels))
    trainer.train()
    assert model.predict(TEXTS, as_numpy=True).tolist() == LABELS
    model.save_pretrained(str(tmp_path / "trained"))
    loaded = SetFitModel.from_pretrained(str(tmp_path / "trained"), device="cpu")
    assert isinstance(loaded.model_body, SentenceTransformer)
    numpy.testing.assert_allclose(
        *(one.predict_proba(TEXTS, as_numpy=True) for one in (loaded, model)), rtol=1e-4, atol=1e-5
    )
