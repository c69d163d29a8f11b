"""What `bigbird-plus demo` shows: a small trained BigBird, and a real document with words to fill in."""

import re
from pathlib import Path

import torch

from .attention import full
from .attention.parts import Tokens
from .attention.plan import full_implementation, make_plan

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


def attention_in_use(model, length: int) -> tuple[str, str, dict[str, str]]:
    """How a BigBird encoder reads `length` tokens, in training if it is in that mode, else without gradients.

    Returns:
        The attention type; what computes it, an engine of ours or the attention function of transformers; and the
        engines that were passed over, with their reasons.
    """
    attention_type = model.base_model.attention_type
    with torch.set_grad_enabled(model.training):
        plan = make_plan(
            model.config, attention_type, Tokens(1, torch.arange(length, device=model.device), model.dtype)
        )
    if plan.choice is not None:
        return attention_type, plan.choice.name, plan.choice.passed_over
    dropout = model.config.attention_probs_dropout_prob if model.training else 0.0
    return "original_full", full.function_name(full_implementation(model.config), model.device, dropout), {}
