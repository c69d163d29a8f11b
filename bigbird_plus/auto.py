"""Registration with transformers' Auto classes, and the way back. The only module that touches their tables."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BigBirdPegasusConfig,
    PreTrainedTokenizerFast,
    pipelines,
)
from transformers.models.auto import configuration_auto, tokenization_auto
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.quantizers import auto as quantizers

from . import configuration_big_bird, modeling_big_bird, modeling_bigbird_pegasus, modeling_heads
from .attention.engines import AUTOMATIC, name_to_transformers
from .configuration_big_bird import BigBirdConfig, BuiltInConfig
from .modeling_big_bird import BigBirdModel
from .modeling_bigbird_pegasus import (
    BigBirdPegasusForConditionalGeneration,
    BigBirdPegasusForQuestionAnswering,
    BigBirdPegasusForSequenceClassification,
    BigBirdPegasusModel,
)
from .modeling_heads import (
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForPreTraining,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from .pipelines import SUMMARIZATION, TASK, ExtractiveQuestionAnsweringPipeline, SummarizationPipeline
from .quantization import METHOD, BigBirdInt8Config, BigBirdInt8Quantizer
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
# Its decoder alone (AutoModelForCausalLM) stays transformers': it reads no documents.
PEGASUS_AUTO_MODELS: dict[str, type] = {
    "AutoModel": BigBirdPegasusModel,
    "AutoModelForSeq2SeqLM": BigBirdPegasusForConditionalGeneration,
    "AutoModelForSequenceClassification": BigBirdPegasusForSequenceClassification,
    "AutoModelForQuestionAnswering": BigBirdPegasusForQuestionAnswering,
    "AutoModelWithLMHead": BigBirdPegasusForConditionalGeneration,  # transformers 4 only
}

PEFT_TABLES = "peft.utils.constants"
BUILT_IN = "transformers.models.big_bird"
BUILT_IN_MODULES = {
    BUILT_IN: (
        "configuration_big_bird",
        "modeling_big_bird",
        "tokenization_big_bird",
        "tokenization_big_bird_fast",  # transformers 4 only
    ),
    "transformers.models.bigbird_pegasus": ("modeling_bigbird_pegasus",),
}

_MISSING = object()
_replaced: list[tuple[dict, Any, Any]] = []  # table, key, what was there (_MISSING: nothing)


def auto_classes(models: dict[str, type] = AUTO_MODELS) -> dict[Any, type]:
    """Auto class to model class, for the Auto classes that the installed transformers has."""
    return {getattr(transformers, name): model for name, model in models.items() if hasattr(transformers, name)}


def tables() -> list[dict]:
    """Every table of transformers that `register` writes to, and those of PEFT that are there by now."""
    auto_mappings = [auto_class._model_mapping for auto_class in auto_classes(AUTO_MODELS | PEGASUS_AUTO_MODELS)]
    lazy_mappings = [configuration_auto.CONFIG_MAPPING, tokenization_auto.TOKENIZER_MAPPING, *auto_mappings]
    names = ("TOKENIZER_MAPPING_NAMES", "REGISTERED_TOKENIZER_CLASSES", "REGISTERED_FAST_ALIASES")  # the last two: 5.x
    by_name = [getattr(tokenization_auto, name) for name in names if hasattr(tokenization_auto, name)]
    tasks = PIPELINE_REGISTRY.supported_tasks
    by_name += [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    by_name += [quantizers.AUTO_QUANTIZER_MAPPING, quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING]
    return [*(mapping._extra_content for mapping in lazy_mappings), *by_name, *peft_tables(), tasks]


def peft_tables() -> list[dict]:
    """PEFT's tables of the layers that adapters go to, a table a method, by `model_type`. None before PEFT is
    imported."""
    constants = vars(sys.modules[PEFT_TABLES]) if PEFT_TABLES in sys.modules else {}
    return [table for name, table in constants.items() if name.startswith("TRANSFORMERS_") and "bert" in table]


def register() -> None:
    """Make the Auto classes (and so pipelines) use this package for `model_type` "big_bird" and "bigbird_pegasus".
    Idempotent.

    That includes configurations of transformers' own class, from which our models take the fields.
    `transformers.BigBirdModel` and its like stay what they are: see `replace_builtin`.
    """
    if _replaced:
        return
    before = [(table, dict(table)) for table in tables()]
    AutoConfig.register(BigBirdConfig.model_type, BigBirdConfig, exist_ok=True)
    for config_class in (BigBirdConfig, BuiltInConfig):
        for auto_class, model_class in auto_classes().items():
            auto_class.register(config_class, model_class, exist_ok=True)
        AutoTokenizer.register(
            config_class,
            slow_tokenizer_class=BigBirdTokenizer,
            fast_tokenizer_class=BigBirdTokenizerFast,
            exist_ok=True,
        )
    for auto_class, model_class in auto_classes(PEGASUS_AUTO_MODELS).items():
        auto_class.register(BigBirdPegasusConfig, model_class, exist_ok=True)
    prefer_registered_tokenizers()
    register_pipelines()
    quantizers.AUTO_QUANTIZER_MAPPING[METHOD] = BigBirdInt8Quantizer
    quantizers.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BigBirdInt8Config
    for name in AUTOMATIC:
        name_to_transformers(name)
    for table, old in before:
        changed = (key for key, value in table.items() if value is not old.get(key, _MISSING))
        _replaced.extend((table, key, old.get(key, _MISSING)) for key in changed)
    if PEFT_TABLES in sys.modules:
        fill_peft_tables()
    else:
        sys.meta_path.insert(0, _peft_watcher)


def unregister() -> None:
    """Put back what `register` and `replace_builtin` found. Idempotent."""
    if _peft_watcher in sys.meta_path:
        sys.meta_path.remove(_peft_watcher)
    while _replaced:
        table, key, value = _replaced.pop()
        if value is _MISSING:
            table.pop(key, None)
        else:
            table[key] = value


def replace_builtin() -> None:
    """Register, and put our classes in the place of transformers' own BigBird: whoever imports `BigBirdModel` or its
    like from `transformers` or `transformers.models.big_bird` from now on gets ours. Idempotent; `unregister` undoes
    it.

    `python -m bigbird_plus` calls this, for scripts that name the classes.
    """
    register()
    for module in _built_in_modules():
        for name, ours in _counterparts().items():
            if hasattr(module, name) and getattr(module, name) is not ours:
                _put(vars(module), name, ours)


def _built_in_modules() -> list:
    """Those that scripts import BigBird from. transformers and its packages ask their modules for what they lack, and
    so are changed before them."""
    # transformers puts a second module in its own place while it is imported: users may have either.
    found = [transformers, importlib.import_module("transformers")]
    for name, modules in BUILT_IN_MODULES.items():
        package = importlib.import_module(name)
        found += [package, *(getattr(package, module) for module in modules if hasattr(package, module))]
    return found


def _counterparts() -> dict[str, type]:
    """Our classes by their names. The tokenizer without an ending is a fast one in some versions of transformers."""
    modules = (configuration_big_bird, modeling_big_bird, modeling_heads, modeling_bigbird_pegasus)
    classes = {name: value for module in modules for name, value in vars(module).items() if name.startswith("BigBird")}
    theirs = importlib.import_module(f"{BUILT_IN}.tokenization_big_bird").BigBirdTokenizer
    is_fast = issubclass(theirs, PreTrainedTokenizerFast)
    classes["BigBirdTokenizer"] = BigBirdTokenizerFast if is_fast else BigBirdTokenizer
    return {**classes, "BigBirdTokenizerFast": BigBirdTokenizerFast}


def _put(table: dict, key: Any, value: Any) -> None:
    """Writes to a table as `unregister` can undo."""
    _replaced.append((table, key, table.get(key, _MISSING)))
    table[key] = value


def fill_peft_tables() -> None:
    """Let PEFT find the layers that adapters go to: they have BERT's names."""
    for table in peft_tables():
        if BigBirdConfig.model_type not in table:
            _put(table, BigBirdConfig.model_type, table["bert"])


class _PeftWatcher(MetaPathFinder):
    """Fills PEFT's tables as they are imported. (To import PEFT for that would take longer than all the rest.)"""

    def find_spec(self, name, path=None, target=None):
        if name != PEFT_TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_fill(module):
            execute(module)
            fill_peft_tables()

        spec.loader.exec_module = execute_and_fill
        return spec


_peft_watcher = _PeftWatcher()


def register_pipelines() -> None:
    """Give `pipeline` the task "extractive-question-answering", and "summarization" where transformers has it no
    more."""
    _register_pipeline(TASK, ExtractiveQuestionAnsweringPipeline, AutoModelForQuestionAnswering)
    if SUMMARIZATION not in PIPELINE_REGISTRY.supported_tasks:
        _register_pipeline(SUMMARIZATION, SummarizationPipeline, AutoModelForSeq2SeqLM)
    removed = getattr(pipelines, "REMOVED_TASKS", {})  # which `pipeline` refuses, whatever is registered
    if SUMMARIZATION in removed:
        _replaced.append((removed, SUMMARIZATION, removed.pop(SUMMARIZATION)))


def _register_pipeline(task: str, pipeline_class: type, auto_class: type) -> None:
    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=auto_class, type="text")
    # Where transformers finds this, it saves a copy of the class's source with each model, and asks to trust it.
    del pipeline_class._registered_impl  # type: ignore[attr-defined]  # register_pipeline sets it


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
        names: dict[str, Any] = tokenization_auto.TOKENIZER_MAPPING_NAMES
        names[BigBirdConfig.model_type] = _HiddenNames(names[BigBirdConfig.model_type])
