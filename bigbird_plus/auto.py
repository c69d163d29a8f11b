"""Registration with transformers' Auto classes, and the way back. The only module that touches their tables."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
)
from transformers.models.auto import configuration_auto, tokenization_auto
from transformers.pipelines import PIPELINE_REGISTRY

from .attention.engines import AUTOMATIC, name_to_transformers
from .configuration_big_bird import BigBirdConfig
from .modeling_big_bird import BigBirdModel
from .modeling_heads import (
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from .pipelines import TASK, ExtractiveQuestionAnsweringPipeline
from .tokenization_big_bird import BigBirdTokenizer
from .tokenization_big_bird_fast import BigBirdTokenizerFast

# An Auto class without an entry would build the built-in model from our configuration, without an error.
AUTO_MODELS = {
    "AutoModel": BigBirdModel,
    "AutoModelForPreTraining": BigBirdForPreTraining,
    "AutoModelForMaskedLM": BigBirdForMaskedLM,
    "AutoModelForCausalLM": BigBirdForCausalLM,
    "AutoModelForSequenceClassification": BigBirdForSequenceClassification,
    "AutoModelForMultipleChoice": BigBirdForMultipleChoice,
    "AutoModelForTokenClassification": BigBirdForTokenClassification,
    "AutoModelForQuestionAnswering": BigBirdForQuestionAnswering,
    "AutoModelForTextEncoding": BigBirdModel,
    "AutoModelWithLMHead": BigBirdForMaskedLM,  # transformers 4 only
}

_MISSING = object()
_replaced: list[tuple[dict, Any, Any]] = []  # table, key, what was there (_MISSING: nothing)


def auto_classes() -> dict[type, type]:
    """Auto class to model class, for the Auto classes that the installed transformers has."""
    return {getattr(transformers, name): model for name, model in AUTO_MODELS.items() if hasattr(transformers, name)}


def tables() -> list[dict]:
    """Every table that `register` writes to."""
    auto_mappings = [auto_class._model_mapping for auto_class in auto_classes()]
    lazy_mappings = [configuration_auto.CONFIG_MAPPING, tokenization_auto.TOKENIZER_MAPPING, *auto_mappings]
    names = ("TOKENIZER_MAPPING_NAMES", "REGISTERED_TOKENIZER_CLASSES", "REGISTERED_FAST_ALIASES")  # the last two: 5.x
    by_name = [getattr(tokenization_auto, name) for name in names if hasattr(tokenization_auto, name)]
    pipelines = PIPELINE_REGISTRY.supported_tasks
    by_name += [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    return [*(mapping._extra_content for mapping in lazy_mappings), *by_name, *peft_tables(), pipelines]


def peft_tables() -> list[dict]:
    """PEFT's tables of the layers that adapters go to, a table a method, by `model_type`. None without PEFT."""
    try:
        from peft.utils import constants
    except ImportError:
        return []
    return [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_") and "bert" in table]


def register() -> None:
    """Make the Auto classes (and so pipelines) use this package for `model_type` "big_bird". Idempotent.

    `transformers.BigBirdModel` and its like stay what they are.
    """
    if _replaced:
        return
    before = [(table, dict(table)) for table in tables()]
    AutoConfig.register(BigBirdConfig.model_type, BigBirdConfig, exist_ok=True)
    for auto_class, model_class in auto_classes().items():
        auto_class.register(BigBirdConfig, model_class, exist_ok=True)
    AutoTokenizer.register(
        BigBirdConfig,
        slow_tokenizer_class=BigBirdTokenizer,
        fast_tokenizer_class=BigBirdTokenizerFast,
        exist_ok=True,
    )
    prefer_registered_tokenizers()
    register_pipeline()
    for name in AUTOMATIC:
        name_to_transformers(name)
    for table in peft_tables():
        table.setdefault(BigBirdConfig.model_type, table["bert"])  # the layers have BERT's names
    for table, old in before:
        changed = (key for key, value in table.items() if value is not old.get(key, _MISSING))
        _replaced.extend((table, key, old.get(key, _MISSING)) for key in changed)


def unregister() -> None:
    """Put back what `register` found. Idempotent."""
    while _replaced:
        table, key, value = _replaced.pop()
        if value is _MISSING:
            table.pop(key, None)
        else:
            table[key] = value


def register_pipeline() -> None:
    """Give `pipeline` the task "extractive-question-answering"."""
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=ExtractiveQuestionAnsweringPipeline,
        pt_model=AutoModelForQuestionAnswering,
        type="text",
    )
    # Where transformers finds this, it saves a copy of the class's source with each model, and asks to trust it.
    del ExtractiveQuestionAnsweringPipeline._registered_impl


class _HiddenNames(tuple):
    """Class names that a search for a name does not find; otherwise a tuple like any other."""

    __slots__ = ()

    def __contains__(self, name: object) -> bool:
        return False


def prefer_registered_tokenizers() -> None:
    """Let the class name in a checkpoint lead to the registered tokenizer.

    transformers 4 searches its own names before the registered classes, and every BigBird checkpoint names its class.
    """
    found = tokenization_auto.tokenizer_class_from_name(BigBirdTokenizer.__name__)
    if found not in (BigBirdTokenizer, BigBirdTokenizerFast):
        names = tokenization_auto.TOKENIZER_MAPPING_NAMES
        names[BigBirdConfig.model_type] = _HiddenNames(names[BigBirdConfig.model_type])
