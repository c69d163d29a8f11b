"""The demo checkpoint is what its model card says."""

import re

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bigbird_plus
from bigbird_plus.demo import document

DEMO = bigbird_plus.demo_checkpoint()
EVERY = 7


def held_out_loss(model, input_ids, mask_token_id):
    """Mean loss over all tokens of `[batch, length]` but the first and the last, each predicted once: in a text that
    has the mask in the place of it and of every seventh token from it on."""
    place = torch.arange(input_ids.shape[1])
    losses = []
    for first in range(EVERY):
        masked = (place % EVERY == first) & (place > 0) & (place < input_ids.shape[1] - 1)
        with torch.no_grad():
            logits = model(input_ids.masked_fill(masked, mask_token_id)).logits[:, masked].float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, masked].flatten(), reduction="none")
        )
    return torch.cat(losses).mean().item()


def in_model_card(row):
    """The figure of the excerpt in a row of the model card's table."""
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    return float(re.search(rf"^\| {re.escape(row)} \|.*\| ([\d.]+) \|$", card, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def excerpt(tokenizer):
    return tokenizer(document(), return_tensors="pt")["input_ids"]


def load(**settings):
    return AutoModelForMaskedLM.from_pretrained(DEMO, dtype=torch.float32, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, settings",
    [
        ("block-sparse, block 0 in the place of random blocks", {"eval_random_blocks": False}),
        ("block-sparse, random blocks", {"eval_random_blocks": True}),
        ("full attention", {"attention_type": "original_full"}),
    ],
)
def test_loss_on_the_excerpt(row, settings, tokenizer, excerpt):
    assert 2000 < excerpt.shape[1] <= 2048
    assert held_out_loss(load(**settings), excerpt, tokenizer.mask_token_id) == pytest.approx(
        in_model_card(row), abs=0.002
    )


@pytest.mark.slow
def test_it_has_learned_something(tokenizer, excerpt):
    untrained = bigbird_plus.BigBirdForMaskedLM(load().config).eval()
    loss = held_out_loss(untrained, excerpt, tokenizer.mask_token_id)
    assert loss == pytest.approx(in_model_card("untrained model"), abs=0.05)
    trained = in_model_card("block-sparse, random blocks")
    assert trained < in_model_card("frequencies of the tokens (unigram)") - 0.5
    assert trained < loss - 2


def test_the_guide_shows_the_same_figures():
    guide = (DEMO.parents[2] / "examples" / "guides" / "finetuning.md").read_text(encoding="utf-8")
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    rows = {
        "block-sparse, random blocks": "`eval_random_blocks=True`",
        "block-sparse, block 0 in the place of random blocks": "`eval_random_blocks=False`",
        "full attention": '`attention_type="original_full"`',
    }
    for row, setting in rows.items():
        figures = re.search(rf"^\| {re.escape(row)} (\|.*\|)$", card, re.MULTILINE)[1]
        assert re.search(rf"^\|.*{re.escape(setting)}.*\) {re.escape(figures)}$", guide, re.MULTILINE)


def test_it_is_small_and_complete():
    names = {path.name for path in DEMO.iterdir()}
    assert {"config.json", "model.safetensors", "spiece.model", "tokenizer_config.json", "README.md"} <= names
    assert (DEMO / "model.safetensors").stat().st_size < 10e6
    model = AutoModelForMaskedLM.from_pretrained(DEMO, dtype="auto")
    assert model.dtype is torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    assert model.config.block_size == 32


def test_tokenizers_agree(excerpt):
    slow = bigbird_plus.BigBirdTokenizer.from_pretrained(DEMO)
    fast = bigbird_plus.BigBirdTokenizerFast.from_pretrained(DEMO)
    assert slow(document())["input_ids"] == fast(document())["input_ids"] == excerpt[0].tolist()
    assert slow("[MASK] [CLS] [SEP]")["input_ids"] == [3, 5, 3, 4, 4]
