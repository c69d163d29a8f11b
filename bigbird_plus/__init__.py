"""BigBird for transformers: importing this package registers its classes with the Auto classes, and no more."""

from . import _compat  # noqa: F401 (first: it keeps others quiet that transformers imports)
from .attention import block_sparse_attention, register_engine
from .attention.pattern import BlockPattern, Sparsity
from .auto import register, replace_builtin, unregister
from .configuration_big_bird import BigBirdConfig
from .conversion import convert_checkpoint
from .data_collator import DataCollatorForDocuments
from .demo import demo_checkpoint
from .heatmap import plot_attention
from .modeling_big_bird import BigBirdModel, BigBirdPreTrainedModel
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
    BigBirdForPreTrainingOutput,
    BigBirdForQuestionAnswering,
    BigBirdForQuestionAnsweringModelOutput,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from .parallel import context_parallel
from .pipelines import ExtractiveQuestionAnsweringPipeline, SummarizationPipeline
from .quantization import BigBirdInt8Config, quantize
from .tokenization_big_bird import BigBirdTokenizer
from .tokenization_big_bird_fast import BigBirdTokenizerFast

__version__ = "0.1.0"
__docformat__ = "google"  # of docstrings, for pdoc

__all__ = [
    "BigBirdConfig",
    "BigBirdForCausalLM",
    "BigBirdForMaskedLM",
    "BigBirdForMultipleChoice",
    "BigBirdForPreTraining",
    "BigBirdForPreTrainingOutput",
    "BigBirdForQuestionAnswering",
    "BigBirdForQuestionAnsweringModelOutput",
    "BigBirdForSequenceClassification",
    "BigBirdForTokenClassification",
    "BigBirdInt8Config",
    "BigBirdModel",
    "BigBirdPegasusForConditionalGeneration",
    "BigBirdPegasusForQuestionAnswering",
    "BigBirdPegasusForSequenceClassification",
    "BigBirdPegasusModel",
    "BigBirdPreTrainedModel",
    "BigBirdTokenizer",
    "BigBirdTokenizerFast",
    "BlockPattern",
    "DataCollatorForDocuments",
    "ExtractiveQuestionAnsweringPipeline",
    "Sparsity",
    "SummarizationPipeline",
    "block_sparse_attention",
    "context_parallel",
    "convert_checkpoint",
    "demo_checkpoint",
    "plot_attention",
    "quantize",
    "register",
    "register_engine",
    "replace_builtin",
    "unregister",
]


register()
