"""The task models: `BigBirdModel` with a head, and what they return."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, logging

from ._compat import CACHE
from .attention.common import is_tracing
from .attention.documents import (
    Flattened,
    document_starts,
    first_places,
    first_states,
    holds_documents,
    is_first_place,
    uncompiled_for_documents,
)
from .attention.processes import active_processes
from .cpu import linear
from .modeling_big_bird import (
    BigBirdIntermediate,
    BigBirdModel,
    BigBirdOutput,
    BigBirdPreTrainedModel,
    activation_function,
    as_requested,
    positions_of_documents,
    the_inputs,
)
from .parallel import mean_of_all, own_labels, whole

logger = logging.get_logger(__name__)


@dataclass
class BigBirdForPreTrainingOutput(ModelOutput):
    """What `BigBirdForPreTraining` returns.

    Attributes:
        loss: scalar, the sum of the masked language modelling and the next sentence loss.
        prediction_logits: `[batch, length, vocab_size]`.
        seq_relationship_logits: `[batch, 2]`: whether the second part follows the first (0) or does not (1).
        hidden_states, attentions: as in all models of transformers.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BigBirdForQuestionAnsweringModelOutput(ModelOutput):
    """What `BigBirdForQuestionAnswering` returns.

    Attributes:
        loss: scalar, the mean of the losses of the start and the end.
        start_logits, end_logits: `[batch, length]`.
        pooler_output: `[batch, hidden_size]`, None without a pooling layer.
        hidden_states, attentions: as in all models of transformers.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


IGNORED_LABEL = -100
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


def check_labels(labels: Tensor, shape: tuple[int, ...]) -> None:
    """Raises a `ValueError` unless there is a label for each place. Where places are in one dimension, any shape of as
    many labels is fine."""
    if labels.numel() != math.prod(shape) or (len(shape) > 1 and labels.shape != shape):
        raise ValueError(f"labels must have the shape {list(shape)}, but have {list(labels.shape)}.")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the labels that are not -100; `logits` has one dimension more than `labels`."""
    check_labels(labels, logits.shape[:-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).flatten())


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The same of `[batch, length]` labels, or some of them, where processes may share the tokens."""
    if active_processes() is None:
        return cross_entropy(logits, labels)
    labels = labels.to(logits.device).flatten()
    total = nn.functional.cross_entropy(logits.flatten(0, -2), labels, reduction="sum")
    return mean_of_all(total, (labels != IGNORED_LABEL).sum())


def have_labels(labels: Tensor | None, attention_mask: Tensor | None) -> Tensor | bool:
    """`bool`, `[batch, length]`: which places have labels, for which the states even of padding have to be computed;
    False where nothing is padding."""
    if labels is None or attention_mask is None or labels.shape != attention_mask.shape:
        return False
    return labels != IGNORED_LABEL


ONE_DOCUMENT = (
    "position_ids start anew within a row, as those of several documents do, but this head takes one in each row: its "
    "answers are places, or choices, of a row. Pad the documents instead."
)


class _TaskModel(BigBirdPreTrainedModel):
    """What all models with a head share: how they call `BigBirdModel`, and how they answer."""

    bert: BigBirdModel

    def _read(self, inputs: tuple, asked: tuple, **kwargs):
        """What `BigBirdModel` makes of its first six arguments, `inputs`; `asked` are `output_attentions`,
        `output_hidden_states` and `global_attention_mask`."""
        output_attentions, output_hidden_states, global_attention_mask = asked
        return self.bert(
            *inputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            global_attention_mask=global_attention_mask,
            return_dict=True,
            **kwargs,
        )

    def _answer(self, output_class, outputs, return_dict, **fields):
        """`fields`, and the hidden states and probabilities of the model, as the caller wants them."""
        output = output_class(hidden_states=outputs.hidden_states, attentions=outputs.attentions, **fields)
        return as_requested(output, return_dict, self.config)


def classifier_dropout(config) -> nn.Dropout:
    """The dropout of classification heads."""
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


# ---------------------------------------------------------------------------------------------------------------------
# Language models
# ---------------------------------------------------------------------------------------------------------------------


class BigBirdPredictionHeadTransform(nn.Module):
    """The layer between the encoder and the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.embedding_width)
        self.transform_act_fn = activation_function(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., embedding_size]` from `[..., hidden_size]`; both are the same unless the configuration says so."""
        return self.LayerNorm(linear(self.dense, hidden_states, self.transform_act_fn))


class BigBirdLMPredictionHead(nn.Module):
    """Scores of the words. `bias` and `decoder.bias` are one parameter under two names: `tie_weights` sees to it."""

    def __init__(self, config):
        super().__init__()
        self.transform = BigBirdPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.embedding_width, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., vocab_size]` from `[..., hidden_size]`."""
        return linear(self.decoder, self.transform(hidden_states))


class BigBirdOnlyMLMHead(nn.Module):
    """Word scores alone."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BigBirdLMPredictionHead(config)

    def forward(self, sequence_output: Tensor) -> Tensor:
        """`[..., vocab_size]` from `[..., hidden_size]`."""
        return self.predictions(sequence_output)


class BigBirdPreTrainingHeads(nn.Module):
    """Word scores and the relation of two sentences."""

    def __init__(self, config):
        super().__init__()
        self.predictions = BigBirdLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, length, vocab_size]` and `[batch, 2]`."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class _LanguageModel(_TaskModel):
    """What the models with a vocabulary projection share: tied weights, and one bias under two names."""

    _tied_weights_keys = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _keys_to_ignore_on_load_missing = [r"cls\.predictions\.decoder\.bias"]

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, BigBirdLMPredictionHead):
            nn.init.zeros_(module.bias)

    def tie_weights(self, *args, **kwargs):
        """Ties the projection to the embeddings if the configuration says so, and its bias to itself in any case."""
        super().tie_weights(*args, **kwargs)
        predictions, embeddings = self.cls.predictions, self.get_input_embeddings().weight
        if embeddings.is_meta or predictions.decoder.weight.is_meta or predictions.bias.is_meta:
            return  # nothing is loaded yet: transformers wants to see every name as a parameter of its own
        # Files hold the bias under either name or both. The one that is missing is zero.
        if not predictions.decoder.bias.is_meta and predictions.decoder.bias.any():
            predictions.bias = predictions.decoder.bias
        else:
            predictions.decoder.bias = predictions.bias
        # A file that holds the tied weight twice keeps some versions of transformers from tying it.
        weight = predictions.decoder.weight
        if self.config.tie_word_embeddings and weight is not embeddings and torch.equal(weight, embeddings):
            predictions.decoder.weight = embeddings

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """As in all models of transformers. If the embeddings are not tied, the bias is written under both its names:
        version 4 of transformers' own BigBird looks for the one, version 5 for the other."""
        if not self.config.tie_word_embeddings and not any(parameter.is_meta for parameter in self.parameters()):
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            for name, tensor in state_dict.items():
                if name.endswith("predictions.decoder.bias"):
                    state_dict[name] = tensor.clone()
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


def refuse_decoder(model: _TaskModel) -> None:
    """Raises a `ValueError` if a model that tells something of a document from its first token is a decoder, in which
    the first token reads nothing but itself."""
    if model.config.is_decoder:
        raise ValueError(
            f"{type(model).__name__} classifies by the state of the first token, which in a decoder has read nothing "
            "but itself: is_decoder must be False."
        )


class BigBirdForPreTraining(_LanguageModel):
    """Masked language modelling and next sentence prediction."""

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        refuse_decoder(self)
        self.bert = BigBirdModel(config)
        self.cls = BigBirdPreTrainingHeads(config)
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        global_attention_mask: Tensor | None = None,
        **kwargs: Unpack[Flattened],
    ) -> BigBirdForPreTrainingOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            labels: `int64`, `[batch, length]`: the words to predict, -100 where none is.
            next_sentence_label: `int64`, `[batch]`: 0 if the second part follows the first, 1 if not. Its loss is
                added where `labels` are given, too. Where rows hold several documents, there is one for each.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(inputs, asked, computes_padding=have_labels(labels, attention_mask), **kwargs)
        prediction_logits, seq_relationship_logits = self.cls(outputs.last_hidden_state, outputs.pooler_output)
        loss, labels = None, own_labels(labels, prediction_logits)
        if labels is not None:
            loss = token_loss(prediction_logits, labels)
            if next_sentence_label is not None:
                loss = loss + cross_entropy(seq_relationship_logits, next_sentence_label)
        return self._answer(
            BigBirdForPreTrainingOutput,
            outputs,
            return_dict,
            loss=loss,
            prediction_logits=prediction_logits,
            seq_relationship_logits=seq_relationship_logits,
        )


class BigBirdForMaskedLM(_LanguageModel):
    """Masked language modelling. With `config.is_decoder=True` each place is told from those up to it alone."""

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        self.bert = BigBirdModel(config)
        self.cls = BigBirdOnlyMLMHead(config)
        self.bert.freeze_pooler()
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values=None,
        global_attention_mask: Tensor | None = None,
        **kwargs: Unpack[Flattened],
    ) -> MaskedLMOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            labels: `int64`, `[batch, length]`: the words to predict, -100 where none is. With
                `config.sparse_prediction` the logits are those of the words to predict alone, `[words, vocab_size]`.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(
            inputs,
            asked,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=False,
            computes_padding=have_labels(labels, attention_mask),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        labels = own_labels(labels, hidden_states)
        if labels is not None and self.config.sparse_prediction and not is_tracing():
            check_labels(labels, hidden_states.shape[:2])
            counts = labels != IGNORED_LABEL
            hidden_states, labels = hidden_states[counts], labels[counts]
        logits = self.cls(hidden_states)
        return self._answer(
            MaskedLMOutput,
            outputs,
            return_dict,
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
        )


class BigBirdForCausalLM(_LanguageModel, GenerationMixin):
    """Language modelling from left to right, with `generate`. Wants `config.is_decoder=True`."""

    accepts_loss_kwargs = True

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        if not config.is_decoder:
            logger.warning_once(
                "BigBirdForCausalLM reads later tokens, too, unless its configuration has is_decoder=True: pass "
                "is_decoder=True to from_pretrained to predict or generate text from left to right."
            )
        self.bert = BigBirdModel(config)
        self.cls = BigBirdOnlyMLMHead(config)
        self.bert.freeze_pooler()
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """`generate` asks for masks that are ready for a static cache. Ours are made in `forward`."""
        return attention_mask

    def init_continuous_batching(self, *args, **kwargs):
        """Raises a `ValueError`: `generate_batch` and the other ways to continuous batching all begin here."""
        raise ValueError(
            "BigBird has no continuous batching (generate_batch, cache_implementation='paged'), which keeps keys in "
            "pages. Pad the prompts on the left (padding_side='left' in the tokenizer), and call generate."
        )

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        global_attention_mask: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            labels: `int64`, `[batch, length]`: the tokens themselves, -100 for those that do not count; the model
                compares each with what it predicts one place earlier.
            logits_to_keep: compute the logits of so many last tokens only (0: of all), or of those at these indices.
            **kwargs: `num_items_in_batch` and `ignore_index` are handed to the loss, others to `BigBirdModel`. Where
                rows hold several documents, nobody is asked for the first token of any.
        """
        flattened = {name: kwargs.pop(name) for name in list(kwargs) if name not in LOSS_ARGUMENTS}
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(
            inputs,
            asked,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            cache_position=cache_position,
            computes_padding=labels is not None,  # in an encoder, which it is not to be, padding has labels
            **flattened,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        shares = active_processes() is not None and kept == slice(0, None)
        states = outputs.last_hidden_state if shares else whole(outputs.last_hidden_state)
        logits = self.cls(states[:, kept])
        loss = None
        if labels is not None:
            check_labels(labels, the_inputs(input_ids, inputs_embeds).shape[:2])
            documents = positions_of_documents(position_ids, attention_mask, input_ids, inputs_embeds, flattened)
            if documents is not None:
                labels = labels.masked_fill(document_starts(documents).expand(labels.shape), IGNORED_LABEL)
            compute_loss = self._shared_loss if shares else self.loss_function
            loss = compute_loss(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return self._answer(
            CausalLMOutputWithCrossAttentions,
            outputs,
            return_dict,
            loss=loss,
            logits=logits,
            cross_attentions=outputs.cross_attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def _shared_loss(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=IGNORED_LABEL, **kwargs):
        """The loss of tokens that processes share, `logits` being those of this one."""
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != ignore_index).sum()
        kwargs |= {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        targets = own_labels(targets, logits).contiguous()
        loss = self.loss_function(logits, targets, vocab_size, shift_labels=targets, **kwargs)
        return active_processes().total(loss)


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------


class BigBirdClassificationHead(nn.Module):
    """Scores of the classes of a whole input, from the state of its first token."""

    weight = None  # some adapters of PEFT ask a head that they train whole for it as they merge

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = classifier_dropout(config)
        activation = config.classifier_activation
        self.activation = activation_function(config.hidden_act if activation is None else activation)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, num_labels]` from hidden states, `[batch, length, hidden_size]`."""
        states = self.dropout(features[:, 0])
        return self.out_proj(self.dropout(self.activation(self.dense(states))))


class BigBirdForSequenceClassification(_TaskModel):
    """Classes of, or with one label a number for, a whole input."""

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        refuse_decoder(self)
        self.num_labels = config.num_labels
        self.bert = BigBirdModel(config)
        self.classifier = BigBirdClassificationHead(config)
        self.bert.freeze_pooler()
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values=None,
        global_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[Flattened],
    ) -> SequenceClassifierOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            labels: `int64`, `[batch]`: the class; float, `[batch]`, for regression (mean squared error); float,
                `[batch, num_labels]`, for several labels at once (binary cross entropy). `config.problem_type` says
                which; where it is None, the number of labels and the dtype do. Where rows hold several documents,
                logits and labels are `[documents, ...]`.
            use_cache: without effect. trl's reward models are told not to.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(
            inputs,
            asked,
            past_key_values=past_key_values,
            use_cache=use_cache,
            computes_padding=attention_mask is not None and is_first_place(attention_mask),
            **kwargs,
        )
        documents = positions_of_documents(position_ids, attention_mask, input_ids, inputs_embeds, kwargs)
        states = whole(outputs.last_hidden_state)  # of all tokens: a classifier of one's own may read what it likes
        if documents is not None or self.config.pattern_per_document:
            states = first_states(states, attention_mask, self.config, documents)[:, None]
        logits = self.classifier(states)
        return self._answer(
            SequenceClassifierOutput,
            outputs,
            return_dict,
            loss=None if labels is None else self._loss(logits, labels.to(logits.device)),
            logits=logits,
        )

    def _loss(self, logits, labels):
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            elif labels.is_floating_point():
                problem_type = "multi_label_classification"
            else:
                problem_type = "single_label_classification"
        if problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.squeeze())
        if problem_type == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return cross_entropy(logits, labels)


class BigBirdForMultipleChoice(_TaskModel):
    """Which of several inputs is the right one."""

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        refuse_decoder(self)
        self.bert = BigBirdModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> MultipleChoiceModelOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, with a dimension more: `[batch, num_choices, length]`, and:

        Args:
            labels: `int64`, `[batch]`: the right choice.
        """
        num_choices = the_inputs(input_ids, inputs_embeds).shape[1]
        if position_ids is not None and holds_documents(_without_choices(position_ids), None):
            raise ValueError(ONE_DOCUMENT)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids)
        inputs = (*map(_without_choices, inputs), head_mask, _without_choices(inputs_embeds))
        outputs = self._read(
            inputs, (output_attentions, output_hidden_states, _without_choices(global_attention_mask))
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        return self._answer(
            MultipleChoiceModelOutput,
            outputs,
            return_dict,
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
        )


def _without_choices(tensor):
    """`[batch, num_choices, ...]` -> `[batch * num_choices, ...]`."""
    return None if tensor is None else tensor.flatten(0, 1)


class BigBirdForTokenClassification(_TaskModel):
    """Classes of each token."""

    def __init__(self, config):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        super().__init__(config)
        config = self.config
        self.num_labels = config.num_labels
        self.bert = BigBirdModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.bert.freeze_pooler()
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values=None,
        global_attention_mask: Tensor | None = None,
        **kwargs: Unpack[Flattened],
    ) -> TokenClassifierOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            labels: `int64`, `[batch, length]`: the class of each token, -100 for those that do not count.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(
            inputs,
            asked,
            past_key_values=past_key_values,
            computes_padding=have_labels(labels, attention_mask),
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        labels = own_labels(labels, logits)
        return self._answer(
            TokenClassifierOutput,
            outputs,
            return_dict,
            loss=None if labels is None else token_loss(logits, labels),
            logits=logits,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Question answering
# ---------------------------------------------------------------------------------------------------------------------


class BigBirdForQuestionAnsweringHead(nn.Module):
    """Scores of each token as the start and as the end of the answer."""

    weight = None  # as in `BigBirdClassificationHead`

    def __init__(self, config):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.intermediate = BigBirdIntermediate(config)
        self.output = BigBirdOutput(config)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, encoder_output: Tensor) -> Tensor:
        """`[batch, length, 2]` from `[batch, length, hidden_size]`."""
        states = self.intermediate(self.dropout(encoder_output))
        return self.qa_outputs(self.output(states, encoder_output))


class BigBirdForQuestionAnswering(_TaskModel):
    """Where in the second part of an input the answer to the first part stands.

    Args:
        config: a `BigBirdConfig`.
        add_pooling_layer: whether to return `pooler_output`, too, for a loss of yours that trains the layer.
    """

    def __init__(self, config, add_pooling_layer=False):
        """New weights; `from_pretrained` loads those of a checkpoint."""
        config.num_labels = 2  # start and end
        super().__init__(config)
        config = self.config
        self.bert = BigBirdModel(config, add_pooling_layer=add_pooling_layer)
        self.qa_classifier = BigBirdForQuestionAnsweringHead(config)
        self.post_init()

    @uncompiled_for_documents
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        question_lengths: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values=None,
        global_attention_mask: Tensor | None = None,
    ) -> BigBirdForQuestionAnsweringModelOutput | tuple:
        """Arguments as those of `BigBirdModel.forward`, and:

        Args:
            question_lengths: `int64`, `[batch, 1]` (or `[batch]`): tokens of the question, `[CLS]` and `[SEP]`
                included, none of which but the first can be the answer. By default all up to the first
                `config.sep_token_id`. Where `token_type_ids` are not given, they are 0 up to there and 1 behind.
            start_positions, end_positions: `int64`, `[batch]`: first and last token of the answer. Those beyond the
                input do not count.
        """
        length = the_inputs(input_ids, inputs_embeds).shape[1]
        if holds_documents(position_ids, attention_mask):
            raise ValueError(ONE_DOCUMENT)
        in_question = self._question_mask(input_ids, question_lengths, length)
        if token_type_ids is None and in_question is not None and self.config.type_vocab_size > 1:
            token_type_ids = (~in_question).long()
        if self.config.global_question_tokens and in_question is not None:
            chosen = in_question if global_attention_mask is None else in_question | (global_attention_mask != 0)
            global_attention_mask = chosen.long()
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        asked = (output_attentions, output_hidden_states, global_attention_mask)
        outputs = self._read(
            inputs,
            asked,
            past_key_values=past_key_values,
            # the loss is of all places of the tensor, padding included, unless documents are read as they are alone
            computes_padding=start_positions is not None and not self.config.pattern_per_document,
        )
        logits = whole(self.qa_classifier(outputs.last_hidden_state))
        if in_question is not None:
            first = first_places(logits, attention_mask, self.config)
            no_answer = in_question & (torch.arange(length, device=in_question.device) != first[:, None])
            logits = logits - no_answer[..., None] * 1e6
        if self.config.pattern_per_document and attention_mask is not None:
            logits = logits - (attention_mask == 0)[..., None] * 1e6
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [_position_loss(start_logits, start_positions), _position_loss(end_logits, end_positions)]
            loss = sum(losses) / 2
        return self._answer(
            BigBirdForQuestionAnsweringModelOutput,
            outputs,
            return_dict,
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            pooler_output=outputs.pooler_output,
        )

    def _question_mask(self, input_ids, question_lengths, length):
        """`bool`, `[batch, length]`: which tokens are the question's; None where it is not known."""
        if question_lengths is None:
            if input_ids is None:
                return None
            if self.config.sep_token_id is None:
                raise ValueError("Give question_lengths: config.sep_token_id, where questions would end, is None.")
            question_lengths = (input_ids == self.config.sep_token_id).int().argmax(-1) + 1
        return torch.arange(length, device=question_lengths.device) < question_lengths.reshape(-1, 1)


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy of `[batch, length]`, without the positions beyond the input."""
    length = logits.shape[1]
    positions = positions.to(logits.device).flatten().clamp(0, length)
    return nn.functional.cross_entropy(logits, positions, ignore_index=length)
