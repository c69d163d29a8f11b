"""A classifier finds a fact far away from `[CLS]`, and cannot without global tokens."""

import pytest
import torch
from transformers import set_seed

import bigbird_plus
from tests.training.common import make_trainer

LENGTH, FACTS = 3072, (5, 6)
FACT_LENGTH = 96
NEAREST, FARTHEST = 130, 3000


def documents(count, seed):
    """Noise, and in it tokens that say one of two facts, all of them 130 to 3,000 tokens behind `[CLS]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 30, (count, LENGTH), generator=generator)
    labels = torch.arange(count) % 2
    first = torch.randint(NEAREST, FARTHEST - FACT_LENGTH + 2, (count, 1), generator=generator)
    places = first + torch.arange(FACT_LENGTH)
    ids.scatter_(1, places, torch.tensor(FACTS)[labels][:, None].expand_as(places))
    ids[:, 0] = 3
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def final_loss(folder, **pattern):
    """Training loss of a one-layer classifier at the end."""
    set_seed(0)
    config = bigbird_plus.BigBirdConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        block_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **pattern,
    )
    trainer = make_trainer(
        bigbird_plus.BigBirdForSequenceClassification(config),
        documents(256, seed=1),
        folder,
        max_steps=50,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=10,
    )
    trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


@pytest.mark.slow
def test_bigbird_learns_a_fact_that_stands_far_away(tmp_path):
    assert final_loss(tmp_path, num_random_blocks=3) < 0.15


@pytest.mark.slow
def test_a_window_alone_does_not_see_it(tmp_path):
    assert final_loss(tmp_path, num_random_blocks=0, num_global_blocks=0) > 0.6


@pytest.mark.parametrize("place", [NEAREST, 500, FARTHEST])
def test_only_what_is_seen_moves_the_answer(place):
    """Why: in one layer the first token of the window-only model reads two blocks, whatever stands behind them."""
    config = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 16}
    for pattern, seen in (({}, True), ({"num_global_blocks": 0, "num_random_blocks": 0}, False)):
        torch.manual_seed(0)
        model = bigbird_plus.BigBirdForSequenceClassification(
            bigbird_plus.BigBirdConfig(**config, **pattern, initializer_range=0.2)
        ).eval()
        ids = torch.full((2, LENGTH), 10)
        ids[0, place], ids[1, place] = FACTS
        logits = model(ids).logits
        assert torch.equal(logits[0], logits[1]) != seen
