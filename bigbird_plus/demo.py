"""What `bigbird-plus demo` shows: a small trained BigBird, and a real document with words to fill in."""

import re
from pathlib import Path

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
    """The attention type and the implementation with which a BigBird reads an input of `length` tokens."""
    attention_type = model.base_model.attention_type
    if length <= Sparsity.from_config(model.config).full_attention_length:
        attention_type = "original_full"
    return attention_type, model.config._attn_implementation
