"""sentence-transformers: embeddings of documents, of batches as of each alone, and their training."""

import importlib.util

import pytest
import torch
import transformers.modeling_flash_attention_utils
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer

import bigbird_plus
from bigbird_plus import demo
from tests.peers import make_model

SHORT, MIDDLE, LONG = (" ".join(demo.document().split()[:words]) for words in (10, 50, 120))
DOCUMENTS = [SHORT, MIDDLE, LONG]  # the last has more than the 88 tokens that are read in full


def saved(name, folder, **fields):
    """The folder of a small model, with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())
    make_model(name, vocab_size=len(tokenizer), **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def embedder(folder, pooling="mean", **fields):
    transformer = Transformer(saved("BigBirdModel", folder, **fields), max_seq_length=256)
    assert isinstance(transformer.auto_model, bigbird_plus.BigBirdModel)
    return SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode=pooling)], device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_of_a_padded_batch_are_those_of_each_alone(pooling, tmp_path):
    model = embedder(tmp_path, pooling, pattern_per_document=True)
    lengths = [len(model.tokenizer(text)["input_ids"]) for text in DOCUMENTS]
    assert lengths[0] < lengths[1] < 88 < lengths[2]
    together = model.encode(DOCUMENTS, batch_size=3, convert_to_tensor=True)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in DOCUMENTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_tensor_decides_by_default(tmp_path):
    """As in transformers' BigBird: a short document is read sparsely in a long batch."""
    model = embedder(tmp_path)
    together = model.encode(DOCUMENTS, batch_size=3, convert_to_tensor=True)
    assert (together[1] - model.encode(MIDDLE, convert_to_tensor=True)).abs().max() > 1e-3


def rows():
    sentences = demo.document().split(".")
    return Dataset.from_dict({"anchor": sentences[:8], "positive": sentences[1:9]})


def train(model, folder):
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows(), loss=loss)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0]


@pytest.mark.parametrize("fields", [{}, {"pattern_per_document": True}], ids=["default", "per document"])
def test_trained_saved_and_loaded(fields, tmp_path):
    model = embedder(tmp_path / "model", **fields)
    train(model, tmp_path)
    model.save_pretrained(str(tmp_path / "trained"))
    loaded = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    assert loaded[0].auto_model.config.pattern_per_document == bool(fields)
    torch.testing.assert_close(*(one.encode(DOCUMENTS, convert_to_tensor=True) for one in (loaded, model)))


def test_an_adapter_trained_merged_saved_and_loaded(tmp_path):
    model = embedder(tmp_path / "model", pattern_per_document=True)
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, target_modules=["query", "value"])
    adapted = get_peft_model(model[0].auto_model, config)  # in place
    before = model.encode(DOCUMENTS, convert_to_tensor=True)
    train(model, tmp_path)
    expected = model.encode(DOCUMENTS, convert_to_tensor=True)
    assert (expected - before).abs().max() > 1e-3
    adapted.merge_and_unload()
    model.save_pretrained(str(tmp_path / "trained"))
    loaded = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    torch.testing.assert_close(loaded.encode(DOCUMENTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-4)


def test_cross_encoder(tmp_path):
    folder = saved("BigBirdForSequenceClassification", tmp_path, num_labels=1, pattern_per_document=True)
    encoder = CrossEncoder(folder, max_length=256, device="cpu")
    pairs = [(SHORT, MIDDLE), (SHORT, SHORT), (LONG, LONG)]
    together = encoder.predict(pairs, batch_size=3, convert_to_tensor=True)
    alone = torch.stack([encoder.predict(pair, convert_to_tensor=True) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# Batches without padding, which sentence-transformers makes from version 6 on where flash attention is asked for


def flatten_batches(transformer, monkeypatch):
    """Lets sentence-transformers believe that flash attention computes, as on a GPU; our own does."""
    functions = (None, lambda *args: None, None, None, None), (None, None)
    module = transformers.modeling_flash_attention_utils
    monkeypatch.setattr(module, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    monkeypatch.setattr(type(transformer), "_is_flash_attention_requested", lambda self: True)
    transformer.unpad_inputs = True  # it looks again
    assert transformer.can_flatten_inputs


if hasattr(Transformer, "_is_flash_attention_requested"):

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_embeddings_of_a_flattened_batch_are_those_of_each_alone(pooling, tmp_path, monkeypatch):
        model = embedder(tmp_path, pooling, pattern_per_document=True)
        padded = model.encode(DOCUMENTS, batch_size=3, convert_to_tensor=True)
        alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in DOCUMENTS])
        flatten_batches(model[0], monkeypatch)
        features = model.preprocess(DOCUMENTS)
        assert features["input_ids"].shape[0] == 1
        assert len(features["cu_seq_lens_q"]) == 4
        flattened = model.encode(DOCUMENTS, batch_size=3, convert_to_tensor=True)
        for other in (padded, alone):
            torch.testing.assert_close(flattened, other, rtol=0, atol=5e-6)

    def test_gradients_of_a_flattened_batch(tmp_path, monkeypatch):
        model = embedder(tmp_path, pattern_per_document=True)
        found = []
        for flattens in (False, True):
            if flattens:
                flatten_batches(model[0], monkeypatch)
            model.zero_grad()
            texts = [DOCUMENTS, [text[20:] for text in DOCUMENTS]]
            loss = MultipleNegativesRankingLoss(model)([model.preprocess(some) for some in texts], None)
            loss.backward()
            found.append([loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
        for gradient, expected in zip(*found, strict=True):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6


if importlib.util.find_spec("sentence_transformers.multi_vector_encoder"):

    def test_vectors_of_all_tokens(tmp_path, monkeypatch):
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        folder = saved("BigBirdModel", tmp_path, pattern_per_document=True)
        transformer = Transformer(folder, max_seq_length=256)
        modules = [transformer, MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
        model = MultiVectorEncoder(modules=modules, device="cpu")
        alone = [model.encode_document(text) for text in DOCUMENTS]
        padded = model.encode_document(DOCUMENTS, batch_size=3)
        flatten_batches(transformer, monkeypatch)
        flattened = model.encode_document(DOCUMENTS, batch_size=3)
        for documents in (padded, flattened):
            for document, expected in zip(documents, alone, strict=True):
                torch.testing.assert_close(document, expected, rtol=0, atol=1e-5)
