"""BigBird-Pegasus, which summarises long documents: an encoder on our attention, transformers' own decoder and heads.

Checkpoints, configuration and tokenizer are those of transformers. The encoder reads as transformers' does, but a
short input changes nothing for later ones, memory grows linearly, and no forward pass draws from NumPy's global
generator.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BigBirdPegasusConfig, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusClassificationHead,
    BigBirdPegasusLearnedPositionalEmbedding,
    BigBirdPegasusScaledWordEmbedding,
)
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import BigBirdPegasusDecoder as BuiltInDecoder
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusForConditionalGeneration as BuiltInForConditionalGeneration,
)
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusForQuestionAnswering as BuiltInForQuestionAnswering,
)
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusForSequenceClassification as BuiltInForSequenceClassification,
)
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import BigBirdPegasusModel as BuiltInModel
from transformers.models.bigbird_pegasus.modeling_bigbird_pegasus import (
    BigBirdPegasusPreTrainedModel as BuiltInPreTrainedModel,
)

from .attention import masks
from .attention.parts import Tokens
from .attention.plan import Plan, make_plan
from .configuration_big_bird import BigBirdConfig, check_attention_type
from .cpu import feed_forward, in_chunks, linear, trains_as_one
from .modeling_big_bird import (
    BigBirdSelfAttention,
    activation_function,
    as_configured,
    as_requested,
    check_inputs,
    refuse_empty,
    the_inputs,
)

OWN_FIELDS = (
    "computes_padding",
    "different_layout_per_head",
    "eval_random_blocks",
    "pattern_per_document",
    "random_blocks",
    "random_plan_positions",
)
"""Fields of `BigBirdConfig` that a `BigBirdPegasusConfig` may have, too, with the same meanings and defaults."""


class EncoderSettings(SimpleNamespace):
    """The fields of `BigBirdConfig` that attention asks for, of the encoder of a `BigBirdPegasusConfig`."""

    @classmethod
    def of(cls, config: BigBirdPegasusConfig) -> "EncoderSettings":
        """The settings that a configuration names.

        Raises:
            ValueError: for a field whose value makes no model.
        """
        own_fields = {name: getattr(config, name) for name in OWN_FIELDS if hasattr(config, name)}
        checked = BigBirdConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.encoder_layers,
            num_attention_heads=config.encoder_attention_heads,
            intermediate_size=config.encoder_ffn_dim,
            hidden_act=config.activation_function,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.attention_dropout,
            max_position_embeddings=config.max_position_embeddings,
            pad_token_id=config.pad_token_id,
            attention_type=config.attention_type,
            use_bias=config.use_bias,
            block_size=config.block_size,
            num_random_blocks=config.num_random_blocks,
            **own_fields,
        )
        return cls(of_model=config, longest_input=checked.longest_input, **vars(checked))

    @property
    def _attn_implementation(self) -> str:
        """That of the model, which can be changed at any time. The default, `"eager"`, is for the decoder's sake,
        which tells its probabilities by no other; the encoder tells them by all, and gets the same faster."""
        name = self.of_model._attn_implementation
        return "sdpa" if name == "eager" else name


class BigBirdPegasusEncoderAttention(nn.Module):
    """Attention, and the projection of its context."""

    def __init__(self, settings: EncoderSettings, layer_idx: int):
        super().__init__()
        self.self = BigBirdSelfAttention(settings, layer_idx)
        self.output = nn.Linear(settings.hidden_size, settings.hidden_size, bias=settings.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `BigBirdSelfAttention.forward`, projected."""
        context, probabilities = self.self(
            hidden_states, attention_mask, head_mask, output_attentions=output_attentions
        )
        return linear(self.output, context), probabilities


class BigBirdPegasusEncoderLayer(GradientCheckpointingLayer):
    """Self-attention and the feed-forward part; either normalises what it takes, and adds to it."""

    def __init__(self, config: BigBirdPegasusConfig, settings: EncoderSettings, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        self.intermediate_size = config.encoder_ffn_dim
        self.self_attn = BigBirdPegasusEncoderAttention(settings, layer_idx)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.activation_fn = activation_function(config.activation_function)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Plan | Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """New hidden states, `[batch, length, d_model]`, and the probabilities or None; arguments as those of
        `BigBirdSelfAttention.forward`."""
        states, probabilities = self.self_attn(
            self.self_attn_layer_norm(hidden_states), attention_mask, head_mask, output_attentions
        )
        hidden_states = hidden_states + self._drop(states)
        modules = (self.fc1, self.fc2, self.final_layer_norm)
        return in_chunks(
            self._feed_forward, hidden_states, width=self.intermediate_size, modules=modules
        ), probabilities

    def _feed_forward(self, hidden_states):
        states = self.final_layer_norm(hidden_states)
        if trains_as_one(self.fc1, self.activation_fn, self.fc2, states):
            states = feed_forward(self.fc1, self.fc2, states)
        else:
            states = linear(self.fc2, linear(self.fc1, states, self.activation_fn))
        hidden_states = hidden_states + self._drop(states)
        if hidden_states.dtype is torch.float16:  # Pegasus was trained in bfloat16, which reaches further
            most = torch.finfo(torch.float16).max - 1000
            hidden_states = hidden_states.clamp(-most, most)
        return hidden_states

    def _drop(self, states):
        return nn.functional.dropout(states, self.dropout, self.training)


class BigBirdPegasusPreTrainedModel(BuiltInPreTrainedModel):
    """What all models here share."""

    accepts_loss_kwargs = False
    _supports_sdpa = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its own idioms in the source of this module

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """The attention implementation for the one that is asked for: by default `"eager"`, as in transformers."""
        return super().get_correct_attn_implementation(requested_attention or "eager", *args, **kwargs)

    def tie_weights(self, *args, **kwargs) -> None:
        """As in all models of transformers; and gives encoder and decoder, where a file lacks their embeddings, copies
        of `shared`: with `tie_word_embeddings=False`, transformers 4 writes the three as one, and reads them no more.

        Which ones a file lacks, version 5 tells (`missing_keys`); with version 4 they are still without numbers.
        Before it reads the file they are one, so that it takes none to be new."""
        super().tie_weights(*args, **kwargs)
        model, missing_keys = self.base_model, kwargs.get("missing_keys") or set()
        if not isinstance(model, BigBirdPegasusModel):
            return
        for part in ("encoder", "decoder"):
            embeddings = getattr(model, part).embed_tokens
            name = f"{'' if model is self else 'model.'}{part}.embed_tokens.weight"
            if embeddings.weight.is_meta or name in missing_keys:
                shared = model.shared.weight
                embeddings.weight = shared if shared.is_meta else nn.Parameter(shared.detach().clone())
                missing_keys.discard(name)

    def set_attention_type(self, value: str) -> None:
        """Chooses which tokens of a document read which, from the next call on: `"block_sparse"` or
        `"original_full"`. The configuration says so, too, and `save_pretrained` keeps it.

        Raises:
            ValueError: for any other value.
        """
        self.get_encoder().set_attention_type(value)


class BigBirdPegasusEncoder(BigBirdPegasusPreTrainedModel):
    """From the tokens of a document to their hidden states."""

    main_input_name = "input_ids"

    def __init__(self, config: BigBirdPegasusConfig):
        super().__init__(config)
        self.settings = EncoderSettings.of(config)
        self.attention_type = config.attention_type
        self.dropout = config.dropout
        self.layerdrop = config.encoder_layerdrop
        self.embed_tokens = _word_embeddings(config)
        self.embed_positions = BigBirdPegasusLearnedPositionalEmbedding(config.max_position_embeddings, config.d_model)
        self.layers = nn.ModuleList(
            BigBirdPegasusEncoderLayer(config, self.settings, layer_idx) for layer_idx in range(config.encoder_layers)
        )
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.gradient_checkpointing = False
        self.post_init()

    def set_attention_type(self, value: str) -> None:
        """As `BigBirdPegasusPreTrainedModel.set_attention_type`."""
        check_attention_type(value)
        self.attention_type = self.config.attention_type = value
        for module in self.modules():
            if isinstance(module, BigBirdSelfAttention):
                module.attention_type = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Hidden states of `[batch, length]` tokens.

        Args:
            input_ids: `int64`, `[batch, length]`.
            attention_mask: `[batch, length]`, 1 where a token is real, 0 where it is padding, whose states are zero.
            inputs_embeds: `[batch, length, d_model]`, in the place of `input_ids`.
            head_mask: `[layers, heads]`: what the output of each attention head is multiplied by.
            output_attentions, output_hidden_states, return_dict: as in all models of transformers.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, if there are more tokens than
                positions, or if a mask does not fit.
        """
        config = self.config
        output_attentions, output_hidden_states = as_configured(config, output_attentions, output_hidden_states)
        check_inputs(input_ids, inputs_embeds, None, None, config.d_model)
        refuse_empty(the_inputs(input_ids, inputs_embeds))
        words = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        plan = self._plan(words, attention_mask)
        states = words + self.embed_positions(words.shape[:2], position_ids=plan.positions)
        states = plan.enter(nn.functional.dropout(states, self.dropout, self.training))
        all_states: list[Tensor] = []
        attentions: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                all_states.append(plan.leave(states))
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            states, probabilities = layer(
                states, plan, None if head_mask is None else head_mask[index], output_attentions
            )
            if output_attentions:
                attentions.append(plan.leave_probabilities(probabilities))
        states = plan.leave(self.layernorm_embedding(states))
        output = BaseModelOutput(
            last_hidden_state=states,
            hidden_states=(*all_states, states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return as_requested(output, return_dict, config)

    def _plan(self, words: Tensor, attention_mask: Tensor | None) -> Plan:
        batch, length = words.shape[:2]
        tokens = Tokens(
            batch=batch,
            cache_position=torch.arange(length, device=words.device),
            dtype=masks.compute_dtype(words.dtype, words.device),
            attention_mask=attention_mask,
        )
        return make_plan(self.settings, self.attention_type, tokens, keeps_all=self.settings.computes_padding)


class BigBirdPegasusDecoder(BigBirdPegasusPreTrainedModel, BuiltInDecoder):
    """transformers' decoder, with `scaled_dot_product_attention`, too."""

    def __init__(self, config: BigBirdPegasusConfig):
        super().__init__(config)
        for layer in self.layers:
            attention: Any = layer.self_attn
            attention.is_causal = True  # attention functions look for it where there is no mask
            layer.activation_fn = activation_function(config.activation_function)  # in one pass


class BigBirdPegasusModel(BigBirdPegasusPreTrainedModel, BuiltInModel):
    """Encoder and decoder without a head on top."""

    def __init__(self, config: BigBirdPegasusConfig):
        super(BuiltInModel, self).__init__(config)  # which would build transformers' encoder
        self.shared = _word_embeddings(config)
        self.encoder = BigBirdPegasusEncoder(config)  # type: ignore[assignment]  # ours, in the place of theirs
        self.decoder = BigBirdPegasusDecoder(config)
        self.post_init()


class BigBirdPegasusForConditionalGeneration(BigBirdPegasusPreTrainedModel, BuiltInForConditionalGeneration):
    """Writes a text, as a summary, of the one that it reads."""

    def __init__(self, config: BigBirdPegasusConfig):
        super(BuiltInForConditionalGeneration, self).__init__(config)
        self.model = BigBirdPegasusModel(config)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()


class BigBirdPegasusForSequenceClassification(BigBirdPegasusPreTrainedModel, BuiltInForSequenceClassification):
    """Classes of a whole document."""

    def __init__(self, config):
        super(BuiltInForSequenceClassification, self).__init__(config)
        self.model = BigBirdPegasusModel(config)
        width, dropout = config.d_model, config.classifier_dropout
        self.classification_head = BigBirdPegasusClassificationHead(width, width, config.num_labels, dropout)
        self.post_init()


class BigBirdPegasusForQuestionAnswering(BigBirdPegasusPreTrainedModel, BuiltInForQuestionAnswering):
    """Where in a document an answer stands."""

    def __init__(self, config):
        config.num_labels = self.num_labels = 2  # start and end
        super(BuiltInForQuestionAnswering, self).__init__(config)
        self.model = BigBirdPegasusModel(config)
        self.qa_outputs = nn.Linear(config.d_model, config.num_labels)
        self.post_init()


def _word_embeddings(config) -> BigBirdPegasusScaledWordEmbedding:
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    return BigBirdPegasusScaledWordEmbedding(config.vocab_size, config.d_model, config.pad_token_id, scale)
