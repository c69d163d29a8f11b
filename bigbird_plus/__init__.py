"""BigBird for transformers. Importing this package registers its classes with the Auto classes, and does nothing else."""

from .attention import block_sparse_attention
from .attention.pattern import BlockPattern, Sparsity
from .configuration_big_bird import BigBirdConfig
from .modeling_big_bird import BigBirdModel, BigBirdPreTrainedModel
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
