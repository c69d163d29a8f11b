"""trl: supervised fine-tuning of a decoder, and a reward model.

Its fine-tuning multiplies the hidden states by the output embeddings by itself, past the layer that a BERT's head has
between the two: `Tuner` takes the model's own loss.
"""

import datasets
import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import bigbird_plus
from tests.peers import make_model, make_pair

TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "And God said, Let there be light: and there was light.",
    "And the evening and the morning were the first day.",
]
SETTINGS = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": len(TEXTS),
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bigbird_plus.demo_checkpoint())


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 3
    return found


class Tuner(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def tuner(model, tokenizer, folder, repeats=1, **settings):
    """For a decoder, on the texts, each repeated so often."""
    rows = datasets.Dataset.from_dict({"text": [text * repeats for text in TEXTS]})
    arguments = SFTConfig(str(folder), **SETTINGS, **settings)
    return Tuner(model, arguments, train_dataset=rows, processing_class=tokenizer)


def loss_alone(model, documents):
    """The mean loss over the tokens of documents, each read by itself."""
    with torch.no_grad():
        logits = [model(document[None]).logits[0, :-1] for document in documents]
    return cross_entropy(torch.cat(logits), torch.cat([document[1:] for document in documents])).item()


def decoders(tokenizer):
    settings = {"is_decoder": True, "attention_type": "original_full", "vocab_size": len(tokenizer)}
    return make_pair("BigBirdForCausalLM", **settings)


def test_supervised_fine_tuning_is_that_of_transformers(tokenizer, tmp_path):
    trainers = [tuner(model, tokenizer, tmp_path) for model in decoders(tokenizer)]
    alone = loss_alone(trainers[0].model, [torch.tensor(row["input_ids"]) for row in trainers[0].train_dataset])
    found, expected = map(losses, trainers)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[0] == pytest.approx(alone, rel=1e-3)


def test_packed_documents_are_learned_as_alone(tokenizer, tmp_path):
    trainer = tuner(decoders(tokenizer)[0], tokenizer, tmp_path, packing=True, max_length=64)
    rows = [torch.tensor(row["input_ids"]).split(row["seq_lengths"]) for row in trainer.train_dataset]
    documents = [document for row in rows for document in row]
    assert len(rows) < len(documents) == len(TEXTS)
    alone = loss_alone(trainer.model, documents)
    assert losses(trainer)[0] == pytest.approx(alone, rel=1e-3)


def test_sparse_decoder_learns(tokenizer, tmp_path):
    model = make_model("BigBirdForCausalLM", is_decoder=True, vocab_size=len(tokenizer))
    found = losses(tuner(model, tokenizer, tmp_path, repeats=20, max_length=128))  # it reads up to 88 tokens in full
    assert found[-1] < found[0] - 0.2


def test_reward_model(tokenizer, tmp_path):
    chosen, rejected = ([text + end for text in TEXTS] for end in (" Good.", " Evil, and more of it."))
    settings = {"num_labels": 1, "attention_type": "original_full", "vocab_size": len(tokenizer)}
    model, theirs = make_pair("BigBirdForSequenceClassification", **settings)
    ended = ([text + tokenizer.eos_token for text in texts] for texts in (chosen, rejected))
    rewards = [theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits for texts in ended]
    rows = datasets.Dataset.from_dict({"chosen": chosen, "rejected": rejected})
    trainer = RewardTrainer(
        model, RewardConfig(str(tmp_path), **SETTINGS), train_dataset=rows, processing_class=tokenizer
    )
    found = losses(trainer)
    assert found[0] == pytest.approx(-logsigmoid(rewards[0] - rewards[1]).mean().item(), abs=1e-3)
    assert found[-1] < found[0]
