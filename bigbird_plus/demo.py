"""What `bigbird-plus demo` shows: a small trained BigBird, and a real document with words to fill in."""

import re
from pathlib import Path

import torch

from .attention import full_engine, sparse_engine
from .attention.pattern import Sparsity

DATA = Path(__file__).parent / "data"


def demo_checkpoint() -> Path:
    """The folder of a small BigBird that comes with the package: 2,048 positions, trained on the King James Bible.

    It loads as any checkpoint does, `AutoModelForMaskedLM.from_pretrained(demo_checkpoint())`. Its `README.md` says
    how it was made and what it is worth.
    """
    return DATA / "demo"


def document() -> str:
    """The beginning of the Book of Ruth, which the demo checkpoint was not trained on: over 2,000 of its tokens."""
    return " ".join((demo_checkpoint() / "excerpt.txt").read_text(encoding="utf-8").split())


def mask_words(text: str, mask_token: str, count: int) -> tuple[str, list[re.Match]]:
    """Replaces `count` words, at even distances, by the mask token.

    Returns:
        The new text, and the words as matches in the old one.
    """
    words = list(re.finditer(r"(?<= )[a-z]{4,}(?= )", text))
    chosen = words[:: max(1, len(words) // count)][:count]
    ends = [0, *(word.end() for word in chosen)]
    kept = [text[end : word.start()] for end, word in zip(ends, chosen, strict=False)]
    return mask_token.join([*kept, text[ends[-1] :]]), chosen


def attention_in_use(model, length: int) -> tuple[str, str]:
    """How a BigBird encoder reads `length` tokens, in training if it is in that mode, else without gradients.

    Returns:
        The attention type, and the engine that computes it. That need not be `attn_implementation`, which falls back
        to another where it cannot.
    """
    config, attention_type = model.config, model.base_model.attention_type
    head_dim = config.hidden_size // config.num_attention_heads
    states = torch.empty(0, head_dim, dtype=model.dtype, device=model.device, requires_grad=model.training)
    if attention_type == "block_sparse" and length > Sparsity.from_config(config).full_attention_length:
        how = {"block_size": config.block_size, "has_global_tokens": config.num_extra_global_tokens > 0}
        return attention_type, sparse_engine(config._attn_implementation, states, states, states, **how)
    dropout = config.attention_probs_dropout_prob if model.training else 0.0
    return "original_full", full_engine(config._attn_implementation, states, dropout)
